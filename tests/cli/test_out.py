"""``--out``: what was computed, in files that NumPy, safetensors and the library read, and places refused beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from curvalg import load, parse

COMMANDS = {
    "eigs": (["eigs", "hessian", "--k", "3", "--tol", "0"], ("eigenvalues", "eigenvectors", "residuals")),
    "density": (["density", "hessian", "--probes", "2"], ("grid", "density", "nodes", "weights", "outliers")),
}


def test_eigenpairs_for_numpy(run, tiny, tiny_problem, tmp_path: Path) -> None:
    result = run("eigs", "hessian", "-p", tiny, "--k", 3, "--tol", 0, "--out", "run.npz")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("result: run.npz\n")
    with np.load(tmp_path / "run.npz") as found:  # refuses pickles
        values, vectors, A = (
            found["eigenvalues"],
            found["eigenvectors"],
            parse("hessian").lower(tiny_problem).to_dense().numpy(),
        )
        np.testing.assert_allclose(values, np.linalg.eigvalsh(A)[-3:], atol=1e-10)
        np.testing.assert_allclose(A @ vectors, vectors * values, atol=1e-10)
        assert found["residuals"].shape == (3,) and str(found["method"]) == "exact"
        assert (str(found["expression"]), str(found["problem"])) == ("hessian", tiny)
        assert dict(zip(found["names"].tolist(), found["sizes"].tolist(), strict=True)) == {
            name: where.stop - where.start for name, where in tiny_problem.layout.slices.items()
        }


def test_a_density_for_numpy(run, tiny, tmp_path: Path) -> None:
    result = run("density", "hessian", "-p", tiny, "--probes", 3, "--steps", 5, "--outliers", 2, "--out", "run.npz")
    assert result.exit_code == 0, result.stderr
    with np.load(tmp_path / "run.npz") as found:
        assert float(
            torch.trapezoid(torch.from_numpy(found["density"]), torch.from_numpy(found["grid"]))
        ) == pytest.approx(1, abs=0.02)
        assert found["weights"].shape == found["nodes"].shape
        np.testing.assert_allclose(found["weights"].sum(-1) + len(found["outliers"]) / 27, 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_both_kinds_of_files_hold_the_same(run, tiny, tiny_problem, tmp_path: Path, name: str) -> None:
    command, entries = COMMANDS[name]
    for suffix in (".npz", ".safetensors"):
        result = run(*command, "-p", tiny, "--out", f"run{suffix}", "--json")
        assert result.exit_code == 0 and "result:" not in result.stdout, result.stderr
    kept = load(tmp_path / "run.safetensors", tiny_problem)
    with np.load(tmp_path / "run.npz") as arrays, safe_open(tmp_path / "run.safetensors", "pt") as tensors:
        for entry in entries:
            # Of two runs: what the clock chose may change the last bits.
            np.testing.assert_allclose(arrays[entry], tensors.get_tensor(entry), atol=1e-9)
            assert torch.equal(getattr(kept, entry), tensors.get_tensor(entry))


def test_an_operator_on_outputs_has_no_parameters(run, tiny, tmp_path: Path) -> None:
    assert run("eigs", "loss_hessian", "-p", tiny, "--k", 2, "--out", "run.npz").exit_code == 0
    with np.load(tmp_path / "run.npz") as found:
        assert "names" not in found and found["eigenvectors"].shape == (60, 2)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("run.pt", "--out writes .npz (for NumPy) or .safetensors, got 'run.pt'; write run.npz"),
        ("run", "write run.npz"),
        ("missing/run.npz", "the result cannot be written to missing/run.npz: No such file or directory; give --out"),
    ],
)
@pytest.mark.parametrize("command", ["eigs", "density"])
def test_places_refused_before_anything_is_computed(
    run, module, tmp_path: Path, command: str, place: str, message: str
) -> None:
    name = module("def make():\n    open('computed', 'w').close()")
    result = run(command, "ggn", "-p", f"{name}:make", "--out", place)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "computed").exists()
