"""The mutants that `python tests/mutants.py` makes: of the right places, one change each, and still Python."""

from __future__ import annotations

import ast
import tomllib

import pytest

import mutants

in_a_source_tree = pytest.mark.skipif(not (mutants.ROOT / "gradclip").is_dir(), reason="gradclip's source is not here")

SOURCE = b'''"""Words: 1 < 2."""

from __future__ import annotations

LIMIT: Literal[3] = 0.5


def f(x: float, n: int = 7) -> Tuple[4]:
    """More words."""
    if x <= LIMIT and not n:
        raise ValueError(f"{x + 1}: too small")
    x += 1
    return x * (
        n
        - 1
    )
'''


def made() -> list[mutants.Mutant]:
    return [mutant for place in mutants.mutants_of("f.py", SOURCE) for mutant in place]


def test_every_kind_of_change_is_made_and_nothing_else():
    assert {(m.line, m.was, m.became) for m in made()} == {
        (5, "0.5", "1.5"),
        (5, "0.5", "1.0"),
        (8, "7", "8"),
        (8, "7", "14"),
        (10, "x <= LIMIT and not n", "not (x <= LIMIT and (not n))"),
        (10, "x <= LIMIT and not n", "x <= LIMIT or not n"),
        (10, "x <= LIMIT", "x < LIMIT"),
        (10, "x <= LIMIT", "x > LIMIT"),
        (10, "not n", "n"),
        (11, 'raise ValueError(f"{x + 1}: too small")', "pass"),
        (12, "x += 1", "pass"),
        (12, "1", "2"),
        (12, "1", "0"),
        (13, "x * ( n - 1 )", "x / (n - 1)"),
        (14, "n - 1", "n + 1"),
        (15, "1", "2"),
        (15, "1", "0"),
    }


@pytest.mark.parametrize("mutant", made(), ids=lambda m: f"{m.line}: {m.became}")
def test_a_mutant_differs_in_its_place_only(mutant):
    new = mutants.mutated(mutant, SOURCE)
    assert new[: mutant.start] == SOURCE[: mutant.start]
    assert new.endswith(SOURCE[mutant.end :])
    assert new.count(b"\n") == SOURCE.count(b"\n") or mutant.became == "pass"
    assert ast.dump(ast.parse(new)) != ast.dump(ast.parse(SOURCE))
    assert mutants.compiles(mutant, SOURCE)


def test_the_list_of_equivalents_can_be_read_and_gives_reasons():
    entries = tomllib.loads(mutants.LISTED.read_text(encoding="utf-8"))["mutant"]
    assert all(set(entry) == {"file", "line", "was", "became", "why"} for entry in entries)
    assert len(mutants.equivalents()) == len(entries), "two entries for one mutant"
    assert all(len(entry["why"].split()) >= 4 for entry in entries)


@in_a_source_tree
def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match=r"no file of gradclip/ is called no_such\.py"):
        mutants.main(["--list", "--files", "no_such.py"])


@in_a_source_tree
def test_the_command_draws_the_same_ones_for_the_same_seed(capsys):
    assert mutants.main(["--list", "--seed", "3", "--count", "5", "--files", "_tree.py"]) == 0
    first = capsys.readouterr().out
    assert mutants.main(["--list", "--seed", "3", "--count", "5", "--files", "_tree.py"]) == 0
    assert capsys.readouterr().out == first
    assert first.count("gradclip/_tree.py:") == 5
