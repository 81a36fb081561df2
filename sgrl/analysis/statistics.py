"""Comparisons of methods over seeds."""

import numpy as np
import pandas as pd


def sem(values: pd.Series) -> float:
    """Standard error of the mean; NaN for fewer than two values; NaN values do not count."""
    return float(values.std(ddof=1) / np.sqrt(values.count()))


def compare_methods(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean and SEM over seeds for each method at each swept point.

    Args:
        trials: from `runs.load_trials`.

    Returns:
        One row a method and swept point, in the order of `trials`: method, the swept columns,
        trials (completed ones, over which the means are), failed, final_success_rate,
        final_success_rate_sem, auc, auc_sem (final_eval_reward where trials are judged by that).
    """
    final = f"final_{measure_of(trials)}"
    swept = trials.attrs.get("swept", [])
    rows = []
    for key, group in trials.groupby(["method", *swept], sort=False, dropna=False):
        completed = group[group["state"] == "completed"]
        row = dict(zip(["method", *swept], key, strict=True))
        row["trials"] = len(completed)
        row["failed"] = int((group["state"] == "failed").sum())
        for measure in (final, "auc"):
            row[measure] = completed[measure].mean()
            row[f"{measure}_sem"] = sem(completed[measure])
        rows.append(row)
    comparison = pd.DataFrame(rows)
    comparison.attrs = {"swept": swept, "measure": measure_of(trials)}
    return comparison


def measure_of(frame: pd.DataFrame) -> str:
    """What the trials of a frame are judged by: "success_rate" or "eval_reward"."""
    return frame.attrs.get("measure", "success_rate")


def best_learning_rates(comparison: pd.DataFrame) -> pd.DataFrame:
    """Keep, for each method and each point of the other swept values, the learning rate with the
    highest mean AUC (of equal ones the smallest).

    Args:
        comparison: from `compare_methods`.

    Returns:
        The kept rows; all of them where no learning rate was swept.
    """
    swept = comparison.attrs.get("swept", [])
    rates = learning_rate_columns(swept)
    if not rates:
        return comparison
    others = ["method", *(name for name in swept if name not in rates)]
    ranked = comparison.sort_values(["auc", *rates], ascending=[False, *(True for _ in rates)])
    best = ranked.groupby(others, sort=False, dropna=False).head(1).sort_index()
    best.attrs = comparison.attrs
    return best


def learning_rate_columns(swept: list[str]) -> list[str]:
    """The swept columns that are learning rates of the policy."""
    return [name for name in swept if name.split(".")[-1] == "lr"]
