"""A problem as the options of the command line want it: on a device, in a precision, over some parameters, by samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvalg.cli.made_problems.devices import usable
from curvalg.errors import CurvalgError, ProblemError
from curvalg.losses import Loss
from curvalg.problem import Problem
from curvalg.problem.model.model import CallableModel
from curvalg.tensors import trees


@dataclass(frozen=True)
class Changes:
    """What is to be another than the problem was made with; None or empty: as it is.

    Args:
        params: names or glob patterns of parameters.
        samples: what one sample is.
        device: that model, loss and data are on.
        dtype: of parameters and of all floating-point data.
    """

    params: tuple[str, ...] = ()
    samples: Literal["item", "position"] | None = None
    device: str | None = None
    dtype: torch.dtype | None = None


class CastBatches:
    """A loader whose floating-point tensors are of another dtype; all else is the loader's.

    Args:
        loader: any re-iterable of batches.
        dtype: of their floating-point tensors.

    >>> batches = CastBatches([(torch.ones(2), torch.tensor([0, 1]))], torch.float64)
    >>> [tensor.dtype for batch in batches for tensor in batch]
    [torch.float64, torch.int64]
    """

    def __init__(self, loader: Any, dtype: torch.dtype) -> None:
        self._loader, self._dtype = loader, dtype

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield cast(batch, self._dtype)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled there is no loader to ask
            raise AttributeError(name)
        return getattr(self._loader, name)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """A batch whose floating-point tensors are of a dtype; labels and masks stay as they are."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return trees.tensor_map(convert, tree)


def remade(problem: Problem, changes: Changes, group: Any = None) -> Problem:
    """The problem with other options: the same model (moved to where it is to be), loss and data.

    Args:
        problem: as the user's function made it.
        changes: what is to be another.
        group: the process group that shares the problem; None: one process.

    Raises:
        ProblemError: a device that is not there, a pattern that matches no parameter, or a model in parts.
        LossError: samples that the loss does not have.
    """
    if changes == Changes():
        return problem
    if problem.group.sharded:
        raise ProblemError(
            "--params, --samples, --device and --dtype are for models that are whole on every process; this one is sharded: "
            "pass them to Problem() in the function that makes it"
        )
    device = None if changes.device is None else usable(changes.device)
    with _told(changes):
        model, params = _model(problem, changes, device)
        return Problem(
            model,
            _loss(problem.loss, device, changes.dtype),
            cast_data(problem.data.source, changes.dtype),
            params=params,
            forward=problem.model.rule,
            target=problem.data.target,
            samples=changes.samples or problem.samples,
            randomness=problem.draws.mode,
            cache=problem.cache,
            columns=problem.columns,
            factored=problem.factored,
            accumulate=problem.accumulate,
            autocast=problem.autocast,
            compile=problem.compiler or False,
            output_memory=problem.output_memory,
            verify=problem.verify,
            graphs=problem.capture,
            progress=problem.progress,
            group=None if problem.group.alone else group,
        )


def _model(problem: Problem, changes: Changes, device: torch.device | None) -> tuple[Any, Any]:
    """The model where it is to be, and the selection of its parameters."""
    model = problem.model
    if isinstance(model, CallableModel):
        if changes.params:
            raise ProblemError(
                "--params chooses among the parameters of a module, but this model is a function of a dict, all of which are "
                f"chosen: {', '.join(model.own)}. Give Problem() params= with fewer of them, or restrict() in the expression"
            )
        return model.function, {name: _to(p.detach(), device, changes.dtype) for name, p in model.own.items()}
    return model.module.to(device=device, dtype=changes.dtype), list(changes.params) or list(problem.layout.names)


def _loss(loss: Loss | None, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """The loss with its tensors, as class weights, beside the model."""
    if isinstance(inner := getattr(loss, "fn", None), nn.Module):
        inner.to(device=device, dtype=dtype)
    return trees.tensor_map(lambda tensor: _to(tensor, device, dtype), loss)


def cast_data(data: Any, dtype: torch.dtype | None) -> Any:
    """Data in a precision; they move to the device when they are read.

    Args:
        data: as of :class:`curvalg.Problem`.
        dtype: of their floating-point tensors; None: as they are.
    """
    if dtype is None:
        return data
    if isinstance(data, list):
        return [cast(batch, dtype) for batch in data]
    one_batch = isinstance(data, (tuple, Mapping, Tensor)) or trees.has_stores(data)
    return cast(data, dtype) if one_batch else CastBatches(data, dtype)


def _to(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


@contextmanager
def _told(changes: Changes) -> Iterator[None]:
    """A context in which what torch cannot do becomes an error that names the options."""
    try:
        yield
    except CurvalgError:
        raise
    except (TypeError, RuntimeError, NotImplementedError) as error:
        asked = " ".join(
            f"--{name} {str(value).removeprefix('torch.')}"
            for name, value in (("device", changes.device), ("dtype", changes.dtype))
            if value is not None
        )
        raise ProblemError(
            f"model, loss and data cannot be made {asked}: {error}; leave one of the options out"
        ) from error
