"""How models of Hugging Face's are called, and what is taken of their batches and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvalg.errors import ProblemError, ProblemTypeError
from curvalg.integrations.tasks import IGNORED, Rule
from curvalg.tensors import trees

LABELS = ("labels", "label")
"""Keys that name the labels of a batch."""

QUIET = {"use_cache": False, "return_dict": True}
"""Keywords that a model is called with where it takes them: no keys and values of earlier tokens, outputs by name."""


def base_of(model: nn.Module) -> Any:
    """The model of the library inside of an adapter of peft's, or itself."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def accepted_names(model: nn.Module) -> tuple[str, ...]:
    """The names of what a model's forward takes; those of the model inside, where a wrapper takes anything."""
    return tuple(inspect.signature(base_of(model).forward).parameters)


def as_mapping(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise ProblemTypeError(
            f"expected batches that are mappings of tensors by name, with 'labels', got a {trees.describe(batch)}; for others "
            "pass forward= and target= to curvalg.Problem"
        )
    return batch


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in LABELS}


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch.

    Raises:
        ProblemError: it has none.
    """
    for key in LABELS:
        if isinstance(labels := as_mapping(batch).get(key), Tensor):
            return labels
    raise ProblemError(f"a batch has no tensor 'labels'; the keys are {list(batch)}. Have the collator add them")


def rows_of(batch: Mapping[str, Any]) -> int:
    """The number of rows of a batch, by its inputs: labels may be lists of objects."""
    if (count := trees.rows(inputs_of(batch))) is None:
        raise ProblemError(f"cannot find the number of rows of a batch: no input with rows among {list(batch)}")
    return count


@dataclass(frozen=True)
class ModelKeywords:
    """Calls of a model by the names that its forward takes.

    Args:
        accepted: these names.
    """

    accepted: tuple[str, ...]

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        quiet = {name: value for name, value in QUIET.items() if name in self.accepted}
        return model(**{**quiet, **inputs})


@dataclass(frozen=True)
class Logits:
    """The adapter (model, batch) -> logits, without labels, so that no loss is computed on the way.

    Args:
        call: calls the model.
        decoder: whether a decoder needs the labels as its inputs.
    """

    call: ModelKeywords
    decoder: bool

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        inputs = inputs_of(as_mapping(batch))
        if self.decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & {*inputs}:
            inputs["decoder_input_ids"] = _shifted_right(base_of(model), labels_of(batch))
        return logits_of(self.call(model, inputs))


@dataclass(frozen=True)
class LabelTarget:
    """The adapter batch -> target.

    Args:
        rule: what makes it of the labels.
    """

    rule: Rule

    def __call__(self, batch: Any) -> Tensor:
        return self.rule(labels_of(batch))


@dataclass(frozen=True)
class OwnLoss:
    """The adapter (model, batch) -> the loss that the model returns, shape (1,).

    Args:
        call: calls the model.
    """

    call: ModelKeywords

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        loss = loss_of(self.call(model, as_mapping(batch)))
        if loss is None:
            raise ProblemError(
                f"{type(base_of(model)).__name__} returned no loss; it needs labels by the names that it takes, and the batch "
                f"has {list(batch)}"
            )
        return loss.reshape(1)


@dataclass(frozen=True)
class RowCount:
    """The adapter batch -> its number of rows, shape (1,).

    Args:
        single: whether it has to be one.
    """

    single: bool

    def __call__(self, batch: Any) -> Tensor:
        rows = rows_of(as_mapping(batch))
        if self.single and rows != 1:
            raise ProblemError(
                f"the first batch has one row and a later one {rows}; give all batches one row, for covariances, or the first "
                "more than one"
            )
        device = next(t.device for t in trees.tensors(batch))
        return torch.tensor([float(rows)], device=device)


def _shifted_right(model: Any, labels: Tensor) -> Tensor:
    """The inputs of a decoder as the library makes them of labels: all one place later, ignored ones as padding."""
    if (prepare := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        return prepare(labels=labels)  # type: ignore[no-any-return]
    config = model.config
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)], 1)


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returned: by name, or the first of a tuple, which has no loss before them."""
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ProblemError(
            f"expected a model that returns logits, got {trees.describe(output)}; pass loss='model', or forward= to "
            "curvalg.Problem"
        )
    return logits


def loss_of(output: Any) -> Tensor | None:
    """The loss of what a model returned for a batch with labels; None where there is none."""
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
