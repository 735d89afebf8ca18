"""The report that ``explain()`` prints: what became of an expression on a problem, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import torch

from curvalg.errors import LossError
from curvalg.expr import Expr, Facts
from curvalg.expr.term import MatrixTerm
from curvalg.lowering.lines import indent
from curvalg.lowering.plans.bind import unbound
from curvalg.lowering.replayed import Repeatable
from curvalg.lowering.sweeps.contract import call
from curvalg.markup import card, formula
from curvalg.problem import Problem, Snapshot
from curvalg.problem.layers.notes import LayerNotes
from curvalg.problem.layers.per_sample import PerSampleNotes
from curvalg.problem.verification.sharded_checks import OATH
from curvalg.problem.verification.tangent_checks import TangentNotes
from curvalg.rewrite import Step
from curvalg.tensors.memory import widest


class Explained(Protocol):
    """The operator that a report is made of."""

    expr: Expr
    problem: Problem
    snapshot: Snapshot
    shape: tuple[int, int]
    dtype: Any
    _steps: list[Step]
    _simplified: Expr
    _resolved: Expr
    _repeated: Repeatable

    @property
    def device(self) -> torch.device:
        """The device on which products are computed."""
        ...

    @property
    def facts(self) -> Facts:
        """The symmetry and definiteness, as far as known."""
        ...


def explain(op: Explained) -> str:
    """The report on an operator: sections with indented lines."""
    problem, totals = op.problem, op.problem.totals
    facts = ", ".join(f"{name}: {_tri(value)}" for name, value in vars(op.facts).items())
    sections: dict[str, list[str]] = {
        "expression": [str(op.expr)],
        "problem": [
            repr(problem),
            f"{totals.rows} rows, N = {totals.count} samples (by {problem.samples}), s = {totals.scale:g}, "
            f"denominator {totals.denominator:g}",
        ],
        "operator": [f"{op.shape[0]} x {op.shape[1]}, {op.dtype} on {op.device}", facts],
    }
    if widest(op.device) != torch.float64:
        sections["operator"].append(
            f"{op.device} has no float64: long sums, factorisations and checks are in float32 there"
        )
    if op._steps:
        fired = Counter(step.law for step in op._steps)
        laws = [f"by {law}" + (f" ({n} times)" if n > 1 else "") for law, n in fired.items()]
        sections["simplified"] = [str(op._simplified), *laws]
    sections["plan"] = op._repeated.lines(op.snapshot)
    if costs := _costs(op):
        sections["cost of what is still to be made"] = costs
    sections["execution"] = _execution(op)
    return "\n".join(line for title, lines in sections.items() for line in [title, *indent(lines)])


def operator_card(op: Explained) -> str:
    """An operator as a card of a notebook: what is known, the route, what is kept, the formula. Nothing is computed for it."""
    budget = op.problem.budget
    facts = {
        "expression": str(op.expr),
        "size": f"{op.shape[0]} x {op.shape[1]}, {op.dtype} on {op.device}",
        "facts": ", ".join(f"{name}: {_tri(value)}" for name, value in vars(op.facts).items()),
        "problem": repr(op.problem),
        "route": op._repeated.lines(op.snapshot)[0],
        "kept": f"{budget.used / 2**20:.3g} of at most {budget.limit / 2**20:.4g} MiB",
    }
    return card("CurvatureOperator", facts, formula(op.expr._repr_latex_()))


def _tri(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]


def _costs(op: Explained) -> list[str]:
    """What the matrices that need a pass over the data say that it costs, by the first batch alone."""
    problem = op.problem
    terms = [term for term in unbound(op._resolved) if isinstance(term, MatrixTerm)]
    saying = [term for term in terms if type(term).cost is not MatrixTerm.cost]
    if not saying or problem.group.sharded:  # where a call of the model takes all processes
        return []
    with problem.differentiating():
        try:
            first = next(iter(problem.evaluations(op.snapshot)), None)
            if first is None:  # one of several processes
                return ["not known to this process, which has no data"]
            batch = first.evaluate()
            lines = [call(term, "cost", batch) for term in saying]
        except LossError:  # it has none of the columns that the matrix is made of, which the product says better
            return []
    return [line for line in lines if line]


def _layers(problem: Problem) -> list[str]:
    """The lines on which parameters layer inputs and deltas are right for, and why not for the others."""
    notes = problem.noted(LayerNotes)
    good = sum(name not in notes.reasons for name in notes.compared)
    lines = [f"layer inputs and deltas of {good} parameters, compared with a gradient"] if good else []
    return lines + [f"gradients of every row of {name}, for {reason}" for name, reason in notes.reasons.items()]


def _verified_parts(op: Explained) -> list[str]:
    """The lines on what is whole when, and what was verified, where parameters lie in parts."""
    problem = op.problem
    whole, others = problem.layout.whole.size, problem.group.size
    sizes = f"{problem.size} of {whole} parameters on this process, of {others} with other data"
    lines = [sizes, "weights are whole where they are used, those of at most two units at a time"]
    if not problem.compares:
        return [*lines, "nothing was verified: verify=False"]
    if any(route == OATH for route in op.snapshot.sworn):
        lines.append(
            "verified through all exchanges: tangents by gradients, second derivatives by a central difference"
        )
    return lines


_OATHS = {
    "graph": "parameters are reached as attributes",
    "output": "two calls give the same output",
    "curvature": "second derivatives agree with a central difference",
}


def _verified(op: Explained) -> list[str]:
    """The lines on what was verified, and what was not."""
    problem, structure = op.problem, op.snapshot.structure
    if problem.group.sharded:
        return _verified_parts(op)
    if not problem.verify:
        left = "calls, tangents, second derivatives and structured inverses"
        return [f"nothing was verified: {left} are not verified with verify=False"]
    right = [route for (route, _), (wrong, _) in op.snapshot.sworn.items() if wrong is None]
    routes = sorted({str(route if isinstance(route, str) else route[0]) for route in right})
    found = [text for key, text in _OATHS.items() if key in structure.found.sworn and key not in structure.found.notes]
    found += [{"symmetric": "products are symmetric"}.get(r, f"tangents by {r} agree with gradients") for r in routes]
    lines = [f"verified where each operation occurs first: {'; '.join(found)}"] if found else []
    return lines + [f"not verified, {topic}: {note}" for topic, note in structure.found.notes.items()]


_KINDS = {"prepared": "statistics", "matrix": "matrix"}


def _execution(op: Explained) -> list[str]:
    problem = op.problem
    lines = [f"recordings take {problem.budget.used / 2**20:.3g} of at most {problem.budget.limit / 2**20:.0f} MiB"]
    kept = [f"{_KINDS[kind]} of {term}" for kind, term in problem.cached(op.snapshot).keys(*_KINDS)]
    if kept:
        lines.append(f"kept on the problem: {', '.join(kept)}")
    tangents = problem.noted(TangentNotes)
    if tangents.no_forward_ad is not None:
        lines.append(f"no forward AD: {tangents.no_forward_ad}")
    if tangents.no_double_backward is not None:
        lines.append(f"no tangents by two backward passes: {tangents.no_double_backward}")
    lines += _verified(op)
    per_sample = problem.noted(PerSampleNotes)
    if per_sample.route is not None:
        declined = f" (declined: {'; '.join(per_sample.declined)})" if per_sample.declined else ""
        lines.append(f"per-sample gradients by {per_sample.route}{declined}")
    lines += _layers(problem)
    if problem.draws.mode == "frozen":
        lines.append("random layers replay the same draws in every product")
    if not problem.data.ordered:
        lines.append("the loader shuffles; passes are compared, and what depends on the order is refused")
    return lines
