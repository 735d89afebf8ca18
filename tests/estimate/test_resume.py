"""Interrupted and resumed runs: partial results, the same bits, and checkpoints of other runs refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.sparse.linalg import LinearOperator

from curvalg import CheckpointError, ConvergenceError, CurvalgWarning, Diagonal, Problem, registry
from curvalg.estimate import eigsh
from curvalg.runs import checkpoint as checkpoints
from tests.support.inside import first_wins, last_wins
from tests.support.spectra import SPECTRA, matrix

A = matrix(SPECTRA["clustered"]).numpy()

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from scipy.sparse.linalg import LinearOperator
from tests.support.spectra import SPECTRA, matrix
from curvalg.estimate import eigsh
from curvalg.estimate.spectra import eigenpair_search
from curvalg.runs import checkpoint
from safetensors import safe_open

checkpoint.INTERVAL, checkpoint.OVERHEAD, eigenpair_search.MOST = 0.0, 1e9, 20
A = matrix(SPECTRA["clustered"]).numpy()
folder = Path(sys.argv[1])
file = folder / "run.safetensors"

def run(pause, out, path, block="auto"):
    def product(x):
        time.sleep(pause)
        return A @ x
    op = LinearOperator(A.shape, matvec=product, matmat=product, dtype=float)
    pairs = eigsh(op, 6, which="LA", tol=1e-7, maxiter=5000, checkpoint=path, block=block)
    torch.save((pairs.eigenvalues, pairs.eigenvectors, pairs.residuals), folder / out)

def stamp():
    return file.stat().st_mtime_ns if file.exists() else None

draw = random.Random(0)
for _ in range(5):
    before = stamp()
    if not (child := os.fork()):
        run(0.01, "early.pt", file)
        os._exit(0)
    while stamp() == before:  # so that every one gets further than the one before
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended before it was killed"
assert not (folder / "early.pt").exists()
checkpoint.INTERVAL = 30.0
run(0.0, "resumed.pt", file)
with safe_open(file, "pt") as opened:
    width = json.loads(opened.metadata()["curvalg"])["numbers"]["width"]
run(0.0, "whole.pt", None, width)
"""


def test_killed_five_times_and_resumed_to_the_same_bits(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=True, timeout=300)
    resumed, whole = torch.load(tmp_path / "resumed.pt"), torch.load(tmp_path / "whole.pt")
    assert all(torch.equal(left, right) for left, right in zip(resumed, whole, strict=True))


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


def test_an_interruption_within_the_first_step_gives_no_pairs_yet():
    pairs = eigsh(Interrupted(3).op, 4, block=1)  # two products tried the symmetry
    assert pairs.partial and len(pairs) == 0 and pairs.eigenvectors.shape == (len(A), 0)


def problem(shift: float = 0.0, rows: int = 30) -> Problem:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    with torch.no_grad():
        net[0].bias += shift
    return Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(30, 10)[:rows], torch.randint(0, 3, (30,))[:rows]))


def test_a_finished_run_costs_nothing(tmp_path, inside):
    path = tmp_path / "run.safetensors"
    first = eigsh(registry.build("hessian").lower(problem()), 2, which="LA", tol=1e-3, checkpoint=path)
    inside(product=None)
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
        save_file({"weight": torch.ones(3)}, path)
        content = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"expected a checkpoint of curvalg or no file at all, but .*run.safetensors"
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

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(CurvalgWarning, match="could not be written .no space.*the run goes on"):
        pairs = eigsh(A, 4, which="LA", block=1, tol=1e-8, checkpoint=path)
    assert pairs.converged
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_progress_counts_products(capsys):
    pairs = eigsh(A, 2, tol=1e-3, progress=True)
    assert f"{pairs.products}/" in capsys.readouterr().err


def test_writing_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    times = iter(np.arange(0.0, 1e4, 10.0))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(times)))
    file = checkpoints.Checkpoint(tmp_path / "run.safetensors", {})  # at 0
    assert not file.due() and not file.due() and file.due()  # at 10, 20, 30

    class Nothing:
        name, options = "nothing", {}

    file.save(
        Nothing(), checkpoints.State({}, {"products": 0}), 0.0
    )  # from 40 to 50: took 10, so the next one is 200 later
    waited = next(i for i in range(100) if file.due())
    assert 10 * waited >= 180


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(20, 30), torch.nn.LayerNorm(30), torch.nn.GELU(), torch.nn.Linear(30, 40)
    model = torch.nn.Sequential(*layers)
    X, y = torch.randn(60, 20), torch.randint(0, 40, (60,))
    return Problem(model, torch.nn.CrossEntropyLoss(), [(X[:25], y[:25]), (X[25:], y[25:])])


@pytest.mark.parametrize(("block", "at"), [(1, 10), (1, 34), (3, 12)])
@pytest.mark.parametrize("favoured", ["first", "second"])
def test_what_was_measured_is_not_measured_again(tmp_path, inside, products, favoured, block, at):
    """Routes and columns are chosen by the clock, and change the last bits."""

    def favour(which):
        inside(measure=first_wins if which == "first" else last_wins)

    def solve(path=None):
        op = registry.build("ggn").lower(network())
        return eigsh(op, 6, which="LA", tol=1e-5, block=block, checkpoint=path)

    inside(overhead=0.0)  # what is measured in a pass that is made again
    inside(amortised=32)
    favour(favoured)
    whole = solve()
    path = tmp_path / "run.safetensors"
    favour(favoured)
    products.interrupt(at + 1)
    assert solve(path).partial
    decided = at * block > inside["amortised"]  # what was not measured yet is measured now
    favour(favoured if not decided else "second" if favoured == "first" else "first")
    resumed = solve(path)
    assert not resumed.partial and resumed.products == whole.products
    assert torch.equal(resumed.eigenvectors, whole.eigenvectors)
