"""Sweeps: the trials of an experiment run by Ray Tune, killed and resumed without a trace.

    directory = run_sweep(load_experiment("tune_configs/quickstart.yaml"), "results")
    resume_sweep(directory)

Tune only decides which trial runs where. What a trial has reached stands in its own folder,
`<directory>/<trial>/`, and nowhere else: `config.yaml`, `metrics.csv`, `checkpoints/` and
`status.json`. Whatever was killed, a trial that is started again continues from its newest whole
checkpoint with exactly the numbers of an uninterrupted one.
"""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sgrl.commands import command
from sgrl.envs.mnist import DataError
from sgrl.envs.registry import ENVIRONMENTS, prepare
from sgrl.local_ray import LocalRayError, start_local_ray
from sgrl.results.checkpoints import write_text
from sgrl.results.metrics import OldMetricsError, read_metrics
from sgrl.results.plan import Trial, TrialConfig, planned_trials
from sgrl.results.provenance import PROVENANCE_FILE, record_start
from sgrl.results.status import (
    EXPERIMENT_FILE,
    Progress,
    read_progress,
    read_status,
    read_stopped,
    write_status,
)
from sgrl.results.storage import Mirror, Store, display, is_address, is_archive, join, open_store
from sgrl.tuning.client import reach
from sgrl.tuning.experiment.load import Experiment, extend_experiment
from sgrl.tuning.experiment.method import with_defaults
from sgrl.tuning.experiment.resources import check_backends, check_resources, may_move, user_modules
from sgrl.tuning.experiment.sections import algorithm_class, build_algorithm_config
from sgrl.tuning.progress import (
    LOG_FILE,
    SUMMARY_FILE,
    SweepView,
    progress_bar,
    quiet,
    write_summary,
)
from sgrl.tuning.tracking import check_tracker, how_to_look, prepare_tracker
from sgrl.tuning.trial import (
    TrialRunner,
    first_line,
    is_disk_full,
    lock_file,
    read_yaml,
)
from sgrl.user_code import UserCodeError, import_named, source_of
from sgrl.yaml_files import dump_yaml

# What a trial's numbers do not depend on may change from one start to the next.
CHANGEABLE = {"stop", "checkpoint", "max_failures", "iteration_timeout"}

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


def run_sweep(
    experiment: Experiment, results_dir: str | Path = "results", name: str | None = None
) -> Path:
    """Run every trial of `experiment` and return its folder, `results_dir/<name>`.

    `results_dir` may be an address such as `s3://bucket/results` (see `sgrl.results.storage`): the
    folder returned is then this machine's mirror of it, which holds no checkpoints.

    A trial that fails does not stop the others; `failed_trials` lists them. Raises SweepError or
    ExperimentError, before Ray is started, where the folder is taken or a trial asks for more
    than there is, TrackingError where its tracker cannot be used, StorageError where an address
    cannot, and KeyboardInterrupt once Ctrl-C has stopped the trials.
    """
    store = open_store(join(results_dir, name or experiment.name), "driver")
    if not store.is_free():
        resume = command("sgrl", "resume", str(store))
        how = f"`{resume}` continues it, " if is_sweep(store) else ""
        raise SweepError(f"{store} already exists: {how}--name NAME starts another sweep")
    check_tracker(experiment.file.track, store.location)
    requests = _resource_requests(experiment)
    _prepare_environments(experiment)
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{store} cannot be made: {error.strerror}") from None
    with _locked(store):
        store.pull_reports()  # empties a mirror of what was there before
        write_text(store.folder / EXPERIMENT_FILE, dump_yaml(experiment.resolved))
        return _run(store, experiment, requests)


def resume_sweep(
    directory: str | Path,
    iterations: int | None = None,
    additions: Sequence[str] = (),
    track: str | None = None,
) -> Path:
    """Continue a sweep that was killed, or whose trials failed, and return its folder.

    `iterations` and `additions` (KEY=VALUES) extend it first, as `extend_experiment` does: trials
    that are there go on to the new end from their last checkpoints. `track` replaces the tracker
    that the sweep was started with. Completed trials are left alone, and so are those whose loss
    became NaN or infinite. Raises as `run_sweep` does, and SweepError where `directory` holds no
    sweep or a trial has passed the new end.
    """
    store = open_store(directory, "driver")
    _check_is_sweep(store)
    with _locked(store):
        store.pull_reports()
        experiment = _extended(store, iterations, additions, track)
        check_tracker(experiment.file.track, store.location)
        requests = _resource_requests(experiment, resuming=True)
        _prepare_environments(experiment)
        if iterations is not None or additions or track is not None:
            write_text(store.folder / EXPERIMENT_FILE, dump_yaml(experiment.resolved))
        return _run(store, experiment, requests)


def resume_plan(
    directory: str | Path, iterations: int | None = None, additions: Sequence[str] = ()
) -> tuple[list[Trial], list[Progress]]:
    """What `resume_sweep` would do: all trials, and of those that would run the iteration they
    would go on from. Changes nothing; raises as `resume_sweep` does."""
    store = open_store(directory, "driver")
    _check_is_sweep(store)
    with _locked(store):
        store.pull_reports()
        experiment = _extended(store, iterations, additions)
        todo = []
        for row in (read_progress(store.folder, trial) for trial in experiment.trials):
            if not _is_settled(store, row):
                row.iteration = store.newest_checkpoint(row.trial.name, at_most=row.iteration)
                todo.append(row)
    return experiment.trials, todo


def _extended(
    store: Store,
    iterations: int | None,
    additions: Sequence[str],
    track: str | None = None,
) -> Experiment:
    experiment = extend_experiment(store.folder / EXPERIMENT_FILE, iterations, additions, track)
    for trial in experiment.trials:
        _check_config(store.folder / trial.name, trial)
        try:
            done = len(read_metrics(store.folder / trial.name / "metrics.csv"))
        except OldMetricsError as error:
            raise SweepError(str(error)) from None
        if iterations is not None and done > iterations:
            raise SweepError(
                f"{store}: {trial.name} has trained for {done} iterations already: "
                f"--iterations must be at least {done}"
            )
    return experiment


def failed_trials(directory: str | Path) -> list[str]:
    """The names of a sweep's trials that failed, in order, from its folder."""
    directory = Path(directory).absolute()
    trials = planned_trials(directory / EXPERIMENT_FILE)
    rows = [read_progress(directory, trial) for trial in trials]
    return [row.trial.name for row in rows if row.state == "failed"]


def is_sweep(store: Store) -> bool:
    """Whether the store holds a sweep that can go on."""
    return store.exists(EXPERIMENT_FILE) and not is_archive(store.location)


def _check_is_sweep(store: Store) -> None:
    if is_archive(store.location):
        raise SweepError(f"{store} is an archive, which cannot be resumed: resume what it is of")
    if not is_sweep(store):
        what = "holds no sweep" if store.folder.exists() else "does not exist"
        raise SweepError(f"{store} {what}: give a folder such as results/quickstart")


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    """Keep other processes (of this machine, where the results are an address) from running the
    sweep, or changing what it is to run."""
    try:
        lock = lock_file(store.folder / ".lock", seconds=2)
    except OSError as error:
        raise SweepError(f"{store} cannot be used: {error.strerror}") from None
    if lock is None:
        raise SweepError(f"{store} is being run by another process")
    try:
        with lock:
            yield
    except Exception as error:
        if is_disk_full(error):
            raise SweepError(_disk_full(store)) from None
        raise


def _disk_full(store: Store) -> str:
    resume = command("sgrl", "resume", str(store))
    go_on = f"`{resume}` goes on" if is_sweep(store) else "start the sweep again"
    return f"no space left on the disk of {store}: make some, then {go_on}"


def _prepare_environments(experiment: Experiment) -> None:
    """Fetch what the trials' environments need, so that no trial has to."""
    sections = {
        dump_yaml(section): section
        for section in (trial.config.sections["environment"] for trial in experiment.trials)
    }
    for section in sections.values():
        if section["env"] in ENVIRONMENTS:
            try:
                with progress_bar() as report:
                    prepare(section["env"], section.get("env_config"), report)
            except DataError as error:
                raise SweepError(str(error)) from None


def _run(store: Store, experiment: Experiment, requests: dict[str, Any]) -> Path:
    directory = store.folder
    with quiet(directory / LOG_FILE) as console:
        record_start(directory)
        prepare_tracker(experiment.file.track, directory)
        moved = {t.name for t in experiment.trials if _has_moved(directory / t.name, t)}
        for trial in experiment.trials:
            _write_config(directory / trial.name, trial)
        progress = {t.name: read_progress(directory, t) for t in experiment.trials}
        for row in progress.values():
            if not _is_settled(store, row):
                row.state = "pending"
                write_status(directory / row.trial.name, {"state": "pending"})
        todo = [row.trial for row in progress.values() if row.state == "pending"]
        going_on = [trial for trial in todo if trial.name in moved]
        if going_on:
            like = "the same numbers, up to rounding"
            if going_on[0].config.algorithm != "Reinforce":
                like = "other episodes"
            moving = len(going_on)
            who = "1 trial goes on" if moving == 1 else f"{moving} trials go on"
            words = f"{who} in other processes than before, with {like}"
            console.print(words, soft_wrap=True, highlight=False)
        made = (f"{trial.name}/{name}" for trial in todo for name in ("config.yaml", "status.json"))
        store.push(EXPERIMENT_FILE, PROVENANCE_FILE, *made)
        over = f", {len(progress) - len(todo)} of them over" if len(todo) < len(progress) else ""
        count = "1 trial" if len(progress) == 1 else f"{len(progress)} trials"
        head = f"{count}{over}; results in {store}"
        console.print(head, soft_wrap=True, highlight=False)
        if experiment.file.track != "none":
            hint = how_to_look(experiment.file.track, str(store))
            console.print(f"to follow them: {hint}", soft_wrap=True, highlight=False)
        if todo:
            view = SweepView(store, progress)
            try:
                with view.shown_on(console):
                    _run_trials(store, experiment, todo, requests, view)
            finally:
                for row in view.trials.values():
                    if not row.is_over:
                        store.pull(f"{row.trial.name}/metrics.csv", f"{row.trial.name}/status.json")
        progress = {t.name: read_stopped(directory, t) for t in experiment.trials}
        write_summary(directory, progress.values())
        store.push(SUMMARY_FILE, LOG_FILE)
    if any(not row.is_over for row in progress.values()):
        raise KeyboardInterrupt
    return directory


def _check_config(folder: Path, trial: Trial) -> None:
    """Refuse to change what a trial's first iterations were trained with (the resolved backend
    and the threads among it), but for the processes it computes in."""
    path, config = folder / "config.yaml", trial.as_dict()
    if not path.is_file():
        return
    before = read_yaml(path)
    # A setting that is newer than the sweep was what it now is by default.
    with contextlib.suppress(KeyError, TypeError):
        before["model"] = with_defaults(before["model"])
    for key in sorted((before.keys() | config.keys()) - CHANGEABLE):
        if before.get(key) != config.get(key):
            if key == "config" and may_move(TrialConfig.from_dict(before), trial.config):
                continue
            raise SweepError(
                f"{display(path)} says {key}: {before.get(key)}, {EXPERIMENT_FILE} says "
                f"{config.get(key)}: undo the change or start another sweep with --name"
            )


def _has_moved(folder: Path, trial: Trial) -> bool:
    path = folder / "config.yaml"
    return path.is_file() and read_yaml(path).get("config") != trial.config.sections


def _write_config(folder: Path, trial: Trial) -> None:
    """Write a trial's config.yaml, where it is not there or says otherwise."""
    path, config = folder / "config.yaml", trial.as_dict()
    if not path.is_file() or read_yaml(path) != config:
        folder.mkdir(exist_ok=True)
        write_text(path, dump_yaml(config))


def _run_trials(
    store: Store,
    experiment: Experiment,
    trials: Sequence[Trial],
    requests: dict[str, Any],
    view: SweepView,
) -> None:
    started_ray = not ray.is_initialized()
    interrupt = signal.getsignal(signal.SIGINT)
    _start_ray(experiment)
    try:
        _check_visible(store)
        _check_modules(experiment)
        _tune(store, experiment, trials, requests, view)
    finally:
        # Tune leaves its own handler behind, which would swallow the next Ctrl-C.
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGINT, interrupt)
        if started_ray:
            ray.shutdown()
    if view.disk_full:
        raise SweepError(_disk_full(store))


def _tune(
    store: Store,
    experiment: Experiment,
    trials: Sequence[Trial],
    requests: dict[str, Any],
    view: SweepView,
) -> None:
    # Tune keeps notes of its own, which nothing reads.
    scratch = store.folder / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    # As many trials wait beside the running ones as can run: enough to hand over every process.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, int(ray.cluster_resources()["CPU"])))
    limit = experiment.file.concurrency
    try:
        tune.Tuner(
            tune.with_resources(TrialRunner, lambda config: requests[config["trial"]]),
            param_space={
                "sweep": store.location,
                "trial": tune.grid_search([trial.name for trial in trials]),
                "tracker": experiment.file.track,
                "wandb_mode": os.environ.get("WANDB_MODE"),
            },
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=limit if isinstance(limit, int) else None,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(scratch),
                failure_config=tune.FailureConfig(max_failures=experiment.file.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[view],
                stop=view,
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _on_every_node(function: Callable[[Any], Any], argument: Any) -> dict[str, Any]:
    """What a function returns on each machine of the cluster, by its address."""
    running = {
        node["NodeManagerAddress"]: ray.remote(num_cpus=0)(function)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(argument)
        for node in _nodes()
    }
    return {address: ray.get(result) for address, result in running.items()}


def _check_visible(store: Store) -> None:
    """Refuse a cluster of which some machine does not see the sweep's results."""
    if len(_nodes()) == 1 and type(store) is Store:
        return
    text = (store.folder / EXPERIMENT_FILE).read_text(encoding="utf-8")
    found = _on_every_node(_look, store.location)
    blind = sorted(address for address, (read, _) in found.items() if read != text)
    if blind and type(store) is Store:
        raise SweepError(
            f"{store} is not there on {', '.join(blind)}: give --results a folder that all "
            "machines of the cluster share"
        )
    if blind:
        reason = found[blind[0]][1] or "other machines write there what this one does not see"
        raise SweepError(f"{store} cannot be read on {', '.join(blind)}: {reason}")


def _look(location: str) -> tuple[str | None, str]:
    """The experiment file as this machine sees it, and why it does not."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            mirrored = is_address(location)
            store = Mirror(location, Path(folder)) if mirrored else Store(Path(location))
            store.pull(EXPERIMENT_FILE)
            return (store.folder / EXPERIMENT_FILE).read_text(encoding="utf-8"), ""
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, str(error)


def _check_modules(experiment: Experiment) -> None:
    """Refuse a cluster of which some machine cannot import what the environments come from."""
    modules = user_modules(experiment)
    if not modules or len(_nodes()) == 1:
        return
    wrong = {
        address: line for address, line in _on_every_node(_try_import, modules).items() if line
    }
    if wrong:
        raise SweepError(
            f"the environment cannot be imported on {', '.join(sorted(wrong))}: "
            f"{min(wrong.items())[1]}; install what it needs on every machine of the cluster"
        )


def _try_import(modules: Sequence[str]) -> str:
    """What is wrong on this machine with the modules; empty where nothing is."""
    try:
        for module in modules:
            import_named(module)
    except UserCodeError as error:
        return str(error)
    return ""


def _start_ray(experiment: Experiment) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise SweepError(
            f"the driver of a sweep runs on the cluster: start it there, or from here with `sgrl "
            f"sweep --address {address}`"
        )
    if address:
        print(f"joining the Ray cluster at {address}")
        try:
            reach(address)
            # Other machines may lack what is in the current folder of this one.
            places = [place for m in user_modules(experiment) if (place := source_of(m))]
            ray.init(
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"py_modules": list(map(str, places))} if places else None,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SweepError(
                f"no Ray cluster at {address} ({first_line(error)}): start one, or run here, "
                "without --address and RAY_ADDRESS"
            ) from None
    else:
        try:
            start_local_ray(count_cpus())
        except LocalRayError as error:
            raise SweepError(str(error)) from None


def _resource_requests(experiment: Experiment, resuming: bool = False) -> dict[str, Any]:
    """Each trial's placement group by its name; refuses trials that could never start."""
    if os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        _start_ray(experiment)
    present = ray.cluster_resources() if ray.is_initialized() else machine_resources()
    check_resources(experiment, present, resuming)
    check_backends(experiment)
    return {
        trial.name: algorithm_class(trial.config.algorithm).default_resource_request(
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


def _is_settled(store: Store, progress: Progress) -> bool:
    """Whether a resumed sweep leaves the trial alone: its loss diverged, or it is completed and
    its last checkpoint is whole."""
    name = progress.trial.name
    if progress.state == "failed":
        return read_status(store.folder / name).get("diverged", False)
    if progress.state != "completed" or progress.iteration < progress.last_iteration:
        return False
    return store.has_checkpoint(name, progress.iteration)
