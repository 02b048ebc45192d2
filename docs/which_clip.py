"""Draw docs/which-clip.png: which elements share a factor, and what it is, for each member of the family.

    python docs/which_clip.py [FILE]

The factors are gradclip's own: what comes back divided by what went in. Needs matplotlib.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import gradclip

COLOURS = ("#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc", "#fa9fb5", "#ffeda0", "#c7b299", "#99d8c9")
COLOURS += ("#f4cae4", "#cbd5e8", "#d9f0a3", "#fff7bc", "#f1e2cc", "#b3e2cd", "#fdcdac", "#d4b9f0")
ALONE = "#f0f0f0"

W = np.array([[4.0, 1.0, 0.5, 2.0], [3.0, -1.0, 0.5, -6.0], [1.0, 2.0, -0.5, 2.0]])
B = np.array([0.3, -0.4, 0.1, 1.2])
GRADS = {"w": W, "b": B}
PARAMS = {"w": np.array([[30.0, 1.0, 20.0, 10.0]] * 3), "b": np.full(4, 9.0)}
EXAMPLES = {"w": W, "b": np.array([[0.5, 1.0], [2.0, -1.0], [0.2, 0.1]])}

WHOLE, COLUMNS = np.zeros((3, 4), int), np.tile(np.arange(4), (3, 1))
ROWS = np.tile(np.arange(3)[:, None], (1, 4))
EACH = np.arange(16).reshape(4, 4)


def panels():
    """Title, what is asked, the gradients, what came back, and the group of each element of w and of b (-1: none)."""

    def clip(max_norm, norm_type=2.0, **options):
        return gradclip.clip_grad_norm(GRADS, max_norm, norm_type, **options).grads

    one, other = np.zeros(4, int), np.ones(4, int)
    yield "global norm", "per=None", GRADS, clip(5.0), WHOLE, one
    yield "each leaf", 'per="leaf"', GRADS, clip(5.0, per="leaf"), WHOLE, other
    yield (
        "labels",
        'per={"w": "body", "b": None}',
        GRADS,
        clip({"body": 5.0}, per={"w": "body", "b": None}),
        WHOLE,
        -other,
    )
    yield "rms of each leaf", 'norm_type="rms", per="leaf"', GRADS, clip(1.0, "rms", per="leaf"), WHOLE, other
    yield "each unit", 'per="unit": columns', GRADS, clip(4.0, per="unit"), COLUMNS, 4 * other
    yield "each unit", "per=Units(0): rows", GRADS, clip(4.0, per=gradclip.Units(0)), ROWS, 4 * other
    adaptive = gradclip.clip_grad_agc(GRADS, PARAMS, 0.1).grads
    yield "AGC", "clip_grad_agc: by the unit's weights", GRADS, adaptive, COLUMNS, 4 * other
    pairs = np.tile(np.arange(3)[:, None], (1, 2))
    clipped = gradclip.clip_grad_norm(EXAMPLES, 4.0, per="example").grads
    yield "each example", 'per="example": rows of all leaves', EXAMPLES, clipped, ROWS, pairs
    yield "by value", "clip_grad_value: no groups", GRADS, gradclip.clip_grad_value(GRADS, 1.0), EACH[:3], EACH[3]


def grid(axes, grads, clipped, groups, left, top, name):
    """One leaf: a cell for each element, in the colour of its group, with its factor."""
    rows = [np.atleast_2d(x) for x in (grads, clipped, groups)]
    axes.text(left - 0.25, top - rows[0].shape[0] / 2, name, ha="right", va="center", style="italic")
    for (i, k), group in np.ndenumerate(rows[2]):
        colour = ALONE if group < 0 else COLOURS[group]
        axes.add_patch(Rectangle((left + k, top - 1 - i), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
        factor = rows[1][i, k] / rows[0][i, k]
        text = "1" if factor == 1 else f"{factor:.2f}".removeprefix("0")
        axes.text(left + k + 0.5, top - 0.5 - i, text, ha="center", va="center", fontsize=9)


def draw(path):
    figure = Figure(figsize=(10.5, 9), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, asked, grads, clipped, w_groups, b_groups) in enumerate(panels()):
        axes = figure.add_subplot(3, 3, i + 1)
        grid(axes, grads["w"], clipped["w"], w_groups, 0, 3, "w")
        beside = grads["b"].ndim == 2
        grid(axes, grads["b"], clipped["b"], b_groups, 5 if beside else 0, 3 if beside else -0.4, "b")
        axes.set(xlim=(-0.9, 7.3 if beside else 4.3), ylim=(-1.6, 3.2), aspect="equal")
        axes.set_title(f"{title}\n", fontsize=12)
        axes.text(0.5, 1.02, asked, transform=axes.transAxes, ha="center", fontsize=9, family="monospace")
        axes.set_axis_off()
    figure.suptitle(
        "One colour: one group, one norm, one factor. The number is the factor; grey is left alone.", fontsize=11
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("which-clip.png"))
