"""Figures of the expert network's simulation and of the probe."""

from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np
import pandas as pd

from sgrl.analysis.style import COLOURS, MARKERS, OTHER_COLOURS, grid, save


def expert_ratios(results: pd.DataFrame, case: str, path: Path) -> Path:
    """Draw the ratio of mean squared errors against d on the expert network, with 2^(d-k) dashed.

    There is one panel for each number of samples n and one line for each k; bars are 95% bootstrap
    intervals.

    Args:
        results: rows of the simulation's CSV.
        case: which of its cases to draw.
        path: the PNG to write; an SVG of the same name is written beside it.

    Returns:
        `path`.
    """
    shown = results[results["case"] == case]
    samples, inputs = sorted(shown["n"].unique()), sorted(shown["k"].unique())
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    size = (2.9 * columns + 0.8, 3.4 * rows + 0.3)
    figure, axes = grid(rows, columns, len(samples), size, sharex=True, sharey=True)
    palette = [*COLOURS.values(), *OTHER_COLOURS]
    for axis, n in zip(axes.flat, samples, strict=False):
        for order, k in enumerate(inputs):
            line = shown[(shown["n"] == n) & (shown["k"] == k)].sort_values("d")
            colour = palette[order % len(palette)]
            axis.plot(line["d"], 2.0 ** (line["d"] - k), "--", color=colour, lw=1, alpha=0.8)
            # Side by side, so that no interval hides another.
            place = line["d"] + 0.12 * (order - (len(inputs) - 1) / 2)
            axis.vlines(place, line["ratio_ci_low"], line["ratio_ci_high"], color=colour, lw=1.4)
            marker = MARKERS[order % len(MARKERS)]
            axis.plot(place, line["ratio"], marker, color=colour, markersize=2.8, label=f"k = {k}")
        axis.set_yscale("log", base=2)
        axis.set_title(f"n = {n}")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for axis in axes[-1]:
        axis.set_xlabel("d")
    for axis in axes[:, 0]:
        axis.set_ylabel("MSE of backprop / MSE of sgprop")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(f"expert network, {case}", fontsize=11)
    note = "dots: ratio of means over trials, bars: 95% bootstrap interval, dashed: 2^(d-k)"
    return save(figure, path, note)


def probe_errors(neurons: pd.DataFrame, layers: pd.DataFrame, path: Path, note: str) -> Path:
    """Draw the errors of a network's gradients, its mixing weights, and what local inputs explain.

    Left: the mean squared error under backprop and sgprop, of each layer and, in a pale colour, of
    its neurons. Middle: each neuron's mixing weight and the optimal ones. Right: the share of the
    received gradient's conditional mean that the local inputs explain (condition B). Bars are 95%
    bootstrap intervals.

    Args:
        neurons: rows of the probe's `neurons.csv`.
        layers: rows of its `layers.csv`.
        path: the PNG to write; an SVG of the same name is written beside it.
        note: text below the figure.

    Returns:
        `path`.
    """
    figure, ((errors, weights, shares),) = grid(1, 3, 3, size=(14.5, 4.4))
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
    _scale_errors(errors, neurons, layers)
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
        axis.legend(frameon=False, fontsize=8, loc="best")
    note = f"{note}; pale dots: neurons, markers: their mean, bars: 95% bootstrap interval"
    return save(figure, path, note)


def _scale_errors(axis: Any, neurons: pd.DataFrame, layers: pd.DataFrame) -> None:
    """A logarithmic axis, which is linear around 0 if any unbiased estimate is not above 0."""
    names = [name for name in map(str, layers) if name.startswith("mse_")]
    own = [name for name in names if name in neurons]
    values = np.concatenate([layers[names].to_numpy().ravel(), neurons[own].to_numpy().ravel()])
    values = values[np.isfinite(values)]
    if (values > 0).all():
        axis.set_yscale("log")
        return
    # All of those below 0 lie in the linear part.
    typical = np.median(values[values > 0]) if (values > 0).any() else 1.0
    axis.set_yscale("symlog", linthresh=max(-values.min(), 1e-3 * typical), linscale=1.5)
    axis.axhline(0, color="0.5", lw=0.8)
