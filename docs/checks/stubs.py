"""What editors complete: ``python docs/checks/stubs.py`` writes the signatures of ``registry.build`` for curvalg's terms."""

from __future__ import annotations

from pathlib import Path

from curvalg import registry

STUB = Path(__file__).parents[2] / "curvalg" / "registry" / "default.pyi"
WIDEST = 120
HEAD = '''"""The signatures of ``build`` for the terms that curvalg brings; written by ``python docs/checks/stubs.py``."""

from typing import Any, Literal, overload

from curvalg.expr.node import Expr
from curvalg.registry.registry import Registry

default: Registry

'''
LAST = """@overload
def build(name: str, /, **options: Any) -> Expr: ...
"""


def stub() -> str:
    """The text of the file."""
    return HEAD + "".join(_overload(name) for name in registry.names() if _ours(name)) + LAST


def _ours(name: str) -> bool:
    return registry.spec(name).distribution == "curvalg"


def _overload(name: str) -> str:
    options = [f"{option.name}: {option.annotation} = ..." for option in registry.spec(name).options]
    given = [f"name: Literal[{name!r}]", "/", *(["*", *options] if options else [])]
    short = f"def build({', '.join(given)}) -> Expr: ..."
    if len(short) > WIDEST:
        short = "def build(\n" + "".join(f"    {argument},\n" for argument in given) + ") -> Expr: ..."
    return f"@overload\n{short}\n".replace("'", '"')


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
