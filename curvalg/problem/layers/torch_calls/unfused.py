"""The table of functions of torch that hold several layers, each written in functions of single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

UNFUSED: dict[Any, Callable[..., Any]] = {}
"""Function -> the same in functions of the table of layers; raises Declined for arguments that it does not cover."""

Function = Callable[..., Any]


def unfuse(*functions: Callable[..., Any]) -> Callable[[Function], Function]:
    """Let the decorated function stand for functions of torch while layers are recorded."""

    def enter(function: Function) -> Function:
        UNFUSED.update(dict.fromkeys(functions, function))
        return function

    return enter
