"""What is saved is loaded as it was: the same expressions, products to the bit, results; anything else is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from curvalg import (
    Block,
    CheckpointError,
    CurvalgWarning,
    Diagonal,
    Eigenbasis,
    ExpressionError,
    Identity,
    Kronecker,
    LowRank,
    MatrixTerm,
    OptionError,
    Problem,
    block_diagonal,
    diagonal_part,
    estimate,
    inverse,
    load,
    nystrom,
    parse,
    registry,
    restrict,
    save,
    sqrt,
)

build = registry.build


def problem_of(seed=0, *, rows=9, dtype=torch.float32, width=4):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).to(dtype)
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(rows, 3, dtype=dtype), torch.randint(2, (rows,))))


def array_expressions():
    torch.manual_seed(1)
    symmetric = torch.randn(3, 3)
    symmetric = symmetric @ symmetric.T
    q = torch.linalg.qr(torch.randn(3, 3))[0]
    return {
        "diagonal": Diagonal(torch.rand(26)),
        "numpy": Diagonal(np.arange(26.0)) / 3,
        "several arrays": 2 * Diagonal(torch.rand(26)) + Diagonal(torch.rand(26)) / 7 + Fraction(1, 3) * Identity,
        "low rank": inverse(LowRank(torch.randn(26, 3), symmetric) + Identity),
        "low rank of two sides": LowRank(torch.randn(26, 3), torch.rand(3), torch.randn(26, 3)),
        "eigenbases": block_diagonal(
            [
                Block(("0.weight",), Eigenbasis(Kronecker(torch.eye(4), q), torch.rand(12))),
                Block(("2.bias", "0.bias"), Eigenbasis(torch.eye(6), torch.rand(6))),
            ]
        ),
        "ordered stacks": restrict(
            block_diagonal({"0.weight": Kronecker(torch.rand(2, 2, 2), torch.rand(2, 3, 3), order=torch.randperm(12))}),
            "0.weight",
        ),
    }


def bound_expressions(problem):
    terms = {
        "kfac": build("kfac"),
        "inverse of kfac": inverse(build("kfac") + 0.1 * Identity),
        "ekfac": build("ekfac") + 0.1 * Identity,
        "diagonal": sqrt(build("ggn_diagonal") + Identity),
        "low rank": nystrom(build("ggn"), 3) + Identity,
        "blocks": inverse(block_diagonal(build("ggn"), by="module") + Identity),
        "restricted": restrict(build("kfac"), "2.*") + Identity,
        "preconditioned": inverse(
            diagonal_part(build("hessian")) + Identity, solver="cg", preconditioner=build("kfac") + Identity
        ),
    }
    return {name: expr.bound(problem) for name, expr in terms.items()}


@pytest.mark.parametrize("name", array_expressions())
def test_expressions_of_arrays(name, tmp_path):
    expr = array_expressions()[name]
    save(expr, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded == expr
    assert str(loaded) == str(expr)
    on = problem_of()
    assert torch.equal(loaded.lower(on).to_dense(), expr.lower(on).to_dense())


@pytest.mark.parametrize("name", bound_expressions(problem_of()))
def test_bound_expressions_give_the_same_bits(name, tmp_path):
    problem = problem_of()
    expr = bound_expressions(problem)[name]
    save(expr, tmp_path / "a.safetensors", problem=problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "a.safetensors", problem)
    assert loaded == expr
    op = expr.lower(problem)
    x = torch.randn(op.shape[1])
    assert torch.equal(loaded.lower(problem) @ x, op @ x)


@pytest.mark.parametrize(
    "text", ["hessian", "inverse(ggn_mc(samples=3, seed=7) + 0.1*identity)", "kfac(joint=False) / 3"]
)
def test_expressions_without_arrays(text, tmp_path):
    save(parse(text), tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors") == parse(text)


FRESH = """
import sys, torch
from curvalg import Problem, load
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
problem = Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(9, 3), torch.randint(2, (9,))))
import warnings; warnings.simplefilter("error")
op = load(sys.argv[1], problem).lower(problem)
torch.save(op @ torch.linspace(-1, 1, 26), sys.argv[2])
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    problem = problem_of()
    expr = inverse(build("ekfac") + 0.01 * Identity).bound(problem)
    save(expr, tmp_path / "a.safetensors")
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "a.safetensors", tmp_path / "x.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "x.pt"), expr.lower(problem) @ torch.linspace(-1, 1, 26))


def test_an_operator_is_written_as_its_arrays(tmp_path):
    problem = problem_of()
    op = (build("kfac") + Identity).lower(problem)
    save(op, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", problem)
    x = torch.randn(26)
    assert torch.equal(loaded.lower(problem) @ x, op @ x)


def test_results(tmp_path):
    problem = problem_of(dtype=torch.float64)
    op = (build("ggn") + Identity).lower(problem)
    solved = inverse(build("ggn") + Identity, solver="cg").lower(problem).solve(problem.gradient())
    for result in (
        estimate.eigsh(op, 3),
        estimate.trace(op),
        estimate.spectral_density(op, probes=2, steps=5),
        estimate.diagonal(op),
        estimate.gradient_noise(problem),
        solved,
    ):
        save(result, tmp_path / "r.safetensors", problem=problem)
        loaded = load(tmp_path / "r.safetensors", problem)
        assert type(loaded) is type(result)
        for entry in dataclasses.fields(result):
            left, right = getattr(result, entry.name), getattr(loaded, entry.name)
            if isinstance(left, torch.Tensor):
                assert torch.equal(left, right)
            elif dataclasses.is_dataclass(left):
                assert torch.equal(left.nodes, right.nodes)
                assert torch.equal(left.coarse[1], right.coarse[1])
            elif entry.name == "layout" and left is not None:
                assert (left.names, left.shapes, left.dtypes) == (right.names, right.shapes, right.dtypes)
            else:
                assert left == right or (left != left and right != right)


@pytest.mark.parametrize("options", [{}, {"topk": 2}, {"by": "layer"}, {"query_rank": 1}])
def test_scores(options, tmp_path):
    problem = problem_of()
    op = inverse(build("kfac") + 0.1 * Identity).lower(problem)
    queries = problem.with_data((torch.randn(4, 3), torch.randint(2, (4,))))
    found = estimate.influence(op, queries, **options)
    save(found, tmp_path / "s.safetensors", problem=problem)
    loaded = load(tmp_path / "s.safetensors", problem)
    assert type(loaded) is type(found)
    assert repr(loaded) == repr(found)
    if "query_rank" in options:
        assert torch.equal(loaded.error.bound(), found.error.bound())
    save(scored := estimate.saliency(op, "module"), tmp_path / "s.safetensors")
    assert torch.equal(load(tmp_path / "s.safetensors").value, scored.value)


def warning_of(path, problem):
    with pytest.warns(CurvalgWarning) as caught:
        load(path, problem)
    return str(caught[0].message)


def test_what_differs_is_named(tmp_path):
    save(build("kfac").bound(problem_of()), path := tmp_path / "a.safetensors")
    moved = problem_of()
    with torch.no_grad():
        moved.model.given[0].weight.add_(1)
    moved.refresh()
    assert "values of parameters" in (message := warning_of(path, moved))
    assert "data" not in message
    assert "contents of the data" in warning_of(path, problem_of(rows=8))
    message = warning_of(path, problem_of(width=5))
    assert "0.weight" in message
    assert "2.bias" not in message.split(";")[0]


def test_other_versions_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0")
    problem = problem_of()
    save(build("kfac").bound(problem), path := tmp_path / "a.safetensors")
    monkeypatch.undo()
    assert "version of torch" in warning_of(path, problem)


def test_results_without_a_problem_are_not_compared(tmp_path):
    save(estimate.trace(build("ggn").lower(problem_of())), path := tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, problem_of(1))


def test_large_objects_take_several_files(tmp_path):
    problem = problem_of()
    expr = build("kfac").bound(problem)
    path = tmp_path / "a.safetensors"
    save(expr, path, max_file_bytes=100)
    assert len(files := sorted(tmp_path.glob("*.safetensors"))) > 1
    assert load(path) == expr
    save(build("ekfac").bound(problem), path, max_file_bytes=100)  # the files of the old one are gone
    assert load(path) != expr
    assert not (set(files) - {path}) & set(tmp_path.glob("*.safetensors"))
    others = [file for file in tmp_path.glob("*.safetensors") if file != path]
    others[0].unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, inside):
    expr = build("kfac").bound(problem_of())
    save(expr, path := tmp_path / "a.safetensors")

    def fail(*_):
        raise OSError("no space left")

    with inside.within(save_file=fail), pytest.raises(CheckpointError, match="no space left"):
        save(build("ekfac").bound(problem_of()), path)
    assert load(path) == expr


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no file"):
        load(path)
    save(build("kfac").bound(problem_of()), path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="damaged"):
            load(path)
    middle = len(whole) - 20
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(CheckpointError, match="checksum"):
        load(path)
    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="something else"):
        load(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="something else"):
        load(path)


def test_a_changed_header_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save(build("kfac").bound(problem_of()), path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    header = json.loads(metadata["curvalg"])
    header["object"]["text"] = "2*" + header["object"]["text"]
    save_file(load_file(path), path, {**metadata, "curvalg": json.dumps(header)})
    with pytest.raises(CheckpointError, match="checksum"):
        load(path)


def test_checkpoints_of_runs_are_no_such_files(tmp_path):
    problem = problem_of(dtype=torch.float64)
    path = tmp_path / "run.safetensors"
    estimate.trace(build("hessian").lower(problem), products=12, method="hutchinson", checkpoint=path)
    assert path.exists()
    with pytest.raises(CheckpointError, match=r"curvalg\.save"):
        load(path)


@dataclasses.dataclass(frozen=True)
class Unregistered(MatrixTerm):
    def accumulate(self, batch, prepared=None):
        return torch.ones(())

    def finish(self, stats, layout, prepared=None):
        return Diagonal(torch.ones(layout.size))


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    with pytest.raises(ExpressionError, match="bound"):
        save(Unregistered() + Identity, tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match=r"torch\.save"):
        save(torch.ones(3), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    bound = (Unregistered() + Identity).bound(problem_of())
    save(bound, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors") == bound


def test_pickles_say_what_they_do_not_hold():
    op = build("kfac").lower(problem_of())
    pickle.dumps(op)  # nothing was computed yet
    op @ torch.ones(26)
    with pytest.warns(CurvalgWarning, match=r"curvalg\.save"):
        pickle.dumps(op)


def test_transposed_arrays_keep_their_order_in_memory(tmp_path):
    wide = torch.randn(300, 26)
    leaf = LowRank(wide.T)
    save(leaf, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").left.stride() == leaf.left.stride() == (1, 26)
