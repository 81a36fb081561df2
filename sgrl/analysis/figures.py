"""Figures of a sweep, one function each."""

import itertools
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
from sgrl.analysis.curves import DASHES, Curves, Line
from sgrl.analysis.statistics import INTERVAL_SEEDS, performance_profile
from sgrl.analysis.style import (
    draw_band,
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
        curves: what a page can draw itself; None for other figures.
    """

    path: Path
    title: str
    curves: Curves | None = None


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

    def add_curves(curves: Curves, name: str) -> None:
        figures.append(Figure(curves.draw(folder / f"{name}.png"), curves.title, curves))

    add_curves(curves_of_training(results), measure)
    known = results.curves.dropna(axis=1, how="all")
    evaluated = [name for name in EVALUATION_COLUMNS if name in known]
    rates = [name for name in evaluated if name.endswith("success_rate")]
    for column in rates or evaluated:
        add_curves(curves_of_training(results, column), column)
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
            add_curves(curves_of_mixing(results, name), f"mixing_weights_by_{name}")
    return figures


def _is_number(values: pd.Series) -> bool:
    known = values.dropna()
    return known.nunique() > 1 and all(isinstance(value, int | float) for value in known)


def curves_of_training(
    results: Results, column: str | None = None, overlay: bool = False
) -> Curves:
    """Collect learning curves, one for each method.

    There is one panel for each combination of swept values other than `chosen_columns`, of which
    each method shows its best (`comparison.BEST_RULE`). Failed trials are left out; the seeds'
    common axis is that of `Results.curves_of`.

    Args:
        results: from `runs.load_results`.
        column: one of `EVALUATION_COLUMNS`, instead of the measure that trials are judged by.
        overlay: whether several experiments share panels, told apart by dashes.

    Returns:
        The curves.
    """
    name = METRICS[column or results.measure].name
    title = name.capitalize() + ("" if column else " while training")
    column = column or results.measure
    rates = chosen_columns(results.trials)
    shown = best_learning_rates(compare_methods(results.trials))
    panels = []
    styles = method_styles(results.trials["method"])
    experiments = list(dict.fromkeys(results.trials["experiment"])) if overlay else []
    split = [n for n in results.swept if n not in rates and not (overlay and n == "experiment")]
    for panel, points in split_panels(shown, split):
        lines = []
        for _, row in points.iterrows():
            values = results.curves_of(_trials_at(results, row), column)
            if values.empty:
                continue
            used = [f"{name} {plain(row[name])}" for name in rates if pd.notna(row[name])]
            used += ["stopped early"] if row["stopped"] and not row["trials"] else []
            label = f"{row['method']} ({', '.join(used)})" if used else row["method"]
            dash = 0
            if overlay:
                label = f"{row['experiment']}: {label}"
                dash = experiments.index(row["experiment"]) % len(DASHES)
            lines.append(Line(label, values, styles[row["method"]], dash))
        panels.append((panel, lines))
    limits = (-0.02, 1.02) if column.endswith(("success_rate", "eval_reward")) else None
    more = BEST if rates else ""
    return Curves(title, results.axis.name, name, panels, limits, more)


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
    # Bands of more methods than three hide each other: each has a panel then.
    alone = list(scores) if len(scores) > 3 else []
    columns = min(3, len(alone) or 1)
    rows = -(-len(alone) // columns) or 1
    figure, axes = grid(rows, columns, len(alone) or 1, sharex=True, sharey=True)
    banded = False
    for method, tasks in scores.items():
        share, low, high = performance_profile(tasks, levels)
        colour = styles[method]["color"]
        label = f"{method}, n={sum(map(len, tasks))}"
        for axis, shown in zip(axes.flat, alone or [method], strict=False):
            (line,) = axis.step(levels, share, where="post", color=colour, linewidth=1.6)
            if shown != method:
                line.set(linewidth=0.9, alpha=0.4)
                continue
            line.set_label(label)
            if not np.isnan(low).any():
                banded = True
                draw_band(axis, levels, low, high, colour, step="post")
    for axis, method in itertools.zip_longest(axes.flat[: len(alone) or 1], alone):
        axis.set(xlim=ends, ylim=(-0.02, 1.02), title=method or "")
        axis.set_xlabel(f"final {name}")
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of runs above it")
    note = "share of completed runs with a higher final score"
    if len(common) > 1:
        note += f", averaged over {len(common)} tasks"
    elif not common:
        note += ", averaged over each method's own tasks: they have none in common"
    note += "; band: 95% intervals, pointwise" if banded else "; no bands: fewer than five seeds"
    if chosen_columns(results.trials):
        note += f"; {BEST}"
    figure.suptitle("Performance profiles", fontsize=11)
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
    figure, axes = grid(*shape, used=2 * len(panels), sharey="row" if len(panels) > 1 else False)
    counts = shown.dropna(subset=[column]).groupby("method")["trials"].agg(list)
    pairs = axes.T if len(panels) > 1 else axes
    values = np.sort(shown[column].dropna().unique().astype(float))
    for pair, (title, panel) in zip(pairs, panels, strict=True):
        pair[0].set_title(title)
        for axis, score in zip(pair, (final, "auc"), strict=True):
            for method, points in panel.groupby("method", sort=False):
                style = styles[str(method)]
                for _, row in points[points[column].isna()].iterrows():
                    label = f"{method}, n={row['trials']}"
                    axis.axhline(row[score], color=style["color"], linestyle="--", label=label)
                points = points.dropna(subset=[column]).sort_values(column)
                if points.empty:
                    continue
                x, y = points[column].astype(float), points[score]
                seeds = "–".join(f"{n}" for n in sorted({min(counts[method]), max(counts[method])}))
                label = f"{method}, n={seeds}"
                axis.plot(x, y, label=label, linewidth=1.6, markersize=5, **style)
                many = points["trials"] >= INTERVAL_SEEDS
                if many.any():
                    error, colour = points[f"{score}_sem"].where(many), style["color"]
                    draw_band(axis, x, y - error, y + error, colour)
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
    figure.suptitle(f"Scores against {column}", fontsize=11)
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
        axis.set_title(f"{axis.get_title()}, n={len(trials)}", fontsize=10)
    figure.suptitle("Mixing weights", fontsize=11)
    note = "over the network's neurons, averaged over seeds" + (f"; {BEST}" if rates else "")
    return save(figure, path, note, legend=axes.flat)


def curves_of_mixing(results: Results, column: str) -> Curves:
    """Collect mean mixing weights while training, a line for each value of a swept column.

    There is one panel for each method and layer.

    Args:
        results: from `runs.load_results`.
        column: one of the swept columns.

    Returns:
        The curves.
    """
    shown = mixing_points(results).dropna(subset=[column])
    rates = [name for name in chosen_columns(results.trials) if name != column]
    others = [name for name in results.swept if name != column and name not in rates]
    layers = [name for name in map(str, results.curves) if name.endswith("_mixing_weight_mean")]
    values = list(dict.fromkeys(shown[column]))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(values)))
    panels = []
    for title, points in split_panels(shown, ["method", *others], share=False):
        for name in layers or ["mixing_weight_mean"]:
            lines = []
            for _, row in points.iterrows():
                curves = results.curves_of(_trials_at(results, row), name)
                if not curves.empty:
                    style = {"color": colours[values.index(row[column])]}
                    lines.append(Line(f"{column} = {plain(row[column])}", curves, style))
            layer = name.partition("_")[0] if layers else ""
            panel = ", ".join(filter(None, [title.removeprefix("method = "), layer]))
            panels.append((panel, lines))
    return Curves(
        f"Mixing weights against {column}",
        results.axis.name,
        "mean mixing weight",
        panels,
        more=BEST if rates else "",
        smooth=False,
    )


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
