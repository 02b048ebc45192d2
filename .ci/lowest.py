"""Print the lowest versions that pyproject.toml admits, as requirements: `name>=X` becomes `name==X`.

Taken are the run-time dependencies and the extra "test" with all that it names, and for jax a jaxlib of
the same version. A requirement that has no lower bound is an error: no test would know what it promises.

    python .ci/lowest.py pyproject.toml > lowest.txt
"""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[\w\s,.-]*)\])?\s*(?P<rest>.*)")
LOWER_BOUND = re.compile(r">=\s*(?P<version>[\w.!+]+)(?P<rest>\s*(?:;.*)?)")


def pins(requirements: Iterable[str], extras: dict[str, list[str]], project: str) -> Iterator[str]:
    """Yield one pin for each requirement; where the project names itself, follow its extras."""
    for requirement in requirements:
        parts = REQUIREMENT.fullmatch(requirement.strip())
        if parts is None:
            sys.exit(f"cannot read the requirement {requirement!r}")
        name, wanted = parts["name"], parts["extras"]
        if name == project:
            for extra in (wanted or "").split(","):
                yield from pins(extras[extra.strip()], extras, project)
            continue
        bound = LOWER_BOUND.fullmatch(parts["rest"])
        if bound is None:
            sys.exit(f"the requirement {requirement!r} is not of the form name>=X")
        pin = f"=={bound['version']}{bound['rest']}"
        yield f"{name}[{wanted}]{pin}" if wanted else name + pin
        if name == "jax":
            yield "jaxlib" + pin


def main(pyproject: str) -> None:
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = f"{project['name']}[test]"
    print(*sorted({*pins([*project["dependencies"], named], extras, project["name"])}), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
