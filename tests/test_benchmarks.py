"""The benchmark suite runs from end to end on a tiny model, compares before it times, and says who is missing or wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import peers, session
from benchmarks.app import BLOCK, app
from benchmarks.cases import CASES
from benchmarks.cases.choices import Choices, regret, ways_of
from benchmarks.checking import Check, compare
from benchmarks.effort import EFFORTS, Sizes
from benchmarks.models import MODELS
from benchmarks.peak import RESET, HostPeak, measure
from benchmarks.peers.base import Difference, Peer, answers
from benchmarks.plots import draw
from benchmarks.questions import PRODUCTS, QUESTIONS
from benchmarks.readme import block, with_block
from benchmarks.results import Record, Results, Task
from benchmarks.session import Session
from benchmarks.table import everything, headline, speed
from benchmarks.workload import build

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu.json"
TINY = dataclasses.replace(
    EFFORTS["quick"],
    models=("tiny",),
    columns=(2,),
    splits=(1, 2),
    rounds=1,
    seconds=0.0,
    minutes=5.0,
    sizes=Sizes(eigenvalues=1, probes=1, steps=3, products=6, rank=3, rtol=1e-4),
)


@pytest.fixture
def measured() -> Results:
    """Results without a run: two models, two libraries, one answer that differs and one contestant that is missing."""
    environment = {
        "curvalg": {"version": "0.1.0", "commit": "0123456789abcdef", "changed": False},
        "contestants": {"curvalg": "curvalg", "other": "other-dist"},
        "versions": {"curvalg": "0.1.0", "other-dist": "2.0"},
        "python": "3.11.0",
        "torch": "2.13.0",
        "processor": "a processor",
        "threads": 2,
        "memory": 2**34,
        "device": "cpu",
        "dtype": "float32",
        "system": "Linux x86_64",
    }
    records = []
    for model in ("MLP", "CNN"):
        for question in ("hessian", "ggn", "covariance", "sum"):
            times = {"gradient": [0.1, 0.1, 0.4], "curvalg": [0.2, 0.15, 0.3]}
            if question != "sum":
                times["other"] = [0.33]
            records.append(Record(Task("products", question, model), values=times))
        records.append(Record(Task("columns", "ggn", model, 16), values={"gradient": [0.1], "curvalg": [0.8]}))
    records.append(Record(Task("spectra", "trace ggn", "MLP"), values={"gradient": [0.1], "curvalg": [0.05]}))
    records.append(Record(Task("memory", "hessian", "GPT 64"), "byte", {"gradient": [2.0**20], "curvalg": [2.0**22]}))
    records.append(Record(Task("choices", "ggn", "MLP"), values={"auto": [2.2], "kept": [2.0], "fresh": [4.0]}))
    records[0].checks["other"] = Check(0.5, "wrong", "other is off by 50 % against an independent computation")
    return Results(environment, {"rounds": 3}, {"absent": "absent is left out: no module"}, records)


@pytest.fixture
def with_peer(monkeypatch):
    """A peer that is planted among the files of the folder."""

    def plant(*planted: type[Peer]) -> list[str]:
        classes = {peer.name: peer for peer in planted}
        load = peers.load
        monkeypatch.setattr(peers, "load", lambda name: classes[name]() if name in classes else load(name))
        return ["curvalg", *classes]

    return plant


def check_schema(read: dict) -> None:
    """What benchmarks/README.md says about the JSON."""
    assert set(read) == {"schema", "environment", "settings", "missing", "records"}
    for name in ("curvalg", "python", "torch", "versions", "processor", "threads", "memory", "device"):
        assert name in read["environment"]
    for record in read["records"]:
        assert set(record) == {"task", "unit", "values", "checks", "skipped"}
        assert set(record["task"]) == {"case", "question", "model", "columns", "batches"}
        assert record["task"]["question"] in QUESTIONS
        assert record["unit"] in ("s", "byte")
        assert all(isinstance(v, float) for values in record["values"].values() for v in values)
        for check in record["checks"].values():
            assert set(check) == {"difference", "verdict", "note"}


@pytest.mark.parametrize("case", [case for case in CASES if case != "memory"])
def test_every_case_runs_and_nobody_disagrees(case, tmp_path):
    results = session.run([case], ["tiny"], peers.names(), TINY)
    assert results.records
    for record in results.records:
        assert record.values, record
        assert not record.skipped, record.skipped
        assert record.median("gradient") > 0
        assert set(record.checks) == set(record.values) - {"gradient"}
    assert not results.failures()
    results.save(tmp_path / "run.json")
    check_schema(json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail))
    assert Results.load(tmp_path / "run.json") == results
    everything(results)


def test_memory_is_measured_in_fresh_processes():
    (record,) = session.run(["memory"], ["tiny"], ["curvalg", "backpack"], TINY).records
    assert not record.skipped, record.skipped
    assert set(record.values) == {"gradient", "curvalg"}  # BackPACK has no Hessian
    assert record.unit == "byte"


def test_a_peak_sees_what_was_held_and_forgets_it():
    gauge = HostPeak()
    gauge.reset()
    before = gauge.peak()
    held = torch.ones(2**25)  # 128 MiB: more than the allocator ever serves from memory it had
    during = gauge.peak() - before
    del held
    assert during >= 100 * 2**20
    if RESET.exists():
        gauge.reset()
        assert gauge.peak() - before < during


def test_a_peak_is_none_where_a_library_has_no_answer():
    assert measure("curvalg", "ggn", "tiny") is not None
    assert measure("backpack", "hessian", "tiny") is None


def test_the_command_line_writes_json_pictures_and_tables(tmp_path):
    file, folder = tmp_path / "run.json", tmp_path / "pictures"
    options = ["--models", "tiny", "--cases", "products", "--peers", "curvalg", "--quick", "--minutes", "0.01"]
    done = CliRunner().invoke(app, [*options, "--json", str(file), "--plots", str(folder)])
    assert done.exit_code == 0, done.output
    assert MODELS["tiny"].says in done.stdout
    check_schema(json.loads(file.read_text()))
    assert (folder / "products-hessian.png").exists()


@pytest.mark.parametrize("option", ["--models", "--cases", "--peers"])
def test_unknown_names_are_refused_with_those_that_are_known(option):
    done = CliRunner().invoke(app, [option, "nonsense"])
    assert done.exit_code == 2
    assert "known are" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    done = CliRunner().invoke(app, ["--device", "cuda"])
    assert done.exit_code == 2
    assert "no GPU" in done.output


def test_tables_and_pictures_come_from_the_file_alone(measured, tmp_path):
    file, page = tmp_path / "run.json", tmp_path / "page.md"
    measured.save(file)
    page.write_text(f"before\n<!-- {BLOCK} -->\nold\n<!-- /{BLOCK} -->\nafter\n")
    done = CliRunner().invoke(app, ["table", str(file), "--write", str(page)])
    assert done.exit_code == 0, done.output
    for question in ("hessian", "ggn", "covariance"):
        assert f"| MLP 784-512-512-10, 512 rows | {question} | 2.0 | 3.3 |" in done.stdout
    assert "| MLP 784-512-512-10, 512 rows | sum | 2.0 | – |" in done.stdout
    assert block(page.read_text(), BLOCK) == speed(measured) == done.stdout.rstrip("\n")
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    done = CliRunner().invoke(app, ["table", str(file), "--all"])
    for expected in ("| ggn, MLP, K = 1 | 1.10 | kept |", "wrong: other is off by 50 %", "absent is left out"):
        assert expected in done.stdout
    done = CliRunner().invoke(app, ["plot", str(file), "--to", str(tmp_path)])
    assert done.exit_code == 0, done.output
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {*(f"products-{question}" for question in PRODUCTS), "columns", "memory"}
    assert draw(Results(measured.environment, {}), tmp_path) == []


def test_the_readme_shows_the_committed_results():
    shown = block((ROOT / "README.md").read_text(encoding="utf-8"), BLOCK)
    assert shown == headline(Results.load(COMMITTED)), (
        "run `python -m benchmarks table ... --headline --write README.md`"
    )


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected the markers"):
        with_block("no markers", BLOCK, "table")


def test_a_file_of_another_schema_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"seconds": {}}')
    with pytest.raises(ValueError, match="measure again"):
        Results.load(tmp_path / "old.json")


def test_every_peer_is_one_file_and_answers_known_questions():
    found, _ = peers.available(peers.names())
    assert len({peer.name for peer in found}) == len(found)
    for peer in found:
        assert set(peer.methods()) <= set(QUESTIONS), peer.name
        assert {known.question for known in peer.differs} <= set(QUESTIONS)


def test_peers_that_are_not_installed_are_left_out_with_a_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyhessian", None)  # what an import of a missing module does
    monkeypatch.delitem(sys.modules, "benchmarks.peers.pyhessian", raising=False)
    results = session.run(["products"], ["tiny"], ["curvalg", "pyhessian", "no_such_peer"], TINY)
    assert set(results.missing) == {"pyhessian", "no_such_peer"}
    assert "pyhessian is left out" in results.missing["pyhessian"]
    assert "curvalg" in results.records[0].values
    assert "pyhessian is left out" in everything(results)


class Liar(Peer):
    """Twice the Hessian; what it says about the GGN it says to differ by definition; it fails at the covariance."""

    name = "liar"
    distribution = "liar"
    differs = (Difference("ggn", "is by design zero"),)

    @answers("hessian", "ggn", "covariance")
    def product(self, workload, question):
        scale = {"hessian": 2.0, "ggn": 0.0}
        run = session.available(["curvalg"])[0][0].prepare(question, workload)
        return lambda: scale[question] * run()


def test_a_peer_that_disagrees_is_reported(with_peer):
    effort = dataclasses.replace(TINY, splits=(1,))
    results = session.run(["products"], ["tiny"], with_peer(Liar), effort)
    by_question = {record.task.question: record for record in results.records}
    assert by_question["hessian"].checks["liar"].verdict == "wrong"
    assert by_question["hessian"].checks["liar"].difference == pytest.approx(1, rel=1e-3)
    assert by_question["hessian"].checks["curvalg"].verdict == "agrees"
    assert by_question["ggn"].checks["liar"].note == "liar is by design zero"
    assert "KeyError" in by_question["covariance"].skipped["liar"]
    assert not results.failures()  # a finding about a peer


def test_curvalg_being_wrong_is_a_failure(measured):
    measured.records[0].checks["curvalg"] = Check(0.5, "wrong", "curvalg is off")
    assert measured.failures() == [f"{measured.records[0].task}: curvalg is off"]
    measured.records[0].checks = {"other": Check(0.5, "disagrees", "other is away")}
    assert len(measured.failures()) == 1
    measured.records[0].checks = {}
    measured.records[0].skipped = {"other": "RuntimeError: theirs"}
    assert not measured.failures()
    measured.records[0].skipped = {"curvalg": "RuntimeError: ours"}
    assert len(measured.failures()) == 1


@pytest.mark.parametrize(("error", "records"), [(MemoryError, 8), (KeyboardInterrupt, 0)])
def test_a_task_that_breaks_is_not_the_end_of_the_run(error, records, monkeypatch):
    def broken(*arguments):
        raise error

    monkeypatch.setattr("benchmarks.cases.base.race", broken)
    results = session.run(["products"], ["tiny"], ["curvalg"], TINY)
    assert len(results.records) == records
    assert all("MemoryError" in record.skipped["all"] for record in results.records)


def test_the_referee_sees_who_is_wrong():
    truth = torch.ones(3)
    checks = compare({"curvalg": 2 * truth, "peer": truth}, 1e-3, {}, lambda: truth)
    assert [check.verdict for check in checks.values()] == ["wrong", "agrees"]
    checks = compare({"curvalg": truth, "peer": torch.full((3,), torch.nan)}, 1e-3, {}, lambda: truth)
    assert checks["peer"].verdict == "wrong"
    checks = compare({"curvalg": truth, "peer": 2 * truth}, 1e-3, {})
    assert checks["peer"].verdict == "disagrees"
    checks = compare({"curvalg": truth, "peer": 2 * truth}, 1e-3, {}, random=True)
    assert checks["peer"].verdict == "differs by chance"


def test_an_option_that_this_version_does_not_know_is_skipped(monkeypatch):
    rows = {**ways_of(1), "from the future": {"no_such_option": True}}
    monkeypatch.setattr("benchmarks.cases.choices.ways_of", lambda columns: rows)
    record = Choices().measure(Task("choices", "ggn", "tiny"), Session([], TINY))
    assert "no_such_option" in record.skipped["from the future"]
    assert regret(record) > 0


def test_what_is_not_begun_in_time_is_said():
    results = session.run(["products"], ["tiny"], ["curvalg"], dataclasses.replace(TINY, minutes=-1.0))
    assert all("not begun" in record.skipped["all"] for record in results.records)


@pytest.mark.parametrize("name", ["tiny", "small MLP"])
def test_everybody_gets_the_same_workload(name):
    first, second = (build(name, Sizes(), batches=batches) for batches in (1, 3))
    assert len(second.data) == 3
    torch.testing.assert_close(torch.cat([X for X, _ in second.data]), first.data[0][0], rtol=0, atol=0)
    torch.testing.assert_close(first.vectors, second.vectors, rtol=0, atol=0)
    for a, b in zip(first.parameters, second.parameters):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.group == "large"])
def test_large_models_can_be_built(name):
    with torch.device("meta"):
        model, (X, y) = MODELS[name].make()
        assert model(X).shape[0] == y.shape[0]
    assert 10**7 < sum(p.numel() for p in model.parameters()) < 2 * 10**8


def test_several_processes_are_compared_with_one(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("<!-- ranks -->\n\n<!-- /ranks -->\n")
    questions = ["Hessian product", "KFAC, built and multiplied once"]
    command = [sys.executable, "-m", "benchmarks.ranks", "--models", "tiny", "--batches", "3", "--rounds", "1"]
    command += ["--questions", ";".join(questions), "--json", str(file), "--write", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["question"] for row in rows] == questions
    for row in rows:
        assert row["difference"] <= 1e-5
        assert row["efficiency"] == pytest.approx(row["one"] / (2 * row["many"]))
    parameters = build("tiny", Sizes()).size
    assert [rows[0][name] for name in ("headers", "payloads", "bytes")] == [1, 1, 4 * parameters]
    assert page.read_text().count("| tiny | 3 |") == 2


def test_memory_of_a_model_in_parts(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("<!-- shards -->\n\n<!-- /shards -->\n")
    command = [sys.executable, "-m", "benchmarks.shards", "--model", "small GPT", "--processes", "2"]
    command += ["--sequences", "2", "--json", str(file), "--write", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["question"] for row in rows] == ["a gradient", "a Hessian product", "a density, 6 steps"]
    for row in rows:
        assert 2 * row["parameters"] >= row["of"]
        assert row["bytes"] > 4 * row["parameters"]
    assert page.read_text().count("| small GPT |") == 3
