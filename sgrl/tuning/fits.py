"""Fits of Tune's, in which it runs a sweep part by part."""

import contextlib
import gc
import os
import shutil
import signal
from collections.abc import Iterator

import ray
from ray import tune

from sgrl.results.storage import Store
from sgrl.tuning.experiment.load import Experiment
from sgrl.tuning.feed import Feed
from sgrl.tuning.progress import SweepMonitor

# Set for Tune unless the user has: it says less and writes less.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_fits(
    store: Store,
    experiment: Experiment,
    runner: type[tune.Trainable],
    feed: Feed,
    monitor: SweepMonitor,
) -> None:
    """Have Tune run all that a feed hands out, one fit after the other.

    Args:
        store: of the sweep.
        experiment: what is run.
        runner: what runs one of Tune's trials.
        feed: its trials.
        monitor: what follows them. Once the disk is full, or after Ctrl-C, no fit follows.
    """
    # A Tuner of the user's own, later in this process, is to write its files.
    before = {name: value for name, value in os.environ.items() if name.startswith("TUNE_")}
    # As many trials wait beside the running ones as can run: enough to hand over every process.
    waiting = {"TUNE_MAX_PENDING_TRIALS_PG": str(max(1, int(ray.cluster_resources()["CPU"])))}
    os.environ.update(TUNE_ENVIRONMENT | before | waiting)
    try:
        while not (monitor.disk_full or monitor.interrupted) and feed.begin_fit():
            _fit(store, experiment, runner, feed, monitor)
            gc.collect()  # what Tune kept refers to itself, and would stay for several fits
    finally:
        for name in {*TUNE_ENVIRONMENT, *waiting} - set(before):
            del os.environ[name]
        os.environ.update(before)


def _fit(
    store: Store,
    experiment: Experiment,
    runner: type[tune.Trainable],
    feed: Feed,
    monitor: SweepMonitor,
) -> None:
    """Have Tune run what the feed hands out, until that says that it is enough."""
    # Tune keeps notes of its own, which nothing reads.
    scratch = store.sweep.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with _interrupt_kept():
            tune.Tuner(
                tune.with_resources(runner, lambda config: config["request"]),
                param_space={
                    "sweep": store.location,
                    "tracker": experiment.file.track,
                    "wandb_mode": os.environ.get("WANDB_MODE"),
                },
                tune_config=tune.TuneConfig(
                    search_alg=feed,
                    num_samples=-1,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=str(scratch),
                    failure_config=tune.FailureConfig(max_failures=experiment.file.max_failures),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[monitor],
                    stop=monitor,
                    verbose=0,
                ),
            ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _interrupt_kept() -> Iterator[None]:
    """Undo that Tune leaves its own handler behind, which would swallow the next Ctrl-C."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGINT, interrupt)
