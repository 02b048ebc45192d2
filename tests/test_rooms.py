"""The rooms of gradclip: who may import whom, who may name a library, and what `import gradclip` costs.

The rules go by folder, so that a new file costs no edit here: in a folder it obeys the folder's rules; beside
`_clip.py`, those of a verb; with a public name, those of what stands around gradclip.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gradclip
from gradclip._backends.generic import Backend

ROOT = Path(gradclip.__file__).parent

#: From the ground up, the first pattern that fits. A room imports from the rooms before its own, and within its own in
#: no circle.
ROOMS = (
    ("ground", ("_types.py", "_errors.py", "_dtypes.py", "_threads.py")),
    ("tree", ("_tree.py",)),
    ("numbers", ("_parts.py", "_scaled.py")),
    ("norms", ("_norms.py",)),
    ("groups", ("_groups.py",)),
    ("decide", ("_decide.py",)),
    ("backends", ("_backends/*.py",)),
    ("libraries", ("_libraries.py",)),
    ("leaves", ("_leaves.py",)),
    ("arguments", ("_arguments.py",)),
    ("shards", ("_shards.py", "_nonfinite.py")),
    ("calls", ("_call.py",)),
    ("package", ("__init__.py",)),  # before the verbs' pattern, above them all the same: see `rank`
    ("program", ("__main__.py",)),
    ("verbs", ("_*.py",)),
    ("around", ("*.py",)),  # a star stands for folders too: distributed/
)
STOREYS = [room for room, _ in ROOMS if room not in ("package", "program")] + ["package", "program"]

#: Beyond "only down": rooms that import from these and from nothing else.
ONLY = {
    "tree": {"ground"},
    "numbers": {"ground", "numbers"},
    "norms": {"ground", "numbers"},
    "decide": {"ground", "numbers", "norms"},
    "backends": {"ground", "numbers", "norms", "groups", "decide", "backends"},  # leaves and numbers, never trees
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
    "mlx",
    "optax",
    "matplotlib",
}

#: A library's name may stand in `_libraries.py` and in its own folder, and besides here, for the reason given.
ALSO_NAMED = {
    "_tree.py": {"jax"},  # its registry of pytree classes, where it is loaded
    "_backends/generic.py": {"numpy"},  # the host's numbers
}


#: Beyond their own: what else a folder names.
OTHERS = {"jax": ("jaxlib",), "optax": ("jax",), "numpy": ("ml_dtypes",), "monitor": ("matplotlib",)}
#: Whose arrays may be other libraries', too: plain tensors are worked on as NumPy's and CuPy's, on the same memory.
BESIDE = {"torch": ("numpy", "cupy", "ml_dtypes")}


def room_of(file: str) -> str:
    return next(room for room, patterns in ROOMS if any(fnmatch.fnmatch(file, pattern) for pattern in patterns))


def rank(file: str) -> int:
    return STOREYS.index(room_of(file))


def module_of(file: str) -> str:
    parts = ("gradclip", *Path(file).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
TREES = {file: ast.parse((ROOT / file).read_text(encoding="utf-8"), file) for file in FILES}
FILE_OF = {module_of(file): file for file in FILES}
each_file = pytest.mark.parametrize("file", FILES)


def imported(node: ast.AST, module: str) -> list[str]:
    """The modules that one statement or call imports; for `from gradclip import x`, the module x if there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split(".") if (ROOT.parent / module.replace(".", "/")).is_dir() else module.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        inner = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in FILE_OF]
        return inner if len(inner) == len(node.names) else [base, *inner]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "import_module",
        "importlib.import_module",
        "__import__",
    ):
        arg = node.args[0]
        if isinstance(arg, ast.Constant):
            return [arg.value]
        if isinstance(arg, ast.JoinedStr) and isinstance(arg.values[0], ast.Constant):  # f"gradclip._backends.{name}"
            start = arg.values[0].value
            return [name for name in FILE_OF if name.startswith(start)] or [start]
        return ["?"]
    return []


def imports(file: str) -> list[str]:
    return [name for node in ast.walk(TREES[file]) for name in imported(node, module_of(file))]


def files_imported(file: str) -> set[str]:
    """The files of gradclip that one imports, anywhere in it."""
    return {FILE_OF[name] for name in imports(file) if name in FILE_OF} - {file}


def own_library(file: str) -> str:
    """The library whose folder or public module a file belongs to: `_backends/jax/sums.py`, `torch/`, `optax.py`."""
    parts = file.split("/")
    if parts[0] == "_backends" and len(parts) > 2:
        return parts[1]
    return Path(parts[0]).stem if room_of(file) == "around" else ""


def may_name(file: str) -> set[str]:
    room, own = room_of(file), own_library(file)
    if room in ("libraries", "program") or file.split("/")[0] == "distributed":  # whose subject they are
        return LIBRARIES
    if not own:
        return ALSO_NAMED.get(file, set())
    # The host's arrays are NumPy's, whoever computes; bfloat16 on the host is ml_dtypes's.
    return {own, "numpy", *OTHERS.get(own, ()), *(BESIDE.get(own, ()) if room == "backends" else ())}


def may_import_at_once(file: str) -> set[str]:
    """What importing a file may import: files that are themselves imported only where the library is wanted."""
    if room_of(file) == "program" or own_library(file) or file.startswith("distributed/_"):
        return may_name(file) - ({"distributed"} if file == "distributed/__init__.py" else set())
    return set()


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


# -- imports ---------------------------------------------------------------------------------------------------------


@each_file
def test_imports_go_down_only(file):
    assert "?" not in imports(file), "an import that this test cannot read"
    ours = {name for name in imports(file) if name.split(".")[0] == "gradclip"}
    assert ours <= set(FILE_OF), "an import of something that is not there"
    above = {other for other in files_imported(file) if rank(other) > rank(file)}
    if room_of(file) in ("around", "program"):
        above.discard("__init__.py")  # the public names
    assert above == set()
    allowed = ONLY.get(room_of(file))
    if allowed is not None:
        assert {room_of(other) for other in files_imported(file)} <= allowed


def test_there_are_no_circles_inside_functions_included():
    graph = {file: files_imported(file) - {"__init__.py"} for file in FILES if file != "__init__.py"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_every_room_of_the_list_is_there():
    """A file that was renamed would fall to the verbs' looser rule in silence."""
    rooms = {room_of(file) for file in FILES}
    assert rooms == {room for room, _ in ROOMS}
    named = [name for _, patterns in ROOMS for name in patterns if "*" not in name]
    assert set(named) <= set(FILES)


def test_a_new_file_finds_its_room():
    assert room_of("_backends/mlx/sums.py") == room_of("_backends/dtypes.py") == "backends"
    assert room_of("_per_example.py") == "verbs"
    assert room_of("adaptive.py") == room_of("monitor/pictures.py") == room_of("distributed/_mpi.py") == "around"
    assert rank("_types.py") < rank("_backends/jax/__init__.py") < rank("_clip.py") < rank("optax.py")
    assert may_name("_backends/jax/sums.py") == {"jax", "jaxlib", "numpy"}
    assert may_name("_per_example.py") == set()
    assert may_import_at_once("torch/_parameters.py") == may_name("optax.py") - {"optax", "jax"} | {"torch"}


@each_file
def test_one_librarys_folder_does_not_import_anothers(file):
    parts = file.split("/")
    others = {f.split("/")[1] for f in files_imported(file) if f.startswith("_backends/") and f.count("/") > 1}
    if parts[0] == "_backends":
        assert others <= ({parts[1], *BESIDE.get(parts[1], ())} if len(parts) > 2 else set())
    elif parts[0] == "distributed":  # an engine stands on the arrays of one library
        assert len(others) <= 1
    else:
        assert not others or file == "_libraries.py"


def test_the_reader_of_imports_sees_them_all():
    """The tests above are only as good as `imported`."""
    code = """
from gradclip import _clip, clip_grad_norm
import gradclip._tree
def f():
    from gradclip._norms import norm_for
    from . import _errors
    import_module(f"gradclip._backends.{name}")
    importlib.import_module("jax.numpy")
    import_module(name)
"""
    found = {name for node in ast.walk(ast.parse(code)) for name in imported(node, "gradclip._libraries")}
    assert found == {
        "gradclip",
        "gradclip._clip",
        "gradclip._tree",
        "gradclip._norms",
        "gradclip._errors",
        *(name for name in FILE_OF if name.startswith("gradclip._backends.")),
        "jax.numpy",
        "?",
    }


# -- libraries ---------------------------------------------------------------------------------------------------------


@each_file
def test_a_librarys_name_stays_in_its_room(file):
    tree = TREES[file]
    skip = docstrings(tree)
    named = {library for name in imports(file) if (library := library_of(name))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            named |= {node.value} & LIBRARIES
            named |= {name for name in LIBRARIES if node.value.startswith(f"{name}.")}
        if isinstance(node, ast.Attribute) and re.fullmatch("is_[a-z]+_(array|namespace)", node.attr):
            named |= {node.attr.split("_")[1]} & LIBRARIES
    assert named <= may_name(file)


@each_file
def test_array_libraries_are_imported_where_they_are_wanted_only(file):
    now = {
        lib for node in at_once(TREES[file]) for name in imported(node, module_of(file)) if (lib := library_of(name))
    }
    assert now <= may_import_at_once(file)


# -- files and the interface -------------------------------------------------------------------------------------------


@each_file
def test_no_file_is_too_long_or_a_drawer(file):
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 300, "a file over 300 lines wants to be two"
    assert not re.search(r"utils|misc|helpers|base", file)


def public_methods(cls: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(cls, callable) if not name.startswith("_")}


def test_the_interface_of_a_backend_is_one_page():
    assert len(public_methods(Backend)) <= 12, sorted(public_methods(Backend))
    for name in public_methods(Backend):
        assert inspect.getdoc(getattr(Backend, name)), f"{name} wants a docstring"


def test_nothing_but_the_interface_is_called_from_outside():
    """A method that only one library has is that library's own."""
    called = {}
    for file, tree in TREES.items():
        if room_of(file) != "backends":
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "backend":
                    called.setdefault(node.attr, file)
    assert {"partials", "decide", "scale"} <= set(called), "the test looks for calls of `backend`"
    public = public_methods(Backend) | {name for name in vars(Backend(None)) if not name.startswith("_")}
    assert {name: file for name, file in called.items() if name not in public} == {}


# -- what an import costs ----------------------------------------------------------------------------------------------


def fresh(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    path = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_gradclip_imports_no_array_library():
    libraries = sorted(LIBRARIES)
    assert fresh(f"import sys, gradclip; print(sorted(set({libraries}) & set(sys.modules)))") == "[]"


def test_import_gradclip_takes_under_50_ms(tmp_path):
    """Of the processor's time: beside other work the clock shows several times as much. From bytecode, as installed."""
    code = """
import time, array_api_compat
start = time.process_time()
import gradclip
print(time.process_time() - start)
"""
    times = []
    for _ in range(15):
        times.append(float(fresh(code, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))))
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
    "clip_grad_agc",
    "clipped_sum",
    "norms",
    "Clipped",
    "Culprit",
    "LeafError",
    "NonFiniteError",
    "ClippedSum",
    "Units",
    "set_num_threads",
}
VERBS = sorted(name for name in NAMES if name.islower())


def test_the_public_names():
    assert set(gradclip.__all__) == NAMES
    assert len(gradclip.__all__) == len(NAMES)
    assert all(hasattr(gradclip, name) for name in NAMES)
    visible = {name for name in vars(gradclip) if not name.startswith("_")}
    around = {file.split("/")[0].removesuffix(".py") for file in FILES if room_of(file) == "around"}
    assert visible - around == NAMES, "a public name that __all__ does not list"
    assert fresh("import gradclip; print([name for name in ('distributed', 'torch') if hasattr(gradclip, name)])") == (
        "['distributed']"
    )
    assert issubclass(gradclip.LeafError, TypeError)
    assert issubclass(gradclip.NonFiniteError, FloatingPointError)
    assert gradclip.Clipped._fields == ("grads", "norm")
    assert gradclip.ClippedSum._fields == ("sum", "norm")


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
    stated = [file for file, tree in TREES.items() for node in ast.walk(tree)
              if isinstance(node, ast.Constant) and node.value == gradclip.__version__]  # fmt: skip
    assert stated == ["__init__.py"]
