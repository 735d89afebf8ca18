"""How many products are still to come, by which a race is started only where it can pay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Expected:
    """What solvers and estimators announce of the products that they will take.

    An announcement is an upper bound, since a solve may converge before; without one, as many products are expected as were
    made: who has multiplied ten times is likely to do so ten times more, and who announces two will not.
    """

    def __init__(self) -> None:
        self._announced: list[int] = []

    @contextmanager
    def at_most(self, products: int) -> Iterator[None]:
        """Announce so many products (columns) inside of the context; of nested announcements the largest counts."""
        self._announced.append(products)
        try:
            yield
        finally:
            self._announced.remove(products)

    @property
    def announced(self) -> int:
        """The products that are announced; 0: nothing is said about them."""
        return max(self._announced, default=0)

    def coming(self, made: int) -> int:
        """The products that a choice made now will serve.

        Args:
            made: products until now.
        """
        return min(made, self.announced) if self._announced else made
