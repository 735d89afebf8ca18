"""What tests of the registry put into the plugins they write to disk."""

from __future__ import annotations

from collections.abc import Callable

from curvalg.registry import Registry

Install = Callable[..., None]

TERM = """
    from dataclasses import dataclass
    from curvalg import Term

    @dataclass(frozen=True)
    class MyTerm(Term):
        '''A term of a plugin.

        More of it.
        '''
        k: int = 3
        name_of: str | None = None

        def cotangent_dot(self, batch, tangent):
            return self.k * tangent
"""


def new_failures(registry: Registry) -> dict[str, str]:
    """The failures of plugins that the test wrote, whatever else is installed."""
    ours = ("bad-dist", "good-dist", "odd 1.2.3", "metadata of a distribution")
    return {name: message for name, message in registry.failures().items() if any(part in message for part in ours)}
