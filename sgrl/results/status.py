"""Progress of the trials of a sweep, from its folder alone.

Needs neither Ray nor torch nor the environment that they train in, and writes nothing.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from sgrl.errors import UserError
from sgrl.results.folder import OVER, STATES, SweepFolder
from sgrl.results.locations import reading
from sgrl.results.metrics import MEASURE_NAMES, Row, Score, common_measure, read_metrics, score
from sgrl.results.plan import Trial, planned_trials
from sgrl.results.selection import ALL, Selection
from sgrl.results.storage import is_address

STYLES = {"running": "bold", "failed": "red", "pending": "dim", "skipped": "dim"}


class StatusError(UserError):
    """A folder holds no sweep; the message is one line that says what to do."""


def seconds_per_iteration(rows: Sequence[Row]) -> float:
    """Median over the last 20 iterations, NaN where there are none."""
    seconds = sorted(row["iteration_seconds"] for row in rows[-20:])
    return seconds[len(seconds) // 2] if seconds else math.nan


@dataclass
class Progress:
    """The progress of one trial.

    Attributes:
        trial: which one.
        state: pending, running, interrupted, completed, failed, stopped (early, by a schedule) or
            skipped (never run, as the others' results made it needless).
        iteration: iterations trained.
        score: how well it does so far.
        seconds_per_iteration: of the last iterations.
        reason: why it failed, was stopped or skipped.
        details: of one that failed, the file that says more, from the sweep's folder.
    """

    trial: Trial
    state: str = "pending"
    iteration: int = 0
    score: Score = field(default_factory=lambda: score([]))
    seconds_per_iteration: float = math.nan
    reason: str = ""
    details: str = ""

    @property
    def last_iteration(self) -> int:
        """The iteration after which the trial ends."""
        return self.trial.config.stop.training_iteration

    @property
    def seconds_left(self) -> float:
        """Seconds until the trial ends, at its present speed."""
        if not self.last_iteration:
            return math.nan
        return (self.last_iteration - self.iteration) * self.seconds_per_iteration

    def judged_by(self, measure: str) -> Score:
        """The score, empty where it is of another measure."""
        same = self.score.measure == measure
        return self.score if same else Score(measure, math.nan, math.nan)

    @property
    def is_over(self) -> bool:
        """Whether the trial has ended, well or not, or is not needed."""
        return self.state in OVER


def read_progress(sweep: SweepFolder, trial: Trial) -> Progress:
    """Read the progress of a trial, from its files alone."""
    folder = sweep.trial(trial.name)
    status, rows = folder.read_status(), read_metrics(folder.metrics)
    state = status.get("state", "pending")
    return Progress(
        trial=trial,
        state=state,
        iteration=len(rows),
        score=score(rows),
        seconds_per_iteration=seconds_per_iteration(rows),
        reason=status.get("reason", ""),
        details=_details(sweep, trial) if state == "failed" else "",
    )


def _details(sweep: SweepFolder, trial: Trial) -> str:
    """The file with the traceback of a failure, or whatever else there is."""
    folder = sweep.trial(trial.name)
    files = (folder.hang, folder.error, sweep.log)
    # Of a trial that did not hang the first one is there and empty.
    found = next((f for f in files if f.is_file() and f.stat().st_size), folder.status)
    return found.relative_to(sweep.path).as_posix()


def failures(rows: Iterable[Progress], location: object) -> list[str]:
    """One line for each failed trial, with the file that says more.

    Args:
        rows: of all trials.
        location: of the sweep, as it is called.
    """
    return [
        f"{row.trial.name} failed at iteration {row.iteration}: {row.reason}; see "
        f"{location}/{row.details}"
        for row in rows
        if row.state == "failed"
    ]


def count_states(rows: Iterable[Progress]) -> dict[str, int]:
    """The number of trials in each of `STATES`."""
    states = [row.state for row in rows]
    return {state: states.count(state) for state in STATES}


def _in_words(rows: Iterable[Progress]) -> list[str]:
    """As in 3 completed."""
    return [f"{count} {state}" for state, count in count_states(rows).items() if count]


def measure_of(progress: Iterable[Progress]) -> str:
    """What a sweep's trials are judged by: the test reward if one evaluates."""
    return common_measure(row.score.measure for row in progress)


def read_stopped(sweep: SweepFolder, trial: Trial) -> Progress:
    """Read the progress of a trial whose sweep is not running."""
    row = read_progress(sweep, trial)
    row.state = "interrupted" if row.state == "running" else row.state
    return row


@dataclass
class SweepStatus:
    """Where a sweep stands.

    Attributes:
        location: its folder, or address, as it was given.
        name: of its folder.
        is_running: whether this machine runs it; None where that cannot be told.
        rows: of its trials, in their order.
        problems: one line for each folder that should not be as it is.
    """

    location: str | Path
    name: str
    is_running: bool | None
    rows: list[Progress]
    problems: list[str]

    @property
    def goes_on(self) -> bool:
        """Whether it may still change: it runs or, in object storage, has trials that do."""
        running = any(row.state == "running" for row in self.rows)
        return running if self.is_running is None else self.is_running

    @property
    def table(self) -> Table:
        """One row a trial."""
        return trials_table(self.rows, self.name)

    @property
    def lines(self) -> list[str]:
        """What stands below the table."""
        return [*failures(self.rows, self.location), *self.problems]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it (docs/results.md says what the keys mean)."""
        return {
            "location": str(self.location),
            "name": self.name,
            "is_running": self.is_running,
            "measure": measure_of(self.rows),
            "counts": count_states(self.rows),
            "seconds_left": sweep_seconds_left(self.rows),
            "trials": [
                {
                    "trial": row.trial.name,
                    "method": row.trial.method,
                    "swept": row.trial.swept,
                    "seed": row.trial.seed,
                    "state": row.state,
                    "iteration": row.iteration,
                    "last_iteration": row.last_iteration,
                    "measure": row.score.measure,
                    "final": row.score.final,
                    "auc": row.score.auc,
                    "seconds_per_iteration": row.seconds_per_iteration,
                    "seconds_left": row.seconds_left,
                    "reason": row.reason,
                    "details": row.details and f"{self.location}/{row.details}",
                }
                for row in self.rows
            ],
            "problems": self.problems,
        }


def sweep_status(location: str | Path, only: Selection = ALL) -> SweepStatus:
    """Read where a sweep stands.

    Args:
        location: its folder, or address.
        only: the trials to tell of.

    Raises:
        StatusError: there is no sweep.
        SelectionError: there is no such trial.
        ExperimentError: its experiment.yaml is not an experiment.
        StorageError: as `storage.open_store`.
    """
    with reading(location) as folder:
        sweep = SweepFolder(folder.absolute())
        trials = planned_trials(sweep.experiment) if sweep.experiment.is_file() else _found(sweep)
        if not trials and not sweep.experiment.is_file():
            what = "holds no sweep" if folder.exists() else "does not exist"
            raise StatusError(f"{location} {what}: give a folder such as results/quickstart")
        # Object storage has no locks that would tell whether the sweep is running.
        is_running = None if is_address(location) else sweep.is_running()
        read = read_stopped if is_running is False else read_progress
        only.check((trial.method, trial.seed) for trial in trials)
        rows = [
            read(sweep, trial) if sweep.trial(trial.name).config.is_file() else Progress(trial)
            for trial in trials
            if only.holds(trial.method, trial.seed)
        ]
        problems = sweep.problems(trial.name for trial in trials)
        return SweepStatus(location, sweep.name, is_running, rows, problems)


def _found(sweep: SweepFolder) -> list[Trial]:
    """Read the trials of a folder without a plan, as a script's Tuner leaves it."""
    trials = []
    for folder in sweep.trials():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            trials.append(Trial.from_dict(folder.read_config()))
    return trials


def methods_table(rows: Sequence[Progress]) -> Table:
    """How far each method is: its trials by state, a bar of iterations, and the time left.

    Args:
        rows: of all trials.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    for method in dict.fromkeys(row.trial.method for row in rows):
        own = [row for row in rows if row.trial.method == method]
        done, share = sum(row.is_over for row in own), share_done(own)
        bar = ProgressBar(total=1, completed=share, width=20)
        running = sum(row.state == "running" for row in own)
        counts = f"{done}/{len(own)}" + (f", {running} running" if running else "")
        table.add_row(method, bar, f"{share:.0%}", counts)
    return table


def sweep_view(
    rows: Sequence[Progress], title: str, height: int, seconds: float | None = None
) -> Group:
    """Draw a sweep for a terminal: a line, one for each method, and the trials that still fit.

    Args:
        rows: of all trials.
        title: of the table.
        height: of the terminal, in lines.
        seconds: since the sweep was started, if that is known.
    """
    # Title, frame, header and caption take six lines; a view that is too high is cut off.
    limit = height - 8
    parts: list[RenderableType] = [progress_line(rows, seconds)]
    methods = methods_table(rows)
    if len(rows) > limit >= methods.row_count + 3:
        limit -= methods.row_count
        parts.append(methods)
    return Group(*parts, trials_table(rows, title, max(3, limit)))


def share_done(rows: Iterable[Progress]) -> float:
    """The share of the trials' iterations that are trained; those of failed ones count as well."""
    rows = list(rows)
    # Where something else ends a trial, its last iteration is not known.
    ends = [max(row.iteration, row.last_iteration) for row in rows]
    done = sum(end if row.is_over else row.iteration for row, end in zip(rows, ends, strict=True))
    return done / sum(ends) if any(ends) else 1.0


def progress_line(rows: Sequence[Progress], seconds: float | None = None) -> str:
    """Where a sweep stands, in one line.

    Args:
        rows: of all trials.
        seconds: since it was started, if that is known.
    """
    parts = [f"{share_done(rows):.0%}", *_in_words(rows)]
    parts += [] if seconds is None else [f"{duration(seconds)} elapsed"]
    left = sweep_seconds_left(rows)
    return ", ".join([*parts, *([f"about {duration(left)} left"] if left > 0 else [])])


def trials_table(rows: Sequence[Progress], title: str, limit: int | None = None) -> Table:
    """Method, swept values, seed, iteration, score and time left of each trial.

    Where they are more than `limit`, running trials come first, then failed ones, then the last
    of the completed ones, then pending ones.
    """
    shown = list(rows)
    if limit is not None and len(shown) > limit:
        groups = {state: [row for row in rows if row.state == state] for state in STATES}
        groups["completed"].reverse()
        shown = [row for state in STATES for row in groups[state]][:limit]
    caption = ", ".join(_in_words(rows))
    left = sweep_seconds_left(rows)
    if math.isfinite(left) and left > 0:
        caption += f"; about {duration(left)} left"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    swept = list(dict.fromkeys(name for row in rows for name in row.trial.swept))
    table.add_column("method", no_wrap=True, overflow="ellipsis")
    measure = measure_of(rows)
    for name in [*swept, "seed", "iteration", MEASURE_NAMES[measure], "time left"]:
        table.add_column(name, justify="right", no_wrap=True, overflow="ellipsis")
    for row in shown:
        values = [str(row.trial.swept.get(name, "")) for name in swept]
        running = row.state == "running"
        time_left = duration(row.seconds_left) if running else row.state
        table.add_row(
            row.trial.method,
            *values,
            str(row.trial.seed),
            f"{row.iteration}/{row.last_iteration}" if row.last_iteration else str(row.iteration),
            number(row.judged_by(measure).final),
            time_left,
            style=STYLES.get(row.state, ""),
        )
    return table


def sweep_seconds_left(rows: Sequence[Progress]) -> float:
    """Estimate the time until the last trial ends.

    Waiting trials count as fast as those seen so far, with as many side by side as now.
    """
    seen = [row.seconds_per_iteration for row in rows if math.isfinite(row.seconds_per_iteration)]
    running = [row for row in rows if row.state == "running"]
    if not seen or not running:
        return math.nan
    typical = sum(seen) / len(seen)
    work = 0.0
    for row in rows:
        if not row.is_over:
            seconds = row.seconds_per_iteration
            pace = seconds if math.isfinite(seconds) else typical
            work += max(0, row.last_iteration - row.iteration) * pace
    return work / len(running)


def duration(seconds: float) -> str:
    """As in 42 s, 7 min or 3 h 5 min."""
    if not math.isfinite(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float) -> str:
    """Three decimals; empty where there is no value."""
    return f"{value:.3f}" if math.isfinite(value) else ""
