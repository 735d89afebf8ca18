"""What other problems of a model measured: the same choices hold where nothing that decides them differs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary


class Remembered:
    """The choices that were measured on one model in one set of circumstances; nothing before :meth:`recall`.

    They live as long as the model, which they do not keep alive, and hold names, numbers and words alone.
    """

    _models: ClassVar[WeakKeyDictionary[Any, dict[Hashable, dict[str, Any]]]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._choices: dict[str, Any] = {}

    def recall(self, model: object, circumstances: Hashable) -> None:
        """Take what was measured before, and share what will be.

        Args:
            model: the user's object, compared by identity or its own equality.
            circumstances: all else that choices depend on: options, device, dtypes, sizes of the data.
        """
        try:
            known = self._models.setdefault(model, {})
        except TypeError:  # it has no hash, or cannot be referred to weakly
            return
        self._choices = known.setdefault(circumstances, self._choices)

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, ()  # another process has measured nothing yet

    def get(self, name: str) -> Any:
        """The choice of that name, or None."""
        return self._choices.get(name)

    def put(self, name: str, choice: Any) -> None:
        """Remember a choice that was measured."""
        self._choices[name] = choice

    def forget(self, name: str) -> None:
        """Forget a choice: what made a way impossible has changed."""
        self._choices.pop(name, None)
