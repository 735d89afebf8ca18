"""The conformance kit, which checks in one line of a test whether a term keeps the contract of terms.

>>> from curvalg.testing import check_term
>>> check_term("ggn")

Nothing is imported before it is used: pytest loads this package at every start, to offer ``--curvalg-terms``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curvalg.errors import ConformanceError as ConformanceError
    from curvalg.testing.checks.table import CHECKS as CHECKS
    from curvalg.testing.conformance import check_term as check_term
    from curvalg.testing.parametrize import parametrize_terms as parametrize_terms
    from curvalg.testing.problems import default_problems as default_problems

_HOME = {
    "CHECKS": "curvalg.testing.checks.table",
    "ConformanceError": "curvalg.errors",
    "check_term": "curvalg.testing.conformance",
    "default_problems": "curvalg.testing.problems",
    "parametrize_terms": "curvalg.testing.parametrize",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'curvalg.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
