"""The check that a row has the same output alone as among the others of its batch."""

from __future__ import annotations

import warnings

from torch import Tensor

from curvalg.errors import CurvalgWarning
from curvalg.problem.model_call import ModelCall
from curvalg.problem.verification.verdicts import FAILURES, rounding

_OATH = "rows alone"


def warn_of_mixed_rows(evaluation: ModelCall, z: Tensor) -> None:
    """Warn, once a structure, where the output of a row depends on the other rows of its batch.

    Gradients of rows are right then for the batches as they are, but what they are compared with or used for on other data
    depends on which rows share a batch. One model call on the first row shows it. Models that take no single row, or give one
    an output of another shape (padded to the longest), are not judged.

    Args:
        evaluation: of a batch.
        z: its output.
    """
    problem, sample, sworn = evaluation.problem, evaluation.sample, evaluation.snapshot.structure.found.sworn
    if not problem.verify or problem.draws.mode != "refuse" or sample.rows < 2 or _OATH in sworn:
        return
    try:
        alone = evaluation.of(sample.head(1)).live_output()
    except FAILURES:
        sworn.add(_OATH)
        return
    sworn.add(_OATH)
    first = z.detach()[: len(alone)] if alone.ndim else z.detach()
    if first.shape != alone.shape or alone.numel() * sample.rows != z.numel():
        return
    error, size = float((first - alone).norm()), float(z.detach().norm()) / sample.rows**0.5
    if not error > rounding(evaluation, z) * (size + float(alone.norm())):
        return
    warnings.warn(
        f"the output of a row depends on the other rows of its batch: alone, the first row gives another one (they differ by "
        f"{error / (size or 1.0):.1e}, relative). Gradients and scores of single rows are of the batches as they are, and "
        "change with how rows are put into batches. Take means and norms along other axes than the first, or pass batches of "
        "one row; Problem(verify=False) leaves this check out",
        CurvalgWarning,
        stacklevel=2,
    )
