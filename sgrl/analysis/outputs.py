"""What a sweep, a simulation and a probe write at their end: a table, CSVs and figures."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from sgrl.analysis.comparison import by_task, compare_methods, confounding
from sgrl.analysis.figures import curves_of_training
from sgrl.analysis.findings import probe_finding
from sgrl.analysis.tables import (
    bounds_table,
    comparison_table,
    few_seeds,
    print_table,
    probe_table,
    ratio_table,
    say,
    short,
    within_interval,
)
from sgrl.analysis.theory_figures import expert_ratios, probe_errors
from sgrl.results.folder import ExpertNetworkFolder, ProbeFolder, SweepFolder
from sgrl.results.metrics import MEASURE_NAMES, MEASURES
from sgrl.results.runs import load_results
from sgrl.theory.expert_network import Result
from sgrl.theory.probe import Report
from sgrl.theory.probe.bounds import BoundsReport


def write_comparison(
    directory: str | Path, console: Console | None = None, shown_as: str | None = None
) -> pd.DataFrame:
    """Compare the methods of a sweep.

    Prints a table, and writes `comparison.csv` and `figures/success_rate.png` (or that of another
    measure) into the sweep's folder.

    Args:
        directory: the sweep's folder.
        console: where to print; stdout by default.
        shown_as: name of the folder in the lines printed, if it is a copy.

    Returns:
        The frame of `comparison.compare_methods`.

    Raises:
        ResultsError: there are no results.
    """
    sweep = SweepFolder(directory)
    console = console or Console()
    results = load_results(sweep.path)
    comparison = compare_methods(results.trials)
    comparison.to_csv(sweep.comparison, index=False)
    figure = curves_of_training(results).draw(sweep.figures / f"{results.measure}.png")
    count = MEASURES[results.measure]
    last = "the last evaluation" if count == 1 else f"the last {count} batches"
    console.print(
        f"{MEASURE_NAMES[results.measure].capitalize()} of {last}, and AUC over "
        "environment steps: mean ± SEM over completed trials"
    )
    print_table(comparison_table(comparison, results.trials), console)
    say(console, *filter(None, [few_seeds(comparison), *confounding(by_task(results.trials))]))
    say(console, *results.problems)
    for path in (sweep.comparison, figure):
        name = path.relative_to(sweep.path).as_posix()
        say(console, f"written: {shown_as or directory}/{name}")
    return comparison


def write_expert_network(
    results: Sequence[Result], directory: Path, console: Console | None = None
) -> pd.DataFrame:
    """Print the tables of an expert-network simulation, and write its results.

    Writes `expert_network.csv` and for each case a figure `ratio_<case>.png`.

    Args:
        results: the simulation's cells.
        directory: an existing folder.
        console: where to print; stdout by default.

    Returns:
        The frame that the CSV holds, one row per result.
    """
    console = console or Console()
    frame = pd.DataFrame(results, columns=Result._fields)
    folder = ExpertNetworkFolder(directory)
    frame.to_csv(folder.results, index=False)
    figures = [expert_ratios(frame, case, folder.figure(case)) for case in frame["case"].unique()]

    inside = within_interval(frame)
    console.print("MSE of backprop / MSE of sgprop; *: 2^(d-k) is outside the 95% interval")
    print_table(ratio_table(frame, inside), console, turn=False)
    largest = frame[(frame["d"] == frame["d"].max()) & (frame["k"] == frame["k"].min())]
    for row in largest[largest["n"] == frame["n"].min()].itertuples():
        say(
            console,
            f"{row.case}, d = {row.d}, k = {row.k}, n = {row.n}: ratio {short(row.ratio)}, "
            f"95% interval {short(row.ratio_ci_low)} to {short(row.ratio_ci_high)}, "
            f"theory {2 ** (row.d - row.k)}",
        )
    say(
        console,
        f"2^(d-k) is inside the 95% interval in {inside.sum()} of {len(frame)} cells "
        f"({inside.mean():.1%})",
        *(f"written: {path}" for path in (folder.results, *figures)),
    )
    return frame


def write_bounds(report: BoundsReport, directory: Path, console: Console) -> pd.DataFrame:
    """Print a table of what predictions could save, and write `bounds.csv`.

    Args:
        report: from `sgrl.theory.probe.measure_bounds`.
        directory: an existing folder.
        console: where to print.

    Returns:
        The frame that `bounds.csv` holds.
    """
    frame, path = pd.DataFrame(report.rows), ProbeFolder(directory).bounds
    frame.to_csv(path, index=False)
    say(
        console,
        f"Predictions fitted to m samples, tested on half of {report.samples}, and the mean of "
        f"n = {report.batch_size}",
    )
    print_table(bounds_table(frame), console, turn=False)
    say(console, f"written: {path}")
    return frame


def write_probe(report: Report, directory: Path, console: Console | None = None) -> pd.DataFrame:
    """Print a probe's table and what it means, and write `neurons.csv`, `layers.csv`, `probe.png`.

    Args:
        report: from `sgrl.theory.probe.probe`.
        directory: an existing folder.
        console: where to print; stdout by default.

    Returns:
        The frame that `layers.csv` holds.
    """
    console = console or Console()
    neurons, layers = pd.DataFrame(report.neurons), pd.DataFrame(report.layers)
    folder, note = ProbeFolder(directory), f"n = {report.batch_size}, {report.samples} samples"
    neurons.to_csv(folder.neurons, index=False)
    layers.to_csv(folder.layers, index=False)
    probe_errors(neurons, layers, folder.figure, note)
    say(
        console,
        f"Gradients from n = {report.batch_size} samples against g*, the mean of {report.samples}: "
        "means over neurons, and 95% intervals",
    )
    print_table(probe_table(layers), console, turn=False)
    if not report.predictors:
        console.print("a policy under backprop: there are no predictions to mix in")
    say(console, *(f"written: {path}" for path in (folder.neurons, folder.layers, folder.figure)))
    say(console, probe_finding(layers))
    return layers
