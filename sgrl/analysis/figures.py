"""Figures, one function each. A method has the same colour in all of them."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import pandas as pd

from sgrl.analysis.statistics import (
    INTERVAL_SEEDS,
    at_points,
    best_learning_rates,
    by_task,
    compare_methods,
    learning_rate_columns,
    performance_profile,
)
from sgrl.results.metrics import EVALUATION_NAMES, MEASURE_NAMES
from sgrl.results.runs import Results

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
OTHER_COLOURS = ["#D55E00", "#000000"]
MARKERS = "osD^vP*X<>"
#: What notes say where `statistics.BEST_RULE` chose what is shown.
BEST = "each method at its best learning rate, by mean AUC"


def seeds_note(counts: Iterable[int], seeds: str = "thin lines") -> str:
    """What the lines of a figure are, of which each is the mean of so many seeds.

    Args:
        counts: numbers of seeds.
        seeds: how the seeds themselves are drawn where there are fewer than five.
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


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method; those the project does not name share what is left."""
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


class Figure(NamedTuple):
    """A figure that was written.

    Attributes:
        path: of its PNG; an SVG of the same name lies beside it.
        title: what it shows.
    """

    path: Path
    title: str


def write_figures(results: Results, folder: Path) -> list[Figure]:
    """Write every figure that a sweep's results allow: learning curves, those of evaluations apart
    from training (success rates, else returns), performance profiles,
    scores against each swept number, and mixing weights where they move.

    Args:
        results: from `runs.load_results`.
        folder: where to; it is made if it is not there.
    """
    measure, trials = results.measure, results.trials
    title = f"{MEASURE_NAMES[measure].capitalize()} while training"
    figures = [Figure(learning_curves(results, folder / f"{measure}.png"), title)]
    evaluated = [
        name for name in EVALUATION_NAMES if name in results.curves.dropna(axis=1, how="all")
    ]
    rates = [name for name in evaluated if name.endswith("success_rate")]
    for column in rates or evaluated:
        path = learning_curves(results, folder / f"{column}.png", column)
        figures.append(Figure(path, EVALUATION_NAMES[column].capitalize()))
    if by_task(trials, f"final_{measure}"):
        path = folder / "performance_profiles.png"
        figures.append(Figure(performance_profiles(results, path), "Performance profiles"))
    numbers = [name for name in results.swept if _is_number(trials[name])]
    for name in numbers:
        path = folder / f"scores_by_{name}.png"
        figures.append(Figure(scores_against(results, name, path), f"Scores against {name}"))
    moving = mixing_points(results)
    if len(moving):
        path = folder / "mixing_weights.png"
        figures.append(Figure(mixing_weight_statistics(results, path), "Mixing weights"))
    for name in numbers:
        if moving[name].nunique() > 1 and name not in learning_rate_columns(results.swept):
            path = folder / f"mixing_weights_by_{name}.png"
            title = f"Mixing weights against {name}"
            figures.append(Figure(mixing_weight_curves(results, name, path), title))
    return figures


def _is_number(values: pd.Series) -> bool:
    known = values.dropna()
    return known.nunique() > 1 and all(isinstance(value, int | float) for value in known)


def learning_curves(results: Results, path: Path, column: str | None = None) -> Path:
    """What trials are judged by (success rate, test reward or episode return) against the results'
    axis: mean over seeds, with a band of one SEM, or below five seeds a thin line for each, all as
    `Results.curves_of` has them.

    One panel for each combination of swept values other than learning rates; of several learning
    rates each method shows its best (see `statistics.BEST_RULE`). Failed trials are left out, and a
    curve ends where the first of its trials does.

    Args:
        results: from `runs.load_results`.
        path: of the PNG to write; an SVG of the same name is written beside it.
        column: another column to draw, one of `EVALUATION_NAMES`.

    Returns:
        `path`.
    """
    column = column or results.measure
    rates = learning_rate_columns(results.swept)
    shown = best_learning_rates(compare_methods(results.trials))
    panels = _panels(shown, [name for name in results.swept if name not in rates])
    styles = method_styles(results.trials["method"])
    figure, axes = _rows_of_three(panels)
    counts = []
    for axis, (title, panel) in zip(axes.flat, panels, strict=False):
        for _, row in panel.iterrows():
            lines = results.curves_of(_trials_at(results, row), column)
            if lines.empty:
                continue
            used = [f"{name} {row[name]:g}" for name in rates if pd.notna(row[name])]
            label = f"{row['method']} ({', '.join(used)})" if used else row["method"]
            counts.append(lines.shape[1])
            _draw(axis, lines, f"{label}, n={counts[-1]}", styles[row["method"]])
        axis.set_title(title)
        axis.set_xlabel(results.axis.name)
        if column.endswith(("success_rate", "eval_reward")):
            axis.set_ylim(-0.02, 1.02)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8, loc="best")
    for axis in axes[:, 0]:
        axis.set_ylabel((MEASURE_NAMES | EVALUATION_NAMES)[column])
    note = seeds_note(counts) + (f"; {BEST}" if rates else "")
    return _save(figure, path, note)


def performance_profiles(results: Results, path: Path) -> Path:
    """Share of runs whose final score is above each level, a line a method, averaged over the tasks
    that all methods have (over its own, where they have none in common).

    Each method is at its best learning rate; only completed trials count. Bands are pointwise 95%
    intervals, where every task has five seeds.

    Args:
        results: from `runs.load_results`, with at least one final score.
        path: of the PNG to write; an SVG of the same name is written beside it.

    Returns:
        `path`.
    """
    final, name = f"final_{results.measure}", MEASURE_NAMES[results.measure]
    chosen = at_points(results.trials, best_learning_rates(compare_methods(results.trials)))
    methods = by_task(chosen, final)
    common = set.intersection(*map(set, methods.values()))
    scores = {
        method: [
            rows[final].to_numpy() for task, rows in tasks.items() if task in common or not common
        ]
        for method, tasks in methods.items()
    }
    every = np.concatenate([task for tasks in scores.values() for task in tasks])
    margin = 0.05 * (np.ptp(every) or 1)
    ends = [every.min() - margin, every.max() + margin]
    levels = np.unique([*ends, *every])
    styles = method_styles(results.trials["method"])
    figure, axes = _grid(1, 1, 1, sharey=False)
    axis, banded = axes[0, 0], False
    for method, tasks in scores.items():
        share, low, high = performance_profile(tasks, levels)
        colour = styles[method]["color"]
        label = f"{method}, n={sum(map(len, tasks))}"
        axis.step(levels, share, where="post", color=colour, linewidth=1.6, label=label)
        if not np.isnan(low).any():
            banded = True
            axis.fill_between(levels, low, high, step="post", color=colour, alpha=0.15, lw=0)
    axis.set(xlabel=f"final {name}", ylabel="share of runs above it", xlim=ends, ylim=(-0.02, 1.02))
    note = "share of completed runs with a higher final score"
    if len(common) > 1:
        note += f", averaged over {len(common)} tasks"
    elif not common:
        note += ", averaged over each method's own tasks: they have none in common"
    note += "; band: 95% intervals, pointwise" if banded else "; no bands: fewer than five seeds"
    if learning_rate_columns(results.swept):
        note += f"; {BEST}"
    return _save(figure, path, note, legend=_handles(axes))


def scores_against(results: Results, column: str, path: Path) -> Path:
    """Final score and AUC against a swept value: mean over completed seeds, with a band of one SEM,
    or below five seeds a dot for each.

    One column of panels for each combination of the other swept values; unless the column is a
    learning rate, each method is at its best one. A method for which the value is not swept is a
    dashed line.

    Args:
        results: from `runs.load_results`.
        column: one of the swept columns with numbers.
        path: of the PNG to write; an SVG of the same name is written beside it.

    Returns:
        `path`.
    """
    rates, final = learning_rate_columns(results.swept), f"final_{results.measure}"
    shown = compare_methods(results.trials)
    if column not in rates:
        shown = best_learning_rates(shown)
    others = [name for name in results.swept if name != column and name not in rates]
    panels = _panels(shown, others)
    styles = method_styles(results.trials["method"])
    # The final score above the AUC; of one panel beside it.
    shape = (2, len(panels)) if len(panels) > 1 else (1, 2)
    figure, axes = _grid(*shape, used=2 * len(panels), sharey=False)
    pairs = axes.T if len(panels) > 1 else axes
    values = np.sort(shown[column].dropna().unique().astype(float))
    for pair, (title, panel) in zip(pairs, panels, strict=True):
        pair[0].set_title(title)
        for axis, score in zip(pair, (final, "auc"), strict=True):
            for method, points in panel.groupby("method", sort=False):
                style = styles[str(method)]
                for _, row in points[points[column].isna()].iterrows():
                    axis.axhline(row[score], color=style["color"], linestyle="--", label=method)
                points = points.dropna(subset=[column]).sort_values(column)
                if points.empty:
                    continue
                x, y = points[column].astype(float), points[score]
                axis.plot(x, y, label=method, linewidth=1.6, markersize=5, **style)
                many = points["trials"] >= INTERVAL_SEEDS
                if many.any():
                    error, colour = points[f"{score}_sem"].where(many), style["color"]
                    axis.fill_between(x, y - error, y + error, color=colour, alpha=0.2, lw=0)
                for _, row in points[~many & (points["trials"] > 1)].iterrows():
                    own = at_points(results.trials, pd.DataFrame([row]))
                    own = own[own["state"] == "completed"]
                    place = np.full(len(own), float(row[column]))
                    axis.plot(place, own[score], ".", color=style["color"], alpha=0.5, markersize=4)
            if column in rates:
                axis.set_xscale("log")
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_xlabel(column)
    pairs[0][0].set_ylabel(f"final {MEASURE_NAMES[results.measure]}")
    pairs[0][1].set_ylabel(f"AUC over {results.axis.name}")
    note = seeds_note(shown["trials"][shown["trials"] > 0], "dots")
    if rates and column not in rates:
        note += f"; {BEST}"
    return _save(figure, path, note, legend=_handles(axes))


def mixing_weight_statistics(results: Results, path: Path) -> Path:
    """Distribution of the neurons' mixing weights against the results' axis, averaged over seeds:
    mean, median, the middle half of the neurons, and the range.

    One panel for each method with adaptive mixing weights and each swept point, each method at its
    best learning rate.

    Args:
        results: from `runs.load_results`.
        path: of the PNG to write; an SVG of the same name is written beside it.

    Returns:
        `path`.
    """
    shown = mixing_points(results)
    rates = learning_rate_columns(results.swept)
    panels = _panels(
        shown, ["method", *(name for name in results.swept if name not in rates)], share=False
    )
    figure, axes = _rows_of_three(panels)
    styles = method_styles(results.trials["method"])
    for axis, (title, panel) in zip(axes.flat, panels, strict=False):
        row = panel.iloc[0]
        trials, colour = _trials_at(results, row), styles[row["method"]]["color"]
        means = {
            name: results.curves_of(trials, f"mixing_weight_{name}").mean(axis=1)
            for name in ("min", "p25", "median", "mean", "p75", "max")
        }
        steps = means["mean"].index
        axis.fill_between(
            steps, means["min"], means["max"], color=colour, alpha=0.12, lw=0, label="range"
        )
        axis.fill_between(
            steps, means["p25"], means["p75"], color=colour, alpha=0.35, lw=0, label="quartiles"
        )
        axis.plot(steps, means["median"], color=colour, linestyle="--", label="median")
        axis.plot(steps, means["mean"], color=colour, linewidth=1.8, label="mean")
        axis.set_title(title.removeprefix("method = "), fontsize=10)
        axis.set_xlabel(results.axis.name)
    for axis in axes[:, 0]:
        axis.set_ylabel("mixing weight")
    note = "over the network's neurons, averaged over seeds" + (f"; {BEST}" if rates else "")
    return _save(figure, path, note, legend=_handles(axes))


def mixing_weight_curves(results: Results, column: str, path: Path) -> Path:
    """Mean mixing weight against the results' axis, a line for each value of a swept column and a
    panel for each method and layer.

    Args:
        results: from `runs.load_results`.
        column: one of the swept columns.
        path: of the PNG to write; an SVG of the same name is written beside it.

    Returns:
        `path`.
    """
    shown = mixing_points(results).dropna(subset=[column])
    rates = [name for name in learning_rate_columns(results.swept) if name != column]
    others = [name for name in results.swept if name != column and name not in rates]
    layers = [name for name in map(str, results.curves) if name.endswith("_mixing_weight_mean")]
    columns = layers or ["mixing_weight_mean"]
    panels = [
        (", ".join(filter(None, [title.removeprefix("method = "), name.partition("_")[0]])), part)
        if layers
        else (title.removeprefix("method = "), part)
        for title, part in _panels(shown, ["method", *others], share=False)
        for name in columns
    ]
    figure, axes = _rows_of_three(panels)
    values, counts = list(dict.fromkeys(shown[column])), []
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(values)))
    for i, (axis, (title, panel)) in enumerate(zip(axes.flat, panels, strict=False)):
        for _, row in panel.iterrows():
            lines = results.curves_of(_trials_at(results, row), columns[i % len(columns)])
            if not lines.empty:
                style = {"color": colours[values.index(row[column])]}
                counts.append(lines.shape[1])
                _draw(axis, lines, f"{column} = {plain(row[column])}", style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(results.axis.name)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean mixing weight")
    note = seeds_note(counts) + (f"; {BEST}" if rates else "")
    return _save(figure, path, note, legend=_handles(axes))


def mixing_points(results: Results) -> pd.DataFrame:
    """The methods and swept points whose mixing weights move, each method at its best learning
    rate; from `statistics.compare_methods`."""
    spread = results.curves.groupby("trial", sort=False)["mixing_weight_mean"].agg(["min", "max"])
    moving = set(spread.index[spread["min"] < spread["max"]])
    comparison = best_learning_rates(compare_methods(results.trials))
    kept = [
        bool(moving & set(_trials_at(results, row)["trial"])) for _, row in comparison.iterrows()
    ]
    shown = comparison[kept]
    shown.attrs = comparison.attrs
    return shown


def _trials_at(results: Results, row: pd.Series) -> pd.DataFrame:
    """The trials of one method and swept point that did not fail."""
    trials = at_points(results.trials, pd.DataFrame([row]))
    return trials[trials["state"] != "failed"]


def _panels(
    frame: pd.DataFrame, columns: list[str], share: bool = True
) -> list[tuple[str, pd.DataFrame]]:
    """A title and the rows of each combination of values; one panel of all without columns.

    A method may lack some of the values. With `share` it stands in every panel that has them.
    """
    panels: list[tuple[str, pd.DataFrame]] = []
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


def plain(value: object) -> str:
    """A swept value as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grid(rows: int, columns: int, used: int, sharey: bool) -> tuple[Any, Any]:
    """A figure with a grid of axes, those after the first `used` switched off."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns + 0.6, 3.8 * rows), squeeze=False, sharey=sharey
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[used:]:
        axis.set_axis_off()
    return figure, axes


def _rows_of_three(panels: Sequence[object]) -> tuple[Any, Any]:
    columns = min(3, len(panels))
    return _grid(-(-len(panels) // columns), columns, len(panels), sharey=True)


def _handles(axes: Any) -> dict[str, Any]:
    """One entry of a legend for each label in any of the axes."""
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def _save(figure: Any, path: Path, note: str, legend: dict[str, Any] | None = None) -> Path:
    """Lay out a figure with its note and legend below, and write it as PNG and SVG."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(note, int(width * 17))
    below = 0.16 * len(lines) + 0.08
    figure.text(
        0.08 / width, 0.06 / height, "\n".join(lines), fontsize=7, color="0.35", va="bottom"
    )
    if legend:
        columns = max(1, min(len(legend), int(width / 1.9)))
        figure.legend(
            legend.values(),
            legend.keys(),
            loc="lower center",
            bbox_to_anchor=(0.5, below / height),
            ncols=columns,
            frameon=False,
            fontsize=8,
        )
        below += 0.2 * -(-len(legend) // columns) + 0.1
    figure.tight_layout(rect=(0, below / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    # Without the date and with a fixed salt the same numbers are the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "sgrl"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    return path


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
    if count >= INTERVAL_SEEDS:
        error = lines.std(axis=1, ddof=1).to_numpy() / np.sqrt(count)
        axis.fill_between(steps, mean - error, mean + error, color=style["color"], alpha=0.2, lw=0)
    elif count > 1:
        axis.plot(steps, lines.to_numpy(), color=style["color"], linewidth=0.6, alpha=0.5)


def expert_ratios(results: pd.DataFrame, case: str, path: Path) -> Path:
    """Ratio of mean squared errors against d on the expert network, with 2^(d-k) dashed.

    One panel for each number of samples n, one line for each k; bars are 95% bootstrap intervals.

    Args:
        results: rows of the expert simulation, under the names of its CSV.
        case: the one to draw.
        path: of the PNG to write; an SVG of the same name is written beside it.

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
    return _save(figure, path, note)


def probe_errors(neurons: pd.DataFrame, layers: pd.DataFrame, path: Path, note: str) -> Path:
    """Estimation error of a network's gradients, its mixing weights, and what neurons could know.

    Left: the mean squared error under backprop and sgprop, of each layer and, pale, of its
    neurons. Middle: each neuron's mixing weight and the best ones. Right: the share of the
    received gradient's conditional mean that the local inputs explain (condition B). Bars are 95%
    bootstrap intervals.

    Args:
        neurons, layers: rows of the probe, under the names of its CSVs.
        path: of the PNG to write; an SVG of the same name is written beside it.
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
    return _save(figure, path, note)
