"""Pictures of results, drawn from their JSON alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.models import MODELS
from benchmarks.questions import PRODUCTS
from benchmarks.results import Record, Results
from benchmarks.table import FRESH, HEADLINES, contestants, headliners

if TYPE_CHECKING:  # matplotlib is an optional extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FARTHEST = 12.0
"""Gradients at which a bar is cut; its number says how long it is."""
INK = ("#0b3c5d", "#5b8fb9", "#c8553d", "#e0a458", "#8a8f98", "#6a994e", "#b39bc8")


def draw(results: Results, folder: Path) -> list[Path]:
    """All pictures that the results have data for, as PNG files.

    Args:
        results: of a run.
        folder: made if it is not there.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(results):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Name and picture: a product with each matrix, columns, memory, and the README's."""
    single = [r for r in results.of("products") if r.task.batches == 1 and r.values]
    for question in PRODUCTS:
        if found := [r for r in single if r.task.question == question]:
            yield f"products-{question}", products(found)
    if records := [r for r in headliners(results) if r.values]:
        yield (
            "headline",
            _beside(
                {HEADLINES[r.task.question]: r for r in records},
                [label for label in contestants(records) if label != FRESH],
            ),
        )
    several = [r for r in results.of("columns") if r.task.batches == 1 and r.values]
    if several:
        yield "columns", columns(single + several)
    peaks = [r for r in results.of("memory") if r.values]
    if peaks:
        yield "memory", memory(peaks)


def products(records: Sequence[Record]) -> Figure:
    """Ratios to a gradient for one matrix: a group for each model, a bar for each library."""
    return _beside({MODELS[r.task.model].says: r for r in records}, contestants(records))


def _beside(records: Mapping[str, Record], labels: Sequence[str]) -> Figure:
    """Bars that lie below each other, with their numbers, so that a narrow page shows them."""
    from matplotlib.figure import Figure

    rows = [
        (group, label, ratio)
        for group, record in records.items()
        for label in labels
        if (ratio := record.ratio(label)) is not None
    ]
    figure = Figure(figsize=(5.6, 0.22 * len(rows) + 0.3 * len(records) + 0.6), layout="constrained")
    ax, colors = figure.subplots(), dict(zip(labels, _colors(labels)))
    places, names, at = [], [], 0.0
    for i, (group, label, ratio) in enumerate(rows):
        if i == 0 or rows[i - 1][0] != group:
            ax.text(0, at + 0.9, group, fontsize=9, weight="bold")
            at += 1.6
        ax.barh(at, min(ratio, FARTHEST), 0.85, color=colors[label])
        ax.text(
            min(ratio, FARTHEST) + 0.1, at, f"{ratio:.1f}" + (" →" if ratio > FARTHEST else ""), fontsize=8, va="center"
        )
        places.append(at)
        names.append(label)
        at += 1
    ax.axvline(1, color=INK[4], lw=0.8, ls=":")
    ax.set_yticks(places, names, fontsize=8)
    ax.set(xlabel="time, in gradients", xlim=(0, min(FARTHEST, max(r for *_, r in rows)) * 1.12), ylim=(at, -0.3))
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def columns(records: Sequence[Record]) -> Figure:
    """Gradients a column against K, for the Hessian (lines) and the GGN (dashes)."""
    from matplotlib.ticker import LogLocator

    models, labels = _models(records), contestants(records)
    figure, axes = _panels(len(models))
    for ax, model in zip(axes, models):
        for label, color in zip(labels, _colors(labels)):
            for question, style in (("hessian", "o-"), ("ggn", "s--")):
                mine = [r for r in records if (r.task.model, r.task.question) == (model, question)]
                points = sorted(
                    (r.task.columns, ratio / r.task.columns) for r in mine if (ratio := r.ratio(label)) is not None
                )
                if points:
                    ks, heights = zip(*points)
                    ax.plot(ks, heights, style, color=color, label=f"{label}, {question}", ms=4)
        ax.set(title=model, xlabel="columns", ylabel="gradients a column", xscale="log", yscale="log")
        counts = sorted({r.task.columns for r in records})
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    return _with_legend(figure, axes)


def memory(records: Sequence[Record]) -> Figure:
    """Peaks in multiples of that of a gradient."""
    models, labels = _models(records), contestants(records)
    figure, axes = _panels(len(models))
    for ax, model in zip(axes, models):
        found = {r.task.question: r for r in records if r.task.model == model}
        _bars(ax, {q: {label: r.ratio(label) for label in labels} for q, r in found.items()}, labels)
        ax.axhline(1, color=INK[4], lw=0.8, ls=":")
        ax.set(title=model, ylabel="peak memory, gradients")
    return _with_legend(figure, axes)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    across = min(count, 2)
    down = -(-count // across)
    figure = Figure(figsize=(5.6, 3.0 * down + 0.9), layout="constrained")
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in every[count:]:
        empty.remove()
    return figure, every[:count]


def _bars(ax: Axes, groups: dict[str, dict[str, float | None]], labels: Sequence[str]) -> None:
    width = 0.8 / max(len(labels), 1)
    for i, (label, color) in enumerate(zip(labels, _colors(labels))):
        heights = [groups[group].get(label) for group in groups]
        known = [(at + i * width, height) for at, height in enumerate(heights) if height is not None]
        if known:
            ax.bar([at for at, _ in known], [height for _, height in known], width, color=color, label=label)
    ax.set_xticks([at + 0.4 - width / 2 for at in range(len(groups))], list(groups), fontsize=8)


def _with_legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    shown = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _colors(labels: Sequence[str]) -> list[str]:
    return [INK[i % len(INK)] for i in range(len(labels))]


def _models(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.task.model for record in records))
