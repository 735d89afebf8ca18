"""Pages of the reference: a table of all names first, and no constructors of what users never construct."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from curvalg_docs import api, catalogue, made, pages

from curvalg import Batch, Problem
from curvalg.estimate import Estimate

ROOT = Path(__file__).parents[2]
DOCUMENTED = {name: value for _, name, value in api.names()}


def tabled(page: str) -> list[str]:
    """Names in the tables of a page, in their order."""
    return [name.rpartition(".")[2] for name in re.findall(r"^   \* - :py:obj:`~([\w.]+)`$", page, re.MULTILINE)]


def described(page: str) -> list[str]:
    """Names that a page describes, in their order."""
    found = re.findall(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)$", page, re.MULTILINE)
    return [name.rpartition(".")[2] for name in found]


@pytest.mark.parametrize("module", api.MODULES)
def test_a_page_begins_with_a_table_of_what_it_describes(module):
    page = api.page(module)
    assert tabled(page)
    assert tabled(page) == described(page)
    table = page.index(".. list-table::")
    entry = re.search(r"^\.\. (?:auto\w+|py:data):: ", page, re.MULTILINE)
    assert entry is not None
    assert table < entry.start()
    assert page.rindex(":py:obj:`~") < entry.start()


@pytest.mark.parametrize("module", api.MODULES)
def test_every_name_of_a_table_has_a_sentence(module):
    rows = re.findall(r"^   \* - :py:obj:`~[\w.]+`\n     - (.*)$", api.page(module), re.MULTILINE)
    assert rows
    assert all(len(row) > 10 for row in rows)


def test_what_users_write_comes_before_what_they_are_given():
    order = tabled(api.page("curvalg"))
    assert order[0] == "Problem"
    assert order.index("Problem") < order.index("Batch")
    # Within every other page too.
    for module in api.MODULES:
        if module != "curvalg":
            given = [name in made.MADE for name in tabled(api.page(module))]
            assert given == sorted(given)


def test_the_groups_of_the_first_page_have_every_name_once():
    grouped = [name for members in api.GROUPS.values() for name in members]
    assert sorted(grouped) == sorted(name for module, name, _ in api.names() if module == "curvalg")


def test_what_is_made_for_users_is_public():
    assert sorted(made.MADE - DOCUMENTED.keys()) == []


def code() -> list[tuple[str, str]]:
    """(file, code) of all that users read."""
    written = [(path.name, "\n".join(pages.blocks(path))) for path in sorted((ROOT / "docs").rglob("*.md"))]
    return written + [(path.name, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "gallery").glob("*.py"))]


def test_no_page_constructs_what_is_made_for_users():
    constructed = re.compile(rf"(?<![\w.])({'|'.join(sorted(made.MADE))})\(")
    # A page may have a class of its own with such a name.
    found = [(page, name, text) for page, text in code() for name in constructed.findall(text)]
    assert [(page, name) for page, name, text in found if f"class {name}(" not in text] == []


def test_arguments_of_results_are_their_attributes_and_others_are_left_out():
    text = [
        "What it is.",
        "",
        "Args:",
        "    value: a number,",
        "        or several.",
        "    other: not kept.",
        "",
        "More: text.",
    ]
    kept = ["What it is.", "", "Attributes:", "    value: a number,", "        or several.", "", "More: text."]
    assert made.fields(text, Estimate) == kept
    assert made.fields(text, Batch) == ["What it is.", "", "", "More: text."]


def test_constructors_are_hidden_in_the_built_page(tmp_path):
    pytest.importorskip("sphinx", reason="pip install sphinx")
    extension = ROOT / "docs" / "_ext"
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path[:0] = [{str(extension)!r}, {str(ROOT)!r}]\n"
        "extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon']\nadd_module_names = False\n"
        "def setup(app):\n    from curvalg_docs import made, plain\n    plain.setup(app)\n    made.setup(app)\n",
        encoding="utf-8",
    )
    entries = [
        f".. autoclass:: {value.__module__}.{value.__qualname__}\n   :no-index:\n"
        for value in (Problem, Batch, Estimate)
    ]
    (tmp_path / "index.rst").write_text("Title\n=====\n\n" + "\n".join(entries), encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-b", "text", "-q", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "out" / "index.txt").read_text(encoding="utf-8")
    problem, batch, estimate = re.split(r"^class ", shown, flags=re.MULTILINE)[1:]
    assert problem.startswith("Problem(model")
    assert batch.splitlines()[0] == "Batch"
    assert "Parameters:" in problem
    assert "Parameters:" not in batch
    assert estimate.splitlines()[0] == "Estimate"
    assert "Parameters:" not in estimate
    assert re.search(r"^   error\b", estimate, re.MULTILINE)  # kept, as an attribute


@pytest.mark.parametrize(
    ("annotation", "shown"),
    [
        ("Literal['a', 'b']", "``'a'``, ``'b'``"),
        ("Literal['a']", "``'a'``"),
        ("int", "``int``"),
        ("str | None", "``str | None``"),
    ],
)
def test_the_catalogue_shows_choices_and_no_types_of_them(annotation, shown):
    assert catalogue.values(annotation) == shown
