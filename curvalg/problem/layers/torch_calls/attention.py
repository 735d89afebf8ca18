"""Multi-head attention in its layers: projections of queries, keys and values, and of what attention gives."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvalg.problem.layers.torch_calls.unfused import unfuse
from curvalg.problem.layers.uses import Declined


@unfuse(F.multi_head_attention_forward)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The attention of torch.nn.MultiheadAttention, rows first.

    A packed projection of one input is one layer; of several inputs it is three, a third of the weight each.
    """
    if (dropout_p and training) or static_k is not None or static_v is not None:
        raise Declined("it is used in an attention with dropout, or with keys or values that are given")
    single = query.ndim == 2
    given = [t[None] if single else t.transpose(0, 1) for t in (query, key, value)]
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    if separate is None and key is query and value is query:
        assert in_proj_weight is not None
        q, k, v = F.linear(given[0], in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        q, k, v = _projected(given, in_proj_weight, in_proj_bias, separate)
    rows, _, width = q.shape
    masks = [m for m in (_additive(attn_mask, q), _per_row(key_padding_mask, q, rows)) if m is not None]
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(rows, -1, -1)], 1)
        v = torch.cat([v, bias_v.expand(rows, -1, -1)], 1)
        masks = [F.pad(m, (0, 1)) for m in masks]
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(rows, 1, width)], 1) for t in (k, v))
        masks = [F.pad(m, (0, 1)) for m in masks]
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(width // num_heads)
    for mask in masks:
        scores = scores + (mask.unflatten(0, (rows, num_heads)) if mask.ndim == 3 else mask)
    weights = scores.softmax(-1)
    attended = (weights @ v).transpose(1, 2).flatten(2)
    output = F.linear(attended, out_proj_weight, out_proj_bias)
    shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
    if single:
        return output[0], None if shown is None else shown[0]
    return output.transpose(0, 1), shown


def _projected(given: list[Tensor], packed: Tensor | None, bias: Tensor | None, separate: Any) -> list[Tensor]:
    """Queries, keys and values of different inputs: by a third of a packed weight each, or by weights of their own."""
    if separate is None:
        assert packed is not None
        separate = packed.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(t, w, b) for t, w, b in zip(given, separate, biases, strict=True)]


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers that are added to scores: −∞ where it is True, itself where it has numbers."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _per_row(mask: Tensor | None, like: Tensor, rows: int) -> Tensor | None:
    """A mask (rows, keys) for scores (rows, heads, targets, keys)."""
    added = _additive(mask, like)
    return None if added is None else added.reshape(rows, 1, 1, -1)
