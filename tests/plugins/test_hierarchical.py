"""The hierarchical decomposition of the GGN: it adds up, and its spectra are the closed forms."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn

from curvalg import ExpressionError, Identity, LossError, Problem, inverse, losses, parse, registry
from tests.support.zoo import make

NAMES = ("ggn_class", "ggn_cross", "ggn_within", "ggn_same")
CONVENTIONS = {
    "spread within": {},
    "spread within, stored": {"stored": True},
    "spread same": {"own": "same"},
    "spread same, stored": {"own": "same", "stored": True},
}


def parts(own="within", stored=False):
    build = registry.build
    return {
        "ggn_class": build("ggn_class", stored=stored),
        "ggn_cross": build("ggn_cross", stored=stored),
        "ggn_within": build("ggn_within", own=own, stored=stored),
        "ggn_same": build("ggn_same", own=own, stored=stored and own == "within"),
    }


def net(classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes)).double()


def worlds():
    """Unbalanced (4, 2, 2, 0 of four classes), ragged, weighted, ignored; smoothed; positions of sequences."""
    X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, -100, 2])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    ragged = [(X[:4], y[:4]), (X[4:5], y[4:5]), (X[5:], y[5:])]
    tokens = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.randint(0, 4, (5, 3), generator=torch.Generator().manual_seed(3))
    return {
        "unbalanced, weighted": Problem(net(), nn.CrossEntropyLoss(weight=weights), ragged),
        "smoothed sum": Problem(net(), nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), ragged),
        "sequences": Problem(
            net(), losses.CrossEntropy(class_axis=-1), [(tokens[:2], labels[:2]), (tokens[2:], labels[2:])]
        ),
    }


WORLDS = worlds()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_four_terms_add_up(world, convention, vectors):
    problem, terms = WORLDS[world], parts(**CONVENTIONS[convention])
    V = vectors(problem.size)
    G = registry.build("ggn").lower(problem) @ V
    separate = sum(term.lower(problem) @ V for term in terms.values())
    total = terms["ggn_class"] + terms["ggn_cross"] + terms["ggn_within"] + terms["ggn_same"]
    for got in (separate, total.lower(problem) @ V):
        assert (got - G).norm() <= 1e-12 * G.norm()
    for term in terms.values():
        dense = term.lower(problem).to_dense()
        assert torch.allclose(dense, dense.T, atol=1e-13)
        assert torch.linalg.eigvalsh(dense)[0] >= -1e-12
        assert dense.norm() > 1e-3


@pytest.mark.parametrize("world", WORLDS)
def test_stored_means_give_the_same_matrices(world, vectors):
    problem = WORLDS[world]
    V = vectors(problem.size)
    for name in NAMES:
        a = registry.build(name).lower(problem) @ V
        b = registry.build(name, stored=True).lower(problem) @ V
        assert (a - b).norm() <= 1e-12 * a.norm()


def closed_form(classes=4, size=5, t=2.0, a=0.3):
    """Inputs t e_c ± √D e_j, a linear model at zero with offsets that put 1 − a on the true class."""
    inputs, labels = [], []
    for c in range(classes):
        for j in range(size):
            for sign in (1, -1):
                x = torch.zeros(size, dtype=torch.float64)
                x[c] += t
                x[j] += sign * size**0.5
                inputs.append(x)
                labels.append(c)
    y = torch.tensor(labels)
    p = torch.full((len(y), classes), a / (classes - 1), dtype=torch.float64)
    p[range(len(y)), y] = 1 - a
    X = torch.cat([torch.stack(inputs), p.log()], 1)

    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.zeros(classes, size, dtype=torch.float64))

        def forward(self, x):
            return x[:, :size] @ self.W.T + x[:, size:]

    return Problem(Offset(), nn.CrossEntropyLoss(), [(X[:17], y[:17]), (X[17:], y[17:])])


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("C", "D", "t", "a"), [(4, 5, 2.0, 0.3), (3, 4, 1.5, 0.2)])
def test_closed_form_spectra_term_by_term(C, D, t, a, stored):
    problem = closed_form(C, D, t, a)
    q, s = a / (C - 1), t * t
    b = q * (2 - a * C / (C - 1))
    expected = {
        "ggn_class": [q * s * (1 - a) ** 2] * C,
        "ggn_cross": [q * s / C] * (C * (C - 2)),
        "ggn_within": [b] * (D * (C - 1)),
        "ggn_same": [q * a * s * (1 - a)] * C,
    }
    for name, values in expected.items():
        got = torch.linalg.eigvalsh(registry.build(name, stored=stored).lower(problem).to_dense())
        want = torch.tensor(sorted([0.0] * (C * D - len(values)) + values), dtype=torch.float64)
        assert torch.allclose(got, want, atol=1e-12), name
    whole = torch.linalg.eigvalsh(registry.build("ggn").lower(problem).to_dense()).flip(0)
    assert torch.allclose(whole[:C], torch.full((C,), q * s * (1 - a) + b, dtype=torch.float64), atol=1e-12)


def test_removing_the_class_term_takes_the_outliers_down():
    """Papyan's figure 5 on a trained network: each of the C − 1 outliers owes more to ``ggn_class`` than to any other term."""
    problem = trained_on_digits()
    build = registry.build

    def top(*removed):
        expr = build("ggn") - sum((build(name) for name in removed[1:]), build(removed[0])) if removed else build("ggn")
        return eigsh(expr.lower(problem), k=10, which="LA", return_eigenvectors=False, tol=1e-4)[::-1]

    whole, rest = top(), top("ggn_class")
    outliers = slice(0, 9)
    assert (rest[outliers] < 0.8 * whole[outliers]).all()
    assert rest[outliers].sum() < 0.65 * whole[outliers].sum()
    for other in ("ggn_cross", "ggn_within", "ggn_same"):
        assert (top(other)[outliers].sum() > 1.2 * rest[outliers].sum()).all(), other
    # Without both between-class terms nothing but the bulk is left.
    assert top("ggn_class", "ggn_cross")[0] < 0.5 * whole[0]


def test_removing_the_class_term_removes_the_largest_outliers():
    """Where the features of different classes are nearly orthogonal, all C of them, down to what was eigenvalue C + 1."""
    problem, build = separated_on_digits(), registry.build
    pairs = build("ggn").lower(problem).exact("eigh")
    # Both matrices live in the column space U of the GGN.
    U = pairs.vectors(slice(None))
    rest = torch.diag(pairs.eigenvalues) - U.T @ (build("ggn_class").lower(problem) @ U)
    before, after = pairs.eigenvalues.flip(0), torch.linalg.eigvalsh(rest).flip(0)
    assert before[9] > 1.5 * before[10]  # C = 10 outliers
    assert after[0] < before[9]
    assert before[10] * (1 - 1e-6) <= after[0] < 1.3 * before[10]  # no matrix of rank C could take more (Weyl)


def separated_on_digits():
    """Three hidden layers without biases, with batch normalisation, trained with weight decay on 15 images a class."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    y = torch.tensor(labels)
    chosen = torch.cat([torch.nonzero(y == c)[:15, 0] for c in range(10)])
    X, y = torch.tensor(images, dtype=torch.float32)[chosen] / 16, y[chosen]
    X = X - X.mean(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, affine=False), nn.ReLU()]
    model, loss = nn.Sequential(*layers, nn.Linear(64, 10, bias=False)), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for _ in range(100):
        for rows in torch.randperm(len(X)).split(50):
            optimizer.zero_grad()
            (loss(model(X[rows]), y[rows]) + 2.5e-3 * sum(p.square().sum() for p in model.parameters())).backward()
            optimizer.step()
        schedule.step()
    return Problem(model.eval().double(), loss, (X.double(), y))


def trained_on_digits():
    """Three hidden layers with batch normalisation, 40 epochs with weight decay."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64, affine=False), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 16), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for _ in range(40):
        for rows in torch.randperm(len(X)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return Problem(model.eval(), nn.CrossEntropyLoss(), (X, y))


def test_a_knockout_is_one_sweep(counted_model, vectors):
    problem, calls = counted_model("mlp", cache=0)
    expr = registry.build("ggn") - registry.build("ggn_class") - registry.build("ggn_cross")
    op = expr.lower(problem)
    assert op.explain().count("sweep:") == 1
    op @ vectors(problem.size, 1)
    before = calls()
    op @ vectors(problem.size, 1)
    batches = len(make("mlp").batches)
    # Fresh: the totals and the product are a pass each, and a pass is a call for the tangent and one for the cotangent.
    assert calls() - before <= 4 * batches
    assert str(expr) == "ggn - ggn_class - ggn_cross"


def test_explicit_terms_have_structured_inverses(vectors):
    problem = WORLDS["unbalanced, weighted"]
    term = registry.build("ggn_class", stored=True) + registry.build("ggn_cross", stored=True)
    V = vectors(problem.size)
    op = inverse(term + 0.1 * Identity).lower(problem)
    A = term.lower(problem).to_dense() + 0.1 * torch.eye(problem.size)
    assert torch.allclose(op @ V, torch.linalg.solve(A, V), atol=1e-10)
    assert "woodbury: chosen" in op.explain()


def test_names_print_and_parse():
    for options in CONVENTIONS.values():
        for term in parts(**options).values():
            assert parse(str(term)) == term
    assert str(registry.build("ggn_within", own="same")) == "ggn_within(own='same')"


def test_other_losses_and_options_are_refused(problem_of):
    for name in NAMES:
        for stored in (False, True):
            with pytest.raises(LossError, match="softmax cross-entropy"):
                registry.build(name, stored=stored).lower(problem_of("linear"))
    with pytest.raises(ExpressionError, match="no class means to store"):
        registry.build("ggn_same", own="same", stored=True)
