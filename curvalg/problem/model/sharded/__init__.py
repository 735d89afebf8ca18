"""Models whose parameters lie in parts on several processes: whole one layer at a time, differentiable any number of times."""

from curvalg.problem.model.sharded.refusals import require_unsharded as require_unsharded
from curvalg.problem.model.sharded.refusals import require_whole as require_whole
from curvalg.problem.model.sharded.refusals import require_whole_vectors as require_whole_vectors
