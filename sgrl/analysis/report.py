"""Results folders as one page to share: what was run, who is better, and how to run it again.

    write_report(["results/labyrinth_escape", "results/expert_network"], Path("report.html"))

A folder may hold a sweep, finished or not, an expert-network simulation or a probe. The HTML page
is one file that needs nothing else; Markdown and LaTeX hold the same tables.
"""

import base64
import html
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import pandas as pd
from rich.markup import escape
from rich.table import Table

from sgrl.analysis.figures import Figure, expert_ratios, probe_errors, write_figures
from sgrl.analysis.runs import Results, ResultsError, load_results, read_experiment
from sgrl.analysis.statistics import (
    BEST_RULE,
    CONFIDENCE,
    RESAMPLES,
    Efficiency,
    at_points,
    best_learning_rates,
    compare_experiments,
    compare_methods,
    compare_pairs,
    learning_rate_columns,
    sample_efficiency,
    sem,
    steps_to_threshold,
)
from sgrl.analysis.tables import plain, probe_table, ratio_table, within_interval
from sgrl.tuning.metrics import MEASURE_NAMES, MEASURES
from sgrl.tuning.provenance import read_starts

THRESHOLD = 0.5
SUFFIXES = {"html": ".html", "markdown": ".md", "latex": ".tex"}


@dataclass
class Section:
    """What a report says about one folder.

    Attributes:
        title: the experiment's name.
        directory: where it lies.
        facts: pairs of a name and what there is to say.
        problems: one line for each trial that is not complete and sound.
        tables: each with its title and a note; None where there is none.
        figures: written beforehand.
        commands: to run it again.
        configuration: the resolved experiment's YAML.
    """

    title: str
    directory: Path
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tables: list[tuple[str, str, Table]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    configuration: str = ""


def write_report(
    directories: Sequence[str | Path],
    out: Path | None = None,
    format: str = "html",
    threshold: float = THRESHOLD,
    advance: Callable[[str], object] = lambda title: None,
) -> Path:
    """Report on results folders. Figures go to each one's `figures/`, a sweep's numbers to its
    `comparison.csv` and `pairs.csv`.

    Args:
        directories: one or several folders.
        out: file to write; by default report.html (.md, .tex) in the folder, or of several in
            the folder that holds the first.
        format: "html", "markdown" or "latex".
        threshold: what sample efficiency counts the environment steps to.
        advance: called with the name of each folder once it is done.

    Returns:
        The file written.

    Raises:
        ResultsError: a folder holds no results, an unknown format, or a file cannot be written.
    """
    if format not in SUFFIXES:
        raise ResultsError(f"unknown format {format!r}: give one of {', '.join(SUFFIXES)}")
    folders = [Path(directory) for directory in directories]
    for folder in folders:
        if not folder.is_dir():
            raise ResultsError(f"{folder} is no folder: give one such as results/quickstart")
    if out is None:
        home = folders[0] if len(folders) == 1 else folders[0].resolve().parent
        out = home / f"report{SUFFIXES[format]}"
    try:
        sections = []
        for folder in folders:
            sections.append(read_section(folder, threshold))
            advance(sections[-1].title)
        render = {"html": _html, "markdown": _markdown, "latex": _latex}[format]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(sections, out), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{error.filename or out}: {error.strerror}") from None
    return out


def read_section(directory: Path, threshold: float = THRESHOLD) -> Section:
    """Read one folder and write its figures and CSVs. Raises ResultsError and OSError."""
    if (directory / "expert_network.csv").is_file():
        return _expert_network(directory)
    if (directory / "neurons.csv").is_file() and (directory / "layers.csv").is_file():
        return _probe(directory)
    return _sweep(directory, threshold)


def _sweep(directory: Path, threshold: float) -> Section:
    results = load_results(directory)
    comparison = compare_methods(results.trials)
    best = best_learning_rates(comparison)
    chosen = at_points(results.trials, best)
    pairs = compare_pairs(chosen)
    comparison.to_csv(directory / "comparison.csv", index=False)
    pairs.to_csv(directory / "pairs.csv", index=False)

    rates = learning_rate_columns(results.swept)
    note = (
        f"Over completed trials. IQM: mean of the middle half of the seeds, and its stratified "
        f"bootstrap interval ({CONFIDENCE:.0%}, {RESAMPLES} resamples). {_final_note(results)} "
        f"Steps to {threshold:g}: median over all trials until the mean of the last "
        f"{MEASURES[results.measure]} values is as high (Kaplan and Meier; trials that never get "
        "there count as longer than they were trained), and how many got there."
    )
    if rates:
        note += (
            f" Shown is {BEST_RULE}. It was chosen on these same seeds, which favours methods "
            "whose seeds differ most; fresh seeds at the chosen rates would not."
        )
    efficiency = _efficiency(results, best, threshold)
    tables = [("Comparison", note, _comparison_table(results, best, efficiency, threshold))]
    if len(pairs):
        tables.append(("Methods against each other", _pairs_note(bool(rates)), _pairs_table(pairs)))
    if len(best) < len(comparison):
        everything = _efficiency(results, comparison, threshold)
        tables.append(
            (
                "All learning rates",
                "As above, at every swept point.",
                _comparison_table(results, comparison, everything, threshold),
            )
        )
    tables.append(("Trials", "", _trials_table(results)))

    experiment, starts = directory / "experiment.yaml", read_starts(directory)
    name = read_experiment(directory).get("name", directory.resolve().name)
    section = Section(
        title=str(name),
        directory=directory,
        facts=[*_states(results), *_starts(starts)],
        problems=list(results.problems),
        tables=tables,
        figures=write_figures(results, directory / "figures"),
    )
    if experiment.is_file():
        section.configuration = experiment.read_text(encoding="utf-8")
        revision = (starts[-1].get("revision") if starts else None) or ""
        if revision:
            section.commands.append(f"git checkout {revision.removesuffix('-dirty')}")
        section.commands.append(f"sgrl sweep {experiment} --name {name}_again")
        if revision.endswith("-dirty"):
            section.facts.append(("note", f"the code had changes that {revision[:-6]} lacks"))
    return section


def _final_note(results: Results) -> str:
    if results.measure == "eval_reward":
        return "Final: the last evaluation's test reward."
    name, count = MEASURE_NAMES[results.measure], MEASURES[results.measure]
    return f"Final: the mean {name} over the last {count} batches."


def _pairs_note(chosen: bool) -> str:
    at = "at the learning rates above" if chosen else "of all completed trials"
    return (
        f"By AUC, {at}: the probability that a run of the first beats one of the second (0.5: "
        "neither), with its stratified bootstrap interval. p: the Mann-Whitney test or, over "
        "several tasks, a permutation test within tasks; p (Holm) is corrected for all rows."
    )


def _states(results: Results) -> list[tuple[str, str]]:
    states = results.trials["state"].value_counts()
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    seconds = results.trials["seconds"].sum()
    return [
        ("trials", f"{len(results.trials)}: {counts}"),
        ("environment steps", f"{int(results.trials['env_steps'].sum()):,}"),
        ("time training", f"{seconds / 3600:.2f} hours, summed over trials"),
    ]


def _starts(starts: Sequence[dict]) -> list[tuple[str, str]]:
    if not starts:
        return [("run on", "not recorded")]
    facts = [("started", ", ".join(start.get("started", "?") for start in starts))]
    for name in ("revision", "versions", "machine"):
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
    """Sample efficiency of every row of `points`, over all its trials that have begun."""
    window, steps = MEASURES[results.measure], {}
    for name, rows in results.curves.groupby("trial", sort=False):
        curve = pd.Series(rows[results.measure].to_numpy(), rows["env_steps"].to_numpy())
        steps[name] = steps_to_threshold(curve.dropna(), threshold, window)
    found = []
    for _, point in points.iterrows():
        trials = at_points(results.trials, pd.DataFrame([point]))
        trials = trials[trials["iterations"] > 0]
        # One that failed will never get there, however long the others were trained.
        budgets = trials["env_steps"].where(trials["state"] != "failed", trials["env_steps"].max())
        found.append(sample_efficiency([steps[name] for name in trials["trial"]], budgets))
    return found


def _comparison_table(
    results: Results, points: pd.DataFrame, efficiency: Sequence[Efficiency], threshold: float
) -> Table:
    final, name = f"final_{results.measure}", MEASURE_NAMES[results.measure]
    table = Table("method", *results.swept, "trials", f"final {name}", "final IQM")
    for header in ("AUC", "AUC IQM", f"steps to {threshold:g}"):
        table.add_column(header)
    for row, needed in zip(points.to_dict("records"), efficiency, strict=True):
        lost = [f"{row[key]} {key}" for key in ("failed", "unfinished") if row[key]]
        table.add_row(
            row["method"],
            *("" if pd.isna(row[key]) else plain(row[key]) for key in results.swept),
            ", ".join([str(row["trials"]), *lost]),
            *(
                cell
                for score in (final, "auc")
                for cell in (_mean(row, score), _interval(row, f"{score}_iqm"))
            ),
            _steps(needed),
        )
    return table


def _mean(row: dict, score: str) -> str:
    if pd.isna(row[score]):
        return "-"
    error = row[f"{score}_sem"]
    return f"{row[score]:.3f}" + ("" if pd.isna(error) else f" ± {error:.3f}")


def _interval(row: dict, name: str) -> str:
    if pd.isna(row[name]):
        return "-"
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f"{row[name]:.3f}" + ("" if pd.isna(low) else f" [{low:.3f}, {high:.3f}]")


def _steps(needed: Efficiency) -> str:
    if not needed.runs:
        return "-"
    median = f"{needed.median:,.0f}" if needed.median < float("inf") else "more"
    return f"{median} ({needed.reached} of {needed.runs})"


def _pairs_table(pairs: pd.DataFrame) -> Table:
    table = Table("first", "second", "trials", "P(first better)", "p", "p (Holm)")
    for row in pairs.to_dict("records"):
        table.add_row(
            row["first"],
            row["second"],
            f"{row['first_trials']} and {row['second_trials']}",
            _interval(row, "probability"),
            *("-" if pd.isna(row[key]) else f"{row[key]:.3g}" for key in ("p", "p_holm")),
        )
    return table


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


def _expert_network(directory: Path) -> Section:
    frame = pd.read_csv(directory / "expert_network.csv")
    inside = within_interval(frame)
    cases = list(frame["case"].unique())
    note = (
        "MSE of backprop / MSE of sgprop; *: the theory's 2^(d-k) is outside the 95% interval. It "
        f"is inside in {inside.sum()} of {len(frame)} cells ({inside.mean():.1%})."
    )
    return Section(
        title="expert network",
        directory=directory,
        tables=[("Ratios", note, ratio_table(frame, inside))],
        figures=[
            Figure(expert_ratios(frame, case, directory / f"ratio_{case}.png"), f"Ratios, {case}")
            for case in cases
        ],
    )


def _probe(directory: Path) -> Section:
    neurons, layers = (pd.read_csv(directory / f"{name}.csv") for name in ("neurons", "layers"))
    path = probe_errors(neurons, layers, directory / "probe.png", "")
    return Section(
        title=f"probe ({directory.resolve().name})",
        directory=directory,
        tables=[("Layers", "Means over neurons, and 95% intervals.", probe_table(layers))],
        figures=[Figure(path, "Gradients against the true ones")],
    )


def compare(
    first: str | Path, second: str | Path
) -> tuple[pd.DataFrame, list[tuple[str, str, Table]]]:
    """Two experiments' methods, each against itself, at its best learning rate in each.

    Returns:
        The frame of `statistics.compare_experiments` with each experiment's mean and SEM of final
        score and AUC, and the tables that show it, after those of what is missing and of the
        settings that differ.

    Raises:
        ResultsError: a folder holds no results, or there is nothing to compare.
    """
    both = [load_results(first), load_results(second)]
    names = [str(results.directories[0]) for results in both]
    if both[0].measure != both[1].measure:
        said = " and ".join(f"{name} by {r.measure}" for name, r in zip(names, both, strict=True))
        raise ResultsError(f"{said}: trials judged by different measures cannot be compared")
    chosen = []
    for results in both:
        best = best_learning_rates(compare_methods(results.trials))
        chosen.append(at_points(results.trials, best))
    frame = compare_experiments(chosen[0], chosen[1])
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
            frame[f"{place}_{score}_sem"] = frame["method"].map(completed[score].agg(sem))
    differences = Table("setting", *names)
    settings = [_settings(read_experiment(results.directories[0])) for results in both]
    for key in dict.fromkeys([*settings[0], *settings[1]]):
        values = [str(setting.get(key, "-")) for setting in settings]
        if values[0] != values[1] and key != "name":
            differences.add_row(key, *values)
    table = Table("method", "trials")
    for header in (f"final {MEASURE_NAMES[both[0].measure]}", "AUC"):
        for place in ("first", "second"):
            table.add_column(f"{header}, {place}")
    for header in ("P(first better)", "p", "p (Holm)"):
        table.add_column(header)
    for row in frame.to_dict("records"):
        table.add_row(
            str(row["method"]),
            f"{row['first_trials']} and {row['second_trials']}",
            *(_mean(row, f"{place}_{s}") for s in (final, "auc") for place in ("first", "second")),
            _interval(row, "probability"),
            *("-" if pd.isna(row[key]) else f"{row[key]:.3g}" for key in ("p", "p_holm")),
        )
    note = f"first: {names[0]}, second: {names[1]}; mean ± SEM over completed trials. "
    note += _pairs_note(any(learning_rate_columns(results.swept) for results in both))
    tables = [("Methods", note, table)]
    if differences.row_count:
        tables.insert(0, ("Settings that differ", "", differences))
    missing = Table("experiment", "trial")
    for name, results in zip(names, both, strict=True):
        for problem in results.problems:
            missing.add_row(name, escape(problem))
    if missing.row_count:
        tables.insert(0, ("What is missing", "", missing))
    return frame, tables


def _settings(experiment: dict, prefix: str = "") -> dict[str, object]:
    """An experiment's settings by their dotted keys."""
    found: dict[str, object] = {}
    for key, value in experiment.items():
        if isinstance(value, dict) and value:
            found |= _settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """A terminal table's header and rows as text."""
    header = [str(column.header) for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return header, [list(row) for row in rows]


def _html(sections: Sequence[Section], out: Path) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sgrl.analysis", ""), autoescape=True, trim_blocks=True
    )
    template = environment.get_template("report.html")
    return template.render(sections=sections, cells=cells, image=_image, anchor=_anchor) + "\n"


def _image(figure: Figure) -> str:
    """A figure's SVG as an address that holds all of it."""
    svg = figure.path.with_suffix(".svg").read_bytes()
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _anchor(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _markdown(sections: Sequence[Section], out: Path) -> str:
    lines: list[str] = []
    for section in sections:
        lines += [f"# {section.title}", ""]
        lines += [f"- {name}: {said}" for name, said in section.facts]
        if section.problems:
            lines += ["", "## What is missing", "", *(f"- {said}" for said in section.problems)]
        for title, note, table in section.tables:
            header, rows = cells(table)
            lines += ["", f"## {title}", "", *([note, ""] if note else [])]
            lines += [_markdown_row(header), _markdown_row(["---"] * len(header))]
            lines += [_markdown_row(row) for row in rows]
        for figure in section.figures:
            path = os.path.relpath(figure.path, out.parent)
            lines += ["", f"## {figure.title}", "", f"![{figure.title}]({path})"]
        if section.commands:
            lines += ["", "## To run it again", "", "```", *section.commands, "```"]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(html.escape(v, quote=False).replace("|", "\\|") for v in values) + " |"


def _latex(sections: Sequence[Section], out: Path) -> str:
    lines = ["% Tables for \\input; they need \\usepackage{booktabs}."]
    for section in sections:
        for title, note, table in section.tables:
            header, rows = cells(table)
            lines += [
                "",
                f"% {section.title}: {title}",
                *([f"% {note}"] if note else []),
                f"\\begin{{tabular}}{{{'l' + 'r' * (len(header) - 1)}}}",
                "\\toprule",
                _latex_row(header),
                "\\midrule",
                *map(_latex_row, rows),
                "\\bottomrule",
                "\\end{tabular}",
            ]
    return "\n".join(lines) + "\n"


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "<": "$<$",
    ">": "$>$",
}


def _latex_row(values: Sequence[str]) -> str:
    escaped = ("".join(_LATEX.get(character, character) for character in v) for v in values)
    return " & ".join(escaped) + " \\\\"
