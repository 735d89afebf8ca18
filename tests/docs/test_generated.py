"""What is generated from the code is complete."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import figures
import pytest
from curvalg_docs import benchmarks, catalogue, diagram, gallery, laws, pictures, plain, strategies
from curvalg_docs.problem import small_problem

from curvalg import registry
from curvalg.expr import ALIASES
from curvalg.rewrite import LAWS

TERMS = sorted(set(registry.names()) - set(ALIASES))


def test_the_law_book_has_every_law():
    book = laws.law_book()
    for number, law in enumerate(LAWS, 1):
        assert f"**{number}. {law.name[0].upper()}{law.name[1:]}.**" in book
        assert law.statement in book
    assert "letter=" not in book


def test_every_chapter_of_the_law_book_has_a_title():
    assert {laws.chapter(law) for law in LAWS} == set(laws.TITLES)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_example_of_a_law_shows_that_it_fired(law):
    before, after = laws.example(law).split(" → ")
    assert before
    # Matrices of arrays print their sizes alone, which a law may leave as they were.
    assert before != after or "<" in before


def test_the_strategy_table_has_every_strategy(inside):
    names = list(inside["strategies"])
    assert list(strategies.EXAMPLES) == names
    table = strategies.strategy_table()
    for number, name in enumerate(names, 1):
        assert f"## {number}. {name}\n" in table
    assert table.count("Cost there: ") == len(names)
    # The last one takes what all others declined.
    assert set(strategies.refusals()) == set(names[:-1])


def test_the_catalogue_lists_every_registered_term():
    assert sorted(catalogue.names()) == TERMS
    index = catalogue.index()
    assert all(f"<catalogue-{name}>" in index for name in TERMS)


def test_the_catalogue_lists_a_term_that_is_registered_later():
    with registry.scoped():
        registry.register("brand_new", lambda: registry.build("ggn"))
        assert "<catalogue-brand_new>" in catalogue.index()


@pytest.mark.parametrize("name", TERMS)
def test_a_page_of_the_catalogue_says_everything(name):
    page = catalogue.page(name)
    for needed in (
        f".. _catalogue-{name}:",
        ".. docstring:: ",
        f"{name}.png",
        "Options",
        "Facts",
        "Cost",
        "Model calls",
    ):
        assert needed in page
    spec = registry.spec(name)
    assert spec.summary
    assert all(f"``{option.name}``" in page for option in spec.options)


@pytest.mark.parametrize("name", TERMS)
def test_docstrings_of_terms_have_a_formula_shapes_and_every_option(name):
    spec = registry.spec(name)
    text = spec.factory.__doc__ or ""
    assert any(shape in text for shape in ("D × D", "M × D", "M × M")), f"{name}: no shape"
    missing = [option.name for option in spec.options if f"{option.name}: " not in text]
    assert not missing, f"{name}: options without a word: {missing}"


UNCITED = {
    "residual": "the Hessian minus the GGN, by definition",
    "centered_covariance": "a covariance",
    "jacobian": "a derivative",
    "loss_hessian": "a derivative",
    "ggn_mc": "its exact form is cited",
    "fisher_mc": "its exact form is cited",
}
"""Terms that need no reference, and why."""


@pytest.mark.parametrize("name", TERMS)
def test_terms_cite_their_source(name):
    text = registry.spec(name).factory.__doc__ or ""
    cited = "arXiv" in text or any(f"{year}" in text for year in range(1950, 2030))
    assert cited != (name in UNCITED)


def test_costs_are_counted():
    assert catalogue.cost("hessian") == catalogue.Cost(first=1, further=0, without=1)
    assert 2 <= catalogue.cost("ekfac").first <= 2.5  # two passes, and one row before them


def test_pictures_are_drawn(tmp_path):
    problem = small_problem()
    for name in ("ggn_class", "jacobian", "ntk"):
        op = registry.build(name).lower(problem)
        pictures.draw(op, tmp_path / "whole.png")
        pictures.draw_small(op, tmp_path / "small.png")
        assert min(figures.ink(path) for path in tmp_path.iterdir()) > figures.LEAST


def test_the_small_problem_is_always_the_same():
    first, second = small_problem(), small_problem(batches=3)
    assert first.value() == pytest.approx(second.value(), rel=1e-12)
    assert first.num_samples == 18


def test_the_diagram_is_drawn_and_does_not_change(tmp_path):
    diagram.draw(tmp_path / "a.svg")
    diagram.draw(tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert len(list(ET.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}path"))) > 50


def test_benchmarks_say_how_to_get_results_where_there_are_none(tmp_path):
    assert benchmarks.tables(tmp_path, tmp_path / "pictures") == benchmarks.MISSING


def test_benchmarks_show_every_file_of_results(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    for name in ("cpu", "gpu"):
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps({}), encoding="utf-8")
    asked = []

    def run(command, **options):
        asked.append(command)
        if command[3] == "plot":
            folder = Path(command[-1])
            folder.mkdir(parents=True)
            (folder / "products-hessian.png").touch()
        return SimpleNamespace(returncode=0, stdout="| a |\n|---|\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    shown = benchmarks.tables(tmp_path, tmp_path / "_generated" / "benchmarks")
    assert "## cpu" in shown
    assert "## gpu" in shown
    commands = [[sys.executable, "-m", "benchmarks", command] for command in ("plot", "table")]
    assert [command[:4] for command in asked] == commands * 2
    assert "](_generated/benchmarks/gpu/products-hessian.png)" in shown
    assert "memory.png" not in shown  # nothing of it was measured


def test_results_that_cannot_be_read_fail_the_build(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr="no"))
    with pytest.raises(RuntimeError, match=r"cpu\.json"):
        benchmarks.tables(tmp_path, tmp_path / "pictures")


def test_every_example_of_the_gallery_is_staged_and_nothing_else(tmp_path, docs):
    source = docs.parent / "gallery"
    (tmp_path / "plot_gone.py").write_text("", encoding="utf-8")
    gallery.stage(source, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.rst", *(p.name for p in source.glob("plot_*.py"))}
    assert {*gallery.FIRST} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("line", "escaped"),
    [
        ("shape (n, *output.shape)", r"shape (n, \*output.shape)"),
        ("the largest |λ|", r"the largest \|λ\|"),
        ("``A * B`` stays, 2 * A does not", r"``A * B`` stays, 2 \* A does not"),
        (r"(samples, \*noise_shape)", r"(samples, \*noise_shape)"),
        ("size: n.", r"size: n\."),
    ],
)
def test_prose_of_docstrings_is_no_markup(line, escaped):
    assert plain.escape(line) == escaped


def test_examples_of_docstrings_stay_as_they_are():
    text = ["The |x|.", "", ">>> 2 * 3", "6 * 1", "", "And * again."]
    assert plain.lines(text) == ["The \\|x\\|.", "", ">>> 2 * 3", "6 * 1", "", "And \\* again."]


@pytest.mark.parametrize(
    ("tex", "beside"),
    [(r"\bar g_{ck}", True), (r"\bar{g}_{ck}", True), (r"\dot z", False), (r"\bar\delta_n", True)],
)
def test_formulas_become_mathml_with_subscripts_beside_accents(tex, beside):
    from curvalg_docs import mathml

    found = mathml.convert(tex)
    assert found.startswith("<math")
    assert "<mover" in found
    assert ("<msub" in found) == beside
    assert "munder" not in found


def test_formulas_that_are_not_known_raise():
    from curvalg_docs import mathml

    with pytest.raises(ValueError, match="nosuchmacro"):
        mathml.convert(r"\nosuchmacro{x}")


def test_blocks_of_formulas_are_displayed():
    from curvalg_docs import mathml

    assert 'display="block"' in mathml.convert("a = b", block=True)


@pytest.mark.parametrize(
    ("tex", "spaces"),
    [
        (r"\frac{1}{N} \operatorname{tr} H", 2),  # on both sides
        (r"\operatorname{tr} H", 1),
        (r"\operatorname{diag}(p)", 0),
        (r"\log_{10} (x)", 0),
        (r"\log p", 1),
    ],
)
def test_names_of_functions_stand_apart_from_letters(tex, spaces):
    from curvalg_docs import mathml

    assert mathml.convert(tex).count("<mspace") == spaces


def test_bars_of_a_modulus_stand_close():
    from curvalg_docs import mathml

    for tex, bar in ((r"10^{-4} |\lambda|", "|"), (r"2 \lVert v \rVert", "‖")):
        assert mathml.convert(tex).count(f' lspace="0" rspace="0">{bar}</mo>') == 2
