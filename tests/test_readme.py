"""The README's Python blocks run, in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {"__name__": "readme"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    report = capsys.readouterr().out
    assert "0.001*identity" in report and "kept" in report
    assert names["squared"].shape == names["op"].shape


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_two_commands_are_targets(command):
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert command in README.read_text(encoding="utf-8")
    assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_it_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README.read_text(encoding="utf-8"))
    assert len(links) > 15
    assert [link for link in links if not (README.parent / link).exists()] == []
