"""The plugin template is a distribution of its own: built, installed, used, tested and uninstalled, without a network."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "gallery" / "plugin_template"
ROOT = Path(__file__).parents[2]
PLUGIN = "curvalg-jacobian-gram"
OFFLINE = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")


def _run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The tree under test, wherever an installed curvalg lies.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def _pip(*arguments: object, cwd: Path) -> None:
    done = _run(sys.executable, "-m", "pip", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The interpreter of a fresh virtual environment that sees what this one has installed."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    asked = _run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path)
    # addsitedir, not a path: it also reads the .pth files there, by which an editable curvalg is found.
    lines = [f"import site; site.addsitedir({place!r})" for place in site.getsitepackages()]
    (Path(asked.stdout.strip()) / "test_environment.pth").write_text("\n".join(lines), encoding="utf-8")
    return python


def _install(source: Path, python: Path, folder: Path) -> None:
    """Build a wheel of a copy, and install it into the environment of an interpreter."""
    copy = folder / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    _pip("wheel", "--no-build-isolation", *OFFLINE, "--wheel-dir", folder, copy, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    _pip("--python", python, "install", *OFFLINE, wheel, cwd=folder)


def test_the_template_is_short():
    code = [line for path in TEMPLATE.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(code) < 60
    assert len((TEMPLATE / "README.md").read_text(encoding="utf-8").splitlines()) <= 10


def test_a_plugin_comes_and_goes(environment, tmp_path):
    _install(TEMPLATE, environment, tmp_path)
    python = partial(_run, environment, cwd=tmp_path)
    shown = python("-m", "curvalg.cli", "terms", "jacobian_gram")
    assert shown.returncode == 0, shown.stderr
    for part in ("jacobian_gram(scale: float = 1.0)", "Gram matrix", "curvalg-jacobian-gram 0.1.0"):
        assert part in shown.stdout

    shutil.copytree(TEMPLATE / "tests", tmp_path / "tests")
    tested = python("-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "tests")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert " passed" in tested.stdout

    _pip("--python", environment, "uninstall", "--quiet", "--yes", PLUGIN, cwd=tmp_path)
    gone = python("-m", "curvalg.cli", "terms", "jacobian_gram")
    assert gone.returncode != 0
    assert "no term is called 'jacobian_gram'" in gone.stderr


def test_a_broken_plugin_breaks_its_own_name_alone(tmp_path):
    python = partial(_run, sys.executable, cwd=tmp_path)
    info = tmp_path / "curvalg_broken-3.1.dist-info"  # the current folder comes first on the path of python -m
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: curvalg-broken\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[curvalg.terms]\nbroken_term = curvalg_broken:Term\n")
    (tmp_path / "curvalg_broken.py").write_text("import a_module_that_nobody_has\n")

    failed = python("-m", "curvalg.cli", "terms", "broken_term")
    assert failed.returncode != 0
    for part in ("curvalg-broken 3.1", "ModuleNotFoundError", "a_module_that_nobody_has"):
        assert part in failed.stderr
    assert "Traceback" not in failed.stderr

    listed = python("-m", "curvalg.cli", "terms")
    assert listed.returncode == 0, listed.stderr
    for part in ("covariance_diagonal", "hessian", "broken_term"):
        assert part in listed.stdout
    works = python("-m", "curvalg.cli", "terms", "covariance_diagonal")
    assert works.returncode == 0, works.stderr
