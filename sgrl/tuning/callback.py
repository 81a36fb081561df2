"""Results of a plain `Tuner`, as sweeps write them.

    tune.Tuner(
        "Reinforce",
        param_space={"env": "labyrinth_escape", "model_config": {"policy": "gru"}},
        tune_config=tune.TuneConfig(trial_dirname_creator=trial_name),
        run_config=tune.RunConfig(
            name="tuned", storage_path=Path("results").absolute(), callbacks=[ResultsCallback()]
        ),
    ).fit()

`sgrl status`, `report` and `compare` then read results/tuned while it grows, and as it is after
whatever has killed it.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from filelock import FileLock
from pyarrow import fs
from ray import tune
from ray.tune.experiment import Trial

from sgrl.files import write_text
from sgrl.nn.registry import count_parameters
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.metrics import append_row, count_rows, truncate_metrics
from sgrl.results.provenance import record_start
from sgrl.results.rllib_metrics import metrics_row
from sgrl.results.tune_folder import TuneTrial, describe_trials, name_trial, state_of
from sgrl.tuning.trial import first_line
from sgrl.yaml_files import dump_yaml


def trial_name(trial: Trial) -> str:
    """Name a trial's folder as a sweep does, as in gru_lr=0.001_seed=0.

    Args:
        trial: as `TuneConfig` hands it to its `trial_dirname_creator`.
    """
    return name_trial(_as_known(trial), trial.evaluated_params)


class ResultsCallback(tune.Callback):
    """Write config.yaml, metrics.csv and status.json into each trial's folder.

    One row an iteration, without gaps or duplicates: a trial that Tune restores from a checkpoint
    loses the rows after it first. For any trainable that is an RLlib algorithm, and storage that is
    a folder.
    """

    def __init__(self) -> None:
        self._lock: FileLock | None = None
        self._rows: dict[str, int] = {}
        self._parameters: dict[str, int] = {}
        self._described: dict[str, dict[str, Any]] = {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Describe the trial, and anew all others, of which more may be known now.

        Raises:
            ValueError: the storage is no folder.
        """
        if self._lock is None:
            self._open(trial)
        folder = _folder(trial)
        self._rows[trial.trial_id] = count_rows(folder.metrics)
        self._describe(trials)
        known = folder.read_status().get("parameters")
        if known is not None:
            self._parameters[trial.trial_id] = known
        self._write_status(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any
    ) -> None:
        """Append the iteration's row."""
        metrics, number = _folder(trial).metrics, result["training_iteration"]
        if number <= self._rows[trial.trial_id]:
            truncate_metrics(metrics, number - 1)
        row = metrics_row(result, number, result["time_this_iter_s"], check=False)
        append_row(metrics, row)
        self._rows[trial.trial_id] = number

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Any, **info: Any
    ) -> None:
        """Count the policy's parameters in the first checkpoint."""
        if trial.trial_id not in self._parameters:
            # The module may be none of ours.
            with contextlib.suppress(OSError, ValueError):
                self._parameters[trial.trial_id] = count_parameters(checkpoint.path)
                self._write_status(trial, "running")

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Say that the trial is over."""
        done = bool(trial.last_result.get("done"))
        self._write_status(trial, state_of(done, self._rows[trial.trial_id], _as_known(trial)))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Say why the trial failed."""
        error = trial.get_error()
        self._write_status(trial, "failed", reason=first_line(error) if error else "")

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Let others have the folder."""
        self._describe(trials)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps its callbacks for a restore, which begins anew.
        return dict(vars(ResultsCallback()))

    def _open(self, trial: Trial) -> None:
        storage = trial.storage
        assert storage is not None  # since the trial has started
        if not isinstance(storage.storage_filesystem, fs.LocalFileSystem):
            raise ValueError(
                f"ResultsCallback writes to a folder, and {storage.storage_fs_path} is in object "
                "storage: give RunConfig another storage_path, or leave the callback out"
            )
        sweep = SweepFolder(storage.experiment_fs_path)
        sweep.path.mkdir(parents=True, exist_ok=True)
        self._lock = sweep.lock(seconds=60)
        self._lock.acquire()
        record_start(sweep.provenance)

    def _describe(self, trials: Sequence[Trial]) -> None:
        described = describe_trials({trial.trial_id: _as_known(trial) for trial in trials})
        for trial in trials:
            content = described[trial.trial_id]
            if trial.trial_id in self._rows and self._described.get(trial.trial_id) != content:
                folder = _folder(trial)
                folder.path.mkdir(parents=True, exist_ok=True)
                write_text(folder.config, dump_yaml({**content, "name": folder.name}))
                self._described[trial.trial_id] = content

    def _write_status(self, trial: Trial, state: str, **more: Any) -> None:
        if trial.trial_id in self._parameters:
            more["parameters"] = self._parameters[trial.trial_id]
        _folder(trial).write_status(state=state, notes=[], **more)


def _folder(trial: Trial) -> TrialFolder:
    assert trial.path is not None
    return TrialFolder(trial.path)


def _as_known(trial: Trial) -> TuneTrial:
    return TuneTrial(trial.trainable_name, trial.config, trial.stopping_criterion)
