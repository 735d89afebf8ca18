"""What Hugging Face's models are trained for: which loss, and what its target is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.errors import ProblemError
from curvalg.losses import MSE, BCEWithLogits, CrossEntropy, Loss
from curvalg.losses.loss import Reduction

IGNORED = -100
"""The label of tokens that do not count."""


Rule = Callable[[Tensor], Tensor]
"""Labels -> the target, for outputs of the shape that such models return."""


@dataclass(frozen=True)
class Task:
    """A kind of model: its loss, and the target that the loss gets.

    Args:
        name: the name to choose it by.
        endings: of the names of classes that are made for it.
        make: (config, labels of one batch, reduction) -> the loss, and what makes its target of labels.
        decoder: whether the inputs of a decoder are the labels, shifted.
    """

    name: str
    endings: tuple[str, ...]
    make: Callable[[Any, Tensor, Reduction], tuple[Loss, Rule]]
    decoder: bool = False


def as_they_are(labels: Tensor) -> Tensor:
    """The labels themselves."""
    return labels


def of_next_tokens(labels: Tensor) -> Tensor:
    """The label of the next token at every position; the last has none."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()


def in_one_axis(labels: Tensor) -> Tensor:
    """One label for every row, shape (n,)."""
    return labels.reshape(-1)


def in_one_column(labels: Tensor) -> Tensor:
    """One number for every row, shape (n, 1) as the outputs have."""
    return labels.reshape(-1, 1)


def _tokens(config: Any, labels: Tensor, reduction: Reduction) -> tuple[Loss, Rule]:
    return CrossEntropy(class_axis=-1, ignore_index=IGNORED, reduction=reduction), as_they_are


def _next_tokens(config: Any, labels: Tensor, reduction: Reduction) -> tuple[Loss, Rule]:
    return CrossEntropy(class_axis=-1, ignore_index=IGNORED, reduction=reduction), of_next_tokens


def _rows(config: Any, labels: Tensor, reduction: Reduction) -> tuple[Loss, Rule]:
    """The loss of a row as the library decides it: by the config, else by the number of labels and their dtype."""
    kind = getattr(config, "problem_type", None)
    if kind is None:
        several = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        kind = "regression" if config.num_labels == 1 else several
    if kind == "regression":
        return MSE(reduction=reduction), in_one_column if config.num_labels == 1 else as_they_are
    if kind == "single_label_classification":
        return CrossEntropy(class_axis=-1, ignore_index=IGNORED, reduction=reduction), in_one_axis
    if kind == "multi_label_classification":
        return BCEWithLogits(reduction=reduction), as_they_are
    raise ProblemError(
        "config.problem_type is 'regression', 'single_label_classification' or 'multi_label_classification', got "
        f"{kind!r}; set one of them, or pass loss='model'"
    )


TASKS = {
    task.name: task
    for task in (
        Task("causal_lm", ("ForCausalLM", "LMHeadModel"), _next_tokens),
        Task("masked_lm", ("ForMaskedLM",), _tokens),
        Task("seq2seq_lm", ("ForConditionalGeneration", "MTModel", "EncoderDecoderModel"), _tokens, decoder=True),
        Task("token_classification", ("ForTokenClassification",), _tokens),
        Task("sequence_classification", ("ForSequenceClassification",), _rows),
        Task("image_classification", ("ForImageClassification",), _rows),
    )
}
"""The tasks by name."""


def task_of(model: nn.Module) -> Task:
    """The task that a class is made for, by its name or that of a class it derives from.

    Raises:
        ProblemError: no name ends as those of a known task.
    """
    for kind in type(model).__mro__:
        for task in TASKS.values():
            if kind.__name__.endswith(task.endings):
                decoder_only = task.decoder and not getattr(model.config, "is_encoder_decoder", True)
                return (
                    TASKS["causal_lm"] if decoder_only else task
                )  # as models of images and text, which generate text alone
    raise ProblemError(
        f"the name of {type(model).__name__} does not say what the model is trained for; pass task=, one of {list(TASKS)}, or "
        "loss='model' for the loss that it returns itself"
    )


def named_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ProblemError: there is none.
    """
    if name not in TASKS:
        raise ProblemError(
            f"task is one of {list(TASKS)}, got {name!r}; loss='model' takes the loss that a model returns"
        )
    return TASKS[name]
