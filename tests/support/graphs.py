"""Graphs with the conventions of torch_geometric's: tensors in stores, batches with the nodes of all graphs in one tensor."""

from __future__ import annotations

import copy
from collections import UserDict
from itertools import accumulate

import torch
from torch import nn


class Graph:
    """Features of nodes (k, 3), edges (2, e) between their numbers, and a label (1,)."""

    def __init__(self, **tensors):
        self._store = UserDict(tensors)  # no dict, as theirs are none

    def __getattr__(self, name):
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._store[name] = value

    def __copy__(self):
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _store=copy.copy(self._store))
        return twin

    def __iter__(self):
        return iter(self._store.items())

    @property
    def stores(self):
        return [self._store]


class GraphBatch(Graph):
    """Graphs as one, with the number of its graph for every node."""

    @classmethod
    def from_data_list(cls, graphs):
        sizes = [len(graph.x) for graph in graphs]
        starts = [0, *accumulate(sizes)]
        batch = cls(
            x=torch.cat([graph.x for graph in graphs]),
            edges=torch.cat([graph.edges + start for graph, start in zip(graphs, starts)], 1),
            y=torch.cat([graph.y for graph in graphs]),
            batch=torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor(sizes)),
        )
        batch._sizes, batch._edges = sizes, [graph.edges.shape[1] for graph in graphs]
        return batch

    @property
    def num_graphs(self):
        return len(self._sizes)

    def to_data_list(self):
        starts = [0, *accumulate(self._sizes)]
        parts = zip(self.x.split(self._sizes), self.edges.split(self._edges, 1), self.y.split(1), starts)
        return [Graph(x=x, edges=edges - start, y=y) for x, edges, y, start in parts]


class GraphNet(nn.Module):
    """Sends features along edges, and averages over the nodes of each graph."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, data):
        sent = self.hidden(data.x)
        sent = (sent + torch.zeros_like(sent).index_add(0, data.edges[1], sent[data.edges[0]])).tanh()
        count = len(data.y)
        sums = torch.zeros(count, 4, dtype=sent.dtype).index_add(0, data.batch, sent)
        return self.head(sums / torch.bincount(data.batch, minlength=count)[:, None])


def graphs(count=5, seed=0):
    """Graphs of 2, 3, … nodes."""
    draw = torch.Generator().manual_seed(seed)

    def one(nodes):
        return Graph(
            x=torch.randn(nodes, 3, generator=draw, dtype=torch.float64),
            edges=torch.randint(0, nodes, (2, 2 * nodes), generator=draw),
            y=torch.randint(0, 2, (1,), generator=draw),
        )

    return [one(nodes) for nodes in range(2, 2 + count)]
