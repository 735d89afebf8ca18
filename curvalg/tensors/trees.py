"""Nested batches and outputs: tensors inside tuples, lists, mappings of any class, named tuples, data classes and graphs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

NAMESPACE = "curvalg"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for leaf number ``index`` in a tree that was taken apart."""

    index: int


def leaf_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with every leaf replaced, None included; containers keep their classes, mappings go by sorted keys."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (tuple, list) and all(isinstance(part, Tensor) for part in tree):  # as most batches are
        return type(tree)([function(part) for part in tree])

    def visit(node: Any) -> Any:
        if isinstance(node, Mapping):
            return _mapping_like(node, walk(dict(node)))
        if isinstance(node, PackedSequence):
            # torch reads the lengths on the CPU, wherever the data are; they belong to the form.
            orders = [walk(order) for order in (node.sorted_indices, node.unsorted_indices)]
            return PackedSequence(walk(node.data), node.batch_sizes, *orders)
        if _is_data_class(node):
            return _data_class_like(node, walk)
        if has_stores(node):
            return _stored_like(node, walk)
        return function(node)

    def walk(tree: Any) -> Any:
        return optree.tree_map(visit, tree, is_leaf=_is_special, none_is_leaf=True, namespace=NAMESPACE)

    return walk(tree)


def tensor_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree with every tensor replaced; everything else, and the kind of every container, stays."""
    return leaf_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def leaves(tree: Any) -> list[Any]:
    """All leaves of a tree but None, in its order."""
    return flatten(tree)[0]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree but None, and its form, which holds none of them; see :func:`unflatten`."""
    found: list[Any] = []

    def take(leaf: Any) -> Any:
        if leaf is None:
            return None
        found.append(leaf)
        return _Place(len(found) - 1)

    form = leaf_map(take, tree)
    return found, form


def unflatten(form: Any, values: Sequence[Any]) -> Any:
    """The tree from its leaves and its form, as :func:`flatten` gives them."""
    return leaf_map(lambda leaf: values[leaf.index] if isinstance(leaf, _Place) else leaf, form)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree, in its order."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def versions(tree: Any) -> list[int]:
    """The number of times each tensor of a tree was written into; inference tensors, which do not count it, give 0."""
    return [0 if t.is_inference() else t._version for t in tensors(tree)]


def add(left: Any, right: Any) -> Any:
    """The sum of two statistics of the same structure, leaf by leaf; None counts as nothing yet."""
    if left is None or right is None:
        return right if left is None else left
    if type(left) is type(right) is dict:  # what a batch does not have (an expert without rows) adds nothing
        return {key: add(left.get(key), right.get(key)) for key in [*left, *(k for k in right if k not in left)]}
    return optree.tree_map(torch.add, left, right, namespace=NAMESPACE)


def has_stores(node: Any) -> bool:
    """Whether an object keeps its tensors in mappings that it lists as ``stores``, as graphs of torch_geometric do."""
    return isinstance(getattr(type(node), "stores", None), property)


def graphs_of(batch: Any) -> list[Any] | None:
    """The graphs of a batch, whose nodes lie in one tensor, each with its own numbers of nodes; None for anything else."""
    separate = getattr(batch, "to_data_list", None) if has_stores(batch) else None
    return None if separate is None else separate()


def batch_of_graphs(batch: Any, graphs: list[Any]) -> Any:
    """Some graphs of a batch as a batch of its class."""
    return type(batch).from_data_list(graphs)


def rows(tree: Any) -> int | None:
    """The number of graphs of a batch of graphs, else the length of the leading axis of the first tensor that has one."""
    if has_stores(tree) and isinstance(count := getattr(tree, "num_graphs", None), int):
        return count
    return next((t.shape[0] for t in tensors(tree) if t.ndim), None)


def place(tree: Any, device: torch.device) -> Any:
    """The tree on a device; inference tensors are cloned, since autograd refuses them.

    Only what lies in pinned memory goes without waiting: then the device's own order makes it arrive in time. Whatever comes
    from a device would be read on the host before it is there.
    """

    def move(t: Tensor) -> Tensor:
        if t.device != device:
            t = t.to(device, non_blocking=t.device.type == "cpu" and t.is_pinned())
        return t.clone() if t.is_inference() else t

    return tensor_map(move, tree)


def describe(value: Any) -> str:
    """The kind and shapes of a value, for messages."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(describe(v) for v in value[:4])}{', …' if len(value) > 4 else ''})"
    return type(value).__name__


def _is_data_class(node: Any) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type) and not isinstance(node, _Place)


def _is_special(node: Any) -> bool:
    """Whether optree would not look inside, or put it together wrongly."""
    if type(node) in (dict, tuple, list):
        return False
    return isinstance(node, (Mapping, PackedSequence)) or _is_data_class(node) or has_stores(node)


def _mapping_like(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the original's class with other values; a dict where the class cannot be made to hold them."""
    try:
        twin: Any = copy.copy(original)
        if hasattr(twin, "__dict__"):
            twin.__dict__.update(_exchanged(vars(original), original, items))
        # Item assignment into a copy of anything else could reach what it shares with the original.
        if isinstance(twin, dict):
            for key in original:
                twin[key] = items[key]
        faithful = twin is not original and all(twin[key] is items[key] for key in items)
    except Exception:
        # Classes of other people may refuse copies, attributes or items in their own ways.
        faithful = False
    return twin if faithful else {key: items[key] for key in original}


def _exchanged(attributes: dict[str, Any], original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """The attributes of a mapping, which hold its values or mirror them, with the new values in place of the old."""
    new = {id(original[key]): value for key, value in items.items()}
    return optree.tree_map(
        lambda node: new.get(id(node), node),
        dict(attributes),  # type: ignore[arg-type]
        is_leaf=lambda node: id(node) in new,
        none_is_leaf=True,
    )


def _data_class_like(original: Any, walk: Callable[[Any], Any]) -> Any:
    twin = copy.copy(original)
    for field in dataclasses.fields(original):
        if hasattr(original, field.name):
            # As frozen data classes have it done by their own __init__.
            object.__setattr__(twin, field.name, walk(getattr(original, field.name)))
    return twin


def _stored_like(original: Any, walk: Callable[[Any], Any]) -> Any:
    twin = copy.copy(original)  # with stores of its own
    for store in twin.stores:
        store.update(walk(dict(store)))
    return twin
