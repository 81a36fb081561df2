"""Sweeps: the trials of an experiment run by Ray Tune; interrupting and resuming changes no result.

    directory = run_sweep(load_experiment("tune_configs/quickstart.yaml"), "results")
    resume_sweep(directory)

Tune only decides which trial runs where. The state of a trial is in its own folder,
`<directory>/<trial>/`, and nowhere else: `config.yaml`, `metrics.csv`, `checkpoints/` and
`status.json`. Whichever process was killed, a restarted trial continues from its newest intact
checkpoint and yields exactly the numbers of an uninterrupted one.
"""

import contextlib
import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from sgrl.bars import progress_bar
from sgrl.commands import command
from sgrl.envs.registry import ENVIRONMENTS, prepare
from sgrl.files import write_text
from sgrl.results.folder import SweepFolder
from sgrl.results.locations import open_store
from sgrl.results.metrics import read_metrics
from sgrl.results.plan import Trial, planned_trials
from sgrl.results.provenance import changed_parts, record_start
from sgrl.results.selection import ALL, Selection
from sgrl.results.status import Progress, read_progress, read_stopped
from sgrl.results.storage import Store, is_address, is_archive, join
from sgrl.results.tune_folder import RESTORE, is_of_tuner
from sgrl.tuning.cluster import (
    SweepError,
    check_modules,
    check_visible,
    machine_resources,
    start_ray,
)
from sgrl.tuning.course import Course
from sgrl.tuning.experiment.load import Experiment, extend_experiment
from sgrl.tuning.experiment.resources import (
    check_backends,
    check_resources,
    resource_request,
    user_modules,
)
from sgrl.tuning.feed import Feed
from sgrl.tuning.fits import run_fits
from sgrl.tuning.packs import PackRunner, check_packs, group_legs, slots_of
from sgrl.tuning.progress import SweepMonitor, quiet, write_summary
from sgrl.tuning.recorded import check_config, write_config
from sgrl.tuning.rounds import Leg
from sgrl.tuning.tracking import check_tracker, how_to_look, prepare_tracker
from sgrl.tuning.trial import TrialRunner, is_disk_full
from sgrl.yaml_files import dump_yaml


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
    _check_schedule(store, experiment)
    _check_resources(experiment)
    _prepare_environments(experiment)
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{store} cannot be made: {error.strerror}") from None
    with _locked(store):
        store.pull_reports()  # empties a mirror of what was there before
        write_text(store.sweep.experiment, dump_yaml(experiment.resolved))
        return _run(store, experiment)


def resume_sweep(
    directory: str | Path,
    iterations: int | None = None,
    additions: Sequence[str] = (),
    track: str | None = None,
    concurrency: int | None = None,
    selection: Selection = ALL,
) -> Path:
    """Continue a sweep that was killed, or whose trials failed, and return its folder.

    `iterations` and `additions` (KEY=VALUES) extend it first, as `extend_experiment` does: existing
    trials continue to the new end from their last checkpoints. `track` replaces the tracker that
    the sweep was started with, and `concurrency` the number of trials at a time. Only trials of the
    `selection` are run. Completed trials are left alone, and so are those whose loss became NaN or
    infinite. Raises as `run_sweep` does, SweepError where `directory` holds no sweep or a trial has
    passed the new end, and SelectionError where no trial is selected.
    """
    store = open_store(directory, "driver")
    _check_is_sweep(store)
    with _locked(store):
        store.pull_reports()
        extension = iterations, additions, track
        experiment = extend_experiment(
            store.sweep.experiment, *extension, concurrency=concurrency, begun=True
        )
        written = _check_trials(store, experiment, iterations)
        _check_selection(store, experiment, selection)
        check_tracker(experiment.file.track, store.location)
        _check_resources(experiment, resuming=True)
        _prepare_environments(experiment)
        if additions or {iterations, track, concurrency} != {None}:
            write_text(store.sweep.experiment, dump_yaml(experiment.resolved))
        return _run(store, experiment, selection, written)


def resume_plan(
    directory: str | Path,
    iterations: int | None = None,
    additions: Sequence[str] = (),
    selection: Selection = ALL,
) -> tuple[list[Trial], list[tuple[Progress, int]]]:
    """Report what `resume_sweep` would do, changing nothing; raises as it does.

    Returns:
        All trials, and those it would run first, each with the iterations it would continue from
        and train up to. More follow only where results decide on what is trained.
    """
    store = open_store(directory, "driver")
    _check_is_sweep(store)
    with _locked(store):
        store.pull_reports()
        experiment = extend_experiment(store.sweep.experiment, iterations, additions, begun=True)
        _check_trials(store, experiment, iterations)
        _check_selection(store, experiment, selection)
        todo = []
        for leg in selection.among(Course(store, experiment, dry=True).next_legs()):
            row = read_progress(store.sweep, leg.trial)
            row.iteration = store.newest_checkpoint(row.trial.name, at_most=row.iteration)
            todo.append((row, leg.until))
    return experiment.trials, todo


def _check_selection(store: Store, experiment: Experiment, selection: Selection) -> None:
    if selection != ALL and {"search", "schedule"} & experiment.resolved.keys():
        words = "results decide on what is trained: leave out --methods and --seeds"
        raise SweepError(f"{store}: {words}")
    selection.check((trial.config.method, trial.config.seed) for trial in experiment.trials)


def _check_trials(store: Store, experiment: Experiment, iterations: int | None) -> set[str]:
    """Refuse to change trials that have begun, or to end one before where it is.

    Returns:
        The names of the trials whose config.yaml is what it is to be.
    """
    written = set()
    for trial in experiment.trials:
        folder = store.sweep.trial(trial.name)
        if check_config(folder, trial):
            written.add(trial.name)
        done = len(read_metrics(folder.metrics))
        if iterations is not None and done > iterations:
            raise SweepError(
                f"{store}: {trial.name} has trained for {done} iterations already: "
                f"--iterations must be at least {done}"
            )
    return written


def failed_trials(directory: str | Path) -> list[str]:
    """The names of a sweep's trials that failed, in order, from its folder."""
    sweep = SweepFolder(directory)
    rows = [read_progress(sweep, trial) for trial in planned_trials(sweep.experiment)]
    return [row.trial.name for row in rows if row.state == "failed"]


def is_sweep(store: Store) -> bool:
    """Whether the store holds a sweep that can go on."""
    return store.exists(store.sweep.experiment) and not is_archive(store.location)


def _check_is_sweep(store: Store) -> None:
    if is_archive(store.location):
        raise SweepError(f"{store} is an archive, which cannot be resumed: resume what it is of")
    if is_of_tuner(store.folder):
        raise SweepError(f"{store} is not of a sweep: {RESTORE}")
    if not is_sweep(store):
        what = "holds no sweep" if store.folder.exists() else "does not exist"
        raise SweepError(f"{store} {what}: give a folder such as results/quickstart")


@contextlib.contextmanager
def _locked(store: Store) -> Iterator[None]:
    """Keep other processes from running the sweep, or changing what it is to run.

    Where the results are an address, only those of this machine.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(store.sweep.lock(seconds=2))
        except TimeoutError:
            raise SweepError(f"{store} is being run by another process") from None
        except OSError as error:
            raise SweepError(f"{store} cannot be used: {error.strerror}") from None
        try:
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
        for section in (t.config.sections["environment"] for t in experiment.first_examples)
    }
    for section in sections.values():
        if section["env"] in ENVIRONMENTS:
            with progress_bar("fetching") as report:
                prepare(section["env"], section.get("env_config"), report)


def _run(
    store: Store,
    experiment: Experiment,
    selection: Selection = ALL,
    written: Container[str] = (),
) -> Path:
    """Run the trials of a selection; those `written` have their config.yaml."""
    sweep = store.sweep
    folders = {trial.name: sweep.trial(trial.name) for trial in experiment.trials}
    with quiet(sweep.log) as console:
        record_start(sweep.provenance, user_modules(experiment))
        for package in changed_parts(sweep.provenance):
            words = f"{package} is not what it was when the sweep was last started"
            console.print(words, soft_wrap=True, highlight=False)
        prepare_tracker(experiment.file.track, sweep)
        to_write = [trial for trial in experiment.trials if trial.name not in written]
        moved = {trial.name for trial in to_write if write_config(folders[trial.name], trial)}
        progress = {t.name: read_progress(sweep, t) for t in experiment.trials}
        monitor = SweepMonitor(store, progress, console)

        def admit(trials: Sequence[Trial]) -> None:
            """Give the trials that a search has just suggested a folder."""
            for trial in trials:
                if trial.name not in progress:
                    folder = folders[trial.name] = sweep.trial(trial.name)
                    write_config(folder, trial)
                    progress[trial.name] = read_progress(sweep, trial)
                    if not folder.status.is_file():
                        folder.write_status(state="pending")
                    store.push(folder.config, folder.status)

        course = Course(store, experiment, monitor.decide, admit)
        legs = selection.among(course.next_legs())
        todo = [leg.trial for leg in legs]
        for name in (trial.name for trial in todo):
            progress[name].state = "pending"
            # Of thousands most were so before: writing it again would take longer than to start.
            if folders[name].read_status() != {"state": "pending"}:
                folders[name].write_status(state="pending")
        going_on = [trial for trial in todo if trial.name in moved]
        if going_on:
            like = "the same numbers, up to rounding"
            if going_on[0].config.algorithm != "Reinforce":
                like = "other episodes"
            moving = len(going_on)
            who = "1 trial goes on" if moving == 1 else f"{moving} trials go on"
            words = f"{who} in other processes than before, with {like}"
            console.print(words, soft_wrap=True, highlight=False)
        waiting = [name for name, row in progress.items() if not row.is_over]
        for name in waiting:
            if not folders[name].status.is_file():
                folders[name].write_status(state="pending")
        made = [file for name in waiting for file in (folders[name].config, folders[name].status)]
        store.push(sweep.experiment, sweep.provenance, *made)
        done = len(progress) - len(waiting)
        over = f", {done} of them over" if done else ""
        count = "1 trial" if len(progress) == 1 else f"{len(progress)} trials"
        head = f"{count}{at_most(experiment)}{over}; results in {store}"
        console.print(head, soft_wrap=True, highlight=False)
        if experiment.file.track != "none":
            hint = how_to_look(experiment.file.track, str(store))
            console.print(f"to follow them: {hint}", soft_wrap=True, highlight=False)
        for note in course.notes:
            console.print(note, soft_wrap=True, highlight=False)
        if legs:
            try:
                with monitor.shown_on(console):
                    _run_trials(store, experiment, course, legs, monitor)
            finally:
                for name, row in monitor.trials.items():
                    if not row.is_over:
                        store.pull(folders[name].metrics, folders[name].status)
        planned = planned_trials(sweep.experiment) if course.decides else experiment.trials
        progress = {t.name: read_stopped(sweep, t) for t in planned}
        write_summary(sweep, progress.values())
        store.push(sweep.summary, sweep.log)
    if any(not row.is_over and selection.takes(row.trial) for row in progress.values()):
        raise KeyboardInterrupt
    return sweep.path


def at_most(experiment: Experiment) -> str:
    """Return what to add to the number of trials where a search will suggest more."""
    most = len(experiment.examples)
    return "" if experiment.file.search is None else f" of at most {most}"


def _run_trials(
    store: Store,
    experiment: Experiment,
    course: Course,
    legs: list[Leg],
    monitor: SweepMonitor,
) -> None:
    started_ray = not ray.is_initialized()
    start_ray(experiment)
    try:
        check_visible(store)
        check_modules(experiment)
        _tune(store, experiment, course, legs, monitor)
    finally:
        if started_ray:
            ray.shutdown()
    if monitor.disk_full:
        raise SweepError(_disk_full(store))


def _tune(
    store: Store,
    experiment: Experiment,
    course: Course,
    legs: list[Leg],
    monitor: SweepMonitor,
) -> None:
    limit = experiment.file.concurrency
    requests: dict[str, Any] = {}

    def settings(legs: list[Leg]) -> dict[str, Any]:
        for leg in legs:
            monitor.admit(leg.trial)
        first = legs[0].trial
        if first.point not in requests:
            requests[first.point] = resource_request(first)
        names = [leg.trial.name for leg in legs]
        return {"trials": names, "until": legs[0].until, "request": requests[first.point]}

    def packed(legs: list[Leg]) -> list[list[Leg]]:
        return group_legs(legs, slots_of(experiment, ray.cluster_resources()))

    most = limit if isinstance(limit, int) else None
    feed = Feed(packed(legs), lambda: packed(course.next_legs()), settings, most)
    runner = TrialRunner if experiment.file.pack is None else PackRunner
    run_fits(store, experiment, runner, feed, monitor)
    if feed.error is not None:
        raise feed.error


def _check_resources(experiment: Experiment, resuming: bool = False) -> None:
    """Refuse trials that could never start."""
    if os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        start_ray(experiment)
    present = ray.cluster_resources() if ray.is_initialized() else machine_resources()
    check_resources(experiment, present, resuming)
    check_backends(experiment)
    check_packs(experiment)


def _check_schedule(store: Store, experiment: Experiment) -> None:
    """Refuse what takes checkpoints of all trials where only those of one are at hand."""
    if is_address(store.location) and (experiment.file.schedule or {}).get("name") == "pbt":
        raise SweepError(f"{store}: pbt copies checkpoints between trials, which takes a folder")
