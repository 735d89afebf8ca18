"""Every tensor that is made from nothing names its device: ``torch.set_default_device`` must not decide where it lies."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("curvalg", "curvalg_plugins") for path in (ROOT / package).rglob("*.py"))
FACTORIES = {"torch.Generator"} | {
    f"{module}.{name}"
    for module, holder in (("torch", torch), ("torch.fft", torch.fft), ("torch.nested", torch.nested))
    for name in dir(holder)
    if callable(made := getattr(holder, name, None)) and made in _device_constructors()
}
"""By torch's own list of what its default device changes."""


def unplaced(source):
    """Lines of calls that make a tensor or a generator and leave its device to a default."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in FACTORIES
        and not any(keyword.arg == "device" and _decided(keyword.value) for keyword in node.keywords)
    ]


def _decided(device):
    return not any(isinstance(part, ast.Constant) and part.value is None for part in ast.walk(device))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_factory_call_names_its_device(path):
    assert not unplaced(path.read_text(encoding="utf-8"))


def test_the_list_has_what_is_called_here():
    expected = "randn rand randint zeros ones empty full arange eye linspace tensor as_tensor Generator"
    assert {f"torch.{name}" for name in expected.split()} <= FACTORIES


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("torch.zeros(3)", True),
        ("torch.zeros(3, device=None)", True),
        ("torch.zeros(3, device=x.device if there else None)", True),
        ("torch.zeros(3, dtype=x.dtype)", True),
        ("torch.Generator().manual_seed(0)", True),
        ("[torch.tensor(x) for x in y]", True),
        ("torch.zeros(3, device=x.device)", False),
        ("torch.zeros_like(x)", False),
        ("x.new_zeros(3)", False),
    ],
)
def test_a_planted_fault_is_found(call, found):
    assert bool(unplaced(call)) is found
