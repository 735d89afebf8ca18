"""Output structures: taken apart as the model made them, or refused."""

from __future__ import annotations

import pytest
import torch

from curvalg.errors import ProblemError
from curvalg.problem.model import OutputForm
from curvalg.tensors import trees
from tests.support.outputs import STRUCTURES, ModelOutput, Record, Y, Z


@pytest.mark.parametrize("kind", STRUCTURES)
def test_split_gives_what_the_model_made(kind):
    raw = STRUCTURES[kind]
    form = OutputForm(raw, torch.device("cpu"))
    z = form.join(raw)
    again = form.split(2 * z)
    assert type(again) is type(raw)
    assert torch.equal(again.logits, 2 * Z)
    assert torch.equal(form.join(again), 2 * z)
    assert getattr(again, "loss", None) is None
    assert torch.equal(raw.logits, Z)


def test_forms_hold_no_tensors():
    """Recordings keep their form; a tensor in it would keep the graph."""
    for raw in (*STRUCTURES.values(), Z):
        assert not trees.tensors(list(vars(OutputForm(raw, torch.device("cpu"))).values()))


@pytest.mark.parametrize("raw", [{"a": Z, "n": 3}, Record(Z, loss=Z.sum()), ModelOutput(a=Y), None, 1.0])
def test_outputs_that_are_no_tensors_over_samples_are_refused(raw):
    with pytest.raises(ProblemError, match="forward="):
        OutputForm(raw, torch.device("cpu"))
