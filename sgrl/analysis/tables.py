"""Tables for terminals and pages, and the text in their cells."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgrl.analysis.comparison import LOST, at_points, measure_of, plain
from sgrl.analysis.rank_test import MOST_SEEDS
from sgrl.analysis.statistics import INTERVAL_SEEDS
from sgrl.results.metrics import MEASURE_NAMES, MEASURES
from sgrl.results.runs import Results

#: A table with its title and a note.
Titled = tuple[str, str, Table]


# ---------------------------------------------------------------- printing


def say(console: Console, *lines: str) -> None:
    """Print lines of text as they are, whatever the terminal's width.

    Args:
        console: where to print them.
        lines: the lines.
    """
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


#: How tables look on a terminal.
LOOK: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}


def print_table(table: Table, console: Console, turn: bool = True) -> None:
    """Print a table in full, within the width of the console: no cell is cut.

    A table that is too wide is turned, so that its rows become columns, and columns that do not fit
    beside the first one follow below, beside the first one again. Two columns stay as they are.

    Args:
        table: the table, whose look is changed to that of a terminal.
        console: where to print it.
        turn: whether a table that is too wide is turned.
    """
    for name, value in LOOK.items():
        setattr(table, name, value)
    # Into a pipe as wide as it has to be.
    unlimited = Console(width=10_000, file=console.file)
    if len(table.columns) <= 2 or unlimited.measure(table).maximum <= console.width:
        unlimited.print(table, crop=False, highlight=False)
        return
    head, rows = cells(table)
    lines = list(zip(*(head, *rows), strict=True)) if turn else [head, *rows]
    first, *columns = zip(*lines, strict=True)
    while columns:
        shown, width = [first], 1 + _width(first) + _width(columns[0])
        while columns and (len(shown) == 1 or width <= console.width):
            shown.append(columns.pop(0))
            width += _width(columns[0]) if columns else 0
        part = Table(**LOOK)
        for name, *_ in shown:
            part.add_column(name)
        for row in zip(*(values for _, *values in shown), strict=True):
            part.add_row(*row)
        unlimited.print(part, crop=False, highlight=False)


def _width(column: Sequence[str]) -> int:
    """Of its widest cell, with what the look puts beside it."""
    return max(map(cell_len, column)) + 2


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the text of a table.

    Args:
        table: the table.

    Returns:
        The cells of its header, and those of each row.
    """
    header = [str(column.header) for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return header, [list(row) for row in rows]


def bold_cells(table: Table) -> list[list[bool]]:
    """Tell which cells of a table are in bold.

    Args:
        table: the table; cells in bold are `rich.text.Text` of that style.

    Returns:
        For each row one boolean a cell.
    """
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [[isinstance(cell, Text) and cell.style == "bold" for cell in row] for row in rows]


# ---------------------------------------------------------------- scores of methods


def comparison_table(comparison: pd.DataFrame, trials: pd.DataFrame) -> Table:
    """Tabulate methods: mean ± SEM over completed trials, or the seeds' own scores.

    Args:
        comparison: from `comparison.compare_methods`.
        trials: the trials that it summarises.

    Returns:
        The table, one row per method and swept point.
    """
    swept = comparison.attrs.get("swept", [])
    counts = ["trials", *(state for state in LOST if comparison[state].any())]
    table = Table("method")
    measure = measure_of(comparison)
    for name in [*swept, *counts, MEASURE_NAMES[measure], "AUC"]:
        table.add_column(name, justify="right")
    for _, row in comparison.iterrows():
        scores = (seeds_of(trials, row, name) for name in (f"final_{measure}", "auc"))
        table.add_row(
            row["method"],
            *("" if pd.isna(row[name]) else plain(row[name]) for name in swept),
            *(str(row[name]) for name in counts),
            *map(score_text, scores),
        )
    return table


def seeds_of(trials: pd.DataFrame, point: pd.Series, score: str) -> pd.Series:
    """Return a score of the completed trials at one method and swept point.

    Args:
        trials: from `runs.load_results`.
        point: a row with a method and the swept values.
        score: "auc" or the final score's column.

    Returns:
        The scores, without NaN.
    """
    chosen = at_points(trials, pd.DataFrame([point]))
    return chosen[score][chosen["state"] == "completed"].dropna()


def score_text(*tasks: pd.Series) -> str:
    """Format scores: mean ± SEM, or with fewer than five seeds in a task the mean and the scores.

    Args:
        tasks: the scores of each task.

    Returns:
        The text; "-" without scores.
    """
    scores = pd.concat([task.dropna() for task in tasks])
    if scores.empty:
        return "-"
    if min(map(len, tasks)) >= INTERVAL_SEEDS:
        return f"{scores.mean():.3f} ± {scores.sem():.3f}"
    if len(scores) == 1:
        return f"{scores.mean():.3f} (one seed)"
    own = "; ".join(", ".join(f"{score:.3f}" for score in task.dropna()) for task in tasks)
    return f"{scores.mean():.3f} (seeds {own})"


def interval_text(row: dict, name: str) -> str:
    """Format an estimate with its 95% interval, if there is one.

    Args:
        row: with the columns NAME, NAME_ci_low and NAME_ci_high.
        name: of the estimate.

    Returns:
        The text; "-" for NaN.
    """
    if pd.isna(row[name]):
        return "-"
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f"{row[name]:.3f}" + ("" if pd.isna(low) else f" [{low:.3f}, {high:.3f}]")


def few_seeds(comparison: pd.DataFrame) -> str:
    """Explain rows with fewer than five completed trials.

    Args:
        comparison: from `comparison.compare_methods`.

    Returns:
        A sentence; empty if there are no such rows.
    """
    if (comparison["trials"] >= INTERVAL_SEEDS).all():
        return ""
    return "Of fewer than five seeds their own scores are shown, and no SEM or interval."


def final_note(results: Results) -> str:
    """Explain the final score.

    Args:
        results: from `runs.load_results`.

    Returns:
        A sentence.
    """
    if results.measure == "eval_reward":
        return "Final: the last evaluation's test reward."
    name, count = MEASURE_NAMES[results.measure], MEASURES[results.measure]
    return f"Final: the mean {name} over the last {count} batches."


# ---------------------------------------------------------------- methods against each other


def pairs_table(pairs: pd.DataFrame) -> Table:
    """Tabulate methods against each other.

    Args:
        pairs: from `comparison.compare_pairs`.

    Returns:
        The table, one row per pair.
    """
    table = Table("first", "second", "trials", *judgement_names(pairs))
    for row in pairs.to_dict("records"):
        table.add_row(
            row["first"],
            row["second"],
            f"{row['first_trials']} and {row['second_trials']}",
            *judgement(row),
        )
    return table


def judgement_names(pairs: pd.DataFrame) -> list[str]:
    """Name the columns that judge a pair.

    Args:
        pairs: from `comparison.compare_pairs` or `comparison.compare_experiments`.

    Returns:
        The headers of the cells of `judgement`.
    """
    needed = ["seeds needed"] if "seeds_needed" in pairs else []
    return ["difference", "P(first better)", "p", "p (Holm)", "detectable", *needed, "verdict"]


def judgement(row: dict) -> list[str]:
    """Format how a pair is judged.

    Args:
        row: of `comparison.compare_pairs` or `comparison.compare_experiments`.

    Returns:
        The cells under `judgement_names`.
    """
    found = ["-" if pd.isna(row["difference"]) else f"{row['difference']:+.3f}"]
    found.append(interval_text(row, "probability"))
    found += ["-" if pd.isna(row[key]) else f"{row[key]:.3g}" for key in ("p", "p_holm")]
    found.append(_finite(row["detectable_difference"], ".2g", "none"))
    if "seeds_needed" in row:
        found.append(_finite(row["seeds_needed"], ".0f", f"more than {MOST_SEEDS}"))
    return [*found, row["verdict"] or "-"]


def _finite(value: float, format: str, infinite: str) -> str:
    if pd.isna(value):
        return "-"
    return infinite if value == float("inf") else f"{value:{format}}"


def pairs_note(pairs: pd.DataFrame, chosen: bool) -> str:
    """Explain a table of methods against each other.

    Args:
        pairs: from `comparison.compare_pairs` or `comparison.compare_experiments`.
        chosen: whether learning rates were swept, of which each method's best was selected.

    Returns:
        The lines of the table's note.
    """
    at = "at the learning rates above" if chosen else "of all completed trials"
    said = (
        f"By AUC, {at}: the difference of the means, and the probability that a run of the first "
        "beats one of the second (0.5: neither), with its 95% interval. p: the Mann-Whitney test "
        "or, over several tasks, a permutation test within tasks; p (Holm) is corrected for all "
        "rows. Detectable: the true difference that so many seeds find with power 0.8 at the 5% "
        "level, simulated from the measured spread. No difference of so much or more: the test "
        "rejects it either way."
    )
    few = pairs[(pairs["fewest_seeds"] < INTERVAL_SEEDS) & (pairs["tasks"] > 0)]
    designs = few[["first_trials", "second_trials", "tasks", "smallest_p"]].drop_duplicates()
    for row in designs.to_dict("records"):
        over = f" in {row['tasks']} tasks" if row["tasks"] > 1 else ""
        said += (
            f"\nFewer than five seeds: no interval. {row['first_trials']} against "
            f"{row['second_trials']} trials{over} cannot give a p below {row['smallest_p']:.2g}."
        )
    return said


# ---------------------------------------------------------------- the expert network


def within_interval(frame: pd.DataFrame) -> pd.Series:
    """Check whether 2^(d-k) (Theorem 5) lies inside each cell's interval.

    Args:
        frame: rows of `expert_network.csv`.

    Returns:
        One boolean a row.
    """
    theory = 2.0 ** (frame["d"] - frame["k"])
    return (frame["ratio_ci_low"] <= theory) & (theory <= frame["ratio_ci_high"])


def ratio_table(frame: pd.DataFrame, inside: pd.Series) -> Table:
    """Tabulate ratios of errors.

    Args:
        frame: rows of `expert_network.csv`.
        inside: from `within_interval`.

    Returns:
        The table, one row per k, case and n, one column per d.
    """
    dimensions = sorted(frame["d"].unique())
    table = Table("k", "case", "n")
    for d in dimensions:
        table.add_column(f"d={d}", justify="right")
    marked = frame["ratio"].map(short) + inside.map({True: " ", False: "*"})
    for k in sorted(frame["k"].unique()):
        of_k = frame[frame["k"] == k]
        table.add_row(str(k), "2^(d-k)", "", *(short(2.0 ** (d - k)) + " " for d in dimensions))
        for (case, n), row in of_k.groupby(["case", "n"], sort=False):
            by_d = dict(zip(row["d"], marked[row.index], strict=True))
            table.add_row("", str(case), str(n), *(by_d.get(d, "") for d in dimensions))
        table.add_section()
    return table


def short(ratio: float) -> str:
    """Format a ratio of errors in three digits, or as a whole number.

    Args:
        ratio: the ratio.

    Returns:
        The text.
    """
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:.0f}"


# ---------------------------------------------------------------- the probe

#: Columns of the probe that its table shows, by their titles there.
PROBE_ROWS = {
    "MSE of backprop": "mse_backprop",
    "  ECV share of variance": "ecv_share_backprop",
    "MSE / backprop's: sgprop": "sgprop_to_backprop",
    "  at the best lambda": "best_to_backprop",
    "  at lambda = 0": "synthetic_to_backprop",
    "cosine to g*: backprop": "alignment_backprop",
    "  sgprop": "alignment_sgprop",
    "lambda": "mixing_weight",
    "  best": "best_mixing_weight",
    "  best, unit gradients": "best_unit_mixing_weight",
    "  distance to the latter": "distance",
    "explained by the inputs": "explained",
    "  by the predictor": "predictor_explained",
}


def probe_table(layers: pd.DataFrame) -> Table:
    """Tabulate the probe's results, each with its interval below it.

    Args:
        layers: rows of `layers.csv`.

    Returns:
        The table, one column per layer (and time step).
    """
    table = Table("layer")
    for row in layers.to_dict("records"):
        step = row.get("step", "")
        at = {"": "", "all": ", all steps"}.get(step, f", step {step}")
        table.add_column(f"{row['layer']}{at}", justify="right")
    for title, name in PROBE_ROWS.items():
        if layers[name].isna().all():
            continue
        table.add_row(title, *("" if pd.isna(value) else f"{value:.3g}" for value in layers[name]))
        if f"{name}_ci_low" in layers:
            intervals = zip(layers[f"{name}_ci_low"], layers[f"{name}_ci_high"], strict=True)
            shown = ("" if pd.isna(low) else f"{low:.2g} to {high:.2g}" for low, high in intervals)
            table.add_row("", *shown, style="dim")
    return table


#: Columns of `bounds.csv` that its table shows, by their titles there.
BOUNDS_COLUMNS = {
    "explained": "explained",
    "MSE at 0": "synthetic_to_backprop",
    "at best": "best_to_backprop",
    "shrunk": "shrunk_to_backprop",
    "cosine": "cosine_backprop",
    "of s": "cosine_synthetic",
    "gain": "gain",
}


def bounds_table(rows: pd.DataFrame) -> Table:
    """Tabulate what predictions could save, gains with their intervals.

    Args:
        rows: of `bounds.csv`.

    Returns:
        The table, one row for each layer, time step and fit.
    """
    table = Table("layer", "step", "m")
    for title in (*BOUNDS_COLUMNS, "95%", "pooled"):
        table.add_column(title, justify="right")
    for row in rows.to_dict("records"):
        shown = ["" if pd.isna(row[n]) else f"{row[n]:.3g}" for n in BOUNDS_COLUMNS.values()]
        low, high = row["gain_ci_low"], row["gain_ci_high"]
        interval = "" if pd.isna(low) else f"{low:.2g} to {high:.2g}"
        pooled = "" if pd.isna(row["pooled"]) else f"{row['pooled']:.3g}"
        table.add_row(row["layer"], row["step"], row["fitted"], *shown, interval, pooled)
    return table
