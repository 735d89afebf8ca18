"""The command line under torchrun: numbers of one process, every message once, one exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import environment

pytestmark = pytest.mark.xdist_group("processes")

PROBLEMS = """
    import torch
    from torch.utils.data import TensorDataset

    from curvalg import Problem, distributed

    def model_and_data():
        draw = torch.Generator().manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        return model, TensorDataset(torch.randn(20, 4, generator=draw, dtype=torch.float64), torch.arange(20) % 3)

    def make(group=None):
        print("making", flush=True)
        model, data = model_and_data()
        return Problem(model, torch.nn.CrossEntropyLoss(), distributed.shard(data, 7, group=group), group=group)

    def alone():
        model, data = model_and_data()
        return Problem(model, torch.nn.CrossEntropyLoss(), data.tensors)

    def forgotten(group):
        return alone()

    def absent(group):
        if torch.distributed.get_rank(group) == 1:
            raise RuntimeError("no data here")
        return make(group)
"""

COMMANDS = {
    "eigs": ["eigs", "hessian", "-p", "problems:make", "--k", "3", "--tol", "1e-10", "--json", "--plot", "values.png"],
    "density": [
        "density",
        "hessian",
        "-p",
        "problems:make",
        "--probes",
        "2",
        "--steps",
        "6",
        "--json",
        "--checkpoint",
        "run.safetensors",
    ],
    "estimate": ["estimate", "trace", "hessian", "-p", "problems:make", "--json"],
    "explain": ["explain", "kfac", "-p", "problems:make"],
    "built in": [
        "estimate",
        "trace",
        "hessian",
        "-p",
        "digits",
        "--products",
        "20",
        "--json",
        "--checkpoint",
        "run.safetensors",
    ],
    "changed": [
        *(
            "eigs",
            "hessian",
            "-p",
            "problems.py:make",
            "--params",
            "0.*",
            "--dtype",
            "float32",
            "--k",
            "2",
            "--tol",
            "1e-6",
        ),
        *("--json", "--out", "pairs.npz"),
    ],
    "diagonal": ["diagonal", "ggn", "-p", "problems:make", "--json", "--out", "diagonal.safetensors"],
    "influence": [
        *("influence", "inverse(ggn + 0.1*identity)", "-p", "problems:make", "--queries", "problems:make"),
        *("--k", "2", "--json", "--out", "scores.npz"),
    ],
    "landscape": ["landscape", "-p", "problems:make", "--points", "3", "--json", "--plot", "loss.png"],
    "compare": [
        "compare",
        "ggn",
        "-p",
        "problems:make",
        "-p",
        "problems:make",
        "--k",
        "2",
        "--damping",
        "0.1",
        "--json",
    ],
    "read": ["explain", "kfac"],
    "terms": ["terms", "ggn"],
    "alone": ["eigs", "hessian", "-p", "problems:alone"],
    "forgotten": ["eigs", "hessian", "-p", "problems:forgotten"],
    "absent": ["eigs", "hessian", "-p", "problems:absent"],
    "no flag": ["eigs", "hessian", "-p", "problems:make", "--nonsense"],
    "not written": ["eigs", "hessian", "-p", "problems:make", "--plot", "nowhere/values.png"],
    "without a sign": ["estimate", "logdet", "hessian", "-p", "problems:make"],
}

DRIVER = """
    import contextlib, datetime, io, json, os, sys

    import torch

    from curvalg.cli import main

    if "RANK" in os.environ:  # once for all commands
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    found = {}
    for name, arguments in json.load(open("commands.json")).items():
        sys.argv = ["curvalg", *arguments]
        said = [io.StringIO(), io.StringIO()]
        with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
            try:
                main()
            except SystemExit as exit:
                code = exit.code
        found[name] = [code or 0, *(text.getvalue() for text in said)]
    with open(f"{os.environ.get('RANK', 'one')}.json", "w") as file:
        json.dump(found, file)
"""

Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("processes")
    (folder / "problems.py").write_text(textwrap.dedent(PROBLEMS))
    (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
    (folder / "commands.json").write_text(json.dumps(COMMANDS))
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    """What each rank and a process alone answer to each command: (code, stdout, stderr)."""
    for launcher in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], []):
        command = [sys.executable, *launcher, "driver.py"]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stderr
        if launcher:
            for written in ("values.png", "pairs.npz", "diagonal.safetensors", "scores.npz", "loss.png"):
                assert (folder / written).stat().st_size > 500, written
            (folder / "run.safetensors").unlink()
    return {who: json.loads((folder / f"{who}.json").read_text()) for who in ("0", "1", "one")}


@pytest.mark.parametrize("name", COMMANDS)
def test_all_exit_alike_and_one_speaks(answers: Answers, name: str) -> None:
    first, second = answers["0"][name], answers["1"][name]
    assert first[0] == second[0]
    assert second[1:] == ["", ""]


@pytest.mark.parametrize(
    ("name", "numbers"), [("eigs", "eigenvalues"), ("density", "density"), ("estimate", "value"), ("built in", "value")]
)
def test_numbers_are_those_of_one_process(answers: Answers, name: str, numbers: str) -> None:
    shared, alone = answers["0"][name], answers["one"][name]
    assert shared[0] == alone[0] == 0, shared[2]
    got, expected = (json.loads(text[text.index("{") :])[numbers] for text in (shared[1], alone[1]))
    assert got == pytest.approx(expected, rel=1e-9 if name != "built in" else 1e-4)


def leaves(tree: Any) -> list[float]:
    """The numbers of a JSON object, in its order, but for what the clock says."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() if key != "seconds" for leaf in leaves(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in leaves(value)]
    return [float(tree)] if isinstance(tree, (int, float)) else []


@pytest.mark.parametrize("name", ["changed", "diagonal", "influence", "landscape", "compare"])
def test_all_numbers_are_those_of_one_process(answers: Answers, name: str) -> None:
    shared, alone = answers["0"][name], answers["one"][name]
    assert shared[0] == alone[0] == 0, shared[2]
    got, expected = (leaves(json.loads(text[text.index("{") :])) for text in (shared[1], alone[1]))
    assert got == pytest.approx(
        expected, rel=1e-9 if name != "changed" else 1e-4, abs=1e-9 if name != "changed" else 1e-4
    )


@pytest.mark.parametrize("name", ["explain", "read", "terms", "no flag"])
def test_what_needs_no_numbers_is_as_ever(answers: Answers, name: str) -> None:
    assert answers["0"][name][0] == answers["one"][name][0]
    assert answers["0"][name][1].splitlines()[:2] == answers["one"][name][1].splitlines()[:2]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("alone", 2, "2 processes, but it takes no group"),
        ("forgotten", 2, "2 processes, but its Problem was made without it"),
        (
            "absent",
            2,
            "rank 1 of 2 failed: ProblemError: calling problems:absent failed with RuntimeError: no data here",
        ),
        ("not written", 2, "the picture cannot be written to nowhere"),
        ("without a sign", 2, "not known to be"),
    ],
)
def test_errors_are_told_once(answers: Answers, name: str, code: int, message: str) -> None:
    found = answers["0"][name]
    assert found[0] == code
    assert found[2].count("error: ") == 1
    assert message in found[2]
    assert name not in ("alone", "forgotten") or "shard(dataset, batch_size=64, group=group), group=group)" in found[2]


def test_variables_without_torchrun_are_named(process: Any) -> None:
    done = process("eigs", "ggn", "--problem", "digits", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "RANK, MASTER_ADDR, MASTER_PORT are not set; start them with torchrun" in done.stderr


def test_the_module_is_a_program(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "curvalg", "eigs", "hessian", "-p", "problems:make", "--json"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "making" in done.stdout
