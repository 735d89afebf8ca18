"""What tests change inside the library: the one place that knows where it lies."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PLACES = {
    # Numbers from which on something else is done, so that small problems show it.
    "dense_limit": "curvalg.lowering.inverses.forms.DENSE_LIMIT",
    "patience": "curvalg.lowering.plans.planner.PATIENCE",
    "routes_after": "curvalg.lowering.sweeps.routes.PAID",
    "amortised": "curvalg.lowering.sweeps.programs.AMORTISED",
    "overhead": "curvalg.tensors.backward.OVERHEAD",
    "workspace": "curvalg.problem.setting.WORKSPACE",
    "small_factor": "curvalg.lowering.low_rank.factor.SMALL",
    "most_columns": "curvalg.lowering.plans.low_rank_plan.MOST_COLUMNS",
    "record_limit": "curvalg.problem.model.layer_record.LIMIT",
    "cheap_exact": "curvalg.estimate.spectra.exact.CHEAP",
    "cheap_density": "curvalg.estimate.spectra.density.CHEAP",
    "cheap_function": "curvalg.estimate.functions.matrix_function.CHEAP",
    "kept_rules": "curvalg.estimate.sampling.slq.KEPT",
    "widest_rules": "curvalg.estimate.sampling.slq.WIDEST",
    "widest_sketch": "curvalg.estimate.sampling.sampler.WIDEST",
    "lanczos_steps": "curvalg.estimate.spectra.eigenpair_search.MOST",
    "longest_function": "curvalg.estimate.functions.matrix_function.LONGEST",
    "doublings": "curvalg.estimate.functions.spectral_sum.DOUBLINGS",
    "file_due": "curvalg.runs.checkpoint.Checkpoint.due",
    "kronecker_chunk": "curvalg_plugins.kronecker.factors.CHUNK",
    "kernel_width": "curvalg_plugins.ntk.cross.WIDTH",
    # Clocks and gauges, so that choices do not depend on the machine.
    "clock": "curvalg.problem.kept.race.timed",
    "measure": "curvalg.problem.kept.race.measure",
    "candidate": "curvalg.problem.kept.race.Candidate",
    "choose_width": "curvalg.estimate.spectra.eigenpair_search.choose_width",
    "free_memory": "curvalg.problem.problem.free_memory",
    "free_memory_of_dense": "curvalg.lowering.operators.composition.free_memory",
    "lock": "curvalg.runs.run_file._lock",
    "unlock": "curvalg.runs.run_file._unlock",
    "save_file": "curvalg.runs.sealed.save_file",
    # Tables that a test compares with its own, or with the documentation.
    "loss_modules": "curvalg.losses.from_torch.TABLE",
    "loss_functions": "curvalg.losses.from_torch.FUNCTIONS",
    "names_of_terms": "curvalg.testing.pytest_plugin.split",
    "strategies": "curvalg.lowering.inverses.solvers.STRATEGIES",
    # Products and routes, which are counted, interrupted, planted with mistakes or taken away.
    "replay": "curvalg.tensors.cuda_graph.CudaGraph.__call__",
    "product": "curvalg.lowering.operator.CurvatureOperator._measured",
    "bind": "curvalg.lowering.operator.CurvatureOperator._bind",
    "choose_way": "curvalg.problem.kept.race.Race.run",
    "sum_product": "curvalg.lowering.plans.algebra_plan.SumPlan.apply",
    "low_rank_product": "curvalg.lowering.plans.low_rank_plan.LowRankPlan.apply",
    "factored_product": "curvalg.lowering.plans.low_rank_plan.LowRankPlan._factored",
    "sweep": "curvalg.lowering.sweeps.linearization.Linearization.product",
    "multiply_recording": "curvalg.lowering.sweeps.recordings.SinglePass.multiply",
    "record": "curvalg.problem.evaluation.Evaluation.record",
    "structure": "curvalg.lowering.inverses.offer.Form.at",
    "small_eigenproblem": "curvalg.estimate.spectra.eigen.exact",
    "routable": "curvalg.problem.layers.uses.DenseUse.routable",
    "compare_layers": "curvalg.problem.layers.verify._compare",
    "misplaced": "curvalg.problem.layers.recorded.misplaced",
    "pair_flops": "curvalg.problem.layers.kinds.affine.pair_flops",
    "all_of_numpy": "curvalg.problem.data.randomness._numpy_full",
    "checksum": "curvalg.runs.sealed._checksum",
    "eigsh_of_commands": "curvalg.cli.work.run_eigs.eigsh",
    "solve_of_commands": "curvalg.cli.work.run_eigs.solve",
}
"""What it is called in tests -> where it lies."""


def first_wins(candidates: Any, *_: Any) -> dict[Any, float]:
    """In place of ``measure``: every race is won by its first way."""
    return {way: float(number) for number, way in enumerate(candidates)}


def last_wins(candidates: Any, *_: Any) -> dict[Any, float]:
    """In place of ``measure``: every race is won by its last way."""
    return {way: -float(number) for number, way in enumerate(candidates)}


class Inside:
    """Exchanges what lies inside the library, until the test ends.

    ``inside(dense_limit=10)`` sets, ``inside["dense_limit"]`` reads, ``with inside.within(dense_limit=10)`` sets for a while.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, **values: Any) -> None:
        for name, value in values.items():
            self._monkeypatch.setattr(PLACES[name], value)

    def __getitem__(self, name: str) -> Any:
        return pkgutil.resolve_name(PLACES[name])

    @contextmanager
    def within(self, **values: Any) -> Iterator[None]:
        with self._monkeypatch.context() as patch:
            Inside(patch)(**values)
            yield


class Products:
    """Counts the products of all operators, and interrupts one.

    Args:
        inside: where they are watched.
    """

    def __init__(self, inside: Inside) -> None:
        self.columns, self._left, apply = 0, 0, inside["product"]

        def counted(op: Any, x: Any, *more: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            self.columns += x.shape[1]
            return apply(op, x, *more)

        inside(product=counted)

    def interrupt(self, number: int) -> None:
        """Interrupt the product of that number from now on; 1 is the next."""
        self._left = number
