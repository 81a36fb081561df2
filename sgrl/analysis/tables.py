"""What a sweep or a simulation leaves at its end: a table on the terminal, a CSV and figures."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgrl.analysis.figures import expert_ratios, learning_curves, plain, probe_errors
from sgrl.analysis.statistics import (
    INTERVAL_SEEDS,
    at_points,
    by_task,
    compare_methods,
    confounding,
    measure_of,
    sem,
)
from sgrl.results.metrics import MEASURE_NAMES, MEASURES
from sgrl.results.runs import load_results
from sgrl.theory.expert_network import Result
from sgrl.theory.probe import Report


def write_comparison(
    directory: str | Path, console: Console | None = None, shown_as: str | None = None
) -> pd.DataFrame:
    """Compare the methods of a sweep: print the table, and write `comparison.csv` and
    `figures/success_rate.png` (or of another measure) into its folder, which the lines printed
    call `shown_as`.

    Returns the table (see `compare_methods`). Raises ResultsError where there are no results.
    """
    directory = Path(directory)
    console = console or Console()
    results = load_results(directory)
    comparison = compare_methods(results.trials)
    comparison.to_csv(directory / "comparison.csv", index=False)
    figure = learning_curves(results, directory / "figures" / f"{results.measure}.png")
    count = MEASURES[results.measure]
    last = "the last evaluation" if count == 1 else f"the last {count} batches"
    console.print(
        f"{MEASURE_NAMES[results.measure].capitalize()} of {last}, and AUC over "
        "environment steps: mean ± SEM over completed trials"
    )
    # More columns than the terminal is wide are wrapped by it, not cut.
    wide = Console(width=10_000, file=console.file)
    wide.print(comparison_table(comparison, results.trials), crop=False)
    for line in filter(None, [few_seeds(comparison), *confounding(by_task(results.trials))]):
        console.print(line, soft_wrap=True, highlight=False)
    for problem in results.problems:
        console.print(problem, soft_wrap=True, highlight=False, markup=False)
    for path in (directory / "comparison.csv", figure):
        name = f"{shown_as or directory}/{path.relative_to(directory).as_posix()}"
        console.print(f"written: {name}", soft_wrap=True, highlight=False)
    return comparison


def comparison_table(comparison: pd.DataFrame, trials: pd.DataFrame) -> Table:
    """The comparison for a terminal: mean ± SEM over completed trials, or the seeds' own scores."""
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
    for _, row in comparison.iterrows():
        scores = (seeds_of(trials, row, name) for name in (f"final_{measure}", "auc"))
        table.add_row(
            row["method"],
            *("" if pd.isna(row[name]) else plain(row[name]) for name in swept),
            *(str(row[name]) for name in counts),
            *map(score_text, scores),
        )
    return table


def _short(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:.0f}"


def seeds_of(trials: pd.DataFrame, point: pd.Series, score: str) -> pd.Series:
    """A score of the completed trials at the method and swept point that is `point`."""
    chosen = at_points(trials, pd.DataFrame([point]))
    return chosen[score][chosen["state"] == "completed"].dropna()


def score_text(*tasks: pd.Series) -> str:
    """Mean ± SEM of all scores; where a task has fewer than five, the mean and the scores."""
    scores = pd.concat([task.dropna() for task in tasks])
    if scores.empty:
        return "-"
    if min(map(len, tasks)) >= INTERVAL_SEEDS:
        return f"{scores.mean():.3f} ± {sem(scores):.3f}"
    if len(scores) == 1:
        return f"{scores.mean():.3f} (one seed)"
    own = "; ".join(", ".join(f"{score:.3f}" for score in task.dropna()) for task in tasks)
    return f"{scores.mean():.3f} (seeds {own})"


def few_seeds(comparison: pd.DataFrame) -> str:
    """What to say where a row of `compare_methods` has fewer than five completed trials."""
    if (comparison["trials"] >= INTERVAL_SEEDS).all():
        return ""
    return "Of fewer than five seeds their own scores are shown, and no SEM or interval."


def print_table(title: str, note: str, table: Table, console: Console | None = None) -> None:
    """Print a table of a report; more than the terminal is wide is wrapped by it, not cut."""
    console = console or Console()
    table.box, table.padding, table.pad_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
    console.print(title, style="bold", highlight=False)
    Console(width=10_000, file=console.file).print(table, crop=False, highlight=False)
    if note:
        console.print(note, style="dim", highlight=False)
    console.print()


def write_expert_network(
    results: Sequence[Result], directory: Path, console: Console | None = None
) -> pd.DataFrame:
    """Print the expert simulation's tables, and write `expert_network.csv` and one figure a case,
    `ratio_<case>.png`, into a folder that exists.

    Returns the frame that the CSV holds, one row a result.
    """
    console = console or Console()
    frame = pd.DataFrame(results, columns=Result._fields)
    frame.to_csv(directory / "expert_network.csv", index=False)
    cases = list(frame["case"].unique())
    figures = [expert_ratios(frame, case, directory / f"ratio_{case}.png") for case in cases]

    inside = within_interval(frame)
    console.print("MSE of backprop / MSE of sgprop; *: 2^(d-k) is outside the 95% interval")
    # More columns than the terminal is wide are wrapped by it, not cut.
    console.print(ratio_table(frame, inside), width=10_000, crop=False)
    largest = frame[(frame["d"] == frame["d"].max()) & (frame["k"] == frame["k"].min())]
    for row in largest[largest["n"] == frame["n"].min()].itertuples():
        console.print(
            f"{row.case}, d = {row.d}, k = {row.k}, n = {row.n}: ratio {_short(row.ratio)}, "
            f"95% interval {_short(row.ratio_ci_low)} to {_short(row.ratio_ci_high)}, "
            f"theory {2 ** (row.d - row.k)}",
            soft_wrap=True,
            highlight=False,
        )
    console.print(
        f"2^(d-k) is inside the 95% interval in {inside.sum()} of {len(frame)} cells "
        f"({inside.mean():.1%})",
        soft_wrap=True,
        highlight=False,
    )
    for path in (directory / "expert_network.csv", *figures):
        console.print(f"written: {path}", soft_wrap=True, highlight=False)
    return frame


def within_interval(frame: pd.DataFrame) -> pd.Series:
    """Whether the theory's 2^(d-k) lies inside each cell's interval."""
    theory = 2.0 ** (frame["d"] - frame["k"])
    return (frame["ratio_ci_low"] <= theory) & (theory <= frame["ratio_ci_high"])


def ratio_table(frame: pd.DataFrame, inside: pd.Series) -> Table:
    """The ratios for a terminal: a row for each k, case and n, a column for each d."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("k", "case", "n"):
        table.add_column(name, no_wrap=True)
    dimensions = sorted(frame["d"].unique())
    for d in dimensions:
        table.add_column(f"d={d}", justify="right", no_wrap=True)
    marked = frame["ratio"].map(_short) + inside.map({True: " ", False: "*"})
    for k in sorted(frame["k"].unique()):
        of_k = frame[frame["k"] == k]
        table.add_row(str(k), "2^(d-k)", "", *(_short(2.0 ** (d - k)) + " " for d in dimensions))
        for (case, n), row in of_k.groupby(["case", "n"], sort=False):
            cells = dict(zip(row["d"], marked[row.index], strict=True))
            table.add_row("", str(case), str(n), *(cells.get(d, "") for d in dimensions))
        table.add_section()
    return table


#: Columns of the probe that its table shows, by what they are called there.
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


def write_probe(report: Report, directory: Path, console: Console | None = None) -> pd.DataFrame:
    """Print the probe's table, a column a layer, and write `neurons.csv`, `layers.csv` and
    `probe.png` into a folder that exists.

    Returns the frame that `layers.csv` holds.
    """
    console = console or Console()
    neurons, layers = pd.DataFrame(report.neurons), pd.DataFrame(report.layers)
    paths = [directory / name for name in ("neurons.csv", "layers.csv", "probe.png")]
    neurons.to_csv(paths[0], index=False)
    layers.to_csv(paths[1], index=False)
    probe_errors(neurons, layers, paths[2], f"n = {report.batch_size}, {report.samples} samples")
    console.print(
        f"Gradients from n = {report.batch_size} samples against g*, the mean of {report.samples}: "
        "means over neurons, and 95% intervals",
        soft_wrap=True,
        highlight=False,
    )
    # A terminal that is narrower than the table wraps its lines; nothing is cut.
    wide = Console(width=max(console.width, 28 + 24 * len(layers)), file=console.file)
    wide.print(probe_table(layers), crop=False)
    if not report.predictors:
        console.print("a policy under backprop: there are no predictions to mix in")
    for path in paths:
        console.print(f"written: {path}", soft_wrap=True, highlight=False)
    return layers


def probe_table(layers: pd.DataFrame) -> Table:
    """The layers' numbers for a terminal, each with its interval below it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for row in layers.to_dict("records"):
        step = row.get("step", "")
        at = {"": "", "all": ", all steps"}.get(step, f", step {step}")
        table.add_column(f"{row['layer']}{at}", justify="right", no_wrap=True)
    for title, name in PROBE_ROWS.items():
        if layers[name].isna().all():
            continue
        table.add_row(title, *("" if pd.isna(value) else f"{value:.3g}" for value in layers[name]))
        if f"{name}_ci_low" in layers:
            intervals = zip(layers[f"{name}_ci_low"], layers[f"{name}_ci_high"], strict=True)
            shown = ("" if pd.isna(low) else f"{low:.2g} to {high:.2g}" for low, high in intervals)
            table.add_row("", *shown, style="dim")
    return table
