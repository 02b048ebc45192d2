"""What the documentation shows is run: docstrings, and the code of README.md and docs/. Links lead somewhere."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gradclip
from backends import MISSING

PACKAGE = Path(gradclip.__file__).parent
README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "_build" not in path.parts)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"  # a program
)

#: Engines, and `gradclip.distributed`, whose example with JAX is run.
NEEDS = {
    "gradclip._backends.torch.cuda": "cupy",
    "gradclip.distributed": "jax",
    "gradclip.distributed._jax": "jax",
    "gradclip.distributed._mpi": "mpi4py",
    "gradclip.distributed._nccl": "cupy",
    "gradclip.optax": "optax",
    "gradclip.optax._agc": "optax",
    "gradclip.optax._examples": "optax",
    "gradclip.optax._state": "optax",
    "gradclip.optax._units": "optax",
    "gradclip.torch": "torch",
    "gradclip.torch._dtensors": "torch",
    "gradclip.torch._parameters": "torch",
    "gradclip.distributed._torch": "torch",
}

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<body>.*?)^ *(?P=ticks) *$", re.M | re.S)
LEFT_OUT = re.compile(r"<!-- not run: (?P<reason>[^\n]*\S) -->\s*\Z")
SHOWN = {"text", "output"}
PYTHON = {"python", "py", "pycon"}
DIRECTIVE = re.compile(r"\{[\w-]+\}")  # a fence that Sphinx follows, "{toctree}": there is nothing to run


class Block(NamedTuple):
    """A fenced block of a Markdown file."""

    line: int
    language: str
    body: str
    not_run: str
    gap: str  # the text between the block before and this one


def blocks(text: str) -> list[Block]:
    out, end = [], 0
    for match in FENCE.finditer(text):
        gap, end = text[end : match.start()], match.end()
        body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
        reason = LEFT_OUT.search(gap)
        language = match["info"].strip().split(" ")[0].lower()
        out.append(
            Block(text.count("\n", 0, match.start()) + 1, language, body, reason["reason"] if reason else "", gap)
        )
    return out


def run_block(block: Block, name: str, namespace: dict[str, Any]) -> str:
    """Run one block in the namespace of its file; what it printed. Lines before it are padded, for tracebacks."""
    where = f"{name}:{block.line}"
    if re.search(r"^\s*>>> ", block.body, re.M):
        test = doctest.DocTestParser().get_doctest(block.body, namespace, where, name, block.line)
        test.globs = namespace  # shared with the blocks after it
        report = io.StringIO()
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write, clear_globs=False)
        assert report.getvalue() == "", report.getvalue()
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * block.line + block.body, name, "exec"), namespace)
    return printed.getvalue()


def run_markdown(text: str, name: str) -> int:
    """Run the Python blocks of a Markdown text in order, and compare what they print where it is shown."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    python, printed = 0, None
    for block in blocks(text):
        if block.language in PYTHON:
            python += 1
            printed = None
            if block.not_run:
                if ">>> " not in block.body:
                    compile(block.body, f"{name}:{block.line}", "exec")
                continue
            printed = run_block(block, name, namespace)
        elif block.language in SHOWN and printed is not None and not block.gap.strip():
            assert printed.split() == block.body.split(), f"{name}:{block.line}: it prints\n{printed}"
            printed = None
    return python


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    library = NEEDS.get(name) or name.partition("._backends.")[2].split(".")[0]
    if library in MISSING or (library in ("cupy", *NEEDS.values()) and importlib.util.find_spec(library) is None):
        pytest.skip(f"{name} needs {library}: {MISSING.get(library, 'not installed')}")
    module = importlib.import_module(name)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    tests = [t for t in doctest.DocTestFinder().find(module, name) if t.examples]
    for test in tests:
        runner.run(test, out=report.write)
    assert report.getvalue() == "", report.getvalue()
    if name in ("gradclip", "gradclip._clip"):
        assert len(tests) >= 1
        assert runner.tries >= 3


def test_every_public_function_has_an_example_that_was_run():
    found = {
        t.name
        for module in MODULES
        if module.count(".") == 1 and module not in NEEDS
        for t in doctest.DocTestFinder().find(importlib.import_module(module), "gradclip")
        if t.examples
    }
    verbs = {name for name in gradclip.__all__ if name.islower()}
    assert {f"gradclip.{name}" for name in verbs} <= found


def test_readme():
    assert README.is_file(), "README.md is missing"
    for name in ("jax", "optax"):
        pytest.importorskip(name, reason=f"README's training step needs {name}")
    text = README.read_text(encoding="utf-8")
    assert run_markdown(text, "README.md") >= 1


def test_readme_is_for_the_first_ten_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("name", PAGES)
def test_pages(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    python = [block for block in blocks(text) if block.language in PYTHON]
    runs = "\n".join(block.body for block in python if not block.not_run)
    for library in sorted(set(re.findall(r"^(?:import|from) (jax|optax|torch)\b", runs, re.M))):
        module = pytest.importorskip(library, reason=f"docs/{name} needs {library}")
        if library == "jax" and len(module.devices()) < 4:
            pytest.skip(f"docs/{name} needs 4 devices")
    assert run_markdown(text, f"docs/{name}") == len(python)


def test_fences_name_a_language_that_the_reader_knows():
    """A block in any other would not be looked at, and nobody would know."""
    for name in ("README.md", *(f"docs/{name}" for name in PAGES)):
        for block in blocks((README.parent / name).read_text(encoding="utf-8")):
            known = block.language in PYTHON | SHOWN | {"sh"} or DIRECTIVE.fullmatch(block.language)
            assert known, f"{name}:{block.line}: a block in {block.language!r}"


def anchors(text: str) -> set[str]:
    """What headings are called in links, on GitHub and on the site: `## What NaN does` is `#what-nan-does`."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_fences_are_closed_and_links_lead_somewhere(name):
    path = README.parent / name
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks(text)), "a fence that is not closed"
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", FENCE.sub("", text)):
        there = (path.parent / target).resolve() if target else path
        if there.parent != README.parent:  # the tests of a wheel have no more than README.md and docs/
            assert there.is_file(), f"{name} links to {target}"
            assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{name}: {target}#{anchor}"


def listed(name: str) -> list[str]:
    """The pages in the toctrees of a page, and of these, in the order of reading."""
    out = []
    for block in blocks((DOCS / name).read_text(encoding="utf-8")):
        if block.language == "{toctree}":
            entries = [line for line in block.body.splitlines() if line and not line.startswith(":")]
            pages = [str(Path(name).parent / f"{entry}.md") for entry in entries]
            out += [page for entry in pages for page in (entry, *listed(entry))]
    return out


def test_every_page_is_in_one_toctree():
    assert sorted(["index.md", *listed("index.md")]) == PAGES
    assert "](docs/index.md)" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "pattern"), [("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## \[(\d\S*)\]")]
)
def test_the_version_is_the_same_everywhere(name, pattern):
    path = README.parent / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside these tests")
    stated = re.search(pattern, path.read_text(encoding="utf-8"), re.M)
    assert stated is not None
    assert stated[1] == gradclip.__version__


GOOD = """
# Title

```python
x = 1 + 1
print("two", x)
```

```text
two  2
```

```python
>>> x + 1
3
>>> y = x * 5
```

<!-- not run: it needs a machine with eight devices -->
```python
import no_such_module
```

```sh
pip install gradclip
```

```{toctree}
:hidden:

another
```

- in a list:

  ```python
  assert y == 10
  ```
"""


def test_the_reader_of_markdown():
    """A runner that cannot fail would be worth nothing."""
    assert [b.language for b in blocks(GOOD)] == ["python", "text", "python", "python", "sh", "{toctree}", "python"]
    assert [b.not_run for b in blocks(GOOD)] == ["", "", "", "it needs a machine with eight devices", "", "", ""]
    assert run_markdown(GOOD, "good") == 4


@pytest.mark.parametrize(
    ("old", "new", "error", "match"),
    [
        ("two  2", "two 3", AssertionError, "good:9: it prints"),
        ("x + 1\n3", "x + 1\n4", AssertionError, r"Expected:(.|\n)*4"),
        ("y == 10", "y == 11", AssertionError, r"^$"),
        ("import no_such_module", "import = 3", SyntaxError, "invalid syntax"),
        ("<!-- not run: it needs a machine with eight devices -->", "", ModuleNotFoundError, "no_such_module"),
        (
            "<!-- not run: it needs a machine with eight devices -->",
            "<!-- not run: -->",
            ModuleNotFoundError,
            "no_such",
        ),
        ("x = 1 + 1", "x = 1 / 0", ZeroDivisionError, "division"),
    ],
)
def test_the_reader_of_markdown_finds_faults(old, new, error, match):
    assert old in GOOD
    with pytest.raises(error, match=match):
        run_markdown(GOOD.replace(old, new), "good")


def test_the_reader_of_headings():
    assert anchors(
        "# Infinity and NaN, where p <= 0\n\n```sh\n# no heading\n```\n## What `clipped_sum` promises\n"
    ) == {
        "infinity-and-nan-where-p--0",
        "what-clipped_sum-promises",
    }
