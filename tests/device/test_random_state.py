"""The user's random state on a device stays as it was, whatever draws: loaders, data sets, models.

That estimators leave it is tested where each is compared with the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from curvalg import CurvalgError, Problem, registry
from curvalg.problem.data.randomness import DrawGuard, LoaderStream


class Fake:
    """The module of a kind of device, with one number as the random state of each device."""

    def __init__(self, devices, name="device"):
        self.states = [torch.tensor([7.0]) for _ in range(devices)]
        self.is_available, self.device_count = lambda: True, lambda: devices
        self.name = name

    def get_rng_state(self, index=0):
        return self.states[index].clone()

    def set_rng_state(self, state, index=0):
        self.states[index] = state.clone()

    def manual_seed(self, key):
        self.states = [torch.tensor([float(key)]) for _ in self.states]

    def draw(self, index=0):
        self.states[index] += 1
        return float(self.states[index])


@pytest.fixture(params=[1, 2])
def fake(request, monkeypatch):
    """One or two devices of another kind, as MPS and XPU are."""
    module = Fake(request.param)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


def test_a_draw_on_any_kind_of_device_is_refused_and_undone(fake):
    with pytest.raises(CurvalgError, match="draws random numbers from torch on a device"):
        DrawGuard("refuse").run(lambda: fake.draw(len(fake.states) - 1), 0)
    assert [float(state) for state in fake.states] == [7.0] * len(fake.states)


def test_a_draw_on_any_kind_of_device_is_replayed(fake):
    guard = DrawGuard("frozen")
    assert [guard.run(fake.draw, key) for key in (3, 4, 3)] == [4, 5, 4]
    assert [float(state) for state in fake.states] == [7.0] * len(fake.states)


def test_a_loader_draws_on_a_stream_of_its_own_on_any_kind_of_device(fake):
    stream, drawn = LoaderStream(), []
    for _ in range(3):
        with stream.step():
            drawn.append(fake.draw())
        fake.set_rng_state(torch.tensor([20.0]))
    assert drawn == [8, 9, 10]


def test_a_device_that_was_not_used_is_not_asked(monkeypatch):
    module = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert DrawGuard("frozen").run(lambda: 5, 0) == 5


class Shuffled(torch.utils.data.Dataset):
    """Rows, each of which is read after a draw on the device."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        torch.rand(3, device="cuda")
        return self.X[i], self.y[i]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_data_set_that_draws_on_the_device(device):
    data = torch.utils.data.DataLoader(Shuffled(torch.randn(6, 3), torch.randn(6, 2)), batch_size=3)
    problem = Problem(torch.nn.Linear(3, 2).to(device), torch.nn.MSELoss(), data)
    before = torch.cuda.get_rng_state()
    registry.build("ggn").lower(problem) @ torch.ones(8, device=device)
    problem.gradient()
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_that_draws_on_the_device_is_replayed(device):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x) * torch.rand(len(x), 1, device="cuda").to(x.device)

    data = (torch.randn(6, 3, device=device), torch.randn(6, 2, device=device))
    problem = Problem(Noisy().to(device), torch.nn.MSELoss(), data, randomness="frozen")
    before = torch.cuda.get_rng_state()
    op, ones = registry.build("ggn").lower(problem), torch.ones(8, device=device)
    assert torch.equal(op @ ones, op @ ones)
    assert torch.equal(torch.cuda.get_rng_state(), before)
