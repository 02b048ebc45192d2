"""The site: built as CONTRIBUTING.md says, with warnings as errors; its links followed, its API held to the code."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import gradclip

ROOT = Path(__file__).parents[1]
NEEDED = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(NEEDED), reason=f"the site needs {', '.join(NEEDED)}: pip install 'gradclip[docs]'"),
]

#: The pages of docs/api/ by module; each name of a module's `__all__` has an entry there.
API = {
    "gradclip" if path.stem == "gradclip" else f"gradclip.{path.stem}": f"api/{path.stem}.html"
    for path in sorted((ROOT / "docs" / "api").glob("*.md"))
    if path.stem != "index"
}

#: HTML elements that have no end.
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """The anchors of a page, where it leads to, and the text of each API entry."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.signatures: dict[str, str] = {}  # the text of <dt id="gradclip.norms">
        self.described: dict[str, str] = {}  # that of the <dd> after it
        self.math = ""
        self._open: list[tuple[str, str, str]] = []  # elements that are not closed yet: tag, class, API entry
        self._entry = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name = given.get("id") or ""
        if name:
            assert name not in self.ids, f"the anchor {name} is there twice"
            self.ids.add(name)
        self.links += [given[key] or "" for key in ("href", "src") if key in given]
        entry = ""
        if tag == "dt" and name.startswith("gradclip"):
            self._entry = entry = name
            self.signatures[name] = self.described[name] = ""
        if tag == "dd" and next((kind for open, kind, _ in reversed(self._open) if open == "dl"), "").startswith("py "):
            entry = self._entry  # Sphinx's class for entries, and for nothing else
        if tag not in VOID:
            self._open.append((tag, given.get("class") or "", entry))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if any(tag == "math" for tag, *_ in self._open):
            self.math += data
        tag, entry = next(((tag, entry) for tag, _, entry in reversed(self._open) if entry), ("", ""))
        if entry:
            texts = self.signatures if tag == "dt" else self.described
            texts[entry] += data


def build(out: Path, *options: str) -> None:
    """One build with warnings as errors. No network: a proxy that leads nowhere."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", *options]
    done = subprocess.run(
        [*command, "-d", str(out / "doctrees"), str(ROOT / "docs"), str(out / "html")],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    out = tmp_path_factory.mktemp("site")
    build(out)
    html = out / "html"
    return {str(path.relative_to(html)): Page(path.read_text(encoding="utf-8")) for path in html.rglob("*.html")} | {
        str(path.relative_to(html)): Page("") for path in html.rglob("*") if path.is_file() and path.suffix != ".html"
    }


def broken(pages: dict[str, Page]) -> list[str]:
    """Links inside the site that lead nowhere."""
    out = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = os.path.normpath(Path(name).parent / unquote(parts.path)) if parts.path else name
            anchor = unquote(parts.fragment)
            if target not in pages or (anchor and anchor not in pages[target].ids):
                out.append(f"{name}: {link}")
    return out


def test_every_link_leads_somewhere(site):
    assert sum(len(page.links) for page in site.values()) > 500
    assert broken(site) == []


def test_links_that_lead_nowhere_are_found():
    pages = {
        "a.html": Page('<a href="b/c.html#there">x</a><a href="b/d.html">x</a><img src="no.png">'),
        "b/c.html": Page(
            '<p id="here"><a href="../a.html#gone">x</a><a href="#here">x</a><a href="https://e.org/x">x</a>'
        ),
    }
    assert broken(pages) == ["a.html: b/c.html#there", "a.html: b/d.html", "a.html: no.png", "b/c.html: ../a.html#gone"]


def test_every_page_of_docs_is_there(site):
    sources = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert {source.removesuffix(".md") + ".html" for source in sources} <= set(site)


def test_nothing_is_loaded_from_elsewhere(site):
    """No script, style or picture of another host."""
    for name, page in site.items():
        far = [link for link in page.links if urlsplit(link).netloc and link.endswith((".js", ".css", ".png", ".svg"))]
        assert far == [], name


def test_formulas_are_formulas(site):
    """MathML, and no command of LaTeX that was left over."""
    pages = [page for name, page in site.items() if name.startswith("api/") and page.math]
    assert len(pages) >= 2
    assert not any("\\" in page.math for page in pages)


def test_every_public_module_has_a_page():
    package = Path(gradclip.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert set(API) == {"gradclip"} | {f"gradclip.{name}" for name in modules if not name.startswith("_")}


@pytest.mark.parametrize("module", API)
def test_every_public_name_has_its_signature_and_a_description(site, module):
    there = pytest.importorskip(module, reason=f"{module} needs its library")
    page = site[API[module]]
    for name in there.__all__:
        full, thing = f"{module}.{name}", getattr(there, name)
        assert full in page.signatures, f"{API[module]} has no entry for {full}"
        shown = re.sub(r"\s", "", page.signatures[full])
        assert full in shown, shown
        if full != "gradclip.LeafError":  # it takes what a TypeError takes
            for parameter in inspect.signature(thing).parameters.values():
                told = re.escape(str(parameter.replace(annotation=parameter.empty)))  # "norm_type=2.0"
                assert re.search(rf"[(,]{told}[,)]", shown), f"{full}: {told} is not in {shown}"
        first = (inspect.getdoc(thing) or "").split("\n")[0].replace("`", "")
        assert first, f"{full} has no docstring"
        assert first in " ".join(page.described[full].split()), f"{full} is described as {page.described[full]!r}"


def test_no_entry_is_without_a_description(site):
    empty = [name for page in site.values() for name, text in page.described.items() if not text.strip()]
    assert empty == []


def test_without_array_libraries_the_signatures_are_the_same(site, tmp_path):
    """Mocks in their place: torch is not needed to build the page of `gradclip.torch`."""
    build(tmp_path, "-D", "autodoc_mock_imports=torch,jax,cupy,mpi4py,optax")
    for name in API.values():
        page = Page((tmp_path / "html" / name).read_text(encoding="utf-8"))
        assert page.signatures == site[name].signatures
        assert page.signatures, name
