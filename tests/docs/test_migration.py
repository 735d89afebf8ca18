"""Their call and ours give the same matrix, as docs/howto/migration.md and docs/conventions.md say."""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvalg import Identity, Problem, block_diagonal, diagonal_part, inverse, registry
from curvalg.estimate import eigsh, gradient_norms

LOSS = nn.CrossEntropyLoss()


ROOT = Path(__file__).parents[2]
VERSIONS = {
    "curvlinops-for-pytorch": "curvlinops",
    "hessian-eigenthings": "hessian-eigenthings",
    "PyHessian": "PyHessian",
    "nngeometry": "nngeometry",
    "backpack-for-pytorch": "BackPACK",
}


@pytest.mark.parametrize("package", VERSIONS)
@pytest.mark.parametrize("page", ["docs/comparison.md", "docs/howto/migration.md", "docs/conventions.md"])
def test_versions_named_are_those_that_are_compared(package, page):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    named = re.findall(rf"(?:{package}|{VERSIONS[package]}) (\d[\w.]*\w)", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert set(named) == {pins[package]}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(9, 4).double(), torch.randint(0, 3, (9,))


@pytest.fixture
def uneven(data):
    X, y = data
    return [(X[:6], y[:6]), (X[6:], y[6:])]


@pytest.fixture
def problem(model, uneven) -> Problem:
    return Problem(model, LOSS, uneven)


def dense(problem: Problem, name: str, **options: object) -> torch.Tensor:
    return registry.build(name, **options).lower(problem).to_dense()


def columns(op, size: int) -> torch.Tensor:
    return torch.stack([op @ e for e in torch.eye(size, dtype=torch.float64)], 1)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("HessianLinearOperator", "hessian"),
        ("GGNLinearOperator", "ggn"),
        ("EFLinearOperator", "covariance"),
        ("JacobianLinearOperator", "jacobian"),
    ],
)
def test_curvlinops_products(theirs, ours, model, uneven, problem):
    curvlinops = importlib.import_module("curvlinops")
    given = () if ours == "jacobian" else (LOSS,)
    op = getattr(curvlinops, theirs)(model, *given, list(model.parameters()), uneven)
    torch.testing.assert_close(op @ torch.eye(problem.size).double(), dense(problem, ours))


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    ("operator", "fisher", "name", "options"),
    [
        ("KFACLinearOperator", "TYPE2", "kfac", {}),
        ("KFACLinearOperator", "EMPIRICAL", "kfac", {"fisher": "empirical"}),
        ("EKFACLinearOperator", "TYPE2", "ekfac", {}),
        ("EKFACLinearOperator", "EMPIRICAL", "ekfac", {"fisher": "empirical"}),
        ("KFACLinearOperator", "FORWARD_ONLY", "foof", {}),
    ],
)
def test_curvlinops_kronecker(operator, fisher, name, options, joint, model, uneven, problem):
    curvlinops = importlib.import_module("curvlinops")
    op = getattr(curvlinops, operator)(
        model,
        LOSS,
        list(model.parameters()),
        uneven,
        fisher_type=getattr(curvlinops.FisherType, fisher),
        separate_weight_and_bias=not joint,
    )
    ours = dense(problem, name, joint=joint, **options)
    torch.testing.assert_close(op @ torch.eye(problem.size).double(), ours, rtol=1e-8, atol=1e-10)


def test_curvlinops_transposed_jacobian(model, uneven, problem):
    curvlinops = importlib.import_module("curvlinops")
    op = curvlinops.TransposedJacobianLinearOperator(model, list(model.parameters()), uneven)
    torch.testing.assert_close(op @ torch.eye(27).double(), registry.build("jacobian").T.lower(problem).to_dense())


class Pooled(nn.Module):
    """A weight that is shared by positions, whose mean is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean(1)


def test_curvlinops_reduce():
    curvlinops = importlib.import_module("curvlinops")
    torch.manual_seed(0)
    net, X, y = Pooled().double(), torch.randn(7, 5, 4).double(), torch.randint(0, 3, (7,))
    problem = Problem(net, LOSS, (X, y))
    theirs = curvlinops.KFACLinearOperator(
        net,
        LOSS,
        list(net.parameters()),
        [(X, y)],
        fisher_type=curvlinops.FisherType.TYPE2,
        kfac_approx=curvlinops.KFACType.REDUCE,
        separate_weight_and_bias=False,
    )
    torch.testing.assert_close(
        theirs @ torch.eye(problem.size).double(), dense(problem, "kfac", approximation="reduce")
    )


@pytest.mark.parametrize("exact", [True, False])
def test_curvlinops_inverse_of_kfac(exact, model, uneven, problem):
    curvlinops = importlib.import_module("curvlinops")
    fisher = curvlinops.FisherType.TYPE2
    kfac = curvlinops.KFACLinearOperator(
        model, LOSS, list(model.parameters()), uneven, fisher_type=fisher, separate_weight_and_bias=False
    )
    theirs = curvlinops.KFACInverseLinearOperator(
        kfac, damping=0.1, use_exact_damping=exact, use_heuristic_damping=not exact
    )
    build = registry.build
    ours = inverse(build("kfac") + 0.1 * Identity) if exact else inverse(build("kfac", factored_damping=0.1))
    torch.testing.assert_close(
        theirs @ torch.eye(problem.size).double(), ours.lower(problem).to_dense(), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("options", [{"weight": torch.tensor([1.0, 2.0, 4.0]).double()}, {"ignore_index": 1}])
def test_curvlinops_kfac_leaves_weights_out(options):
    curvlinops = importlib.import_module("curvlinops")
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 3)).double()
    X, y = torch.randn(1, 4).double().repeat(3, 1), torch.tensor([0, 1, 2])  # equal inputs: KFAC is exact
    loss = nn.CrossEntropyLoss(reduction="sum", **options)
    problem = Problem(layer, loss, (X, y))
    fisher = curvlinops.FisherType.TYPE2
    theirs = curvlinops.KFACLinearOperator(
        layer, loss, list(layer.parameters()), [(X, y)], fisher_type=fisher, separate_weight_and_bias=False
    )
    ggn = dense(problem, "ggn")
    torch.testing.assert_close(dense(problem, "kfac"), ggn)
    assert (theirs @ torch.eye(problem.size).double() - ggn).norm() > 0.4 * ggn.norm()


def test_pyhessian(model, uneven, problem):
    pyhessian = importlib.import_module("pyhessian")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = pyhessian.hessian(copy.deepcopy(model), LOSS, dataloader=uneven, cuda=False)
        v = torch.randn(problem.size, dtype=torch.float64)
        _, product = h.dataloader_hv_product(list(problem.layout.unflatten(v).values()))
        (largest,), _ = h.eigenvalues(top_n=1, maxIter=2000, tol=1e-10)
        with pytest.raises(RuntimeError, match="removed"):
            h.density(iter=3)
    op = registry.build("hessian").lower(problem)
    torch.testing.assert_close(torch.cat([p.reshape(-1) for p in product]), op @ v)
    assert largest == pytest.approx(float(eigsh(op, 1).eigenvalues[0]), rel=1e-3)


def test_hessian_eigenthings_averages_batches(model, uneven, problem):
    theirs = importlib.import_module("hessian_eigenthings")
    f = nn.functional.cross_entropy
    operators = {
        "hessian": theirs.HessianOperator(model, uneven, theirs.supervised_loss(f)),
        "ggn": theirs.GGNOperator(model, uneven, theirs.supervised_forward, theirs.supervised_loss_of_output(f)),
        "covariance": theirs.EmpiricalFisherOperator(model, uneven, theirs.supervised_per_sample_loss(f)),
    }
    for name, op in operators.items():
        got = columns(op, problem.size)
        mean = sum(dense(Problem(model, LOSS, batch), name) for batch in uneven) / 2
        torch.testing.assert_close(got, mean)
        assert (got - dense(problem, name)).norm() > 0.1 * got.norm()


@pytest.mark.filterwarnings("ignore")
def test_backpack(model, data):
    backpack = importlib.import_module("backpack")
    from backpack import extensions

    net, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(nn.CrossEntropyLoss())
    wanted = [
        getattr(extensions, name)()
        for name in ("DiagGGNExact", "DiagHessian", "SumGradSquared", "Variance", "BatchL2Grad")
    ]
    with backpack.backpack(*wanted):
        loss(net(data[0]), data[1]).backward()

    def flat(name: str) -> torch.Tensor:
        return torch.cat([getattr(p, name).reshape(-1) for p in net.parameters()])

    problem, n = Problem(model, LOSS, data), 9
    torch.testing.assert_close(flat("diag_ggn_exact"), dense(problem, "ggn_diagonal").diagonal())
    exact = diagonal_part(registry.build("hessian")).lower(problem).to_dense().diagonal()
    torch.testing.assert_close(flat("diag_h"), exact)
    torch.testing.assert_close(n * flat("sum_grad_squared"), dense(problem, "covariance_diagonal").diagonal())
    centred = dense(problem, "centered_covariance_diagonal").diagonal()
    torch.testing.assert_close(n**2 * flat("variance"), centred)
    squares = sum(p.batch_l2 for p in net.parameters())
    torch.testing.assert_close(squares.sqrt(), gradient_norms(problem).to(squares.dtype))


@pytest.mark.filterwarnings("ignore")
def test_backpack_blocks_and_gradients(model, data):
    backpack = importlib.import_module("backpack")
    from backpack import extensions

    net, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.KFLR(), extensions.BatchGrad(), extensions.GGNMP(), extensions.HMP()):
        loss(net(data[0]), data[1]).backward()
    problem = Problem(model, LOSS, data)
    kfac = dense(problem, "kfac", joint=False)
    with problem.batches() as batches:
        gradients = next(iter(batches)).per_sample_gradients()
    for products, matrix in (("ggnmp", "ggn"), ("hmp", "hessian")):
        blocks = block_diagonal(registry.build(matrix)).lower(problem)
        v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        ours = blocks @ v
        for name, p in net.named_parameters():
            torch.testing.assert_close(getattr(p, products)(v[name][None])[0], ours[name])
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad_batch, gradients[name])
        block = kfac[problem.layout.slices[name], problem.layout.slices[name]]
        theirs = p.kflr[0] if len(p.kflr) == 1 else torch.kron(p.kflr[0].contiguous(), p.kflr[1].contiguous())
        torch.testing.assert_close(theirs, block)


@pytest.mark.filterwarnings("ignore")
def test_nngeometry(model, data):
    importlib.import_module("nngeometry")
    from nngeometry.gram import GramMatrix
    from nngeometry.hessian import Hessian
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatBlockDiag, PMatDense, PMatDiag, PMatEKFAC, PMatImplicit, PMatKFAC, PMatLowRank
    from nngeometry.object.vector import random_pvector

    net, X, y = copy.deepcopy(model).float(), data[0].float(), data[1]  # its Fisher makes float32 constants
    loader = DataLoader(TensorDataset(X, y), batch_size=6)
    problem = Problem(net, LOSS, [(X[:6], y[:6]), (X[6:], y[6:])])

    def fim(representation: type) -> object:
        return FIM(model=net, loader=loader, representation=representation)

    def same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
        torch.testing.assert_close(theirs.detach(), ours, rtol=1e-4, atol=1e-5)

    same(fim(PMatDense).to_torch(), dense(problem, "fisher"))
    same(fim(PMatDiag).get_diag(), dense(problem, "ggn_diagonal").diagonal())
    same(fim(PMatKFAC).to_torch(), dense(problem, "kfac"))
    ekfac = fim(PMatEKFAC)
    ekfac.update_diag(loader)
    same(ekfac.to_torch(), dense(problem, "ekfac"))
    same(fim(PMatBlockDiag).to_torch(), block_diagonal(registry.build("fisher"), by="module").lower(problem).to_dense())
    low_rank = torch.linalg.eigvalsh(fim(PMatLowRank).to_torch().detach())[-18:]
    same(low_rank, registry.build("fisher").lower(problem).exact("eigh").eigenvalues[-18:].float())
    v = random_pvector(LayerCollection.from_model(net), dtype=torch.float32)
    ours = registry.build("fisher").lower(problem)
    same(fim(PMatImplicit).mv(v).to_torch(), ours @ v.to_torch().detach())
    damped = inverse(registry.build("fisher") + 0.1 * Identity).lower(problem)
    same(fim(PMatDense).solve(v, regul=0.1).to_torch(), damped @ v.to_torch().detach())
    gram = GramMatrix(model=net, loader=loader, function=lambda *d: net(d[0])).to_torch()
    same(gram.permute(1, 0, 3, 2).reshape(27, 27), dense(problem, "ntk"))
    f = nn.functional.cross_entropy
    summed = Hessian(net, loader, PMatDense, function=lambda z, t: f(z, t, reduction="sum")).to_torch()
    same(summed, 9 * dense(problem, "hessian"))
    averaged = Hessian(net, loader, PMatDense, function=f).to_torch()
    same(averaged, sum(dense(Problem(net, LOSS, b), "hessian") for b in problem.data.source))


# -- factors between libraries, with C > 1 outputs ------------------------------------------------------------------------

C = 3
TARGETS = {
    nn.CrossEntropyLoss: lambda: torch.randint(0, C, (9,)),
    nn.MSELoss: lambda: torch.randn(9, C).double(),
    nn.BCEWithLogitsLoss: lambda: torch.randint(0, 2, (9, C)).double(),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", TARGETS)
def test_curvlinops_factors(loss, reduction, model, data):
    curvlinops = importlib.import_module("curvlinops")
    torch.manual_seed(2)
    f, batch = loss(reduction=reduction), (data[0], TARGETS[loss]())
    problem = Problem(model, f, batch)
    given = model, f, list(model.parameters()), [batch]
    empirical = C if reduction == "mean" and loss is not nn.CrossEntropyLoss else 1
    ours = {
        ("HessianLinearOperator", None): (1, dense(problem, "hessian")),
        ("GGNLinearOperator", None): (1, dense(problem, "ggn")),
        ("EFLinearOperator", None): (empirical, dense(problem, "covariance")),
        ("KFACLinearOperator", "FORWARD_ONLY"): (1, dense(problem, "foof")),
    }
    for name in ("kfac", "ekfac"):
        there = f"{name.upper()}LinearOperator"
        ours[there, "TYPE2"] = 1, dense(problem, name)
        ours[there, "EMPIRICAL"] = empirical, dense(problem, name, fisher="empirical")
    for (name, fisher), (factor, matrix) in ours.items():
        options = {}
        if fisher is not None:
            options = {"fisher_type": getattr(curvlinops.FisherType, fisher), "separate_weight_and_bias": False}
        theirs = getattr(curvlinops, name)(*given, **options) @ torch.eye(problem.size).double()
        torch.testing.assert_close(theirs, factor * matrix, rtol=1e-8, atol=1e-10)


def test_nngeometry_regression(model, data):
    importlib.import_module("nngeometry")
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatBlockDiag, PMatDense, PMatDiag, PMatKFAC

    torch.manual_seed(2)
    net, X, y = copy.deepcopy(model).float(), data[0].float(), torch.randn(9, C)
    loader, problem = DataLoader(TensorDataset(X, y), batch_size=9), Problem(net, nn.MSELoss(), (X, y))

    def fim(representation: type) -> torch.Tensor:
        return FIM(model=net, loader=loader, representation=representation, variant="regression").to_torch().detach()

    fisher, close = dense(problem, "fisher"), {"rtol": 1e-4, "atol": 1e-5}
    blocks = block_diagonal(registry.build("fisher"), by="module").lower(problem).to_dense()
    torch.testing.assert_close(fim(PMatDense), C / 2 * fisher, **close)
    torch.testing.assert_close(fim(PMatDiag), C / 2 * torch.diag(fisher.diagonal()), **close)
    torch.testing.assert_close(fim(PMatBlockDiag), C / 2 * blocks, **close)
    torch.testing.assert_close(fim(PMatKFAC), C / 2 * dense(problem, "kfac"), **close)


def extended(net: nn.Module, loss: nn.Module, batch: tuple, *names: str) -> nn.Module:
    """A copy of a network with what BackPACK's extensions leave at its parameters."""
    backpack = importlib.import_module("backpack")
    from backpack import extensions

    net, loss = backpack.extend(copy.deepcopy(net)), backpack.extend(copy.deepcopy(loss))
    with backpack.backpack(*(getattr(extensions, name)() for name in names)):
        loss(net(batch[0]), batch[1]).backward()
    return net


def kflr(parameter: torch.Tensor) -> torch.Tensor:
    factors = [factor.contiguous() for factor in parameter.kflr]
    return factors[0] if len(factors) == 1 else torch.kron(*factors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
def test_backpack_factors(loss, model, data):
    torch.manual_seed(2)
    batch = data[0], TARGETS[loss]()
    names = "DiagGGNExact", "DiagHessian", "SumGradSquared", "Variance", "BatchL2Grad", "BatchGrad", "KFLR"
    net, problem, n = extended(model, loss(), batch, *names), Problem(model, loss(), batch), 9

    def flat(name: str) -> torch.Tensor:
        return torch.cat([getattr(p, name).reshape(-1) for p in net.parameters()])

    for attribute, name, factor in (
        ("diag_ggn_exact", "ggn_diagonal", 1),
        ("diag_h", "hessian", 1),
        ("sum_grad_squared", "covariance_diagonal", 1 / n),
        ("variance", "centered_covariance_diagonal", 1 / n**2),
    ):
        torch.testing.assert_close(flat(attribute), factor * dense(problem, name).diagonal())
    squares = sum(p.batch_l2 for p in net.parameters())
    torch.testing.assert_close(squares.sqrt(), gradient_norms(problem).to(squares.dtype))
    kfac = dense(problem, "kfac", joint=False)
    with problem.batches() as batches:
        gradients = next(iter(batches)).per_sample_gradients()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad_batch, gradients[name])
        torch.testing.assert_close(kflr(p), kfac[problem.layout.slices[name], problem.layout.slices[name]])


@pytest.mark.filterwarnings("ignore")
def test_backpack_kflr_of_a_convolution_is_another_matrix():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, C)).double()
    batch = torch.randn(8, 2, 4, 4).double(), torch.randint(0, C, (8,))
    theirs = dict(extended(net, LOSS, batch, "KFLR").named_parameters())
    problem = Problem(net, LOSS, batch)
    for approximation in ("expand", "reduce"):
        ours = dense(problem, "kfac", joint=False, approximation=approximation)

        def block(name: str, ours: torch.Tensor = ours) -> torch.Tensor:
            return ours[problem.layout.slices[name], problem.layout.slices[name]]

        there, here = kflr(theirs["0.weight"]), block("0.weight")
        best = (there * here).sum() / here.square().sum()
        assert (there - best * here).norm() > 0.3 * there.norm()
        torch.testing.assert_close(kflr(theirs["3.weight"]), block("3.weight"))
        torch.testing.assert_close(kflr(theirs["3.bias"]), block("3.bias"))
        if approximation == "reduce":
            torch.testing.assert_close(kflr(theirs["0.bias"]), block("0.bias"))
