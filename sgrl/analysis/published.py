"""Tables of the docs that come from the published archives: claims, scores and costs.

A page holds each table between two marks, `<!-- NAME -->` and `<!-- end of NAME -->`; `sgrl study
--write PAGE` brings them up to date.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sgrl.analysis.comparison import best_learning_rates, compare_methods
from sgrl.analysis.study import judge_claims, markdown
from sgrl.analysis.tables import cells, comparison_table
from sgrl.results.archive import read_archive
from sgrl.results.folder import SweepFolder
from sgrl.results.locations import reading
from sgrl.results.runs import ResultsError, load_results
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
_MARK = re.compile(r"<!-- (?!end of )(.*?) -->\n.*?<!-- end of (.*?) -->", flags=re.DOTALL)


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


def write_tables(page: Path, table_of: Callable[[str], str]) -> int:
    """Replace the tables of a page.

    Args:
        page: a page in Markdown.
        table_of: returns the table of a mark's name.

    Returns:
        The number of tables.

    Raises:
        ResultsError: the page has no marks, or those around a table differ; one line.
    """
    text = page.read_text(encoding="utf-8")
    if not _MARK.search(text):
        raise ResultsError(f"{page} does not hold the lines <!-- NAME --> and <!-- end of NAME -->")

    def table(mark: re.Match[str]) -> str:
        name, end = mark.groups()
        if name != end:
            raise ResultsError(f"{page}: <!-- {name} --> is followed by <!-- end of {end} -->")
        return f"<!-- {name} -->\n\n{table_of(name)}\n<!-- end of {name} -->"

    replaced, count = _MARK.subn(table, text)
    page.write_text(replaced, encoding="utf-8")
    return count


def table_named(name: str, published: Path) -> str:
    """Draw one table in Markdown.

    Args:
        name: "findings", "cost", or the name of an archive, whose methods are tabulated.
        published: folder of the archives.

    Raises:
        ResultsError: there is no such table; one line.
        StorageError: an archive is damaged.
    """
    if name == "findings":
        return markdown(judge_claims(published))
    if name == "cost":
        return cost(published)
    if not is_archive(published / name):
        raise ResultsError(f"{name}: no such table, and no archive in {published}")
    return scores(published / name)


def scores(archive: Path) -> str:
    """Tabulate the methods of an archive, each at its best learning rate.

    Args:
        archive: its folder.
    """
    with reading(archive) as folder:
        trials = load_results(folder).trials
    head, rows = cells(comparison_table(best_learning_rates(compare_methods(trials)), trials))
    return _table(head, rows)


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
    return _table(head, [*rows, ["all", "", "", "", "", f"{total:.1f}", ""]])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
