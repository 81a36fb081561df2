"""What a sweep leaves at its end: a table on the terminal, comparison.csv and a figure."""

import math
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgrl.analysis.figures import learning_curves
from sgrl.analysis.runs import load_curves, load_trials
from sgrl.analysis.statistics import compare_methods, measure_of
from sgrl.tuning.metrics import MEASURE_NAMES, MEASURES


def write_comparison(directory: str | Path, console: Console | None = None) -> pd.DataFrame:
    """Compare the methods of a sweep: print the table, and write `comparison.csv` and
    `figures/success_rate.png` (or `figures/eval_reward.png`) into its folder.

    Returns the table (see `compare_methods`). Raises ResultsError where there are no results.
    """
    directory = Path(directory)
    console = console or Console()
    trials, curves = load_trials(directory), load_curves(directory)
    comparison = compare_methods(trials)
    comparison.to_csv(directory / "comparison.csv", index=False)
    measure = measure_of(trials)
    figure = learning_curves(trials, curves, directory / "figures" / f"{measure}.png")
    last = {"success_rate": f"the last {MEASURES['success_rate']} batches"}
    console.print(
        f"{MEASURE_NAMES[measure].capitalize()} of {last.get(measure, 'the last evaluation')}, and "
        "AUC: mean ± SEM over completed trials"
    )
    console.print(comparison_table(comparison))
    for trial in trials[trials["state"] == "failed"].itertuples():
        line = f"failed: {trial.trial} at iteration {trial.iterations}, {trial.reason}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for path in (directory / "comparison.csv", figure):
        console.print(f"written: {path}", soft_wrap=True, highlight=False)
    return comparison


def comparison_table(comparison: pd.DataFrame) -> Table:
    """The comparison for a terminal: mean ± SEM over completed trials."""
    swept = comparison.attrs.get("swept", [])
    counts = ["trials", "failed"] if comparison["failed"].any() else ["trials"]
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    measure = measure_of(comparison)
    for name in [*swept, *counts, MEASURE_NAMES[measure], "AUC"]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.to_dict("records"):
        table.add_row(
            row["method"],
            *("" if pd.isna(row[name]) else _plain(row[name]) for name in swept),
            *(str(row[name]) for name in counts),
            _mean_and_sem(row[f"final_{measure}"], row[f"final_{measure}_sem"]),
            _mean_and_sem(row["auc"], row["auc_sem"]),
        )
    return table


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean_and_sem(mean: float, error: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
