"""Where the trials of a sweep stand, on the terminal while they run and whenever asked."""

import contextlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from ray import cloudpickle, tune
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from sgrl.tuning.checkpoints import write_text
from sgrl.tuning.experiment import Trial
from sgrl.tuning.metrics import MEASURE_NAMES, Score, common_measure, read_metrics, score
from sgrl.tuning.storage import Store
from sgrl.tuning.trial import (
    HANG_FILE,
    first_line,
    is_disk_full,
    read_status,
    seconds_per_iteration,
    write_status,
)

LOG_FILE = "sweep.log"
SUMMARY_FILE = "summary.csv"


@dataclass
class Progress:
    """Where one trial stands.

    Attributes:
        trial: which one.
        state: pending, running, interrupted, completed or failed.
        iteration: iterations trained.
        score: how well it does so far.
        seconds_per_iteration: of the last iterations.
        reason: why it failed.
    """

    trial: Trial
    state: str = "pending"
    iteration: int = 0
    score: Score = field(default_factory=lambda: score([]))
    seconds_per_iteration: float = math.nan
    reason: str = ""

    @property
    def last_iteration(self) -> int:
        return self.trial.config["stop"]["training_iteration"]

    @property
    def seconds_left(self) -> float:
        return (self.last_iteration - self.iteration) * self.seconds_per_iteration

    def judged_by(self, measure: str) -> Score:
        """The score, empty where it is of another measure."""
        same = self.score.measure == measure
        return self.score if same else Score(measure, math.nan, math.nan)

    @property
    def is_over(self) -> bool:
        return self.state in ("completed", "failed")


def read_progress(directory: Path, trial: Trial) -> Progress:
    """Where the trial in `directory/<trial>` stands, from its files alone."""
    status = read_status(directory / trial.name)
    rows = read_metrics(directory / trial.name / "metrics.csv")
    return Progress(
        trial=trial,
        state=status.get("state", "pending"),
        iteration=len(rows),
        score=score(rows),
        seconds_per_iteration=seconds_per_iteration(rows),
        reason=status.get("reason", ""),
    )


def measure_of(progress: Iterable[Progress]) -> str:
    """What a sweep's trials are judged by: the test reward if one evaluates."""
    return common_measure(row.score.measure for row in progress)


def write_summary(directory: Path, progress: Iterable[Progress]) -> None:
    """Write summary.csv: one row a trial."""
    progress = list(progress)
    measure = measure_of(progress)
    final = f"final_{measure}"
    rows = [
        {
            "trial": row.trial.name,
            "method": row.trial.method,
            **row.trial.swept,
            "seed": row.trial.seed,
            "state": row.state,
            "iterations": row.iteration,
            final: row.judged_by(measure).final,
            "auc": row.judged_by(measure).auc,
            "reason": row.reason,
        }
        for row in progress
    ]
    last = ["seed", "state", "iterations", final, "auc", "reason"]
    frame = pd.DataFrame(rows)
    frame = frame[[*frame.columns.drop(last), *last]]
    write_text(directory / SUMMARY_FILE, frame.to_csv(index=False))


class SweepView(tune.Callback, tune.Stopper):
    """Follows the trials as Tune reports them: a table that fits the terminal, or, where stdout
    is none, one line for every trial that ends. Stops them all once the disk is full.

    Args:
        store: of the sweep.
        trials: all of them by name, those already over included. Kept up to date.
    """

    def __init__(self, store: Store, trials: dict[str, Progress]) -> None:
        self.store, self.directory = store, store.folder
        self.trials = trials
        self.disk_full = False
        self.saved: dict[str, int] = {}
        self.said: set[str] = set()
        self.console = Console()
        self.live: Live | None = None
        self.next_refresh = 0.0

    @contextlib.contextmanager
    def shown_on(self, console: Console) -> Iterator[None]:
        """Show the trials on `console` while they run."""
        self.console = console
        if not console.is_terminal:
            yield
            return
        with Live(self, console=console, auto_refresh=False, redirect_stdout=False) as self.live:
            yield

    def __rich_console__(self, console: Console, options: Any) -> Iterator[RenderableType]:
        # Title, frame, header and caption take six lines; a table that is too high is cut off.
        limit = max(3, console.height - 7)
        yield trials_table(list(self.trials.values()), self.directory.name, limit)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.trials[trial.config["trial"]].state = "running"

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        row = self.trials[trial.config["trial"]]
        row.iteration = result["iteration"]
        row.score = Score(*result["score"])
        row.seconds_per_iteration = result["seconds_per_iteration"]
        for note in result["notes"]:
            self._say(note)
        if result["disk_full"]:
            self.disk_full = True
        elif result["done"]:
            self._end(row.trial)
        if result["saved"] > self.saved.get(row.trial.name, 0):
            # Only failures without a new checkpoint in between add up.
            self.saved[row.trial.name] = result["saved"]
            trial.run_metadata.num_failures = 0

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self.trials[trial.config["trial"]]
        row.state = "pending"
        if not self._is_disk_full(trial):
            self._say(f"{row.trial.name} is started again after {self._reason(trial)}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        if not self._is_disk_full(trial):
            reason = self._reason(trial)
            write_status(self.directory / name, {"state": "failed", "reason": reason})
            self.store.push(f"{name}/status.json")
            self._end(self.trials[name].trial)

    def __call__(self, trial_id: str, result: dict) -> bool:
        """Whether a trial is to end with this result; none is."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials are to end."""
        return self.disk_full

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if self.live is not None and time.monotonic() >= self.next_refresh:
            self.live.refresh()
            self.next_refresh = time.monotonic() + 0.5

    def __reduce__(self) -> tuple:
        # Tune pickles its callbacks into a file that nothing reads; a console cannot be.
        return tune.Callback, ()

    def _is_disk_full(self, trial: Any) -> bool:
        error = _error(trial)
        self.disk_full |= error is not None and is_disk_full(error)
        return self.disk_full

    def _reason(self, trial: Any) -> str:
        """Why a trial's process ended, in one line."""
        config = self.trials[trial.config["trial"]].trial.config
        hang = self.directory / trial.config["trial"] / HANG_FILE
        if hang.is_file() and hang.stat().st_size:
            timeout = config["iteration_timeout"]
            return f"an iteration of more than {timeout:g} s ({HANG_FILE} says where it hung)"
        error = _error(trial)
        return first_line(error) if error is not None else f"an error that {LOG_FILE} holds"

    def _end(self, trial: Trial) -> None:
        self.store.pull(f"{trial.name}/metrics.csv", f"{trial.name}/status.json")
        row = self.trials[trial.name] = read_progress(self.directory, trial)
        # Written each time: a sweep that is killed later has its table of what ended before.
        write_summary(self.directory, self.trials.values())
        if self.live is None or row.state == "failed":
            over = sum(row.is_over for row in self.trials.values())
            line = f"[{over}/{len(self.trials)}] {trial.name} {row.state}"
            final = number(row.score.final)
            detail = row.reason or (f"{MEASURE_NAMES[row.score.measure]} {final}" if final else "")
            self._say(f"{line} at iteration {row.iteration}" + (f", {detail}" if detail else ""))

    def _say(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            print(line)  # into the log
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def trials_table(rows: Sequence[Progress], title: str, limit: int | None = None) -> Table:
    """Method, swept values, seed, iteration, score and time left of each trial.

    Where they are more than `limit`, running trials come first, then failed ones, then the last
    of the completed ones, then pending ones.
    """
    order = ["running", "failed", "interrupted", "completed", "pending"]
    shown = list(rows)
    if limit is not None and len(shown) > limit:
        groups = {state: [row for row in rows if row.state == state] for state in order}
        groups["completed"].reverse()
        shown = [row for state in order for row in groups[state]][:limit]
    counts = [f"{sum(row.state == state for row in rows)} {state}" for state in order]
    caption = ", ".join(count for count in counts if not count.startswith("0 "))
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
            f"{row.iteration}/{row.last_iteration}",
            number(row.judged_by(measure).final),
            time_left,
            style={"running": "bold", "failed": "red", "pending": "dim"}.get(row.state, ""),
        )
    return table


def sweep_seconds_left(rows: Sequence[Progress]) -> float:
    """Time until the last trial ends, if waiting ones are as fast as those seen so far and as
    many as now go on running side by side."""
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
            work += (row.last_iteration - row.iteration) * pace
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


def _error(trial: Any) -> BaseException | None:
    # Tune's own `get_pickled_error` looks where the file will be once the sweep is over.
    if trial.pickled_error_file is None:
        return None
    return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr for what is fetched; yields a function that is told what, how many bytes so
    far and of how many. Nothing is shown until it is called."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, Any] = {}

    def report(what: str, so_far: int, total: int | None) -> None:
        if what not in tasks:
            bars.start()
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=so_far)

    try:
        yield report
    finally:
        bars.stop()


class _LogFile(io.FileIO):
    """A log must not end a sweep: what a full disk does not take is lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Send all that this process and its libraries print to a log file.

    Ray also writes from C++, so the file descriptors themselves are turned over. Yields a console
    on the stdout there was before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    try:
        direct = sys.stdout.fileno() == 1
    except (OSError, ValueError):
        direct = False
    screen = os.fdopen(os.dup(1), "w") if direct else sys.stdout
    raw = _LogFile(log, "a")
    with io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", line_buffering=True) as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield Console(file=screen)
        finally:
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
            if direct:
                screen.close()
