"""Results folders as one page to share: what was run, who is better, and how to run it again.

    write_report(["results/labyrinth_escape", "results/expert_network"], Path("report.html"))

A folder may hold a sweep, finished or not, an expert-network simulation or a probe.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from rich.table import Table
from rich.text import Text

from sgrl.analysis.comparison import (
    BEST_RULE,
    LOST,
    at_points,
    best_learning_rates,
    by_task,
    chosen_columns,
    compare_methods,
    compare_pairs,
    confounding,
    plain,
)
from sgrl.analysis.figures import Figure, curves_of_training, write_figures
from sgrl.analysis.findings import pair_findings, probe_finding
from sgrl.analysis.pages import FORMATS, Section
from sgrl.analysis.statistics import (
    INTERVAL_SEEDS,
    Efficiency,
    sample_efficiency,
    steps_to_threshold,
)
from sgrl.analysis.tables import (
    few_seeds,
    final_note,
    interval_text,
    pairs_note,
    pairs_table,
    probe_table,
    ratio_table,
    score_text,
    seeds_of,
    within_interval,
)
from sgrl.analysis.theory_figures import expert_ratios, probe_errors
from sgrl.results.folder import OVER, ExpertNetworkFolder, ProbeFolder, SweepFolder
from sgrl.results.locations import is_copied, is_published, reading
from sgrl.results.metrics import MEASURE_NAMES, MEASURES
from sgrl.results.provenance import read_starts
from sgrl.results.runs import Results, ResultsError, load_results, places
from sgrl.results.selection import ALL, Selection
from sgrl.results.storage import is_address

THRESHOLD = 0.5
#: What bold means in tables of methods.
BOLD = "Bold: the highest mean in its task, which need not be a significant difference."


def write_report(
    locations: Sequence[str | Path],
    out: Path | None = None,
    format: str = "html",
    threshold: float = THRESHOLD,
    advance: Callable[[str], object] = lambda title: None,
    x: str = "env_steps",
    only: Selection = ALL,
) -> Path:
    """Report on results.

    Several sweeps begin with one table and one overlay of all their curves. Figures are written to
    each folder's `figures/`, the overlay's to `<out>_files/`, a sweep's numbers to its
    `comparison.csv` and `pairs.csv`. If a folder is published, or is read-only and `out` lies
    elsewhere, or only some trials are reported on, they go to `<out>_files/<folder>/` instead.

    Args:
        locations: folders, archives or addresses, at least one.
        out: file to write; by default report.html (.md, .tex) in the folder, of several in the one
            that holds the first, of published/<folder> reports/<folder>.html; of an address none.
        format: "html", "markdown" or "latex"; of an archive, an address or an experiment
            of Tune's "html", which alone holds the figures.
        threshold: the score that sample efficiency counts to.
        advance: called with the name of each folder once it is done.
        x: the axis of curves, areas and sample efficiency, a key of `AXES`.
        only: the trials to report on; for some, `out` has to be given.

    Returns:
        The file written.

    Raises:
        ResultsError: a folder holds no results, the format is unknown, or a file cannot be
            written.
    """
    if format not in FORMATS:
        raise ResultsError(f"unknown format {format!r}: give one of {', '.join(FORMATS)}")
    suffix, render = FORMATS[format]
    if out is None and any(map(is_address, locations)):
        raise ResultsError("say with --out where on this machine the report goes")
    if out is None and only != ALL:
        raise ResultsError("say with --out where the report on some of the trials goes")
    if format != "html" and any(map(is_copied, locations)):
        raise ResultsError(f"a report in {format} refers to figures in the results: use html")
    elsewhere = out is not None
    if out is None:
        first, alone = Path(locations[0]), len(locations) == 1
        home, name = first if alone else first.resolve().parent, "report"
        if is_published(first):
            home = first.resolve().parents[1] / "reports"
            name = first.resolve().name if alone else name
        out = home / f"{name}{suffix}"
    with ExitStack() as stack:
        folders = [stack.enter_context(reading(place)) for place in locations]
        for folder in folders:
            if not folder.is_dir():
                raise ResultsError(f"{folder} is no folder: give one such as results/quickstart")
        written = {folder: folder for folder in folders}
        names = [folder.resolve().name for folder in folders]
        for i, (folder, name) in enumerate(zip(folders, names, strict=True), 1):
            apart = elsewhere and (only != ALL or not _can_be_written(folder))
            if apart or is_published(folder):
                alone = names.count(name) == 1
                home = out.with_name(f"{out.stem}_files")
                written[folder] = home / (name if alone else f"{name}_{i}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            sections = []
            for folder, place in zip(folders, locations, strict=True):
                written[folder].mkdir(parents=True, exist_ok=True)
                home = written[folder]
                sections.append(read_section(folder, threshold, home, x, Path(place), only))
                advance(sections[-1].title)
            sweeps = [folder for folder in folders if not _is_simulated(folder)]
            if len(dict.fromkeys(sweeps)) > 1:
                home = out.with_name(f"{out.stem}_files")
                results = load_results(*sweeps, x=x, only=only)
                sections.insert(0, _together(results, threshold, home))
            out.write_text(render(sections, out), encoding="utf-8")
        except OSError as error:
            hint = "" if elsewhere else "; give --out a file where it can be written"
            raise ResultsError(f"{error.filename or out}: {error.strerror}{hint}") from None
    return out


def _can_be_written(folder: Path) -> bool:
    """Whether a report's files can be written to a results folder."""
    effective = os.access in os.supports_effective_ids
    sweep = SweepFolder(folder)
    files = (sweep.comparison, sweep.pairs, sweep.figures)
    paths = [folder, *(file for file in files if file.exists())]
    return all(os.access(path, os.W_OK, effective_ids=effective) for path in paths)


def read_section(
    directory: Path,
    threshold: float = THRESHOLD,
    home: Path | None = None,
    x: str = "env_steps",
    called: Path | None = None,
    only: Selection = ALL,
) -> Section:
    """Read one folder, and write its figures and CSVs.

    Args:
        directory: the folder.
        threshold: the score that sample efficiency counts to.
        home: where to write; the folder itself by default.
        x: the axis of curves, areas and sample efficiency, a key of `AXES`.
        called: what commands call the folder, if it is a copy.
        only: of a sweep, the trials to report on.

    Returns:
        The section of the report.

    Raises:
        ResultsError: the folder holds no results.
        OSError: a file cannot be written.
    """
    home = home or directory
    simulated, probed = ExpertNetworkFolder(directory), ProbeFolder(directory)
    if simulated.results.is_file():
        return _expert_network(simulated, home)
    if probed.neurons.is_file() and probed.layers.is_file():
        return _probe(probed, home)
    return _sweep(directory, threshold, home, x, called or directory, only)


def _is_simulated(folder: Path) -> bool:
    """Whether a folder holds an expert-network simulation or a probe, and no sweep."""
    return ExpertNetworkFolder(folder).results.is_file() or ProbeFolder(folder).neurons.is_file()


def _together(results: Results, threshold: float, home: Path) -> Section:
    """The table and the overlay of several sweeps."""
    best = best_learning_rates(compare_methods(results.trials))
    chosen = f" Shown is {BEST_RULE}." if chosen_columns(results.trials) else ""
    note = (
        f"All methods of all experiments, over completed trials: mean ± SEM, and the median with "
        f"its 95% interval. {final_note(results)} AUC: over {results.axis.name}. {BOLD} "
        f"{few_seeds(best)}{chosen} Experiments may differ in more than their methods; nothing is "
        "tested across them."
    )
    curves = curves_of_training(results, overlay=True)
    path = curves.draw(home / f"{results.measure}.png")
    return Section(
        title="all experiments",
        tables=[("Comparison", note, _comparison_table(results, best, threshold))],
        figures=[Figure(path, curves.title, curves)],
    )


def _sweep(
    directory: Path, threshold: float, home: Path, x: str, called: Path, only: Selection
) -> Section:
    results = load_results(directory, x=x, only=only)
    comparison = compare_methods(results.trials)
    best = best_learning_rates(comparison)
    chosen = at_points(results.trials, best)
    pairs = compare_pairs(chosen)
    sweep, written = SweepFolder(directory), SweepFolder(home)
    comparison.to_csv(written.comparison, index=False)
    pairs.to_csv(written.pairs, index=False)

    rates = chosen_columns(results.trials)
    note = (
        f"Over completed trials: mean ± SEM, and the median with its 95% interval. "
        f"{final_note(results)} AUC: over {results.axis.name}. "
        f"{_to_threshold(results, threshold).capitalize()}: median over all trials until the mean "
        f"of the last {MEASURES[results.measure]} values is as high (Kaplan and Meier; trials that "
        "never get there count as longer than they were trained), where half of them got there, "
        f"and how many did. {BOLD} {few_seeds(best)}"
    )
    if rates:
        note += (
            f" Shown is {BEST_RULE}. It was chosen on these same seeds, which favours methods "
            "whose seeds differ most; fresh seeds at the chosen rates would not."
        )
    tables = [("Comparison", note, _comparison_table(results, best, threshold))]
    if len(pairs):
        note = "\n".join([pairs_note(pairs, bool(rates)), *confounding(by_task(chosen))])
        tables.append(("Methods against each other", note, pairs_table(pairs)))
    if len(best) < len(comparison):
        table = _comparison_table(results, comparison, threshold)
        tables.append(("All learning rates", "As above, at every swept point.", table))
    tables.append(("Trials", "", _trials_table(results)))

    experiment, starts = sweep.experiment, read_starts(sweep.provenance)
    name = sweep.read_experiment().get("name", directory.resolve().name)
    section = Section(
        title=str(name),
        facts=[*_states(results), *_starts(starts)],
        problems=list(results.problems),
        findings=_findings(results, pairs),
        tables=tables,
        figures=write_figures(results, written.figures),
    )
    if experiment.is_file():
        section.configuration = experiment.read_text(encoding="utf-8")
        revision = (starts[-1].get("revision") if starts else None) or ""
        if revision:
            section.commands.append(f"git checkout {revision.removesuffix('-dirty')}")
        # The page may be read on another machine, so commands say plainly `sgrl`.
        again = re.sub(r"[^A-Za-z0-9_.+-]", "-", f"{name}_again")
        file = called / experiment.name
        if not file.is_file():
            file = Path(experiment.name)
            section.facts.append(("note", f"the commands take the configuration as {file}"))
        section.commands.append(shlex.join(["sgrl", "sweep", str(file), "--name", again]))
        if revision.endswith("-dirty"):
            section.facts.append(("note", f"the code had changes that {revision[:-6]} lacks"))
    return section


def _findings(results: Results, pairs: pd.DataFrame) -> list[str]:
    findings = pair_findings(pairs)
    waiting = int((~results.trials["state"].isin(OVER)).sum())
    if not findings:
        return []
    if waiting:
        of = f"{waiting} of {len(results.trials)}"
        findings.append(f"This may change: {of} trials are not complete.")
    if chosen_columns(results.trials) and (pairs["fewest_seeds"] >= INTERVAL_SEEDS).any():
        chosen = " and ".join(chosen_columns(results.trials))
        findings.append(f"Chosen on these same seeds, to be confirmed on fresh ones: {chosen}.")
    return findings


def _to_threshold(results: Results, threshold: float) -> str:
    return f"{results.axis.unit} to {threshold:g}"


def _states(results: Results) -> list[tuple[str, str]]:
    states = results.trials["state"].value_counts()
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    seconds = results.trials["seconds"].sum()
    return [
        ("trials", f"{len(results.trials)}: {counts}"),
        ("environment steps", f"{int(results.trials['env_steps'].sum()):,} really taken"),
        ("time training", f"{seconds / 3600:.2f} hours, summed over trials"),
    ]


def _starts(starts: Sequence[dict]) -> list[tuple[str, str]]:
    if not starts:
        return [("run on", "not recorded")]
    facts = [("started", ", ".join(start.get("started", "?") for start in starts))]
    own = ["parts"] if any("parts" in start for start in starts) else []
    for name in ("revision", "versions", *own, "core", "machine"):
        said = list(dict.fromkeys(_words(start.get(name)) for start in starts))
        facts.append((name, "; then ".join(said)))
    return facts


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " and ".join(map(str, value)) or "none"
    return "not known" if value is None else str(value)


def _efficiency(results: Results, points: pd.DataFrame, threshold: float) -> list[Efficiency]:
    """Sample efficiency at each row of `points`, over all its trials that have started."""
    window = MEASURES[results.measure]
    curves = {name: results.curve(name, results.measure) for name in results.trials["trial"]}
    steps = {name: steps_to_threshold(curve, threshold, window) for name, curve in curves.items()}
    trained = {
        name: float(places(rows, results.x)[-1])
        for name, rows in results.curves.groupby("trial", sort=False)
    }
    found = []
    for _, point in points.iterrows():
        trials = at_points(results.trials, pd.DataFrame([point]))
        trials = trials[trials["iterations"] > 0]
        # A failed trial never reaches it, however long the others were trained.
        budgets = trials["trial"].map(trained)
        trials, budgets = trials[budgets.notna()], budgets.dropna()
        budgets = budgets.where(trials["state"] != "failed", budgets.max())
        found.append(sample_efficiency([steps[name] for name in trials["trial"]], budgets))
    return found


def _comparison_table(results: Results, points: pd.DataFrame, threshold: float) -> Table:
    final, name = f"final_{results.measure}", MEASURE_NAMES[results.measure]
    table = Table("method", *results.swept, "trials", f"final {name}", "final median")
    for header in ("AUC", "AUC median", _to_threshold(results, threshold)):
        table.add_column(header)
    table.caption = f"Mean ± SEM over completed trials. {BOLD}"
    records, efficiency = points.to_dict("records"), _efficiency(results, points, threshold)
    best = _best(points, results.swept, (final, "auc")).to_dict("records")
    for row, (_, point), needed, bold in zip(
        records, points.iterrows(), efficiency, best, strict=True
    ):
        lost = [f"{row[key]} {key}" for key in (*LOST, "unfinished") if row[key]]
        table.add_row(
            row["method"],
            *("" if pd.isna(row[key]) else plain(row[key]) for key in results.swept),
            ", ".join([str(row["trials"]), *lost]),
            *(
                cell
                for score in (final, "auc")
                for cell in (
                    Text(
                        score_text(seeds_of(results.trials, point, score)),
                        style="bold" if bold[score] else "",
                    ),
                    interval_text(row, f"{score}_median"),
                )
            ),
            _steps(needed, results.x),
        )
    return table


def _best(points: pd.DataFrame, swept: Sequence[str], scores: Sequence[str]) -> pd.DataFrame:
    """Whether each score's mean is the highest of its task, where not all have the same."""
    tasks = [name for name in swept if name not in chosen_columns(points)]
    if tasks:
        number = points.groupby(tasks, dropna=False, sort=False).ngroup()
    else:
        number = pd.Series(0, points.index)
    of_task = points.groupby(number)
    differing = {name: of_task[name].transform("nunique") > 1 for name in ("method", *scores)}
    return pd.DataFrame(
        {
            name: differing["method"]
            & differing[name]
            & (points[name] == of_task[name].transform("max"))
            for name in scores
        }
    )


def _steps(needed: Efficiency, x: str) -> str:
    if not needed.runs:
        return "-"
    shown = ".3g" if x == "hours" else ",.0f"
    median = f"{needed.median:{shown}}" if needed.median < float("inf") else "-"
    return f"{median} ({needed.reached} of {needed.runs})"


def _trials_table(results: Results) -> Table:
    final = f"final_{results.measure}"
    table = Table(
        "trial", "state", "iterations", final.replace("_", " "), "AUC", "minutes", "reason"
    )
    for row in results.trials.to_dict("records"):
        of = f" of {row['planned']:g}" if pd.notna(row["planned"]) else ""
        table.add_row(
            row["trial"],
            row["state"],
            f"{row['iterations']}{of}",
            *("-" if pd.isna(row[key]) else f"{row[key]:.3f}" for key in (final, "auc")),
            f"{row['seconds'] / 60:.1f}",
            row["reason"],
        )
    return table


def _expert_network(folder: ExpertNetworkFolder, home: Path) -> Section:
    frame, written = pd.read_csv(folder.results), ExpertNetworkFolder(home)
    inside = within_interval(frame)
    note = (
        "MSE of backprop / MSE of sgprop; *: the theory's 2^(d-k) is outside the 95% interval. It "
        f"is inside in {inside.sum()} of {len(frame)} cells ({inside.mean():.1%})."
    )
    return Section(
        title="expert network",
        tables=[("Ratios", note, ratio_table(frame, inside))],
        figures=[
            Figure(expert_ratios(frame, case, written.figure(case)), f"Ratios, {case}")
            for case in frame["case"].unique()
        ],
    )


def _probe(folder: ProbeFolder, home: Path) -> Section:
    neurons, layers = pd.read_csv(folder.neurons), pd.read_csv(folder.layers)
    path = probe_errors(neurons, layers, ProbeFolder(home).figure, "")
    return Section(
        title=f"probe ({folder.path.resolve().name})",
        findings=[probe_finding(layers)],
        tables=[("Layers", "Means over neurons, and 95% intervals.", probe_table(layers))],
        figures=[Figure(path, "Gradients against the true ones")],
    )
