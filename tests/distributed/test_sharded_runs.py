"""Runs whose vectors are in parts on several processes: interrupted, killed, and resumed on as many or on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support.ranks import Failed, Ranks
from tests.support.sharded_runs import (
    NAME,
    ONLY_IN_PARTS,
    QUESTIONS,
    apart,
    asked,
    asked_otherwise,
    beside_outliers,
    joined,
    of_one_process,
    often,
    resumed,
)

KEPT: dict[str, Path] = {}
"""Question -> the folder of a run on three ranks that was interrupted."""


def answers(results: list[Any]) -> list[Any]:
    assert not (failed := [r for r in results if isinstance(r, Failed)]), failed
    return results


@pytest.fixture
def stopped(ranks: Any, tmp_path_factory: Any, tmp_path: Path) -> Any:
    """name -> a folder with the files of a run on three ranks that was interrupted."""

    def found(name: str) -> Path:
        if name not in KEPT:
            folder = tmp_path_factory.mktemp("runs")
            whole, part, again = (
                joined(list(of)) for of in zip(*answers(ranks.run(3, resumed, "data", name, str(folder))), strict=True)
            )
            assert all(torch.equal(again[key], value) for key, value in whole.items()), name
            assert not all(
                torch.equal(part[key], value) if part[key].shape == value.shape else False
                for key, value in whole.items()
            )
            KEPT[name] = folder / "stopped"
        return Path(shutil.copytree(KEPT[name], tmp_path / "files"))

    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_same_bits_on_as_many_ranks_and_the_same_numbers_on_others(ranks: Any, stopped: Any, name: str) -> None:
    folder = stopped(name)
    assert len(names(folder)) == 3
    whole = answers(ranks.run(2, asked, "parameters", name, None))
    results = answers(ranks.run(2, asked, "parameters", name, str(folder / NAME)))
    assert results[0]["exchanges"] < whole[0]["exchanges"]  # it went on
    found = joined(results)
    assert apart(found, joined(whole)) < 1e-8
    if name not in ONLY_IN_PARTS:
        assert apart(found, joined([answers(ranks.run(2, of_one_process, name))[0]])) < 1e-8
    assert (
        names(folder) == ["run.rank-1-of-2.a.safetensors", NAME] or names(folder)[0] == "run.rank-1-of-2.b.safetensors"
    )


@pytest.mark.parametrize("name", ["diagonal", "xdiag", "minres"])
@pytest.mark.parametrize(("kind", "world"), [("both", 4), ("tensor", 2), ("data", 2)])
def test_other_ways_to_cut_the_model(
    ranks: Any, stopped: Any, tmp_path: Path, name: str, kind: str, world: int
) -> None:
    folder = stopped(name)
    whole = answers(ranks.run(world, asked, kind, name, str(tmp_path / NAME)))
    found = answers(ranks.run(world, asked, kind, name, str(folder / NAME)))
    assert found[0]["exchanges"] < whole[0]["exchanges"]
    assert apart(joined(found), joined(whole)) < 1e-8


@pytest.mark.parametrize(("kind", "world"), [("parameters", 2), ("tensor", 2), ("both", 4)])
@pytest.mark.parametrize("name", ["density", "xdiag", "cg"])
def test_the_same_bits_however_the_model_is_cut(ranks: Any, tmp_path: Path, name: str, kind: str, world: int) -> None:
    results = answers(ranks.run(world, resumed, kind, name, str(tmp_path)))
    whole, _, again = (joined(list(of)) for of in zip(*results, strict=True))
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    assert results[0][2]["exchanges"] < results[0][0]["exchanges"]
    found = answers(ranks.run(3, asked, "data", name, str(tmp_path / "stopped" / NAME)))
    assert apart(joined(found), whole) < 1e-8


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_tensor_of_a_state_that_is_a_vector_is_known_as_one(stopped: Any, name: str) -> None:
    with safe_open(stopped(name) / NAME, "pt") as file:
        shards = json.loads(file.metadata()["curvalg"])["shards"]
        local = sum(length for _, length in shards["pieces"])
        found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    axes = {key: shape.index(local) for key, shape in found.items() if local in shape}
    assert axes or name == "hutchinson"  # which keeps no vector
    assert axes == {key: axis for key, axis in shards["axes"].items() if key in found and found[key] != [0]}


# -- faults -------------------------------------------------------------------------------------------------------------


def refused(results: list[Any], message: str) -> None:
    assert all(isinstance(r, Failed) and "CheckpointError" in r.kind and message in r.message for r in results), results


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def _missing(folder: Path, part: Path) -> str:
    part.unlink()
    return f"finds no file {part} of rank 2"


def _damaged(folder: Path, part: Path) -> str:
    flipped(part)
    return "its checksum is another"


def _cut_off(folder: Path, part: Path) -> str:
    part.write_bytes(part.read_bytes()[:-50])
    return "is something else or damaged"


def _foreign(folder: Path, part: Path) -> str:
    part.write_text("of somebody else")
    return "is something else or damaged"


def _first_damaged(folder: Path, part: Path) -> str:
    flipped(folder / NAME)
    return "its checksum is another"


def _of_another_moment(folder: Path, part: Path) -> str:
    shutil.copy(part.with_name(part.name.replace("rank-2", "rank-1")), part)
    return "was written at another moment"


FAULTS = [_missing, _damaged, _cut_off, _foreign, _first_damaged, _of_another_moment]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("kind", "world"), [("data", 3), ("parameters", 2)])
def test_files_that_are_no_state_are_refused_by_all(
    ranks: Any, stopped: Any, fault: Any, kind: str, world: int
) -> None:
    folder = stopped("diagonal")
    (part,) = folder.glob("run.rank-2-of-3.*.safetensors")
    message = fault(folder, part)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    results = ranks.run(world, asked, kind, "diagonal", str(folder / NAME))
    refused(results, message)
    assert all(f"delete {folder / NAME}" in r.message or "or delete this one" in r.message for r in results)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not isinstance(ranks.run(world, asked, kind, "diagonal", None)[0], Failed)  # the group can be used


def test_the_files_of_another_run_are_refused_by_all(ranks: Any, stopped: Any, tmp_path: Path) -> None:
    folder = stopped("diagonal")
    refused(ranks.run(3, asked, "data", "xdiag", str(folder / NAME)), "is the checkpoint of another run")
    refused(ranks.run(2, asked, "data", "cg", str(folder / NAME)), "is the checkpoint of another run")
    refused(
        ranks.run(2, asked, "data", "cg", str(tmp_path / "none" / NAME)), "expected a file name in an existing folder"
    )


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("eigsh", "v0", "option v0 differs"),
        ("eigsh", "deflate", "option deflate differs"),
        ("eigsh", "weight", "values of parameters and buffers differs"),
        ("cg", "b", "option b differs"),
        ("cg", "x0", "option x0 differs"),
        ("cg", "weight", "values of parameters and buffers differs"),
    ],
)
@pytest.mark.parametrize(("kind", "world"), [("data", 3), ("parameters", 2)])
def test_other_vectors_and_weights_are_another_run(
    ranks: Any, stopped: Any, name: str, other: str, message: str, kind: str, world: int
) -> None:
    refused(ranks.run(world, asked_otherwise, kind, name, str(stopped(name) / NAME), other), message)


def test_a_density_beside_outliers_goes_on(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / NAME)
    first, again = (answers(ranks.run(3, beside_outliers, "data", path)) for _ in range(2))
    assert again[0]["exchanges"] < first[0]["exchanges"] / 2
    assert all(torch.equal(joined(again)[key], value) for key, value in joined(first).items())
    other = answers(ranks.run(2, beside_outliers, "parameters", path))
    assert other[0]["exchanges"] < first[0]["exchanges"] / 2
    assert apart(joined(other), joined(first)) < 1e-8


def test_a_rank_that_is_killed_while_it_writes_leaves_the_state_before(ranks: Any, tmp_path: Path) -> None:
    folder, pool = tmp_path / "files", Ranks(2, patience=5.0)
    folder.mkdir()
    try:
        for pipe in pool._pipes:
            pipe.send((often, 2, ("data", "density", str(folder / NAME), "killed", 5)))
        assert pool._pipes[0].poll(60)
        found = pool._pipes[0].recv()
        assert isinstance(found, Failed) and "GroupError" in found.kind, found
    finally:
        pool.processes[1].kill()
        pool.close()
    left = [name for name in names(folder) if not name.startswith(".")]
    assert len(left) == 3, left  # of two moments
    whole = answers(ranks.run(2, asked, "data", "density", None))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    results = answers(ranks.run(2, asked, "data", "density", str(folder / NAME)))
    assert results[0]["exchanges"] < whole[0]["exchanges"]
    assert all(torch.equal(joined(results)[key], value) for key, value in joined(whole).items())
    assert len(names(folder)) == 2
    results = answers(ranks.run(3, asked, "parameters", "density", str(other / NAME)))
    assert apart(joined(results), joined(whole)) < 1e-8
    assert len(names(other)) == 3


def test_a_full_disk_of_one_rank_costs_nothing_but_the_file(ranks: Any, tmp_path: Path) -> None:
    path = str(tmp_path / NAME)
    results = answers(ranks.run(2, often, "data", "density", path, "full", 4))
    whole = answers(ranks.run(2, asked, "data", "density", None))
    assert all(torch.equal(joined(results)[key], value) for key, value in joined(whole).items())
    assert results[0]["said"] and not results[1]["said"]
    assert all(
        "rank 1: " in text and "No space left" in text and "the run goes on" in text for text in results[0]["said"]
    )
    assert len(names(tmp_path)) == 2  # of the third write
    again = answers(ranks.run(2, asked, "data", "density", path))
    assert again[0]["exchanges"] < whole[0]["exchanges"]
    assert all(torch.equal(joined(again)[key], value) for key, value in joined(whole).items())
