"""Where the trials of a sweep stand, on the terminal while they run."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from ray import cloudpickle, tune
from ray.exceptions import RayTaskError
from rich.console import Console, RenderableType
from rich.live import Live

from sgrl.files import write_text
from sgrl.local_ray import is_verbose
from sgrl.results.folder import SweepFolder
from sgrl.results.metrics import MEASURE_NAMES, Score
from sgrl.results.plan import Trial
from sgrl.results.status import (
    Progress,
    measure_of,
    number,
    progress_line,
    read_progress,
    sweep_view,
)
from sgrl.results.storage import Store
from sgrl.tuning.trial import first_line, is_disk_full
from sgrl.tuning.trial_callbacks import Following


def write_summary(sweep: SweepFolder, progress: Iterable[Progress]) -> None:
    """Write a sweep's summary: one row a trial."""
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
    write_text(sweep.summary, frame.to_csv(index=False))


#: Between two lines about the sweep if stdout is not a terminal.
LINE_SECONDS = 20.0
#: Of the time, what showing the trials and writing their summary may each take, at most: of
#: thousands both take a while.
SHARE = 0.05


class _Pace:
    """Says when it is time again for what is done now and then, and takes a while.

    Args:
        seconds: from one time to the next, at least.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.next = seconds, 0.0

    def is_due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self.next

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Take the time of what is done; it takes a `SHARE` of all of it at most."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.next = end + max(self.seconds, (end - start) / SHARE)


class SweepMonitor(tune.Callback, tune.Stopper):
    """Follows the trials as Tune reports them, and stops them all once the disk is full.

    Shows the methods and trials in a view that fits the terminal, or, if stdout is not a terminal,
    one line for each trial that ends and one for the sweep every `LINE_SECONDS`.

    Args:
        store: of the sweep.
        trials: all of them by name, those already over included. Kept up to date.
        console: where to say what happens.
    """

    def __init__(self, store: Store, trials: dict[str, Progress], console: Console) -> None:
        self.store, self.sweep = store, store.sweep
        self.trials = trials
        self.disk_full = False
        self.saved: dict[str, int] = {}
        self.ended: set[str] = set()
        self.said: set[str] = set()
        self.console = console
        self.live: Live | None = None
        self.interrupted = False
        self.started = time.monotonic()
        self.refresh, self.summary = _Pace(seconds=0.5), _Pace()
        self.unwritten = False
        self.next_line = self.started + LINE_SECONDS

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
        rows, seconds = list(self.trials.values()), time.monotonic() - self.started
        yield sweep_view(rows, self.sweep.name, console.height, seconds)

    def setup(self, *arguments: Any, **info: Any) -> None:
        """Take note of Ctrl-C, which Tune has just prepared to end its fit by."""
        tunes = signal.getsignal(signal.SIGINT)

        def interrupt(number: int, frame: Any) -> None:
            self.interrupted = True
            if callable(tunes):
                tunes(number, frame)

        if callable(tunes) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        for name in trial.config["trials"]:
            self.trials[name].state = "running"

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        has_saved = False
        for name in self._running(trial):
            row, report = self.trials[name], result["trials"][name]
            row.iteration = report["iteration"]
            row.score = Score(*report["score"])
            row.seconds_per_iteration = report["seconds_per_iteration"]
            for note in report["notes"]:
                self._say(note)
            if report["done"] and not result["disk_full"]:
                self.ended.add(name)
                self._end(row.trial)
            if report["saved"] > self.saved.get(name, 0):
                self.saved[name] = report["saved"]
                has_saved = True
        self.disk_full |= result["disk_full"]
        if has_saved:
            # Only failures without a new checkpoint in between add up.
            trial.run_metadata.num_failures = 0

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        for name in self._running(trial):
            self.trials[name].state = "pending"
            if not self._is_disk_full(trial):
                reason = self._reason(trial, name, whole=True)
                self._say(f"{name} is started again after {reason}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        for name in self._running(trial):
            if not self._is_disk_full(trial):
                self._fail(trial, name)

    def _fail(self, trial: Any, name: str) -> None:
        folder, error = self.sweep.trial(name), _error(trial)
        if error is not None and not isinstance(error, RayTaskError):
            # The process was lost, and could not write down why.
            text = "".join(traceback.format_exception(error))
            write_text(folder.error, f"{text}\n{self.sweep.log.name} may say more.\n")
        row, notes = self.trials[name], list[str]()
        following = Following(row.trial, folder.path, notes)
        following.call("on_trial_end", row.iteration, "failed")
        folder.write_status(state="failed", reason=self._reason(trial, name), notes=notes)
        self.store.push(folder.status, *([folder.error] if folder.error.is_file() else []))
        self._end(self.trials[name].trial)

    def _running(self, trial: Any) -> list[str]:
        """The trials that one of Tune's runs, without those that have ended."""
        return [name for name in trial.config["trials"] if name not in self.ended]

    def __call__(self, trial_id: str, result: dict) -> bool:
        """Whether a trial is to end with this result; none is."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials are to end."""
        return self.disk_full

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if self.unwritten:
            self._summarize()
        if self.live is not None and self.refresh.is_due():
            with self.refresh.kept():
                self.live.refresh()
        if self.live is None and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + LINE_SECONDS
            line = progress_line(list(self.trials.values()), time.monotonic() - self.started)
            self.console.print(line, soft_wrap=True, highlight=False)

    def __reduce__(self) -> tuple:
        # Tune pickles its callbacks into a file that nothing reads; a console cannot be.
        return tune.Callback, ()

    def _is_disk_full(self, trial: Any) -> bool:
        error = _error(trial)
        self.disk_full |= error is not None and is_disk_full(error)
        return self.disk_full

    def _reason(self, trial: Any, name: str, whole: bool = False) -> str:
        """Why the process of a trial ended, in one line; `whole`: with whole paths of files."""
        place = f"{self.store}/{name}/" if whole else ""
        for other in self._running(trial):  # one of the pack writes down where it hung
            hang = self.sweep.trial(other).hang
            if hang.is_file() and hang.stat().st_size:
                timeout = self.trials[other].trial.config.iteration_timeout
                where = place if other == name else f"{self.store}/{other}/"
                return (
                    f"an iteration of more than {timeout:g} s "
                    f"({where}{hang.name} says where it hung)"
                )
        error = _error(trial)
        if error is None:
            return f"an error that {self.store}/{self.sweep.log.name} holds"
        file = self.sweep.trial(name).error
        # Raised by the trial, which then wrote it down; or its process was lost.
        said = isinstance(error, RayTaskError) and file.is_file()
        return f"{first_line(error)}{f' ({place}{file.name} says where)' if said else ''}"

    def admit(self, trial: Trial) -> None:
        """Show a trial as one that waits."""
        self.ended.discard(trial.name)
        self.trials[trial.name].state = "pending"

    def decide(self, trial: Trial, state: str, reason: str) -> None:
        """Take note of a trial that is not trained further."""
        folder = self.sweep.trial(trial.name)
        status = folder.read_status()
        if (status.get("state"), status.get("reason")) != (state, reason):
            notes = [*status.get("notes", [])]
            if state == "stopped":
                iteration = read_progress(self.sweep, trial).iteration
                Following(trial, folder.path, notes).call("on_trial_end", iteration, state)
            folder.write_status(**{**status, "state": state, "reason": reason, "notes": notes})
            self.store.push(folder.status)
            self._say(f"{trial.name} {state}: {reason}")
        self.trials[trial.name] = read_progress(self.sweep, trial)

    def _end(self, trial: Trial) -> None:
        folder = self.sweep.trial(trial.name)
        self.store.pull(folder.metrics, folder.status)
        if folder.read_status().get("state") == "failed":
            self.store.pull(folder.error)
        row = self.trials[trial.name] = read_progress(self.sweep, trial)
        self._summarize()
        if row.is_over and (self.live is None or row.state == "failed"):
            over = sum(row.is_over for row in self.trials.values())
            line = f"[{over}/{len(self.trials)}] {trial.name} {row.state}"
            final = number(row.score.final)
            detail = f"{MEASURE_NAMES[row.score.measure]} {final}" if final else ""
            if row.state == "failed":
                detail = f"{row.reason}; see {self.store}/{row.details}"
            self._say(f"{line} at iteration {row.iteration}" + (f", {detail}" if detail else ""))

    def _summarize(self) -> None:
        """Write the summary, if it is time: killed later, a sweep has that of what ended before."""
        self.unwritten = not self.summary.is_due()
        if not self.unwritten:
            with self.summary.kept():
                write_summary(self.sweep, self.trials.values())

    def _say(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            print(line)  # into the log
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def _error(trial: Any) -> BaseException | None:
    # Tune's own `get_pickled_error` looks where the file will be once the sweep is over.
    if trial.pickled_error_file is None:
        return None
    return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())


class _LogFile(io.FileIO):
    """A log that drops what a full disk cannot hold: logging must not end a sweep."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


@contextlib.contextmanager
def _shown(log: Path, descriptor: int) -> Iterator[None]:
    """Write what is appended to a log to a file descriptor as well."""
    over = threading.Event()
    with log.open("rb") as file:
        file.seek(0, io.SEEK_END)

        def follow() -> None:
            ended = False
            while not ended:
                ended = over.wait(0.2)
                os.write(descriptor, file.read())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Send all that this process and its libraries print to a log file.

    Ray also writes from C++, so the file descriptors themselves are redirected. Yields a console on
    the original stdout. With `sgrl --verbose` all that goes into the log is shown on stderr too.
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
            with (
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
                _shown(log, stderr) if is_verbose() else contextlib.nullcontext(),
            ):
                # Lines of the log would tear a view that is drawn again and again.
                yield Console(file=screen, force_terminal=False if is_verbose() else None)
        finally:
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
            if direct:
                screen.close()
