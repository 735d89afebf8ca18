"""A product with one batch on tensors without numbers: what it would compute, keep and gather.

Every operation runs on its form alone (torch's FakeTensor), so that a model of any size is rehearsed in the time of its Python
code, and nothing is allocated. The loss is left out: a function of the outputs, whose work is small beside the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from curvalg.planning.workload import StageWork
from curvalg.problem.model.model import Model, recording
from curvalg.problem.model.outputs import OutputForm
from curvalg.problem.model.sharded.planned_model import PlannedModel
from curvalg.tensors import trees
from curvalg.tensors.backward import backward
from curvalg.tensors.graph import saved_bytes

Stages = Literal["hessian", "ggn", "both"]
"""Terms with second derivatives of the model in a single backward pass; terms without; both, with totals in between."""


@dataclass(frozen=True)
class Rehearsal:
    """What one product with one batch takes.

    Args:
        forward: FLOPs of the model.
        record: work before the first column.
        first, further: work of the first column, and of each after it.
        nbytes: that the graph holds for the way back, parameters aside.
        reserved: the same with parameters.
        output_bytes: of the outputs.
    """

    forward: float
    record: StageWork
    first: StageWork
    further: StageWork
    nbytes: int
    reserved: int
    output_bytes: int


class Counter:
    """The work of stages, each counted by itself.

    Args:
        model: whose units count their exchanges, where it is sharded.
    """

    def __init__(self, model: Model | PlannedModel) -> None:
        self._units = model.units if isinstance(model, PlannedModel) else []

    @contextmanager
    def stage(self) -> Iterator[list[StageWork]]:
        """A context whose work is appended to a list."""
        found: list[StageWork] = []
        before = self._exchanges()
        with FlopCounterMode(display=False) as flops:
            yield found
        gathers, scatters = (
            tuple(b - a for a, b in zip(*pair, strict=True)) for pair in zip(before, self._exchanges(), strict=True)
        )
        found.append(StageWork(float(flops.get_total_flops()), gathers, scatters))

    def _exchanges(self) -> tuple[list[int], list[int]]:
        counted = [unit.counted for unit in self._units]
        return [len(c.gathers) for c in counted], [len(c.scatters) for c in counted]


def rehearse(
    model: Model | PlannedModel,
    batch: Any,
    stages: Stages,
    *,
    device: torch.device,
    columns: int = 1,
    apart: bool = False,
    transient: bool = False,
    casting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Rehearsal:
    """Go through a product with one batch without computing it.

    Args:
        model: whole, or cut by :class:`~curvalg.problem.model.sharded.planned_model.PlannedModel`.
        batch: as the model gets it; only forms are taken from it.
        stages: which derivatives are taken.
        device: where outputs are brought together.
        columns: of the product.
        apart: whether tangents and results come from two passes over the data.
        transient: whether tangents come from forward AD, with a model call of their own.
        casting: gives a context of model calls.

    Raises:
        RuntimeError: the model branches on numbers, or an operation of it cannot be traced by its form.
    """
    counter = Counter(model)
    sharded = isinstance(model, PlannedModel)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.enable_grad())
        state = {name: _like(owner[key], device) for name, owner, key in model.slots()}
        leaves = [_like(p, device, summed=sharded).requires_grad_() for p in model.chosen.values()]
        given = trees.tensor_map(lambda t: _like(t, device), batch)
        pushed = [torch.empty_like(leaf) for leaf in leaves]
        stack.enter_context(model.whole())

        def call(tensors: Sequence[Tensor]) -> Tensor:
            with recording(model), casting():
                raw = model(tensors, state, given)
            return OutputForm(raw, device).join(raw)

        with counter.stage() as forward, torch.no_grad():
            call(leaves)
        if transient:
            return _transient(counter, call, leaves, pushed, forward[0].flops, columns)
        saved = Saved(model if isinstance(model, PlannedModel) else None, [*leaves, *state.values()])
        taken = min(columns, 2)
        with counter.stage() as record, saved:
            z = call(leaves)
            # A function of z for the Hessian, whose second derivative meets z again; a leaf where tangents are of J alone.
            u = z.clone() if stages == "hessian" else torch.empty_like(z).requires_grad_()
            gradients = backward([z], leaves, [u], create_graph=True)
        ends = [z, *(g for g in gradients if g is not None)]
        nbytes, reserved = saved.nbytes(ends), 0 if sharded else saved_bytes(ends)
        work: list[StageWork] = []
        if stages == "hessian":
            for _ in range(taken):
                with counter.stage() as multiply:
                    backward(gradients, leaves, pushed, retain_graph=True)
                work += multiply
        else:
            tangents, results = [], []
            for _ in range(taken):
                with counter.stage() as push:
                    backward(gradients, [u], pushed, retain_graph=True)
                tangents += push
            if apart:
                with counter.stage() as again:
                    z = call(leaves)
                    u = torch.empty_like(z).requires_grad_()
                    gradients = backward([z], leaves, [u], create_graph=True)
                record[0] = record[0] + again[0]
            for _ in range(taken):
                with counter.stage() as finish:
                    outputs, cotangents = (
                        ([*gradients, z], [*pushed, u.detach()]) if stages == "both" else ([z], [u.detach()])
                    )
                    backward(outputs, leaves, cotangents, retain_graph=True)
                results += finish
            work = [a + b for a, b in zip(tangents, results, strict=True)]
    return Rehearsal(forward[0].flops, record[0], work[0], work[-1], nbytes, reserved, z.nbytes)


def _transient(
    counter: Counter,
    call: Callable[[Sequence[Tensor]], Tensor],
    leaves: list[Tensor],
    pushed: list[Tensor],
    forward: float,
    columns: int,
) -> Rehearsal:
    """One column by forward AD, and one backward pass through a call of its own."""
    with counter.stage() as push, torch.no_grad(), forward_ad.dual_level():
        call([forward_ad.make_dual(p.detach(), t) for p, t in zip(leaves, pushed, strict=True)])
    with counter.stage() as pull:
        z = call(leaves)
        nbytes = saved_bytes([z], without=leaves)
        backward([z], leaves, [torch.empty_like(z)])
    none = StageWork(0.0, (), ())
    return Rehearsal(forward, none, push[0] + pull[0], push[0] + pull[0], nbytes, 0, z.nbytes)


class Saved:
    """The memory that graphs hold, parameters aside.

    Where weights are gathered, looking at what a graph saved would gather them again: it is noted when it is saved.

    Args:
        model: cut over processes, or None.
        without: tensors that are held in any case.
    """

    def __init__(self, model: PlannedModel | None, without: Sequence[Tensor]) -> None:
        self._weights, self._without = None if model is None else model.weights, list(without)
        self._noted: list[Tensor] = []
        self._hooks: Any = nullcontext()

    def __enter__(self) -> None:
        if self._weights is not None:
            self._hooks = saved_tensors_hooks(self._pack, self._weights.unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, t: Tensor) -> Any:
        assert self._weights is not None
        packed = self._weights.pack(t)
        if isinstance(packed, Tensor):
            self._noted.append(packed)
        return packed

    def nbytes(self, roots: Sequence[Tensor]) -> int:
        """The bytes that graphs with these ends hold."""
        if self._weights is None:
            return saved_bytes(roots, without=self._without)
        own = {t.untyped_storage()._cdata for t in self._without}
        found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*self._noted, *roots]}
        return sum(nbytes for key, nbytes in found.items() if key not in own)


def _like(t: Any, device: torch.device, *, summed: bool = False) -> Any:
    """A tensor of the same form; as vectors are held where it is asked for."""
    dtype = torch.promote_types(t.dtype, torch.float32) if summed else t.dtype
    return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=device if t.is_meta else t.device)
