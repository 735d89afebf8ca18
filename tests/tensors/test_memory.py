"""How much memory is free, in a container too."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import torch

from curvalg.tensors import free_memory

CPU = torch.device("cpu")


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    machine = 123_456
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=machine))
    assert free_memory(CPU, tmp_path) == machine  # no such files
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert free_memory(CPU, tmp_path) == machine
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory(CPU, tmp_path) == 700
    (tmp_path / "memory.max").write_text("100\n")
    assert free_memory(CPU, tmp_path) == 0


def test_an_older_container(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000")
    assert free_memory(CPU, tmp_path) == 4000
