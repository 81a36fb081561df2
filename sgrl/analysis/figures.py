"""Figures, one function each. A method has the same colour in all of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import pandas as pd

from sgrl.analysis.statistics import (
    best_learning_rates,
    compare_methods,
    learning_rate_columns,
    measure_of,
)
from sgrl.tuning.metrics import MEASURE_NAMES

# Okabe and Ito's palette, told apart by colour-blind readers and in grey print.
COLOURS = {
    "sparsenet_sgprop": "#0072B2",
    "sparsenet_backprop": "#E69F00",
    "gru": "#009E73",
    "lstm": "#CC79A7",
    "mlp": "#7F7F7F",
    "sparse_sgprop_fixed": "#56B4E9",
}
#: Methods of the bandit that are those of the labyrinths, feed-forward.
SAME_METHODS = {
    "sparse_sgprop": "sparsenet_sgprop",
    "sparse_backprop": "sparsenet_backprop",
    "dense": "mlp",
}
OTHER_COLOURS = ["#D55E00", "#000000", "#F0E442"]
MARKERS = "osD^vP*X<>"


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method; those the project does not name share the rest."""
    styles: dict[str, dict[str, Any]] = {}
    others = 0
    for method in dict.fromkeys(methods):
        known = SAME_METHODS.get(method, method)
        colour = COLOURS.get(known)
        if colour is None:
            colour = OTHER_COLOURS[others % len(OTHER_COLOURS)]
            others += 1
        order = list(COLOURS).index(known) if known in COLOURS else len(COLOURS) + others - 1
        styles[method] = {"color": colour, "marker": MARKERS[order % len(MARKERS)]}
    return styles


def learning_curves(trials: pd.DataFrame, curves: pd.DataFrame, path: Path) -> Path:
    """Success rate, or test reward, against environment steps: mean over seeds, with a band of
    one SEM.

    One panel for each combination of swept values other than learning rates; of several learning
    rates each method shows the one with the highest mean AUC. Failed trials are left out, and a
    curve ends where the first of its trials does.

    Args:
        trials: from `runs.load_trials`.
        curves: from `runs.load_curves`.
        path: of the PNG to write.

    Returns:
        `path`.
    """
    swept, measure = trials.attrs.get("swept", []), measure_of(trials)
    rates = learning_rate_columns(swept)
    shown = best_learning_rates(compare_methods(trials))
    others = [name for name in swept if name not in rates]
    panels = list(shown.groupby(others, sort=False, dropna=False)) if others else [((), shown)]
    styles = method_styles(trials["method"])
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns + 0.6, 3.8 * rows), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (values, panel) in zip(axes.flat, panels, strict=False):
        for _, row in panel.iterrows():
            lines = _curves_of(curves, measure, row, ["method", *swept])
            if lines.empty:
                continue
            used = [f"{name} {row[name]:g}" for name in rates if pd.notna(row[name])]
            label = f"{row['method']} ({', '.join(used)})" if used else row["method"]
            _draw(axis, lines, f"{label}, n={lines.shape[1]}", styles[row["method"]])
        axis.set_title(", ".join(f"{n} = {v}" for n, v in zip(others, values, strict=True)))
        axis.set_xlabel("environment steps")
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8, loc="best")
    for axis in axes[:, 0]:
        axis.set_ylabel(MEASURE_NAMES[measure])
    note = "mean over seeds, band: one SEM"
    if rates:
        note += "; each method at its learning rate with the highest mean AUC"
    figure.text(0.01, 0.01, note, fontsize=7, color="0.35")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _curves_of(curves: pd.DataFrame, measure: str, row: pd.Series, keys: list[str]) -> pd.DataFrame:
    """The measure of one method and point: index mean env_steps, one column a trial."""
    if curves.empty:
        return pd.DataFrame()
    same = curves["state"] != "failed"
    for key in keys:
        same &= (curves[key] == row[key]) | (curves[key].isna() & pd.isna(row[key]))
    wide = curves[same].pivot_table(index="iteration", columns="trial", values=measure)
    # Seeds of an algorithm that samples whole episodes differ a little in their steps.
    steps = curves[same].groupby("iteration")["env_steps"].mean()
    wide.index = steps.reindex(wide.index)
    return wide.dropna()


def _draw(axis: Any, lines: pd.DataFrame, label: str, style: dict[str, Any]) -> None:
    steps, count = lines.index.to_numpy(), lines.shape[1]
    mean = lines.mean(axis=1).to_numpy()
    axis.plot(
        steps,
        mean,
        label=label,
        linewidth=1.6,
        markevery=max(1, len(steps) // 8),
        markersize=4.5,
        **style,
    )
    if count > 1:
        error = lines.std(axis=1, ddof=1).to_numpy() / np.sqrt(count)
        axis.fill_between(steps, mean - error, mean + error, color=style["color"], alpha=0.2, lw=0)


def expert_ratios(results: pd.DataFrame, case: str, path: Path) -> Path:
    """Ratio of mean squared errors against d on the expert network, with 2^(d-k) dashed.

    One panel for each number of samples n, one line for each k; bars are 95% bootstrap intervals.

    Args:
        results: rows of the expert simulation, under the names of its CSV.
        case: the one to draw.
        path: of the PNG to write.

    Returns:
        `path`.
    """
    shown = results[results["case"] == case]
    samples, inputs = sorted(shown["n"].unique()), sorted(shown["k"].unique())
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.9 * columns + 0.8, 3.4 * rows + 0.3),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    palette = [*COLOURS.values(), *OTHER_COLOURS]
    for axis in axes.flat[len(samples) :]:
        axis.set_axis_off()
    for axis, n in zip(axes.flat, samples, strict=False):
        for order, k in enumerate(inputs):
            line = shown[(shown["n"] == n) & (shown["k"] == k)].sort_values("d")
            colour = palette[order % len(palette)]
            axis.plot(line["d"], 2.0 ** (line["d"] - k), "--", color=colour, lw=1, alpha=0.8)
            # Beside each other, so that no interval hides another.
            place = line["d"] + 0.12 * (order - (len(inputs) - 1) / 2)
            axis.vlines(place, line["ratio_ci_low"], line["ratio_ci_high"], color=colour, lw=1.4)
            marker = MARKERS[order % len(MARKERS)]
            axis.plot(place, line["ratio"], marker, color=colour, markersize=2.8, label=f"k = {k}")
        axis.set_yscale("log", base=2)
        axis.set_title(f"n = {n}")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("d")
    for axis in axes[:, 0]:
        axis.set_ylabel("MSE of backprop / MSE of sgprop")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"expert network, {case}", fontsize=11)
    note = "dots: ratio of means over trials, bars: 95% bootstrap interval, dashed: 2^(d-k)"
    figure.text(0.01, 0.01, note, fontsize=7, color="0.35")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
