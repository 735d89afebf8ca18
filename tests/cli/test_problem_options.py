"""``--params``, ``--samples``, ``--device``, ``--dtype`` and ``--seed``: of every command that makes a problem."""

from __future__ import annotations

import json
import textwrap

import numpy as np
import pytest
import torch

from curvalg import Problem, parse

OPTIONS = {"--problem", "--arg", "--params", "--samples", "--device", "--dtype", "--seed"}

MADE = """
    import torch
    from curvalg import Problem, losses

    def make():
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        X, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
        return Problem(model, torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), [(X[:4], y[:4]), (X[4:], y[4:])])

    def loader():
        problem = make()
        data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*problem.data.source)))
        batches = torch.utils.data.DataLoader(data, batch_size=4)
        return Problem(problem.model.module, torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])), batches)

    def positions():
        X, y = torch.randn(5, 4, 3), torch.randint(0, 2, (5, 4))
        return Problem(torch.nn.Linear(3, 2), losses.CrossEntropy(class_axis=-1), (X, y))

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mix", torch.tensor([[1.0, 0.5], [0.0, 2.0]]))

        def forward(self, output, target):
            return ((output - target) @ self.mix).square().sum()

    class Stuck(torch.nn.Linear):
        def _apply(self, function, recurse=True):
            raise RuntimeError("this module stays where it is")

    def stuck():
        return Problem(Stuck(3, 2), torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))

    def own_loss():
        return Problem(torch.nn.Linear(3, 2), Mixed(), (torch.randn(5, 3), torch.randn(5, 2)), reduction="sum")

    def function():
        X, y = torch.randn(5, 3), torch.randn(5)
        return Problem(lambda p, x: x @ p["w"] + p["b"], torch.nn.MSELoss(), (X, y), params={"w": torch.ones(3), "b": torch.ones(())})
"""


@pytest.fixture
def made(module) -> str:
    return module(MADE)


def problem_of(name: str, seed: int = 0) -> Problem:
    """The problem as it is made under a seed, in this process."""
    namespace: dict[str, object] = {}
    exec(textwrap.dedent(MADE), namespace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return namespace[name]()  # type: ignore[operator, no-any-return]


def values(run, expression: str, problem: str, *options: object) -> tuple[np.ndarray, dict]:
    result = run("eigs", expression, "-p", problem, "--k", 2, "--tol", 0, "--json", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    return np.array(found["eigenvalues"]), found


def largest(expression: str, problem: Problem) -> np.ndarray:
    """The two of largest magnitude, as eigs finds them by default."""
    values = np.linalg.eigvalsh(parse(expression).lower(problem).to_dense().double().numpy())
    return np.sort(values[np.argsort(-np.abs(values))][:2])[::-1]


def test_every_command_that_makes_a_problem_has_them_all(commands) -> None:
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert name in ("terms", "doctor") or options >= OPTIONS, name


@pytest.mark.parametrize("patterns", [["0.*"], ["0.bias", "2.weight"], ["*.bias"]])
def test_params_are_those_of_a_problem_over_them(run, made, patterns: list[str]) -> None:
    found, record = values(run, "hessian", f"{made}:make", *(x for p in patterns for x in ("--params", p)))
    whole = problem_of("make")
    restricted = Problem(
        whole.model.module,
        torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])),
        whole.data.source,
        params=patterns,
    )
    np.testing.assert_allclose(found, largest("hessian", restricted), rtol=1e-5)
    assert record["shape"] == [restricted.size] * 2


def test_samples_decide_the_covariance(run, made) -> None:
    by_item, _ = values(run, "covariance", f"{made}:positions")
    by_position, _ = values(run, "covariance", f"{made}:positions", "--samples", "position")
    # By hand: gradients of the mean loss of each position, or their sums over a row.
    problem = problem_of("positions")
    (X, y), model = problem.data.source[0], problem.model.module
    p = model(X).softmax(-1) - torch.nn.functional.one_hot(y, 2)
    each = torch.cat([torch.einsum("ntc,nti->ntci", p, X).flatten(2), p], 2).detach().double() / 20
    for found, rows, scale in ((by_position, each.flatten(0, 1), 20), (by_item, each.sum(1), 5)):
        np.testing.assert_allclose(found, torch.linalg.eigvalsh(scale * rows.T @ rows).flip(0)[:2], rtol=1e-4)


@pytest.mark.parametrize("name", ["make", "loader", "positions", "own_loss", "function"])
def test_precision_of_model_loss_and_data(run, made, name: str) -> None:
    single, record = values(run, "ggn", f"{made}:{name}", "--dtype", "float64")
    assert record["dtype"] == "float64"
    np.testing.assert_allclose(single, largest("ggn", problem_of(name)), rtol=1e-5)
    residuals = record["residuals"]
    assert max(residuals) < 1e-12, "computed in float64"


def test_the_seed_is_that_of_the_problem(run, made) -> None:
    for seed in (0, 3):
        found, record = values(run, "ggn", f"{made}:make", "--seed", seed)
        np.testing.assert_allclose(found, largest("ggn", problem_of("make", seed)), rtol=1e-5)
        assert record["seed"] == seed


def test_the_random_state_of_the_caller_stays(run, made) -> None:
    before = torch.get_rng_state()
    values(run, "ggn", f"{made}:make", "--seed", 5)
    assert torch.equal(before, torch.get_rng_state())


def test_the_cpu_is_a_device_for_all(run, made) -> None:
    np.testing.assert_allclose(
        values(run, "ggn", f"{made}:make", "--device", "cpu")[0], values(run, "ggn", f"{made}:make")[0], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("make", ["--device", "abacus"], "--device abacus cannot be used here"),
        ("make", ["--device", "meta"], "there is cpu"),
        ("make", ["--params", "nothing.*"], "no parameter matches 'nothing.*'"),
        ("make", ["--dtype", "int8"], "--dtype"),
        ("make", ["--samples", "row"], "--samples"),
        ("stuck", ["--dtype", "float64"], "cannot be made --dtype float64: this module stays where it is"),
        ("function", ["--params", "w"], "this model is a function of a dict, all of which are chosen: w, b"),
    ],
)
def test_options_that_do_not_fit(run, made, name: str, options: list[str], message: str) -> None:
    result = run("eigs", "ggn", "-p", f"{made}:{name}", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_samples_that_the_loss_does_not_have(run, module) -> None:
    source = """
        import torch
        from curvalg import Problem

        def make():
            return Problem(torch.nn.Linear(3, 1), lambda z, y: ((z - y) ** 4).mean(), (torch.ones(4, 3), torch.ones(4, 1)))
    """
    result = run("eigs", "ggn", "-p", f"{module(source)}:make", "--samples", "position")
    assert result.exit_code == 2
    assert "samples='position' needs a loss that says where its positions are" in result.stderr
