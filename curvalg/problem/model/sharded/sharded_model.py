"""A module whose parameters lie in parts on several processes, as a function of the parts of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvalg.distributed.making import process_group
from curvalg.distributed.sharding.grid import ProcessGrid
from curvalg.distributed.sharding.tensor_parallel import Spread, twice_differentiable, whole_of
from curvalg.errors import ProblemError
from curvalg.problem.data.batches import call_model
from curvalg.problem.data.process import LOCK
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.model import Adapter, ModuleModel, RuleModule, recording
from curvalg.problem.model.sharded.gathering import Exchange, ReshardUnit
from curvalg.problem.model.sharded.parameter_part import ParameterPart, TensorBlock
from curvalg.problem.model.sharded.set_aside import fully_sharded, standing_in
from curvalg.problem.model.sharded.sharded_layout import ShardedLayout
from curvalg.problem.model.sharded.whole_weights import WholeWeights
from curvalg.problem.model.snapshot import Slot
from curvalg.tensors import trees
from curvalg.tensors.partial_tensors import is_part
from curvalg.tensors.spaces.sharded_space import Exchanger


class PartsOfModule(Mapping[str, Any]):
    """The parameters of one module as the parts of this process, which share their memory.

    Args:
        own: the parameters.
        part: parameter -> the part.
        reshard: has ``fully_shard`` leave parts of the module; None: it was not called on it.
    """

    def __init__(
        self, own: Mapping[str, Any], part: Callable[[Tensor], Tensor], reshard: Callable[[], None] | None
    ) -> None:
        self._own, self._part, self._reshard = own, part, reshard

    def __getitem__(self, key: str) -> Any:
        parameter = self._own[key]
        if parameter is not None and self._reshard is not None and not is_part(parameter):
            self._reshard()  # a forward of the user's has left it whole
            parameter = self._own[key]
        return None if parameter is None else self._part(parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class ShardedModel(ModuleModel):
    """A module as a function (parts of the chosen parameters on this process, batch) -> output.

    Args:
        module: the module: sharded by ``fully_shard``, or whole on every process.
        params: which parameters.
        rule: ``forward(model, batch)``.
        grid: the processes.
    """

    recomputes = True

    def __init__(self, module: nn.Module, params: params_.Selection, rule: Adapter | None, grid: ProcessGrid) -> None:
        self.grid = grid
        self._parallel = False
        self._views: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._sharded_by_user = bool(fully_sharded(module))
        self._pieces: dict[int, ParameterPart] = {}
        self.module, self.rule = module, rule
        self._reshard()
        for name, parameter in module.named_parameters():
            self._pieces[id(parameter)] = self._piece(name, parameter)
        selected = params_.selected(module, params)
        self.pieces = {name: self._pieces[id(p)] for name, p in selected.items()}
        self._names = list(selected)
        self._slots = self._find_slots()
        self._members, self._places = self._find_units()
        self._weights: WholeWeights | None = None
        self._exchanger: Exchanger | None = None
        super().__init__(module, params, rule)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _piece(self, name: str, parameter: Tensor) -> ParameterPart:
        """Where the part of this process lies in a parameter.

        Raises:
            ProblemError: it is cut otherwise than ``fully_shard`` and ``parallelize_module`` do, or not at all.
        """
        if is_part(parameter):
            return self._piece_of_dtensor(name, parameter)
        shape, ranks = parameter.shape, self.grid.size
        block = TensorBlock(shape, (0,) * len(shape), shape, self.grid.copies)
        if self._sharded_by_user and ranks > 1:
            raise ProblemError(
                f"parameter {name!r} is whole on every process, while others are sharded; call fully_shard on the whole model "
                "as well (fully_shard(model)), so that it has the rest"
            )
        if ranks == 1:
            return ParameterPart(name, block, 0 if shape else None, 1, 0, parameter.dtype)
        if not parameter.is_contiguous():
            raise ProblemError(
                f"parameter {name!r} does not lie in memory in its own order, so that it cannot be cut; give it contiguous "
                "memory (p.data = p.data.contiguous())"
            )
        return ParameterPart(name, block, None, ranks, self.grid.rank, parameter.dtype)

    def _piece_of_dtensor(self, name: str, parameter: Any) -> ParameterPart:
        data, tensor = _sides(name, parameter, self.grid)
        shape, starts, copies = list(parameter.shape), [0] * parameter.ndim, self.grid.copies
        if tensor is not None:
            self._parallel = True
            if tensor.is_shard():
                place, number = self.grid.ranks[1].index(_here()), self.grid.copies
                most = -(-shape[tensor.dim] // number)
                starts[tensor.dim] = min(place * most, shape[tensor.dim])
                shape[tensor.dim] = max(0, min(most, shape[tensor.dim] - place * most))
                copies = 1
        block = TensorBlock(parameter.shape, tuple(starts), torch.Size(shape), copies)
        if data is None and self.grid.size > 1:
            raise ProblemError(
                f"parameter {name!r} is parallelised, but not sharded over the processes with other data; call "
                "fully_shard(model, mesh=mesh['data']) as well"
            )
        ranks, rank = (1, 0) if data is None else (self.grid.size, self.grid.rank)
        found = ParameterPart(name, block, 0 if data is None else int(data.dim), ranks, rank, parameter.dtype)
        if _local(parameter).shape != found.shape:
            raise ProblemError(
                f"this process has {tuple(_local(parameter).shape)} of parameter {name!r} of shape {tuple(parameter.shape)}, "
                f"but {tuple(found.shape)} were expected; pass as group= the mesh that the model was sharded over"
            )
        return found

    def part(self, parameter: Tensor) -> Tensor:
        """The part of a parameter on this process; the same tensor as long as it lies in the same memory."""
        known = self._views.get(id(parameter))
        piece = self._pieces[id(parameter)]
        cut = piece.of if piece.ranks > 1 else Tensor.detach
        found = _local(parameter) if is_part(parameter) else cut(parameter)
        if known is None or known[0] is not parameter or known[1] != found.data_ptr():
            self._views[id(parameter)] = known = parameter, found.data_ptr(), found
        return known[2]

    def _reshard(self) -> None:
        """Have parts in the module: a forward leaves the outermost parameters whole, or all of them, until a backward."""
        for child in fully_sharded(self.module):
            child.reshard()  # type: ignore[operator]

    def _parts_of(self, own: Mapping[str, Any]) -> PartsOfModule:
        return PartsOfModule(own, self.part, self._reshard if self._sharded_by_user else None)

    def _select(self, params: params_.Selection) -> dict[str, Tensor]:
        return params_.check(
            {name: self.part(p) for name, p in params_.selected(self.module, params).items()}, may_be_empty=True
        )

    @property
    def layout(self) -> ShardedLayout:
        foremost = self.grid.ranks[1].index(_here()) == 0
        return ShardedLayout({name: self.pieces[name] for name in self.chosen}, foremost, self._exchanger)

    def _find_slots(self) -> list[Slot]:
        parameters = [
            (name, self._parts_of(owner), key) for name, owner, key in params_.slots(self.module, "_parameters")
        ]
        pieces = {name: self._pieces[id(owner[key])] for name, owner, key in params_.slots(self.module, "_parameters")}
        self._parts = pieces
        self._divided = frozenset(name for name, p in pieces.items() if p.ranks > 1 or p.whole != p.block.full)
        return parameters + params_.slots(self.module, "_buffers")

    @property
    def live(self) -> Mapping[str, Tensor]:
        return {name: p for name, p in _parameters(self.module) if name in self.chosen}

    @property
    def entrance(self) -> torch.device | None:
        return next((part.device for part in self.chosen.values()), None)

    @property
    def divided(self) -> frozenset[str]:  # type: ignore[override]
        return self._divided

    def places(self, name: str) -> tuple[list[tuple[int, int]], int] | None:
        piece = self._parts.get(name)
        return None if piece is None else (piece.runs, piece.block.copies)

    def slots(self) -> list[Slot]:
        return self._slots

    def update(self) -> None:
        self._reshard()
        live = dict(self.module.named_parameters(remove_duplicate=False))
        for name in self._names:
            if name in live and id(live[name]) not in self._pieces:
                self._pieces[id(live[name])] = self._piece(name, live[name])
        self.chosen = self.forms.checked({name: self.part(p) for name, p in live.items() if name in self.pieces})

    # -- units ----------------------------------------------------------------------------------------------------------

    def _find_units(self) -> tuple[list[list[Slot]], dict[tuple[int, str], tuple[int, int]]]:
        """The parameters of each unit, and the unit and index of each (module, key): those of a module that was sharded by
        itself are whole together, or else those that a module owns.
        """
        heads = {id(child) for child in fully_sharded(self.module)}
        members: list[dict[int, Slot]] = []
        places: dict[tuple[int, str], tuple[int, int]] = {}
        names = {(id(owner), key): name for name, owner, key in params_.slots(self.module, "_parameters")}
        seen: set[int] = set()

        def visit(child: nn.Module, unit: int | None) -> None:
            if id(child) in seen:
                return
            seen.add(id(child))
            own = {key: p for key, p in child._parameters.items() if p is not None}
            if id(child) in heads or (not heads and own):
                members.append({})
                unit = len(members) - 1
            for key, p in own.items():
                assert unit is not None  # the outermost module is sharded, too
                known = members[unit]
                slot = names[id(child._parameters), key], self._parts_of(child._parameters), key
                known.setdefault(id(p), slot)
                places[id(child), key] = unit, list(known).index(id(p))
            for grandchild in child.children():
                visit(grandchild, unit if heads else None)

        visit(self.module, None)
        return [list(some.values()) for some in members], places

    def join(self, exchange: Exchange, exchanger: Exchanger) -> None:
        """Take the processes that hold the other parts: what weights, and what sums over numbers of vectors go through."""
        self._exchanger = exchanger
        units = [ReshardUnit([self._piece_of(slot) for slot in some]) for some in self._members]
        spreads = [[self._spread(slot) for slot in some] for some in self._members]
        self._weights = WholeWeights(units, spreads, exchange)

    def _spread(self, slot: Slot) -> Spread | None:
        """How a parameter lies over the processes of tensor parallelism."""
        parameter: Any = self.module.get_parameter(slot[0])
        if not is_part(parameter) or _sides(slot[0], parameter, self.grid)[1] is None:
            return None
        return Spread(self.grid.tensor, parameter.placements[-1:], parameter.shape, parameter.stride())

    def _piece_of(self, slot: Slot) -> ParameterPart:
        name, _, _ = slot
        return self._pieces[id(self.module.get_parameter(name))]

    # -- calling --------------------------------------------------------------------------------------------------------

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A context of model calls and of the passes back through them, in which weights are whole where they are used.

        Inside, hooks of ``fully_shard`` are set aside; afterwards the module is as it was.
        """
        weights = self.weights
        if weights.in_use:
            yield
            return
        owners = [
            (
                child,
                {
                    key: partial(weights.weight, *self._places[id(child), key])
                    for key in child._parameters
                    if (id(child), key) in self._places
                },
            )
            for child in self.module.modules()
            if any((id(child), key) in self._places for key in child._parameters)
        ]
        with LOCK, ExitStack() as stack:
            stack.enter_context(standing_in(owners, self.module))
            stack.enter_context(recording(self))  # also of what checkpoints recompute on the way back
            if self._parallel:
                stack.enter_context(twice_differentiable())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(weights.pack, weights.unpack))
            weights.in_use = True
            try:
                yield
            finally:
                weights.in_use = False
                weights.end()

    @property
    def weights(self) -> WholeWeights:
        """What is whole at the moment."""
        assert self._weights is not None  # a problem joins its model to its processes at once
        return self._weights

    def __call__(self, leaves: Sequence[Tensor], state: Mapping[str, Tensor], batch: Any) -> Any:
        given = {id(p): leaf for p, leaf in zip(self.chosen.values(), leaves, strict=True)}
        self.weights.begin(
            [tuple(given.get(id(owner[key]), state[name]) for name, owner, key in some) for some in self._members]
        )
        buffers = {f"module.{n}": state[n].clone() for n, _, _ in params_.slots(self.module, "_buffers")}
        raw = functional_call(RuleModule(self.module, self.rule or call_model), buffers, (batch,), tie_weights=False)
        return trees.tensor_map(whole_of, raw) if self._parallel else raw

    def call_live(self, state: Mapping[str, Tensor], batch: Any) -> Any:
        return self(list(self.chosen.values()), {name: owner[key] for name, owner, key in self._slots}, batch)


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module by name, those themselves also while others stand in for them."""
    for prefix, child in module.named_modules():
        own: Any = child._parameters
        for key, parameter in getattr(own, "own", own).items():
            if parameter is not None:
                yield f"{prefix}.{key}" if prefix else key, parameter


def _local(parameter: Any) -> Tensor:
    """This process's part of a DTensor."""
    with torch.no_grad():
        local: Tensor = parameter.to_local().detach()
    return local


def _here() -> int:
    """The global number of this process."""
    return process_group()[0]


def _sides(name: str, parameter: Any, grid: ProcessGrid) -> tuple[Any, Any]:
    """The placements of a DTensor along the data and along tensor parallelism; None where it is not cut there.

    Raises:
        ProblemError: it lies over other processes, or in another way.
    """
    mesh, placements = parameter.device_mesh, list(parameter.placements)
    ranks = tuple(mesh.mesh.flatten().tolist())
    if mesh.ndim == 2 and len(ranks) == grid.size * grid.copies and grid.tensor is not None:
        data, tensor = placements
    elif mesh.ndim == 1 and ranks == grid.ranks[0]:
        data, tensor = placements[0], None
    elif mesh.ndim == 1 and ranks == grid.ranks[1]:
        data, tensor = None, placements[0]
    else:
        raise ProblemError(
            f"parameter {name!r} lies over the processes {list(ranks)}, but group= has {list(grid.ranks[0])} with other data "
            f"and {list(grid.ranks[1])} with other columns or rows; pass the mesh that the model was sharded over"
        )
    uncut = data is not None and (data.is_replicate() or data.is_partial())
    if uncut or (tensor is not None and not (tensor.is_shard() or tensor.is_replicate())):
        raise ProblemError(
            f"parameter {name!r} is a DTensor with placements {tuple(placements)}; supported are those of fully_shard (Shard) "
            "and of parallelize_module (Shard or Replicate). Make an unsharded copy of the model otherwise (full_tensor())"
        )
    return data, tensor
