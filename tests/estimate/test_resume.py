"""Interrupted and resumed runs: partial results, the same bits, and checkpoints of other runs refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from spectra import SPECTRA, matrix

from curvalg import CheckpointError, ConvergenceError, Diagonal, Problem, registry
from curvalg.estimate import checkpoint as checkpoints
from curvalg.estimate import eigsh

A = matrix(SPECTRA["clustered"]).numpy()

SLOW = """
import sys, time
import numpy as np, torch
from scipy.sparse.linalg import LinearOperator
sys.path.insert(0, {tests!r})
from spectra import SPECTRA, matrix
from curvalg.estimate import checkpoint, eigsh, lanczos
checkpoint.INTERVAL, checkpoint.OVERHEAD, lanczos.MOST = 0.0, 1e9, 20
A = matrix(SPECTRA["clustered"]).numpy()
def product(x):
    time.sleep({pause})
    return A @ x
op = LinearOperator(A.shape, matvec=product, matmat=product, dtype=float)
pairs = eigsh(op, 6, which="LA", tol=1e-7, maxiter=5000, checkpoint={path!r})
torch.save((pairs.eigenvalues, pairs.eigenvectors, pairs.residuals, pairs.products), {out!r})
"""


def slow(path: Path, out: Path, pause: float) -> subprocess.Popen[bytes]:
    code = SLOW.format(tests=str(Path(__file__).parent), path=str(path), out=str(out), pause=pause)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def test_killed_five_times_and_resumed_to_the_same_bits(tmp_path):
    file, done, whole = tmp_path / "run.safetensors", tmp_path / "resumed.pt", tmp_path / "whole.pt"
    draw, kills = random.Random(0), 0
    while kills < 5:
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = slow(file, done, 0.02)
        # Kill only once this process has written, so that every one of them got further than the one before.
        while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.15))
        assert process.poll() is None, "the run ended before it was killed five times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    # What was measured, the width of the block, must be what the file says.
    with checkpoints.safe_open(file, "pt") as opened:
        width = __import__("json").loads(opened.metadata()["curvalg"])["numbers"]["width"]
    assert slow(file, done, 0.0).wait() == 0
    resumed = torch.load(done)
    whole_code = SLOW.replace("checkpoint={path!r}", f"block={width}, checkpoint={{path!r}}")
    code = whole_code.format(
        tests=str(Path(__file__).parent), path=str(tmp_path / "other.safetensors"), out=str(whole), pause=0.0
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    for left, right in zip(resumed[:3], torch.load(whole)[:3], strict=True):
        assert torch.equal(left, right)


class Interrupted:
    """A product that is interrupted once."""

    def __init__(self, at: int) -> None:
        self.at, self.products = at, 0

    def __call__(self, x):
        self.products += 1
        if self.products == self.at:
            raise KeyboardInterrupt
        return A @ x

    @property
    def op(self):
        return LinearOperator(A.shape, matvec=self, dtype=float)


@pytest.mark.parametrize("with_file", [False, True])
def test_an_interruption_gives_what_there_is(tmp_path, with_file):
    path = tmp_path / "run.safetensors" if with_file else None
    pairs = eigsh((product := Interrupted(30)).op, 4, which="LA", block=1, tol=1e-8, checkpoint=path)
    assert pairs.partial and not pairs.converged and len(pairs) == 4 and product.products == 30 and pairs.products == 29
    V = pairs.eigenvectors
    assert float((V.T @ V - torch.eye(4).double()).abs().max()) < 1e-10
    assert not with_file or path.exists()
    whole = eigsh(Interrupted(0).op, 4, which="LA", block=1, tol=1e-8)
    if with_file:
        resumed = eigsh(Interrupted(0).op, 4, which="LA", block=1, tol=1e-8, checkpoint=path)
        assert torch.equal(resumed.eigenvectors, whole.eigenvectors) and resumed.products == whole.products
        assert resumed.converged and not resumed.partial


def test_an_interruption_before_the_first_step_is_an_interruption():
    with pytest.raises(KeyboardInterrupt):
        eigsh(Interrupted(1).op)


def problem(shift: float = 0.0, rows: int = 30) -> Problem:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    with torch.no_grad():
        net[0].bias += shift
    return Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(30, 10)[:rows], torch.randint(0, 3, (30,))[:rows]))


def test_a_finished_run_costs_nothing(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    first = eigsh(registry.build("hessian").lower(problem()), 2, which="LA", tol=1e-3, checkpoint=path)
    monkeypatch.setattr("curvalg.lowering.CurvatureOperator._apply", None)
    again = eigsh(registry.build("hessian").lower(problem()), 2, which="LA", tol=1e-3, checkpoint=path)
    assert torch.equal(first.eigenvectors, again.eigenvectors) and again.products == first.products
    assert first.method == again.method == "lanczos" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("expr", "on", "options", "message"),
    [
        ("2 * hessian", {}, {}, r'expression differs \(stored: "hessian", asked: "2\*hessian"\)'),
        ("hessian", {"shift": 1e-3}, {}, "values of parameters and buffers differs"),
        ("hessian", {"rows": 29}, {}, r"rows of the data differs \(stored: 30, asked: 29\)"),
        ("hessian", {}, {"k": 3}, r"option k differs \(stored: 2, asked: 3\)"),
        ("hessian", {}, {"which": "SA"}, r'option which differs \(stored: "LA", asked: "SA"\)'),
        ("hessian", {}, {"tol": 1e-2}, r"option tol differs \(stored: 0.001, asked: 0.01\)"),
        ("hessian", {}, {"seed": 1}, r"option seed differs \(stored: 0, asked: 1\)"),
        ("hessian", {}, {"v0": torch.ones(563)}, "option v0 differs"),
        ("hessian", {}, {"deflate": torch.ones(563)}, "option deflate differs"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_and_kept(tmp_path, expr, on, options, message):
    from curvalg import parse

    path, common = (
        tmp_path / "run.safetensors",
        {"k": 2, "which": "LA", "tol": 1e-3, "checkpoint": tmp_path / "run.safetensors"},
    )
    eigsh(registry.build("hessian").lower(problem()), **common)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        eigsh(parse(expr).lower(problem(**on)), **{**common, **options})
    assert path.read_bytes() == before


def test_arrays_in_expressions_count_by_their_contents(tmp_path):
    on = problem()

    def run(values):
        expr = registry.build("hessian") + Diagonal(values)
        return eigsh(expr.lower(on), 1, which="LA", tol=1e-3, checkpoint=tmp_path / "run.safetensors")

    first = run(torch.ones(on.size))
    assert torch.equal(run(torch.ones(on.size)).eigenvectors, first.eigenvectors)
    with pytest.raises(CheckpointError, match="arrays of the expression differ"):
        run(2 * torch.ones(on.size))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"damaged", b"foreign"])
def test_files_that_are_no_checkpoints_are_refused_and_kept(tmp_path, content):
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    if content == b"damaged":
        path.unlink()
        eigsh(A, 2, checkpoint=path, tol=1e-3)
        content = path.read_bytes()[:-100]
        path.write_bytes(content)
    if content == b"foreign":
        checkpoints.save_file({"weight": torch.ones(3)}, path)
        content = path.read_bytes()
    with pytest.raises(
        CheckpointError, match="expected a checkpoint of curvalg or no file at all, but .*run.safetensors"
    ):
        eigsh(A, 2, checkpoint=path, tol=1e-3)
    assert path.read_bytes() == content


def test_places_where_no_file_can_be(tmp_path):
    with pytest.raises(CheckpointError, match="expected a file name in an existing folder"):
        eigsh(A, checkpoint=tmp_path / "missing" / "run.safetensors")
    with pytest.raises(CheckpointError, match="is a folder; name a file in it"):
        eigsh(A, checkpoint=tmp_path)


def test_more_products_can_be_had_later(tmp_path):
    options = {"which": "LA", "block": 1, "tol": 1e-8, "checkpoint": tmp_path / "run.safetensors"}
    with pytest.raises(ConvergenceError):
        eigsh(A, 4, maxiter=20, **options)
    resumed = eigsh(A, 4, **options)
    whole = eigsh(A, 4, which="LA", block=1, tol=1e-8)
    assert torch.equal(resumed.eigenvectors, whole.eigenvectors)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    with pytest.raises(ConvergenceError):
        eigsh(A, 4, which="LA", block=1, tol=1e-8, maxiter=20, checkpoint=path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        eigsh(A, 4, which="LA", block=1, tol=1e-8, checkpoint=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_progress_counts_products(capsys):
    pairs = eigsh(A, 2, tol=1e-3, progress=True)
    assert f"{pairs.products}/" in capsys.readouterr().err


def test_writing_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    times = iter(np.arange(0.0, 1e4, 10.0))
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: float(next(times)))
    file = checkpoints.Checkpoint(tmp_path / "run.safetensors", {})  # at 0
    assert not file.due() and not file.due() and file.due()  # at 10, 20, 30

    class Nothing:
        name, options = "nothing", {}

    file.save(
        Nothing(), checkpoints.State({}, {"products": 0}), 0.0
    )  # from 40 to 50: took 10, so the next one is 200 later
    waited = next(i for i in range(100) if file.due())
    assert 10 * waited >= 180
