"""Models of which each process has a part only are refused by name, with what to do."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from curvalg import CurvalgError, Problem, ProblemError, registry

DATA = torch.randn(5, 4), torch.randn(5, 3)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def mesh(process_group):
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


def sharded(tensor, mesh) -> nn.Parameter:
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))


def test_a_sharded_parameter_is_refused_by_name(mesh):
    model = network()
    model[2].weight = sharded(model[2].weight.detach(), mesh)
    for params in (None, "0.*", "2.weight"):  # also beside those that are chosen
        with pytest.raises(ProblemError, match=r"'2\.weight' is a DTensor.*pass group=.*unsharded copy"):
            Problem(model, nn.MSELoss(), DATA, params=params)
    model[2].weight = nn.Parameter(model[2].weight.full_tensor().detach())
    registry.build("ggn").lower(Problem(model, nn.MSELoss(), DATA)) @ torch.ones(51)


def test_a_sharded_buffer_is_refused_by_name(mesh):
    model = network()
    model.register_buffer("table", sharded(torch.ones(4), mesh).detach())
    with pytest.raises(ProblemError, match="buffer 'table' is a DTensor"):
        Problem(model, nn.MSELoss(), DATA)


def test_functions_of_sharded_tensors_are_refused(mesh):
    params = {"w": sharded(torch.ones(3, 4), mesh)}
    with pytest.raises(ProblemError, match="parameter 'w' is a DTensor"):
        Problem(lambda p, x: x @ p["w"].T, nn.MSELoss(), DATA, params=params)


def test_a_parameter_that_is_sharded_later_is_refused(mesh):
    model = network()
    problem = Problem(model, nn.MSELoss(), DATA)
    op = registry.build("ggn").lower(problem)
    model[0].bias = sharded(model[0].bias.detach(), mesh)
    with pytest.raises(CurvalgError):
        op @ torch.ones(problem.size)
    with pytest.raises(ProblemError, match=r"'0\.bias' is a DTensor"):
        op.refresh()


def test_fully_sharded_modules_are_refused_without_a_group(mesh):
    from torch.distributed.fsdp import fully_shard

    model = network()
    try:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        pytest.skip(f"fully_shard on a CPU: {error}")
    with pytest.raises(ProblemError, match=r"'0\.weight' is a DTensor.*pass group=.*full state dict"):
        Problem(model, nn.MSELoss(), DATA)


@pytest.mark.parametrize("inside", [False, True])
def test_wrappers_of_fsdp_are_refused(mesh, inside):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = FullyShardedDataParallel(nn.Linear(6, 3) if inside else network(), device_id=torch.device("cpu"))
        except (RuntimeError, ValueError, AssertionError) as error:
            pytest.skip(f"FullyShardedDataParallel on a CPU: {error}")
    model = nn.Sequential(nn.Linear(4, 6), wrapped) if inside else wrapped
    what = "the module '1'" if inside else "the model"
    with pytest.raises(ProblemError, match=f"{what} is wrapped by FullyShardedDataParallel.*unsharded copy"):
        Problem(model, nn.MSELoss(), DATA)


def test_nothing_of_it_is_imported():
    """Which takes a second, for models that have none of it."""
    code = """
import sys, torch
before = set(sys.modules)
import curvalg
curvalg.Problem(torch.nn.Linear(4, 3), torch.nn.MSELoss(), (torch.ones(5, 4), torch.ones(5, 3)))
new = [name for name in set(sys.modules) - before if name.startswith(("torch.distributed.tensor", "torch.distributed.fsdp"))]
assert not new, sorted(new)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
