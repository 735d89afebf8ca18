"""A problem is at one state: whatever the numbers depend on is watched, taken anew by refresh(), and never mixed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvalg import CurvalgError, Identity, Problem, StaleError, inverse, registry

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batches(sizes=(4, 3)):
    return [(torch.randn(n, 4).double(), torch.randint(0, 3, (n,))) for n in sizes]


class Scaled(nn.Module):
    """Reads many things that are neither parameters nor buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.act = nn.Tanh()
        self.factor = 1.0
        self.scales = [1.0, 1.0]
        self.options = {"power": 1}
        self.mask = torch.ones(3).double()
        self.settings = types.SimpleNamespace(shift=0.0)
        self.array = np.ones(3)
        self.function = functools.partial(F.leaky_relu, negative_slope=0.5)

    def forward(self, x):
        z = self.act(self.layer(x)) * self.factor * self.scales[0] + self.settings.shift
        z = self.function(z) ** self.options["power"] * self.mask
        return z * torch.from_numpy(self.array)


def reference(model, data, loss=CE):
    """GGN by plain torch: Σ Jᵀ B J of the summed loss over the count of rows."""
    params = list(model.parameters())
    rows = sum(len(y) for _, y in data)
    total = 0
    for x, y in data:
        z = model(x)
        J = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(e, params, retain_graph=True)])
                for e in z.reshape(-1)
            ]
        )
        B = torch.autograd.functional.hessian(
            lambda t, y=y: F.cross_entropy(t, y, weight=loss.weight, reduction="sum"), z.detach()
        )
        total = total + J.T @ B.reshape(z.numel(), -1) @ J
    weights = 1.0 if loss.weight is None else None
    return total / (rows if weights else sum(float(loss.weight[y].sum()) for _, y in data))


def _factor(m):
    m.factor = 2.0


def _list(m):
    m.scales[0] = 3.0


def _dict(m):
    m.options["power"] = 2


def _mask(m):
    m.mask[1] = 0.5


def _mask_data(m):
    m.mask.data.mul_(0.5)  # past the version counter


def _new_mask(m):
    m.mask = torch.tensor([1.0, 2.0, 3.0]).double()


def _namespace(m):
    m.settings.shift = 0.7


def _array(m):
    m.array[0] = 4.0


def _swap(m):
    m.act = nn.Sigmoid()


def _partial(m):
    m.function = functools.partial(F.leaky_relu, negative_slope=0.1)


def _hook(m):
    m.layer.register_forward_hook(lambda module, args, out: 2 * out)


def _pre_hook(m):
    m.layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _forward(m):
    m.forward = lambda x: m.layer(x).sin()


def _weight(m):
    m.layer.weight.data.mul_(1.5)


CHANGES = [
    _factor,
    _list,
    _dict,
    _mask,
    _mask_data,
    _new_mask,
    _namespace,
    _array,
    _swap,
    _partial,
    _hook,
    _pre_hook,
    _forward,
    _weight,
]


@pytest.mark.parametrize("cache", ["auto", 0])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_what_the_forward_reads_is_watched_and_refreshed(change, cache):
    model, data = Scaled(), batches()
    problem = Problem(model, CE, data, cache=cache)
    op = registry.build("ggn").lower(problem)
    v = torch.randn(problem.size).double()
    assert torch.allclose(op @ v, reference(model, data) @ v)
    change(model)
    with pytest.raises(StaleError, match="changed after the operator was lowered"):
        op @ v
    expected = reference(model, data) @ v
    assert torch.allclose(registry.build("ggn").lower(problem) @ v, expected)
    assert torch.allclose(op.refresh() @ v, expected)


def _append(data):
    data.append((torch.randn(2, 4).double(), torch.tensor([0, 1])))


def _drop(data):
    data.pop()


def _labels(data):
    data[0][1].fill_(1)


def _inputs(data):
    data[1][0].mul_(2)


def _replace(data):
    data[0] = (torch.randn(4, 4).double(), torch.tensor([2, 2, 1, 0]))


@pytest.mark.parametrize("change", [_append, _drop, _labels, _inputs, _replace], ids=lambda f: f.__name__[1:])
def test_data_in_memory_is_watched_with_its_totals(change):
    model, data = nn.Linear(4, 3).double(), batches()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 9.0]).double())
    problem = Problem(model, loss, data)
    op = registry.build("ggn").lower(problem)
    v = torch.randn(problem.size).double()
    op @ v, problem.value()
    change(data)
    with pytest.raises(StaleError, match="data"):
        op @ v
    whole = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    assert problem.num_samples == len(whole[0])
    assert problem.value() == pytest.approx(loss(model(whole[0]), whole[1]).item(), rel=1e-12)
    assert torch.allclose(op.refresh() @ v, reference(model, data, loss) @ v)


class Stored(Dataset):
    def __init__(self, x, y):
        self.x, self.y, self.reads = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.reads += 1  # a counter that reading moves makes nothing stale
        return self.x[i], self.y[i]


@pytest.mark.parametrize("kind", [TensorDataset, Stored])
def test_tensors_behind_a_loader_are_watched(kind):
    x, y = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    model = nn.Linear(4, 3).double()
    problem = Problem(model, CE, DataLoader(kind(x, y), batch_size=4))
    op = registry.build("ggn").lower(problem)
    v = torch.randn(problem.size).double()
    for _ in range(3):
        op @ v
    x.mul_(2)
    with pytest.raises(StaleError, match="data"):
        op @ v
    assert torch.allclose(op.refresh() @ v, reference(model, [(x, y)]) @ v)


def test_the_loss_is_watched():
    w = torch.tensor([1.0, 2.0, 3.0]).double()
    model, data = nn.Linear(4, 3).double(), batches()
    whole = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    module = nn.CrossEntropyLoss(weight=w)
    closed, partial = nn.CrossEntropyLoss(), functools.partial(F.cross_entropy, weight=w)
    power = 2.0
    given = {
        "module": module,
        "option": closed,
        "partial": partial,
        "closure": lambda o, t: (F.one_hot(t, 3) - o).abs().pow(power).sum(),
    }
    changes = {
        "module": lambda: w.copy_(torch.tensor([9.0, 1.0, 1.0])),
        "option": lambda: setattr(closed, "label_smoothing", 0.3),
        "partial": lambda: w.copy_(torch.tensor([1.0, 7.0, 1.0])),
    }
    for name, loss in given.items():
        problem = Problem(model, loss, data, reduction="sum" if name == "closure" else None)
        op = registry.build("hessian").lower(problem)
        v = torch.ones(problem.size).double()
        op @ v
        if name == "closure":
            power = 4.0
        else:
            changes[name]()
        with pytest.raises(StaleError):
            op @ v
        assert problem.value() == pytest.approx(loss(model(whole[0]), whole[1]).item(), rel=1e-12), name
        assert torch.allclose(
            op.refresh() @ v,
            registry.build("hessian").lower(Problem(model, loss, data, reduction="sum" if name == "closure" else None))
            @ v,
        )


class Remembers(nn.Module):
    """Leaves something behind in every call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.calls, self.last, self.history = 0, None, collections.deque(maxlen=3)

    def forward(self, x):
        self.calls += 1
        self.last = self.layer(x)
        self.history.append(float(self.last.detach().sum()))
        return self.last


def test_what_a_forward_writes_makes_nothing_stale():
    model, data = Remembers(), batches()
    op = registry.build("hessian").lower(Problem(model, CE, data))
    v = torch.ones(15).double()
    first = op @ v
    for _ in range(3):
        model(data[0][0])
        assert torch.equal(op @ v, first)
    assert model.calls == 3  # the user's own


def test_an_operator_of_the_state_before_a_refresh_is_stale_and_a_second_one_joins():
    problem = Problem(nn.Linear(4, 3).double(), CE, batches())
    ops = [registry.build(name).lower(problem) for name in ("ggn", "hessian")]
    v = torch.ones(15).double()
    for op in ops:
        op @ v
    problem.refresh()
    for op in ops:
        with pytest.raises(StaleError, match="refreshed"):
            op @ v
    ops[0].refresh()
    ops[1].refresh()  # goes on at the state of the first
    for op in ops:
        op @ v


def test_what_moved_and_came_back_is_no_change():
    model, data = nn.Linear(4, 3).double(), batches()
    problem = Problem(model, CE, data)
    op = registry.build("ggn").lower(problem)
    v = torch.ones(15).double()
    first, value = op @ v, problem.value()
    saved = model.weight.detach().clone()
    model.weight.data.add_(1)
    data.append(data[0])
    assert problem.value() != value
    model.weight.data.copy_(saved)
    data.pop()
    assert torch.equal(op @ v, first)
    assert problem.value() == value
    assert problem.num_samples == 7


class File(Dataset):
    """Data that cannot be watched."""

    content = 1.0

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.full((4,), i * File.content).double(), i % 3


def test_refresh_takes_what_cannot_be_watched(monkeypatch):
    model = nn.Linear(4, 3).double()
    problem = Problem(model, CE, DataLoader(File(), batch_size=2))
    op = registry.build("ggn").lower(problem)
    v = torch.ones(15).double()
    op @ v
    monkeypatch.setattr(File, "content", 2.0)
    x, y = torch.stack([torch.full((4,), 2.0 * i) for i in range(5)]).double(), torch.arange(5) % 3
    assert torch.allclose(op.refresh() @ v, reference(model, [(x, y)]) @ v)


def test_a_problem_survives_a_training_loop():
    model, data = Scaled(), batches()
    problem = Problem(model, CE, data)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    op = inverse(registry.build("ggn") + Identity).lower(problem)
    for _ in range(3):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(x), y, reduction="sum") / 7 for x, y in data).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        assert torch.allclose(problem.gradient(), gradient)
        step = op.refresh() @ gradient
        eye = torch.eye(problem.size).double()
        assert torch.allclose((reference(model, data) + eye) @ step, gradient)
        optimizer.step()


@dataclasses.dataclass(frozen=True)
class Settings:
    scale: float


def test_a_frozen_settings_object_that_is_exchanged():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.settings = nn.Linear(4, 3).double(), Settings(1.0)

        def forward(self, x):
            return self.layer(x) * self.settings.scale

    model, data = Net(), batches()
    op = registry.build("ggn").lower(Problem(model, CE, data))
    v = torch.ones(15).double()
    op @ v
    model.settings = Settings(2.0)
    with pytest.raises(StaleError, match="settings"):
        op @ v
    assert torch.allclose(op.refresh() @ v, reference(model, data) @ v)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("change", [torch.Tensor.float, lambda p: p[:2]])
def test_parameters_of_another_form_are_another_problem(change, functional):
    """``module.float()`` and ``module.cuda()`` change the parameters themselves."""
    model = nn.Linear(4, 3).double()
    own = dict(model.named_parameters())
    given = (
        ((lambda p, x: F.linear(x, p["weight"], p["bias"])), CE, batches()) if functional else (model, CE, batches())
    )
    problem = Problem(*given, params=own) if functional else Problem(*given)
    op = registry.build("ggn").lower(problem)
    before = op @ torch.ones(15).double()
    kept = own["weight"].data
    own["weight"].data = change(kept)
    with pytest.raises(StaleError):
        op @ torch.ones(15).double()
    with pytest.raises(CurvalgError, match=r"'weight' was float64 .* when the Problem was made"):
        op.refresh()
    own["weight"].data = kept
    assert torch.equal(op @ torch.ones(15).double(), before)
