"""What a run ran on and with."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import curvalg
from benchmarks.peers import versions
from benchmarks.peers.base import Peer

ROOT = Path(__file__).parents[1]


def describe(peers: Sequence[Peer], device: str) -> dict[str, Any]:
    """JSON of it all."""
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "curvalg": {"version": curvalg.__version__, **commit()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "contestants": {peer.name: peer.distribution for peer in peers},
        "versions": versions(peers),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "device": gpu or device,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def processor() -> str:
    """Its model, where the system tells."""
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """Of the checkout, and whether something in it was changed; empty elsewhere."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
