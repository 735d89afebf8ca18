"""The plugin template is a distribution of its own: built, installed, used, tested and uninstalled, without a network."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "gallery" / "plugin_template"
ROOT = Path(__file__).parents[2]
PLUGIN = "curvalg-jacobian-gram"
OFFLINE = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
BROKEN = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "curvalg-broken"
version = "3.1"

[project.entry-points."curvalg.terms"]
broken_term = "curvalg_broken:Term"

[tool.setuptools]
py-modules = ["curvalg_broken"]
""",
    "curvalg_broken.py": "import a_module_that_nobody_has\n",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


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


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a fresh virtual environment that sees what this one has installed."""
    folder = tmp_path_factory.mktemp("plugin")
    venv.create(folder / "env", with_pip=False)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = folder / "env" / scripts / "python"
    asked = _run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder)
    # addsitedir, not a path: it also reads the .pth files there, by which an editable curvalg is found.
    lines = [f"import site; site.addsitedir({place!r})" for place in site.getsitepackages()]
    (Path(asked.stdout.strip()) / "test_environment.pth").write_text("\n".join(lines), encoding="utf-8")
    return python


@pytest.fixture
def python(environment: Path, tmp_path: Path) -> Run:
    """``python("-m", ...)`` in an empty folder."""
    return lambda *arguments: _run(environment, *arguments, cwd=tmp_path)


def _wheel(source: Path, folder: Path) -> Path:
    _pip("wheel", "--no-build-isolation", *OFFLINE, "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Iterator[Callable[[Path], Callable[[], None]]]:
    """``installed(source)`` builds a wheel of a copy, installs it, and returns what uninstalls it."""
    names: list[str] = []

    def install(source: Path) -> Callable[[], None]:
        copy = tmp_path / source.name / "source"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        wheel = _wheel(copy, tmp_path / source.name)
        _pip("--python", environment, "install", *OFFLINE, wheel, cwd=tmp_path)
        names.append(wheel.name.partition("-")[0].replace("_", "-"))
        return lambda name=names[-1]: uninstall(name)

    def uninstall(name: str) -> None:
        _pip("--python", environment, "uninstall", "--quiet", "--yes", name, cwd=tmp_path)
        names.remove(name)

    yield install
    if names:
        _pip("--python", environment, "uninstall", "--quiet", "--yes", *names, cwd=tmp_path)


def test_the_template_is_short():
    code = [line for path in TEMPLATE.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(code) < 60
    assert len((TEMPLATE / "README.md").read_text(encoding="utf-8").splitlines()) <= 10


def test_a_plugin_comes_and_goes(python, installed, tmp_path):
    uninstall = installed(TEMPLATE)
    shown = python("-m", "curvalg.cli", "terms", "jacobian_gram")
    assert shown.returncode == 0, shown.stderr
    for part in ("jacobian_gram(scale: float = 1.0)", "Gram matrix", "curvalg-jacobian-gram 0.1.0"):
        assert part in shown.stdout

    shutil.copytree(TEMPLATE / "tests", tmp_path / "tests")
    tested = python("-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "tests")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert " passed" in tested.stdout

    uninstall()
    gone = python("-m", "curvalg.cli", "terms", "jacobian_gram")
    assert gone.returncode != 0
    assert "no term is called 'jacobian_gram'" in gone.stderr


def test_a_broken_plugin_breaks_its_own_name_alone(python, installed, tmp_path):
    source = tmp_path / "broken"
    source.mkdir()
    for name, text in BROKEN.items():
        (source / name).write_text(text, encoding="utf-8")
    installed(source)
    installed(TEMPLATE)

    failed = python("-m", "curvalg.cli", "terms", "broken_term")
    assert failed.returncode != 0
    for part in ("curvalg-broken 3.1", "ModuleNotFoundError", "a_module_that_nobody_has"):
        assert part in failed.stderr
    assert "Traceback" not in failed.stderr

    listed = python("-m", "curvalg.cli", "terms")
    assert listed.returncode == 0, listed.stderr
    for part in ("jacobian_gram", "hessian", "broken_term"):
        assert part in listed.stdout
