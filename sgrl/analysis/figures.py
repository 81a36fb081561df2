"""Figures of a sweep, one function each."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd

from sgrl.analysis.comparison import (
    at_points,
    best_learning_rates,
    by_task,
    chosen_columns,
    compare_methods,
    learning_rate_columns,
    plain,
)
from sgrl.analysis.statistics import INTERVAL_SEEDS, performance_profile
from sgrl.analysis.style import (
    draw_mean,
    grid,
    method_styles,
    rows_of_three,
    save,
    seeds_note,
    split_panels,
)
from sgrl.results.columns import METRICS
from sgrl.results.metrics import EVALUATION_COLUMNS, MEASURE_NAMES
from sgrl.results.runs import Results

#: Swept values that are all named on an axis; a search has more.
MOST_TICKS = 12
#: What notes say where `comparison.BEST_RULE` selected what is shown.
BEST = "each method at its best learning rate, by mean AUC"


class Figure(NamedTuple):
    """A figure that was written.

    Attributes:
        path: of its PNG; an SVG of the same name lies beside it.
        title: what it shows.
    """

    path: Path
    title: str


def write_figures(results: Results, folder: Path) -> list[Figure]:
    """Write every figure that a sweep's results allow.

    These are learning curves, those of evaluations apart from training (success rates, else
    returns), performance profiles, scores against each swept number, and mixing weights if they
    change.

    Args:
        results: from `runs.load_results`.
        folder: for the figures; created if it does not exist.

    Returns:
        The figures, in the order of a report.
    """
    measure, figures = results.measure, []

    def add(title: str, name: str, draw: Callable[..., Path], *column: str) -> None:
        figures.append(Figure(draw(results, folder / f"{name}.png", *column), title))

    add(f"{MEASURE_NAMES[measure].capitalize()} while training", measure, learning_curves)
    known = results.curves.dropna(axis=1, how="all")
    evaluated = [name for name in EVALUATION_COLUMNS if name in known]
    rates = [name for name in evaluated if name.endswith("success_rate")]
    for column in rates or evaluated:
        add(METRICS[column].name.capitalize(), column, learning_curves, column)
    if by_task(results.trials, f"final_{measure}"):
        add("Performance profiles", "performance_profiles", performance_profiles)
    numbers = [name for name in results.swept if _is_number(results.trials[name])]
    for name in numbers:
        add(f"Scores against {name}", f"scores_by_{name}", scores_against, name)
    moving = mixing_points(results)
    if len(moving):
        add("Mixing weights", "mixing_weights", mixing_weight_statistics)
    for name in numbers:
        if moving[name].nunique() > 1 and name not in chosen_columns(results.trials):
            title = f"Mixing weights against {name}"
            add(title, f"mixing_weights_by_{name}", mixing_weight_curves, name)
    return figures


def _is_number(values: pd.Series) -> bool:
    known = values.dropna()
    return known.nunique() > 1 and all(isinstance(value, int | float) for value in known)


def learning_curves(results: Results, path: Path, column: str | None = None) -> Path:
    """Draw learning curves: the mean over seeds, with a band of one SEM.

    With fewer than five seeds each of them is a thin line instead. There is one panel for each
    combination of swept values other than learning rates, of which each method shows its best
    (`comparison.BEST_RULE`). Failed trials are left out; the seeds' common axis is that of
    `Results.curves_of`.

    Args:
        results: from `runs.load_results`.
        path: the PNG to write; an SVG of the same name is written beside it.
        column: one of `EVALUATION_COLUMNS`, instead of the measure that trials are judged by.

    Returns:
        `path`.
    """
    column = column or results.measure
    rates = chosen_columns(results.trials)
    shown = best_learning_rates(compare_methods(results.trials))
    panels = split_panels(shown, [name for name in results.swept if name not in rates])
    styles = method_styles(results.trials["method"])
    name = METRICS[column].name
    figure, axes = rows_of_three(panels, results.axis.name, name, fontsize="large")
    counts = []
    for axis, (_, panel) in zip(axes.flat, panels, strict=False):
        for _, row in panel.iterrows():
            lines = results.curves_of(_trials_at(results, row), column)
            if lines.empty:
                continue
            used = [f"{name} {plain(row[name])}" for name in rates if pd.notna(row[name])]
            used += ["stopped early"] if row["stopped"] and not row["trials"] else []
            label = f"{row['method']} ({', '.join(used)})" if used else row["method"]
            counts.append(lines.shape[1])
            draw_mean(axis, lines, f"{label}, n={counts[-1]}", styles[row["method"]])
        if column.endswith(("success_rate", "eval_reward")):
            axis.set_ylim(-0.02, 1.02)
        if axis.lines:
            axis.legend(frameon=False, fontsize=8, loc="best")
    note = seeds_note(counts) + (f"; {BEST}" if rates else "")
    return save(figure, path, note)


def performance_profiles(results: Results, path: Path) -> Path:
    """Draw each method's share of runs whose final score is above each level.

    Shares are averaged over the tasks that all methods have, or over each method's own if they have
    none in common. Each method is at its best learning rate; only completed trials count. Bands are
    pointwise 95% intervals, drawn if every task has five seeds.

    Args:
        results: from `runs.load_results`, with at least one final score.
        path: the PNG to write; an SVG of the same name is written beside it.

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
    figure, axes = grid(1, 1, 1)
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
    if chosen_columns(results.trials):
        note += f"; {BEST}"
    return save(figure, path, note, legend=axes.flat)


def scores_against(results: Results, path: Path, column: str) -> Path:
    """Draw final scores and AUC against a swept value: the mean over seeds, with a band of one SEM.

    With fewer than five seeds each of them is a dot instead. There is one column of panels for each
    combination of the other swept values; unless the column is a learning rate, each method is at
    its best one. A method for which the value is not swept is a dashed line.

    Args:
        results: from `runs.load_results`.
        path: the PNG to write; an SVG of the same name is written beside it.
        column: one of the swept columns with numbers.

    Returns:
        `path`.
    """
    rates, final = chosen_columns(results.trials), f"final_{results.measure}"
    shown = compare_methods(results.trials)
    if column not in rates:
        shown = best_learning_rates(shown)
    others = [name for name in results.swept if name != column and name not in rates]
    panels = split_panels(shown, others)
    styles = method_styles(results.trials["method"])
    # The final score above the AUC; for one panel beside it.
    shape = (2, len(panels)) if len(panels) > 1 else (1, 2)
    figure, axes = grid(*shape, used=2 * len(panels))
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
            if column in learning_rate_columns([column]):
                axis.set_xscale("log")
            if len(values) <= MOST_TICKS:
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_xlabel(column)
    pairs[0][0].set_ylabel(f"final {MEASURE_NAMES[results.measure]}")
    pairs[0][1].set_ylabel(f"AUC over {results.axis.name}")
    note = seeds_note(shown["trials"][shown["trials"] > 0], "dots")
    if rates and column not in rates:
        note += f"; {BEST}"
    return save(figure, path, note, legend=axes.flat)


def mixing_weight_statistics(results: Results, path: Path) -> Path:
    """Draw the distribution of mixing weights over neurons while training, averaged over seeds.

    Shown are mean, median, quartiles and range. There is one panel for each method with adaptive
    mixing weights and each swept point, each method at its best learning rate.

    Args:
        results: from `runs.load_results`.
        path: the PNG to write; an SVG of the same name is written beside it.

    Returns:
        `path`.
    """
    shown = mixing_points(results)
    rates = chosen_columns(results.trials)
    panels = split_panels(
        shown, ["method", *(name for name in results.swept if name not in rates)], share=False
    )
    figure, axes = rows_of_three(panels, results.axis.name, "mixing weight")
    styles = method_styles(results.trials["method"])
    for axis, (_, panel) in zip(axes.flat, panels, strict=False):
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
    note = "over the network's neurons, averaged over seeds" + (f"; {BEST}" if rates else "")
    return save(figure, path, note, legend=axes.flat)


def mixing_weight_curves(results: Results, path: Path, column: str) -> Path:
    """Draw mean mixing weights while training, a line for each value of a swept column.

    There is one panel for each method and layer.

    Args:
        results: from `runs.load_results`.
        path: the PNG to write; an SVG of the same name is written beside it.
        column: one of the swept columns.

    Returns:
        `path`.
    """
    shown = mixing_points(results).dropna(subset=[column])
    rates = [name for name in chosen_columns(results.trials) if name != column]
    others = [name for name in results.swept if name != column and name not in rates]
    layers = [name for name in map(str, results.curves) if name.endswith("_mixing_weight_mean")]
    columns = layers or ["mixing_weight_mean"]
    panels = [
        (", ".join(filter(None, [title.removeprefix("method = "), name.partition("_")[0]])), part)
        if layers
        else (title.removeprefix("method = "), part)
        for title, part in split_panels(shown, ["method", *others], share=False)
        for name in columns
    ]
    figure, axes = rows_of_three(panels, results.axis.name, "mean mixing weight")
    values, counts = list(dict.fromkeys(shown[column])), []
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(values)))
    for i, (axis, (_, panel)) in enumerate(zip(axes.flat, panels, strict=False)):
        for _, row in panel.iterrows():
            lines = results.curves_of(_trials_at(results, row), columns[i % len(columns)])
            if not lines.empty:
                style = {"color": colours[values.index(row[column])]}
                counts.append(lines.shape[1])
                draw_mean(axis, lines, f"{column} = {plain(row[column])}", style)
    note = seeds_note(counts) + (f"; {BEST}" if rates else "")
    return save(figure, path, note, legend=axes.flat)


def mixing_points(results: Results) -> pd.DataFrame:
    """Select the methods and swept points whose mixing weights change while training.

    Args:
        results: from `runs.load_results`.

    Returns:
        Rows of `comparison.compare_methods`, each method at its best learning rate.
    """
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
    """The trials of one method and swept point to draw: no failed ones.

    Those that were stopped early are drawn, as far as they go, only where no other has begun.
    """
    trials = at_points(results.trials, pd.DataFrame([row]))
    trials = trials[~trials["state"].isin(["failed", "skipped"])]
    stopped = trials["state"] == "stopped"
    return trials if stopped.all() else trials[~stopped]
