"""Sphinx configuration. What is generated from the code is made by ``_ext/curvalg_docs``."""

from __future__ import annotations

import os
import sys
import warnings

# Examples are small; threads that wait for each other take longer than they save. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]  # the law book shows the witnesses of the tests

from curvalg_docs.gallery import stage  # noqa: E402

import curvalg  # noqa: E402

# A torchvision that was built for another torch comes with BackPACK and cannot be imported; libraries that pages use try to.
try:
    import torchvision  # noqa: F401
except Exception:
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]
    sys.modules["torchvision"] = None  # type: ignore[assignment]

project = "curvalg"
author = "the curvalg developers"
copyright = author
version = release = curvalg.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "myst_parser",
    "curvalg_docs",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "_ext", "checks", "_generated/include", "_generated/examples", "images"]
nitpicky = True
# Names of other projects resolve only with their inventories, which take a network: `CURVALG_DOCS_INTERSPHINX=1 make docs`.
if os.environ.get("CURVALG_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
# Foreign names, type variables, and the private aliases that annotations spell out.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|numpy|np|scipy|collections|typing|types|os|pathlib|optional|nn|matplotlib|abc|_pytest|pytest|enum|inspect|contextlib)(\..*)?",
    ),
    ("py:.*", r"(None|True|False|str|int|float|bool|dict|list|tuple|set|frozenset|type|object|complex|property|bytes)"),
    ("py:.*", r"(Exception|TypeError|ValueError|LookupError|RuntimeError|AssertionError|UserWarning|ABC)"),
    (
        "py:.*",
        r"(Tensor|Any|Callable|Iterator|Iterable|Mapping|Sequence|Collection|Literal|ClassVar|Generic|LinearOperator)",
    ),
    ("py:.*", r".*\b(F|OutputT|Stats)"),
]

# -- docstrings --------------------------------------------------------------------------------------------------------

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

# -- pages -------------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"curvalg {release}"
html_static_path = ["_static"]
html_css_files = ["curvalg.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
templates_path: list[str] = []

# -- gallery -----------------------------------------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": stage(HERE.parent / "gallery", HERE / "_generated" / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"[\\/]plot_",
    "write_computation_times": False,
    "within_subsection_order": "curvalg_docs.gallery.by_difficulty",
    "abort_on_example_error": False,
    "only_warn_on_example_error": False,
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1,
    "plot_gallery": os.environ.get("CURVALG_DOCS_GALLERY", "1") != "0",
    "matplotlib_animations": False,
    "remove_config_comments": True,
    "default_thumb_file": None,
    "copyfile_regex": r"$^",
}
warnings.filterwarnings("ignore", message="Matplotlib is currently using agg")
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
