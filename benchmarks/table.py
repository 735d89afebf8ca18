"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.cases.choices import CHOSEN, regret
from benchmarks.models import MODELS
from benchmarks.questions import QUESTIONS
from benchmarks.results import Record, Results

NONE = "–"
# Cases whose questions are no products: their tables give seconds.
WHOLE = ("matrices", "solves", "spectra")
HEADLINER = "GPT"
"""The model of the README's figures."""
HEADLINES = {"hessian": "Hessian product", "ggn": "GGN product", "sum": "Hessian + GGN + covariance"}
"""Their questions, in a reader's words."""
FRESH = "curvalg fresh"


def speed(results: Results) -> str:
    """What it was measured on, products as multiples of a gradient, everything else in seconds."""
    return "\n\n".join(
        part for part in (environment(results), products(results), whole(results), memory(results)) if part
    )


def everything(results: Results) -> str:
    """All tables, one under the other."""
    parts = [speed(results), columns(results), blocks(results), choices(results), notes(results)]
    return "\n\n".join(part for part in parts if part)


def environment(results: Results) -> str:
    """One line about where the figures are from."""
    e = results.environment
    libraries = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if name not in ("torch", "curvalg"))
    commit = e["curvalg"].get("commit", "")[:10]
    version = e["curvalg"]["version"] + (f" ({commit})" if commit else "")
    return (
        f"Medians of interleaved rounds; {e['dtype']}, {e['device']}, {e['processor']}, {e['threads']} threads, Python "
        f"{e['python']}, torch {e['torch']}, curvalg {version}, {libraries or 'no peers'}."
    )


def products(results: Results) -> str:
    """Multiples of one gradient for one batch and one column: a row for each model and matrix."""
    records = [r for r in results.of("products") if r.task.batches == 1]
    labels = contestants(records)
    rows = [
        [MODELS[record.task.model].says, record.task.question, *(_times(record.ratio(label)) for label in labels)]
        for model in _models(records)
        for record in records
        if record.task.model == model
    ]
    return _table(["products, in gradients", "of", *labels], rows)


def headline(results: Results) -> str:
    """The README's block: products with one model, a number a cell, of the libraries that have one."""
    records = headliners(results)
    labels = [label for label in contestants(records) if label != FRESH]
    rows = [[HEADLINES[r.task.question], *(_times(r.ratio(label)) for label in labels)] for r in records]
    return f"{_table(['in gradients', *labels], rows)}\n\n{environment(results)}"


def headliners(results: Results) -> list[Record]:
    """The records that the README shows."""
    found = {r.task.question: r for r in results.of("products") if (r.task.model, r.task.batches) == (HEADLINER, 1)}
    return [found[question] for question in HEADLINES if question in found]


def whole(results: Results) -> str:
    """Seconds of what is more than a product."""
    records = [r for case in WHOLE for r in results.of(case) if r.values]
    return _by_question(records, lambda record, label: _seconds(record.median(label)))


def memory(results: Results) -> str:
    """Peaks in MiB."""
    records = [r for r in results.of("memory") if r.values]
    labels = ["gradient", *contestants(records)]

    def cell(record: Record, label: str) -> str:
        peak = record.median(label)
        return NONE if peak is None else f"{peak / 2**20:.0f}"

    rows = [[f"{r.task.question}, {r.task.model}", *(cell(r, label) for label in labels)] for r in records]
    return _table(["peak memory of a first product, MiB", *labels], rows)


def columns(results: Results) -> str:
    """Multiples of one gradient a column."""
    records = [r for r in results.of("columns") if r.values]

    def cell(record: Record, label: str) -> str:
        ratio = record.ratio(label)
        return _times(None if ratio is None else ratio / record.task.columns)

    labels = contestants(records)
    rows = [
        [f"{r.task.question}, {r.task.model}, K = {r.task.columns}", *(cell(r, label) for label in labels)]
        for r in records
    ]
    return _table(["gradients a column", *labels], rows)


def blocks(results: Results) -> str:
    """Multiples of the full product."""
    records = [r for r in results.of("blocks") if r.values]
    labels = [label for label in contestants(records) if label != "full"]
    rows = [
        [f"{r.task.question}, {r.task.model}", *(_times(r.ratio(label, "full")) for label in labels)] for r in records
    ]
    return _table(["blocks, multiples of a full product", *labels], rows)


def choices(results: Results) -> str:
    """Chosen over best."""
    rows = []
    for record in results.of("choices"):
        forced = {label: record.median(label) for label in record.values if label not in (CHOSEN, "gradient")}
        known = {label: median for label, median in forced.items() if median is not None}
        if known and (off := regret(record)) is not None:
            task = record.task
            best = min(known, key=lambda label: known[label])
            rows.append([f"{task.question}, {task.model}, K = {task.columns}", f"{off:.2f}", best])
    return _table(["", "chosen / best", "best"], rows)


def notes(results: Results) -> str:
    """Answers that do not agree, and who is missing."""
    lines = dict.fromkeys(f"- {task}: {check.verdict}: {check.note}" for task, _, check in results.notes())
    return "\n".join([*lines, *(f"- {why}" for why in results.missing.values())])


def contestants(records: Iterable[Record]) -> list[str]:
    """In the order of their first appearance, the gradient left out."""
    return [
        label for label in dict.fromkeys(label for record in records for label in record.values) if label != "gradient"
    ]


def _models(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.task.model for record in records))


def _by_question(records: Sequence[Record], cell: Callable[[Record, str], str]) -> str:
    labels = contestants(records)
    rows = [
        [f"{QUESTIONS[r.task.question].says}; {r.task.model}", *(cell(r, label) for label in labels)] for r in records
    ]
    return _table(["seconds", *labels], rows)


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _seconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds:.3f}" if seconds < 0.1 else f"{seconds:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
