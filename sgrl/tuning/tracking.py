"""Where a trial's rows go besides metrics.csv: TensorBoard's files, and what `--track` names.

Every trial keeps an event file beside its metrics.csv, so that `tensorboard --logdir results` shows
all curves. W&B and MLflow are set up by Ray's integrations, in the trial's own process: it sees
every iteration, while Tune receives one report a second. A restarted trial continues its
run. `tracking.json` in its folder holds the run's id and how many iterations were sent;
those trained once more after a kill have the same numbers and are not sent again.

Tracking changes no number of a trial. A tracker that fails is abandoned with a note.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import math
import os
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import hparams

from sgrl.commands import command
from sgrl.envs.wrappers import preserved_random_state
from sgrl.errors import UserError
from sgrl.files import read_json, write_json
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.metrics import MEASURES, Row
from sgrl.results.storage import is_address

#: The column that all of them count as the step of a curve's point.
STEP = "env_steps"


class TrackingError(UserError):
    """A tracker cannot be used; the message is one line that says what to do."""


# ---------------------------------------------------------------- before the trials


def check_tracker(tracker: str, location: str = "") -> None:
    """Raise TrackingError unless the tracker's package is installed and, for W&B, a login known.

    Args:
        tracker: a name in `experiment.TRACKERS`.
        location: of the sweep, a folder or an address.
    """
    if tracker == "none":
        return
    if is_address(location):
        if tracker == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
            raise TrackingError(f"mlflow keeps no database in {location}: set MLFLOW_TRACKING_URI")
        if tracker == "wandb" and os.environ.get("WANDB_MODE") == "offline":
            raise TrackingError(f"wandb keeps no offline runs in {location}: unset WANDB_MODE")
    package = importlib.util.find_spec(tracker)
    # Without origin it is a mere folder of that name, such as wandb makes where it runs.
    if package is None or package.origin is None:
        raise TrackingError(f'{tracker} is not installed: pip install "sgrl[{tracker}]"')
    if tracker == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        try:
            with contextlib.redirect_stderr(io.StringIO()):
                known = wandb.login(prompt=False, verify=False)
        except Exception as error:
            raise TrackingError(f"wandb cannot be used: {_one_line(error)}") from None
        if not known:
            raise TrackingError(
                "no login for wandb: run `wandb login`, or set WANDB_MODE=offline to keep the "
                "runs in the results"
            )


def prepare_tracker(tracker: str, sweep: SweepFolder) -> None:
    """Make what the trials of a sweep share. Raises TrackingError."""
    if tracker != "mlflow":
        return
    mlflow = _import_mlflow()
    # Once, here: trials that make the tables of a new file together get in each other's way.
    try:
        client = mlflow.MlflowClient(mlflow_uri(sweep))
        if client.get_experiment_by_name(sweep.name) is None:
            local = "MLFLOW_TRACKING_URI" not in os.environ
            artifacts = sweep.mlflow_artifacts.as_uri() if local else None
            client.create_experiment(sweep.name, artifacts)
    except Exception as error:
        raise TrackingError(f"mlflow cannot be used: {_one_line(error)}") from None


def how_to_look(tracker: str, directory: str) -> str:
    """Return the command, or the place, that shows the runs of the sweep in `directory`."""
    if tracker == "tensorboard":
        return command("tensorboard", "--logdir", directory)
    if tracker == "wandb" and os.environ.get("WANDB_MODE") == "offline":
        return command("wandb", "sync", directory) + "/*/wandb/offline-run-*"
    if tracker == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        database = _sqlite(str(SweepFolder(directory).mlflow_database))
        show = command("mlflow", "ui", "--backend-store-uri", database)
        # What writes runs, mlflow-skinny, does not show them.
        whole = any(found.name == "mlflow" for found in importlib.metadata.distributions())
        return show if whole else f"{command('pip', 'install', 'mlflow')} && {show}"
    name = directory.rpartition("/")[2]
    return f"{tracker}, {'group' if tracker == 'wandb' else 'experiment'} {name}"


def mlflow_uri(sweep: SweepFolder) -> str:
    """MLFLOW_TRACKING_URI, or a file in the sweep's own folder."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given if given is not None else _sqlite(str(sweep.mlflow_database))


def _sqlite(path: str) -> str:
    """The address of a database in a file. Only newer versions of SQLAlchemy read escapes in it."""
    from sqlalchemy import make_url

    for written in (urllib.parse.quote(path), path):
        address = f"sqlite:///{written}"
        if make_url(address).database == path:
            return address
    raise TrackingError(f"mlflow keeps no database in {path}: set MLFLOW_TRACKING_URI")


def _import_mlflow() -> ModuleType:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    return mlflow


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------- in a trial's process


class Tracker(Protocol):
    """Follows one trial from its start or restart to its end.

    Attributes:
        sent: iterations that it has.
    """

    sent: int

    def send(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Take the rows after the first `sent` ones, and when each was written (Unix time)."""

    def close(self, state: str) -> None:
        """The trial is completed, failed or interrupted."""


class Tracking:
    """All that follows one trial.

    Args:
        folder: the trial's, in that of its sweep.
        trial: its config.yaml.
        tracker: a name in `experiment.TRACKERS`; the event file is written with any.
        wandb_mode: WANDB_MODE where the sweep was started.
        notes: takes one line for each tracker that failed.
    """

    def __init__(
        self,
        folder: TrialFolder,
        trial: dict,
        tracker: str,
        wandb_mode: str | None,
        notes: list[str],
    ) -> None:
        self.notes = notes
        self.trackers: dict[str, Tracker] = {}
        self._open("tensorboard", lambda: EventFile(folder, trial))
        if tracker == "wandb":
            self._open(tracker, lambda: WandbRun(folder, trial, wandb_mode))
        if tracker == "mlflow":
            self._open(tracker, lambda: MLflowRun(folder, trial))

    def send(self, rows: Sequence[Row]) -> None:
        """Send each tracker what it lacks of the trial's rows, all of them from the first on."""
        for name, tracker in list(self.trackers.items()):
            new = rows[tracker.sent :]
            if not new:
                continue
            # Rows carry no time, but how long they took.
            back = itertools.accumulate(
                (-row["iteration_seconds"] for row in reversed(new[1:])), initial=time.time()
            )
            times = list(back)[::-1]
            with self._given_up_if_it_fails(name), preserved_random_state():
                tracker.send(new, times)

    def close(self, state: str) -> None:
        """Close all trackers; the trial is in `state`: completed, failed or interrupted."""
        for name, tracker in list(self.trackers.items()):
            with self._given_up_if_it_fails(name), preserved_random_state():
                tracker.close(state)
        self.trackers = {}

    def _open(self, name: str, make: Callable[[], Tracker]) -> None:
        with self._given_up_if_it_fails(name), preserved_random_state():
            self.trackers[name] = make()

    @contextlib.contextmanager
    def _given_up_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.trackers.pop(name, None)
            self.notes.append(f"going on without {name}: {_one_line(error)}")


class EventFile:
    """TensorBoard's file, rewritten from metrics.csv at every start of the trial.

    So it holds each iteration once, whatever was killed.

    Ray's callback for TensorBoard would write what Tune hears of, into Tune's folder, and begin
    another file at every start.
    """

    def __init__(self, folder: TrialFolder, trial: dict) -> None:
        before = folder.events
        # TensorBoard reads the files of a folder in the order of their names.
        self.writer = RecordWriter(str(folder.new_events(time.time_ns())))
        self._write(file_version="brain.Event:2")
        # One that is looking on forgets what it read before.
        self._write(session_log=SessionLog(status=SessionLog.START))
        settings = {"method": trial["method"], "seed": trial["seed"], **trial["swept"]}
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
        experiment, start, self.end = hparams(plain, dict.fromkeys(MEASURES, 0.0))
        self._write(summary=experiment)
        self._write(summary=start)
        self.writer.flush()
        self.sent = 0
        # Emptied, not removed: a reader in the middle of one would never reach the next.
        for path in before:
            path.write_bytes(b"")

    def _write(self, wall_time: float | None = None, **event: Any) -> None:
        event["wall_time"] = time.time() if wall_time is None else wall_time
        self.writer.write(Event(**event).SerializeToString())

    def send(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Send rows, with the times (seconds since the epoch) at which they were written."""
        for row, wall_time in zip(rows, times, strict=True):
            values = [
                Summary.Value(tag=name, simple_value=value) for name, value in _numbers(row).items()
            ]
            self._write(wall_time, step=int(row[STEP]), summary=Summary(value=values))
        self.writer.flush()
        self.sent += len(rows)

    def close(self, state: str) -> None:
        """End the run in the trial's state: completed, failed or interrupted."""
        if state != "interrupted":
            self._write(summary=self.end)
        self.writer.close()


class WandbRun:
    """A run at Weights & Biases: group the sweep, name the trial, step the environment steps.

    W&B writes asynchronously, and a killed process loses what it has not written yet. So an
    iteration counts as sent only some seconds later; after a kill the last ones are sent again,
    with the same steps and numbers.
    """

    FLUSH_SECONDS = 1.0
    SAFE_SECONDS = 5.0

    def __init__(self, folder: TrialFolder, trial: dict, mode: str | None) -> None:
        if mode is not None:
            os.environ["WANDB_MODE"] = mode  # for Ray, which looks for a login
        if "wandb" not in sys.modules:
            # Of the process that started Ray: its service would hold on to the run of a killed one.
            os.environ.pop("WANDB_SERVICE", None)
        import wandb
        from ray.air.integrations.wandb import setup_wandb

        self.folder = folder
        known = _read_state(folder, "wandb")
        # Of its own even where a sweep of that name was tracked before.
        made_from = f"{folder.path.parent.name}/{folder.name}/{time.time_ns()}"
        self.id = known.get("id") or hashlib.sha256(made_from.encode()).hexdigest()[:16]
        self.sent = known.get("sent", 0)
        self.run = setup_wandb(
            trial,
            rank_zero_only=False,
            trial_id=self.id,
            trial_name=folder.name,
            group=folder.path.parent.name,
            project=os.environ.get("WANDB_PROJECT", "sgrl"),
            dir=str(folder.path),
            mode=mode,
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(
                console="off", silent=True, x_transaction_log_flush_interval=self.FLUSH_SECONDS
            ),
        )
        # When how many were sent, the latest that are safe first.
        self.history = [(0.0, self.sent)]
        self._remember(self.sent)

    def _remember(self, sent: int) -> None:
        _write_state(self.folder, "wandb", {"id": self.id, "sent": sent, "step": STEP})

    def send(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Send rows, with the times (seconds since the epoch) at which they were written."""
        for row in rows:
            self.run.log(_numbers(row), step=int(row[STEP]), commit=True)
        self.sent += len(rows)
        now = time.monotonic()
        self.history.append((now, self.sent))
        while len(self.history) > 1 and self.history[1][0] <= now - self.SAFE_SECONDS:
            del self.history[0]
            self._remember(self.history[0][1])

    def close(self, state: str) -> None:
        """End the run in the trial's state: completed, failed or interrupted."""
        self.run.finish(exit_code=0 if state == "completed" else 1)
        self._remember(self.sent)


class MLflowRun:
    """A run in MLflow: experiment the sweep, name the trial, step the environment steps."""

    STATES = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
    #: The most numbers that MLflow takes at once.
    BATCH = 1000

    def __init__(self, folder: TrialFolder, trial: dict) -> None:
        mlflow = _import_mlflow()
        from ray.air.integrations.mlflow import setup_mlflow

        # Ray's function keeps to a run that is active: not to one that an earlier trial of this
        # process gave up, but to the trial's own.
        mlflow.end_run("KILLED")
        uri = mlflow_uri(SweepFolder(folder.path.parent))
        known = _read_state(folder, "mlflow")
        if known:
            mlflow.set_tracking_uri(uri)
            mlflow.start_run(run_id=known["id"])
        self.mlflow = setup_mlflow(
            None if known else trial,
            tracking_uri=uri,
            experiment_name=folder.path.parent.name,
            run_name=folder.name,
            create_experiment_if_not_exists=True,
        )
        self.id = self.mlflow.active_run().info.run_id
        _write_state(folder, "mlflow", {"id": self.id, "step": STEP})
        self.client = self.mlflow.MlflowClient()
        history = self.client.get_metric_history(self.id, "iteration")
        self.sent = max((int(metric.value) for metric in history), default=0)

    def send(self, rows: Sequence[Row], times: Sequence[float]) -> None:
        """Send rows, with the times (seconds since the epoch) at which they were written."""
        step = max(1, self.BATCH // len(rows[0]))
        for start in range(0, len(rows), step):
            chunk = list(zip(rows, times, strict=True))[start : start + step]
            self.client.log_batch(
                self.id,
                [
                    self.mlflow.entities.Metric(name, value, round(1000 * when), int(row[STEP]))
                    for row, when in chunk
                    for name, value in _numbers(row).items()
                ],
            )
            self.sent += len(chunk)

    def close(self, state: str) -> None:
        """End the run in the trial's state: completed, failed or interrupted."""
        self.mlflow.end_run(self.STATES[state])


def _numbers(row: Row) -> Row:
    return {name: value for name, value in row.items() if not math.isnan(value)}


def _read_state(folder: TrialFolder, tracker: str) -> dict[str, Any]:
    """What a tracker noted of a trial; empty where nothing or nothing readable.

    Older versions counted iterations where now environment steps are counted: what they sent is
    left as it is, and the trial gets a run of its own.
    """
    state = (read_json(folder.tracking) or {}).get(tracker, {})
    return state if state.get("step") == STEP else {}


def _write_state(folder: TrialFolder, tracker: str, state: dict[str, Any]) -> None:
    write_json(folder.tracking, {**(read_json(folder.tracking) or {}), tracker: state})
