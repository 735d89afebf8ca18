"""Problems of Hugging Face models, with the library's own shift of labels, ignored tokens and denominators.

``transformers`` is not imported: a model is what takes the tensors of a batch by name and returns an object with ``logits``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any, Literal

import torch
from torch import nn

from curvalg.errors import ProblemError
from curvalg.integrations.adapters import (
    LabelTarget,
    Logits,
    ModelKeywords,
    OwnLoss,
    RowCount,
    accepted_names,
    as_mapping,
    base_of,
    labels_of,
    rows_of,
)
from curvalg.integrations.library_loss import require_same_loss
from curvalg.integrations.returned_loss import ReturnedLoss
from curvalg.integrations.tasks import named_task, task_of
from curvalg.losses.loss import Reduction
from curvalg.problem import Problem
from curvalg.problem.data.batches import Data
from curvalg.problem.model.model import unwrap

__all__ = ["problem"]


def problem(
    model: nn.Module,
    loader: Any,
    task: str | None = None,
    *,
    loss: Literal["task", "model"] = "task",
    reduction: Reduction = "mean",
    **options: Any,
) -> Problem:
    r"""The problem of a Hugging Face model on batches that have ``labels``.

    L(θ) = Σ ℓ / M over all batches, where ℓ and M are the library's: with one batch it is ``model(**batch).loss``, and with
    several the mean over all that counts in them, not a mean of their means.

    - ``"causal_lm"``: outputs (n, T, C), labels (n, T); cross-entropy of each token given those before it.
    - ``"masked_lm"``, ``"seq2seq_lm"``, ``"token_classification"``: outputs (n, T, C), labels (n, T); cross-entropy of tokens.
    - ``"sequence_classification"``, ``"image_classification"``: outputs (n, C); cross-entropy for labels (n,), binary
      cross-entropy of elements for (n, C) numbers, squared error for one output or ``problem_type="regression"``.

    Tokens with the label −100 count nowhere. Which loss a row has is decided as the library does it: by
    ``config.problem_type``, else by ``config.num_labels`` and the dtype of the labels. Of encoder-decoders the decoder gets the
    labels shifted, unless the batch has ``decoder_input_ids``. A sample is a row, or with ``samples="position"`` a token.

    The first batch is read here, and the model called on it once with its labels: where the loss that it returns is another one
    (auxiliary terms, a loss of its own), this is an error. ``verify=False`` leaves that out. Call ``model.eval()`` first.

    With ``loss="model"`` the loss is what the model returns, ℓ_b of a batch b of n_b rows: Σ_b n_b ℓ_b / Σ_b n_b for
    ``reduction="mean"``, Σ_b ℓ_b for ``"sum"``. A batch is then one sample, and one model call. The Hessian is that of L(θ),
    also where the rows of a batch influence each other. Covariances and gradients of samples are defined where all batches have
    one row, and refused otherwise. Gauss-Newton and Fisher matrices are always refused: they take output and loss apart.

    Args:
        model: the model, of a class that ends in one of the usual names (``…ForCausalLM``, ``…LMHeadModel``, …); also inside of
            an adapter of peft's, whose trainable parameters are then the ones chosen.
        loader: a mapping with labels (one batch), a list of such, a DataLoader, that of a Trainer, or any re-iterable of
            batches; mappings may be of any class.
        task: which of the tasks above; None: by the name of the class.
        loss: "task", or "model" for the loss that the model returns.
        reduction: "mean" or "sum" over all that counts; for ``loss="model"`` what the model does with the rows of a batch.
        options: of :class:`curvalg.Problem`, but ``forward`` and ``target``.

    Returns:
        The problem.

    Raises:
        ProblemError: an unknown task, a batch without labels, or a model that returns another loss.
        LossError: labels that do not fit.

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> ids = torch.randint(0, 11, (3, 6))
    >>> batch = {"input_ids": ids, "labels": ids}
    >>> tokens = problem(model, [batch], samples="position")
    >>> tokens.num_samples
    15
    >>> abs(tokens.value() - float(model(**batch).loss.detach())) < 1e-5
    True

    The last is a model's own loss, of batches of one row:

    >>> rows = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    >>> own = problem(model, rows, loss="model")
    >>> abs(own.value() - tokens.value()) < 1e-5
    True
    """
    for name in ("forward", "target"):
        if name in options:
            raise ProblemError(f"{name}= is made by this function; pass it to curvalg.Problem with a loss instead")
    if loss not in ("task", "model"):
        raise ProblemError(f"loss is 'task' or 'model', got {loss!r}; pass any other loss to curvalg.Problem")
    live = unwrap(model)
    first = _first_batch(live, loader)
    call = ModelKeywords(accepted_names(live))
    if loss == "model":
        if task is not None:
            raise ProblemError("loss='model' takes the loss that the model returns, whatever the task; leave task= out")
        returned = ReturnedLoss(type(base_of(live)).__name__, single=rows_of(first) == 1, reduction=reduction)
        return Problem(model, returned, loader, forward=OwnLoss(call), target=RowCount(returned.single), **options)
    chosen = task_of(base_of(live)) if task is None else named_task(task)
    criterion, rule = chosen.make(base_of(live).config, labels_of(first), reduction)
    if options.get("verify", True):
        require_same_loss(live, call, first, chosen)
    return Problem(model, criterion, loader, forward=Logits(call, chosen.decoder), target=LabelTarget(rule), **options)


def _first_batch(model: nn.Module, loader: Any) -> Mapping[str, Any]:
    """The first batch, where the model takes its inputs; random numbers are drawn as if it had not been read.

    Raises:
        ProblemError: there is none, or it is no mapping.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    reading: Any = Data(loader, None, needs_target=False).read(device)
    with closing(reading) as batches:
        return as_mapping(next(batches).batch)
