"""Batches of graphs: a graph is a sample, whatever batch it comes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Problem, ProblemError, StaleError, registry
from tests.support.graphs import GraphBatch, GraphNet, graphs


class Loader:
    """Gives graphs in another order in every pass, in batches of a size; ``change`` is done to those of the second pass."""

    def __init__(self, size=2, change=lambda graph: None, shuffles=True):
        self.size, self.change, self.shuffles, self.passes = size, change, shuffles, 0

    def __iter__(self):
        self.passes += 1
        given = graphs()
        if self.passes > 1:
            self.change(given[2])
        order = torch.randperm(len(given), generator=torch.Generator().manual_seed(self.passes))
        given = [given[k] for k in order] if self.shuffles else given
        for start in range(0, len(given), self.size):
            yield GraphBatch.from_data_list(given[start : start + self.size])


def problem(data, model=None, **options):
    return Problem(model or GraphNet(), nn.CrossEntropyLoss(), data, target=lambda batch: batch.y, **options)


@pytest.fixture
def whole():
    return GraphBatch.from_data_list(graphs())


@pytest.mark.parametrize("name", ["hessian", "ggn", "covariance"])
def test_products_do_not_depend_on_batches_of_graphs(name, whole):
    model = GraphNet()
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    expected = registry.build(name).lower(problem([whole], model)) @ v
    for data in (whole, Loader(1), Loader(2), Loader(3, shuffles=False), list(Loader(2))):
        made = problem(data, model)
        assert made.num_samples == 5
        assert torch.allclose(registry.build(name).lower(made) @ v, expected, rtol=1e-10, atol=1e-12)


def test_the_hessian_is_that_of_double_backward(whole):
    model = GraphNet()
    made = problem(whole, model)
    v = torch.randn(made.size, dtype=torch.float64)
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(whole), whole.y)
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    product = torch.cat([p.flatten() for p in torch.autograd.grad(flat @ v, parameters)])
    assert torch.allclose(registry.build("hessian").lower(made) @ v, product, rtol=1e-10, atol=1e-12)


CHANGES = {
    "features": lambda graph: graph.x.mul_(2),
    "edges": lambda graph: graph.edges.copy_(graph.edges.flip(0)),
    "label": lambda graph: graph.y.copy_(1 - graph.y),
    "nodes": lambda graph: graph.x.copy_(graph.x.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_graphs_are_seen_in_any_order(change):
    made = problem(Loader(2, change))
    with pytest.raises(ProblemError, match="differ from the first pass"):
        made.value()


def test_another_order_of_graphs_is_seen_where_it_matters():
    with pytest.raises(ProblemError, match="order"):
        registry.build("ggn_mc").lower(made := problem(Loader(2))) @ torch.ones(made.size, dtype=torch.float64)


def test_a_model_may_write_into_graphs(whole):
    class Writing(GraphNet):
        def forward(self, data):
            data.x.mul_(2)
            data.edges = data.edges.flip(0)
            return super().forward(data)

    x, edges = whole.x.clone(), whole.edges.clone()
    made = problem(whole, Writing())
    assert made.value() == made.value()
    assert torch.equal(whole.x, x)
    assert torch.equal(whole.edges, edges)


def test_changed_graphs_make_operators_stale(whole):
    made = problem([whole])
    operator, v = registry.build("hessian").lower(made), torch.ones(made.size, dtype=torch.float64)
    operator @ v
    whole.x.mul_(2)
    with pytest.raises(StaleError, match="x"):
        operator @ v
    operator.refresh() @ v
    whole.x = whole.x / 2
    with pytest.raises(StaleError, match="x"):
        operator @ v


def test_graphs_move_with_their_dtype(whole):
    """Verification in double precision reads the features of graphs, as it does those of rows."""
    model = GraphNet().float()
    whole.x = whole.x.float()
    made = problem(whole, model)
    product = registry.build("hessian").lower(made) @ torch.ones(made.size)
    assert product.dtype == torch.float32
    assert whole.x.dtype == torch.float32


def test_graphs_are_counted_without_targets():
    made = Problem(GraphNet(), None, Loader(2, shuffles=False))
    assert made.num_samples == 5
    assert registry.build("jacobian").lower(made).shape == (10, made.size)


def test_a_graph_alone_has_its_nodes_as_rows():
    (graph,) = graphs(1)
    graph.labels = torch.tensor([0, 1])
    model = nn.Linear(3, 2).double()
    made = Problem(model, nn.CrossEntropyLoss(), graph, forward=lambda m, g: m(g.x), target=lambda g: g.labels)
    assert made.num_samples == 2
    expected = nn.functional.cross_entropy(model(graph.x), graph.labels).item()
    assert made.value() == pytest.approx(expected, rel=1e-12)


def test_layers_are_compared_on_the_first_graphs():
    """Layers of many graphs are checked on few of them, and these are graphs of the batch."""
    seen = []

    class Watching(GraphNet):
        def forward(self, data):
            if len(data.y) < len(many):
                seen.append((len(data.y), data.x.clone(), data.edges.clone()))
            return super().forward(data)

    many = graphs() * 8
    made = problem(GraphBatch.from_data_list(many), Watching())
    v = torch.randn(made.size, dtype=torch.float64)
    product = registry.build("covariance_diagonal").lower(made) @ v
    assert seen
    for count, x, edges in seen:
        few = GraphBatch.from_data_list(many[:count])
        assert torch.equal(x, few.x)
        assert torch.equal(edges, few.edges)
    same = problem(GraphBatch.from_data_list(graphs()), made.model.module)
    assert torch.allclose(product, registry.build("covariance_diagonal").lower(same) @ v, rtol=1e-10, atol=1e-12)
