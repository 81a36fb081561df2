"""What the docs take from the published archives: claims, scores, costs and the study's figure.

`sgrl study --write PAGE` brings those of a page up to date (see `sgrl.markdown`).
"""

from pathlib import Path

import pandas as pd

from sgrl.analysis.comparison import best_learning_rates, compare_methods
from sgrl.analysis.curves import Curves, Line
from sgrl.analysis.study import judge_claims
from sgrl.analysis.style import method_styles
from sgrl.analysis.tables import cells, comparison_table
from sgrl.markdown import markdown_table, write_tables
from sgrl.results.archive import read_archive
from sgrl.results.folder import SweepFolder
from sgrl.results.locations import reading
from sgrl.results.metrics import MEASURE_NAMES
from sgrl.results.runs import Results, ResultsError, load_results
from sgrl.results.storage import is_archive

#: What each archive stands beside: figures of the paper, or what else it is for.
PURPOSE = {
    "mnist_confirmation": "Figures 2b, 5",
    "mnist_reward_noise": "Figures 2c, 6",
    "mnist_learning_rate": "Figure 6",
    "mnist_parents": "Figure 6",
    "mnist_fixed_mixing": "Figure 6",
    "escape_confirmation": "Figure 3",
    "escape_confirmation_baselines": "Figure 3",
    "explore_confirmation": "Figure 3",
    "explore_confirmation_baselines": "Figure 3",
    "labyrinth_escape_20": "Figure 7",
    "labyrinth_escape_40": "Figure 7",
    "labyrinth_explore_20": "Figure 7",
    "labyrinth_explore_40": "Figure 7",
    "labyrinth_placebo": "control",
    "mnist_placebo": "control",
    "ppo_memory": "memory under PPO",
}

#: Confirmation runs of each task, in the figure of the study.
CONFIRMATION = {
    "LabyrinthEscape": ("escape_confirmation", "escape_confirmation_baselines"),
    "LabyrinthExplore": ("explore_confirmation", "explore_confirmation_baselines"),
    "MNIST bandit": ("mnist_confirmation",),
}


def draw_study(published: Path, path: Path) -> Path:
    """Draw the learning curves of the confirmation runs, a panel a task that has been run.

    Args:
        published: folder of the archives.
        path: the PNG to write; an SVG of the same name is written beside it.

    Returns:
        `path`.

    Raises:
        ResultsError: there are none of their archives; one line.
        StorageError: an archive is damaged.
    """
    tasks: dict[str, list[Results]] = {}
    for task, names in CONFIRMATION.items():
        for name in filter(lambda name: is_archive(published / name), names):
            with reading(published / name) as folder:
                tasks.setdefault(task, []).append(load_results(folder))
    if not tasks:
        raise ResultsError(f"{published} holds no archives of confirmation runs")
    measures = {MEASURE_NAMES[results.measure] for runs in tasks.values() for results in runs}
    panels = []
    for task, runs in tasks.items():
        styles = method_styles(m for results in runs for m in results.trials["method"].unique())
        lines = [
            Line(str(method), results.curves_of(trials, results.measure), styles[str(method)])
            for results in runs
            for method, trials in results.trials.groupby("method", sort=False)
        ]
        panels.append((task, lines))
    name = " or ".join(sorted(measures))
    curves = Curves("Confirmation runs", "environment steps", name, panels, limits=(-0.02, 1.02))
    return curves.draw(path)


def write_into(page: Path, published: Path) -> int:
    """Replace the tables of a page by what the archives say.

    Args:
        page: a page in Markdown.
        published: folder of the archives.

    Returns:
        The number of tables.

    Raises:
        ResultsError: the page has no marks, or a mark whose table does not exist; one line.
        StorageError: an archive is damaged.
    """
    return write_tables(page, lambda name: table_named(name, published))


def table_named(name: str, published: Path) -> str:
    """Draw one table in Markdown.

    Args:
        name: "findings", "cost", "bounds", or the name of an archive, whose methods are tabulated.
        published: folder of the archives.

    Raises:
        ResultsError: there is no such table; one line.
        StorageError: an archive is damaged.
    """
    if name == "findings":
        return findings(published)
    if name == "cost":
        return cost(published)
    if name == "bounds":
        return bounds(published / name)
    if not is_archive(published / name):
        raise ResultsError(f"{name}: no such table, and no archive in {published}")
    return scores(published / name)


def findings(published: Path) -> str:
    """Tabulate the paper's claims beside what our runs say.

    Args:
        published: folder of the archives.
    """
    head = ["claim", "source", "ours", "runs", "p (Holm)", "verdict"]
    rows = []
    for row in judge_claims(published).to_dict("records"):
        number = f"{row['number']}. " if row["number"] else ""
        p = "" if pd.isna(row["p"]) else f"{row['p']:.2g}"
        claim = f"{number}{row['claim']}"
        rows.append([claim, row["source"], row["ours"], row["runs"], p, row["verdict"]])
    return markdown_table(head, rows)


def scores(archive: Path) -> str:
    """Tabulate the methods of an archive, each at its best learning rate.

    Args:
        archive: its folder.
    """
    with reading(archive) as folder:
        trials = load_results(folder).trials
    head, rows = cells(comparison_table(best_learning_rates(compare_methods(trials)), trials))
    return markdown_table(head, rows)


def cost(published: Path) -> str:
    """Tabulate the archives: figure, file, trials, core hours and the command that repeats each.

    Core hours are those that the trials' iterations took, evaluation included. The machine did
    other work at the same time, so that they are an upper bound.

    Args:
        published: folder of the archives.
    """
    rows, total = [], 0.0
    for name, purpose in PURPOSE.items():
        archive = published / name
        if not is_archive(archive):
            continue
        trials = read_archive(archive)
        threads = SweepFolder(archive).read_experiment()["num_threads"]
        hours = sum(
            row["iteration_seconds"] * threads / 3600 for trial in trials for row in trial.rows
        )
        total += hours
        failed = sum(trial.status.get("state") == "failed" for trial in trials)
        interrupted = sum(len(trial.starts) > 1 for trial in trials)
        counts = (len(trials), failed, interrupted)
        file = SweepFolder(Path("results/published", name)).experiment
        command = f"`sgrl sweep {file.as_posix()}`"
        rows.append([purpose, name, *map(str, counts), f"{hours:.1f}", command])
    head = ["for", "archive", "trials", "failed", "interrupted", "core hours", "command"]
    return markdown_table(head, [*rows, ["all", "", "", "", "", f"{total:.1f}", ""]])


def bounds(folder: Path) -> str:
    """Tabulate what linear predictions could save over all time steps, with intervals.

    Of each layer the fit to the most samples, and the policy's own predictors.

    Args:
        folder: of CSV files as `sgrl theory bounds` writes them, TASK_BATCH.csv each.
    """
    rows = []
    for file in sorted(folder.glob("*.csv"), key=_task_and_batch):
        task, batch = _task_and_batch(file)
        table = pd.read_csv(file)
        for layer, of_layer in table[table["step"] == "all"].groupby("layer", sort=False):
            for row in of_layer.tail(2).to_dict("records"):
                measured = [
                    _with_interval(row, f"{name}_to_backprop") for name in ("best", "shrunk")
                ]
                explained, gain = (_with_interval(row, name) for name in ("explained", "gain"))
                pooled = "" if pd.isna(row["pooled"]) else f"{row['pooled']:.3g}"
                place = [task, str(batch), str(layer), str(row["fitted"])]
                rows.append([*place, explained, *measured, gain, pooled])
    head = ["task", "batch", "layer", "m", "explained", "error at best", "shrunk", "gain", "pooled"]
    return markdown_table(head, rows)


def _task_and_batch(file: Path) -> tuple[str, int]:
    task, _, batch = file.stem.rpartition("_")
    return task, int(batch)


def _with_interval(row: dict, name: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_ci_low", "_ci_high"))
    interval = f"{low:.2g} to {high:.2g}"
    return interval if pd.isna(value) else f"{value:.2g} ({interval})"
