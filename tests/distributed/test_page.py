"""The pages on several processes: their scripts run under torchrun word by word, and numbers of exchanges are counted."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.rank_quantities import exchanges
from tests.support.ranks import environment, free_port

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
TEXT = (HOWTO / "processes.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+)` \| (\d) \| (\d) \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("page", ["processes.md", "sharded.md"])
def test_the_script_gives_the_numbers_of_one_process(tmp_path, monkeypatch, capsys, page):
    text = (HOWTO / page).read_text(encoding="utf-8")
    (script,) = re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "spectrum.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "spectrum.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    monkeypatch.chdir(alone)
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    with torch.random.fork_rng():
        exec(compile(script, page, "exec", dont_inherit=True), {"__name__": "spectrum"})
    got, expected = (ast.literal_eval(text.strip().splitlines()[-1]) for text in (done.stdout, capsys.readouterr().out))
    assert len(got) == 3
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("matrix", "headers", "payloads"), ROWS)
def test_numbers_of_exchanges(ranks, matrix, headers, payloads):
    for found in ranks.run(2, exchanges, matrix):
        assert found[:2] == (int(headers), int(payloads)), found


def test_the_table_is_found():
    assert len(ROWS) == 10
