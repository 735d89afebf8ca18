"""Data on another device than the model: moved to it, and there before anything reads them."""

from __future__ import annotations

import copy

import pytest
import torch

from curvalg import Problem, registry
from curvalg.tensors import trees
from tests.support.devices import SIMULATED, agree, moved
from tests.support.zoo import make

if SIMULATED:
    from tests.support import simulated_gpu


def the_gradient(model, batches, **options):
    return Problem(model, torch.nn.CrossEntropyLoss(), batches, **options).gradient()


def test_a_model_on_the_cpu_reads_data_of_the_device():
    case = make("mlp")
    agree(the_gradient(case.model, case.batches), the_gradient(case.model, moved(case.batches)))


def test_a_model_on_the_device_reads_data_of_the_cpu():
    case = make("mlp")
    agree(the_gradient(case.model, case.batches), the_gradient(copy.deepcopy(case.model).cuda(), case.batches))


@pytest.mark.parametrize("options", [{"num_workers": 1}, {}, {"pin_memory": True}])
def test_a_loader_on_the_cpu_feeds_a_model_on_the_device(options):
    if SIMULATED and "pin_memory" in options:
        pytest.skip("the simulated GPU has no thread that pins")
    case = make("mlp")
    rows = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*case.batches, strict=True)))
    loader = torch.utils.data.DataLoader(rows, batch_size=4, **options)
    gpu = Problem(copy.deepcopy(case.model).cuda(), case.loss, loader)
    cpu = Problem(case.model, case.loss, case.batches)
    v = torch.ones(cpu.size, dtype=torch.float64)
    agree(registry.build("ggn").lower(cpu) @ v, registry.build("ggn").lower(gpu) @ v.cuda())


@pytest.mark.skipif(not SIMULATED, reason="only the simulated GPU shows what is asynchronous")
def test_only_pinned_memory_is_uploaded_without_waiting(monkeypatch):
    X = torch.randn(5, 3)
    there = X.cuda()
    with simulated_gpu.watch("curvalg") as seen:
        trees.place(X, torch.device("cuda"))
        trees.place(there, torch.device("cpu"))
    assert {kind for kind, _, _ in seen} == {"upload", "sync"}
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, *args: True)
    with simulated_gpu.watch("curvalg") as seen:
        trees.place(X, torch.device("cuda"))
        trees.place(there, torch.device("cpu"))
    assert {kind for kind, _, _ in seen} == {"upload, async", "sync"}
