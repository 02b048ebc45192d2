"""How strong the tests are: break one thing in gradclip, run the quick tests, and see whether any of them notices.

    python tests/mutants.py                              60 mutants, on NumPy and array-api-strict
    python tests/mutants.py --count 200 --seed 7
    python tests/mutants.py --backend jax --files "_backends/jax/*.py"
    python tests/mutants.py --list --files _decide.py    what could be broken, nothing run

A mutant is one change of one place, drawn at random: another comparison, another operator, another number, a negated
condition, a statement left out. It is made in a scratch copy, and the tests stop at the first that fails. Those that no
test notices are listed: each wants a test, or a line less, or a place in `equivalent_mutants.toml`, with the reason why
it changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import copy
import fnmatch
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LISTED = Path(__file__).with_name("equivalent_mutants.toml")

#: Tests that read the source, or say nothing about what gradclip computes.
LEFT_OUT = ("test_rooms.py", "test_docs.py", "test_benchmarks.py", "test_examples.py", "test_mutants.py")

#: Files of one library's tests, by the start of their names.
OF_LIBRARY = {"test_cuda": "cupy", "test_cupy": "cupy", "test_nccl": "cupy", "test_jax": "jax", "test_psum": "jax"}

#: Imported once, before the tests of a mutant are forked off. Nothing that starts threads.
PRELOADED = ("pytest", "numpy", "hypothesis", "mpmath", "ml_dtypes", "array_api_compat", "array_api_strict")

#: Of modules that are here already: pytest would have had their assertions, if they had any.
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")

OTHER_OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}


class Mutant(NamedTuple):
    """One place of one file, and what is put there."""

    file: str
    line: int
    start: int  # in bytes of the file
    end: int
    was: str
    became: str
    first_line: str  # the source line in which it starts: the list of equivalents knows mutants by their text

    @property
    def text(self) -> tuple[str, str, str, str]:
        return self.file, self.first_line, self.was, self.became

    def __str__(self) -> str:
        return f"gradclip/{self.file}:{self.line}: {self.first_line}\n        {self.was}  ->  {self.became}"


# -- making them -------------------------------------------------------------------------------------------------


def replaced(node: ast.AST, **fields: Any) -> ast.AST:
    out = copy.copy(node)
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def variants(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of `node`; None for a statement left out."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in OTHER_OPERATORS[type(op)]:
                yield replaced(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp | ast.BoolOp):
        for other in OTHER_OPERATORS.get(type(node.op), ()):
            yield replaced(node, op=other())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
        if node.value != 0:
            yield ast.Constant(node.value * 2 if node.value != 1 else 0)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        yield replaced(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Raise | ast.AugAssign | ast.Continue | ast.Break) or is_call(node):
        yield None


def is_call(node: ast.AST) -> bool:
    """A statement that is a call and nothing else."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def skipped(node: ast.AST) -> tuple[ast.AST, ...]:
    """Children in which nothing is changed: annotations, what only a type checker reads, and texts."""
    if isinstance(node, ast.JoinedStr):
        return tuple(ast.iter_child_nodes(node))
    if isinstance(node, ast.FunctionDef):
        return tuple(x for x in (node.returns,) if x)
    if isinstance(node, ast.arg | ast.AnnAssign):
        return tuple(x for x in (node.annotation,) if x)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "zip":  # `strict` is a check of its own
        return tuple(keyword for keyword in node.keywords)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "TypeVar", "overload"):
        return tuple(node.args[:1])
    return ()


def places(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    left_out = skipped(node)
    for child in ast.iter_child_nodes(node):
        if child not in left_out:
            yield from places(child)


def mutants_of(file: str, source: bytes) -> list[list[Mutant]]:
    """For each place that can be changed, the ways to change it."""
    text = source.decode()
    lines = text.splitlines()
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    out = []
    for node in places(ast.parse(text)):
        found = []
        for new in variants(node):
            whole: Any = node
            if isinstance(node, ast.If | ast.While):  # the condition alone is replaced
                whole, new = node.test, new.test
            start = starts[whole.lineno - 1] + whole.col_offset
            end = starts[whole.end_lineno - 1] + whole.end_col_offset
            became = "pass" if new is None else ast.unparse(new)
            was = source[start:end].decode()
            shown = " ".join(was.split())
            found.append(Mutant(file, whole.lineno, start, end, shown, became, lines[whole.lineno - 1].strip()))
        if found:
            out.append(found)
    return out


def mutated(mutant: Mutant, source: bytes) -> bytes:
    new = mutant.became if mutant.became == "pass" else f"({mutant.became})"
    # As many lines as before, so that tracebacks fit.
    lost = source[mutant.start : mutant.end].count(b"\n")
    if lost and new != "pass":
        new = new[:-1] + "\n" * lost + ")"
    return source[: mutant.start] + new.encode() + source[mutant.end :]


def compiles(mutant: Mutant, source: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `x is not (1)`
            compile(mutated(mutant, source), mutant.file, "exec")
    except SyntaxError:  # `2 .real` in an odd place; an assignment to a constant
        return False
    return True


# -- which ---------------------------------------------------------------------------------------------------------


def core(backends: Sequence[str]) -> list[str]:
    """The rooms that the tests of these backends walk through: all but programs and other libraries' folders."""
    libraries = {name.split("-")[0] for name in backends}
    package = ROOT / "gradclip"
    out = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts[0] in ("distributed", "monitor") or parts[0] in ("__init__.py", "__main__.py"):
            continue
        if len(parts) > 2 and parts[1] not in libraries:
            continue
        out.append("/".join(parts))
    return out


def chosen(patterns: Sequence[str]) -> list[str]:
    package = ROOT / "gradclip"
    names = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    out = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not out:
        raise SystemExit(f"no file of gradclip/ is called {' or '.join(patterns)}")
    return out


def files_of_tests(folder: Path, backends: Sequence[str]) -> list[str]:
    """The test files that can notice something, on these backends."""
    libraries = {name.split("-")[0] for name in backends}
    others = tuple(start for start, library in OF_LIBRARY.items() if library not in libraries)
    names = sorted(path.name for path in (folder / "tests").glob("test_*.py"))
    return [f"tests/{name}" for name in names if name not in LEFT_OUT and not name.startswith(others)]


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """The mutants that are known to change nothing, each with the reason."""
    if not LISTED.exists():
        return {}
    entries = tomllib.loads(LISTED.read_text(encoding="utf-8")).get("mutant", [])
    return {(e["file"], e["line"], e["was"], e["became"]): e["why"] for e in entries}


# -- running the tests ----------------------------------------------------------------------------------------------


class Killer:
    """A pytest plugin that remembers which test failed first, and lets none run for more than so many seconds."""

    def __init__(self, limit: float) -> None:
        self.test = ""
        self.limit = limit
        signal.signal(signal.SIGALRM, self.ring)

    def ring(self, *args: Any) -> None:
        raise TimeoutError(f"a test of more than {self.limit} s")

    def pytest_runtest_logstart(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self.limit)

    def pytest_runtest_logfinish(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid


def run_tests(scratch: Path, files: Sequence[str], backends: Sequence[str], limit: float) -> tuple[str, float]:
    """The first test that failed in a forked process: "" for none, "time" where they hung; the seconds."""
    note = scratch / "killer.txt"
    note.unlink(missing_ok=True)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of BLAS: the child starts its own
        child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(scratch)
            sink = os.open(scratch / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            ours = (ROOT, ROOT / "tests")
            sys.path[:] = [str(scratch), *(p for p in sys.path if Path(p or ".").resolve() not in ours)]
            killer = Killer(limit)
            pytest = importlib.import_module("pytest")
            options = [f"--backend={name}" for name in backends]
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *QUIET, *options, *files], plugins=[killer])
            note.write_text(f"{int(status)} {killer.test}", encoding="utf-8")
        except BaseException as error:  # a mutant may do anything: it is dead
            note.write_text(f"{status} {type(error).__name__}", encoding="utf-8")
        finally:
            os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > 30 * limit:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time", time.monotonic() - began
        time.sleep(0.02)
    spent = time.monotonic() - began
    if not note.exists():
        return "crash", spent
    status, _, test = note.read_text(encoding="utf-8").partition(" ")
    return ("" if status == "0" else test or f"pytest ended with {status}"), spent


def scratch_copy(folder: Path) -> Path:
    """The files that git knows or would know, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


# -- the command ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=60, help="how many mutants (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--backend", action="append", help="may be repeated (default: numpy, array-api-strict)")
    parser.add_argument(
        "--files", nargs="+", metavar="PATTERN", help="files of gradclip/: _decide.py '_backends/jax/*'"
    )
    parser.add_argument("--limit", type=float, default=20, help="seconds for one test (default: 20)")
    parser.add_argument("--list", action="store_true", help="print the mutants that would be run")
    args = parser.parse_args(argv)
    args.backend = args.backend or ["numpy", "array-api-strict"]
    return args


def draw(args: argparse.Namespace) -> tuple[list[Mutant], list[Mutant]]:
    """The mutants to run, and those drawn that are listed as equivalent."""
    sources = {file: (ROOT / "gradclip" / file).read_bytes() for file in chosen(args.files or core(args.backend))}
    sites = [site for file, source in sources.items() for site in mutants_of(file, source)]
    known = equivalents()
    every = {m.text for site in sites for m in site}
    for entry in known:
        if entry[0] in sources and entry not in every:
            print(f"{LISTED.name}: nothing is like this any more: {entry}")
    rng = random.Random(args.seed)
    rng.shuffle(sites)
    run: list[Mutant] = []
    listed: list[Mutant] = []
    for site in sites:
        mutant = rng.choice(site)
        if mutant.text in known:
            listed.append(mutant)
        elif compiles(mutant, sources[mutant.file]):
            run.append(mutant)
        if len(run) == args.count:
            break
    print(f"{len(sites)} places in {len(sources)} files; {len(run)} mutants, seed {args.seed}")
    return run, listed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    mutants, listed = draw(args)
    if args.list:
        print(*mutants, sep="\n")
        return 0
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="gradclip-mutants.") as name:
        scratch = scratch_copy(Path(name))
        files = files_of_tests(scratch, args.backend)
        failed, spent = run_tests(scratch, files, args.backend, args.limit)
        if failed:
            print(f"the tests fail as they are: {failed}", (scratch / "output.txt").read_text()[-3000:], sep="\n")
            return 2
        print(f"the tests as they are: {spent:.0f} s", flush=True)
        # From here on no bytecode is kept: a mutant as long as the file, made in the same second, would not be seen.
        sys.dont_write_bytecode = True
        for cache in (scratch / "gradclip").rglob("__pycache__"):
            shutil.rmtree(cache)
        lived = run_all(mutants, scratch, files, args.backend, args.limit)
    return report(mutants, listed, lived)


def run_all(
    mutants: Sequence[Mutant], scratch: Path, files: Sequence[str], backends: Sequence[str], limit: float
) -> list[Mutant]:
    kills: Counter[tuple[str, str]] = Counter()  # (test file, mutated file), and (test file, "")
    lived = []
    for i, mutant in enumerate(mutants, 1):
        path = scratch / "gradclip" / mutant.file
        source = path.read_bytes()
        path.write_bytes(mutated(mutant, source))
        by_kills = sorted(files, key=lambda file: (-kills[file, mutant.file], -kills[file, ""]))
        killer, spent = run_tests(scratch, by_kills, backends, limit)
        path.write_bytes(source)
        kills.update(((killer.partition("::")[0], mutant.file), (killer.partition("::")[0], "")))
        if not killer:
            lived.append(mutant)
        print(f"{i:4} {spent:5.1f} s  {killer or 'LIVED'}  {mutant}", flush=True)
    return lived


def report(mutants: Sequence[Mutant], listed: Sequence[Mutant], lived: Sequence[Mutant]) -> int:
    known = equivalents()
    for mutant in listed:
        print(f"listed: {mutant}\n        {known[mutant.text]}")
    print(f"\nlived, {len(lived)} of {len(mutants)}:" if lived else "\nnone lived")
    for mutant in sorted(lived):
        print(mutant)
    run, left = Counter(m.file for m in mutants), Counter(m.file for m in lived)
    print("\nkilled: " + ", ".join(f"{file} {n - left[file]}/{n}" for file, n in sorted(run.items())))
    killed = len(mutants) - len(lived)
    print(f"{killed} of {len(mutants)} were killed: {killed / max(len(mutants), 1):.0%}; {len(listed)} more are listed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
