"""Whatever object a number comes from is watched: those of the user's classes, their classes, defaults of functions, data."""

from __future__ import annotations

import argparse
import copy
import pathlib
import types

import pytest
import torch
from torch import nn

from curvalg import Problem, StaleError, registry


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Scaled(nn.Module):
    """z = s W x, with s from wherever ``read`` finds it."""

    def __init__(self, read, **attributes):
        super().__init__()
        self.layer, self.read = nn.Linear(3, 2, bias=False).double(), read
        self.__dict__.update(attributes)

    def forward(self, x):
        return self.layer(x) * self.read(self)


class Object:
    def __init__(self, value=1.0):
        self.value = value

    def __call__(self, model):
        return self.value

    def method(self, model):
        return self.value


class Slots:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 1.0


class Below(Slots):
    __slots__ = ("other",)


def callable_object():
    return Scaled(Object()), lambda m: setattr(m.read, "value", 2.0)


def bound_method():
    owner = Object()
    return Scaled(owner.method), lambda m: setattr(owner, "value", 2.0)


def slots():
    return Scaled(lambda m: m.settings.value, settings=Below()), lambda m: setattr(m.settings, "value", 2.0)


def nested():
    settings = types.SimpleNamespace(inner=types.SimpleNamespace(values=[1.0]))
    return Scaled(
        lambda m: m.settings.inner.values[0], settings=settings
    ), lambda m: settings.inner.values.pop(0) and (settings.inner.values.append(2.0))


def beside_odd_members():
    settings = argparse.Namespace(value=1.0, path=pathlib.Path("x"), rest=object(), places=slice(3))
    return Scaled(lambda m: m.settings.value, settings=settings), lambda m: setattr(settings, "value", 2.0)


def class_attribute():
    class Own(Scaled):
        value = 1.0

    return Own(lambda m: m.value), lambda m: setattr(Own, "value", 2.0)


def class_of_a_base():
    class Base(Scaled):
        value = 1.0

    class Own(Base):
        pass

    return Own(lambda m: m.value), lambda m: setattr(Base, "value", 2.0)


def a_class_as_settings():
    class Settings:
        value = 1.0

    return Scaled(lambda m: m.settings.value, settings=Settings), lambda m: setattr(Settings, "value", 2.0)


def a_method_of_the_class():
    class Own(Scaled):
        def forward(self, x):
            return self.layer(x)

    return Own(None), lambda m: setattr(Own, "forward", lambda self, x: 2 * self.layer(x))


def a_closure_of_a_method():
    value = [1.0]

    class Own(Scaled):
        @staticmethod
        def factor():
            return value[0]

        def forward(self, x):
            return self.layer(x) * self.factor()

    return Own(None), lambda m: value.__setitem__(0, 2.0)


def mutable_default():
    def read(model, value=[1.0]):  # noqa: B006
        return value[0]

    return Scaled(read), lambda m: read.__defaults__[0].__setitem__(0, 2.0)


def exchanged_default():
    def read(model, value=1.0):
        return value

    return Scaled(read), lambda m: setattr(read, "__defaults__", (2.0,))


def attribute_of_a_function():
    def read(model):
        return read.value

    read.value = 1.0
    return Scaled(read), lambda m: setattr(read, "value", 2.0)


PLACES = [
    callable_object,
    bound_method,
    slots,
    nested,
    beside_odd_members,
    class_attribute,
    class_of_a_base,
    a_class_as_settings,
    a_method_of_the_class,
    a_closure_of_a_method,
    mutable_default,
    exchanged_default,
    attribute_of_a_function,
]


def expected(x):
    """(I ⊗ XᵀX) / N: the GGN of the mean squared error of two outputs of a linear layer."""
    return torch.kron(torch.eye(2).double(), x.T @ x) / len(x)


def check(problem, change, before, after):
    V = torch.randn(problem.size, 3).double()
    op = registry.build("ggn").lower(problem)
    assert torch.allclose(op @ V, before @ V)
    assert torch.allclose(op @ V[:, 0], before @ V[:, 0])  # nothing that a call leaves behind makes it stale
    change()
    with pytest.raises(StaleError):
        op @ V
    assert torch.allclose(registry.build("ggn").lower(problem) @ V, after @ V)
    assert torch.allclose(op.refresh() @ V, after @ V)


@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_where_a_model_may_keep_a_number(place):
    model, change = place()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    problem = Problem(model, nn.MSELoss(), (x, y))
    check(problem, lambda: change(model), expected(x), 4 * expected(x))


def scaled_loss():
    class Loss:
        scale = 1.0

        def __call__(self, z, t):
            return self.scale * nn.functional.mse_loss(z, t)

    loss = Loss()
    return {"loss": loss}, lambda: setattr(loss, "scale", 4.0)


def adapter():
    class Adapter:
        def __init__(self):
            self.scale = 1.0

        def __call__(self, model, batch):
            return self.scale * model(batch[0])

    rule = Adapter()
    return {"forward": rule}, lambda: setattr(rule, "scale", 2.0)


@pytest.mark.parametrize("kind", [scaled_loss, adapter], ids=lambda f: f.__name__)
def test_objects_that_are_called(kind):
    options, change = kind()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    loss = options.pop("loss", nn.MSELoss())
    problem = Problem(nn.Linear(3, 2, bias=False).double(), loss, (x, y), **options)
    check(problem, change, expected(x), 4 * expected(x))


def by_data(x):
    x.data.mul_(2)


def by_numpy(x):
    x.numpy()[...] *= 2


def by_inference(x):
    with torch.inference_mode():
        x.mul_(2)


@pytest.mark.parametrize("rows", [5, 5000])
@pytest.mark.parametrize("write", [by_data, by_numpy, by_inference], ids=lambda f: f.__name__)
def test_data_that_are_written_past_autograd(write, rows):
    with torch.inference_mode(write is by_inference):
        x = torch.randn(rows, 3).double()
    y = torch.randn(rows, 2).double()
    problem = Problem(nn.Linear(3, 2, bias=False).double(), nn.MSELoss(), [(x, y)])
    with torch.inference_mode(False):
        before = expected(x.clone())
    check(problem, lambda: write(x), before, 4 * before)


def test_objects_that_a_call_writes_into_make_nothing_stale():
    class Counter:
        calls = 0

        def __init__(self):
            self.last = None

    class Counting(Scaled):
        def forward(self, x):
            self.counter.last = x.shape
            Counter.calls += 1
            return self.layer(x)

    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    model = Counting(None, counter=Counter())
    problem = Problem(model, nn.MSELoss(), (x, y))
    op, v = registry.build("ggn").lower(problem), torch.ones(6).double()
    first = op @ v
    model(torch.randn(2, 3).double())
    assert torch.equal(op @ v, first)


def test_what_only_some_calls_write_makes_nothing_stale():
    """Calls with gradients leave something behind that the first one, without, did not."""

    class Remembering(Scaled):
        def forward(self, x):
            z = self.layer(x)
            if z.requires_grad:
                self.cache.last = z.detach()
                self.cache.calls.append(len(x))
            return z

    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    model = Remembering(None, cache=types.SimpleNamespace(last=None, calls=[]))
    problem = Problem(model, nn.MSELoss(), (x, y))
    problem.value()
    op, V = registry.build("hessian").lower(problem), torch.randn(6, 3).double()
    for _ in range(3):
        assert torch.allclose(op @ V, expected(x) @ V)
    model.layer.weight.data.mul_(2)
    with pytest.raises(StaleError):
        op @ V


class Settings:
    """As the configuration that a model of a library holds."""

    scale = 2.0


def test_what_python_writes_on_a_class_when_a_model_is_copied_is_no_change():
    settings = Settings()
    net = Scaled(lambda module: module.settings.scale, settings=settings)
    problem = Problem(net, nn.MSELoss(), (torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    operator = registry.build("hessian").lower(problem)
    expected = operator @ torch.ones(6, dtype=torch.float64)
    assert "__slotnames__" not in vars(Settings)
    copy.deepcopy(settings)
    assert "__slotnames__" in vars(Settings)
    assert torch.equal(operator @ torch.ones(6, dtype=torch.float64), expected)
    Settings.scale = 3.0
    try:
        with pytest.raises(StaleError, match=r"Settings\.scale"):
            operator @ torch.ones(6, dtype=torch.float64)
    finally:
        Settings.scale = 2.0
