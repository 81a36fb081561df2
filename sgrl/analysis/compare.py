"""The tables of `sgrl compare`: an experiment's methods, or those of two experiments."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from rich.markup import escape
from rich.table import Table

from sgrl.analysis.comparison import (
    at_points,
    best_learning_rates,
    by_task,
    chosen_columns,
    compare_experiments,
    compare_methods,
    compare_pairs,
    confounding,
)
from sgrl.analysis.tables import (
    Titled,
    comparison_table,
    few_seeds,
    final_note,
    judgement,
    judgement_names,
    pairs_note,
    pairs_table,
    score_text,
)
from sgrl.results.folder import SweepFolder
from sgrl.results.grids import leaves_of
from sgrl.results.locations import reading
from sgrl.results.metrics import MEASURE_NAMES
from sgrl.results.runs import Results, ResultsError, load_results
from sgrl.results.selection import ALL, Selection


def compare(
    first: str | Path,
    second: str | Path | None = None,
    plan: float | None = None,
    x: str = "env_steps",
    only: Selection = ALL,
) -> tuple[pd.DataFrame, list[Titled]]:
    """Compare the methods of an experiment, or each method of one experiment with that of another.

    Each method is at its best learning rate.

    Args:
        first: results: a folder, an archive or an address.
        second: other ones.
        plan: a difference of AUC for which to estimate the seeds needed.
        x: the axis of areas under curves, a key of `AXES`.
        only: the trials to compare.

    Returns:
        The frame of `comparison.compare_pairs` or, for two experiments, that of
        `comparison.compare_experiments` with each one's mean and SEM of final score and AUC; and
        the tables to show: what is missing, for two experiments the settings that differ, the
        scores, and the comparison.

    Raises:
        ResultsError: a folder holds no results, there is nothing to compare, or `plan` is not
            positive.
    """
    if plan is not None and not plan > 0:
        raise ResultsError(f"a plan is for a difference above 0, got {plan:g}")
    names = [str(first)] if second is None else [str(first), str(second)]
    with ExitStack() as stack:
        folders = [stack.enter_context(reading(name)) for name in names]
        return _compared([load_results(folder, x=x, only=only) for folder in folders], plan, names)


def _compared(
    both: Sequence[Results], plan: float | None, names: Sequence[str]
) -> tuple[pd.DataFrame, list[Titled]]:
    best = [best_learning_rates(compare_methods(results.trials)) for results in both]
    chosen = [at_points(r.trials, points) for r, points in zip(both, best, strict=True)]
    rates = any(chosen_columns(results.trials) for results in both)
    if len(both) == 1:
        frame = compare_pairs(chosen[0], plan=plan)
        if frame.empty or not frame["tasks"].any():
            raise ResultsError(
                f"{names[0]} has no two methods with completed trials at the same swept values"
            )
        note = " ".join([final_note(both[0]), few_seeds(best[0])]).strip()
        shown = [("Comparison", note, comparison_table(best[0], both[0].trials))]
        lines = confounding(by_task(chosen[0]))
        title, table = "Methods against each other", pairs_table(frame)
    else:
        frame, shown, lines, table = _compare_two(both, chosen, plan, names)
        title = "Methods"
    said = [f"AUC: over {both[0].axis.name}.", pairs_note(frame, rates), *lines]
    if plan is not None:
        needed = "Seeds needed: of each method in every task, so that a true difference of"
        said.insert(2, f"{needed} {plan:g} is found with power 0.8.")
    if len(both) == 2:
        said.insert(0, f"first: {names[0]}, second: {names[1]}; mean ± SEM over completed trials.")
    missing = Table("experiment", "trial")
    for name, results in zip(names, both, strict=True):
        for problem in results.problems:
            missing.add_row(name, escape(problem))
    if missing.row_count:
        shown.insert(0, ("What is missing", "", missing))
    return frame, [*shown, (title, "\n".join(said), table)]


def _compare_two(
    both: Sequence[Results],
    chosen: Sequence[pd.DataFrame],
    plan: float | None,
    names: Sequence[str],
) -> tuple[pd.DataFrame, list[Titled], list[str], Table]:
    """The frame, the table of differing settings, the confounders, and the table of methods."""
    if both[0].measure != both[1].measure:
        said = " and ".join(f"{name} by {r.measure}" for name, r in zip(names, both, strict=True))
        raise ResultsError(f"{said}: trials judged by different measures cannot be compared")
    frame = compare_experiments(chosen[0], chosen[1], plan=plan)
    if frame.empty or not frame["tasks"].any():
        raise ResultsError(
            f"{names[0]} and {names[1]} have no method with completed trials at the same swept "
            "values in common"
        )
    final = f"final_{both[0].measure}"
    for place, trials in zip(("first", "second"), chosen, strict=True):
        completed = trials[trials["state"] == "completed"].groupby("method")
        for score in (final, "auc"):
            frame[f"{place}_{score}"] = frame["method"].map(completed[score].mean())
            frame[f"{place}_{score}_sem"] = frame["method"].map(completed[score].sem())
    differences = Table("setting", *names)
    sweeps = [SweepFolder(results.directories[0]) for results in both]
    settings = [dict(leaves_of(sweep.read_experiment())) for sweep in sweeps]
    for key in dict.fromkeys([*settings[0], *settings[1]]):
        values = [str(setting.get(key, "-")) for setting in settings]
        if values[0] != values[1] and key != ("name",):
            differences.add_row(".".join(key), *values)
    shown = [("Settings that differ", "", differences)] if differences.row_count else []
    scores = (f"final {MEASURE_NAMES[both[0].measure]}", "AUC")
    headers = [f"{score}, {place}" for score in scores for place in ("first", "second")]
    table = Table("method", "trials", *headers, *judgement_names(frame))
    tasks, lines = [by_task(trials) for trials in chosen], []
    for row in frame.to_dict("records"):
        method = str(row["method"])
        ours = [of_experiment[method] for of_experiment in tasks]
        table.add_row(
            method,
            f"{row['first_trials']} and {row['second_trials']}",
            *(
                score_text(*(trials[score] for trials in of_tasks.values()))
                for score in (final, "auc")
                for of_tasks in ours
            ),
            *judgement(row),
        )
        lines += confounding(
            {f"{method} ({place})": of for place, of in zip(("first", "second"), ours, strict=True)}
        )
    return frame, shown, lines, table
