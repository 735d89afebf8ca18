"""Terms by name: built-ins, plugins found through entry points, and what the running program registers.

The functions of this module act on one default :class:`Registry`. Nothing is read or imported before it is needed:
:func:`names` reads metadata alone, and building a name imports the one plugin behind it.

>>> from curvalg import registry
>>> print(registry.build("ggn_mc", samples=4))
ggn_mc(samples=4)
"""

from __future__ import annotations

from curvalg.registry.default import build, default
from curvalg.registry.registry import Registry
from curvalg.registry.spec import SUPPORTED_API, Option, TermSpec

register = default.register
names = default.names
spec = default.spec
describe = default.describe
failures = default.failures
refresh = default.refresh
scoped = default.scoped

__all__ = [
    "SUPPORTED_API",
    "Option",
    "Registry",
    "TermSpec",
    "build",
    "default",
    "describe",
    "failures",
    "names",
    "refresh",
    "register",
    "scoped",
    "spec",
]
