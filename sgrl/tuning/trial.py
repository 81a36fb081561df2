"""Trials: their folders, and the process that runs one.

The state of a trial is in `<sweep>/<trial>/`: `config.yaml`, `metrics.csv`, `checkpoints/`,
`status.json` and `provenance.json`. Whichever process was killed, a restarted trial continues from
its newest intact checkpoint and yields exactly the numbers of an uninterrupted one.
"""

import contextlib
import dataclasses
import errno
import faulthandler
import math
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock
from ray import tune
from ray.exceptions import RayActorError, RayError

from sgrl.files import read_json, sync
from sgrl.nn.registry import count_parameters
from sgrl.results.checkpoints import discard_after, newest_valid_checkpoint, write_checkpoint
from sgrl.results.folder import TrialFolder
from sgrl.results.locations import open_store
from sgrl.results.metrics import (
    EVALUATION_COLUMNS,
    Row,
    append_row,
    count_rows,
    read_metrics,
    score,
    truncate_metrics,
)
from sgrl.results.plan import Trial, TrialConfig
from sgrl.results.provenance import (
    describe,
    read_starts,
    record_start,
    what_rounds_otherwise,
)
from sgrl.results.rllib_metrics import metrics_row
from sgrl.results.status import seconds_per_iteration
from sgrl.results.storage import Store
from sgrl.tuning.evaluation import Evaluation
from sgrl.tuning.experiment.method import asks_for_gpus
from sgrl.tuning.experiment.resources import modules_of
from sgrl.tuning.experiment.sections import build_algorithm_config
from sgrl.tuning.population import with_values
from sgrl.tuning.tracking import Tracking
from sgrl.tuning.trial_callbacks import Following

LOCK_SECONDS = 60
REPORT_SECONDS = 1.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class TrialWork:
    """All that training does with a trial's folder: its rows, checkpoints, status and notes.

    Whatever trains is its `algorithm`, which has RLlib's `train`, `save_checkpoint`,
    `load_checkpoint` and `stop`. It is built in the first step, not in setup, so that every failure
    is one of a step, which Tune retries.
    """

    store: Store
    folder: TrialFolder
    evaluation: Evaluation
    following: Following | None = None
    algorithm: Any = None
    lock: FileLock | None = None
    tracking: Tracking | None = None
    hang: TextIO | None = None

    def begin(self, name: str, config: dict) -> None:
        """Take on a trial, by Tune's config of whatever runs it."""
        self.sweep, self.name = config["sweep"], name
        self.tracker, self.wandb_mode = config["tracker"], config["wandb_mode"]
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.until = config.get("until", math.inf)
        self.last_iteration = 0.0
        self.saved = 0
        self.failure: list | None = None
        self.parameters: int | None = None
        self.following = None

    @property
    def report(self) -> dict[str, Any]:
        """What the sweep's process is told of the trial."""
        return {
            "iteration": len(self.rows),
            "saved": self.saved,
            "score": score(self.rows),
            "seconds_per_iteration": seconds_per_iteration(self.rows),
            "notes": self.notes,
            "done": self.algorithm is None,
        }

    def _start(self) -> None:
        self.store = open_store(self.sweep, "trials")
        self.folder = self.store.sweep.trial(self.name)
        self._acquire()
        self.store.claim(self.name)
        self.trial = Trial.from_dict(self.folder.read_config())
        origins = read_json(self.folder.origins) or []
        if origins:
            config = with_values(self.trial.config, origins[-1]["values"])
            self.trial = dataclasses.replace(self.trial, config=config)
        self.following = Following(self.trial, self.folder.path, self.notes)
        config = self.trial.config
        self.last_iteration = min(self.until, config.stop.training_iteration)
        status = self.folder.read_status()
        self.failure, self.parameters = status.get("failure"), status.get("parameters")
        self.folder.hang.unlink(missing_ok=True)
        if config.iteration_timeout is not None:
            self.hang = self.folder.hang.open("w")
        self.evaluation = Evaluation(config)
        torch.set_num_threads(config.num_threads)
        self.algorithm = self._build(config)

        metrics, checkpoints = self.folder.metrics, self.folder.checkpoints
        checkpoint, problems = newest_valid_checkpoint(checkpoints, at_most=count_rows(metrics))
        if checkpoint is None and newest_valid_checkpoint(checkpoints)[0] is not None:
            raise ValueError(
                f"{metrics} lacks the rows that led to the checkpoints beside it: restore it, or "
                "remove the checkpoints to start the trial again"
            )
        self.saved = int(checkpoint.name) if checkpoint else 0
        if origins and self.saved < origins[-1]["iteration"]:
            raise ValueError(
                f"{checkpoints} lacks what it took over at iteration {origins[-1]['iteration']}: "
                "restore it, or start another sweep"
            )
        if checkpoint:
            self.algorithm.load_checkpoint(str(checkpoint))
        truncate_metrics(metrics, self.saved)
        discard_after(checkpoints, self.saved)
        self.rows = read_metrics(metrics)
        self.notes += [f"{problem}; going on from iteration {self.saved}" for problem in problems]
        self.notes += [
            f"after iteration {origin['iteration']} with the weights of {origin['trial']}, "
            + ", ".join(f"{key} {value:g}" for key, value in origin["values"].items())
            for origin in origins
        ]
        self.tracking = Tracking(
            self.folder, self.trial.as_dict(), self.tracker, self.wandb_mode, self.notes
        )
        self.tracking.send(self.rows)
        self._note_rounding()
        record_start(self.folder.provenance, modules_of(config), iteration=self.saved)
        self._write_status("running")
        self.store.push_trial(self.name)

    def _note_rounding(self) -> None:
        """Say where a trial goes on that will not round as it did."""
        starts = read_starts(self.folder.provenance)
        if not (starts and self.saved):
            return
        config = self.trial.config
        on_gpus = asks_for_gpus(config.sections) is True
        compiled = config.model.get("backend") in ("native", "auto") and not on_gpus
        if changes := what_rounds_otherwise(starts[-1], describe(), compiled, on_gpus):
            self.notes.append(
                f"going on from iteration {self.saved} with {' and '.join(changes)}: no longer the "
                "same numbers to the last bit"
            )

    def _build(self, config: TrialConfig) -> Any:
        """What trains."""
        raise NotImplementedError(f"{type(self).__name__} must say what trains")

    def _iterate(self) -> None:
        """Train for an iteration, and write down what it measured."""
        config, iteration = self.trial.config, len(self.rows) + 1
        result, seconds = self._train_once()
        row = metrics_row(result, iteration, seconds)
        if config.evaluate is not None:
            row |= dict.fromkeys(EVALUATION_COLUMNS, math.nan)
            row |= self.evaluation.columns(self.algorithm, iteration)
        # The row comes before the checkpoint: a checkpoint never lacks a row, and rows that
        # no checkpoint followed are cut off on restart.
        append_row(self.folder.metrics, row)
        self.rows.append(row)
        self._follow("on_iteration", dict(row))
        if iteration % config.checkpoint.every == 0:
            self._checkpoint()

    def _send(self) -> None:
        assert self.tracking is not None
        self.tracking.send(self.rows)

    def _is_over(self) -> bool:
        return self._is_at_last_iteration() or bool(self.trial.config.stop.reached(self.rows))

    def _end_if_over(self) -> None:
        stop = self.trial.config.stop
        reached = stop.reached(self.rows)
        if reached or self._is_at_last_iteration():
            self._checkpoint()
            over = reached or self.last_iteration == stop.training_iteration
            self._finish("completed" if over else "pending", reached)

    def _is_at_last_iteration(self) -> bool:
        return len(self.rows) >= self.last_iteration

    def _train_once(self) -> tuple[dict, float]:
        """One iteration and its seconds; a process in which it takes too long is ended."""
        start = time.perf_counter()
        with self._watched():
            result = self.algorithm.train()
        return result, time.perf_counter() - start

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        timeout = self.trial.config.iteration_timeout
        if self.hang is None or timeout is None:
            yield
            return
        # The watchdog thread is written in C: it also ends a process that hangs outside Python.
        faulthandler.dump_traceback_later(timeout, file=self.hang, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _diverge(self, error: FloatingPointError) -> None:
        """End the trial, whose loss or gradient is no longer finite."""
        self._write_error(error)
        # Training again would only produce the same number.
        self._finish("failed", first_line(error), diverged=True)

    def _give_up(self, error: Exception) -> None:
        """End the trial with an error that came again."""
        reason = f"{first_line(error)} (again, after iteration {len(self.rows)}"
        self._finish("failed", f"{reason}; {self.folder.error.name} says where)")

    def _fails_again(self, error: Exception) -> bool:
        """Whether the error is the trial's own.

        It is where the same one came at the same iteration when the trial was last started. Errors
        of disks and of other processes are not.
        """
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, OSError | RayError) or is_disk_full(error):
            return False
        before, self.failure = self.failure, [len(self.rows), first_line(error)]
        self._write_status("running")
        return before == self.failure

    def _write_error(self, error: Exception) -> None:
        if self.lock is None:
            return  # the folder is not this process's
        with contextlib.suppress(OSError):
            text = "".join(traceback.format_exception(error))
            self.folder.error.write_text(text, encoding="utf-8")

    def _checkpoint(self) -> None:
        if self.saved == len(self.rows):
            return
        self.saved = len(self.rows)
        sync(self.folder.metrics)  # no checkpoint outlives the rows that led to it
        checkpoint = write_checkpoint(
            self.folder.checkpoints,
            self.saved,
            self._save,
            keep=self.trial.config.checkpoint.keep,
        )
        self._follow("on_checkpoint", checkpoint)
        self.store.push_trial(self.name)

    def _save(self, directory: Path) -> None:
        self.algorithm.save_checkpoint(str(directory))
        if self.parameters is None:
            self.parameters = count_parameters(directory)
            self._write_status("running")

    def _finish(self, state: str, reason: str = "", **more: Any) -> None:
        self.failure = None
        if state != "pending":
            self._follow("on_trial_end", state)
        self._write_status(state, reason=reason, **more)
        self._release("interrupted" if state == "pending" else state)
        self.store.push_trial(self.name)
        self.store.leave(self.name)

    def _follow(self, callback: str, *arguments: Any) -> None:
        if self.following is not None:
            self.following.call(callback, len(self.rows), *arguments)

    def _write_status(self, state: str, **more: Any) -> None:
        if self.failure is not None:
            more = {"failure": self.failure} | more
        if self.parameters is not None:
            more = {"parameters": self.parameters} | more
        self.folder.write_status(state=state, notes=self.notes, **more)

    def _acquire(self) -> None:
        """Hold the trial's folder.

        A process that a killed sweep left behind may still write to it for the seconds it takes Ray
        to end it.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        lock = self.folder.lock(LOCK_SECONDS)
        try:
            lock.acquire()
        except TimeoutError:
            raise TimeoutError(f"{self.folder.path} is in use by another process") from None
        self.lock = lock

    def _release(self, state: str = "interrupted") -> None:
        algorithm, self.algorithm = self.algorithm, None
        lock, self.lock = self.lock, None
        tracking, self.tracking = self.tracking, None
        hang, self.hang = self.hang, None
        try:
            if tracking is not None:
                tracking.send(self.rows)
                tracking.close(state)
            if algorithm is not None:
                algorithm.stop()
        finally:
            if hang is not None:
                hang.close()
                self.folder.hang.unlink(missing_ok=True)
            if lock is not None:
                lock.release()


class TrialRunner(TrialWork, tune.Trainable):
    """Runs any RLlib Algorithm as the only one of `config["trials"]` of `config["sweep"]`.

    Up to the iteration `config["until"]`, or the trial's last one: others decide on the rest.

    The process is reused for one trial after the other.
    """

    def setup(self, config: dict) -> None:
        [name] = config["trials"]
        self.begin(name, config)

    def reset_config(self, new_config: dict) -> bool:
        self._release()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._release()

    def step(self) -> dict:
        """Train for about a second, or to the trial's end, and report its progress.

        Re-raises errors that may be transient: Tune then restarts the trial.
        """
        disk_full = False
        try:
            try:
                if self.algorithm is None:
                    self._start()
                self._train()
            except FloatingPointError as error:
                self._diverge(error)
            except Exception as error:
                self._write_error(error)
                if not self._fails_again(error):
                    raise
                self._give_up(error)
        except BaseException as error:
            self._release()
            disk_full = is_disk_full(error)
            if not disk_full:
                raise
        done = self.algorithm is None
        return {"trials": {self.name: self.report}, "disk_full": disk_full, "done": done}

    def _build(self, config: TrialConfig) -> Any:
        settings = build_algorithm_config(config)
        # Algorithm.__init__ without storage would leave a folder in ~/ray_results.
        return settings.algo_class(config=settings, storage=self._storage)

    def _train(self) -> None:
        deadline = time.monotonic() + REPORT_SECONDS
        while not self._is_over():
            self._iterate()
            if time.monotonic() >= deadline:
                break
        self._send()
        self._end_if_over()


def first_line(error: BaseException) -> str:
    """What an exception says in one line; Ray wraps those of other processes in a traceback."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or ["no message"]
    if isinstance(cause, RayActorError) and "creation task" in lines[0]:
        return lines[-1]  # what its constructor raised
    return f"{type(cause).__name__}: {lines[0]}"


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception comes from a full disk or an exhausted quota.

    However it is wrapped: libraries and other processes hand on the text alone.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno in DISK_FULL:
            return True
        if any(os.strerror(code) in str(link) for code in DISK_FULL):
            return True
        link = getattr(link, "cause", None) or link.__cause__ or link.__context__
    return False
