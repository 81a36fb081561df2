"""Sweeps: the trials of an experiment run by Ray Tune, killed and resumed without a trace.

    directory = run_sweep(load_experiment("tune_configs/quickstart.yaml"), "results")
    resume_sweep(directory)

Tune only decides which trial runs where. What a trial has reached stands in its own folder,
`<directory>/<trial>/`, and nowhere else: `config.yaml`, `metrics.csv`, `checkpoints/` and
`status.json`. Whatever was killed, a trial that is started again continues from its newest whole
checkpoint with exactly the numbers of an uninterrupted one.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import ray
import torch
import yaml
from ray import tune
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from sgrl.nn.policies import save_policy
from sgrl.tuning.checkpoints import (
    CheckpointError,
    discard_after,
    newest_valid_checkpoint,
    verify,
    write_checkpoint,
)
from sgrl.tuning.experiment import (
    Experiment,
    Trial,
    algorithm_class,
    build_algorithm_config,
    check_resources,
    load_experiment,
)
from sgrl.tuning.metrics import (
    Row,
    append_row,
    area_under_curve,
    count_rows,
    final_success_rate,
    flush_metrics,
    metrics_row,
    read_metrics,
    truncate_metrics,
)

EXPERIMENT_FILE = "experiment.yaml"
LOG_FILE = "sweep.log"
LOCK_SECONDS = 60
REPORT_SECONDS = 1.0

# Set unless the user has: Ray and Tune say less, write less and leave our working directory alone.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class SweepError(Exception):
    """A sweep cannot start or go on; the message is one line that says what to do."""


# One trial, in a process of its own --------------------------------------------------------


class TrialRunner(tune.Trainable):
    """Runs any RLlib Algorithm as the trial `config["trial"]` of the sweep in `config["sweep"]`.

    The process is reused for one trial after the other. The algorithm is built in the first step,
    not in setup, so that every failure is one of a step, which Tune retries.
    """

    algorithm: Any = None
    lock: TextIO | None = None

    def setup(self, config: dict) -> None:
        self.directory = Path(config["sweep"]) / config["trial"]
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.last_iteration = 0

    def reset_config(self, new_config: dict) -> bool:
        self._release()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._release()

    def step(self) -> dict:
        """Train for about a second, or to the trial's end, and report where it stands."""
        try:
            if self.algorithm is None:
                self._start()
            self._train()
        except FloatingPointError as error:
            # Training again would only come to the same number.
            self._finish("failed", f"{error}", diverged=True)
        except BaseException:
            self._release()
            raise
        return {
            "iteration": len(self.rows),
            "success_rate": self.rows[-1]["success_rate"] if self.rows else math.nan,
            "seconds_per_iteration": seconds_per_iteration(self.rows),
            "notes": self.notes,
            "done": self.algorithm is None,
        }

    def _start(self) -> None:
        self._acquire()
        self.trial = read_yaml(self.directory / "config.yaml")
        self.last_iteration = self.trial["stop"]["training_iteration"]
        torch.set_num_threads(self.trial["num_threads"])
        config = build_algorithm_config(self.trial)
        # Algorithm.__init__ without storage would leave a folder in ~/ray_results.
        self.algorithm = config.algo_class(config=config, storage=self._storage)

        metrics, checkpoints = self.directory / "metrics.csv", self.directory / "checkpoints"
        checkpoint, problems = newest_valid_checkpoint(checkpoints, at_most=count_rows(metrics))
        self.saved = int(checkpoint.name) if checkpoint else 0
        if checkpoint:
            self.algorithm.load_checkpoint(str(checkpoint))
        truncate_metrics(metrics, self.saved)
        discard_after(checkpoints, self.saved)
        self.rows = read_metrics(metrics)
        self.notes = [f"{problem}; going on from iteration {self.saved}" for problem in problems]
        self._write_status("running")

    def _train(self) -> None:
        deadline = time.monotonic() + REPORT_SECONDS
        while len(self.rows) < self.last_iteration:
            iteration, start = len(self.rows) + 1, time.perf_counter()
            result = self.algorithm.train()
            row = metrics_row(result, iteration, time.perf_counter() - start)
            # The row comes before the checkpoint: a checkpoint never lacks a row, and rows that
            # no checkpoint followed are cut off on restart.
            append_row(self.directory / "metrics.csv", row)
            self.rows.append(row)
            if iteration % self.trial["checkpoint"]["every"] == 0:
                self._checkpoint()
            if time.monotonic() >= deadline:
                break
        if len(self.rows) >= self.last_iteration:
            self._checkpoint()
            self._finish("completed")

    def _checkpoint(self) -> None:
        if self.saved == len(self.rows):
            return
        self.saved = len(self.rows)
        flush_metrics(self.directory / "metrics.csv")
        write_checkpoint(
            self.directory / "checkpoints",
            self.saved,
            self._save,
            keep=self.trial["checkpoint"]["keep"],
        )

    def _save(self, directory: Path) -> None:
        self.algorithm.save_checkpoint(str(directory))
        policy = getattr(self.algorithm, "policy", None)
        if policy is None and self.algorithm.config.enable_rl_module_and_learner:
            policy = getattr(self.algorithm.get_module(), "policy", None)
        if policy is not None:
            section = self.trial["config"]["environment"]
            environment = {"env": section["env"], "env_config": section.get("env_config") or {}}
            save_policy(policy, directory, environment=environment, iteration=self.saved)

    def _finish(self, state: str, reason: str = "", **more: Any) -> None:
        self._write_status(state, reason=reason, **more)
        self._release()

    def _write_status(self, state: str, **more: Any) -> None:
        write_status(self.directory, {"state": state, "notes": self.notes, **more})

    def _acquire(self) -> None:
        """Hold the trial's folder. A process that a killed sweep left behind may still write to
        it for the seconds it takes Ray to end it."""
        self.lock = lock_file(self.directory / ".lock", LOCK_SECONDS)
        if self.lock is None:
            raise SweepError(f"{self.directory} is in use by another process")

    def _release(self) -> None:
        algorithm, self.algorithm = self.algorithm, None
        if algorithm is not None:
            algorithm.stop()
        if self.lock is not None:
            self.lock.close()
            self.lock = None


# The sweep ---------------------------------------------------------------------------------


def run_sweep(
    experiment: Experiment, results_dir: str | Path = "results", name: str | None = None
) -> Path:
    """Run every trial of `experiment` and return its folder, `results_dir/<name>`.

    A trial that fails does not stop the others; `failed_trials` lists them. Raises SweepError or
    ExperimentError, before Ray is started, where the folder is taken or a trial asks for more
    than there is, and KeyboardInterrupt once Ctrl-C has stopped the trials.
    """
    directory = Path(results_dir).absolute() / (name or experiment.name)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        how = f"`sgrl resume {display(directory)}` continues it, " if is_sweep(directory) else ""
        raise SweepError(
            f"{display(directory)} already exists: {how}--name NAME starts another sweep"
        )
    requests = _resource_requests(experiment)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / EXPERIMENT_FILE, yaml.safe_dump(experiment.resolved, sort_keys=False))
    return _run(directory, experiment, requests)


def resume_sweep(directory: str | Path) -> Path:
    """Continue a sweep that was killed, or whose trials failed, and return its folder.

    Completed trials are left alone, and so are those whose loss became NaN or infinite. Raises
    as `run_sweep` does, and SweepError where `directory` holds no sweep.
    """
    directory = Path(directory).absolute()
    experiment = _load(directory)
    return _run(directory, experiment, _resource_requests(experiment))


def failed_trials(directory: str | Path) -> list[str]:
    """The names of a sweep's trials that failed, in order."""
    directory = Path(directory).absolute()
    rows = [read_progress(directory, trial) for trial in _load(directory).trials]
    return [row.trial.name for row in rows if row.state == "failed"]


def is_sweep(directory: Path) -> bool:
    """Whether the folder holds a sweep's results."""
    return (directory / EXPERIMENT_FILE).is_file()


def _load(directory: Path) -> Experiment:
    if not is_sweep(directory):
        what = "holds no sweep" if directory.is_dir() else "does not exist"
        raise SweepError(f"{display(directory)} {what}: give a folder such as results/quickstart")
    return load_experiment(directory / EXPERIMENT_FILE)


def _run(directory: Path, experiment: Experiment, requests: dict[str, Any]) -> Path:
    lock = lock_file(directory / ".lock", seconds=2)
    if lock is None:
        raise SweepError(f"{display(directory)} is being run by another process")
    with lock, quiet(directory / LOG_FILE) as console:
        for trial in experiment.trials:
            folder = directory / trial.name
            folder.mkdir(exist_ok=True)
            config = {"name": trial.name, "swept": trial.swept, **trial.config}
            write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        view = SweepView(directory, [read_progress(directory, t) for t in experiment.trials])
        todo = [row.trial for row in view.rows if not _is_over(directory, row)]
        if todo:
            with view.shown_on(console):
                _run_trials(directory, experiment, todo, requests, view)
        write_summary(directory, view.rows)
        unfinished = [row.trial.name for row in view.rows if not row.is_over]
        if unfinished:
            raise KeyboardInterrupt
    return directory


def _run_trials(
    directory: Path,
    experiment: Experiment,
    trials: Sequence[Trial],
    requests: dict[str, Any],
    view: "SweepView",
) -> None:
    started_ray = not ray.is_initialized()
    _start_ray()
    # Tune keeps notes of its own, which nothing reads.
    scratch = directory / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    # As many trials wait beside the running ones as can run: enough to hand over every process.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, int(ray.cluster_resources()["CPU"])))
    limit = experiment.concurrency
    try:
        tune.Tuner(
            tune.with_resources(TrialRunner, lambda config: requests[config["trial"]]),
            param_space={
                "sweep": str(directory),
                "trial": tune.grid_search([trial.name for trial in trials]),
            },
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=limit if isinstance(limit, int) else None,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(scratch),
                failure_config=tune.FailureConfig(max_failures=experiment.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[view],
                verbose=0,
            ),
        ).fit()
    finally:
        if started_ray:
            ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _start_ray() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": count_cpus()}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)


def _resource_requests(experiment: Experiment) -> dict[str, Any]:
    """Each trial's placement group by its name; refuses trials that could never start."""
    if os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        _start_ray()
    present = ray.cluster_resources() if ray.is_initialized() else machine_resources()
    check_resources(experiment, present)
    return {
        trial.name: algorithm_class(trial.config["algorithm"]).default_resource_request(
            build_algorithm_config(trial.config)
        )
        for trial in experiment.trials
    }


def machine_resources() -> dict[str, float]:
    """The CPUs that this process may use and the GPUs that torch sees."""
    return {"CPU": count_cpus(), "GPU": torch.cuda.device_count()}


def count_cpus() -> int:
    """CPUs of this process: its affinity, and in a container its quota."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


# Where each trial stands -------------------------------------------------------------------


@dataclass
class Progress:
    """Where one trial stands. `state` is pending, running, completed or failed."""

    trial: Trial
    state: str = "pending"
    iteration: int = 0
    success_rate: float = math.nan
    seconds_per_iteration: float = math.nan
    reason: str = ""

    @property
    def last_iteration(self) -> int:
        return self.trial.config["stop"]["training_iteration"]

    @property
    def seconds_left(self) -> float:
        return (self.last_iteration - self.iteration) * self.seconds_per_iteration

    @property
    def is_over(self) -> bool:
        return self.state in ("completed", "failed")


def read_progress(directory: Path, trial: Trial) -> Progress:
    """What a trial's own folder says. A trial that is not over counts as pending."""
    status = read_status(directory / trial.name)
    rows = read_metrics(directory / trial.name / "metrics.csv")
    state = status.get("state", "pending")
    return Progress(
        trial=trial,
        state=state if state in ("completed", "failed") else "pending",
        iteration=len(rows),
        success_rate=rows[-1]["success_rate"] if rows else math.nan,
        seconds_per_iteration=seconds_per_iteration(rows),
        reason=status.get("reason", ""),
    )


def _is_over(directory: Path, progress: Progress) -> bool:
    """Whether a resumed sweep leaves the trial alone: its loss diverged, or it is completed and
    its last checkpoint is whole."""
    folder = directory / progress.trial.name
    if progress.state == "failed":
        return read_status(folder).get("diverged", False)
    if progress.state != "completed" or progress.iteration != progress.last_iteration:
        return False
    try:
        verify(folder / "checkpoints" / f"{progress.last_iteration:06d}")
    except CheckpointError:
        return False
    return True


def seconds_per_iteration(rows: Sequence[Row]) -> float:
    """Mean over the last 20 iterations; the first of a process, which warms up, weighs little."""
    seconds = sorted(row["iteration_seconds"] for row in rows[-20:])
    return seconds[len(seconds) // 2] if seconds else math.nan


def read_status(folder: Path) -> dict:
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_status(folder: Path, status: dict) -> None:
    write_text(folder / "status.json", json.dumps(status, indent=1) + "\n")


def write_summary(directory: Path, progress: Sequence[Progress]) -> None:
    """Write summary.csv: one row a trial."""
    table = []
    for row in progress:
        rows = read_metrics(directory / row.trial.name / "metrics.csv")
        table.append(
            {
                "trial": row.trial.name,
                "method": row.trial.method,
                **row.trial.swept,
                "seed": row.trial.seed,
                "state": row.state,
                "iterations": len(rows),
                "final_success_rate": final_success_rate(rows),
                "auc": area_under_curve(rows),
                "reason": row.reason,
            }
        )
    last = ["seed", "state", "iterations", "final_success_rate", "auc", "reason"]
    frame = pd.DataFrame(table)
    frame = frame[[*frame.columns.drop(last), *last]]
    write_text(directory / "summary.csv", frame.to_csv(index=False))


def status_table(directory: str | Path) -> Table:
    """A sweep's trials, one row each, from their folders alone. Raises SweepError."""
    directory = Path(directory).absolute()
    experiment = _load(directory)
    lock = lock_file(directory / ".lock", seconds=0)
    rows = [read_progress(directory, trial) for trial in experiment.trials]
    for row in rows:
        if read_status(directory / row.trial.name).get("state") == "running":
            row.state = "running" if lock is None else "interrupted"
    if lock is not None:
        lock.close()
    return trials_table(rows, directory.name)


# What the terminal shows -------------------------------------------------------------------


class SweepView(tune.Callback):
    """Follows the trials as Tune reports them: a table that fits the terminal, or, where stdout
    is none, one line for every trial that ends."""

    def __init__(self, directory: Path, rows: list[Progress]) -> None:
        self.directory = directory
        self.rows = rows
        self.by_name = {row.trial.name: row for row in rows}
        self.noted: set[str] = set()
        self.console = Console()
        self.live: Live | None = None
        self.next_refresh = 0.0

    @contextlib.contextmanager
    def shown_on(self, console: Console) -> Iterator[None]:
        """Show the trials on `console` while they run."""
        self.console = console
        over = sum(row.is_over for row in self.rows)
        already = f", {over} of them over already" if over else ""
        console.print(
            f"{len(self.rows)} trials{already}; results in {display(self.directory)}",
            soft_wrap=True,
            highlight=False,
        )
        if not console.is_terminal:
            yield
            return
        with Live(console=console, auto_refresh=False, redirect_stdout=False) as self.live:
            self.live.update(self, refresh=True)
            yield
            self.live.update(self, refresh=True)

    def __rich_console__(self, console: Console, options: Any) -> Iterator[RenderableType]:
        # Two lines of caption and four of table frame stay free, or Live cuts the table.
        yield trials_table(self.rows, self.directory.name, max(3, console.height - 7))

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._row(trial).state = "running"

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        row = self._row(trial)
        row.iteration = result["iteration"]
        row.success_rate = result["success_rate"]
        row.seconds_per_iteration = result["seconds_per_iteration"]
        for note in result["notes"]:
            self._say(note)
        if result["done"]:
            status = read_status(self.directory / row.trial.name)
            self._end(row, status["state"], status.get("reason", ""))

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self._row(trial)
        row.state = "pending"
        self._say(f"{row.trial.name} is started again: {reason(trial)}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        row = self._row(trial)
        why = reason(trial)
        write_status(self.directory / row.trial.name, {"state": "failed", "reason": why})
        self._end(row, "failed", why)

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if self.live is not None and time.monotonic() >= self.next_refresh:
            self.live.refresh()
            self.next_refresh = time.monotonic() + 0.5

    def __reduce__(self) -> tuple:
        # Tune pickles its callbacks into a file that nothing reads; a console cannot be.
        return tune.Callback, ()

    def _row(self, trial: Any) -> Progress:
        return self.by_name[trial.config["trial"]]

    def _end(self, row: Progress, state: str, reason: str) -> None:
        row.state, row.reason = state, reason
        # A sweep that is killed later still has its table of what ended before.
        write_summary(self.directory, self.rows)
        over = sum(row.is_over for row in self.rows)
        line = f"[{over}/{len(self.rows)}] {row.trial.name} {state} at iteration {row.iteration}"
        line += f": {reason}" if reason else f", success rate {number(row.success_rate)}"
        if self.live is None or state == "failed":
            self._print(line)

    def _say(self, note: str) -> None:
        if note not in self.noted:
            self.noted.add(note)
            self._print(note)

    def _print(self, line: str) -> None:
        print(line)  # into the log
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def trials_table(rows: Sequence[Progress], title: str, limit: int | None = None) -> Table:
    """Method, swept values, seed, iteration, success rate and time left of each trial.

    With a `limit`, running trials come first, then failed ones, then those that ended last.
    """
    order = ["running", "failed", "interrupted", "completed", "pending"]
    shown = list(rows)
    if limit is not None and len(shown) > limit:
        shown = sorted(shown, key=lambda row: order.index(row.state))[:limit]
    counts = [f"{sum(row.state == state for row in rows)} {state}" for state in order]
    caption = ", ".join(count for count in counts if not count.startswith("0 "))
    left = sweep_seconds_left(rows)
    if math.isfinite(left) and left > 0:
        caption += f"; about {duration(left)} left"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    swept = list(dict.fromkeys(name for row in rows for name in row.trial.swept))
    table.add_column("method", no_wrap=True, overflow="ellipsis")
    for name in [*swept, "seed", "iteration", "success rate", "time left"]:
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
            number(row.success_rate),
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
    return f"{value:.3f}" if math.isfinite(value) else ""


def reason(trial: Any) -> str:
    """The first line of the error that a Tune trial ended with."""
    error = trial.get_pickled_error() or trial.get_error()
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or ["no message"]
    return f"{type(cause).__name__}: {lines[0]}"


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
    with log.open("a", buffering=1) as file:
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


# Files -------------------------------------------------------------------------------------


def lock_file(path: Path, seconds: float) -> TextIO | None:
    """Lock `path` for this process, waiting up to `seconds`; None where another one keeps it.

    The lock ends with the file's closing or the process's death, however it dies.
    """
    file = path.open("w")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                return None
            time.sleep(0.1)
        else:
            return file


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def display(path: Path) -> Path:
    """A path as a user would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
