"""A batch whose loss and outputs carry graphs, so that curvature itself can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import LossError
from curvalg.problem.batch import Batch
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.model.model import Model, recording
from curvalg.problem.model.outputs import OutputForm
from curvalg.tensors import trees


class LiveEvaluation(Evaluation):
    """One batch of a problem at a snapshot, called with graphs to everything that outputs and loss come from."""

    def connected(self, leaves: Sequence[Tensor], others: Mapping[str, Tensor]) -> tuple[Tensor, OutputForm]:
        """Compute z with a graph, by one model call in elementary operations.

        Args:
            leaves: in place of the chosen parameters.
            others: in place of further parameters of the model, by name.
        """
        problem, state = self.problem, {**self.snapshot.state, **others}
        with self.guarding_inputs(self.sample.batch) as batch, elementary(problem.model):
            raw = self._called(lambda: problem.model(leaves, state, batch))
        form = OutputForm(raw, problem.device)
        return form.join(raw), form

    def connected_in_double(self, leaves: Sequence[Tensor]) -> Tensor:
        """Compute z in float64 with a graph to parameters in float64, by one model call in elementary operations."""
        with elementary(self.problem.model):
            return self.in_double()(leaves)

    def live_batch(self, z: Tensor, form: OutputForm, share: Tensor | float) -> LiveBatch:
        """The batch that terms see, whose loss is a function of z and of all that the loss depends on.

        Args:
            z: a leaf that requires gradients.
            form: how it came from what the model returned.
            share: the inverse of the denominator.
        """
        problem, loss = self.problem, self.problem.need_loss()

        def numerator() -> Tensor:
            target = self.sample.target
            if z.dtype == torch.float64:
                target = trees.tensor_map(lambda t: t.double() if t.is_floating_point() else t, target)
            # Given away as a view: a loss that works in place must not hit a leaf.
            with recording(problem.model):
                return problem.draws.run(lambda: loss.numerator(form.split(z.clone()), target), self.sample.index)

        return LiveBatch(self.batch(z, form), z, numerator, share)


@contextmanager
def elementary(model: Model) -> Iterator[None]:
    """A context in which normalisations are written in elementary operations: torch's own are wrong in the third derivative."""
    before, model.composite = model.composite, True
    try:
        yield
    finally:
        model.composite = before


class LiveBatch(Batch):
    """A batch whose quantities can be differentiated by its output, and by every tensor that the loss depends on.

    Args:
        batch: the ordinary one.
        output: z, a leaf that requires gradients.
        numerator: makes the loss, not divided by its denominator, with a graph.
        share: the inverse of the denominator.
    """

    def __init__(self, batch: Batch, output: Tensor, numerator: Callable[[], Tensor], share: Tensor | float) -> None:
        self.__dict__.update(batch.__dict__)
        self.output = output
        self._value = numerator() * share
        (self._gradient,) = torch.autograd.grad(
            self._value, output, create_graph=True, allow_unused=True, materialize_grads=True
        )

    def value(self) -> Tensor:
        """The loss of the batch, divided by the denominator, with its graph."""
        return self._value

    @property
    def loss_gradient(self) -> Tensor:
        return self._gradient

    def loss_hvp(self, tangent: Tensor) -> Tensor:
        if not self._gradient.requires_grad:  # a loss that is linear in the output
            return torch.zeros_like(self.output)
        (product,) = torch.autograd.grad(
            self._gradient, self.output, tangent, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    def fisher_hvp(self, tangent: Tensor) -> Tensor:
        if self._loss is not None and self._loss.facts.fisher_is_ggn:
            return self.loss_hvp(tangent)
        raise self._refused("a Fisher matrix that is not the Gauss-Newton matrix")

    @property
    def weights(self) -> Tensor:
        if self._loss is not None and any(t.requires_grad for t in self._loss.tensors().values()):
            raise self._refused("the weights of samples")
        weights: Tensor = self._share * self._point.weights
        return weights

    def pseudo_gradients(self, samples: int = 1, *, seed: int = 0, fisher: bool = False) -> Tensor:
        raise self._refused("Monte-Carlo draws")

    def loss_factor(self) -> Tensor:
        raise self._refused("columns of a square root")

    def row_factor(self, *, fisher: bool = False, start: int = 0, stop: int | None = None) -> Tensor:
        raise self._refused("columns of a square root")

    def vjp(self, cotangent: Tensor) -> Tensor:
        raise self._refused("Jᵀu")

    def per_sample_gradients(self) -> dict[str, Tensor]:
        raise self._refused("gradients of single samples")

    def layers(self, cotangents: Tensor, *, independent: bool = False) -> Iterator[Any]:
        raise self._refused("records of layers")

    @staticmethod
    def _refused(what: str) -> LossError:
        return LossError(
            f"curvature that is made of {what} has no derivative here; take hessian, ggn, residual or covariance, or another "
            "term that is a function of the output, the loss's gradient and its Hessian"
        )
