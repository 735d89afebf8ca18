"""How many rooms the house has, and how many of them one question leads through: ``python -m benchmarks.counts``."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import curvalg
from curvalg import Identity, Problem, inverse, registry

ROOT = Path(curvalg.__file__).parent


def modules() -> dict[str, Path]:
    """Name -> file of every module of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports: at its top, inside functions, and for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def doors() -> set[tuple[str, str]]:
    """Imports that the layers contract declares as exceptions: ``Expr.lower``, ``Expr.simplify``, types of their signatures."""
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    declared = settings["tool"]["importlinter"]["contracts"][0]["ignore_imports"]
    return {tuple(line.split(" -> ")) for line in declared}


def in_cycles(known: dict[str, Path], without: Collection[tuple[str, str]] = ()) -> int:
    """How many modules import themselves through others."""
    places = {name: i for i, name in enumerate(known)}
    pairs = {(a, b) for a, path in known.items() for b in imports(a, path, known) if a != b}
    arrows = {(places[a], places[b]) for a, b in pairs - set(without)}
    rows, columns = np.array(sorted(arrows)).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(known), len(known)))
    _, labels = connected_components(graph, directed=True, connection="strong")
    return sum(size for size in Counter(labels.tolist()).values() if size > 1)


def twice(names: list[str]) -> list[str]:
    """Names that stand for two things."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def entered(run: Callable[[], Any]) -> int:
    """How many files of the package a call enters."""
    files = set()

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            files.add(frame.f_code.co_filename)

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(files)


def walks() -> dict[str, int]:
    """Files that products and inverses enter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    problem = Problem(model, torch.nn.CrossEntropyLoss(), (torch.randn(8, 4).double(), torch.randint(0, 3, (8,))))
    v = torch.ones(problem.size).double()
    hessian, ggn, kfac = (registry.build(name) for name in ("hessian", "ggn", "kfac"))
    op = hessian.lower(problem)
    found = {"Hessian product, first": entered(lambda: op @ v), "Hessian product, kept": entered(lambda: op @ v)}
    found["KFAC, lowered and multiplied once"] = entered(lambda: kfac.lower(problem) @ v)
    solver = inverse(ggn + Identity)
    found["inverse, lowered"] = entered(lambda: solver.lower(problem))
    inverted = solver.lower(problem)
    found["inverse, first product"] = entered(lambda: inverted @ v)
    return found


def main() -> None:
    """Print all counts."""
    known = modules()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()}
    classes = [node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    files = [path.stem for path in known.values() if path.stem != "__init__"]
    folders = Counter(path.parent for path in known.values() if path.stem != "__init__")
    folders.update(path.parent.parent for path in known.values() if path.stem == "__init__" and path.parent != ROOT)
    counts = {f"files entered: {name}": number for name, number in walks().items()}
    widest, entries = folders.most_common(1)[0]
    counts |= {
        f"entries of the widest folder ({widest.relative_to(ROOT.parent)})": entries,
        "modules that import themselves through others": in_cycles(known),
        "the same without the declared doors": in_cycles(known, doors()),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in known.values()),
        "files": len(known),
    }
    for name, number in counts.items():
        print(f"{number:7,}  {name}")
    print(f"{len(twice(classes)):7}  names of several classes: {', '.join(twice(classes))}")
    print(f"{len(twice(files)):7}  names of several modules: {', '.join(twice(files))}")


if __name__ == "__main__":
    main()
