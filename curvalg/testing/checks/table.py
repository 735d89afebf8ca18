"""The table of all checks. To add one, write a function of a subject (or, on_problems, of a case) and name it here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from curvalg.testing.checks import algebra, execution, identity, shared_data, statistics
from curvalg.testing.checks import data_order as data
from curvalg.testing.checks import parts as structure
from curvalg.testing.subject import Check

BASIC = "products"
"""The check without which those of numbers say nothing."""

WITHOUT_NUMBERS: Mapping[str, Check] = MappingProxyType(
    {
        "value": identity.value,
        "pickling": identity.pickling,
        "text": identity.text,
        "parsing": identity.parsing,
        "description": identity.description,
    }
)
"""Checks of the term alone."""

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        **WITHOUT_NUMBERS,
        "errors": data.errors,
        BASIC: algebra.products,
        "substance": identity.substance,
        "linearity": algebra.linearity,
        "adjoint": algebra.adjoint,
        "dense": algebra.dense,
        "facts": algebra.facts,
        "laws": algebra.laws,
        "batch_split": data.batch_split,
        "mutation": data.mutation,
        "dtypes": data.dtypes,
        "fusion": execution.fusion,
        "model_calls": execution.model_calls,
        "columns": execution.columns,
        "kept": execution.kept,
        "chunks": execution.chunks,
        "restriction": structure.restriction,
        "blocks": structure.blocks,
        "factor": structure.factor,
        "additivity": statistics.additivity,
        "finish": statistics.finish,
    }
)
"""Check name -> function."""

ON_REQUEST: Mapping[str, Check] = MappingProxyType({"processes": shared_data.processes})
"""Checks that take seconds, and so are asked for by a keyword of their name."""


def chosen(processes: bool) -> Mapping[str, Check]:
    """The checks to run, with those that are asked for."""
    return MappingProxyType({**CHECKS, **ON_REQUEST}) if processes else CHECKS
