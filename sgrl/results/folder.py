"""Where everything lies in a results folder: the one place that spells the names of its files.

    SWEEP/                      experiment.yaml, provenance.json, summary.csv, sweep.log, ...
    SWEEP/TRIAL/                config.yaml, metrics.csv, status.json, provenance.json, ...
    SWEEP/TRIAL/checkpoints/    000025/, 000050/, ...

The state of a trial is in its own folder and nowhere else. Rows are read and written by
`sgrl.results.metrics`, checkpoints by `sgrl.results.checkpoints`, starts by
`sgrl.results.provenance`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sgrl import files
from sgrl.results.checkpoints import checkpoint_name

if TYPE_CHECKING:
    from filelock import FileLock

#: The same YAML, read in C, where libyaml is there: several times faster.
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PROVENANCE_FILE = "provenance.json"
LOCK_FILE = ".lock"
EVENT_FILES = "events.out.tfevents.*"
#: Of trials, in the order in which a table that is cut shows them.
STATES = ("running", "failed", "interrupted", "completed", "stopped", "pending", "skipped")
#: Of trials that are not trained any further.
OVER = ("completed", "failed", "stopped", "skipped")
#: What makes a folder an archive.
ARCHIVED_TRIALS_FILE = "trials.json"


class TrialFolder:
    """The files of one trial; none of them need be there.

    Attributes:
        path: the folder.
        name: of the trial.
        config: what it is trained with, YAML.
        metrics: its rows, CSV.
        status: its state, JSON; see `read_status`.
        provenance: what each of its starts ran on, JSON.
        tracking: what trackers noted of it, JSON.
        origins: which trials' weights it took over, and with what values, JSON.
        error: the whole traceback of its last error.
        hang: the stack of each thread of its process when an iteration took too long.
        token: of the process that may write to it, where results lie in object storage.
        checkpoints: folder of its checkpoints.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.status = self.path / "status.json"
        self.provenance = self.path / PROVENANCE_FILE
        self.tracking = self.path / "tracking.json"
        self.origins = self.path / "origins.json"
        self.error = self.path / "error.txt"
        self.hang = self.path / "hung.txt"
        self.token = self.path / "token"
        self.checkpoints = self.path / "checkpoints"

    @property
    def reports(self) -> list[Path]:
        """What the trial has reached, but for its checkpoints."""
        results = [self.metrics, self.status, self.tracking, self.error, self.provenance]
        return [self.config, *results, self.origins]

    @property
    def events(self) -> list[Path]:
        """TensorBoard's files, as far as they are there."""
        return sorted(self.path.glob(EVENT_FILES))

    def new_events(self, stamp: int) -> Path:
        """The file that TensorBoard reads after those with a smaller stamp."""
        return self.path / EVENT_FILES.replace("*", f"{stamp}.sgrl")

    def checkpoint(self, iteration: int) -> Path:
        """The folder of one checkpoint."""
        return self.checkpoints / checkpoint_name(iteration)

    def lock(self, seconds: float) -> FileLock:
        """What the process holds that runs the trial; see `sgrl.files.lock`."""
        return files.lock(self.path / LOCK_FILE, seconds)

    def read_config(self) -> dict[str, Any]:
        """The trial's configuration. Raises OSError, ValueError and yaml.YAMLError."""
        return yaml.load(self.config.read_text(encoding="utf-8"), Loader=YAML)

    def read_status(self) -> dict[str, Any]:
        """Read the trial's state file; empty before its first start.

        It holds the state (running, completed, failed, stopped or skipped), the reason of the
        latter three, whether it
        diverged, notes on damaged checkpoints, the number of trainable parameters without the
        predictors' (from the first checkpoint on), and the iteration and text of an error that
        would be the trial's own if it happened again.
        """
        status = files.read_json(self.status)
        return status if isinstance(status, dict) else {}

    def write_status(self, **status: Any) -> None:
        """Replace the trial's state."""
        files.write_json(self.status, status)


class SweepFolder:
    """The files of a sweep, of an archive of one, and what is made of them.

    Attributes:
        path: the folder.
        name: of the sweep.
        experiment: what was asked for, with every default written out, YAML.
        provenance: what each of its starts ran on, JSON.
        summary: one row a trial, CSV.
        rounds: how far a sweep has got whose results decide on what is trained, JSON.
        log: what the driver and its libraries printed.
        scratch: folder of Tune's own notes, while the sweep runs.
        mlflow_database, mlflow_artifacts: where MLflow keeps runs unless told otherwise.
        comparison, pairs: one row a method, and a pair of methods, CSV.
        figures: folder of its figures.
        archived_trials, archived_metrics: of an archive, see `sgrl.results.archive`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self.experiment = self.path / "experiment.yaml"
        self.provenance = self.path / PROVENANCE_FILE
        self.summary = self.path / "summary.csv"
        self.rounds = self.path / "rounds.json"
        self.log = self.path / "sweep.log"
        self.scratch = self.path / ".tune"
        self.mlflow_database = self.path / "mlflow.db"
        self.mlflow_artifacts = self.path / "mlflow"
        self.comparison = self.path / "comparison.csv"
        self.pairs = self.path / "pairs.csv"
        self.figures = self.path / "figures"
        self.archived_trials = self.path / ARCHIVED_TRIALS_FILE
        self.archived_metrics = self.path / "metrics.parquet"

    def trial(self, name: str) -> TrialFolder:
        """The folder of a trial, there or not."""
        return TrialFolder(self.path / name)

    def trials(self) -> list[TrialFolder]:
        """Folders with a trial's configuration, by name."""
        configs = self.path.glob(str(TrialFolder("*").config))
        return [TrialFolder(path.parent) for path in sorted(configs)]

    def problems(self, planned: Iterable[str]) -> list[str]:
        """List missing and unplanned trials.

        Returns:
            One line for each planned trial whose folder or configuration is missing, and for each
            folder of a trial that is not planned, which is ignored.
        """
        folders = {name: self.trial(name) for name in sorted(planned)}
        problems = []
        for folder in folders.values():
            if not folder.path.is_dir():
                problems.append(f"{folder.name}: its folder is missing")
            elif not folder.config.is_file():
                problems.append(f"{folder.name}: its {folder.config.name} is missing")
        either = (TrialFolder("*").config, TrialFolder("*").metrics)
        found = {path.parent.name for mark in either for path in self.path.glob(str(mark))}
        foreign = f"not one of the trials of {self.experiment.name}; not counted"
        problems += [f"{name}: {foreign}" for name in sorted(found - folders.keys())]
        return problems

    def lock(self, seconds: float) -> FileLock:
        """What the process holds that runs the sweep; see `sgrl.files.lock`."""
        return files.lock(self.path / LOCK_FILE, seconds)

    def is_running(self) -> bool:
        """Whether a sweep on this machine holds the folder's lock."""
        return files.is_locked(self.path / LOCK_FILE)

    def read_experiment(self) -> dict[str, Any]:
        """Return the resolved experiment; empty if there is none."""
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            experiment = yaml.load(self.experiment.read_text(encoding="utf-8"), Loader=YAML)
            return experiment if isinstance(experiment, dict) else {}
        return {}


class ExpertNetworkFolder:
    """The files of a simulation of the expert network.

    Attributes:
        path: the folder.
        results: one row a cell, CSV.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.results = self.path / "expert_network.csv"

    def figure(self, case: str) -> Path:
        """The figure of one case."""
        return self.path / f"ratio_{case}.png"


class ProbeFolder:
    """The files of a probe.

    Attributes:
        path: the folder.
        neurons, layers: one row a neuron, and one a layer, at each time step, CSV.
        figure: of both.
        bounds: what predictions could save, CSV.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.neurons = self.path / "neurons.csv"
        self.layers = self.path / "layers.csv"
        self.figure = self.path / "probe.png"
        self.bounds = self.path / "bounds.csv"
