"""What all figures share: colours, panels, notes and files."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from sgrl.analysis.comparison import plain
from sgrl.analysis.statistics import INTERVAL_SEEDS

# Okabe and Ito's palette, which colour-blind readers and grey print can tell apart.
COLOURS = {
    "sparsenet_sgprop": "#0072B2",
    "sparsenet_backprop": "#E69F00",
    "gru": "#009E73",
    "lstm": "#CC79A7",
    "mlp": "#7F7F7F",
    "sparse_sgprop_fixed": "#56B4E9",
}
#: Methods of the bandit and their recurrent counterparts in the labyrinths.
SAME_METHODS = {
    "sparse_sgprop": "sparsenet_sgprop",
    "sparse_backprop": "sparsenet_backprop",
    "dense": "mlp",
}
OTHER_COLOURS = ["#D55E00", "#000000"]
MARKERS = "osD^vP*X<>"

#: A panel's title and its rows.
Panel = tuple[str, pd.DataFrame]


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Choose a colour and a marker for each method, the same in all figures.

    Args:
        methods: names of methods; those not in `COLOURS` share the colours that are left.

    Returns:
        For each method the keywords `color` and `marker` of Matplotlib's `plot`.
    """
    styles: dict[str, dict[str, Any]] = {}
    names = {method: SAME_METHODS.get(method, method) for method in methods}
    left = [colour for name, colour in COLOURS.items() if name not in names.values()]
    left = [*OTHER_COLOURS, *left]
    others = 0
    for method, known in names.items():
        colour = COLOURS.get(known)
        if colour is None:
            colour = left[others % len(left)]
            others += 1
        order = list(COLOURS).index(known) if known in COLOURS else len(COLOURS) + others - 1
        styles[method] = {"color": colour, "marker": MARKERS[order % len(MARKERS)]}
    return styles


def seeds_note(counts: Iterable[int], seeds: str = "thin lines") -> str:
    """Explain the lines of a figure, each the mean over some seeds.

    Args:
        counts: the numbers of seeds.
        seeds: how the seeds themselves are drawn where there are fewer than five.

    Returns:
        Part of the figure's note.
    """
    shown = set(counts)
    parts = ["mean over seeds"]
    if any(count >= INTERVAL_SEEDS for count in shown):
        parts.append("band: one SEM")
    if any(1 < count < INTERVAL_SEEDS for count in shown):
        parts.append(f"{seeds}: the seeds themselves, where they are fewer than five (no band)")
    if 1 in shown:
        parts.append("n=1: that seed itself")
    return ", ".join(parts) if shown != {1} else "one seed each"


def split_panels(frame: pd.DataFrame, columns: list[str], share: bool = True) -> list[Panel]:
    """Split rows into panels, one for each combination of values.

    Args:
        frame: rows such as those of `compare_methods`. A method may lack some of the values.
        columns: the columns to split by; without any, all rows form one panel without a title.
        share: whether such a method appears in every panel that its other values match.

    Returns:
        The panels.
    """
    panels: list[Panel] = []
    if not columns:
        return [("", frame)]
    whole = frame.dropna(subset=columns) if share else frame
    for values, rows in (whole if len(whole) else frame).groupby(columns, sort=False, dropna=False):
        known = {n: v for n, v in zip(columns, values, strict=True) if v == v}  # without NaN
        if share:
            kept = pd.Series(True, frame.index)
            for name, value in known.items():
                kept &= frame[name].isna() | (frame[name] == value)
            rows = frame[kept]
        title = ", ".join(f"{name} = {plain(value)}" for name, value in known.items())
        panels.append((title, rows))
    return panels


def grid(
    rows: int,
    columns: int,
    used: int,
    size: tuple[float, float] | None = None,
    sharex: bool = False,
    sharey: Any = False,
) -> tuple[Any, Any]:
    """Make a figure with a grid of axes.

    Args:
        rows: number of rows.
        columns: number of columns.
        used: number of axes that are used, row by row; the others are switched off.
        size: width and height in inches.
        sharex: whether all panels have one x axis.
        sharey: whether all panels have one y axis; "row": those of a row.

    Returns:
        The figure, and its axes [rows, columns].
    """
    # One panel alone is as wide as a page.
    size = size or (5.2 * columns + 0.6 if columns > 1 else 8.4, 3.8 * rows)
    figure, axes = plt.subplots(
        rows, columns, sharex=sharex, sharey=sharey, squeeze=False, figsize=size
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[used:]:
        axis.set_axis_off()
    return figure, axes


def rows_of_three(
    panels: Sequence[Panel], x: str, y: str, fontsize: float | str = 10
) -> tuple[Any, Any]:
    """Make a figure with titled and labelled axes for each panel, three in a row.

    Args:
        panels: from `split_panels`.
        x: label of the horizontal axes.
        y: label of the vertical axes, which panels share.
        fontsize: of the panels' titles.

    Returns:
        The figure, and its axes [rows, columns].
    """
    columns = min(3, len(panels))
    figure, axes = grid(-(-len(panels) // columns), columns, len(panels), sharey=True)
    for axis, (title, _) in zip(axes.flat, panels, strict=False):
        axis.set_title(title.removeprefix("method = "), fontsize=fontsize)
        axis.set_xlabel(x)
    for axis in axes[:, 0]:
        axis.set_ylabel(y)
    return figure, axes


def draw_band(axis: Any, x: Any, low: Any, high: Any, colour: str, step: Any = None) -> None:
    """Draw a pale band with an edge, which tells it from bands that it overlaps.

    Args:
        axis: Matplotlib's axes.
        x: places.
        low: its lower bounds.
        high: its upper bounds.
        colour: of the band.
        step: "post" for bounds that are steps.
    """
    pale = {"facecolor": (colour, 0.15), "edgecolor": (colour, 0.6), "linewidth": 0.6}
    axis.fill_between(x, low, high, step=step, **pale)


def save(figure: Any, path: Path, note: str, legend: Any = ()) -> Path:
    """Lay out a figure with its note and legend below, write it as PNG and SVG, and close it.

    Args:
        figure: Matplotlib's figure.
        path: the PNG to write; an SVG of the same name is written beside it.
        note: small text below.
        legend: axes whose labels make a common legend, each label once.

    Returns:
        `path`.
    """
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(note, int(width * 17))
    below = 0.16 * len(lines) + 0.08
    figure.text(
        0.08 / width, 0.06 / height, "\n".join(lines), fontsize=7, color="0.35", va="bottom"
    )
    entries: dict[str, Any] = {}
    for axis in legend:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = max(1, min(len(entries), int(width / 1.9)))
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="lower center",
            bbox_to_anchor=(0.5, below / height),
            ncols=columns,
            frameon=False,
            fontsize=8,
        )
        below += 0.2 * -(-len(entries) // columns) + 0.1
    figure.tight_layout(rect=(0, below / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    # Without a date and with a fixed salt, the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "sgrl"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path
