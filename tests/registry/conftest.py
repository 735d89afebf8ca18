"""Real plugins: distributions written to disk and found by the import system, nothing mocked."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from curvalg.registry import Registry
from tests.support.fake_plugins import Install


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(distribution, {term: "module:attribute"}, {module: source})`` writes and puts on the path."""
    known = set(sys.modules)

    def write(
        distribution: str,
        terms: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        version: str = "1.2.3",
        metadata: str | None = None,
        entry_points: str | None = None,
    ) -> None:
        site = tmp_path / f"site{len(list(tmp_path.iterdir()))}"
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        header = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(header if metadata is None else metadata)
        lines = "\n".join(f"{name} = {value}" for name, value in terms.items())
        (info / "entry_points.txt").write_text(f"[curvalg.terms]\n{lines}\n" if entry_points is None else entry_points)
        for name, source in (modules or {}).items():
            (site / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(site))

    yield write
    for name in set(sys.modules) - known:
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and origin.startswith(str(tmp_path)):
            del sys.modules[name]
