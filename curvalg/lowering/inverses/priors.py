"""A joint Kronecker block with one damping for the weight and another for the bias."""

from __future__ import annotations

import torch

from curvalg.expr import BlockDiagonal, Kronecker
from curvalg.expr.affine_form import affine
from curvalg.lowering.blocks.submatrices import block_places
from curvalg.lowering.inverses.offer import BoundMatrix, Form, Offer
from curvalg.lowering.matrices import Blocks, Congruent
from curvalg.lowering.matrices.array_leaves import tensor
from curvalg.tensors.memory import widest

_OTHER = "the matrix is not one Kronecker product and the identity"


def damped_by_name(matrix: BoundMatrix) -> Offer:
    """The matrix B ⊗ A over [W | b] plus c₁ I for the weight and c₂ I for the bias, where both are positive."""
    parts, shift = affine(matrix.expr)
    joint = [(c, part) for c, part in parts if isinstance(part, BlockDiagonal) and len(part.children) == 1]
    multiples = [(c, part) for c, part in parts if isinstance(part, BlockDiagonal) and len(part.children) == 2]
    if len(joint) != 1 or not multiples or len(joint) + len(multiples) != len(parts):
        return _OTHER
    scale, outer = joint[0]
    (block,) = outer.what if isinstance(outer.what, tuple) else (None,)
    inner, inner_shift = affine(block.expr) if block is not None and block.joint else ([], 0.0)
    if block is None or len(inner) != 1 or not isinstance(leaf := inner[0][1], Kronecker) or len(leaf.factors) != 2:
        return _OTHER
    if not leaf.plain:
        return "it has several products, or their numbers are reordered, and its weight and bias are damped differently"
    damping = dict.fromkeys(block.params, shift + scale * inner_shift)
    for c, part in multiples:
        for each in part.what if isinstance(part.what, tuple) else ():
            numbers, own = affine(each.expr)
            if numbers or len(each.params) != 1 or each.params[0] not in damping:
                return _OTHER
            damping[each.params[0]] += c * own
    if not leaf.facts().symmetric:
        return "its factors are not symmetric, and it is damped"
    if min(damping.values()) <= 0:
        return "the damping of its weight and that of its bias are not both positive"
    sizes = [int(f.shape[0]) for f in leaf.factors]
    weight, bias = (damping[name] for name in block.params)
    like = torch.empty(0, dtype=widest(matrix.problem.device), device=matrix.problem.device)
    places = block_places(matrix.problem, block)

    def make(_: object) -> Blocks:
        output, inputs = ((f + f.T) / 2 for f in (tensor(factor, like) for factor in leaf.factors))
        diagonal = like.new_tensor([*[weight] * (sizes[1] - 1), bias])
        return Blocks([(places, Congruent(scale * inner[0][0] * output, inputs, diagonal, str(matrix.expr)))])

    cost = f"eigendecompositions of {sizes[0]} x {sizes[0]} and {sizes[1]} x {sizes[1]} for each damping"
    return Form("kronecker", cost, make, spectral=False)
