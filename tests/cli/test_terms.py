"""``curvalg terms``: every term, aliases, plugins, and plugins that are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from curvalg import registry


def _plugin(folder: Path, name: str, entry: str, source: str | None) -> None:
    info = folder / f"{name}-2.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text(f"[curvalg.terms]\n{entry}\n")
    if source is not None:
        (folder / f"{name}_module.py").write_text(source)


def test_every_name_is_listed_with_options_and_origin(run) -> None:
    result = run("terms")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in registry.names())
    row = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["ggn_mc"])
    assert "samples: int = 1" in row
    assert row.rstrip().endswith("built-in")


@pytest.mark.parametrize("width", [50, 80])
def test_a_narrow_window_cuts_nothing_off(run, monkeypatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("terms").stdout.splitlines()
    assert max(map(len, lines)) <= width
    last_column = "".join(line[lines[0].index("from") :].strip() for line in lines[2:])
    assert last_column.count("built-in") >= 10


def test_an_alias_stands_with_its_term(run) -> None:
    lines = run("terms").stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["covariance"])
    assert lines[at + 1].split()[:2] == ["also", "empirical_fisher"]


def test_references_to_classes_are_shown_as_names(run) -> None:
    assert ":class:" not in run("terms").stdout


def test_one_term_is_described(run) -> None:
    assert run("terms", "ggn_mc").stdout == registry.describe("ggn_mc") + "\n"


def test_an_unknown_term_is_refused_with_a_guess(run) -> None:
    result = run("terms", "gnn")
    assert result.exit_code == 2
    assert "did you mean 'ggn'" in result.stderr


@pytest.mark.parametrize(
    ("source", "expected"),
    [("import no_such_library\n", "pip install no_such_library"), ("1 / 0\n", "division by zero")],
)
def test_a_broken_plugin_is_a_row_with_its_cure(process, tmp_path: Path, source: str, expected: str) -> None:
    _plugin(tmp_path / "site", "badplugin", "spoilt = badplugin_module:Spoilt", source)
    done = process("terms", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "spoilt" in text
    assert "badplugin 2.5" in text
    assert expected in text
    assert "hessian" in text


def test_a_plugin_names_its_distribution(process, tmp_path: Path) -> None:
    source = "from curvalg import registry\n\ndef damped(damping: float = 0.5):\n    '''A damped one.'''\n"
    _plugin(tmp_path / "site", "goodplugin", "damped = goodplugin_module:damped", source)
    done = process("terms", PYTHONPATH=str(tmp_path / "site"))
    row = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["damped"])
    assert "A damped one." in row
    assert "damping: float = 0.5" in row
    assert row.rstrip().endswith("goodplugin 2.5")
