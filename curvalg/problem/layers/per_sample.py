"""Gradients of every sample's share: by BackPACK, by torch.func, or sample by sample, whichever is right for the model.

BackPACK is fast and silently wrong on tied weights, on parameters reused outside their module and on batches whose
first axis is not the samples; torch.func needs rows that can be computed alone. Every result of either is compared with a
weighted sum of all gradients; the last route is exact for every model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from curvalg.errors import CurvalgError, ProblemError
from curvalg.problem.batch import Batch
from curvalg.problem.data.batches import ReadBatch, call_model
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.model.model import Model, ModuleModel, recording
from curvalg.tensors import trees
from curvalg.tensors.backward import backward
from curvalg.tensors.random_numbers import uniforms

Gradients = dict[str, Tensor]
Route = Callable[[Evaluation, Batch, Tensor], Gradients]
"""(evaluation, batch, cotangents of its rows) -> the gradients of every row."""


class PerSampleNotes:
    """The route that is taken for a problem (None before one was needed), and why others are not."""

    def __init__(self) -> None:
        self.route: str | None = None
        self.declined: list[str] = []


class _Declined(Exception):
    """A route cannot be used for this model; the message says why."""


def per_sample_gradients(evaluation: Evaluation, batch: Batch) -> Gradients:
    """Gradients ∇cₙ by parameter, (n, *parameter.shape).

    Raises:
        ProblemError: samples influence each other through batch statistics.
    """
    problem = evaluation.problem
    refuse_batch_statistics(problem.model)
    if problem.samples == "item":
        return row_gradients(evaluation, batch, batch.loss_gradient)
    notes = problem.noted(PerSampleNotes)
    notes.route, notes.declined = LAST, ["BackPACK, torch.func: samples are positions, not rows"]
    return _masked(evaluation, batch.loss_gradient, batch.sample_masks())


def row_gradients(evaluation: Evaluation, batch: Batch, cotangent: Tensor) -> Gradients:
    """Gradients ∂⟨sₙ, zₙ⟩/∂θ for the rows n of a batch and one cotangent s of the output's shape, (n, *parameter.shape).

    Raises:
        ProblemError: samples influence each other through batch statistics.
    """
    problem = evaluation.problem
    refuse_batch_statistics(problem.model)
    notes = problem.noted(PerSampleNotes)
    if notes.route is None:
        gradients, notes.route, notes.declined = _choose(evaluation, batch, cotangent)
        return gradients
    if notes.route == LAST:
        return ROUTES[LAST](evaluation, batch, cotangent)
    try:
        gradients = ROUTES[notes.route](evaluation, batch, cotangent)
        _verify(evaluation, batch, cotangent, gradients)  # which row is which may depend on the data
    except CurvalgError:
        raise
    except Exception as error:  # it was right on a batch before, of one row perhaps
        notes.declined.append(_why(notes.route, error))
        notes.route = LAST
        return ROUTES[LAST](evaluation, batch, cotangent)
    return gradients


def _why(route: str, error: Exception) -> str:
    """Why a route is not taken, in a line."""
    first = str(error).strip().splitlines()[0] if str(error) else ""
    return f"{route}: {first}" if isinstance(error, _Declined) else f"{route}: {type(error).__name__}: {first}"


def refuse_batch_statistics(model: Model) -> None:
    """Raise ProblemError if rows of a batch influence each other."""
    for name in model.batch_statistics:
        raise ProblemError(
            f"per-sample gradients are not defined while {name} normalises with batch statistics, since samples influence "
            "each other; call model.eval()"
        )


def _choose(evaluation: Evaluation, batch: Batch, cotangent: Tensor) -> tuple[Gradients, str, list[str]]:
    notes = []
    for name, route in ROUTES.items():
        try:
            gradients = route(evaluation, batch, cotangent)
            if name != LAST:
                _verify(evaluation, batch, cotangent, gradients)
        except CurvalgError:
            raise
        except Exception as error:
            if name == LAST:
                raise
            notes.append(_why(name, error))
        else:
            return gradients, name, notes
    raise AssertionError("unreachable: the last route either returns or raises")


def _verify(evaluation: Evaluation, batch: Batch, cotangent: Tensor, gradients: Gradients) -> None:
    """Compare Σ wₙ ∇cₙ for random positive weights w with one backward pass.

    The plain sum would not notice gradients that are attributed to the wrong samples.
    """
    n = batch.output.shape[0]
    if any(g.shape[0] != n for g in gradients.values()):
        raise _Declined("the first axis of its result is not the samples")
    z = batch.output
    weights = 0.5 + uniforms(0, 1, 0, (n,), z.dtype, z.device)[0]
    expected = evaluation.pull(cotangent * weights.reshape(-1, *[1] * (z.ndim - 1)))
    summed = {name: torch.tensordot(weights.to(g.dtype), g, 1) for name, g in gradients.items()}
    got = evaluation.problem.layout.flatten(summed)
    tolerance = 1e3 * torch.finfo(z.dtype).eps * (expected.abs().max() + got.abs().max())
    if not bool(((got - expected).abs() <= tolerance).all()):
        raise _Declined("its gradients do not add up to the gradient of the loss")


# -- BackPACK -----------------------------------------------------------------------------------------------------------

_BACKPACK = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)


def _by_backpack(evaluation: Evaluation, batch: Batch, cotangent: Tensor) -> Gradients:
    problem = evaluation.problem
    model = problem.model
    if not isinstance(model, ModuleModel) or problem.draws.mode == "frozen":
        raise _Declined("needs a module without random layers")
    if problem.autocast is not None:
        raise _Declined("the model is cast to another dtype")
    _check_structure(model)
    twin, names = _private_copy(evaluation, model)
    calls = _count_calls(twin)
    # Imported here: it costs a second, and most problems never need it.
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of BackPACK's hooks about modules that it does not extend
        extend(twin)
        with recording(model):
            z = (model.rule or call_model)(twin, evaluation.sample.batch)
        if not isinstance(z, Tensor):
            raise _Declined("the model has several outputs")
        with backpack(BatchGrad()):
            # Of the copy alone: what else the forward reaches (a teacher, the user's own model) keeps the gradients it has.
            leaves = [p for p in twin.parameters() if p.requires_grad]
            torch.autograd.backward((z * cotangent.to(z)).sum(), inputs=leaves)
    if any(calls[module] != 1 for module in calls):
        raise _Declined("a layer with parameters is used more than once, or never")
    own = dict(twin.named_parameters())
    return {name: own[names[name]].grad_batch.detach() for name in problem.layout.names}  # type: ignore[attr-defined]


def _check_structure(model: ModuleModel) -> None:
    if any(
        child._forward_hooks or child._forward_pre_hooks or child._backward_hooks for child in model.module.modules()
    ):
        raise _Declined("the model carries hooks")
    chosen = {id(p) for p in model.chosen.values()}
    owners: dict[int, int] = {}
    for child in model.module.modules():
        for p in child._parameters.values():
            if p is None:
                continue
            owners[id(p)] = owners.get(id(p), 0) + 1
            if id(p) in chosen and type(child) not in _BACKPACK:
                raise _Declined(f"{type(child).__name__} is not among the layers it is used for")
    if any(owners[key] != 1 for key in chosen):
        raise _Declined("a parameter belongs to several modules")


def _private_copy(evaluation: Evaluation, model: ModuleModel) -> tuple[nn.Module, dict[str, str]]:
    """A structural copy of the module over the snapshot's tensors, and each chosen parameter's name in it."""
    chosen = {id(p) for p in model.chosen.values()}
    memo: dict[int, object] = {}
    for name, owner, key in model.slots():
        t = owner[key]
        value = evaluation.snapshot.state[name].detach()
        memo[id(t)] = nn.Parameter(value, id(t) in chosen) if isinstance(t, nn.Parameter) else value.clone()
    twin = copy.deepcopy(model.module, memo)
    by_id = {id(p): name for name, p in twin.named_parameters()}
    return twin, {name: by_id[id(memo[id(p)])] for name, p in model.chosen.items()}


def _count_calls(twin: nn.Module) -> dict[nn.Module, int]:
    calls = {m: 0 for m in twin.modules() if any(p is not None and p.requires_grad for p in m._parameters.values())}

    def count(module: nn.Module, *_: object) -> None:
        calls[module] += 1

    for module in calls:
        module.register_forward_hook(count)
    return calls


# -- torch.func ---------------------------------------------------------------------------------------------------------


def _by_torch_func(evaluation: Evaluation, batch: Batch, cotangent: Tensor) -> Gradients:
    problem, sample = evaluation.problem, evaluation.sample
    if problem.draws.mode == "frozen":
        raise _Declined("random draws of a batch cannot be replayed row by row")
    tensors = trees.tensors(sample.batch)
    dims = [0 if t.ndim and t.shape[0] == sample.rows else None for t in tensors]
    leaves = evaluation.values()

    def gradient(rows: list[Tensor], own: Tensor) -> list[Tensor]:
        given = iter([t if dim is None else t[None] for t, dim in zip(rows, dims, strict=True)])
        row = ReadBatch(trees.tensor_map(lambda _: next(given), sample.batch), None, 1, 0, sample.index)
        pull = torch.func.vjp(lambda ps: evaluation.run(ps, row)[0], leaves)[1]
        return pull(own[None])[0]  # type: ignore[no-any-return]

    gradients = torch.func.vmap(gradient, in_dims=(dims, 0))(tensors, cotangent)
    return dict(zip(problem.layout.names, gradients, strict=True))


# -- sample by sample -----------------------------------------------------------------------------------------------------


def _one_by_one(evaluation: Evaluation, batch: Batch, cotangent: Tensor) -> Gradients:
    return _masked(evaluation, cotangent, batch.row_masks())


def _masked(evaluation: Evaluation, cotangent: Tensor, masks: list[Tensor]) -> Gradients:

    z, leaves, _ = evaluation.record()
    rows = []
    for mask in masks:
        grads = backward([z], leaves, [mask * cotangent], retain_graph=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)])
    names = evaluation.problem.layout.names
    return {name: torch.stack(column).detach() for name, column in zip(names, zip(*rows, strict=True), strict=True)}


LAST = "one backward per sample"
ROUTES: dict[str, Route] = {"BackPACK": _by_backpack, "torch.func": _by_torch_func, LAST: _one_by_one}
