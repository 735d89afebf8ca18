"""The first scripts of users of other libraries, beside ours on the page: both are run, and give the same numbers."""

from __future__ import annotations

import re

import pytest
import torch
from curvalg_docs import pages


def first_script(page, library):
    """The code of another library in its section."""
    section = page.read_text(encoding="utf-8").split(f"## {library}")[1].split("\n## ")[0]
    (theirs,) = re.findall(r"^```py\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return compile(theirs, str(page), "exec", dont_inherit=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "ours", "tolerance"), [("curvlinops", "top", 1e-9), ("PyHessian", "largest", 1e-3)]
)
def test_a_first_script_gives_the_same_numbers(library, ours, tolerance, docs, tmp_path):
    page = docs / "howto" / "migration.md"
    namespace = pages.run(page, tmp_path)
    namespace["model"].requires_grad_(True)
    exec(first_script(page, library), namespace)
    there, here = (torch.as_tensor(namespace[name]).double().sort().values for name in ("there", ours))
    assert torch.allclose(there, here, rtol=tolerance), (there, here)


@pytest.mark.filterwarnings("ignore")
def test_a_neumann_series_is_theirs(docs, tmp_path):
    curvlinops = pytest.importorskip("curvlinops")
    from curvlinops.examples import IdentityLinearOperator

    names = pages.run(docs / "howto" / "migration.md", tmp_path)
    model, v = names["model"], names["v"]
    params = list(model.parameters())
    ggn = curvlinops.GGNLinearOperator(model, names["loss"], params, names["data"], check_deterministic=False)
    identity = IdentityLinearOperator([p.shape for p in params], v.device, v.dtype)
    theirs = curvlinops.NeumannInverseLinearOperator(ggn + 0.1 * identity, num_terms=20, scale=0.5)
    torch.testing.assert_close(names["neumann"] @ v, theirs @ v)


@pytest.mark.filterwarnings("ignore")  # of what is deprecated in torch and pandas since
def test_the_first_script_of_kronfluence(docs, tmp_path, monkeypatch):
    pytest.importorskip("kronfluence")
    page = docs / "howto" / "migration.md"
    namespace = pages.run(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    here, own = namespace["here"], 50 * namespace["self_influence"](namespace["damped"])
    by_layer = sum(namespace["influence"](namespace["damped"], namespace["queries"], by="layer").scores.values())
    exec(first_script(page, "kronfluence"), namespace)
    torch.testing.assert_close(namespace["there"], here, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(namespace["there"], 50 * by_layer, rtol=1e-3, atol=1e-4)
    analyzer, scores = namespace["analyzer"], namespace["ScoreArguments"](damping_factor=0.1)
    sets = namespace["TensorDataset"](namespace["X"], namespace["y"])
    analyzer.compute_self_scores("own", "ekfac", sets, score_args=scores)
    torch.testing.assert_close(analyzer.load_self_scores("own")["all_modules"], own, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of what is deprecated in torch since
def test_the_first_script_of_laplace_torch(docs, tmp_path):
    pytest.importorskip("laplace")
    page = docs / "howto" / "migration.md"
    namespace = pages.run(page, tmp_path)
    exec(first_script(page, "laplace-torch"), namespace)
    torch.testing.assert_close(namespace["there"], namespace["probabilities"], rtol=1e-4, atol=1e-6)
    theirs = float(namespace["la"].log_marginal_likelihood())
    assert namespace["posterior"].log_evidence() == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("library", ["curvlinops", "PyHessian", "laplace-torch", "kronfluence"])
def test_first_scripts_are_python_also_where_the_library_is_missing(library, docs):
    assert first_script(docs / "howto" / "migration.md", library)
