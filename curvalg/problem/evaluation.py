"""The model on one batch, at a snapshot: values, and products with the Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from curvalg.errors import CurvalgError, ProblemError
from curvalg.losses import CallableLoss, LossPoint
from curvalg.losses.validation import settled
from curvalg.problem.batch import Batch, Layers
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.model.model import recording
from curvalg.problem.model.outputs import OutputForm, require_finite_output
from curvalg.problem.model_call import ModelCall
from curvalg.problem.verification.call_checks import owned, swear_graph, swear_loss, swear_output
from curvalg.problem.verification.reverse import reverse_tangents
from curvalg.problem.verification.tangent_checks import TangentNotes, random_cotangent, random_directions, wrong_tangent
from curvalg.problem.verification.verdicts import RouteError, verdict
from curvalg.tensors.backward import backward
from curvalg.tensors.graph import numbers_each, operations


class Evaluation(ModelCall):
    """One batch of a problem at a snapshot, with outputs, graphs and tangents that are verified."""

    def output(self) -> tuple[Tensor, OutputForm]:
        """Compute z without a graph, by one model call.

        A model that differentiates inside its forward (by its inputs, as forces, or by weights) is called with gradients on.
        """
        structure = self.snapshot.structure
        if not structure.found.differentiates:
            try:
                with torch.no_grad():
                    z, form = self.recordable(self.values())
                    swear_output(self, z)
                    return z, form
            except ProblemError as error:
                if "does not require grad" not in str(error):
                    raise
                structure.found.differentiates = True
        with torch.enable_grad():
            z, form = self.recordable([p.requires_grad_() for p in self.values()])
        swear_output(self, z.detach())
        return z.detach(), form

    def record(
        self,
        watch: Callable[[list[Tensor]], AbstractContextManager[Any]] = lambda leaves: nullcontext(),
        *,
        once: bool = False,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], OutputForm]:
        """Compute z with its graph, and the leaves that it depends on.

        Args:
            watch: leaves -> a context around the model's call.
            once: whether one backward is all that follows.
            earlier: z of another call, where there was one.
        """
        leaves = [p.requires_grad_() for p in self.values()]
        with watch(leaves), owned(self):
            z, form = self.recordable(leaves, once=once)
        self.operations = operations([z])
        if self.problem.verify and self.snapshot.structure.found.work is None:
            self.snapshot.structure.found.work = numbers_each(z)
        swear_graph(self, z, leaves)
        swear_output(self, z.detach(), earlier)
        if not z.requires_grad:
            self.warn_constant()
            z = z + 0 * sum(leaf.sum() for leaf in leaves)
        return z, leaves, form

    def batch(self, z: Tensor, form: OutputForm, layers: Callable[[], Layers] | None = None) -> Batch:
        """The batch that terms see, given z (its graph is not kept).

        Args:
            z: the output.
            form: how it came from what the model returned.
            layers: gives the recording of the model's layers; None: by another call of the model.

        Raises:
            ProblemError: z has non-finite entries.
        """
        problem, totals = self.problem, self.problem.totals
        z, again, sample, services = z.detach(), self.again(), self.sample, problem.services
        if not self._settled:
            require_finite_output(z, sample.index)
        return Batch(
            z,
            form,
            self.sample.target,
            problem.loss,
            lambda: again().loss_point(form.split(z), sample),
            scale=totals.scale,
            count=totals.count,
            denominator=math.inf if self.sample.weightless else totals.denominator,
            samples=problem.samples,
            misaligned=totals.misaligned,
            start=self.sample.start,
            number=lambda: again().problem.number_samples(),
            pullback=lambda u: again().pull(u),
            per_sample=lambda batch: services.per_sample(_of_whole(again()), batch),
            layers=layers or (lambda: services.layers(_of_whole(again()))),
            workspace=problem.workspace,
        )

    @property
    def _settled(self) -> bool:
        """Whether output and targets of the batch were looked at before, at this state."""
        return self.sample.index in self.snapshot.settled

    def loss_point(self, output: Any, sample: ReadBatch) -> LossPoint[Any]:
        """The loss at one output; a loss that is the user's code is guarded like the model."""
        problem, loss = self.problem, self.problem.need_loss()
        if not isinstance(loss, CallableLoss):
            with settled() if self._settled else nullcontext():
                known = loss.at(output, sample.target)
            if problem.data.fixed:
                self.snapshot.settled.add(sample.index)
            return known
        with recording(problem.model):
            point = problem.draws.run(lambda: loss.at(output, sample.target), sample.index)
        swear_loss(problem.model, point)
        return point

    def evaluate(self) -> Batch:
        """The batch that terms see, by one model call without a graph."""
        return self.batch(*self.output())

    def pull(self, cotangent: Tensor, *, pushed: bool = False) -> Tensor:
        """Compute Jᵀu, shape (D,), by one model call and one backward.

        Args:
            cotangent: u.
            pushed: whether u was made of a tangent; its graph shows whether forward AD was verified for all that is in it.

        Raises:
            RouteError: the tangent was wrong.
        """
        z, leaves, _ = self.record()
        trusted = self.problem.noted(TangentNotes).no_forward_ad is None
        if pushed and trusted and (reason := self.decline_forward_ad(z, leaves)) is not None:
            raise RouteError(f"forward AD is wrong on batch {self.sample.index}: {reason}")
        gradients = backward([z], leaves, [cotangent])
        if all(g is None for g in gradients):
            self.warn_constant()
        return self.gather(gradients)

    def push(self, vector: Tensor) -> tuple[Batch, Tensor]:
        """The batch that terms see, and ż = J v of the output's shape; one model call by forward AD.

        Where an operation of the model lacks forward AD, by two backward passes through one recorded call instead.
        """
        tangents, notes = self.problem.layout.tangents(vector), self.problem.noted(TangentNotes)
        if notes.no_forward_ad is None:
            try:
                pushed = self._push_forward(tangents)
                notes.no_forward_ad = self._wrong_after(pushed[0].output)
            except CurvalgError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                notes.no_forward_ad = str(error).strip().splitlines()[0]
            if notes.no_forward_ad is None:
                return pushed
        z, leaves, form = self.record()
        return self.batch(z, form), reverse_tangents(self, z, leaves).push(tangents)

    def decline_forward_ad(self, z: Tensor, leaves: Sequence[Tensor]) -> str | None:
        """Why forward AD must not be used at this state, found by the graph of z (which stays) and noted on the problem."""
        check = partial(self.wrong_forward_ad, z, leaves, retain=True)
        reason = verdict(self, FORWARD_AD, check, [z])
        self.problem.noted(TangentNotes).no_forward_ad = reason
        return reason

    def _wrong_after(self, earlier: Tensor) -> str | None:
        """Why forward AD must not be used, after a tangent was taken: its output is compared with that of another call."""

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
                self.warn_constant()
            if tangent is None or tangent._is_zerotensor():
                tangent = torch.zeros_like(z)
            return self.batch(z, form), tangent.detach()


def _of_whole(evaluation: Evaluation) -> Evaluation:
    """The evaluation, whose model must be whole on this process.

    Raises:
        ProblemError: its parameters lie in parts on several processes.
    """
    if evaluation.problem.group.sharded:
        raise ProblemError(
            "gradients of single samples and layer inputs are not offered where parameters are sharded; make the Problem of a "
            "whole model on every process (group= without shard=) where it fits"
        )
    return evaluation


FORWARD_AD = "forward AD"
