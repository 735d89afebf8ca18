"""The tests: their folders mirror those of the package; what several files share lies in ``support``."""

from __future__ import annotations

import pytest

# Asserts in these modules say their values, as those of the tests do. It must be said before the package is imported.
pytest.register_assert_rewrite("tests.support")
