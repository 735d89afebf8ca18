"""The option ``pytest --curvalg-terms "my_term,other(k=3)"``: checks of registered terms, without a test file.

pytest imports this module at every start wherever curvalg is installed, so it imports nothing but pytest itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from curvalg.testing.parametrize import TermCheck

OPTION = "--curvalg-terms"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("curvalg")
    group.addoption(
        OPTION,
        metavar="TERMS",
        default=None,
        help='check these terms of curvalg, such as "my_term,other(k=3)": names or expressions, separated by commas; files '
        "are then collected only if named",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(OPTION) and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    text = config.getoption(OPTION)
    for term in split(text) if text else ():
        node: Any = TermCollector.from_parent(session, name=term, nodeid=f"curvalg::{term}")
        items.extend(node.collect())


class TermCollector(pytest.Collector):
    """A collector of all checks of one term."""

    def collect(self) -> Iterator[pytest.Item]:
        from curvalg.testing.parametrize import term_checks

        for check in term_checks(self.name):
            yield CheckItem.from_parent(self, name=check.name, check=check)


class CheckItem(pytest.Item):
    """A test item for one check of one term."""

    def __init__(self, *, check: TermCheck, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check = check

    def runtest(self) -> None:
        self.check()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The message alone: the traceback leads through the kit."""
        from curvalg.errors import CurvalgError

        if isinstance(excinfo.value, CurvalgError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[str, None, str]:
        return "curvalg", None, self.nodeid


def split(text: str) -> list[str]:
    """The expressions of a list, separated by commas outside of brackets and quotes.

    >>> split("a, b(k=3, name='x,y'), 2*c")
    ['a', "b(k=3, name='x,y')", '2*c']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in "([{") - (character in ")]}") if not quote else 0
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
