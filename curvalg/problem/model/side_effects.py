"""Effects of model calls on the modules, undone after every call.

Recurrent layers keep a list of the exchanged weights (and with it the whole graph) until their next forward; others store
activations, count calls, or keep running means in tensors that are no buffers. The first call at a structure shows what is
written in place; every call then begins with the same contents, so that all of them compute the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from curvalg.errors import ProblemError
from curvalg.problem.model.watch import Watch, read_generator, set_generator


class SideEffects:
    """The side effects of one model at one structure.

    Args:
        settings: the watch over attributes; what calls change is forgiven in it.
        functions: the watch over closures and the loss, in which the same is forgiven, but not put back.
        modules: of the model.
    """

    def __init__(self, settings: Watch, functions: Watch, modules: Sequence[nn.Module]) -> None:
        self._settings, self._functions = settings, functions
        self._dicts = [module.__dict__ for module in modules]
        self._tensors: list[tuple[Any, Any, Any]] = []
        self.known = False
        """Whether a call has shown what it writes."""

    @contextmanager
    def undone(self, mode: Literal["refuse", "frozen"]) -> Iterator[None]:
        """A context around a call that undoes what the call leaves behind.

        Raises:
            ProblemError: the model draws from a generator of its own, and draws are refused.
        """
        before = [(live, dict(live)) for live in self._dicts]
        for holder, key, tensor in self._tensors:
            holder[key] = tensor.detach().clone()
        generators = [(g, read_generator(g)) for g in self._settings.generators]
        drawn: list[Any] = []
        try:
            yield
        finally:
            for generator, state in generators:
                if read_generator(generator) != state:
                    set_generator(generator, state)
                    drawn.append(generator)
            if not self.known:
                self._settings.ignore_written(self._dicts)
            for live, saved in before:
                for name in live.keys() - saved.keys():
                    del live[name]
                live.update(saved)
            for holder, key, tensor in self._tensors:
                holder[key] = tensor
        if drawn and mode == "refuse":
            raise ProblemError(
                f"the model draws random numbers from a generator of its own ({type(drawn[0]).__name__}), so every product "
                "would be of another matrix. Call model.eval() if that stops it, or pass randomness='frozen' to replay the "
                "same draws in every product"
            )

    def learn(self) -> bool:
        """Note what the first call wrote, put it back, and say whether the call has to be made again.

        Raises:
            ProblemError: it wrote into a tensor that cannot be exchanged.
        """
        self.known = True
        written = [place for place, w in zip(self._settings.tensors, self._settings.written_tensors()) if w]
        for name, holder, _, _ in written:
            if holder is None:
                raise ProblemError(
                    f"the model's forward changes {name} in place, a state that cannot be put back; register it as a "
                    "buffer, or keep it in an attribute of the module"
                )
        self._settings.restore_tensors()
        self._tensors += [(holder, key, tensor) for _, holder, key, tensor in written]
        self.forgive()
        return bool(written)

    def intact(self) -> bool:
        """Whether nothing that is watched of the model differs from the structure."""
        return self._settings.intact() and self._functions.intact()

    def forgive(self) -> None:
        """What a call appends to lists or counts in closures makes nothing stale; where it changes the output, two calls
        differ.
        """
        self._settings.forgive()
        self._functions.forgive()
