"""Batches and loaders of real libraries are read as they come."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from curvalg import Problem, registry
from curvalg.integrations import huggingface
from tests.support.models import others


def rows_of(batches):
    """The rows of batches, without padding."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
            kept = ids[mask.bool()]
            yield {"input_ids": kept.tolist(), "attention_mask": [1] * len(kept), "labels": kept.tolist()}


def collate(rows):
    size = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [pad] * (size - len(row[key])) for row in rows]) for key, pad in padding.items()
    }


def trainer_of(model, rows, folder, **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to=[],
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


@pytest.fixture
def hessian(real):
    """data -> the Hessian of a GPT-2 on it, times a fixed vector."""

    def product(data, **options):
        made = huggingface.problem(real("gpt2").model, data, **options)
        return registry.build("hessian").lower(made) @ torch.ones(made.size, dtype=torch.float64)

    return product


@pytest.mark.parametrize("wrap", ["BatchEncoding", "BatchFeature"])
def test_encodings_are_mappings(wrap, real, hessian):
    import transformers

    kind = getattr(transformers, wrap)
    batches = real("gpt2").batches
    expected = hessian(batches)
    assert torch.equal(hessian([kind(batch) for batch in batches]), expected)
    assert torch.equal(hessian(kind(batches[0])), hessian(batches[0]))


def test_loaders_of_a_trainer(real, hessian, tmp_path):
    rows = list(rows_of(real("gpt2").batches))
    expected = hessian([collate(rows)])
    trainer = trainer_of(real("gpt2").model, rows, tmp_path)
    for loader in (trainer.get_eval_dataloader(), list(trainer.get_train_dataloader())):
        assert torch.allclose(hessian(loader), expected, rtol=1e-9, atol=1e-12)


def test_a_shuffling_loader_of_a_trainer(real, hessian, tmp_path):
    """Rows of one length need no padding that depends on who shares a batch."""
    rows = [{key: value[:3] for key, value in row.items()} for row in rows_of(real("gpt2").batches)]
    loader = trainer_of(real("gpt2").model, rows, tmp_path).get_train_dataloader()
    assert torch.allclose(hessian(loader), hessian([collate(rows)]), rtol=1e-9, atol=1e-12)


def test_a_loader_prepared_by_accelerate(real, hessian):
    from accelerate import Accelerator

    rows = list(rows_of(real("gpt2").batches))
    loader = Accelerator(cpu=True).prepare(DataLoader(rows, batch_size=2, collate_fn=collate))
    assert torch.allclose(hessian(loader), hessian([collate(rows)]), rtol=1e-9, atol=1e-12)


def test_a_loader_of_lightning_is_an_ordinary_one(real):
    model = real("lightning")
    combined = model.problem()
    assert combined.num_samples == 5
    assert combined.value() == pytest.approx(model.value(), rel=1e-12)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_loaders_of_graphs(size, shuffle, real):
    from torch_geometric.data import Batch
    from torch_geometric.loader import DataLoader as GraphLoader

    model = real("torch_geometric")
    graphs = [graph for batch in model.batches for graph in batch.to_data_list()]
    v = torch.ones(model.problem().size, dtype=torch.float64)
    expected = model.hessian(v)
    for data in (GraphLoader(graphs, size, shuffle=shuffle), Batch.from_data_list(graphs)):
        made = model.problem(data)
        assert made.num_samples == 5
        assert torch.allclose(registry.build("hessian").lower(made) @ v, expected, rtol=1e-10, atol=1e-13)


def test_graphs_of_several_kinds_are_samples():
    from torch_geometric.data import HeteroData
    from torch_geometric.loader import DataLoader as GraphLoader

    def graph(users):
        data = HeteroData()
        data["user"].x = torch.randn(users, 2, dtype=torch.float64)
        data["item"].x = torch.randn(2, 3, dtype=torch.float64)
        data["user", "buys", "item"].edge_index = torch.stack([torch.arange(users), torch.arange(users) % 2])
        data.y = torch.randint(0, others.C, (1,))
        return data

    class Net(torch.nn.Module):
        def __init__(self):
            from torch_geometric.nn import SAGEConv

            super().__init__()
            self.layer, self.head = SAGEConv((2, 3), 4), torch.nn.Linear(4, others.C)

        def forward(self, data):
            from torch_geometric.nn import global_add_pool

            hidden = self.layer((data["user"].x, data["item"].x), data["user", "buys", "item"].edge_index, (None, None))
            return self.head(global_add_pool(hidden.tanh(), data["item"].batch))

    graphs, net = [graph(n) for n in (3, 4, 2, 5)], Net().double()
    made = [
        Problem(net, torch.nn.CrossEntropyLoss(), GraphLoader(graphs, n), target=lambda batch: batch.y) for n in (1, 4)
    ]
    v = torch.ones(made[0].size, dtype=torch.float64)
    first, second = (registry.build("hessian").lower(p) @ v for p in made)
    assert made[0].num_samples == 4
    assert torch.allclose(first, second, rtol=1e-10, atol=1e-13)
