"""How Sphinx builds the site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`.

Nothing is fetched: formulas become MathML here, which browsers draw by themselves, and no other site's index is read.
Mocks play array libraries that are not installed, so that the page of `gradclip.torch` is there without torch.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.errors import SphinxError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gradclip  # noqa: E402  # that of this checkout

project = "gradclip"
author = "The gradclip developers"
project_copyright = "The gradclip developers, MIT licence"
version = release = gradclip.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
needs_sphinx = "9.0"
smartquotes_action = "D"  # dashes; quotes stay as they are, for "leaf" is a value to be copied

# Markdown: headings have the anchors that GitHub gives them.
myst_heading_anchors = 4

# Docstrings: a name in single backticks is code, and a link if it is a name of gradclip.
default_role = "py:name"
napoleon_google_docstring = False
napoleon_use_param = False  # "norm_type, per : as in ..." stays one entry
napoleon_use_rtype = False
napoleon_preprocess_types = False
autodoc_typehints = "none"  # the types of parameters stand in the docstrings, in words
LIBRARIES = ("torch", "jax", "optax", "cupy", "mpi4py")
autodoc_mock_imports = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
autodoc_member_order = "bysource"
maximum_signature_line_length = 70  # longer ones have a line for each parameter: they fit on a phone
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "gradclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


def mathml(tex: str, as_block: bool) -> str:
    r"""LaTeX as MathML. docutils knows `\Bigl(` and `\Bigr)`, and TeX's plain `\Big` is one of the two."""
    tex = re.sub(r"\\([bB]igg?)(?=\s*[(\[])", r"\\\1l", tex)
    tex = re.sub(r"\\([bB]igg?)(?=\s*[)\]])", r"\\\1r", tex)
    try:
        drawn = tex2mathml(tex, as_block=as_block)
    except MathError as error:
        raise SphinxError(f"the formula {tex!r} does not become MathML: {error}") from error
    bar = r'<mo(?: stretchy="false")?>([|‖])</mo>'  # bars of one size, close to what is between them
    return re.sub(bar, r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', drawn)


def visit_math(self: Any, node: nodes.Element) -> None:
    self.body.append(mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.Element) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math") + mathml(node.astext(), as_block=True) + "</div>\n")
    raise nodes.SkipNode


class Name(PyXRefRole):
    """Sphinx's `py:obj`, but that `.grad` keeps its dot."""

    def process_link(
        self, env: Any, refnode: nodes.Element, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        return title, super().process_link(env, refnode, has_explicit_title, title, target)[1]


_texts: dict[str, list[str]] = {}


def keep_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon, which takes what stands before a colon in an attribute's text for its type."""
    if what == "attribute":
        _texts[name] = list(lines)


def give_text_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After napoleon."""
    lines[:] = _texts.pop(name, lines)


def setup(app: Sphinx) -> None:
    app.add_role_to_domain("py", "name", Name())
    app.connect("autodoc-process-docstring", keep_text, priority=400)  # napoleon: 500
    app.connect("autodoc-process-docstring", give_text_back, priority=600)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
