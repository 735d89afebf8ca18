"""How a problem shows itself: in a line, as a card of a notebook, and to an editor that completes its names."""

from __future__ import annotations

from curvalg.markup import card
from curvalg.problem.model.model import ModuleModel
from curvalg.problem.setting import Setting

PUBLIC = (
    "batches",
    "cache",
    "close",
    "columns",
    "data",
    "device",
    "dtype",
    "gradient",
    "group",
    "layout",
    "loss",
    "model",
    "num_samples",
    "per_sample_gradients",
    "progress",
    "refresh",
    "samples",
    "size",
    "step",
    "value",
    "with_data",
    "with_inputs",
)
"""What users call, and what may be set."""


def described(problem: Setting) -> str:
    """A problem in a line."""
    size = f"{problem.size} parameters in {len(problem.layout.names)} tensors"
    return f"Problem({_model(problem)}, {_loss(problem)}, {size}, {problem.dtype} on {problem.device})"


def problem_card(problem: Setting) -> str:
    """A problem as a card; nothing is computed for it."""
    budget, whole = problem.budget, problem.layout.whole.size
    parts = f", of {whole} on {problem.group.size} processes" if whole != problem.size else ""
    facts = {
        "model": _model(problem),
        "loss": _loss(problem),
        "parameters": f"{problem.size} in {len(problem.layout.names)} tensors{parts}, {problem.dtype} on {problem.device}",
        "samples": f"by {problem.samples}",
        "kept": f"{budget.used / 2**20:.3g} of at most {budget.limit / 2**20:.4g} MiB",
    }
    return card("Problem", facts)


def _model(problem: Setting) -> str:
    return type(problem.model.module).__name__ if isinstance(problem.model, ModuleModel) else "function"


def _loss(problem: Setting) -> str:
    return "no loss" if problem.loss is None else type(problem.loss).__name__
