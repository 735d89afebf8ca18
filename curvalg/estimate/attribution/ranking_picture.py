"""The picture of the most harmful and the most helpful samples of a query: bars, with texts or pictures beside them."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvalg.errors import OptionError
from curvalg.estimate.result import axes

LETTERS = 60
"""Letters of a text that are shown."""
HARMFUL, HELPFUL = "#c8553d", "#0b3c5d"


def draw(ax: Any, scores: list[float], numbers: list[int], samples: Any) -> Any:
    """Draw scores as bars, one below the other, and return the matplotlib axes.

    Args:
        ax: matplotlib axes, or None.
        scores: falling.
        numbers: of their samples.
        samples: texts or pictures by these numbers, or None.
    """
    shown = None if samples is None else [_sample(samples, number) for number in numbers]
    ax = axes(ax)
    at = range(len(numbers))
    ax.barh(at, scores, color=[HARMFUL if score < 0 else HELPFUL for score in scores])
    ax.axvline(0, color="black", linewidth=0.8)
    most = 1.1 * max(map(abs, scores)) or 1.0
    ax.set_xlim(-most, most)
    ax.set_ylim(len(numbers) - 0.5, -0.5)
    labels = [f"sample {number}" for number in numbers]
    if shown is not None:
        labels = [
            f"{what}  [{n}]" if isinstance(what, str) else label
            for what, n, label in zip(shown, numbers, labels, strict=True)
        ]
        for place, score, what in zip(at, scores, shown, strict=True):
            if not isinstance(what, str):
                _put(ax, what, place, right=score < 0)
    ax.set_yticks(at, labels)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("rise of the query's loss without the sample")
    return ax


def _sample(samples: Any, number: int) -> str | np.ndarray[Any, Any]:
    """What is shown of a sample: a text in one line, or a picture as (H, W) or (H, W, C) from 0 to 1."""
    try:
        given = samples[number]
    except (LookupError, TypeError) as error:
        raise OptionError(
            f"samples gives a picture or a text by the number of a training sample, but has none for {number}: {error}"
        ) from error
    if isinstance(given, str):
        return textwrap.shorten(" ".join(given.split()).replace("$", r"\$"), LETTERS, placeholder="…")
    picture = given.detach().to("cpu", torch.float64).numpy() if isinstance(given, Tensor) else given
    if not isinstance(picture, np.ndarray) or picture.ndim not in (2, 3):
        what = f"{type(given).__name__}{f' of shape {tuple(given.shape)}' if hasattr(given, 'shape') else ''}"
        raise OptionError(
            f"samples are texts, or pictures as tensors or arrays (H, W), (C, H, W) or (H, W, C); got {what}"
        )
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        picture = np.moveaxis(picture, 0, -1)
    if picture.ndim == 3:
        if picture.shape[-1] not in (1, 3):
            raise OptionError(f"pictures have 1 or 3 channels, got one of shape {tuple(given.shape)}")
        picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    picture = picture.astype(np.float64)
    low, high = picture.min(), picture.max()
    return np.asarray((picture - low) / (high - low if high > low else 1.0))


def _put(ax: Any, picture: np.ndarray[Any, Any], place: int, *, right: bool) -> None:
    """Show a picture beside zero, on the side that the bar leaves free."""
    bounds = (0.52 if right else 0.18, place - 0.45, 0.3, 0.9)
    inset = ax.inset_axes(bounds, transform=ax.get_yaxis_transform())
    inset.imshow(picture, cmap="gray", interpolation="nearest", vmin=0, vmax=1)
    inset.set_anchor("W" if right else "E")
    inset.set(xticks=[], yticks=[])
