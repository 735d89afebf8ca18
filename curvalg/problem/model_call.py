"""One call of the model on one batch at a snapshot, which changes nothing of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor

from curvalg.errors import CurvalgError, CurvalgWarning, ProblemError
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.model.model import called_wrongly, recording
from curvalg.problem.model.outputs import OutputForm
from curvalg.problem.model.snapshot import Snapshot
from curvalg.problem.setting import Setting
from curvalg.tensors import trees
from curvalg.tensors.backward import backward, explain_failure
from curvalg.tensors.graph import operations, require_second_derivatives


class InputNotes:
    """Whether the model writes into its inputs; None before the first call."""

    written: bool | None = None


class ModelCall:
    """One batch of a problem at a snapshot, to call the model on. It computes nothing before that, and keeps nothing.

    Args:
        problem: the problem.
        snapshot: the state to evaluate at.
        sample: the batch as read.
    """

    def __init__(self, problem: Setting, snapshot: Snapshot, sample: ReadBatch) -> None:
        self.problem = problem
        self.snapshot = snapshot
        self.sample = sample
        self.operations: frozenset[str] = frozenset()
        """The operations of the last recorded call; conversions of dtypes are none."""
        self.second_operations: frozenset[str] = frozenset()
        """Those of the last gradients with a graph."""

    def of(self, sample: ReadBatch) -> Self:
        """The same problem and snapshot with another batch."""
        return type(self)(self.problem, self.snapshot, sample)

    def over(self, names: Sequence[str]) -> Self:
        """The same batch, with only these parameters to be differentiated."""
        return type(self)(self.problem.restricted(names), self.snapshot, self.sample)

    def again(self) -> Callable[[], Self]:
        """A function that makes this evaluation anew, without holding problem and snapshot.

        Recordings are kept on the problem; if they held it, a cycle through the autograd engine would never be freed.
        """
        kind: type[Self] = type(self)
        problem, snapshot, sample = ref(self.problem), ref(self.snapshot), self.sample

        def make() -> Any:
            live, state = problem(), snapshot()
            if live is None or state is None:
                raise ProblemError(
                    "a batch was used after its problem was gone; keep the Problem as long as its batches"
                )
            return kind(live, state, sample)

        return make

    def values(self) -> list[Tensor]:
        """The chosen parameters of the snapshot, detached, in flat order."""
        tensors = [self.snapshot.state[name].detach() for name in self.problem.model.chosen]
        if not self.problem.group.sharded:
            return tensors
        return [t.to(dtype) for t, dtype in zip(tensors, self.problem.layout.dtypes.values(), strict=True)]

    # -- calling --------------------------------------------------------------------------------------------------------

    def run(
        self, tensors: Sequence[Tensor], sample: ReadBatch | None = None, *, once: bool = False
    ) -> tuple[Tensor, OutputForm]:
        """Compute z for the given tensors in place of the chosen parameters; calls the model once.

        Raises:
            ProblemError: the model fails on the batch, draws random numbers, or returns something without a derivative.
        """
        with self.guarding_inputs((sample or self.sample).batch) as batch:
            raw = self.call(tensors, batch, once=once)
        form = OutputForm(raw, self.problem.device)
        return form.join(raw), form

    def live_output(self) -> Tensor:
        """Compute z of the user's own module with its own parameters, without a graph, by one model call."""
        problem, state = self.problem, self.snapshot.state
        with (
            torch.set_grad_enabled(self.snapshot.structure.found.differentiates),
            self.guarding_inputs(self.sample.batch) as batch,
        ):
            raw = self._called(lambda: problem.model.call_live(state, batch))
        return OutputForm(raw, problem.device).join(raw).detach()

    def call(self, tensors: Sequence[Tensor], batch: Any, *, once: bool = False) -> Any:
        """Call the model with the given tensors, on the batch as it may be given to the model.

        Args:
            tensors: in place of the chosen parameters.
            batch: the batch.
            once: whether one backward is all that follows.

        Raises:
            ProblemError: the model cannot be called on the batch, or draws random numbers.
        """
        problem, state = self.problem, self.snapshot.state
        return self._called(lambda: problem.model(tensors, state, batch), once=once)

    def _called(self, model: Callable[[], Any], *, once: bool = False) -> Any:
        """The result of a model call that changes nothing of the user's."""
        problem, effects = self.problem, self.snapshot.structure.effects

        def call() -> Any:
            switches = recording(problem.model, once=once)
            with switches, problem.casting(), effects.undone(problem.draws.mode):
                return model()

        def watched() -> Any:
            before = effects.known and effects.intact()
            raw = call()
            if before and not effects.intact():  # by what only some calls do, as those with gradients
                effects.forgive()
            return raw

        try:
            raw = problem.draws.run(watched, self.sample.index)
            if not effects.known and effects.learn():  # a tensor that the graph needs was put back
                raw = problem.draws.run(watched, self.sample.index)
            return raw
        except UserWarning as warning:
            if (cure := explain_failure(warning)) is None:
                raise  # the caller turns warnings into errors
            raise ProblemError(cure) from warning
        except TypeError as error:
            if not called_wrongly(error):
                raise ProblemError(f"the model failed on batch {self.sample.index}: TypeError: {error}") from error
            raise ProblemError(
                f"calling the model on a batch failed: {error}. Pairs (X, y) are called as model(X), mappings as "
                "model(**batch) without the target; for others pass forward=lambda model, batch: ..."
            ) from error

    def recordable(self, tensors: Sequence[Tensor], *, once: bool = False) -> tuple[Tensor, OutputForm]:
        """A call outside of forward AD, whose own errors must stay apart: what fails here is the model on the data."""
        try:
            return self.run(tensors, once=once)
        except CurvalgError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            shown, cure = trees.describe(self.sample.batch), explain_failure(error)
            more = f". {cure[0].upper()}{cure[1:]}" if cure else ""
            raise ProblemError(f"the model failed on batch {self.sample.index}, a {shown}: {error}{more}") from error

    def in_double(self) -> Callable[[Sequence[Tensor]], Tensor]:
        """A function that computes z in float64 for parameters in float64; every call of it calls the model once."""

        def wide(t: Tensor) -> Tensor:
            return t.double() if t.is_floating_point() else t

        problem = self.problem
        state = {name: wide(t) for name, t in self.snapshot.state.items()}
        data = trees.tensor_map(wide, self.sample.batch)

        def call(tensors: Sequence[Tensor]) -> Tensor:
            with self.guarding_inputs(data) as batch:
                raw = self._called(lambda: problem.model(tensors, state, batch))
            return OutputForm(raw, problem.device).join(raw)

        return call

    @contextmanager
    def guarding_inputs(self, batch: Any) -> Iterator[Any]:
        """A batch that the model may be called on: its tensors, or copies where the model writes into its inputs.

        Raises:
            ProblemError: the model wrote into the inputs although it did not on the first batch.
        """
        notes = self.problem.noted(InputNotes)
        if notes.written is not False:
            batch = trees.tensor_map(torch.clone, batch)
        before = trees.versions(batch)
        yield batch
        written = before != trees.versions(batch)
        if written and notes.written is False:
            raise ProblemError("the model writes into its inputs in place on some batches; clone them in its forward")
        if notes.written is None:
            notes.written = written

    # -- differentiating ------------------------------------------------------------------------------------------------

    def differentiate(self, z: Tensor, leaves: Sequence[Tensor], u: Tensor) -> list[Tensor | None]:
        """Compute G = J(θ)ᵀu with a graph, by one backward.

        Raises:
            ProblemError: an operation of the model forbids a second derivative.
        """
        gradients = backward([z], leaves, [u], create_graph=True)
        if all(g is None for g in gradients):
            self.warn_constant()
        self.second_operations = operations(gradients)
        require_second_derivatives(self.second_operations)  # of every batch: each may take another branch of the model
        return gradients

    def gather(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the chosen parameters as one vector (D,)."""
        return self.problem.as_part(self.problem.layout.gather(gradients, self.problem.device))

    def warn_constant(self) -> None:
        """Warn if no batch depends on the parameters; some batches may leave a block of parameters out."""
        if self.problem.whole is not None:
            return
        warnings.warn(
            f"the model's output on batch {self.sample.index} does not depend on the chosen parameters, so its part of every "
            "curvature matrix is zero. A model given as a function must use the parameters it is passed",
            CurvalgWarning,
            stacklevel=3,
        )
