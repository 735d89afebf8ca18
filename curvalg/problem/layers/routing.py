"""The test whether a graph can send rows to other places, depending on the data."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvalg.problem.model.sharded.gathering import Gather

_STEADY = frozenset(
    (
        # Arithmetic on each element.
        *(
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Neg",
            "Pow",
            "Exp",
            "Log",
            "Sqrt",
            "Rsqrt",
            "Abs",
            "Sin",
            "Cos",
            "ToCopy",
            "Clone",
        ),
        *(
            "Tanh",
            "Sigmoid",
            "Relu",
            "LeakyRelu",
            "Elu",
            "Gelu",
            "Silu",
            "Softplus",
            "Hardtanh",
            "Hardswish",
            "LogSigmoid",
        ),
        # Within a row, or the same for every batch of a shape.
        *("Unsqueeze", "Squeeze", "Expand", "Sum", "Mean", "Alias"),
        *("Softmax", "LogSoftmax", "NativeLayerNorm", "NativeBatchNorm", "NativeGroupNorm", "FusedRmsNorm"),
        *("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D"),
    )
)
"""Operations that leave rows where they are, or move them in the same way whatever the numbers are."""
_WEIGHTED = frozenset(("Addmm", "Mm", "Convolution"))
"""Operations that keep rows in place where one operand is a parameter; a matrix made from the data may be a permutation."""
_VIEWS = frozenset(("View", "UnsafeView", "ReshapeAlias"))
"""Operations that keep rows in place where the first axis stays."""
_LEAF = "torch::autograd::AccumulateGrad"
_GATHERED = f"{Gather.__name__}Backward"
"""A parameter of which each process has a part: what made it whole."""


def is_steady(z: Tensor) -> bool:
    """Whether no operation between the parameters and an output can move rows in a way that depends on the data.

    Known operations only: indexing, sorting, scattering, products of activations, slices and functions of the user are not.
    """
    todo, seen = [z.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node.name() == _LEAF:
            continue
        seen.add(node)
        kind = _kind(node)
        following = [parent for parent, _ in node.next_functions]
        if kind in _WEIGHTED:
            if not any(_is_parameter(parent) for parent in following[-2:]):
                return False
        elif not (kind in _STEADY or (kind in _VIEWS and _keeps_rows(node))):
            return False
        todo.extend(parent for parent in following if not _is_parameter(parent))
    return True


def _kind(node: Any) -> str:
    return str(node.name()).rstrip("0123456789").removesuffix("Backward")


def _keeps_rows(node: Any) -> bool:
    try:
        before, after = node._saved_self_sym_sizes, node._input_metadata[0].shape
    except (AttributeError, IndexError):  # this version of torch does not have it
        return False
    return bool(before) and bool(after) and int(before[0]) == int(after[0])


def _is_parameter(node: Any) -> bool:
    """Whether a node is a parameter, or its transpose."""
    while node is not None and _kind(node) in ("T", "View"):
        node = node.next_functions[0][0]
    return node is not None and node.name() in (_LEAF, _GATHERED)
