"""Whether a wheel is small, complete and works where it is installed: ``make dist``."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

LARGEST = 1_000_000
"""Bytes of a wheel."""
NEEDED = ("curvalg/py.typed", "curvalg/registry/default.pyi", "curvalg_plugins/kronecker/kfac.py")
SHORT = "import time; begin = time.perf_counter(); import curvalg; print(time.perf_counter() - begin)"


def main(wheel: Path) -> int:
    """Say what is wrong with a wheel that is installed in this environment; 0 where nothing is."""
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if (size := wheel.stat().st_size) > LARGEST:
        faults.append(f"{size} bytes are more than {LARGEST}")
    faults += [f"{name} is missing" for name in NEEDED if name not in names]
    faults += [
        f"{name} does not belong into it" for name in names if name.startswith(("tests/", "docs/", "benchmarks/"))
    ]
    home = importlib.util.find_spec("curvalg")
    if home is None or "site-packages" not in str(home.origin):
        faults.append("curvalg is not the installed one")
    seconds = [float(subprocess.check_output([sys.executable, "-I", "-c", SHORT])) for _ in range(5)]
    faults += _use()
    print(
        f"{wheel.name}: {size} bytes, {len(names)} files; import curvalg takes {1e3 * statistics.median(seconds):.0f} ms"
    )
    print(*faults, sep="\n")
    return int(bool(faults))


def _use() -> list[str]:
    """What fails of a first use."""
    import torch

    from curvalg import Identity, Problem, inverse, registry

    net, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
    problem = Problem(net, torch.nn.CrossEntropyLoss(), data)
    faults = []
    if not torch.isfinite(inverse(registry.build("kfac") + Identity).lower(problem) @ problem.gradient()).all():
        faults.append("a product is not finite")
    if registry.failures():
        faults.append(f"terms that cannot be imported: {registry.failures()}")
    command = [str(Path(sys.executable).with_name("curvalg")), "terms"]
    if "kfac" not in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
        faults.append("`curvalg terms` does not list kfac")
    return faults


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
