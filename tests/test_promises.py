"""What pyproject.toml promises is what is tried: oldest versions, tools' targets, and the places that repeat the version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINNED_ALIKE = {"torch", "torchvision"}
"""Of which the oldest is not to be had as a build for CPUs alone: the version that everything runs on."""


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))


def bounds(requirements: list[str]) -> dict[str, str]:
    """Name -> lower bound, of requirements that have one."""
    found = (re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


def same_version(left: str, right: str) -> bool:
    """2.0 is 2.0.0."""
    return re.sub(r"(\.0)+$", "", left) == re.sub(r"(\.0)+$", "", right)


def test_oldest_constraints_are_the_lower_bounds(project):
    extras = project["project"]["optional-dependencies"]
    promised = bounds([*project["project"]["dependencies"], *extras["plot"], *extras["demo"]])
    tried, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    assert {*promised} - PINNED_ALIKE == {*tried} - PINNED_ALIKE
    assert not {
        n: (promised[n], tried[n]) for n in {*promised} - PINNED_ALIKE if not same_version(promised[n], tried[n])
    }
    assert {name: tried[name] for name in PINNED_ALIKE} == {name: newest[name] for name in PINNED_ALIKE}


def test_every_runtime_dependency_has_a_lower_bound(project):
    dependencies = project["project"]["dependencies"]
    assert len(bounds(dependencies)) == len(dependencies)


def test_tools_look_for_the_oldest_python(project):
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert project["tool"]["mypy"]["python_version"] == oldest


def test_what_runs_on_the_oldest_versions_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    listed = re.search(r"^OLDEST_TESTS \?= (.*)$", makefile, re.MULTILINE)[1].split()
    assert len(listed) > 5
    assert not [path for path in listed if not (ROOT / path).exists()]


def test_the_version_to_cite_is_the_version(project):
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['project']['version']}\n" in citation
