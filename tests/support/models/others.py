"""Small models of libraries other than transformers: graphs, images, training loops, potentials."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvalg import Problem
from tests.support.models.by_hand import Real, in_double
from tests.support.models.zoo import C, classes


def graph_batches(size: int = 2) -> list:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    graphs = [
        Data(
            x=torch.randn(nodes, 3, dtype=torch.float64),
            edge_index=torch.randint(0, nodes, (2, 2 * nodes)),
            y=torch.randint(0, C, (1,)),
        )
        for nodes in (3, 5, 4, 2, 6)
    ]
    return list(GraphLoader(graphs, size))


class GraphNet(nn.Module):
    """Two kinds of graph convolutions, an average over the nodes of each graph, a linear layer."""

    def __init__(self) -> None:
        from torch_geometric.nn import GCNConv, GINConv

        super().__init__()
        self.first = GCNConv(3, 4)
        self.second = GINConv(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), train_eps=True)
        self.head = nn.Linear(4, C)

    def forward(self, data):
        from torch_geometric.nn import global_mean_pool

        hidden = self.second(self.first(data.x, data.edge_index).tanh(), data.edge_index).tanh()
        return self.head(global_mean_pool(hidden, data.batch))


def torch_geometric() -> Real:
    """A graph network on batches of graphs; a graph is a sample."""
    model, batches = in_double(GraphNet()), graph_batches()
    return Real(
        model,
        batches,
        lambda data=None, **options: Problem(
            model, nn.CrossEntropyLoss(), batches if data is None else data, target=lambda batch: batch.y, **options
        ),
        lambda batch: F.cross_entropy(model(batch), batch.y),
        model,
        lambda z, batch: classes(z, batch.y),
        lambda batch: batch.num_graphs,
    )


def rows_of(size: int, count: int) -> DataLoader:
    """Pictures and classes, two rows a batch."""
    return DataLoader(
        TensorDataset(torch.randn(count, 3, size, size).double(), torch.randint(0, C, (count,))), batch_size=2
    )


def on_pairs(model: nn.Module, loader: DataLoader, loss=None) -> Real:
    """A model of images on pairs, its loss a cross-entropy."""
    return Real(
        model,
        list(loader),
        lambda data=None, **options: Problem(model, nn.CrossEntropyLoss(), loader if data is None else data, **options),
        loss or (lambda batch: F.cross_entropy(model(batch[0]), batch[1])),
        lambda batch: model(batch[0]),
        lambda z, batch: classes(z, batch[1]),
        lambda batch: len(batch[1]),
    )


def timm() -> Real:
    import timm as library

    return on_pairs(in_double(library.create_model("test_resnet", num_classes=C)), rows_of(32, 3))


def timm_transformer() -> Real:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=C)
    return on_pairs(in_double(model), rows_of(8, 5))


def lightning() -> Real:
    """A module with a training step, on the loader of a data module."""
    from lightning import LightningDataModule, LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.GELU(), nn.Linear(4, C))

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

    class Rows(LightningDataModule):
        def train_dataloader(self):
            return rows_of(4, 5)

    module = in_double(Module())
    return on_pairs(module, Rows().train_dataloader(), lambda batch: module.training_step(batch, 0))


class Forces(nn.Module):
    """Energies (n,) and forces (n, 3 · atoms) of a potential, as one matrix."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, batch):
        places = batch["coordinates"].detach().requires_grad_()
        energies = self.potential((batch["species"], places)).energies
        (slopes,) = torch.autograd.grad(energies.sum(), places, create_graph=True)
        return torch.cat([energies[:, None], -slopes.flatten(1)], 1)


def torchani() -> Real:
    """A potential of water and methane-like molecules, fitted to energies and forces."""
    from torchani.arch import simple_ani

    potential = simple_ani(
        ("H", "O"),
        lot="",
        repulsion=False,
        radial_shifts=2,
        angular_shifts=1,
        sections=1,
        activation="celu",
        self_energies="zero",
    )
    for name, p in potential.named_parameters():
        p.requires_grad_(".final_layer." in name or "layers.0" in name)
    model = in_double(Forces(potential))
    water = torch.tensor([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]], dtype=torch.float64)

    def molecules(count: int) -> dict[str, Tensor]:
        return {
            "species": torch.tensor([[8, 1, 1]]).repeat(count, 1),
            "coordinates": water + 0.1 * torch.randn(count, 3, 3, dtype=torch.float64),
            "targets": torch.randn(count, 10, dtype=torch.float64),
        }

    batches = [molecules(2), molecules(3)]

    def matching(z: Tensor, targets: Tensor) -> Tensor:
        error = (z - targets).square()
        return (error[:, 0] + 0.1 * error[:, 1:].sum(1)).mean()

    return Real(
        model,
        batches,
        lambda data=None, **options: Problem(
            model, matching, batches if data is None else data, forward=lambda m, batch: m(batch), **options
        ),
        lambda batch: matching(model(batch), batch["targets"]),
        model,
        lambda z, batch: torch.stack([matching(row[None], target[None]) for row, target in zip(z, batch["targets"])]),
        lambda batch: len(batch["targets"]),
    )


OTHERS = (torch_geometric, timm, timm_transformer, lightning, torchani)
