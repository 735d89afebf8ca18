"""Solves that are written to a checkpoint file, resumed from it, and watched."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor
from tqdm.auto import tqdm

from curvalg.distributed.group import active
from curvalg.expr import Inverse
from curvalg.runs.checkpoint import Checkpoint
from curvalg.runs.run_state import Options, State, is_count, sizes
from curvalg.runs.vector_digest import vectors_digest
from curvalg.solve.cg import MARKED as CG
from curvalg.solve.cg import VECTORS as VECTORS_OF_CG
from curvalg.solve.minres import MARKED as MINRES
from curvalg.solve.minres import VECTORS as VECTORS_OF_MINRES
from curvalg.solve.powers import scaled
from curvalg.solve.trail import Mark, Trail
from curvalg.tensors.spaces import VectorSpace


@dataclass(frozen=True)
class Solve:
    """The description of a solve in a checkpoint: all that decides its result but the number of iterations."""

    options: Options
    name: str = "solve"

    def axes(self, state: State) -> Mapping[str, int]:
        """The axis of the tensors that are vectors."""
        return {name: 0 for name in state.tensors if name.partition("/")[2] in _VECTORS}

    def fits(self, state: State) -> bool:
        """Whether there are the same book-keeping and a residual history for each part."""
        numbers: dict[str, Callable[[object], bool]] = {"products": is_count, "parts": _are_counts}
        parts = state.numbers.get("parts")
        if not _are_counts(parts):
            return False
        forms: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {}
        for i in parts:
            numbers |= {f"{i}/step": is_count, f"{i}/reasons": _are_reasons}
            own = {name: t for name, t in state.tensors.items() if name.startswith(f"{i}/")}
            if own.keys() not in [{f"{i}/{name}" for name in (*_FORMS, *method)} for method in _METHODS]:
                return False
            kind = own[f"{i}/best"].dtype
            for name, t in own.items():
                given = _FORMS.get(name.removeprefix(f"{i}/"))
                dtype, shape = given or (None, ("rows", "active")[-t.ndim :])  # of the method
                forms[name] = dtype or kind, tuple(s if isinstance(s, int) else f"{i}/{s}" for s in shape)
        found = sizes(state, numbers, forms)
        return found is not None and all(
            len(state.numbers[f"{i}/reasons"]) == found[f"{i}/columns"]  # type: ignore[arg-type]
            and found[f"{i}/units"] == found[f"{i}/columns"] + 2
            and found[f"{i}/iterations"] > 0
            and bool(((t := state.tensors[f"{i}/active"]) >= 0).all() and (t < found[f"{i}/columns"]).all())
            for i in parts
        )


_FORMS: dict[str, tuple[torch.dtype | None, tuple[int | str, ...]]] = {
    "best": (None, ("rows", "columns")),
    "residual": (None, ("columns",)),
    "iterations": (torch.int64, ("columns",)),
    "refuted": (torch.int64, ("columns",)),
    "active": (torch.int64, ("active",)),
    "units": (torch.int32, ("units",)),
    "size": (torch.float64, (1,)),
    "history": (None, ("iterations", "columns")),
}
"""What every method marks; None for the dtype of the vectors."""
_METHODS = CG, MINRES
"""What each method marks besides."""
_VECTORS = {"best", *VECTORS_OF_CG, *VECTORS_OF_MINRES}
"""What is marked of the columns' numbers."""


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(map(is_count, value)) and len(set(value)) == len(value)


def _are_reasons(value: object) -> bool:
    return isinstance(value, list) and all(reason is None or isinstance(reason, str) for reason in value)


class FileTrail(Trail):
    """The trail of a solve, with the file that it is written to and a progress bar.

    Args:
        file: the checkpoint, or None.
        node: the inverse that is solved, with its options.
        method: name of the strategy.
        b: right-hand sides (n, K).
        x0: starting point, or None.
        vectors: the space of the columns.
        progress: show iterations.

    Raises:
        CheckpointError: the file is of another run, or damaged.
    """

    def __init__(
        self,
        file: Checkpoint | None,
        node: Inverse,
        method: str,
        b: Tensor,
        x0: Tensor | None,
        vectors: VectorSpace,
        progress: bool,
    ) -> None:
        options: Options = {
            "solver": method,
            "rtol": node.rtol,
            "atol": float(node.atol),
            "b": vectors_digest(b, vectors, 0),
            "x0": None if x0 is None else vectors_digest(x0, vectors, 0),
        }
        self._solve = Solve(options)
        self._file = file
        self._held = contextlib.ExitStack()
        shown = progress and active().vectors.rank == 0
        self._bar = tqdm(desc=f"solve with {method}", unit="iteration", total=node.maxiter, disable=not shown)
        self._parts: dict[int, Mark] = {}
        self._begin, self._before = time.perf_counter(), 0.0
        saved = None
        if self._file is not None:
            with contextlib.ExitStack() as held:
                held.enter_context(self._file.held())
                saved = self._file.load(self._solve)
                self._held = held.pop_all()  # until the solve is over
        if saved is not None:
            self._parts, self._before = _unpacked(saved[0]), saved[1]
        super().__init__(self._parts.get(0))

    def mark(self, mark: Mark) -> None:
        self._leave(0, mark)

    def part(self, number: int) -> Trail:
        return _Part(self, number, self._parts.get(number))

    def _leave(self, number: int, mark: Mark) -> None:
        self.last = self._parts[number] = mark
        self._bar.n = sum(int(m.numbers["step"]) for m in self._parts.values())
        residual = scaled(mark.tensors["residual"], mark.tensors["units"][:-2]).max()
        self._bar.set_postfix_str(f"residual {float(residual):.1e}", refresh=False)
        self._bar.update(0)
        if self._file is not None:
            self._file.mark()
            if self._file.due():
                self._save(self._file)

    def _save(self, file: Checkpoint) -> None:
        file.save(self._solve, _packed(self._parts), self._before + time.perf_counter() - self._begin)

    def close(self) -> None:
        """Write the last state to the file."""
        self._bar.close()
        with self._held:
            if self._file is not None and self._parts:
                self._save(self._file)


class _Part(Trail):
    def __init__(self, whole: FileTrail, number: int, start: Mark | None) -> None:
        super().__init__(start)
        self._whole, self._number = whole, number

    def mark(self, mark: Mark) -> None:
        self.last = mark
        self._whole._leave(self._number, mark)


def _packed(parts: Mapping[int, Mark]) -> State:
    tensors: dict[str, Tensor] = {}
    numbers: Options = {"products": 0, "parts": list(parts)}
    for i, mark in parts.items():
        # Tensors of a mark may be views of each other, which a file does not hold.
        tensors |= {f"{i}/{name}": t.clone() for name, t in mark.tensors.items()}
        tensors[f"{i}/history"] = torch.stack(mark.history[: mark.length])
        numbers |= {f"{i}/{name}": value for name, value in mark.numbers.items()}
    return State(tensors, numbers)


def _unpacked(state: State) -> dict[int, Mark]:
    parts: dict[int, Mark] = {}
    found = state.numbers["parts"]
    assert _are_counts(found)  # as fits() made sure
    for i in found:
        start = f"{i}/"
        tensors = {name.removeprefix(start): t for name, t in state.tensors.items() if name.startswith(start)}
        numbers = {name.removeprefix(start): value for name, value in state.numbers.items() if name.startswith(start)}
        history = list(tensors.pop("history"))
        parts[i] = Mark(tensors, numbers, history, len(history))
    return parts
