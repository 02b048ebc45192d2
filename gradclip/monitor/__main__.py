"""The program: ``python -m gradclip.monitor norms.csv -o norms.png``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradclip.monitor._bounds import clipped_share, count, percent, would_clip
from gradclip.monitor._read import read


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gradclip.monitor",
        description="Say what was clipped, and what other bounds would have clipped; with -o, draw it.",
    )
    parser.add_argument("log", type=Path, metavar="norms.csv", help="the file that NormLog wrote")
    parser.add_argument("-o", "--output", type=Path, metavar="norms.png", help="draw a picture: .png, .pdf or .svg")
    args = parser.parse_args(argv)
    try:
        log = read(args.log)
        print(summary(args.log.name, log))
        if args.output is not None:
            if importlib.util.find_spec("matplotlib") is None:
                raise ValueError("the picture needs matplotlib: pip install matplotlib")
            from gradclip.monitor._pictures import draw

            draw(log, args.output)
    except FileNotFoundError as error:
        return _fail(f"{error.filename} is not there: pass the path that NormLog was given, and a folder that exists")
    except (OSError, ValueError) as error:
        return _fail(str(error))
    return 0


def summary(name: str, log: Mapping[str, Any]) -> str:
    """What the numbers say, in lines."""
    step, norm = log["step"], log["norm"]
    if not len(step):
        raise ValueError(
            f"{name} holds no step yet: a NormLog writes when its batch is full, at flush(), and as its with block ends"
        )
    finite = norm[np.isfinite(norm)]
    lines = [f"{name}: {count(len(step))}, {step[0]} to {step[-1]}"]
    if finite.size:
        lines.append(f"norm: {finite.min():.3g} to {finite.max():.3g}, median {np.median(finite):.3g}")
    if finite.size < norm.size:
        lines.append(f"inf or NaN: {count(norm.size - finite.size)}, not counted below")
    share = clipped_share(log)
    lines.append("no norm beside a bound" if share is None else f"clipped: {percent(share)} of the steps")
    lines += [
        f"a bound of {bound:<8g} would have clipped {percent(s):>8} of the steps" for bound, s in would_clip(norm)
    ]
    return "\n".join(lines)


def _fail(message: str) -> int:
    print(f"gradclip.monitor: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
