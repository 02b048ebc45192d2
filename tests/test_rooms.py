"""The rooms of README's table "How the code is laid out": who may import whom, and what `import gradclip` costs."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradclip

ROOT = Path(gradclip.__file__).parent

#: Each imported by its maker in `gradclip.distributed`, when that is called.
ENGINES = {"gradclip.distributed._jax", "gradclip.distributed._mpi", "gradclip.distributed._nccl"}

#: From the ground up. A room may import from the rows before its own, and from its own row nothing.
ROWS = (
    {"gradclip._types", "gradclip._errors"},
    {"gradclip._tree"},
    {"gradclip._numbers"},
    {"gradclip._law"},
    {"gradclip._norms"},
    {"gradclip._kernels"},  # a docstring and nothing else
    {"gradclip._kernels.dtypes"},
    {"gradclip._kernels.expressions", "gradclip._kernels.cuda_text"},
    {"gradclip._kernels.generic"},
    {"gradclip._kernels.blocks", "gradclip._kernels.scalars", "gradclip._kernels.threads"},  # NumPy's
    {
        "gradclip._kernels.cuda",
        "gradclip._kernels.cuda_table",
        "gradclip._kernels.cupy_compiler",
        "gradclip._kernels.cupy_graphs",
    },
    {"gradclip._kernels.jax_leaves"},
    {"gradclip._kernels.jax_sums"},
    {"gradclip._kernels.numpy", "gradclip._kernels.cupy", "gradclip._kernels.jax"},
    {"gradclip._dispatch"},
    {"gradclip._arguments"},
    {"gradclip._clip", "gradclip._clip_value"},
    ENGINES,
    {"gradclip.distributed"},
    {"gradclip"},
    {"gradclip.__main__"},
)
ROW_OF = {room: i for i, row in enumerate(ROWS) for room in row}
GROUND = {"gradclip._types", "gradclip._errors"}

MATHEMATICS = {"gradclip._numbers", "gradclip._law", "gradclip._norms"}

KERNELS_FOR_ALL = {"gradclip._kernels.dtypes", "gradclip._kernels.generic"}

#: Stricter than "only down".
ONLY = {
    "gradclip._tree": GROUND,
    "gradclip._numbers": {"gradclip._types"},
    "gradclip._law": {"gradclip._types", "gradclip._numbers"},
    "gradclip._norms": {"gradclip._types", "gradclip._numbers", "gradclip._law"},
    "gradclip._kernels.dtypes": {"gradclip._types"},
    "gradclip._kernels.generic": {"gradclip._types", *MATHEMATICS, "gradclip._kernels.dtypes"},
    "gradclip._kernels.blocks": {"gradclip._types", "gradclip._kernels.dtypes"},
    "gradclip._kernels.scalars": set(),
    "gradclip._kernels.threads": set(),
    "gradclip._kernels.numpy": {
        "gradclip._types",
        *MATHEMATICS,
        *KERNELS_FOR_ALL,
        *(f"gradclip._kernels.{name}" for name in ("blocks", "scalars", "threads")),
    },
    "gradclip._kernels.expressions": {"gradclip._types"},
    "gradclip._kernels.cuda_text": set(),
    "gradclip._kernels.cuda": {
        "gradclip._types",
        *MATHEMATICS,
        *KERNELS_FOR_ALL,
        "gradclip._kernels.expressions",
        "gradclip._kernels.cuda_text",
    },
    "gradclip._kernels.cuda_table": {"gradclip._types", *KERNELS_FOR_ALL, "gradclip._kernels.cuda_text"},
    "gradclip._kernels.cupy": {
        "gradclip._types",
        *MATHEMATICS,
        *KERNELS_FOR_ALL,
        "gradclip._kernels.cuda_text",
        "gradclip._kernels.cuda",
        "gradclip._kernels.cuda_table",
        "gradclip._kernels.cupy_compiler",
        "gradclip._kernels.cupy_graphs",
    },
    "gradclip._kernels.cupy_compiler": set(),
    "gradclip._kernels.cupy_graphs": {"gradclip._types", "gradclip._numbers", "gradclip._kernels.generic"},
    "gradclip._kernels.jax_leaves": {"gradclip._types"},
    "gradclip._kernels.jax_sums": {"gradclip._types", *MATHEMATICS, "gradclip._kernels.jax_leaves"},
    "gradclip._kernels.jax": {
        "gradclip._types",
        *MATHEMATICS,
        *KERNELS_FOR_ALL,
        "gradclip._kernels.jax_leaves",
        "gradclip._kernels.jax_sums",
    },
    "gradclip._arguments": {*GROUND, "gradclip._tree", "gradclip._dispatch"},
    **dict.fromkeys(ENGINES, GROUND),
    "gradclip.distributed": {*GROUND, "gradclip._tree", *ENGINES},
}

LIBRARIES = {
    "numpy",
    "jax",
    "jaxlib",
    "cupy",
    "torch",
    "dask",
    "array_api_strict",
    "ml_dtypes",
    "flax",
    "equinox",
    "scipy",
    "mpi4py",
    "distributed",
}

#: Where a library may be named or imported beside `_dispatch`: its own kernels; the registry of JAX, which the
#: tree looks up in sys.modules; NumPy's errstate, likewise; and the rooms whose subject it is.
MAY_NAME = {
    "gradclip._dispatch": LIBRARIES,
    "gradclip._kernels.blocks": {"numpy"},
    "gradclip._kernels.scalars": {"numpy"},
    "gradclip._kernels.numpy": {"numpy", "ml_dtypes"},
    "gradclip._kernels.cupy": {"cupy", "numpy"},
    "gradclip._kernels.cuda_table": {"numpy"},
    "gradclip._kernels.cupy_compiler": {"cupy"},
    "gradclip._kernels.cupy_graphs": {"cupy"},
    "gradclip._kernels.jax": {"jax", "numpy"},
    "gradclip._kernels.jax_leaves": {"jax", "numpy"},
    "gradclip._kernels.jax_sums": {"jax", "jaxlib", "numpy"},
    "gradclip._kernels.generic": {"numpy"},
    "gradclip._tree": {"jax"},
    "gradclip.distributed._jax": {"jax"},
    "gradclip.distributed._mpi": {"mpi4py", "numpy", "cupy"},
    "gradclip.distributed._nccl": {"cupy", "numpy"},
    "gradclip.__main__": LIBRARIES,
}
MAY_IMPORT_AT_ONCE = {
    "gradclip._kernels.blocks": {"numpy"},
    "gradclip._kernels.scalars": {"numpy"},
    "gradclip._kernels.numpy": {"numpy", "ml_dtypes"},
    "gradclip._kernels.cupy": {"cupy", "numpy"},
    "gradclip._kernels.cuda_table": {"numpy"},
    "gradclip._kernels.cupy_compiler": {"cupy"},
    "gradclip._kernels.cupy_graphs": {"cupy"},
    "gradclip._kernels.jax": {"jax", "numpy"},
    "gradclip._kernels.jax_leaves": {"jax", "numpy"},
    "gradclip._kernels.jax_sums": {"jax", "jaxlib", "numpy"},
    "gradclip.distributed._jax": {"jax"},
    "gradclip.distributed._mpi": {"mpi4py", "numpy"},
    "gradclip.distributed._nccl": {"cupy", "numpy"},
    "gradclip.__main__": {"numpy"},  # the demo, a program: nothing imports it
}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(ROOT.rglob("*.py"))
TREES = {room_of(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}
each_room = pytest.mark.parametrize("room", TREES)


def imported(node: ast.AST, room: str) -> list[str]:
    """The modules that one statement or call imports; for `from gradclip import x`, the module x if there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = room.split(".") if (ROOT.parent / room.replace(".", "/")).is_dir() else room.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        inner = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in TREES]
        return inner if len(inner) == len(node.names) else [base, *inner]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "import_module",
        "importlib.import_module",
        "__import__",
    ):
        arg = node.args[0]
        if isinstance(arg, ast.Constant):
            return [arg.value]
        if isinstance(arg, ast.JoinedStr) and isinstance(arg.values[0], ast.Constant):  # f"gradclip._kernels.{name}"
            start = arg.values[0].value
            return [name for name in TREES if name.startswith(start)] or [start]
        return ["?"]
    return []


def imports(room: str) -> list[str]:
    return [name for node in ast.walk(TREES[room]) for name in imported(node, room)]


def at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything outside functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_once(node)


def library_of(module: str) -> str | None:
    """The array library that importing a module means: array-api-compat's wrappers import theirs."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "array_api_compat" and len(parts) > 1 else parts[0]
    return name if name in LIBRARIES else None


def docstrings(tree: ast.AST) -> set[int]:
    """The string constants that stand alone as statements."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def test_every_file_is_a_room_that_is_known():
    assert set(TREES) <= set(ROW_OF), "a new room needs a row here, and in README's table"
    needed = set(ROW_OF) - {"gradclip._arguments"}
    assert needed <= set(TREES)
    assert not re.search(r"utils|misc|helpers|base", " ".join(TREES))


@each_room
def test_imports_go_down_only(room):
    ours = {name for name in imports(room) if name.split(".")[0] == "gradclip"}
    assert ours <= set(TREES), "an import of something that is not a room"
    above = {name for name in ours if ROW_OF[name] >= ROW_OF[room]}
    assert above == set()
    if room in ONLY:
        assert ours <= ONLY[room]
    assert "?" not in imports(room), "an import that this test cannot read"


def readme_rows() -> list[set[str]]:
    """The rooms that each row of README's table names: `_kernels/{numpy,jax}.py`, `cuda*.py`, a folder for its own."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = []
    for cell in re.findall(r"^\| (`.*?) \|", text.split("## How the code is laid out")[1], re.M):
        patterns = []
        for name in re.findall(r"`(.+?)`", cell):
            start, choices, end = re.fullmatch(r"([^{]*)(?:\{(.*)\})?([^}]*)", name).groups()
            patterns += [f"{start}{choice}{end}" for choice in (choices or "").split(",")]
        found = [sorted(ROOT.glob(f"{p}__init__.py" if p.endswith("/") else p)) for p in patterns]
        assert all(found), f"{cell}: a name without a file"
        rows.append({room_of(path) for paths in found for path in paths})
    return rows


def test_readme_names_every_room_once_and_imports_go_down_its_table():
    rows = readme_rows()
    assert len(rows) == 10
    above = {"gradclip", "gradclip.__main__", "gradclip._kernels"}  # the last is a docstring and nothing else
    assert sorted(room for row in rows for room in row) == sorted(set(TREES) - above)
    row_of = {room: i for i, row in enumerate(rows) for room in row}
    for room, row in row_of.items():
        for name in imports(room):
            assert not name.startswith("gradclip") or name in above or row_of[name] >= row, f"{room} imports {name}"


def test_the_reader_of_imports_sees_them_all():
    """The test above is only as good as `imported`."""
    code = """
from gradclip import _clip, clip_grad_norm
import gradclip._tree
def f():
    from gradclip._norms import law
    from . import _errors
    import_module(f"gradclip._kernels.{name}")
    importlib.import_module("jax.numpy")
    import_module(name)
"""
    found = {name for node in ast.walk(ast.parse(code)) for name in imported(node, "gradclip._dispatch")}
    kernels = {room for room in TREES if room.startswith("gradclip._kernels.")}
    assert found == {
        "gradclip",
        "gradclip._clip",
        "gradclip._tree",
        "gradclip._norms",
        "gradclip._errors",
        *kernels,
        "jax.numpy",
        "?",
    }


@each_room
def test_a_librarys_name_stays_in_its_room(room):
    tree = TREES[room]
    skip = docstrings(tree)
    named = {library for name in imports(room) if (library := library_of(name))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            named |= {node.value} & LIBRARIES
            named |= {name for name in LIBRARIES if node.value.startswith(f"{name}.")}
        if isinstance(node, ast.Attribute) and re.fullmatch("is_[a-z]+_(array|namespace)", node.attr):
            named |= {node.attr.split("_")[1]} & LIBRARIES
    assert named <= MAY_NAME.get(room, set())


@each_room
def test_array_libraries_are_imported_by_their_kernels_only(room):
    now = {lib for node in at_once(TREES[room]) for name in imported(node, room) if (lib := library_of(name))}
    assert now <= MAY_IMPORT_AT_ONCE.get(room, set())


@each_room
def test_no_file_is_too_long(room):
    (path,) = [path for path in FILES if room_of(path) == room]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 320, "a file over 300 lines wants to be two"


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    path = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_gradclip_imports_no_array_library():
    libraries = sorted(LIBRARIES)
    assert fresh(f"import sys, gradclip; print(sorted(set({libraries}) & set(sys.modules)))") == "[]"


def test_import_gradclip_takes_under_50_ms():
    code = """
import time, array_api_compat
start = time.perf_counter()
import gradclip
print(time.perf_counter() - start)
"""
    times = []
    for _ in range(15):
        times.append(float(fresh(code)))
        if min(times) < 0.05:
            break
    assert min(times) < 0.05, f"{min(times):.3f} s at best"


# -- what is public ------------------------------------------------------------------------------------------

NAMES = {
    "global_norm",
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value",
    "clip_grad_value_",
    "Clipped",
    "LeafError",
    "NonFiniteError",
    "set_num_threads",
}
VERBS = sorted(name for name in NAMES if name.islower())


def test_the_public_names():
    assert set(gradclip.__all__) == NAMES
    assert len(gradclip.__all__) == len(NAMES)
    assert all(hasattr(gradclip, name) for name in NAMES)
    visible = {name for name in vars(gradclip) if not name.startswith("_")}
    assert visible == {*NAMES, "distributed"}, "a public name that __all__ does not list"
    assert issubclass(gradclip.LeafError, TypeError)
    assert issubclass(gradclip.NonFiniteError, FloatingPointError)
    assert gradclip.Clipped._fields == ("grads", "norm")


@pytest.mark.parametrize("name", VERBS)
def test_docstrings_are_whole(name):
    doc = inspect.getdoc(getattr(gradclip, name)) or ""
    sections = re.findall(r"^(\w+)\n-+$", doc, re.MULTILINE)
    assert re.match(r"[A-Z].*[.:]", doc.split("\n\n")[0].replace("\n", " "))
    assert {"Parameters", "Examples"} <= set(sections)
    assert {"Returns", "Raises"} & set(sections)
    assert ">>> " in doc.split("Examples\n")[1]


@pytest.mark.parametrize("name", VERBS)
def test_every_argument_is_described(name):
    """In the docstring's own list, or by reference to the verb that this one follows."""
    verb = getattr(gradclip, name)
    described = set()
    for source in (name, name.rstrip("_")):
        doc = inspect.getdoc(getattr(gradclip, source))
        section = doc.split("Parameters\n----------\n")[-1].split("\n\n")[0]
        described |= set(re.findall(r"^(\w+) : ", section, re.MULTILINE))
    assert set(inspect.signature(verb).parameters) <= described


@pytest.mark.parametrize("name", VERBS)
def test_public_functions_are_typed(name):
    signature = inspect.signature(getattr(gradclip, name))
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", sorted(set(gradclip.distributed.__all__) - {"Engine"}))
def test_makers_of_all_reduce_are_typed_and_described(name):
    maker = getattr(gradclip.distributed, name)
    doc = inspect.getdoc(maker) or ""
    assert {"Parameters", "Returns", "Raises", "Notes", "Examples"} <= set(re.findall(r"^(\w+)\n-+$", doc, re.M))
    described = set(re.findall(r"^(\w+) : ", doc.split("Parameters\n----------\n")[1].split("\n\n")[0], re.M))
    signature = inspect.signature(maker)
    assert set(signature.parameters) == described
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation == "Engine"


def test_the_package_is_marked_as_typed():
    assert (ROOT / "py.typed").is_file()


def test_one_place_for_the_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|a|b|rc)\d+)?", gradclip.__version__)
    try:
        installed = importlib.metadata.version("gradclip")
    except importlib.metadata.PackageNotFoundError:
        installed = gradclip.__version__  # run from a source tree: nothing to compare
    assert gradclip.__version__ == installed
    stated = [room for room, tree in TREES.items() for node in ast.walk(tree)
              if isinstance(node, ast.Constant) and node.value == gradclip.__version__]  # fmt: skip
    assert stated == ["gradclip"]
