"""Results folders as one page to share: what was run, who is better, and how to run it again.

    write_report(["results/labyrinth_escape", "results/expert_network"], Path("report.html"))

A folder may hold a sweep, finished or not, an expert-network simulation or a probe. The HTML page
is one file that needs nothing else; Markdown and LaTeX hold the same tables.
"""

import base64
import html
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import pandas as pd
from rich.markup import escape
from rich.table import Table

from sgrl.analysis.figures import Figure, expert_ratios, probe_errors, write_figures
from sgrl.analysis.statistics import (
    BEST_RULE,
    INTERVAL_SEEDS,
    MOST_SEEDS,
    Efficiency,
    at_points,
    best_learning_rates,
    by_task,
    compare_experiments,
    compare_methods,
    compare_pairs,
    confounding,
    learning_rate_columns,
    sample_efficiency,
    sem,
    steps_to_threshold,
)
from sgrl.analysis.tables import (
    comparison_table,
    few_seeds,
    plain,
    probe_table,
    ratio_table,
    score_text,
    seeds_of,
    within_interval,
)
from sgrl.results.metrics import MEASURE_NAMES, MEASURES
from sgrl.results.provenance import read_starts
from sgrl.results.runs import Results, ResultsError, load_results, places, read_experiment

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
    x: str = "env_steps",
    called: Sequence[str | Path] = (),
) -> Path:
    """Report on results folders. Figures go to each one's `figures/`, a sweep's numbers to its
    `comparison.csv` and `pairs.csv`; where a folder cannot be written and `out` lies elsewhere, to
    `<out>_files/<folder>/` beside the page.

    Args:
        directories: one or several folders.
        out: file to write; by default report.html (.md, .tex) in the folder, or of several in
            the folder that holds the first.
        format: "html", "markdown" or "latex".
        threshold: what sample efficiency counts to.
        advance: called with the name of each folder once it is done.
        x: what curves, areas and sample efficiency are taken against, a key of `AXES`.
        called: what the commands on the page call the folders, where these are copies for reading.

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
    elsewhere = out is not None
    written = {folder: folder for folder in folders}
    if out is None:
        home = folders[0] if len(folders) == 1 else folders[0].resolve().parent
        out = home / f"report{SUFFIXES[format]}"
    else:
        names = [folder.resolve().name for folder in folders]
        for i, (folder, name) in enumerate(zip(folders, names, strict=True), 1):
            if not _can_be_written(folder):
                alone = names.count(name) == 1
                home = out.with_name(f"{out.stem}_files")
                written[folder] = home / (name if alone else f"{name}_{i}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sections = []
        for folder, own in zip(folders, called or folders, strict=True):
            written[folder].mkdir(parents=True, exist_ok=True)
            sections.append(read_section(folder, threshold, written[folder], x, Path(own)))
            advance(sections[-1].title)
        render = {"html": _html, "markdown": _markdown, "latex": _latex}[format]
        out.write_text(render(sections, out), encoding="utf-8")
    except OSError as error:
        hint = "" if elsewhere else "; give --out a file where it can be written"
        raise ResultsError(f"{error.filename or out}: {error.strerror}{hint}") from None
    return out


def _can_be_written(folder: Path) -> bool:
    """Whether a report's files can be written into a results folder."""
    effective = os.access in os.supports_effective_ids
    files = ("comparison.csv", "pairs.csv", "figures")
    paths = [folder, *(folder / name for name in files if (folder / name).exists())]
    return all(os.access(path, os.W_OK, effective_ids=effective) for path in paths)


def read_section(
    directory: Path,
    threshold: float = THRESHOLD,
    home: Path | None = None,
    x: str = "env_steps",
    called: Path | None = None,
) -> Section:
    """Read one folder and write its figures and CSVs, into that folder unless `home` is given.
    Commands call it by its own name unless another is given. Raises ResultsError and OSError."""
    home = home or directory
    if (directory / "expert_network.csv").is_file():
        return _expert_network(directory, home)
    if (directory / "neurons.csv").is_file() and (directory / "layers.csv").is_file():
        return _probe(directory, home)
    return _sweep(directory, threshold, home, x, called or directory)


def _sweep(directory: Path, threshold: float, home: Path, x: str, called: Path) -> Section:
    results = load_results(directory, x=x)
    comparison = compare_methods(results.trials)
    best = best_learning_rates(comparison)
    chosen = at_points(results.trials, best)
    pairs = compare_pairs(chosen)
    comparison.to_csv(home / "comparison.csv", index=False)
    pairs.to_csv(home / "pairs.csv", index=False)

    rates = learning_rate_columns(results.swept)
    note = (
        f"Over completed trials: mean ± SEM, and the median with its 95% interval. "
        f"{_final_note(results)} AUC: over {results.axis.name}. "
        f"{_to_threshold(results, threshold).capitalize()}: median over all trials until the mean "
        f"of the last {MEASURES[results.measure]} values is as high (Kaplan and Meier; trials that "
        "never get there count as longer than they were trained), where half of them got there, "
        f"and how many did. {few_seeds(best)}"
    )
    if rates:
        note += (
            f" Shown is {BEST_RULE}. It was chosen on these same seeds, which favours methods "
            "whose seeds differ most; fresh seeds at the chosen rates would not."
        )
    efficiency = _efficiency(results, best, threshold)
    tables = [("Comparison", note, _comparison_table(results, best, efficiency, threshold))]
    if len(pairs):
        note = "\n".join([_pairs_note(pairs, bool(rates)), *confounding(by_task(chosen))])
        tables.append(("Methods against each other", note, _pairs_table(pairs)))
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
        figures=write_figures(results, home / "figures"),
    )
    if experiment.is_file():
        section.configuration = experiment.read_text(encoding="utf-8")
        revision = (starts[-1].get("revision") if starts else None) or ""
        if revision:
            section.commands.append(f"git checkout {revision.removesuffix('-dirty')}")
        # On whatever machine the page is read: `sgrl` as it is called there.
        again = re.sub(r"[^A-Za-z0-9_.+-]", "-", f"{name}_again")
        file = called / experiment.name
        if not file.is_file():
            file = Path(experiment.name)
            section.facts.append(("note", f"the commands take the configuration as {file}"))
        section.commands.append(shlex.join(["sgrl", "sweep", str(file), "--name", again]))
        if revision.endswith("-dirty"):
            section.facts.append(("note", f"the code had changes that {revision[:-6]} lacks"))
    return section


def _to_threshold(results: Results, threshold: float) -> str:
    return f"{results.axis.unit} to {threshold:g}"


def _final_note(results: Results) -> str:
    if results.measure == "eval_reward":
        return "Final: the last evaluation's test reward."
    name, count = MEASURE_NAMES[results.measure], MEASURES[results.measure]
    return f"Final: the mean {name} over the last {count} batches."


def _pairs_note(pairs: pd.DataFrame, chosen: bool) -> str:
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
        # One that failed will never get there, however long the others were trained.
        budgets = trials["trial"].map(trained)
        trials, budgets = trials[budgets.notna()], budgets.dropna()
        budgets = budgets.where(trials["state"] != "failed", budgets.max())
        found.append(sample_efficiency([steps[name] for name in trials["trial"]], budgets))
    return found


def _comparison_table(
    results: Results, points: pd.DataFrame, efficiency: Sequence[Efficiency], threshold: float
) -> Table:
    final, name = f"final_{results.measure}", MEASURE_NAMES[results.measure]
    table = Table("method", *results.swept, "trials", f"final {name}", "final median")
    for header in ("AUC", "AUC median", _to_threshold(results, threshold)):
        table.add_column(header)
    records = points.to_dict("records")
    for row, (_, point), needed in zip(records, points.iterrows(), efficiency, strict=True):
        lost = [f"{row[key]} {key}" for key in ("failed", "unfinished") if row[key]]
        table.add_row(
            row["method"],
            *("" if pd.isna(row[key]) else plain(row[key]) for key in results.swept),
            ", ".join([str(row["trials"]), *lost]),
            *(
                cell
                for score in (final, "auc")
                for cell in (
                    score_text(seeds_of(results.trials, point, score)),
                    _interval(row, f"{score}_median"),
                )
            ),
            _steps(needed, results.x),
        )
    return table


def _interval(row: dict, name: str) -> str:
    if pd.isna(row[name]):
        return "-"
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f"{row[name]:.3f}" + ("" if pd.isna(low) else f" [{low:.3f}, {high:.3f}]")


def _steps(needed: Efficiency, x: str) -> str:
    if not needed.runs:
        return "-"
    shown = ".3g" if x == "hours" else ",.0f"
    median = f"{needed.median:{shown}}" if needed.median < float("inf") else "-"
    return f"{median} ({needed.reached} of {needed.runs})"


def _pairs_table(pairs: pd.DataFrame) -> Table:
    table = Table("first", "second", "trials", *_judgement_names(pairs))
    for row in pairs.to_dict("records"):
        table.add_row(
            row["first"],
            row["second"],
            f"{row['first_trials']} and {row['second_trials']}",
            *_judgement(row),
        )
    return table


def _judgement_names(pairs: pd.DataFrame) -> list[str]:
    needed = ["seeds needed"] if "seeds_needed" in pairs else []
    return ["difference", "P(first better)", "p", "p (Holm)", "detectable", *needed, "verdict"]


def _judgement(row: dict) -> list[str]:
    """Cells under `_judgement_names`."""
    cells = ["-" if pd.isna(row["difference"]) else f"{row['difference']:+.3f}"]
    cells.append(_interval(row, "probability"))
    cells += ["-" if pd.isna(row[key]) else f"{row[key]:.3g}" for key in ("p", "p_holm")]
    detectable = row["detectable_difference"]
    cells.append(
        "-"
        if pd.isna(detectable)
        else "none"
        if detectable == float("inf")
        else f"{detectable:.2g}"
    )
    if "seeds_needed" in row:
        needed = row["seeds_needed"]
        most = f"more than {MOST_SEEDS}"
        cells.append(
            "-" if pd.isna(needed) else most if needed == float("inf") else f"{needed:.0f}"
        )
    return [*cells, row["verdict"] or "-"]


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


def _expert_network(directory: Path, home: Path) -> Section:
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
            Figure(expert_ratios(frame, case, home / f"ratio_{case}.png"), f"Ratios, {case}")
            for case in cases
        ],
    )


def _probe(directory: Path, home: Path) -> Section:
    neurons, layers = (pd.read_csv(directory / f"{name}.csv") for name in ("neurons", "layers"))
    path = probe_errors(neurons, layers, home / "probe.png", "")
    return Section(
        title=f"probe ({directory.resolve().name})",
        directory=directory,
        tables=[("Layers", "Means over neurons, and 95% intervals.", probe_table(layers))],
        figures=[Figure(path, "Gradients against the true ones")],
    )


def compare(
    first: str | Path,
    second: str | Path | None = None,
    plan: float | None = None,
    x: str = "env_steps",
    called: Sequence[str | Path] = (),
) -> tuple[pd.DataFrame, list[tuple[str, str, Table]]]:
    """Two experiments' methods, each against itself, or one experiment's against each other; each
    at its best learning rate.

    Args:
        first: results folder.
        second: the other one, if there are two.
        plan: a difference of AUC, of which to say how many seeds would find it.
        x: what areas are taken against, a key of `AXES`.
        called: what the tables call the folders, where these are copies for reading.

    Returns:
        The frame of `statistics.compare_pairs`, or of two experiments that of
        `statistics.compare_experiments` with each one's mean and SEM of final score and AUC, and
        the tables that show it, after those of what is missing and, of two experiments, of the
        settings that differ.

    Raises:
        ResultsError: a folder holds no results, there is nothing to compare, or a plan for a
            difference that is not above 0.
    """
    if plan is not None and not plan > 0:
        raise ResultsError(f"a plan is for a difference above 0, got {plan:g}")
    folders = [first] if second is None else [first, second]
    names = [str(name) for name in called or folders]
    both = [load_results(folder, x=x) for folder in folders]
    best = [best_learning_rates(compare_methods(results.trials)) for results in both]
    chosen = [at_points(r.trials, points) for r, points in zip(both, best, strict=True)]
    rates = any(learning_rate_columns(results.swept) for results in both)
    if second is None:
        frame = compare_pairs(chosen[0], plan=plan)
        if frame.empty or not frame["tasks"].any():
            raise ResultsError(
                f"{names[0]} has no two methods with completed trials at the same swept values"
            )
        note = " ".join([_final_note(both[0]), few_seeds(best[0])]).strip()
        shown = [("Comparison", note, comparison_table(best[0], both[0].trials))]
        lines = confounding(by_task(chosen[0]))
        title, table = "Methods against each other", _pairs_table(frame)
    else:
        frame, shown, lines, table = _compare_two(both, chosen, plan, names)
        title = "Methods"
    said = [f"AUC: over {both[0].axis.name}.", _pairs_note(frame, rates), *lines]
    if plan is not None:
        said.insert(2, _plan_note(plan))
    if second is not None:
        said.insert(0, f"first: {names[0]}, second: {names[1]}; mean ± SEM over completed trials.")
    missing = Table("experiment", "trial")
    for name, results in zip(names, both, strict=True):
        for problem in results.problems:
            missing.add_row(name, escape(problem))
    if missing.row_count:
        shown.insert(0, ("What is missing", "", missing))
    return frame, [*shown, (title, "\n".join(said), table)]


def _plan_note(plan: float) -> str:
    return (
        f"Seeds needed: of each method in every task, so that a true difference of {plan:g} is "
        "found with power 0.8."
    )


def _compare_two(
    both: Sequence[Results],
    chosen: Sequence[pd.DataFrame],
    plan: float | None,
    names: Sequence[str],
) -> tuple[pd.DataFrame, list[tuple[str, str, Table]], list[str], Table]:
    """The frame, the table of differing settings, what confounds, and the table of methods."""
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
            frame[f"{place}_{score}_sem"] = frame["method"].map(completed[score].agg(sem))
    differences = Table("setting", *names)
    settings = [_settings(read_experiment(results.directories[0])) for results in both]
    for key in dict.fromkeys([*settings[0], *settings[1]]):
        values = [str(setting.get(key, "-")) for setting in settings]
        if values[0] != values[1] and key != "name":
            differences.add_row(key, *values)
    shown = [("Settings that differ", "", differences)] if differences.row_count else []
    table = Table("method", "trials")
    for header in (f"final {MEASURE_NAMES[both[0].measure]}", "AUC"):
        for place in ("first", "second"):
            table.add_column(f"{header}, {place}")
    for header in _judgement_names(frame):
        table.add_column(header)
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
            *_judgement(row),
        )
        lines += confounding(
            {f"{method} ({place})": of for place, of in zip(("first", "second"), ours, strict=True)}
        )
    return frame, shown, lines, table


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
                *(f"% {line}" for line in note.splitlines()),
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
