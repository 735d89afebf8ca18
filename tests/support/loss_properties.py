"""The properties of every loss, as functions that the tests of a loss call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

Reference = Callable[[Any, Any, str], Tensor]
"""A torch loss: (output, target, "mean" or "sum") -> scalar."""


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def split(tree: Any, start: int, stop: int) -> Any:
    return optree.tree_map(lambda leaf: leaf[start:stop], tree)


def dense_hessian(reference: Reference, output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the torch sum with respect to all entries of the output, by double backward."""
    leaves, structure = optree.tree_flatten(output)
    variables = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = reference(structure.unflatten(variables), target, "sum")
    options = {"allow_unused": True, "materialize_grads": True}
    gradient = flat(list(torch.autograd.grad(value, variables, create_graph=True, **options)))
    if not gradient.requires_grad:
        return gradient, gradient.new_zeros(len(gradient), len(gradient))
    rows = [flat(list(torch.autograd.grad(g, variables, retain_graph=True, **options))) for g in gradient]
    return gradient.detach(), torch.stack(rows)


def check_split(loss: Any, reference: Reference, output: Any, target: Any, cuts: tuple[int, ...] = (1,)) -> None:
    """Sums of values over a ragged split, divided by the sum of denominators, are the torch loss of all data."""
    rows = len(optree.tree_leaves(output)[0])
    bounds = [0, *cuts, rows]
    pieces = [(split(output, a, b), split(target, a, b)) for a, b in itertools.pairwise(bounds)]
    value = sum(loss.at(z, t).value() for z, t in pieces)
    denominator = sum(loss.denominator(t) for _, t in pieces) if loss.reduction == "mean" else 1.0
    torch.testing.assert_close(value / denominator, reference(output, target, loss.reduction), rtol=1e-12, atol=1e-12)


def check_derivatives(loss: Any, reference: Reference, output: Any, target: Any) -> None:
    """Gradient and Hessian product are those of autograd; products under vmap are those of a loop."""
    gradient, hessian = dense_hessian(reference, output, target)
    point = loss.at(output, target)
    structure = optree.tree_structure(output)
    assert optree.tree_structure(point.gradient()) == structure
    torch.testing.assert_close(flat(point.gradient()), gradient, rtol=1e-10, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    tangents = optree.tree_map(lambda z: torch.randn(3, *z.shape, generator=generator, dtype=z.dtype), output)
    looped = []
    for k in range(3):
        tangent = optree.tree_map(lambda t: t[k], tangents)  # noqa: B023 - used at once
        product = point.hvp(tangent)
        assert optree.tree_structure(product) == structure
        torch.testing.assert_close(flat(product), hessian @ flat(tangent), rtol=1e-10, atol=1e-11)
        looped.append(product)
    leaves = optree.tree_leaves(tangents)
    batched = torch.func.vmap(lambda *t: tuple(optree.tree_leaves(point.hvp(structure.unflatten(t)))))(*leaves)
    for many, *ones in zip(batched, *map(optree.tree_leaves, looped), strict=True):
        torch.testing.assert_close(many, torch.stack(ones), rtol=1e-12, atol=1e-13)


def position_index(shape: torch.Size, axis: int | None) -> Tensor:
    """Flat indices of an output of this shape, (positions, entries of a position)."""
    index = torch.arange(shape.numel()).reshape(shape)
    return index.reshape(-1, 1) if axis is None else index.movedim(axis, -1).reshape(-1, shape[axis])


def outer(columns: Tensor, axis: int | None, weights: Tensor | None = None) -> Tensor:
    """Σ_k w_k c_k c_kᵀ per position, scattered into the dense matrix; columns are (K, *output.shape)."""
    index = position_index(columns.shape[1:], axis)
    blocks = columns.reshape(len(columns), -1)[:, index]
    weights = columns.new_ones(len(columns)) if weights is None else weights
    dense = columns.new_zeros(index.numel(), index.numel())
    dense[index[:, :, None], index[:, None, :]] = torch.einsum("k,kpi,kpj->pij", weights, blocks, blocks)
    return dense


def check_factor(loss: Any, reference: Reference, output: Tensor, target: Any) -> Tensor:
    """The outer products of the factor's columns are the dense Hessian."""
    _, hessian = dense_hessian(reference, output, target)
    factor = loss.at(output, target).factor()
    assert factor.shape[1:] == output.shape
    torch.testing.assert_close(outer(factor, loss.class_axis), hessian, rtol=1e-9, atol=1e-11)
    return factor


def check_label_draws(loss: Any, reference: Reference, output: Tensor, target: Any) -> None:
    """Over all label outcomes, each with its probability and a uniform number inside its interval: E s sᵀ = B."""
    _, hessian = dense_hessian(reference, output, target)
    point = loss.at(output, target)
    p = output.softmax(loss.class_axis).movedim(loss.class_axis, 0)
    middles = p.cumsum(0) - p / 2
    assert middles.shape[1:] == point.noise_shape
    for fisher in (False, True):
        draws = point.pseudo_gradients(middles, fisher=fisher)
        assert draws.shape == (len(p), *output.shape)
        scaled = draws * p.sqrt().unsqueeze(loss.class_axis % output.ndim + 1)
        torch.testing.assert_close(outer(scaled, loss.class_axis), hessian, rtol=1e-9, atol=1e-11)


def check_signs(loss: Any, output: Tensor, target: Any) -> None:
    """Both signs, each with probability 1/2, give exactly B (and the Fisher matrix, if there is one)."""
    point = loss.at(output, target)
    uniform = torch.tensor([0.25, 0.75], dtype=output.dtype).reshape(2, *[1] * output.ndim).expand(2, *output.shape)
    assert point.noise_shape == tuple(output.shape)
    wanted = [(False, point.hvp)] + ([(True, point.fisher_hvp)] if loss.facts.likelihood else [])
    for fisher, product in wanted:
        draws = point.pseudo_gradients(uniform, fisher=fisher)
        torch.testing.assert_close(draws[0], -draws[1])
        torch.testing.assert_close(draws.square().mean(0), product(torch.ones_like(output)), rtol=1e-12, atol=1e-14)


def check_unmutated(loss: Any, output: Any, target: Any) -> None:
    """Nothing of the inputs changes, nor the loss's tensors; results keep the data type."""
    inputs = [leaf for leaf in optree.tree_leaves((output, target, loss.tensors())) if isinstance(leaf, Tensor)]
    copies, versions = [leaf.clone() for leaf in inputs], [leaf._version for leaf in inputs]
    point = loss.at(output, target)
    point.value(), loss.weights(target), loss.denominator(target)
    results = [point.gradient(), point.hvp(output), point.weights]
    if loss.facts.likelihood:
        results.append(point.fisher_hvp(output))
    if loss.facts.convex:
        uniform = torch.full((2, *point.noise_shape), 0.3)
        results += [point.factor(), point.pseudo_gradients(uniform)]
    dtype = optree.tree_leaves(output)[0].dtype
    assert all(leaf.dtype == dtype and not leaf.requires_grad for leaf in optree.tree_leaves(results))
    for leaf, copy, version in zip(inputs, copies, versions, strict=True):
        assert leaf._version == version and torch.equal(leaf, copy)
