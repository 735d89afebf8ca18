"""The script for devices runs on a CPU and on the simulated device, goes on where it was, and says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from curvalg_docs import benchmarks
from typer.testing import CliRunner

from benchmarks.device import parts, place
from benchmarks.device.command import app
from benchmarks.device.file import DeviceResults
from benchmarks.device.parts import PARTS, agreement, graphs, table, waits
from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step

ROOT = Path(__file__).parents[1]


class Planted:
    """A part whose steps are counted; the second one is wrong while ``wrong`` is set."""

    __doc__ = "Planted."

    def __init__(self):
        self.made, self.wrong = [], False

    def steps(self, place):
        for number in range(3):
            yield Step(f"step {number}", lambda number=number: self.make(number))

    def make(self, number):
        self.made.append(number)
        return Outcome({"number": number}, ["planted"] if self.wrong and number == 1 else [])


@pytest.fixture
def planted(monkeypatch):
    part = Planted()
    monkeypatch.setitem(PARTS, "planted", part)
    return part


@pytest.fixture
def call(tmp_path):
    """Options -> (exit code, what was printed); the results are in ``run.json``."""

    def run(*options):
        done = CliRunner().invoke(app, ["--device", "cpu", "--json", str(tmp_path / "run.json"), *options])
        return done.exit_code, done.output

    return run


def known(tmp_path):
    return DeviceResults.load(tmp_path / "run.json").parts


def test_two_parts_run_on_a_cpu_and_are_kept(call, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "MODELS", ("tiny",))
    monkeypatch.setattr(agreement, "MODES", {"fresh": {"cache": 0}})
    monkeypatch.setattr(agreement, "terms", lambda: ["hessian", "ggn", "kfac"])
    code, said = call("--part", "agreement", "--part", "waits")
    assert code == 0, said
    assert "PASS agreement" in said
    assert "a CPU waits for nobody" in said
    assert all(part.complete for part in known(tmp_path).values())
    monkeypatch.setattr(agreement, "compared", pytest.fail)  # is not asked again
    assert call("--part", "agreement", "--part", "waits")[0] == 0
    printed = CliRunner().invoke(app, ["table", str(tmp_path / "run.json")]).stdout
    assert "## agreement: The numbers of the device" in printed
    assert "| products, fresh | tiny | 3 | 0 |" in printed


def test_a_cut_run_goes_on_with_what_is_missing(call, planted, tmp_path):
    assert call("--part", "planted", "--minutes", "0")[0] == 0
    assert not known(tmp_path)["planted"].complete
    assert planted.made == []
    assert call("--part", "planted")[0] == 0
    results = DeviceResults.load(tmp_path / "run.json")
    del results.parts["planted"].steps["step 2"]
    results.parts["planted"].complete = False
    results.save(tmp_path / "run.json")
    assert call("--part", "planted")[0] == 0
    assert planted.made == [0, 1, 2, 2]
    call("--part", "planted", "--again")
    assert planted.made == [0, 1, 2, 2, 0, 1, 2]


def test_what_another_version_left_unfinished_is_begun_again(call, planted, tmp_path):
    call("--part", "planted")
    results = DeviceResults.load(tmp_path / "run.json")
    results.parts["planted"].made_with["torch"] = "1.0"
    results.save(tmp_path / "run.json")
    assert "another version" in call("--part", "planted")[1]
    assert len(planted.made) == 3
    results.parts["planted"].complete = False
    results.save(tmp_path / "run.json")
    call("--part", "planted")
    assert len(planted.made) == 6


def test_what_is_wrong_is_reported_and_made_again(call, planted):
    planted.wrong = True
    code, said = call("--part", "planted")
    assert code == 1
    assert "FAIL planted: step 1: planted" in said
    assert call("--part", "planted")[0] == 1
    planted.wrong = False
    assert call("--part", "planted")[0] == 0
    assert planted.made == [0, 1, 2, 1, 1]


def test_an_error_costs_one_step(call, planted, monkeypatch):
    def broken(number):
        if number == 0:
            raise RuntimeError("first line\nlast line")
        return Outcome({"value": float("inf")})

    monkeypatch.setattr(planted, "make", broken)
    code, said = call("--part", "planted")
    assert code == 1
    assert "FAIL planted: step 0: RuntimeError: first line … last line" in said
    assert "PASS planted: 2 of 3 steps" in said


def test_a_wrong_number_of_the_device_is_seen(monkeypatch):
    asked = iter([torch.ones(3).double(), torch.ones(3).double() + 1e-6])
    outcome = agreement.compared(Place("cpu"), "planted", "tiny", {"ask": lambda problem: next(asked)}, {})
    assert outcome.failures == ["ask is off by 1.0e-06; 1e-09 is allowed"]


def test_graphs_are_skipped_where_problems_take_none(monkeypatch):
    monkeypatch.setattr(graphs, "capturing", lambda: False)
    assert "graphs=" in graphs._raced(Place("cpu"), "tiny", "ggn").skipped


def test_rows_of_the_table_say_who_is_left_out(monkeypatch):
    monkeypatch.setattr(table, "models", lambda place: ("tiny",))
    step = next(table.steps(Place("cpu")))
    outcome = step.run()
    assert outcome.cells["question"] == "hessian"
    assert outcome.cells["gradient, ms"] > 0
    assert {"curvalg", "curvalg fresh", "curvlinops"} <= set(outcome.cells)
    assert not outcome.failures


def test_every_part_says_what_it_is_and_names_its_steps_once():
    for name, part in PARTS.items():
        assert parts.says(name).endswith((".", "wait."))
        for where in (Place("cpu"), Place("cuda", simulated=True), Place("cuda")):
            names = [step.name for step in part.steps(where)]
            assert len(set(names)) == len(names) > 0, name


def test_all_solvers_and_estimators_are_asked():
    from curvalg import estimate
    from curvalg.expr import SOLVERS

    assert {name.split(",")[0] for name in agreement.solvers()} == set(SOLVERS) - {"auto"}
    functions = {name for name in estimate.__all__ if name[0].islower()} - {"heat_map"}
    assert {name.split(",")[0] for name in agreement.estimators()} == functions


def test_files_are_named_after_the_device_and_others_are_left_alone(call, tmp_path, monkeypatch):
    monkeypatch.setattr(Place, "name", "NVIDIA H200")
    assert Place("cuda").slug == "nvidia-h200"
    monkeypatch.setattr(Place, "name", "Intel(R) Xeon(R) CPU @ 2.20GHz")
    assert Place("cpu").slug == "intel-xeon-cpu"
    (tmp_path / "run.json").write_text('{"schema": 1, "records": []}')
    code, said = call("--part", "waits")
    assert code == 2
    assert "not a file of" in said


def test_unknown_parts_and_devices_are_refused(call):
    assert call("--part", "nonsense")[0] == 2
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            place.find("cuda")


def test_the_documentation_shows_files_of_devices(call, tmp_path, monkeypatch):
    call("--part", "waits")
    asked = []
    monkeypatch.setattr(benchmarks, "_suite", lambda *asking, **options: asked.append((asking, options)) or "## waits")
    (tmp_path / "results").mkdir()
    (tmp_path / "run.json").rename(tmp_path / "results" / "a-gpu.json")
    assert benchmarks.tables(tmp_path, tmp_path / "pictures") == "## a-gpu\n\n### waits"
    (((_, command, path), options),) = asked
    assert (command, path.stem, options) == ("table", "a-gpu", {"module": "benchmarks.device"})
    assert benchmarks.of_device(path)
    assert not benchmarks.of_device(ROOT / "benchmarks" / "results" / "cpu.json")


def test_the_simulated_device_runs_a_part(tmp_path):
    file = tmp_path / "run.json"
    options = ["--simulated", "--part", "agreement", "--minutes", "0.1", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.device", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "is built for real ones" in done.stderr:
        pytest.skip("this build of torch is for real devices")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS agreement" in done.stdout
    assert json.loads(file.read_text())["environment"]["device"] == "simulated"


def test_waits_are_counted_for_everything_that_is_allowed():
    from benchmarks.device.allowed import WAITS
    from benchmarks.device.workloads import given

    assert set(waits.questions(given("tiny"))) == set(WAITS)


def test_more_waits_than_allowed_are_a_failure(monkeypatch):
    monkeypatch.setattr(waits, "questions", lambda there: {"inverse(kfac)": lambda: lambda length: length // 5})
    monkeypatch.setattr(waits, "_by_watching", lambda run: (7 * run() // 2 + 3, run(), ["7 somewhere"]))
    monkeypatch.setattr(waits, "given", lambda *_, **__: SimpleNamespace(to=lambda *_: None))
    monkeypatch.setattr(Place, "wait", lambda self: None)
    outcome = waits._counted(Place("cuda", simulated=True), "inverse(kfac)")
    assert outcome.failures == ["3.50 waits each, 1 allowed"]
    assert outcome.notes == ["7 somewhere"]
