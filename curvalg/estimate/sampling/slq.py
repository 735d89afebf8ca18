"""Stochastic Lanczos quadrature as a resumable algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from curvalg.estimate.target import Target
from curvalg.runs.run import Outcome
from curvalg.runs.run_state import Form, Options, State, is_count, sizes
from curvalg.runs.vector_digest import span_sums
from curvalg.solve import quadrature
from curvalg.solve.quadrature import GaussRules, Recurrences

KEPT = 2**27
"""Numbers that the bases of all probes together may take (0.5 GiB in float32). Where they would take more, only the last two
vectors of each are kept, and nothing is orthogonalised again: converged eigenvalues then come back as ghosts, which share
the weight of the first and hardly change a density."""
WIDEST = 32
"""Probes that are advanced together."""


@dataclass(frozen=True)
class StochasticLanczos:
    """Lanczos recurrences of random unit vectors, all of one round together.

    Args:
        target: a symmetric operator, on the complement of the locked rows.
        probes: random vectors, uniform on the unit sphere.
        steps: of each.
        seed: of the vectors.
        name: for messages and checkpoints.
        locked: orthonormal rows (d, n) that the vectors are orthogonal to.
        before: products that were spent before.
        enough: says whether the error of a rule is small enough; if not, the probes are doubled.
        most: products that doubling stays within.
    """

    target: Target
    probes: int
    steps: int
    seed: int
    name: str
    locked: Tensor = field(repr=False)
    before: int = 0
    enough: Callable[[GaussRules], bool] | None = None
    most: int = 0

    @property
    def whole(self) -> bool:
        """Whether the vectors of a round are kept and orthogonalised."""
        return min(self.probes, WIDEST) * (self.steps + 1) * self.target.size <= KEPT

    @property
    def method(self) -> str:
        """The name of the method, for results."""
        return "slq" if self.whole else "slq, three-term recurrence without re-orthogonalisation"

    @property
    def options(self) -> Options:
        """All options but the error that is asked for, so that a run can be resumed with a smaller one."""
        return {
            "probes": self.probes,
            "steps": self.steps,
            "seed": self.seed,
            "deflate": span_sums(self.locked, self.target.vectors),
            "orthogonalised": self.whole,
        }

    def axes(self, state: State) -> Mapping[str, int]:
        """The axis of the tensors that are vectors."""
        return {"basis": 1}

    def start(self) -> State:
        """The state with nothing done yet."""
        none = torch.zeros(self.steps, 0, dtype=torch.float64, device="cpu")
        finished = {"finished alphas": none, "finished betas": none}
        return State(finished, {"products": self.before, "round": 0, "wanted": self.probes})

    def fits(self, state: State) -> bool:
        """Whether the rules so far, and the recurrences that are going on, if there are any, belong together."""
        finished, going = (torch.float64, (self.steps, "probes")), (torch.float64, ("j", "p"))
        tensors: Form = {"finished alphas": finished, "finished betas": finished}
        running: Form = {"basis": (self.target.space.dtype, ("b", self.target.local)), "alphas": going, "betas": going}
        counts = dict.fromkeys(("products", "round", "wanted"), is_count)
        found = sizes(state, counts, {**tensors, **(running if "basis" in state.tensors else {})})
        if found is None or "basis" not in state.tensors:
            return found is not None
        kept = found["j"] + 1 if self.whole else 2
        return 0 < found["j"] < self.steps and found["b"] == kept * found["p"]

    def step(self, state: State) -> State:
        """Make one product with the vectors of all recurrences of the round."""
        numbers = dict(state.numbers)
        if (going := self._going(state)) is None:
            wanted = state.count("wanted")
            numbers["wanted"] = wanted if self._finished(state) < wanted else 2 * wanted
            numbers["round"] = state.count("round") + 1
            going = self._drawn(State(state.tensors, {**numbers, "round": state.count("round")}))
        numbers["products"] = state.products + int(going.going.sum())
        going = quadrature.advance(going, self.target.multiply)
        tensors = {name: state.tensors[name] for name in ("finished alphas", "finished betas")}
        if going.steps == self.steps or not bool(going.going.any()):
            for name, t in zip(tensors, _padded(going, self.steps), strict=True):
                tensors[name] = torch.cat([tensors[name], t], 1)
        else:
            tensors |= {"basis": going.basis, "alphas": going.alphas, "betas": going.betas}
        return State(tensors, numbers)

    def done(self, state: State) -> bool:
        """Whether all probes are through, and are enough or as many as there may be."""
        wanted = state.count("wanted")
        if "basis" in state.tensors or self._finished(state) < wanted:
            return False
        return self.enough is None or 2 * wanted * self.steps > self.most or self.enough(self.rule(state))

    def expected(self, state: State) -> int:
        """The products of all probes that are wanted now."""
        return self.before + state.count("wanted") * self.steps

    def rule(self, state: State) -> GaussRules:
        """The rule of all probes as far as they are; at least one step must have been made."""
        alphas, betas = state.tensors["finished alphas"], state.tensors["finished betas"]
        if (going := self._going(state)) is not None:
            more = _padded(going, self.steps)
            alphas, betas = torch.cat([alphas, more[0]], 1), torch.cat([betas, more[1]], 1)
        made, back = quadrature.rule(alphas, betas), self.target.back
        return replace(made, nodes=back(made.nodes), coarse=(back(made.coarse[0]), made.coarse[1]))

    def result(self, outcome: Outcome) -> GaussRules:
        """The rule where a run ended; an interruption before the first step stays one."""
        if outcome.partial and not self._finished(outcome.state) and "basis" not in outcome.state.tensors:
            raise KeyboardInterrupt
        return self.rule(outcome.state)

    def _finished(self, state: State) -> int:
        return state.tensors["finished alphas"].shape[1]

    def _going(self, state: State) -> Recurrences | None:
        """The recurrences of the round that is not over."""
        tensors = state.tensors
        if "basis" not in tensors:
            return None
        basis = tensors["basis"].to(self.target.space.device)
        space = self.target.vectors
        return Recurrences(basis, tensors["alphas"], tensors["betas"], self.whole, self.steps + 1, space)

    def _drawn(self, state: State) -> Recurrences:
        """The recurrences of new probes."""
        count = min(WIDEST, state.count("wanted") - self._finished(state))
        # Uniform on the sphere: the same in every basis, so that no matrix is a special case.
        key, space, vectors = f"quadrature {self.seed} {state.count('round')}", self.target.space, self.target.vectors
        rows = vectors.normals(key, 0, count).to(space.device, space.dtype)
        for _ in range(2 if len(self.locked) else 0):
            rows = rows - vectors.gram(rows, self.locked) @ self.locked
        rows /= vectors.lengths(rows).to(rows)[:, None]
        return quadrature.begin(rows, whole=self.whole, capacity=self.steps + 1, space=vectors)


def _padded(given: Recurrences, steps: int) -> tuple[Tensor, Tensor]:
    """Tridiagonal matrices of so many steps that are the given ones and, not coupled to them, their first diagonal entry."""
    missing = steps - given.steps
    if not missing:
        return given.alphas, given.betas
    zeros = torch.zeros(missing + 1, given.width, dtype=torch.float64, device="cpu")
    return torch.cat([given.alphas, given.alphas[:1].expand(missing, -1)]), torch.cat([given.betas[:-1], zeros])
