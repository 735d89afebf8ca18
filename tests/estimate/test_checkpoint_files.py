"""Checkpoint files: whatever happens to one, and wherever it is to lie, there is a CheckpointError or a right resume."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import LinearOperator
from torch import nn

from curvalg import CheckpointError, CurvalgWarning, Identity, Problem, inverse, registry
from curvalg.estimate import (
    diagonal,
    eigsh,
    logdet,
    matrix_function,
    norm,
    spectral_density,
    svds,
    trace,
)
from tests.support.inside import first_wins
from tests.support.nightly import NIGHTLY
from tests.support.spectra import matrix

MATRIX = matrix(torch.linspace(1, 3, 12, dtype=torch.float64)).numpy()


def operator(interrupted_at: int = 0, then=lambda: None):
    """Of the matrix; at one product it is interrupted or, if something else is to happen then, that happens."""
    count = itertools.count(1)

    def product(x):
        if next(count) == interrupted_at:
            if then is KeyboardInterrupt:
                raise KeyboardInterrupt
            then()
        return MATRIX @ x

    return LinearOperator(MATRIX.shape, matvec=product, matmat=product, dtype=float)


def _solve(op, path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    problem = Problem(net, nn.CrossEntropyLoss(), (torch.randn(9, 3).double(), torch.arange(9) % 2))
    inverted = inverse(registry.build("hessian") + Identity, solver="cg", rtol=1e-9).lower(problem)
    return inverted.solve(torch.ones(problem.size, 2).double(), checkpoint=path).x


RUNS = {
    "eigsh": lambda op, path: eigsh(op, 2, which="LA", tol=1e-3, block=1, checkpoint=path).eigenvectors,
    "svds": lambda op, path: svds(MATRIX, 1, tol=1e-2, block=1, checkpoint=path).values,
    "xtrace": lambda op, path: torch.tensor(trace(op, products=8, method="xtrace", checkpoint=path).value),
    "hutch++": lambda op, path: torch.tensor(trace(op, products=9, method="hutch++", checkpoint=path).value),
    "hutchinson": lambda op, path: torch.tensor(trace(op, products=6, method="hutchinson", checkpoint=path).value),
    "diagonal": lambda op, path: diagonal(op, products=8, method="hutchinson", checkpoint=path).value,
    "norm": lambda op, path: torch.tensor(norm(op, products=8, method="hutchinson", checkpoint=path).value),
    "logdet": lambda op, path: torch.tensor(logdet(op, products=8, checkpoint=path).value),
    "density": lambda op, path: spectral_density(op, probes=2, steps=4, checkpoint=path).nodes,
    "sqrt": lambda op, path: matrix_function(op, "sqrt", np.ones(12), steps=4, checkpoint=path).value,
    "solve": _solve,
}
"""What writes checkpoints -> a result of it, in a few products."""


@pytest.fixture(autouse=True)
def _no_clock(inside):
    """Routes are not raced, so that a run that begins anew gives the same bits."""
    inside(measure=first_wins)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "run.safetensors"


@pytest.fixture
def whole(file):
    """name -> (result, contents of its file)."""

    def made(name: str) -> tuple[torch.Tensor, bytes]:
        file.unlink(missing_ok=True)
        return torch.as_tensor(RUNS[name](operator(), file)), file.read_bytes()

    return made


def refused_or_right(name: str, file: Path, expected: torch.Tensor) -> bool:
    """Whether the file was refused; if not, what came of it must be right."""
    before = file.read_bytes()
    try:
        found = RUNS[name](operator(), file)
    except CheckpointError:
        assert file.read_bytes() == before
        return True
    assert torch.equal(torch.as_tensor(found), expected)
    return False


# -- contents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS if NIGHTLY else ["eigsh", "diagonal", "solve"])
def test_no_flipped_byte_goes_unnoticed(name, file, whole):
    expected, content = whole(name)
    assert not refused_or_right(name, file, expected)
    refused, at = 0, range(0, len(content), 1 if NIGHTLY else max(1, len(content) // 150))
    for i in at:
        for flip in (0x01, 0x20, 0xFF) if NIGHTLY else (0x01 if i % 2 else 0xFF,):
            file.write_bytes(content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :])
            refused += refused_or_right(name, file, expected)
    assert refused >= 0.9 * len(at)  # blanks in the header may change


@pytest.mark.parametrize("name", ["xtrace", "sqrt"])
def test_no_file_that_was_cut_off_or_went_on_is_taken(name, file, whole):
    expected, content = whole(name)
    for damaged in (content[:0], content[:7], content[:100], content[:-1], content + b"\0", content * 2, content[8:]):
        file.write_bytes(damaged)
        assert refused_or_right(name, file, expected)


JSON = [None, True, 0, -1, 1.5, "text", [], {}, [None], {"a": 1}]
DTYPES = [torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]


def variants(header: dict, tensors: dict[str, torch.Tensor]):
    """Header and tensors with one field of another kind, without one, and with one more."""
    for key in header:
        yield {k: v for k, v in header.items() if k != key}, tensors
        yield from (({**header, key: value}, tensors) for value in JSON)
    yield {**header, "more": 1}, tensors
    for key in header["numbers"]:
        yield {**header, "numbers": {k: v for k, v in header["numbers"].items() if k != key}}, tensors
        yield from (({**header, "numbers": {**header["numbers"], key: value}}, tensors) for value in JSON)
    yield {**header, "numbers": {**header["numbers"], "more": 1}}, tensors
    for name, t in tensors.items():
        yield header, {k: v for k, v in tensors.items() if k != name}
        yield from ((header, {**tensors, name: t.to(dtype)}) for dtype in DTYPES)
        yield from ((header, {**tensors, name: other}) for other in (t[None], t.flatten()[:-1], torch.zeros(3, 2)))
    yield header, {**tensors, "more": torch.ones(2)}


def parts(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["curvalg"]), load_file(file)


@pytest.mark.parametrize("name", RUNS)
def test_no_field_may_be_another(name, file, whole, inside):
    """With the checksum as it was, and as another writer would make it."""
    expected, _ = whole(name)
    header, tensors = parts(file)
    with safe_open(file, "pt") as opened:
        checksum = opened.metadata()["checksum"]
    given = list(variants(header, tensors))
    for changed, held in given if NIGHTLY else given[:: max(1, len(given) // 60)]:
        text = json.dumps(changed)
        save_file(held, file, {"curvalg": text, "checksum": checksum})
        refused_or_right(name, file, expected)
        save_file(held, file, {"curvalg": text, "checksum": inside["checksum"](text, held)})
        try:
            RUNS[name](operator(), file)
        except CheckpointError:
            continue
        except KeyboardInterrupt:  # nothing was done yet, says a state that counts no steps
            continue


@pytest.mark.parametrize("metadata", [None, {}, {"curvalg": "{}"}, {"curvalg": "[" * 5000}, {"curvalg": "null"}])
def test_files_of_others_are_refused(metadata, file):
    save_file({"weight": torch.ones(3)}, file, metadata)
    with pytest.raises(CheckpointError, match="expected a checkpoint of curvalg or no file at all"):
        eigsh(MATRIX, 2, checkpoint=file)


def test_an_entry_beside_ours_is_refused(file, whole, inside):
    whole("xtrace")
    header, tensors = parts(file)
    text = json.dumps(header)
    save_file(tensors, file, {"curvalg": text, "checksum": inside["checksum"](text, tensors), "more": "1"})
    with pytest.raises(CheckpointError, match="checksum"):
        RUNS["xtrace"](operator(), file)


def test_another_format_is_named(file, whole):
    whole("xtrace")
    header, tensors = parts(file)
    save_file(tensors, file, {"curvalg": json.dumps({**header, "format": 2, "version": "0.1"})})
    with pytest.raises(CheckpointError, match=r"checkpoint format 2, written by curvalg 0\.1; .* reads format 6"):
        RUNS["xtrace"](operator(), file)


# -- the place ----------------------------------------------------------------------------------------------------------


def _no_products():
    def product(_):
        raise AssertionError("work was done before the place was tried")

    return LinearOperator(MATRIX.shape, matvec=product, matmat=product, dtype=float)


def _bad_places(folder: Path) -> dict[str, Path | str]:
    os.mkfifo(folder / "pipe")
    (folder / "pointer").symlink_to(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "a file").write_text("")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    return {
        "in an existing folder": folder / "missing" / "run.safetensors",
        "existing": folder / "a file" / "run.safetensors",
        "is a folder; name a file in it": folder,
        "pipe, a device": folder / "pipe",
        "a pipe, a device": folder / "pointer",
        "pipe, a device or": folder / "socket",
        "a device": "/dev/null",
        "cannot be": folder / "loop",
        "is a folder": "",
        "written": "a\0b",
        "too long": folder / ("x" * 300),
    }


@pytest.mark.parametrize("name", [name for name in RUNS if name != "svds"])
def test_bad_places_are_refused_before_any_work(name, tmp_path, inside):
    inside(bind=_no_products)
    for message, path in _bad_places(tmp_path).items():
        with pytest.raises(CheckpointError, match=message):
            RUNS[name](_no_products(), path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where not even root may write")
def test_a_folder_without_permission():
    with pytest.raises(CheckpointError, match="expected a file that can be written"):
        eigsh(_no_products(), checkpoint="/proc/self/run.safetensors")


def test_files_that_may_not_be_read_or_written(file, monkeypatch):
    file.write_text("")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may
    with pytest.raises(CheckpointError, match="must not be read and written"):
        eigsh(_no_products(), checkpoint=file)


def test_links_are_followed(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "real.safetensors", tmp_path / "link"
    link.symlink_to(Path("far") / "real.safetensors")
    first = RUNS["eigsh"](operator(), link)  # of a file that does not exist yet
    before = target.stat().st_ino
    assert link.is_symlink() and target.is_file() and not target.is_symlink()
    assert torch.equal(RUNS["eigsh"](operator(), target), first)
    eigsh(operator(5, KeyboardInterrupt), 3, tol=1e-9, block=1, checkpoint=tmp_path / "far" / "other")
    target.write_bytes((tmp_path / "far" / "other").read_bytes())
    eigsh(operator(), 3, tol=1e-9, block=1, checkpoint=link)
    assert link.is_symlink() and target.stat().st_ino != before
    assert (
        sorted(os.listdir(tmp_path / "far")) == ["other", "real.safetensors"]
        and os.listdir(tmp_path).count("link") == 1
    )


def test_a_relative_name_is_of_the_folder_where_the_run_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    trace(operator(1, lambda: os.chdir("elsewhere")), products=6, method="hutchinson", checkpoint="run.safetensors")
    assert (tmp_path / "run.safetensors").is_file() and not os.listdir(tmp_path / "elsewhere")


# -- writes that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("svds", "solve")])
def test_a_folder_that_goes_away_costs_nothing_but_the_file(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    expected = RUNS[name](operator(), None)
    with pytest.warns(CurvalgWarning, match=r"run.safetensors could not be written .*the run goes on"):
        found = RUNS[name](operator(1, lambda: shutil.rmtree(folder)), folder / "run.safetensors")
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)) and not folder.exists()


def test_a_solve_goes_on_too(file, inside):
    expected = _solve(None, None)

    def full(*_):
        raise OSError(28, "No space left on device")

    inside(save_file=full)
    with pytest.warns(CurvalgWarning, match="No space left"):
        assert torch.equal(_solve(None, file), expected)


FULL = """
import resource, signal, sys, warnings
from pathlib import Path
import torch
from scipy.sparse.linalg import LinearOperator
from curvalg.estimate import eigsh
from curvalg.runs import checkpoint
path, A = Path(sys.argv[1]), torch.diag(torch.linspace(1, 2, 200).double()).numpy()
op = LinearOperator(A.shape, matvec=A.dot, matmat=A.dot, dtype=float)
before = path.read_bytes()
checkpoint.INTERVAL, checkpoint.OVERHEAD = 0.0, 1e9
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pairs = eigsh(op, 3, tol=1e-8, block=1, maxiter=2000, checkpoint=path)
assert pairs.converged and path.read_bytes() == before
assert caught and all("could not be written" in str(w.message) for w in caught), caught
"""


def test_a_good_file_survives_a_full_disk(file):
    """A limit on the size of files stands for it: writing breaks off in the middle."""
    A, count = torch.diag(torch.linspace(1, 2, 200).double()).numpy(), itertools.count()

    def product(x):
        if next(count) == 30:
            raise KeyboardInterrupt
        return A @ x

    op = LinearOperator(A.shape, matvec=product, matmat=product, dtype=float)
    assert eigsh(op, 3, tol=1e-8, block=1, maxiter=2000, checkpoint=file).partial
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FULL, str(file)], env=environment, check=True, timeout=120)
    assert os.listdir(file.parent) == [file.name]


# -- two writers --------------------------------------------------------------------------------------------------------


def test_two_runs_do_not_write_one_file(file):
    def second():
        with pytest.raises(CheckpointError, match=rf"held by process {os.getpid()} of .*wait for it, end it, or name"):
            RUNS["eigsh"](operator(), file)

    whole = RUNS["eigsh"](operator(), None)
    assert torch.equal(RUNS["eigsh"](operator(4, second), file), whole)
    assert os.listdir(file.parent) == [file.name]


def test_a_lock_of_a_run_that_was_killed_hinders_nobody(file):
    holding = (
        "import sys, time\nfrom curvalg.runs.run_file import RunFile\n"
        "with RunFile(sys.argv[1]).held():\n    print('held', flush=True)\n    time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(file)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            with pytest.raises(CheckpointError, match=f"held by process {process.pid}"):
                RUNS["eigsh"](operator(), file)
        finally:
            process.kill()
    assert os.listdir(file.parent) == [f".{file.name}.lock"]
    RUNS["eigsh"](operator(), file)
    assert os.listdir(file.parent) == [file.name]


def test_without_locks_another_writer_is_noticed_by_what_it_wrote(file, inside):
    def none(_):
        raise OSError(38, "Function not implemented")

    inside(lock=none)
    inside(unlock=none)
    whole = RUNS["xtrace"](operator(), None)
    with pytest.warns(CurvalgWarning, match="another program wrote to it meanwhile"):
        found = RUNS["xtrace"](operator(1, lambda: file.write_text("of somebody else")), file)
    assert torch.equal(found, whole) and file.read_text() == "of somebody else"
    assert os.listdir(file.parent) == [file.name]
