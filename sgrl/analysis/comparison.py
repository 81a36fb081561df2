"""Comparisons of methods over the trials of a sweep, as frames."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from sgrl.analysis.rank_test import (
    ALPHA,
    detectable_difference,
    holm,
    rank_test,
    seeds_needed,
    smallest_p,
)
from sgrl.analysis.statistics import (
    Pairs,
    median_interval,
    probability_of_improvement,
    win_share,
)
from sgrl.results.folder import OVER

#: States of trials that are over and have no final score.
LOST = tuple(state for state in OVER if state != "completed")
#: A method's trials by task.
Tasks = Mapping[str, pd.DataFrame]
BEST_RULE = (
    "each method at its best learning rate, and best in all that a search was for: of those at "
    "which no trial failed (of all where there is none) the one with the highest mean AUC, of "
    "equal ones the smallest"
)
#: Columns of `runs.load_results` in which compared methods should not differ, in words.
CONFOUNDERS = {
    "planned": "length of training",
    "budget": "budget",
    "batch": "batch size",
    "parameters": "network size",
}


def measure_of(frame: pd.DataFrame) -> str:
    """Return what trials are judged by.

    Args:
        frame: from `runs.load_results` or `compare_methods`.

    Returns:
        A key of `MEASURES`.
    """
    return frame.attrs.get("measure", "success_rate")


def axis_of(frame: pd.DataFrame) -> str:
    """Return the axis of areas under curves.

    Args:
        frame: from `runs.load_results`.

    Returns:
        A key of `AXES`.
    """
    return frame.attrs.get("x", "env_steps")


def plain(value: object) -> str:
    """Format a swept value.

    Args:
        value: a number, or text.

    Returns:
        The text.
    """
    return f"{value:g}" if isinstance(value, float) else str(value)


def learning_rate_columns(swept: list[str]) -> list[str]:
    """Return the swept columns that are learning rates of the policy.

    Args:
        swept: the swept columns.

    Returns:
        Those whose key ends in `lr`.
    """
    return [name for name in swept if name.split(".")[-1] == "lr"]


def chosen_columns(frame: pd.DataFrame) -> list[str]:
    """Return the swept columns of which each method is shown at its best (`BEST_RULE`).

    Args:
        frame: from `runs.load_results` or `compare_methods`.

    Returns:
        Learning rates, and what a search was for.
    """
    swept, searched = frame.attrs.get("swept", []), frame.attrs.get("searched", [])
    return [name for name in swept if name in searched or name in learning_rate_columns([name])]


def compare_methods(trials: pd.DataFrame) -> pd.DataFrame:
    """Summarise each method's completed trials at each swept point.

    Args:
        trials: from `runs.load_results`.

    Returns:
        One row per method and swept point, in the order of `trials`: method, the swept columns,
        trials (completed ones), those in each state of `LOST`, unfinished, then for
        final_success_rate (or the final value of another measure) and auc the mean under that name,
        and columns with the suffixes _sem, _iqm, _median, _median_ci_low and _median_ci_high (NaN
        for fewer than five seeds); last x, the axis of auc.
    """
    final = f"final_{measure_of(trials)}"
    swept = trials.attrs.get("swept", [])
    rows = []
    for key, group in trials.groupby(["method", *swept], sort=False, dropna=False):
        states = group["state"]
        completed = group[states == "completed"]
        row = dict(zip(["method", *swept], key, strict=True))
        row["trials"] = len(completed)
        for state in LOST:
            row[state] = int((states == state).sum())
        row["unfinished"] = int((~states.isin(OVER)).sum())
        for measure in (final, "auc"):
            scores = completed[measure].dropna()
            row[measure] = scores.mean()
            row[f"{measure}_sem"] = scores.sem()
            row[f"{measure}_iqm"] = scipy.stats.trim_mean(scores, 0.25) if len(scores) else np.nan
            names = [f"{measure}_median{end}" for end in ("", "_ci_low", "_ci_high")]
            row |= zip(names, median_interval(scores), strict=True)
        rows.append(row)
    comparison = pd.DataFrame(rows)
    comparison["x"] = axis_of(trials)
    comparison.attrs = {"swept": swept, "measure": measure_of(trials)}
    comparison.attrs["searched"] = trials.attrs.get("searched", [])
    return comparison


def best_learning_rates(comparison: pd.DataFrame) -> pd.DataFrame:
    """Select one learning rate for each method and point of the other swept values (`BEST_RULE`).

    Args:
        comparison: from `compare_methods`.

    Returns:
        The selected rows; all of them if no learning rate was swept.
    """
    swept = comparison.attrs.get("swept", [])
    rates = chosen_columns(comparison)
    if not rates:
        return comparison
    others = ["method", *(name for name in swept if name not in rates)]
    ranked = comparison.assign(failing=comparison["failed"] > 0).sort_values(
        ["failing", "auc", *rates], ascending=[True, False, *(True for _ in rates)]
    )
    best = ranked.groupby(others, sort=False, dropna=False).head(1).sort_index()
    best = best.drop(columns="failing")
    best.attrs = comparison.attrs
    return best


def at_points(trials: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Select the trials at some methods and swept points.

    Args:
        trials: from `runs.load_results`.
        points: rows with a method and the swept values, such as those of `compare_methods`.

    Returns:
        The selected rows of `trials`.
    """
    keys = ["method", *trials.attrs.get("swept", [])]
    # By group number, as NaN (a value that a method does not have) must equal NaN.
    number = pd.concat([trials[keys], points[keys]]).groupby(keys, dropna=False).ngroup()
    chosen = trials[number[: len(trials)].isin(set(number[len(trials) :])).to_numpy()]
    chosen.attrs = trials.attrs
    return chosen


def by_task(trials: pd.DataFrame, score: str = "auc") -> dict[str, dict[str, pd.DataFrame]]:
    """Group the completed trials that have a score by method and task.

    Args:
        trials: from `runs.load_results`.
        score: "auc" or the final score's column.

    Returns:
        The rows of each method by task, the point of the swept values other than `chosen_columns`.
    """
    swept = trials.attrs.get("swept", [])
    others = [name for name in swept if name not in chosen_columns(trials)]
    completed = trials[(trials["state"] == "completed") & trials[score].notna()]
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for (method, *task), rows in completed.groupby(["method", *others], sort=False, dropna=False):
        tables.setdefault(str(method), {})[str(task)] = rows
    return tables


def compare_pairs(trials: pd.DataFrame, plan: float | None = None) -> pd.DataFrame:
    """Compare the AUC of every two methods over their completed trials.

    Tasks are the points of the swept values other than learning rates at which both methods have
    completed trials. The p-values are `rank_test`'s; `p_holm` is corrected for the number of rows.

    Args:
        trials: from `runs.load_results`; usually those at each method's best learning rate.
        plan: a difference of AUC for which to estimate the seeds needed.

    Returns:
        One row per pair, with columns first, second, tasks, first_trials, second_trials,
        fewest_seeds (of a method in a task), difference (of the means, averaged over tasks),
        probability, probability_ci_low, probability_ci_high (that a run of the first is better), p,
        smallest_p, detectable_difference, confounded_by, with a plan seeds_needed, then p_holm,
        verdict and x, the axis.
    """
    tables = by_task(trials)
    pairs = itertools.combinations(dict.fromkeys(trials["method"]), 2)
    rows = [
        {"first": first, "second": second}
        | _versus(tables.get(first, {}), tables.get(second, {}), plan)
        for first, second in pairs
    ]
    return _judged(rows, trials)


def compare_experiments(
    first: pd.DataFrame, second: pd.DataFrame, plan: float | None = None
) -> pd.DataFrame:
    """Compare the AUC of each method of one experiment with its AUC in another one.

    Args:
        first: trials of one experiment, as for `compare_pairs`.
        second: trials of the other one.
        plan: as for `compare_pairs`.

    Returns:
        One row for each method that both have, in the first one's order, with column method and
        those of `compare_pairs`; the probability is that a run of the first experiment is better.
    """
    ours, theirs = by_task(first), by_task(second)
    rows = [
        {"method": name} | _versus(ours[name], theirs[name], plan)
        for name in ours
        if name in theirs
    ]
    return _judged(rows, first)


def _versus(first: Tasks, second: Tasks, plan: float | None) -> dict[str, Any]:
    """Columns that compare two methods on the tasks in which both have scores."""
    tasks = [task for task in first if task in second]
    pairs = [(first[task]["auc"].to_numpy(), second[task]["auc"].to_numpy()) for task in tasks]
    better = probability_of_improvement(pairs)
    difference, differing = [x.mean() - y.mean() for x, y in pairs], _differing(first, second)
    detectable = detectable_difference(pairs)
    row = {
        "tasks": len(tasks),
        "first_trials": sum(len(x) for x, _ in pairs),
        "second_trials": sum(len(y) for _, y in pairs),
        "fewest_seeds": min((len(scores) for pair in pairs for scores in pair), default=0),
        "difference": np.mean(difference) if tasks else np.nan,
        "probability": better.value,
        "probability_ci_low": better.low,
        "probability_ci_high": better.high,
        "p": rank_test(pairs),
        "smallest_p": smallest_p(pairs),
        "detectable_difference": detectable,
        "excluded": _excluded(pairs, detectable),
        "confounded_by": ", ".join(CONFOUNDERS[name] for name in differing) or "nothing",
    }
    return row if plan is None else row | {"seeds_needed": seeds_needed(pairs, plan)}


def _excluded(pairs: Pairs, difference: float) -> bool:
    """Whether `rank_test` rejects a true difference of that size in either direction."""
    if not np.isfinite(difference):
        return False
    for shift in (difference, -difference):
        moved = [(np.asarray(x) + shift, y) for x, y in pairs]
        wins = np.mean([win_share(x, np.asarray(y)) for x, y in moved])
        if rank_test(moved) > ALPHA or (wins - 0.5) * shift <= 0:
            return False
    return True


def _judged(rows: list[dict[str, Any]], trials: pd.DataFrame) -> pd.DataFrame:
    """Add corrected p-values, verdicts and the trials' axis to the rows."""
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"], row["verdict"] = p, _verdict(row, p, row.pop("excluded"))
        row["x"] = axis_of(trials)
    return pd.DataFrame(rows)


def _verdict(row: Mapping[str, Any], p_holm: float, excluded: bool) -> str:
    needed = row["detectable_difference"]
    if not row["tasks"]:
        return ""
    if p_holm <= ALPHA:
        return "differs"
    if row["p"] <= ALPHA:
        return f"cannot tell: p (Holm) is above {ALPHA:g}"
    if row["smallest_p"] > ALPHA:
        return f"cannot tell: too few seeds for any p below {ALPHA:g}"
    if np.isnan(needed):
        return "cannot tell: one seed has no spread"
    if needed == 0:
        return "no difference: no run differs"
    if excluded:
        return f"no difference of {needed:.2g} or more"
    return f"cannot tell: would have needed a difference of {needed:.2g}"


def confounding(methods: Mapping[str, Tasks]) -> list[str]:
    """Describe the confounders of a comparison.

    Args:
        methods: each method's completed trials by task, from `by_task`.

    Returns:
        One line for each of `CONFOUNDERS` in which methods differ within a task.
    """
    differing = {
        column
        for first, second in itertools.combinations(methods.values(), 2)
        for column in _differing(first, second)
    }
    lines = []
    for column, word in CONFOUNDERS.items():
        if column in differing:
            known = {method: _known(tasks.values(), column) for method, tasks in methods.items()}
            said = (f"{method} {_either(values)}" for method, values in known.items() if values)
            lines.append(f"Confounded by {word}: {', '.join(said)}.")
    return lines


def _differing(first: Tasks, second: Tasks) -> list[str]:
    """The `CONFOUNDERS` in which two methods differ, in a common task or, without one, overall."""
    common = [([first[task]], [second[task]]) for task in first if task in second]
    found = []
    for column in CONFOUNDERS:
        for ours, theirs in common or [(list(first.values()), list(second.values()))]:
            values = set(_known(ours, column)), set(_known(theirs, column))
            if all(values) and values[0] != values[1]:
                found.append(column)
                break
    return found


def _known(frames: Iterable[pd.DataFrame], column: str) -> list[str]:
    """A column's distinct values in words; none if it is not recorded."""
    values = (value for frame in frames if column in frame for value in frame[column].dropna())
    unit = "iterations" if column == "planned" else column
    said = (value if isinstance(value, str) else f"{value:,.0f} {unit}" for value in values)
    return list(dict.fromkeys(said))


def _either(values: Sequence[str]) -> str:
    """Join numbers with units, naming a common unit once."""
    units = {value.partition(" ")[2] for value in values}
    if len(units) > 1:
        return " or ".join(values)
    return f"{' or '.join(value.partition(' ')[0] for value in values)} {units.pop()}"
