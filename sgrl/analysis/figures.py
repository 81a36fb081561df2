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


def probe_errors(neurons: pd.DataFrame, layers: pd.DataFrame, path: Path, note: str) -> Path:
    """Estimation error of a network's gradients, its mixing weights, and what neurons could know.

    Left: the mean squared error under backprop and sgprop, of each layer and, pale, of its
    neurons. Middle: each neuron's mixing weight and the best ones. Right: the share of the
    received gradient's conditional mean that the local inputs explain (condition B). Bars are 95%
    bootstrap intervals.

    Args:
        neurons, layers: rows of the probe, under the names of its CSVs.
        path: of the PNG to write.
        note: what to say below.

    Returns:
        `path`.
    """
    figure, (errors, weights, shares) = plt.subplots(1, 3, figsize=(14.5, 4.4))
    keys = ["layer", "step"] if "step" in layers else ["layer"]
    names = [" ".join(map(str, row)) for row in layers[keys].to_numpy().tolist()]
    place = {name: index for index, name in enumerate(names)}
    of_neuron = neurons[keys].astype(str).agg(" ".join, axis=1).map(place)

    def points(axis: Any, column: str, label: str, order: int, spread: int, marker: str) -> None:
        if layers[column].isna().all():
            return
        colour = [*COLOURS.values()][order]
        at = np.arange(len(layers)) + 0.17 * (order - (spread - 1) / 2)
        axis.plot(of_neuron + at[0], neurons[column], ".", color=colour, alpha=0.18, markersize=3)
        axis.vlines(
            at, layers[f"{column}_ci_low"], layers[f"{column}_ci_high"], color=colour, lw=1.6
        )
        axis.plot(at, layers[column], marker, color=colour, markersize=5, label=label)

    for order, (column, label) in enumerate(
        {
            "mse_backprop": "backprop",
            "mse_sgprop": "sgprop, lambda as it is",
            "mse_best": "sgprop, best lambda",
            "mse_synthetic": "predictions alone",
        }.items()
    ):
        points(errors, column, label, order, 4, "osD^"[order])
    errors.set_yscale("log")
    errors.set_ylabel("mean squared error")
    points(shares, "explained", "a regression on the inputs", 0, 1, "o")
    shares.axhline(0, color="0.5", lw=0.8)
    shares.set_ylim(max(-1.02, min(-0.25, layers["explained_ci_low"].min())), 1.02)
    shares.set_ylabel("share explained")
    measured = layers["explained"].notna().to_numpy().nonzero()[0]
    for axis, places in ((errors, range(len(names))), (shares, measured)):
        labels = [names[index] for index in places]
        axis.set_xticks(places, labels, rotation=0 if len(keys) == 1 else 60)
        axis.set_xlabel("layer" if len(keys) == 1 else "neurons and time step")
    shares.set_xlim(-0.6, measured.max(initial=0) + 0.6)

    shown = neurons[neurons["best_unit_mixing_weight"].notna()]
    for order, (column, label) in enumerate(
        {"best_unit_mixing_weight": "best, unit gradients", "best_mixing_weight": "best"}.items()
    ):
        weights.plot(
            shown["mixing_weight"],
            shown[column],
            "o^"[order],
            color=[*COLOURS.values()][order],
            alpha=0.5,
            markersize=3.5,
            label=label,
        )
    weights.plot([0, 1], [0, 1], color="0.5", lw=0.8)
    weights.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    weights.set_xlabel("mixing weight of the neuron")
    weights.set_ylabel("best mixing weight")
    for axis in (errors, weights, shares):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="best")
    note = f"{note}; pale dots: neurons, markers: their mean, bars: 95% bootstrap interval"
    figure.text(0.01, 0.01, note, fontsize=7, color="0.35")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
