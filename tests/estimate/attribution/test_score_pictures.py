"""Pictures of scores show the extremes of the query that is asked for."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch

from curvalg import Identity, OptionError, Problem, registry
from curvalg.estimate import influence

mpl.use("Agg")
N, Q = 12, 3


@pytest.fixture
def asked():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    problem, queries = (
        Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(n, 3).double(), torch.arange(n) % 2)) for n in (N, Q)
    )
    return (registry.build("ggn") + 0.1 * Identity).lower(problem), queries


def bars(axes):
    return np.array([bar.get_width() for bar in axes.patches])


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_bars_are_the_largest_and_the_smallest(asked):
    found = influence(*asked)
    scores, order = found.scores[1].sort(descending=True)
    axes = found.plot(query=1, count=3)
    chosen = [0, 1, 2, -3, -2, -1]
    assert np.allclose(bars(axes), scores[chosen])
    assert labels(axes) == [f"sample {n}" for n in order[chosen]]
    assert axes.get_title(loc="left") == "query 1"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the most helpful one is on top


def test_every_kind_of_scores_is_drawn_alike(asked):
    expected = bars(influence(*asked).plot(query=2, count=2))
    by_layer, extremes = influence(*asked, by="layer"), influence(*asked, topk=2)
    assert np.allclose(bars(by_layer.plot(query=2, count=2)), expected)
    assert np.allclose(bars(extremes.plot(query=2, count=2)), expected)
    assert np.allclose(bars(extremes.topk.plot(query=2)), expected)  # no more were kept


@pytest.mark.parametrize("flat", [False, True])
def test_scores_by_position_are_added_up(flat):
    """Also where layers see different numbers of positions."""
    torch.manual_seed(0)
    more = [torch.nn.Flatten(), torch.nn.Linear(10, 2)] if flat else []
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), *more).double()
    targets = torch.randn(6, 2) if flat else torch.randn(6, 5, 2)
    problem = Problem(net, torch.nn.MSELoss(), (torch.randn(6, 5, 3).double(), targets.double()))
    op = (1.0 * Identity).lower(problem)
    assert np.allclose(bars(influence(op, by="position").plot(count=2)), bars(influence(op).plot(count=2)))


def test_no_sample_is_drawn_twice(asked):
    found = influence(*asked)
    assert np.allclose(bars(found.plot(count=10)), found.scores[0].sort(descending=True).values)


def test_texts_are_labels(asked):
    texts = [f"the text  of\nsample {n}, which costs $5 and goes on {'and on ' * 20}" for n in range(N)]
    found = influence(*asked)
    axes = found.plot(count=2, samples=texts)
    first = int(found.scores[0].argmax())
    assert labels(axes)[0].startswith(rf"the text of sample {first}, which costs \$5 and goes on")
    assert labels(axes)[0].endswith(f"…  [{first}]")
    axes.figure.canvas.draw()  # a dollar begins no formula


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (3, 5, 4), (5, 4, 3), (5, 4, 1)])
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_pictures_stand_beside_their_bars(asked, shape, kind):
    found = influence(*asked)
    images = torch.randn(N, *shape, generator=torch.Generator().manual_seed(0))
    axes = found.plot(count=2, samples=images if kind == "tensor" else images.numpy())
    order = found.scores[0].argsort(descending=True)[[0, 1, -2, -1]]
    assert len(axes.child_axes) == 4
    for inset, n, width in zip(axes.child_axes, order, bars(axes), strict=True):
        shown, image = inset.images[0].get_array(), images[n].squeeze()
        image = image.movedim(0, -1) if shape == (3, 5, 4) else image
        assert np.allclose(shown, (image - image.min()) / (image.max() - image.min()), atol=1e-6)
        assert inset.get_anchor() == ("W" if width < 0 else "E")
    axes.figure.canvas.draw()


def test_what_cannot_be_drawn_is_named(asked):
    found = influence(*asked)
    for options, message in (
        ({"query": 3}, "query is a number from 0 to 2, got 3"),
        ({"query": True}, "got True"),
        ({"count": 0}, "expected count to be an integer ≥ 1"),
        ({"samples": ["a", "b"]}, "by the number of a training sample, but has none for"),
        ({"samples": torch.ones(N, 4)}, r"got Tensor of shape \(4,\)"),
        ({"samples": list(range(N))}, "got int"),
        ({"samples": torch.ones(N, 5, 4, 2)}, "1 or 3 channels"),
    ):
        with pytest.raises(OptionError, match=message):
            found.plot(**options)
