"""The layout: files of one sitting, narrow folders, one word for one thing, and tests that look from outside."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import counts
from tests.support.inside import PLACES

ROOT = Path(__file__).parents[1]
TESTS, PACKAGE = ROOT / "tests", ROOT / "curvalg"

LONGEST = 450
"""Lines of a file."""

WIDEST = 12
"""Entries of a folder, beside its own face."""

OWN = {"device", "docs", "field", "fuzz", "models", "plugins", "support"}
"""Folders of tests that are about no package of curvalg: what they are about is their name."""

MOST_PRIVATE_IMPORTS = 14
MOST_PRIVATE_PATCHES = 14
MOST_PLACES = 54
"""Names that tests reach by :mod:`tests.support.inside`; fewer is better."""

TEST_FILES = sorted(TESTS.rglob("*.py"))
CODE_FILES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).as_posix()


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name in it) of every import of a file, wherever it stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def is_public(module: str, imported_name: str | None) -> bool:
    """Whether it is curvalg itself, the face of a package of it, or a name that the face shows."""
    if module.split(".")[0] != "curvalg" or module in ("curvalg", "curvalg.errors"):
        return True
    shown = getattr(import_module(module), "__all__", ())
    return (ROOT / module.replace(".", "/")).is_dir() and imported_name in (None, *shown)


def is_module(module: str, imported_name: str | None) -> bool:
    """Whether the name is a module or package that lies in the other one."""
    path = ROOT / module.replace(".", "/") / str(imported_name)
    return path.is_dir() or path.with_suffix(".py").is_file()


def private_imports(path: Path) -> set[str]:
    """The modules inside packages of curvalg from which a file imports."""
    found = ((module, part) for module, part in imported(path) if not is_public(module, part))
    return {f"{module}.{part}" if is_module(module, part) else module for module, part in found}


def private_patches(path: Path) -> list[int]:
    """Lines that replace an attribute of curvalg's, or of what cannot be told from it: not of another import."""
    foreign = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            foreign |= {(a.asname or a.name).split(".")[0] for a in node.names if not a.name.startswith("curvalg")}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("curvalg"):
            foreign |= {alias.asname or alias.name for alias in node.names}

    def is_foreign(target: ast.expr) -> bool:
        if isinstance(target, ast.Constant):
            return str(target.value).startswith("benchmarks.")
        root = ast.unparse(target).split(".")[0].split("(")[0]
        return root in foreign

    calls = (n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
    return [call.lineno for call in calls if call.func.attr in ("setattr", "patch") and not is_foreign(call.args[0])]


@pytest.mark.parametrize("path", [pytest.param(p, id=name(p)) for p in TEST_FILES])
def test_a_file_of_tests(path: Path) -> None:
    assert length(path) <= LONGEST, f"{name(path)} has {length(path)} lines; divide it by property"
    for module, part in imported(path):
        parts = [*module.split("."), part or ""]
        ours = parts[0] == "tests" or parts[0].startswith("test_") or "conftest" in parts
        shared = parts[:2] == ["tests", "support"]
        assert not ours or shared, f"{name(path)} imports {module}: what tests share belongs to tests.support"


def test_folders_of_tests_mirror_those_of_the_package() -> None:
    folders = {name(path.parent, TESTS) for path in TEST_FILES} - {"."}
    unknown = {f for f in folders if f.split("/")[0] not in OWN and not (PACKAGE / f).is_dir()}
    assert not unknown, f"tests/{sorted(unknown)}: no such package in curvalg"


def test_tests_look_from_outside() -> None:
    imports = {f"{name(path)}: {module}" for path in TEST_FILES for module in private_imports(path)}
    patches = [f"{name(path)}:{line}" for path in TEST_FILES for line in private_patches(path)]
    assert len(imports) <= MOST_PRIVATE_IMPORTS, "\n".join([f"{len(imports)} imports:", *sorted(imports)])
    assert len(PLACES) <= MOST_PLACES, "tests.support.inside knows too much"
    assert len(patches) <= MOST_PRIVATE_PATCHES, "\n".join([f"{len(patches)} patches:", *patches])


def test_no_file_of_the_package_is_long() -> None:
    long = {name(path, PACKAGE) for path in CODE_FILES if length(path) > LONGEST}
    assert not long, f"{sorted(long)}: more than {LONGEST} lines"


def test_no_folder_of_the_package_is_wide() -> None:
    entries: dict[str, set[str]] = defaultdict(set)
    for path in CODE_FILES:
        for part in [path, *path.parents]:
            if part.parent.is_relative_to(PACKAGE):
                entries[name(part.parent, PACKAGE)].add(part.stem)
    del entries["."]  # the root holds the floors
    wide = {folder: len(found - {"__init__"}) for folder, found in entries.items()}
    wide = {folder: count for folder, count in wide.items() if count > WIDEST}
    assert not wide, f"more than {WIDEST} entries: {wide}"


def test_no_two_modules_share_a_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in CODE_FILES:
        if path.stem == "__init__":
            homes[path.parent.name].append(name(path.parent))
        elif path.stem not in ("__main__", path.parent.name):  # a package and its own face are one
            homes[path.stem].append(name(path))
    shared = {word: places for word, places in homes.items() if len(places) > 1}
    assert not shared, f"one word for two modules: {shared}"


def test_no_two_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in CODE_FILES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name(path))
    shared = {word: places for word, places in homes.items() if len(places) > 1}
    assert not shared, f"one word for two classes: {shared}"


def test_torch_distributed_is_imported_in_one_place() -> None:
    """What crosses the border of a process does so in one package, where a fault becomes an error on all ranks."""
    users = {
        "/".join(name(path.parent).split("/")[:2])
        for path in CODE_FILES
        for module, part in imported(path)
        if f"{module}.{part}.".startswith("torch.distributed.")
    }
    assert users == {"curvalg/distributed"}


def test_modules_import_in_circles_in_the_algebra_alone() -> None:
    """Nodes make each other: sums of products, products of inverses. Nothing else needs to."""
    assert counts.in_cycles(counts.modules(), counts.doors()) <= 16


@pytest.mark.parametrize(
    ("walk", "most"),
    [("Hessian product, kept", 17), ("KFAC, lowered and multiplied once", 70), ("inverse, lowered", 57)],
)
def test_a_vector_passes_few_rooms(walk, most) -> None:
    assert counts.walks()[walk] <= most
