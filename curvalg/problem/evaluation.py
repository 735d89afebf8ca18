"""The model on one batch, at a snapshot: values, and products with the Jacobian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from curvalg.errors import CurvalgError, CurvalgWarning, ProblemError
from curvalg.problem.batch import Batch
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.large_outputs.find_head import record_head
from curvalg.problem.layers import record_layers
from curvalg.problem.model.model import called_wrongly, recording
from curvalg.problem.model.outputs import OutputForm, require_finite_output
from curvalg.problem.per_sample import per_sample_gradients
from curvalg.problem.state.snapshot import Snapshot
from curvalg.problem.verification.oaths import (
    RouteError,
    owned,
    random_cotangent,
    random_directions,
    swear_graph,
    swear_output,
    verdict,
    wrong_tangent,
)
from curvalg.problem.verification.reverse import reverse_tangents
from curvalg.tensors import trees
from curvalg.tensors.backward import backward, explain_failure
from curvalg.tensors.graph import operations, require_second_derivatives

if TYPE_CHECKING:
    from curvalg.problem.layers import RecordedLayers
    from curvalg.problem.problem import Problem


class Evaluation:
    """One batch of a problem at a snapshot. Nothing is computed before it is asked for, nothing is kept.

    Args:
        problem: the problem.
        snapshot: the state to evaluate at.
        sample: the batch as read.
    """

    def __init__(self, problem: Problem, snapshot: Snapshot, sample: ReadBatch) -> None:
        self.problem = problem
        self.snapshot = snapshot
        self.sample = sample
        self.operations: frozenset[str] = frozenset()
        """Of the last recorded call; conversions of dtypes are none."""

    def run(
        self, tensors: Sequence[Tensor], sample: ReadBatch | None = None, *, once: bool = False
    ) -> tuple[Tensor, OutputForm]:
        """z for the given tensors in place of the chosen parameters; calls the model once.

        Raises:
            ProblemError: the model fails on the batch, draws random numbers, or returns something without a derivative.
        """
        problem = self.problem
        with problem.guarding_inputs((sample or self.sample).batch) as batch:
            raw = self.call(tensors, batch, once=once)
        form = OutputForm(raw)
        return form.join(raw), form

    def output(self) -> tuple[Tensor, OutputForm]:
        """z without a graph, by one model call.

        A model that differentiates inside its forward (by its inputs, as forces, or by weights) is called with gradients on.
        """
        structure = self.snapshot.structure
        if not structure.differentiates:
            try:
                with torch.no_grad():
                    z, form = self._recordable(self.values())
                    swear_output(self, z)
                    return z, form
            except ProblemError as error:
                if "does not require grad" not in str(error):
                    raise
                structure.differentiates = True
        with torch.enable_grad():
            z, form = self._recordable([p.requires_grad_() for p in self.values()])
        swear_output(self, z.detach())
        return z.detach(), form

    def live_output(self) -> Tensor:
        """z of the user's own module with its own parameters, without a graph, by one model call."""
        problem, state = self.problem, self.snapshot.state
        with (
            torch.set_grad_enabled(self.snapshot.structure.differentiates),
            problem.guarding_inputs(self.sample.batch) as batch,
        ):
            raw = self._called(lambda: problem.model.call_live(state, batch))
        return OutputForm(raw).join(raw).detach()

    def call(self, tensors: Sequence[Tensor], batch: Any, *, once: bool = False) -> Any:
        """What the model returns for the given tensors, on the batch as it may be given to the model.

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
        """What a call of the model returns, with nothing of the user's changed."""
        problem, effects = self.problem, self.snapshot.structure.effects

        def call() -> Any:
            switches = recording(problem.device, problem.model, once=once)
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

    def _recordable(self, tensors: Sequence[Tensor], *, once: bool = False) -> tuple[Tensor, OutputForm]:
        """A call outside of forward AD, whose own errors must stay apart: what fails here is the model on the data."""
        try:
            return self.run(tensors, once=once)
        except CurvalgError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            shown = trees.describe(self.sample.batch)
            raise ProblemError(f"the model failed on batch {self.sample.index}, a {shown}: {error}") from error

    def in_double(self) -> Callable[[Sequence[Tensor]], Tensor]:
        """z in float64 for parameters in float64; every call of it calls the model once."""

        def wide(t: Tensor) -> Tensor:
            return t.double() if t.is_floating_point() else t

        problem = self.problem
        state = {name: wide(t) for name, t in self.snapshot.state.items()}
        data = trees.tensor_map(wide, self.sample.batch)

        def call(tensors: Sequence[Tensor]) -> Tensor:
            with problem.guarding_inputs(data) as batch:
                raw = self._called(lambda: problem.model(tensors, state, batch))
            return OutputForm(raw).join(raw)

        return call

    def values(self) -> list[Tensor]:
        """The chosen parameters of the snapshot, detached, in flat order."""
        return [self.snapshot.state[name].detach() for name in self.problem.model.chosen]

    def record(
        self,
        watch: Callable[[list[Tensor]], AbstractContextManager[Any]] = lambda leaves: nullcontext(),
        *,
        once: bool = False,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], OutputForm]:
        """z with its graph, and the leaves that it depends on.

        Args:
            watch: leaves -> a context around the model's call.
            once: whether one backward is all that follows.
            earlier: z of another call, where there was one.
        """
        leaves = [p.requires_grad_() for p in self.values()]
        with watch(leaves), owned(self):
            z, form = self._recordable(leaves, once=once)
        self.operations = operations([z])
        swear_graph(self, z, leaves)
        swear_output(self, z.detach(), earlier)
        if not z.requires_grad:
            self._warn_constant()
            z = z + 0 * sum(leaf.sum() for leaf in leaves)
        return z, leaves, form

    def differentiate(self, z: Tensor, leaves: Sequence[Tensor], u: Tensor) -> list[Tensor | None]:
        """G = J(θ)ᵀu with a graph, by one backward.

        Raises:
            ProblemError: an operation of the model forbids a second derivative.
        """
        gradients = backward([z], leaves, [u], create_graph=True)
        if all(g is None for g in gradients):
            self._warn_constant()
        require_second_derivatives(gradients)  # of every batch: each may take another branch of the model
        return gradients

    def batch(self, z: Tensor, form: OutputForm, layers: Callable[[], RecordedLayers] | None = None) -> Batch:
        """What terms see, given z (its graph is not kept).

        Args:
            z: the output.
            form: how it came from what the model returned.
            layers: gives the recording of the model's layers; None: by another call of the model.

        Raises:
            ProblemError: z has non-finite entries.
        """
        problem, totals = self.problem, self.problem.totals
        z, again, sample = z.detach(), self.again(), self.sample
        require_finite_output(z, sample.index)
        return Batch(
            z,
            form,
            self.sample.target,
            problem.loss,
            lambda: again().problem.loss_point(form.split(z), sample),
            scale=totals.scale,
            count=totals.count,
            denominator=totals.denominator,
            samples=problem.samples,
            start=self.sample.start,
            number=lambda: again().problem.number_samples(),
            pullback=lambda u: again().pull(u),
            per_sample=lambda batch: per_sample_gradients(again(), batch),
            layers=layers or (lambda: record_layers(again())),
        )

    def again(self) -> Callable[[], Evaluation]:
        """A function that makes this evaluation anew, without holding problem and snapshot.

        Recordings are kept on the problem; if they held it, a cycle through the autograd engine would never be freed.
        """
        problem, snapshot, sample = ref(self.problem), ref(self.snapshot), self.sample

        def make() -> Evaluation:
            live, state = problem(), snapshot()
            if live is None or state is None:
                raise ProblemError(
                    "a batch was used after its problem was gone; keep the Problem as long as its batches"
                )
            return Evaluation(live, state, sample)

        return make

    def over(self, names: Sequence[str]) -> Evaluation:
        """The same batch with only these parameters to be differentiated."""
        return Evaluation(self.problem.restricted(names), self.snapshot, self.sample)

    def evaluate(self) -> Batch:
        """What terms see, by one model call without a graph."""
        return self.batch(*self.output())

    def value(self) -> float:
        """The loss of the batch, undivided."""
        with torch.no_grad():
            if (found := record_head(self, graph=False, once=True)) is not None:
                return sum(float(batch.value()) for _, batch in found[0].batches())
            z, form = self.output()
            return float(self.problem.loss_point(form.split(z), self.sample).value())

    def gradient(self) -> Tensor:
        """∇L of the batch, shape (D,)."""
        return self.pulled(lambda batch: batch.loss_gradient)

    def pulled(self, cotangent_of: Callable[[Batch], Tensor]) -> Tensor:
        """Jᵀu for u = cotangent_of(batch), shape (D,); by one model call, in chunks of positions where outputs are large."""
        if (found := record_head(self, once=True)) is None:
            z, leaves, form = self.record(once=True)
            return self.gather(backward([z], leaves, [cotangent_of(self.batch(z, form))]))
        head, leaves = found
        total = torch.zeros(self.problem.size, dtype=self.problem.dtype, device=self.problem.device)
        cotangent = head.pull(cotangent_of, total)
        if head.hidden.requires_grad:
            self.problem.layout.add_(
                total[None], [g if g is None else g[None] for g in backward([head.hidden], leaves, [cotangent])]
            )
        return total

    def pull(self, cotangent: Tensor, *, pushed: bool = False) -> Tensor:
        """Jᵀu, shape (D,), by one model call and one backward.

        Args:
            cotangent: u.
            pushed: whether u was made of a tangent; its graph tells whether forward AD was verified for all that is in it.

        Raises:
            RouteError: the tangent was wrong.
        """
        z, leaves, _ = self.record()
        if pushed and self.problem.no_forward_ad is None:
            check = partial(self.wrong_forward_ad, z, leaves, retain=True)
            self.problem.no_forward_ad = verdict(self, FORWARD_AD, check, [z])
            if self.problem.no_forward_ad is not None:
                raise RouteError(f"forward AD is wrong on batch {self.sample.index}: {self.problem.no_forward_ad}")
        gradients = backward([z], leaves, [cotangent])
        if all(g is None for g in gradients):
            self._warn_constant()
        return self.gather(gradients)

    def gather(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients of the chosen parameters as one vector (D,)."""
        return self.problem.layout.gather(gradients, self.problem.device)

    def push(self, vector: Tensor) -> tuple[Batch, Tensor]:
        """What terms see, and ż = J v of the output's shape; one model call by forward AD.

        Where an operation of the model lacks forward AD, by two backward passes through one recorded call instead.
        """
        problem = self.problem
        tangents = problem.layout.tangents(vector)
        if problem.no_forward_ad is None:
            try:
                pushed = self._push_forward(tangents)
                problem.no_forward_ad = self._wrong_forward_ad(pushed[0].output)
            except CurvalgError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                problem.no_forward_ad = str(error).strip().splitlines()[0]
            if problem.no_forward_ad is None:
                return pushed
        z, leaves, form = self.record()
        return self.batch(z, form), reverse_tangents(self, z, leaves).push(tangents)

    def _wrong_forward_ad(self, earlier: Tensor) -> str | None:
        """Why forward AD must not be used at this state; it is compared with a gradient once."""

        graph: list[Tensor] = []

        def check() -> str | None:
            z, leaves, _ = self.record(once=True, earlier=earlier)
            graph.append(z)
            return self.wrong_forward_ad(z, leaves, retain=False)

        return verdict(self, FORWARD_AD, check, graph)

    def wrong_forward_ad(self, z: Tensor, leaves: Sequence[Tensor], *, retain: bool) -> str | None:
        """Why forward AD must not be used, by the graph of z: ⟨u, J v⟩ differs from ⟨Jᵀu, v⟩, or it has no J v.

        Args:
            z: the output with its graph.
            leaves: the tensors that it depends on.
            retain: whether the graph is needed afterwards.
        """
        v, u = random_directions(self), random_cotangent(z.detach())
        try:
            tangent = self._push_forward(v)[1]
        except CurvalgError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            return str(error).strip().splitlines()[0]
        gradients = backward([z], leaves, [u], retain_graph=retain)
        return wrong_tangent(self, z, u, tangent, gradients, v)

    def _push_forward(self, tangents: list[Tensor]) -> tuple[Batch, Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(self.values(), tangents, strict=True)]
            primal, form = self.run(duals)
            z, tangent = forward_ad.unpack_dual(primal)
            if tangent is None:
                self._warn_constant()
            if tangent is None or tangent._is_zerotensor():
                tangent = torch.zeros_like(z)
            return self.batch(z, form), tangent.detach()

    def _warn_constant(self) -> None:
        """Some batches may leave a block of parameters out; whoever leaves out all may have given the wrong ones."""
        if self.problem.whole is not None:
            return
        warnings.warn(
            f"the model's output on batch {self.sample.index} does not depend on the chosen parameters, so its part of every "
            "curvature matrix is zero. A model given as a function must use the parameters it is passed",
            CurvalgWarning,
            stacklevel=3,
        )


FORWARD_AD = "forward AD"
