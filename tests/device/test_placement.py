"""Data on another device than the model: moved to it, and there before anything reads them."""

from __future__ import annotations

import copy

import pytest
import torch

from curvalg import Problem, registry
from curvalg.errors import OptionError
from curvalg.estimate import eigsh, matrix_function
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


def test_krylov_vectors_may_lie_on_the_host():
    """Started and deflated by vectors from either side; the same numbers as on the device."""
    torch.manual_seed(0)
    X, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    net = torch.nn.Sequential(torch.nn.Linear(6, 68), torch.nn.Tanh(), torch.nn.Linear(68, 3)).double().cuda()
    op = registry.build("hessian").lower(
        Problem(net, torch.nn.CrossEntropyLoss(), (X.double().cuda(), y.cuda()), factored=False)
    )
    v0 = op.problem.gradient()
    there = eigsh(op, 2, v0=v0, block=1, tol=1e-8)
    here = eigsh(op, 2, v0=v0, block=1, tol=1e-8, basis="cpu")
    assert here.method == there.method == "lanczos"
    assert there.eigenvectors.is_cuda
    assert here.eigenvectors.device.type == "cpu"
    agree(there.eigenvalues, here.eigenvalues)
    rest = [eigsh(op, 1, deflate=pairs, block=1, tol=1e-8, basis="cpu").eigenvalues for pairs in (there, here)]
    agree(rest[0], rest[1])
    assert matrix_function(op, "exp", v0, basis="cpu").value.is_cuda


def test_a_place_for_the_basis_that_is_none_is_refused():
    with pytest.raises(OptionError, match="expected basis to be one of 'device', 'cpu'"):
        eigsh(torch.eye(3), 1, basis="host")
