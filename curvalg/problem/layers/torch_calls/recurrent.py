"""Recurrent networks step by step, so that each use of a weight is a linear layer of its own.

The equations are those of the documentation of torch.nn.RNN, LSTM and GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvalg.problem.layers.torch_calls.unfused import unfuse
from curvalg.problem.layers.uses import Declined

State = tuple[Tensor, ...]
Weights = Sequence[Tensor]
Cell = Callable[[Tensor, State, Weights], State]
"""(W x + b of one step, the state before, weights of the state [W_h, b_h, W_p]) -> the state after; the first is the output."""


def _rnn(activation: Callable[[Tensor], Tensor], x: Tensor, state: State, weights: Weights) -> State:
    return (activation(x + F.linear(state[0], *weights[:2])),)


def _lstm(x: Tensor, state: State, weights: Weights) -> State:
    recurrent, bias, *projection = weights
    gates = (x + F.linear(state[0], recurrent, bias)).chunk(4, -1)
    i, f, o = (gates[k].sigmoid() for k in (0, 1, 3))
    c = f * state[1] + i * gates[2].tanh()
    h = o * c.tanh()
    return (F.linear(h, projection[0]) if projection else h), c


def _gru(x: Tensor, state: State, weights: Weights) -> State:
    (h,) = state
    ours, theirs = x.chunk(3, -1), F.linear(h, *weights[:2]).chunk(3, -1)
    r, u = ((ours[k] + theirs[k]).sigmoid() for k in (0, 1))
    candidate = (ours[2] + r * theirs[2]).tanh()
    return ((1 - u) * candidate + u * h,)


def _layered(
    cell: Cell,
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """All layers and directions, one step after the other."""
    packed = not isinstance(has_biases, bool)  # the arguments of packed sequences lie one place further
    if packed or not isinstance(params, (list, tuple)) or (dropout and train):
        raise Declined("it is used in a recurrent network on packed sequences, or with dropout")
    x = input if batch_first else input.transpose(0, 1)
    first = hx if isinstance(hx, (list, tuple)) else (hx,)
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    ends: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            state, (into, *recurrent) = tuple(s[k] for s in first), params[k * each : (k + 1) * each]
            bias = recurrent.pop(1) if has_biases else None
            if not has_biases:
                recurrent.insert(1, None)
            given = F.linear(x, into, bias)
            steps: list[Tensor] = []
            for step in given.flip(1).unbind(1) if direction else given.unbind(1):
                state = cell(step, state, recurrent)
                steps.append(state[0])
            ends.append(state)
            made = torch.stack(steps, 1)
            outputs.append(made.flip(1) if direction else made)
        x = torch.cat(outputs, -1)
    return (x if batch_first else x.transpose(0, 1)), *(torch.stack(part) for part in zip(*ends, strict=True))


def _once(cell: Cell, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    """One step of a cell."""
    state = cell(F.linear(input, w_ih, b_ih), tuple(hx) if isinstance(hx, (list, tuple)) else (hx,), [w_hh, b_hh])
    return state if len(state) > 1 else state[0]


for _cell, _sequence, _step in (
    (partial(_rnn, torch.tanh), torch.rnn_tanh, torch.rnn_tanh_cell),
    (partial(_rnn, torch.relu), torch.rnn_relu, torch.rnn_relu_cell),
    (_lstm, torch.lstm, torch.lstm_cell),
    (_gru, torch.gru, torch.gru_cell),
):
    unfuse(_sequence)(partial(_layered, _cell))
    unfuse(_step)(partial(_once, _cell))
