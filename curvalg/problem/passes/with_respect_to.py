"""Problems whose parameters are not those of the model: additive perturbations, zero, of its inputs or of an activation."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvalg.errors import OptionError, ProblemError
from curvalg.problem.data.batches import TARGET_KEYS, ReadBatch, call_model
from curvalg.problem.data.randomness import DrawGuard, Randomness
from curvalg.problem.model.model import Adapter, ModuleModel, recording, unwrap
from curvalg.problem.model.snapshot import Configuration
from curvalg.problem.passes.options import read_for
from curvalg.tensors import trees

ACTIVATIONS = "activations:"


class MadeOf(NamedTuple):
    """What a problem is made of: as it is given, and as it is where something else than parameters is differentiated by."""

    model: Any
    data: Any
    params: Any
    forward: Adapter | None
    target: Callable[[Any], Any] | None


class PerturbedModel(nn.Module):
    """The user's model with something added, row by row, to its inputs or to the output of one of its modules.

    The rows of a batch are named by their numbers, so that parts of the batch, and single rows, get what is theirs. Hooks are
    on the model within a call alone.

    Args:
        model: the user's.
        rule: ``forward(model, batch)``.
        perturbations: name -> zeros of the shape of what they are added to, first axis the rows.
        places: numbers of the inputs that they are added to, among the tensors of a batch; None: they are one, for ``module``.
        module: the name of the module.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Adapter,
        perturbations: Mapping[str, Tensor],
        places: Sequence[int] | None,
        module: str | None,
    ) -> None:
        super().__init__()
        self.model, self.rule, self.places, self.module = model, rule, places, module
        for name, zeros in perturbations.items():
            self.register_parameter(name, nn.Parameter(zeros))
        self.names = tuple(perturbations)
        self.training = model.training

    def forward(self, index: Tensor, batch: Any) -> Any:
        """The output on the rows of a batch that have these numbers."""
        added = [getattr(self, name)[index] for name in self.names]
        if self.places is None:
            return self._with_activation(added[0], batch)
        inputs, put = _inputs(batch)
        leaves, form = trees.flatten(inputs)
        for place, change in zip(self.places, added, strict=True):
            leaves[place] = leaves[place] + change
        return self.rule(self.model, put(trees.unflatten(form, leaves)))

    def _with_activation(self, added: Tensor, batch: Any) -> Any:
        assert self.module is not None
        hook = self.model.get_submodule(self.module).register_forward_hook(lambda module, given, output: output + added)
        try:
            return self.rule(self.model, batch)
        finally:
            hook.remove()


def with_respect_to(wrt: str, asked: MadeOf, loss: Any, randomness: Randomness, group: Any, shard: Any) -> MadeOf:
    """What a problem is made of, given what is differentiated by.

    Args:
        wrt: "parameters", "inputs", or "activations:" and the name of a module.
        asked: as the user gives it.
        loss: decides whether targets are read.
        randomness: of the call that finds the shape of an activation.
        group, shard: must be None.

    Raises:
        OptionError: another ``wrt``, or options that do not go with it.
        ProblemError: several batches, a model that is a function, no floating inputs, or no such module.
    """
    if wrt == "parameters":
        return asked
    name = wrt.removeprefix(ACTIVATIONS) if isinstance(wrt, str) and wrt.startswith(ACTIVATIONS) else None
    if wrt != "inputs" and name is None:
        raise OptionError(f"wrt is 'parameters', 'inputs', or 'activations:' and the name of a module, got {wrt!r}")
    if asked.params is not None or group is not None or shard is not None:
        raise OptionError(
            f"wrt={wrt!r} says what is differentiated by, on this process alone; leave params=, group= and shard= out"
        )
    if not isinstance(asked.model, nn.Module):
        raise ProblemError(
            f"wrt={wrt!r} needs an nn.Module; a function takes what it is differentiated by as its parameters: "
            "Problem(lambda params, index: model(params['input'][index]), loss, (torch.arange(len(X)), y), params={'input': X})"
        )
    model, rule = unwrap(asked.model), asked.forward or call_model
    sample = _only_batch(wrt, model, asked, loss)
    index = torch.arange(sample.rows, device=_device(model, sample))
    if name is None:
        perturbations, places = _of_inputs(model, rule, sample, randomness)
    else:
        perturbations, places = {"activation": _of_activation(model, name, rule, sample, randomness)}, None
    perturbed = PerturbedModel(model, rule, perturbations, places, name)
    batch = {"index": index, "batch": sample.batch}
    if sample.target is not None:
        batch["target"] = sample.target
    return MadeOf(perturbed, batch, list(perturbations), _by_index, None)


def _by_index(model: PerturbedModel, batch: Any) -> Any:
    if not isinstance(batch, Mapping) or "index" not in batch:
        raise ProblemError(
            "a problem with wrt= is of its own batch; for other data make another: Problem(..., wrt=...)"
        )
    return model(batch["index"], batch["batch"])


def _device(model: nn.Module, sample: ReadBatch) -> torch.device:
    some = [*itertools.islice(model.parameters(), 1), *trees.tensors(sample.batch)]
    return some[0].device


def _only_batch(wrt: str, model: nn.Module, asked: MadeOf, loss: Any) -> ReadBatch:
    """The batch, where there is one."""
    reading = read_for(loss, asked.data, asked.target)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    samples = list(itertools.islice(reading.read(device), 2))
    if len(samples) > 1:
        raise ProblemError(
            f"wrt={wrt!r} needs one batch, since every row has numbers of its own, but the data have several: pass one of "
            "them, (X, y), or all rows in one"
        )
    return samples[0]


def _inputs(batch: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What the model gets of a batch, and a function that puts something in its place."""
    if isinstance(batch, Mapping):
        own = {key: value for key, value in batch.items() if key not in TARGET_KEYS}
        return own, lambda new: {**batch, **new}
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], lambda new: (new, batch[1])
    return batch, lambda new: new


def _of_inputs(
    model: nn.Module, rule: Adapter, sample: ReadBatch, randomness: Randomness
) -> tuple[dict[str, Tensor], list[int]]:
    """Zeros for every floating input that the model reads, and their numbers among the leaves."""
    inputs, put = _inputs(sample.batch)
    leaves, form = trees.flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not places:
        raise ProblemError(
            "wrt='inputs' needs inputs of floating point, and there are none in the batch, as with numbers of tokens; "
            "differentiate by the activations of the module that embeds them, such as wrt='activations:embedding'"
        )
    if len(places) > 1:
        # A batch that is read by forward= and target= may hold targets, and more that no model looks at.
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has set
            zeros = {i: torch.zeros_like(leaves[i], requires_grad=True) for i in places}
            changed = [leaf + zeros[i] if i in zeros else leaf for i, leaf in enumerate(leaves)]
            output = _tried(model, rule, put(trees.unflatten(form, changed)), randomness)
            places = _read(trees.tensors(output), zeros) or places
    if wrong := [tuple(leaves[i].shape) for i in places if not leaves[i].ndim or len(leaves[i]) != sample.rows]:
        raise ProblemError(
            f"wrt='inputs' needs inputs with a row for each of the {sample.rows} samples, got {wrong[0]}"
        )
    names = ["input"] if len(places) == 1 else [f"input_{i}" for i in range(len(places))]
    return {name: torch.zeros_like(leaves[i]) for name, i in zip(names, places, strict=True)}, places


def _read(outputs: Sequence[Tensor], zeros: Mapping[int, Tensor]) -> list[int]:
    """The numbers of those that the outputs depend on."""
    sums = [output.sum() for output in outputs if output.requires_grad and output.is_floating_point()]
    if not sums:
        return []
    gradients = torch.autograd.grad(sums, list(zeros.values()), allow_unused=True)
    return [i for i, gradient in zip(zeros, gradients, strict=True) if gradient is not None]


def _tried(model: nn.Module, rule: Adapter, batch: Any, randomness: Randomness) -> Any:
    """The output on a batch by one call that leaves nothing behind."""
    made = ModuleModel(model, list(dict(model.named_parameters())), rule)
    state = {key: owner[slot] for key, owner, slot in made.slots()}
    effects = Configuration(made.named_modules(), [], [], None, 0).effects
    draws = DrawGuard(randomness)
    try:
        with recording(made), effects.undone(draws.mode):
            return draws.run(lambda: made(list(made.chosen.values()), state, batch), 0)
    finally:
        effects.learn()  # puts back what the call wrote in place


def _of_activation(model: nn.Module, name: str, rule: Adapter, sample: ReadBatch, randomness: Randomness) -> Tensor:
    """Zeros of the shape of a module's output, found by one call that leaves nothing behind."""
    modules = dict(model.named_modules(remove_duplicate=False))  # under all of its names
    if name not in modules or not name:
        near = difflib.get_close_matches(name, filter(None, modules), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"the modules are {', '.join(filter(None, modules))}"
        raise ProblemError(f"the model has no module {name!r}; {hint}")
    if isinstance(modules[name], torch.jit.ScriptModule):
        raise ProblemError(
            f"the module {name!r} is compiled by torch.jit, which lets nobody at its output; pass the model that was compiled"
        )
    found: list[Any] = []
    hook = modules[name].register_forward_hook(lambda module, given, output: found.append(output))
    try:
        with torch.no_grad():
            _tried(model, rule, trees.tensor_map(torch.clone, sample.batch), randomness)
    finally:
        hook.remove()
    if len(found) != 1:
        raise ProblemError(
            f"the module {name!r} is called {len(found)} times in a forward pass, so that it has not one output; name a module "
            "that is called once"
        )
    output = found[0]
    if (
        not isinstance(output, Tensor)
        or not output.is_floating_point()
        or not output.ndim
        or len(output) != sample.rows
    ):
        raise ProblemError(
            f"the module {name!r} gives a {trees.describe(output)}, but a tensor of floating point with a row for each of the "
            f"{sample.rows} samples is needed; name a module that gives one, such as one behind it"
        )
    return torch.zeros_like(output)
