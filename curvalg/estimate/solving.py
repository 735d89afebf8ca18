"""Solves that are written to a checkpoint file, resumed from it, and watched."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from curvalg.estimate.checkpoint import Checkpoint, digest
from curvalg.estimate.state import Options, State
from curvalg.estimate.target import Path, target
from curvalg.expr import Inverse
from curvalg.lowering import CurvatureOperator
from curvalg.solve.trail import Mark, Trail


@dataclass(frozen=True)
class Solve:
    """What a solve is called in a checkpoint, and all that decides its result but the number of iterations."""

    options: Options
    name: str = "solve"


class FileTrail(Trail):
    """The trail of a solve, with the file that it is written to and a progress bar.

    Args:
        op: an inverse.
        node: the inverse that is solved, with its options.
        method: name of the strategy.
        b: right-hand sides (n, K).
        x0: starting point, or None.
        path: of the checkpoint, or None.
        progress: show iterations.

    Raises:
        CheckpointError: the file is of another run, or damaged.
    """

    def __init__(
        self,
        op: CurvatureOperator,
        node: Inverse,
        method: str,
        b: Tensor,
        x0: Tensor | None,
        path: Path | None,
        progress: bool,
    ) -> None:
        options: Options = {
            "solver": method,
            "rtol": node.rtol,
            "atol": float(node.atol),
            "b": digest(b),
            "x0": None if x0 is None else digest(x0),
        }
        self._solve = Solve(options)
        self._file: Checkpoint | None = target(op).checkpoint(path)
        self._bar = tqdm(desc=f"solve with {method}", unit="iteration", total=node.maxiter, disable=not progress)
        self._parts: dict[int, Mark] = {}
        self._begin, self._before = time.perf_counter(), 0.0
        saved = None if self._file is None else self._file.load(self._solve)
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
        self._bar.set_postfix_str(f"residual {float(mark.tensors['residual'].max()):.1e}", refresh=False)
        self._bar.update(0)
        if self._file is not None:
            self._file.mark()
            if self._file.due():
                self._save(self._file)

    def _save(self, file: Checkpoint) -> None:
        file.save(self._solve, _packed(self._parts), self._before + time.perf_counter() - self._begin)

    def close(self) -> None:
        """Write the last state."""
        self._bar.close()
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
    for i in state.numbers["parts"]:  # type: ignore[union-attr]
        start = f"{i}/"
        tensors = {name.removeprefix(start): t for name, t in state.tensors.items() if name.startswith(start)}
        numbers = {name.removeprefix(start): value for name, value in state.numbers.items() if name.startswith(start)}
        history = list(tensors.pop("history"))
        parts[int(i)] = Mark(tensors, numbers, history, len(history))
    return parts
