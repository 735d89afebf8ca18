"""The pictures of ``--plot``: how large the eigenvalues are, and on which parameters their eigenvectors lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from curvalg.cli.written.operator_layout import layout_of
from curvalg.cli.written.places import require_writable
from curvalg.errors import CurvalgError, ProblemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

    from curvalg.estimate import Density, Eigenpairs
    from curvalg.lowering import CurvatureOperator

_INK, _GREY, _ACCENT = "#0b3c5d", "#8a8f98", "#c8553d"
_MAX_ROWS = 24
_MAX_NUMBERED = 12


def check_path(path: Path) -> None:
    """Raise, before anything is computed, for a picture that could not be written.

    Raises:
        ProblemError: an unknown suffix, or a place where no file can be made.
        CurvalgError: matplotlib is not installed.
    """
    backend = _matplotlib()
    known = sorted(backend.get_supported_filetypes())
    if path.suffix.lower().lstrip(".") not in known:
        raise ProblemError(f"a picture ends in one of {', '.join(known)}, got {str(path)!r}; write {path.stem}.png")
    require_writable(path, "the picture", "--plot")


def check_page(path: Path) -> None:
    """Raise, before anything is computed, for a page with pictures that could not be written.

    Raises:
        ProblemError: another suffix, or a place where no file can be made.
        CurvalgError: matplotlib is not installed.
    """
    _matplotlib()
    if path.suffix.lower() not in (".html", ".htm"):
        raise ProblemError(f"a report is a page, which ends in .html, got {str(path)!r}; write {path.stem}.html")
    require_writable(path, "the report", "--out")


def _matplotlib() -> type[FigureCanvasBase]:
    """What knows the formats of pictures.

    Raises:
        CurvalgError: matplotlib is not installed.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise CurvalgError(f'a picture needs matplotlib ({error}); install it: pip install "curvalg[plot]"') from error
    return FigureCanvasBase


def draw_pairs(op: CurvatureOperator, pairs: Eigenpairs, problem: str, which: str) -> Figure:
    """The figure: eigenvalues on the left; on the right, where each eigenvector has its weight.

    Args:
        op: the operator.
        pairs: its eigenpairs.
        problem: the name of the problem.
        which: the end of the spectrum they are from.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, and no window system is asked for
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    values, vectors = (t.flip(-1).cpu().numpy() for t in (pairs.eigenvalues, pairs.eigenvectors))  # descending
    names, weights = tensor_weights(op, vectors)
    rows = max(len(names), 1)
    size = (11.5, min(9.0, max(4.4, 1.8 + 0.34 * rows)))
    margins = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04)
    figure = Figure(figsize=size, dpi=150, layout=margins)
    if names:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
        _draw_weights(right, names, weights)
    else:
        left = figure.subplots()
    _draw_values(left, values, outliers=_outliers(op, which, len(values)))
    text = f"{_math(op)} on {problem}: {op.shape[0]:,} × {op.shape[1]:,}"
    figure.suptitle(text, x=0.012, ha="left", fontsize=14, color=_INK)
    return figure


def draw_density(op: CurvatureOperator, density: Density, problem: str) -> Figure:
    """The figure of ``curvalg density --plot``.

    Args:
        op: the operator.
        density: its spectral density.
        problem: the name of the problem.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    axes = density.plot(figure.subplots())
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{_math(op)} on {problem}: {op.shape[0]:,} × {op.shape[1]:,}", x=0.02, ha="left", fontsize=13, color=_INK
    )
    return figure


def tensor_weights(op: CurvatureOperator, vectors: NDArray[np.floating]) -> tuple[list[str], NDArray[np.floating]]:
    """Per parameter tensor, the squared norm of each eigenvector on it; columns add to 1.

    Beyond a readable number of tensors, the lightest are summed into one row.

    Returns:
        names and an array (names, k); empty for an operator on outputs.
    """
    layout = layout_of(op)
    if layout is None:
        return [], np.zeros((0, vectors.shape[1]))
    names = layout.names
    weights = np.stack([np.square(vectors[layout.slices[name]]).sum(0) for name in names])
    if len(names) <= _MAX_ROWS:
        return names, weights
    heaviest = np.argsort(-weights.sum(1), kind="stable")
    kept, rest = np.sort(heaviest[: _MAX_ROWS - 1]), heaviest[_MAX_ROWS - 1 :]
    return [*(names[i] for i in kept), f"{len(rest)} others"], np.vstack([weights[kept], weights[rest].sum(0)])


def _outliers(op: CurvatureOperator, which: str, k: int) -> int | None:
    """The number C − 1 of eigenvalues that classification is known to set apart; None where it says nothing here."""
    facts = op.problem.facts
    if facts is None or not facts.classes or which not in ("LA", "LM") or op.expr.domain == "outputs":
        return None
    from curvalg import registry

    outputs = registry.build("loss_hessian").lower(op.problem).shape[0]
    classes = outputs // op.problem.totals.rows
    return classes - 1 if 1 < classes <= k else None


def _draw_values(axes: Axes, values: NDArray[np.floating], outliers: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    number = np.arange(1, len(values) + 1)
    positive = bool(values.min() > 0)
    base = 0.0
    if positive and values.max() > 5 * values.min():
        base = _log_axis(axes, float(values.min()), float(values.max()))
    else:
        axes.axhline(0, color=_GREY, linewidth=0.8)
    bulk = number > (len(number) if outliers is None else outliers)
    for chosen, color in ((~bulk & (values >= 0), _INK), (bulk | (values < 0), _ACCENT)):
        axes.vlines(
            number[chosen], base, values[chosen], color=color, linewidth=2.6 if len(number) <= 20 else 1.6, alpha=0.4
        )
        axes.plot(number[chosen], values[chosen], "o", color=color, markersize=7 if len(number) <= 20 else 4.5)
    if outliers is not None and bulk.any():
        axes.axvline(outliers + 0.5, color=_ACCENT, linewidth=1.2, linestyle=(0, (4, 3)))
        # On the side with more room, a few points away from the line.
        side, away = ("right", -5) if outliers > len(number) / 2 else ("left", 5)
        text = axes.annotate(
            f"C − 1 = {outliers}", (outliers + 0.5, 0.97), (away, 0), axes.get_xaxis_transform(), "offset points"
        )
        text.set(ha=side, va="top", color=_ACCENT, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_xlim(0.4, len(values) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.set_xlabel("eigenvalue number")
    axes.set_title("Eigenvalues", loc="left", fontsize=11)
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _log_axis(axes: Axes, lowest: float, highest: float) -> float:
    """A logarithmic axis with some room at both ends; returns where it starts."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    room = float((highest / lowest) ** 0.12)
    axes.set_yscale("log")
    axes.set_ylim(lowest / room, highest * room)
    if highest < 100 * lowest and 1e-3 < lowest < highest < 1e4:  # few powers of ten: plain numbers between them
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return lowest / room


def _draw_weights(axes: Axes, names: Sequence[str], weights: NDArray[np.floating]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # One hue, from light to dark: reads the same in grey and with every kind of colour vision.
    shades = LinearSegmentedColormap.from_list("curvalg", ["#eef2f5", "#9dbcd0", "#3f7ea6", _INK])
    rows, columns = weights.shape
    extent = (0.5, columns + 0.5, rows - 0.5, -0.5)
    image = axes.imshow(weights, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    for edge in range(1, columns):
        axes.axvline(edge + 0.5, color="white", linewidth=1.5)
    for edge in range(1, rows):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    if rows <= _MAX_NUMBERED and columns <= _MAX_NUMBERED:
        for row, column in np.ndindex(rows, columns):
            share = float(weights[row, column])
            color = "white" if share > 0.5 else "#20242a"
            axes.text(column + 1, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=color)
    axes.set_yticks(range(rows), [_short(name) for name in names], parse_math=False, fontsize=9 if rows <= 16 else 8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("eigenvector number")
    axes.set_title("Where the eigenvectors live", loc="left", fontsize=11)
    bar = axes.figure.colorbar(
        image, ax=axes, format=PercentFormatter(1, decimals=0), pad=0.02, aspect=max(20, 1.6 * rows)
    )
    bar.set_label("share of squared norm")
    bar.outline.set_visible(False)


def _short(name: str, longest: int = 36) -> str:
    """A name that fits beside the axis: the middle gives way, since both ends distinguish tensors."""
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half].rstrip('.')}…{name[-half:].lstrip('.')}"


def _math(op: CurvatureOperator) -> str:
    """The expression as mathematics where matplotlib can set it, else as text."""
    from matplotlib.mathtext import MathTextParser

    formula = op.expr._repr_latex_().replace(r"\tfrac", r"\frac")
    try:
        MathTextParser("path").parse(formula)
    except (ValueError, RuntimeError):
        formula = str(op.expr).replace("$", r"\$")
    return formula if len(formula) <= 120 else f"{_short(str(op.expr), 80)}".replace("$", r"\$")
