"""Classes that curvalg makes and its users are given: their pages show what they offer, and not how they are constructed."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MADE = frozenset(
    {
        "Batch",
        "Block",
        "CurvatureOperator",
        "Density",
        "DiagonalEstimate",
        "DiagonalPart",
        "Eigenpairs",
        "Eigh",
        "Entries",
        "Estimate",
        "FactorPairs",
        "FunctionProduct",
        "GradientField",
        "GradientNoise",
        "InfluenceScores",
        "LayerRecord",
        "Layout",
        "MatrixBlock",
        "MemoryPlan",
        "Nystrom",
        "Option",
        "Posterior",
        "Prediction",
        "RankError",
        "Ranking",
        "Result",
        "RunPlan",
        "Saliency",
        "ScoreBatch",
        "SingularTriplets",
        "SquareRoot",
        "TermSpec",
        "TrafficPlan",
    }
)
"""Their names. No page constructs one, which a test looks after."""

_SECTION = re.compile(r"^(Args|Attributes):$")


def fields(text: list[str], cls: type) -> list[str]:
    """A docstring whose arguments are attributes where the class keeps them under the same name, and are left out elsewhere."""
    kept = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    result: list[str] = []
    section = ""  # the heading of the section that a line lies in
    shown = True  # whether the argument that a line belongs to is an attribute
    for line in text:
        if found := _SECTION.match(line):
            section, shown = found[1], False
            if section == "Attributes" or kept:
                result.append("Attributes:")
            continue
        if line and not line.startswith(" "):
            section, shown = "", True
        elif section == "Args" and re.match(r" {4}\S", line):
            shown = line.partition(":")[0].strip() in kept
        elif section == "Attributes" or not line:
            shown = True
        if shown:
            result.append(line)
    return result


def _no_signature(app: Sphinx, what: str, name: str, found: Any, *_: Any) -> tuple[str, None] | None:
    return ("", None) if what == "class" and getattr(found, "__name__", "") in MADE else None


def _no_arguments(app: Sphinx, what: str, name: str, found: Any, options: Any, text: list[str]) -> None:
    if what == "class" and found.__name__ in MADE:
        text[:] = fields(text, found)


def setup(app: Sphinx) -> None:
    """Before napoleon (priority 500), which makes markup of sections."""
    app.connect("autodoc-process-signature", _no_signature)
    app.connect("autodoc-process-docstring", _no_arguments, priority=300)
