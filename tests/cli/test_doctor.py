"""``curvalg doctor``: what is there, what is broken and how to mend it, and a self-test that finds wrong numbers."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata

import pytest
import torch

from curvalg import registry


def test_a_sound_installation(run) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["healthy"] is True
    assert found["versions"]["torch"] == torch.__version__ and found["optional"]["matplotlib"]
    assert found["devices"]["cpu"] == "float64"
    assert set(registry.names()) == set(found["terms"])
    assert found["terms"]["kfac"].startswith("curvalg ")
    checks = {check["what"]: check for check in found["checks"] if check["device"] == "cpu"}
    assert set(checks) == {"hessian", "ggn", "inverse"}
    assert all(check["passed"] and check["error"] < 1e-9 for check in checks.values())


def test_tables_for_people(run) -> None:
    shown = run("doctor").stdout
    for words in ("installed", "optional", "devices", "hessian on cpu", "right, relative error", "all is well"):
        assert words in shown


@pytest.mark.parametrize(
    ("name", "factor", "wrong"), [("hessian", 1 + 1e-6, ["hessian"]), ("ggn", -1, ["ggn", "inverse"])]
)
def test_wrong_numbers_are_found(run, name: str, factor: float, wrong: list[str]) -> None:
    right = registry.build(name)
    with registry.scoped():
        registry.register(name, lambda: factor * right, replace=True)
        result = run("doctor", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["healthy"] is False
    assert [check["what"] for check in found["checks"] if not check["passed"]] == wrong


def test_a_failure_is_a_finding(run) -> None:
    with registry.scoped():
        registry.register("ggn", lambda: registry.build("jacobian"), replace=True)
        result = run("doctor")
    assert result.exit_code == 1
    assert "failed: " in result.stdout and "something is wrong" in result.stdout


def test_a_package_that_is_missing_has_its_cure(run, monkeypatch) -> None:
    def version(name: str, find=metadata.version) -> str:
        if name in ("matplotlib", "scipy"):
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(metadata, "version", version)
    result = run("doctor")
    assert result.exit_code == 1, "scipy is needed"
    assert 'pip install "curvalg[plot]"' in result.stdout
    assert "missing; install curvalg again" in result.stdout


def test_a_broken_plugin_has_its_cure(process, tmp_path) -> None:
    info = tmp_path / "site" / "badplugin-2.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: badplugin\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[curvalg.terms]\nspoilt = badplugin_module:Spoilt\n")
    (tmp_path / "site" / "badplugin_module.py").write_text("import no_such_library\n")
    done = process("doctor", "--json", PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), *sys.path]))
    assert done.returncode == 0, "it breaks only itself"
    found = json.loads(done.stdout)
    assert "badplugin 2.5" in found["broken"]["spoilt"] and "pip install no_such_library" in found["broken"]["spoilt"]
    assert "spoilt" not in found["terms"] and "hessian" in found["terms"]
