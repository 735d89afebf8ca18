"""The cases, in the order in which they run: what matters most comes first."""

from __future__ import annotations

from benchmarks.cases.attribution import Attribution
from benchmarks.cases.base import Case
from benchmarks.cases.blocks import Blocks
from benchmarks.cases.choices import Choices
from benchmarks.cases.columns import Columns
from benchmarks.cases.matrices import Matrices
from benchmarks.cases.memory import Memory
from benchmarks.cases.posteriors import Posteriors
from benchmarks.cases.products import Products
from benchmarks.cases.solves import Solves
from benchmarks.cases.spectra import Spectra

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Products(),
        Matrices(),
        Solves(),
        Spectra(),
        Attribution(),
        Posteriors(),
        Blocks(),
        Memory(),
        Columns(),
        Choices(),
    )
}
