"""What is verified before it is believed: calls, graphs, tangents and second derivatives of the user's model.

Torch's formulas are not all right, hooks and custom functions may alter gradients, and a model may read parameters, random
numbers or a state in ways that an exchange of its parameters does not reach. Each check is an identity that needs no other
route; it is made once and remembered, at a structure of the problem where it is about the model's code, and at a state where
it depends on the numbers too. ``Problem(verify=False)`` leaves all of them out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from curvalg.errors import LossError, ProblemError
from curvalg.tensors.backward import backward
from curvalg.tensors.graph import coarsest_dtype, nodes, operations

if TYPE_CHECKING:
    from curvalg.losses.callable import CallablePoint
    from curvalg.problem.evaluation import Evaluation
    from curvalg.problem.problem import Problem


class RouteError(ProblemError):
    """A route that was right on other batches is wrong on this one; another is taken by now."""


def verdict(
    evaluation: Evaluation,
    route: Hashable,
    check: Callable[[], str | None],
    graphs: Iterable[Tensor | GradientEdge | None] = (),
) -> str | None:
    """Why a route must not be used at this state for these parameters, or None.

    It is found out once, and again on a batch whose graph has operations that no verified one had: rows that go to an expert
    of their own, a branch that the first batch does not take.

    Args:
        evaluation: of the batch at hand.
        route: its name.
        check: what is wrong with it on this batch, or None.
        graphs: what its operations are told from.
    """
    problem, sworn = evaluation.problem, evaluation.snapshot.sworn
    if not problem.verify:
        return None
    oath = (route, tuple(problem.layout.names))
    reason, known = sworn.get(oath, (None, None))
    if known is None or (reason is None and not (found := operations(graphs)) <= known):
        reason = check()
        sworn[oath] = reason, (operations(graphs) if known is None else known | found)
    return reason


def rounding(evaluation: Evaluation, z: Tensor) -> float:
    """The relative error up to which two computations of the model agree: the square root of its coarsest epsilon."""
    structure = evaluation.snapshot.structure
    if structure.epsilon is None or z.requires_grad:
        dtypes = {z.dtype, *evaluation.problem.layout.dtypes.values(), coarsest_dtype(z)}
        if (autocast := evaluation.problem.autocast) is not None:
            dtypes.add(autocast)
        epsilon = max(torch.finfo(dtype).eps for dtype in dtypes)
        if z.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
            epsilon = max(epsilon, 1e-3)
        structure.epsilon = max(epsilon, structure.epsilon or 0.0)
    return float(structure.epsilon**0.5)


# -- calls --------------------------------------------------------------------------------------------------------------


@contextmanager
def owned(evaluation: Evaluation) -> Iterator[None]:
    """Around the first recorded call: the live parameters require gradients, so that a graph that reaches them shows it."""
    problem, sworn = evaluation.problem, evaluation.snapshot.structure.sworn
    if not problem.verify or "graph" in sworn:
        yield
        return
    frozen = [p for p in problem.model.chosen.values() if p.is_leaf and not p.requires_grad and not p.is_inference()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def swear_graph(evaluation: Evaluation, z: Tensor, leaves: Sequence[Tensor]) -> None:
    """Once a structure: the output depends on the tensors that stand for the parameters, and not on the live ones.

    Raises:
        ProblemError: a parameter is reached in a way that its exchange does not.
    """
    problem, sworn = evaluation.problem, evaluation.snapshot.structure.sworn
    if not problem.verify or "graph" in sworn:
        return
    rounding(evaluation, z)  # the graph tells the dtypes that the model computes in
    live = {id(p): name for name, p in problem.model.chosen.items()}
    given = {id(leaf) for leaf in leaves}
    reached = {id(v) for node in nodes([z]) if (v := getattr(node, "variable", None)) is not None}
    if not reached & given:
        return  # it depends on none of them, which is told elsewhere
    for key, name in live.items():
        if key in reached - given:
            raise ProblemError(
                f"the parameter {name!r} reaches the output in a way that curvalg cannot follow: through a closure, a list, a "
                "cached tensor or a hook, not as an attribute of its module. Read it as an attribute (self.weight) in forward, "
                "or leave it out by params="
            )
    sworn.add("graph")


def swear_output(evaluation: Evaluation, z: Tensor, earlier: Tensor | None = None) -> None:
    """Once a structure: two calls give the same output, the second of them of the user's own module with its own parameters.

    Args:
        evaluation: of the batch.
        z: the output.
        earlier: that of another call, which saves the second.

    Raises:
        ProblemError: it does not.
    """
    problem, sworn = evaluation.problem, evaluation.snapshot.structure.sworn
    if not problem.verify or "output" in sworn:
        return
    sworn.add("output")
    tolerance = rounding(evaluation, z)
    try:
        if earlier is None and _same_few_rows(evaluation, z, tolerance):
            return
        again = evaluation.live_output() if earlier is None else earlier
        if z.shape != again.shape or not _close(z, again, tolerance):
            raise ProblemError(
                f"the model's output on batch {evaluation.sample.index} is not the same in every call, so that there is no one "
                "matrix: it draws random numbers from a generator of its own (pass its numbers as data, or switch it off), "
                "keeps a state that its forward changes (register it as a buffer), or reads its parameters otherwise than as "
                "attributes of their modules. Problem(verify=False) leaves this check out"
            )
    except BaseException:
        sworn.discard("output")
        raise


def _same_few_rows(evaluation: Evaluation, z: Tensor, tolerance: float) -> bool:
    """Whether the live model gives the first rows of the output, where these can be computed alone: most of a call is saved."""
    few = few_rows(evaluation)
    if few is evaluation or z.shape[:1] != (evaluation.sample.rows,):
        return False
    try:
        again = few.live_output()
    except _FAILURES:  # a model that takes batches of one size
        return False
    first = z[: few.sample.rows]
    return first.shape == again.shape and _close(first, again, tolerance)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = torch.where(a.isfinite(), a, 0).abs().max() if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=float(tolerance * scale), equal_nan=True))


def swear_loss(problem: Problem, point: CallablePoint) -> None:
    """The user's loss depends on the parameters through the output alone.

    Raises:
        ProblemError: it does not.
    """
    live = {id(p): name for name, p in problem.model.chosen.items()}
    for node in nodes([point.numerator]):
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in live:
            raise LossError(
                f"the loss depends on the parameters ({live[id(variable)]!r}) otherwise than through the model's output, as a "
                "penalty does; its derivatives there would be missing. Take the penalty out of the loss, and add its curvature "
                "to the expression: for c ‖θ‖² it is + 2*c * Identity"
            )


# -- tangents -------------------------------------------------------------------------------------------------------------


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def random_cotangent(z: Tensor, seed: int = 1) -> Tensor:
    """Standard normal numbers of the output's shape, the same in every call."""
    return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=_generator(z.device, seed))


def random_directions(evaluation: Evaluation, seed: int = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    """A random direction for every parameter, of its shape and of a dtype (None: its own); the same in every call.

    Each is the outer product of two vectors of standard normal numbers, along the first axis and all others: no fixed error
    is orthogonal to it, and it is written in a tenth of the time that normal numbers take.
    """
    problem = evaluation.problem
    generator, layout = _generator(problem.device, seed), problem.layout
    directions = []
    for shape, own in zip(layout.shapes.values(), layout.dtypes.values(), strict=True):
        first, others = shape[:1].numel(), shape[1:].numel()
        drawn = torch.randn(first + others, device=problem.device, generator=generator).to(dtype or own)
        if drawn.dtype == torch.float16:  # an output that it can just hold must not overflow by the check itself
            drawn[:first] *= 2.0**-6
        directions.append(torch.outer(drawn[:first], drawn[first:]).reshape(shape))
    return directions


def wrong_tangent(
    evaluation: Evaluation,
    z: Tensor,
    u: Tensor,
    tangent: Tensor,
    gradients: Sequence[Tensor | None],
    directions: Sequence[Tensor],
) -> str | None:
    """Why tangents must not be used: ⟨u, J v⟩ differs from ⟨Jᵀu, v⟩; None where it does not.

    Args:
        evaluation: of the batch.
        z: the output, with its graph where there is one.
        u: a cotangent.
        tangent: J v.
        gradients: Jᵀu by parameter.
        directions: v by parameter.
    """
    pairs = [(g, v) for g, v in zip(gradients, directions, strict=True) if g is not None]
    left, left_scale = _dot([(u.detach(), tangent)])
    right, right_scale = _dot(pairs)
    error, scale = abs(left - right), left_scale + right_scale
    tolerance = rounding(evaluation, z)
    if error <= tolerance * scale:
        return None
    # Where J is zero but for rounding (a bias before a normalisation), the error is that of what has cancelled: v moves the
    # output by about its own size for every size of the parameters.
    natural = _size([z]) * _size([u]) / (_size(evaluation.values()) or 1.0)
    if error <= FLOOR * tolerance**2 * natural * z.numel():
        return None
    return f"J v disagrees with the gradient (⟨u, J v⟩ = {left:.6g}, ⟨Jᵀu, v⟩ = {right:.6g})"


FLOOR = 1e2
"""Rounding errors of a sum whose parts cancel, in units of its size and the machine epsilon."""


def _size(tensors: Sequence[Tensor]) -> float:
    """The root of the mean square of all elements."""
    return _norm(tensors) / math.sqrt(max(sum(t.numel() for t in tensors), 1))


def _norm(tensors: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _dot(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The inner product, and the size that the sum of its random parts has."""
    products = [a.detach().to(torch.float64, copy=True).mul_(b.detach()) for a, b in pairs]
    total = float(torch.stack([product.sum() for product in products]).sum()) if products else 0.0
    return total, _norm(products)


# -- second derivatives -----------------------------------------------------------------------------------------------------

ROWS = 2
"""Rows of a batch that second derivatives are compared on, where these can be computed alone."""
SMALL = 2**20
"""Rows times parameters below which a call costs as much for few rows as for all."""
STEP = 1e-6
"""Of the central difference, in units of the parameters' own size."""
DIRECTIONS = 3
"""A difference across a kink (ReLU) is wrong by itself: so many directions are tried before the model is."""
ALLOWED = 1e-4
"""Relative error of a central difference in float64."""


_FAILURES = (ProblemError, RuntimeError, TypeError, ValueError, NotImplementedError)
"""What a model may raise that is called in another dtype or on fewer rows than it was made for."""


def few_rows(evaluation: Evaluation) -> Evaluation:
    """The first rows of a batch, where they can be computed without the others and that saves work; else the batch."""
    problem, sample = evaluation.problem, evaluation.sample
    if sample.rows <= ROWS or sample.rows * problem.size < SMALL:
        return evaluation
    if problem.model.batch_statistics or problem.draws.mode != "refuse":
        return evaluation
    return type(evaluation)(problem, evaluation.snapshot, sample.head(ROWS))


def swear_curvature(evaluation: Evaluation) -> None:
    """Once a structure: second derivatives of the model are those of its gradient, by a central difference in float64.

    Once more on a batch whose graph has operations that no verified one had, and on all rows where the few lack some.

    Compared are (∂_w J)ᵀu by double backward and (J(θ + hw)ᵀu − J(θ − hw)ᵀu)/2h for a random cotangent u and a random w, on a
    few rows. Where they differ, normalisations are written in elementary operations and compared again.

    Raises:
        ProblemError: they are not.
    """
    problem, structure = evaluation.problem, evaluation.snapshot.structure
    found = evaluation.operations
    if not problem.verify or problem.autocast is not None or found <= structure.curved:
        return
    few = few_rows(evaluation)
    try:
        error = _curvature_error(few)
    except _FAILURES:
        if few is evaluation:
            raise
        few = evaluation  # a model that takes batches of one size
        error = _curvature_error(few)
    if error is not None and error <= ALLOWED and not found <= few.operations | structure.curved:
        few = evaluation
        error = _curvature_error(few)
    if error is not None and error > ALLOWED and not problem.model.composite:
        problem.model.composite = True
        error = _curvature_error(few)
    if error is None:
        structure.notes["second derivatives"] = "no central difference: the model does not run in float64"
    elif error > ALLOWED:
        problem.model.composite = False
        raise ProblemError(
            "the second derivatives of the model are wrong: the derivative of its gradient by double backward differs from a "
            f"central difference by {error:.1e}. Torch's formula for an operation is wrong, or a hook, a custom autograd "
            "Function (a straight-through estimator, a checkpoint) gives a gradient that is not a derivative. First-order "
            "matrices (ggn, covariance) need none; Problem(verify=False) leaves this check out"
        )
    structure.sworn.add("curvature")
    structure.curved |= found


def _curvature_error(evaluation: Evaluation) -> float | None:
    """The relative difference, the smallest over some directions; None where the model does not run in float64."""
    smallest = math.inf
    # What is detached is a constant, unlike what a Function computes: where both move, both are tried.
    for seed, hold in itertools.product(range(DIRECTIONS), (False, True)):
        try:
            found = _difference(evaluation, seed, hold=hold)
        except _FAILURES:
            if evaluation.problem.dtype == torch.float64:
                raise
            return None
        if found is None:
            return None
        smallest = min(smallest, found)
        if smallest <= ALLOWED:
            break
    return smallest


class Constants(TorchFunctionMode):
    """What a model takes for constants although it comes from the parameters: detached tensors, and all that is computed
    without gradients. A difference must hold them fixed as the derivative does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Tensor] = []
        self._next: int | None = None

    def taken(self) -> Constants:
        """Around a call: remember them."""
        self._next = None
        return self

    def given(self) -> Constants:
        """Around another call: put the remembered ones in their place."""
        self._next = 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.requires_grad or is_functorch_wrapped_tensor(result):
            return result
        if not any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *(kwargs or {}).values())):
            return result
        if self._next is None:
            self._values.append(result.detach().clone())
            return result
        if self._next < len(self._values) and self._values[self._next].shape == result.shape:
            result = self._values[self._next].to(result.dtype)
        self._next += 1
        return result


def _difference(evaluation: Evaluation, seed: int, *, hold: bool) -> float | None:

    call, values = evaluation.in_double(), evaluation.values()
    w = random_directions(evaluation, seed, torch.float64)
    for v, value in zip(w, values, strict=True):
        v.mul_(_size([value]) or 1.0)
    leaves = [value.to(torch.float64, copy=True).requires_grad_() for value in values]
    cut = Constants()
    with cut.taken():
        z = call(leaves)
    evaluation.operations = operations([z])
    if coarsest_dtype(z) != torch.float64:
        return None
    u = random_cotangent(z.detach(), seed)
    gradients = evaluation.differentiate(z, leaves, u)
    exact = _existing(backward(gradients, leaves, w), leaves)
    # Rounding of the gradient is that of its own size or, where it is zero but for rounding, of what cancels in it.
    natural = float(u.norm() * z.detach().norm()) / (_size(values) or 1.0)
    noise = FLOOR * torch.finfo(torch.float64).eps / STEP * (_norm(_existing(gradients, leaves)) + natural) / ALLOWED
    del gradients, leaves, z
    sides = []
    for sign in (1, -1):
        moved = [(v * (sign * STEP)).add_(value).requires_grad_() for value, v in zip(values, w, strict=True)]
        with cut.given() if hold else nullcontext():
            sides.append(_existing(backward([call(moved)], moved, [u]), moved))
    difference = [(plus - minus).div_(2 * STEP) for plus, minus in zip(*sides, strict=True)]
    scale = _norm(exact) + _norm(difference) + noise
    return _norm([d.sub_(e) for d, e in zip(difference, exact, strict=True)]) / scale if scale else 0.0


def _existing(gradients: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Those that there are, detached, and zeros for the others."""
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(gradients, leaves, strict=True)]


def swear_symmetric(
    multiply: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
    evaluation: Evaluation,
    what: object,
    natural: Callable[[], float],
) -> None:
    """vᵀ(A w) = wᵀ(A v) for the recorded product of a batch with a symmetric matrix.

    Args:
        multiply: a direction by parameter -> the product by parameter.
        evaluation: of the batch.
        what: the matrix, for messages.
        natural: the size of vᵀ(A w) for directions of the parameters' size, before anything cancels.

    Raises:
        ProblemError: it is not.
    """
    v, w = (random_directions(evaluation, seed) for seed in (4, 5))
    left, left_scale = _dot([(x, y) for x, y in zip(v, multiply(w), strict=True) if y is not None])
    right, right_scale = _dot([(x, y) for x, y in zip(w, multiply(v), strict=True) if y is not None])
    epsilon = evaluation.snapshot.structure.epsilon or torch.finfo(evaluation.problem.dtype).eps
    tolerance, error = epsilon**0.5, abs(left - right)
    if error <= tolerance * (left_scale + right_scale) or not math.isfinite(error):
        return  # what is not finite is told of the product itself
    if not error <= FLOOR * tolerance**2 * natural() / (_size(evaluation.values()) or 1.0) ** 2:
        raise ProblemError(
            f"the product with {what} is not symmetric (vᵀ(A w) = {left:.6g}, wᵀ(A v) = {right:.6g}), so that the second "
            "derivatives of the model are wrong at this state: torch's formula for an operation is wrong there, or a hook or a "
            "custom autograd Function alters gradients. First-order matrices (ggn, covariance) need none"
        )
