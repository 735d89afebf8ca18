"""Kronecker factors of real models by plain torch: gradients of draws, and inputs and deltas that hooks of modules see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Problem
from tests.support.models.by_hand import Real

SEED = 3
Draws = list[Tensor]
"""Of each batch (samples, n, ...), in output space."""


def draws_of(problem: Problem, samples: int) -> Draws:
    """The draws of a problem: all that is taken from curvalg."""
    with problem.batches() as batches:
        return [batch.pseudo_gradients(samples, seed=SEED).detach() for batch in batches]


def names_of(real: Real) -> list[str]:
    """The names of what is trained, in its order."""
    return [name for name, p in real.model.named_parameters() if p.requires_grad]


def groups_of(model: nn.Module) -> list[tuple[str, ...]]:
    """What has a block of its own: a weight with the bias of the same module, anything else by itself."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    partner = {}
    for module in model.modules():
        mine = [names.get(id(module._parameters.get(part))) for part in ("weight", "bias")]
        if None not in mine:
            partner[mine[0]], partner[mine[1]] = mine, mine
    found = [partner.get(name, [name]) for name in names.values()]
    return [tuple(group) for i, group in enumerate(found) if group not in found[:i]]


def pulled_rows(real: Real, draws: Draws) -> Iterator[tuple[Any, list[Tensor]]]:
    """Each batch with ⟨sₘₙ, zₙ⟩ for every draw m and row n, in a graph."""
    for batch, columns in zip(real.batches, draws, strict=True):
        with real.twice:
            z = real.output(batch)
            yield batch, [(z[n] * s[n]).sum() for s in columns for n in range(len(z))]


def gradients(real: Real, draws: Draws) -> dict[str, Tensor]:
    """The gradient of every draw of every row, (draws · rows, numbers), by parameter."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names_of(real)}
    for _, scalars in pulled_rows(real, draws):
        for scalar in scalars:
            found = torch.autograd.grad(scalar, real.parameters, retain_graph=True, allow_unused=True)
            for name, p, g in zip(rows, real.parameters, found, strict=True):
                rows[name].append(p.detach().flatten() * 0 if g is None else g.flatten())
    return {name: torch.stack(each) for name, each in rows.items()}


# -- factors by hooks -------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a hook of a module saw in one call.

    Args:
        inputs: of the module.
        output: of the module, in the graph.
    """

    inputs: tuple[Any, ...]
    output: Tensor


@contextmanager
def watching(module: nn.Module) -> Iterator[list[Seen]]:
    """What a module is given and returns."""
    seen: list[Seen] = []
    with ExitStack() as stack:
        inputs: list[Any] = []
        stack.callback(module.register_forward_pre_hook(lambda _, given: inputs.append(given)).remove)
        stack.callback(module.register_forward_hook(lambda _, given, out: seen.append(Seen(inputs[-1], out))).remove)
        yield seen


def kronecker_sums(pairs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """A ⊗ B with A the mean of h hᵀ and B = Σ δ δᵀ, for pairs of h (vectors, in) and δ (vectors, out) of each batch."""
    a, b, count = 0, 0, 0
    for h, d in pairs:
        a, b, count = a + h.T @ h, b + d.T @ d, count + len(h)
    return torch.kron(a / count, b)


def affine(real: Real, path: str, draws: Draws) -> Tensor:
    """The block of a linear layer (weight, then bias), from what its hooks see."""
    module = real.model.get_submodule(path)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        with watching(module) as seen:
            for _, scalars in pulled_rows(real, draws):
                (call,) = seen
                (h,) = call.inputs
                h = h.detach().flatten(0, -2)
                if module.bias is not None:
                    h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
                yield h, deltas(scalars, call.output).flatten(0, -2)
                seen.clear()

    block = kronecker_sums(pairs())
    return block if type(module).__name__ == "Conv1D" else outputs_first(block, module.weight.shape)


def outputs_first(block: Tensor, shape: torch.Size) -> Tensor:
    """A block of rows [W | b]ᵀ, for parameters W (out, in) and b."""
    out, width = shape
    places = torch.arange(len(block)).reshape(-1, out)  # [input, output]
    order = torch.cat([places[:width].T.reshape(-1), places[width:].reshape(-1)])
    return block[order][:, order]


def deltas(scalars: list[Tensor], output: Tensor) -> Tensor:
    """The gradients of all scalars by an output (scalars, *output.shape)."""
    return torch.stack([torch.autograd.grad(s, output, retain_graph=True)[0] for s in scalars])


def table(real: Real, path: str, draws: Draws, index: Callable[[Any], Tensor]) -> Tensor:
    """The block of a table (rows, width) that is picked from.

    Args:
        real: the model.
        path: of the module.
        draws: of the problem.
        index: inputs of the module -> what is picked, (n, T) or (T,), the same for all rows.
    """
    module = real.model.get_submodule(path)
    size, width = module.weight.shape

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        with watching(module) as seen:
            for batch, scalars in pulled_rows(real, draws):
                (call,) = seen
                picked = index(call.inputs)
                rows = real_rows(batch)
                hot = nn.functional.one_hot(picked.expand(rows, picked.shape[-1]).flatten(), size).double()
                d = deltas(scalars, call.output)
                if module.padding_idx is not None:
                    d = d * (picked != module.padding_idx)[..., None]
                yield hot, d.reshape(-1, width)
                seen.clear()

    return kronecker_sums(pairs())


def real_rows(batch: Any) -> int:
    """The rows of a batch."""
    return len(batch["labels"] if isinstance(batch, dict) else batch[1])


def added(real: Real, name: str, draws: Draws) -> Tensor:
    """The block of a table (1, T, width) that is added to the positions of every row."""
    parameter = real.model.get_parameter(name)
    _, positions, width = parameter.shape

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for _, scalars in pulled_rows(real, draws):
            yield torch.eye(positions).double(), deltas(scalars, parameter).reshape(-1, width)

    return kronecker_sums(pairs())


def experts(real: Real, path: str, draws: Draws) -> dict[str, list[Tensor]]:
    """The blocks of the two weights of each expert, from tokens and their experts and the gradient at what comes out."""
    module = real.model.get_submodule(path)
    numbers = range(module.num_experts)
    pairs: dict[str, list[list[tuple[Tensor, Tensor]]]] = {
        name: [[] for _ in numbers] for name in ("gate_up_proj", "down_proj")
    }
    with watching(module) as seen:
        for _, scalars in pulled_rows(real, draws):
            (call,) = seen
            tokens, chosen, shares = (t.detach() for t in call.inputs)
            # Rows do not meet inside of the experts: the draws of all rows go back together.
            after = deltas(scalars, call.output).reshape(len(draws[0]), -1, *call.output.shape).sum(1)
            for e in numbers:
                at, slot = torch.where(chosen == e)
                h = tokens[at]
                first = (h @ module.gate_up_proj[e].detach().T).requires_grad_()
                gate, up = first.chunk(2, -1)
                hidden = module.act_fn(gate) * up
                out = [shares[at, slot, None] * d[at] for d in after]
                down = module.down_proj[e].detach()
                inner = [torch.autograd.grad(hidden, first, d @ down, retain_graph=True)[0] for d in out]
                pairs["gate_up_proj"][e].append((h, torch.cat(inner)))
                pairs["down_proj"][e].append((hidden.detach(), torch.cat(out)))
            seen.clear()
    return {
        name: [outputs_first(kronecker_sums(iter(of)), getattr(module, name)[e].shape) for e, of in enumerate(each)]
        for name, each in pairs.items()
    }
