"""What a sweep will cost on this machine, from a few measured iterations of each method.

    for line in estimate_lines(load_experiment("tune_configs/quickstart.yaml")):
        print(line)

Of trials that differ only in their seeds, and in settings that cost nothing such as the learning
rate, one is measured. It is built and trained as in a sweep, but nothing is written; `Reinforce`
in one process is measured without Ray.
"""

import contextlib
import dataclasses
import heapq
import itertools
import json
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train._internal.storage import StorageContext

from sgrl.errors import UserError, one_line
from sgrl.local_ray import start_local_ray
from sgrl.reinforce.generators import generators_aside
from sgrl.reinforce.update import UpdateSettings, optimizers_of, update
from sgrl.results.evaluation import play
from sgrl.results.grids import label
from sgrl.results.plan import Trial, TrialConfig
from sgrl.results.status import duration
from sgrl.rllib.runner import EpisodeRunner
from sgrl.tuning.cluster import count_cpus, machine_resources
from sgrl.tuning.evaluation import ACTIONS, Evaluation
from sgrl.tuning.experiment.load import Experiment
from sgrl.tuning.experiment.resources import check_backends, required_resources
from sgrl.tuning.experiment.sections import build_algorithm_config
from sgrl.tuning.packs import MOST, PackedRun, check_packs
from sgrl.tuning.trial import first_line

#: To be measured for so long: one kind of trials, and all of them.
SECONDS, TOTAL_SECONDS = 3.0, 20.0
#: Settings of training and environments on which an iteration's time does not depend.
FREE = ("lr", "predictor_lr", "gamma", "entropy_coeff", "grad_clip", "p_flip")


# Which trials cost the same -------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Trials of a method whose iterations cost the same.

    Attributes:
        name: the method's, and the swept values that tell it from the method's other kinds.
        trials: all of them.
    """

    name: str
    trials: list[Trial]

    @property
    def iterations(self) -> int:
        """Iterations of all its trials."""
        return sum(trial.config.stop.training_iteration for trial in self.trials)

    @property
    def resources(self) -> dict[str, float]:
        """What each of its trials holds while it runs."""
        return required_resources(self.trials[0])


def kinds_of(trials: Sequence[Trial]) -> list[Kind]:
    """Put trials together that differ in nothing that an iteration's time depends on."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        content = trial.config.as_dict()
        sections = content["config"]
        for settings in (sections.get("training"), sections["environment"].get("env_config")):
            for key in FREE if settings else ():
                settings.pop(key, None)
        for key in ("seed", "stop", "checkpoint", "max_failures", "iteration_timeout"):
            del content[key]
        groups.setdefault(json.dumps(content, sort_keys=True, default=str), []).append(trial)
    kinds = []
    for group in groups.values():
        others = [other[0] for other in groups.values() if other[0].method == group[0].method]
        words = [group[0].method]
        for name, value in group[0].swept.items():
            in_group = all(trial.swept[name] == value for trial in group)
            if in_group and any(other.swept.get(name) != value for other in others):
                words.append(f"{name}={label(value)}")
        kinds.append(Kind(" ".join(words), group))
    return kinds


# Measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What the iterations of a trial consist of.

    Attributes:
        step: trains.
        steps: how often, in an iteration on average.
        evaluations: each with the number of iterations between two of it.
    """

    step: Callable[[], object]
    steps: float = 1.0
    evaluations: Sequence[tuple[Callable[[], object], int]] = ()


def seconds_per_iteration(work: Work, seconds: float) -> float:
    """Measure the steps for about so many seconds, and all evaluations for a third of that."""
    total = work.steps * _mean_seconds(work.step, seconds)
    for evaluate, every in work.evaluations:
        total += _mean_seconds(evaluate, seconds / 3 / len(work.evaluations)) / every
    return total


def _mean_seconds(call: Callable[[], object], seconds: float) -> float:
    """Mean of at least two calls after a first one, unless that takes all the time alone."""
    warm_up = _seconds(call)
    if warm_up > seconds:
        return warm_up
    measured: list[float] = []
    while len(measured) < 2 or warm_up + sum(measured) < seconds:
        measured.append(_seconds(call))
    return sum(measured) / len(measured)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def beside_others(step: Callable[[], object], others: int) -> Iterator[None]:
    """Have copies of this process do the same over and over meanwhile, as trials side by side do.

    Where processes cannot be copied there are none.

    Args:
        step: what they repeat.
        others: how many.
    """
    parent, copies = os.getpid(), []
    try:
        for _ in range(others if hasattr(os, "fork") else 0):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of copies of a process that has threads
                copy = os.fork()
            if copy == 0:
                try:
                    while os.getppid() == parent:
                        step()
                finally:
                    os._exit(0)
            copies.append(copy)
        yield
    finally:
        for copy in copies:
            os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)


def measure(trial: TrialConfig, seconds: float = SECONDS, others: int = 0) -> float:
    """Measure what an iteration of a trial takes on this machine, evaluations included.

    The process keeps its random generators and its number of threads. A Ray that had to be started
    stays, for the next trial.

    Args:
        trial: what it is trained with.
        seconds: to measure for, about.
        others: trials that run beside it; only where all of a trial is in one process.

    Returns:
        Seconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(trial.num_threads)
    config = build_algorithm_config(trial)
    work_of = plain_work if _is_plain(trial, config) else _algorithm_work
    if trial.pack is not None:
        work_of = _pack_work
    try:
        with warnings.catch_warnings(), generators_aside([trial.seed]):
            warnings.simplefilter("ignore")  # RLlib's, of what it does itself
            with work_of(trial, config) as work:
                if work_of is not plain_work:
                    return seconds_per_iteration(work, seconds)
                with beside_others(work.step, others):
                    return seconds_per_iteration(work, seconds)
    finally:
        torch.set_num_threads(threads)


def _is_plain(trial: TrialConfig, config: Any) -> bool:
    """Whether a trial computes in one process on a CPU, which takes no Ray to measure."""
    elsewhere = config.num_env_runners + config.num_learners + config.num_gpus_per_learner
    evaluates_here = not config.evaluation_num_env_runners and (
        not config.evaluation_interval
        or (config.evaluation_duration != "auto" and config.evaluation_duration_unit == "episodes")
    )
    return trial.algorithm == "Reinforce" and not elsewhere and evaluates_here


@contextlib.contextmanager
def plain_work(trial: TrialConfig, config: Any) -> Iterator[Work]:
    """Train by `Reinforce` as its only process does; a step is an update.

    Args:
        trial: what it is trained with.
        config: the algorithm's settings.
    """
    with contextlib.ExitStack() as stack:
        runner = EpisodeRunner(config=config, worker_index=0, num_workers=0)
        stack.callback(runner.env.close)
        runner.share_module(runner.module)
        policy = runner.module.policy
        optimizers = optimizers_of(policy, config)
        settings = UpdateSettings.of(config)

        def step() -> None:
            [batch] = runner.sample()
            update(policy, optimizers, batch, settings)
            runner.get_metrics()

        evaluations: list[tuple[Callable[[], object], int]] = []
        if config.evaluation_interval:
            apart = config.get_evaluation_config_object()
            evaluator = EpisodeRunner(config=apart, worker_index=0, num_workers=0)
            stack.callback(evaluator.env.close)
            episodes = config.evaluation_duration
            evaluations.append(
                (lambda: evaluator.sample(num_episodes=episodes), config.evaluation_interval)
            )
        if trial.evaluate is not None:
            evaluations.append((lambda: _play(policy, trial), trial.evaluate.every))
        updates, iterations = config.total_updates, config.total_iterations
        yield Work(step, updates / iterations if updates else 1.0, evaluations)


def _play(policy: Any, trial: TrialConfig) -> None:
    """What `Evaluation` does."""
    assert trial.evaluate is not None
    for greedy in ACTIONS.values():
        play(policy, trial.sections["environment"], trial.evaluate.episodes, trial.seed, greedy)


@contextlib.contextmanager
def _pack_work(trial: TrialConfig, config: Any) -> Iterator[Work]:
    """Train a full pack of trials like this one; a step is an update of all of them."""
    size = trial.pack if isinstance(trial.pack, int) else MOST
    runs = [PackedRun(trial)] * size
    pack = runs[0].pack_with(runs)
    updates = (config.total_updates or 1) / (config.total_iterations or 1)
    evaluations: list[tuple[Callable[[], object], int]] = []
    if trial.evaluate is not None:
        evaluations.append((lambda: _play(runs[0].policy, trial), trial.evaluate.every))
    if config.evaluation_interval:
        evaluations.append((runs[0].evaluate, config.evaluation_interval))
    yield Work(pack.train, updates / size, evaluations)


@contextlib.contextmanager
def _algorithm_work(trial: TrialConfig, config: Any) -> Iterator[Work]:
    """Train by any algorithm as a trial does, on a Ray of this machine; a step is an iteration."""
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            start_local_ray(count_cpus())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sgrl-"))
        storage = StorageContext(folder, "estimate", trial_dir_name="trial")
        algorithm = config.algo_class(config=config, storage=storage)
        stack.callback(algorithm.stop)
        evaluations: list[tuple[Callable[[], object], int]] = []
        if interval := config.evaluation_interval:
            evaluations.append((algorithm.evaluate, interval))
            # Measured apart.
            algorithm.config = algorithm.config.copy(copy_frozen=False)
            algorithm.config.evaluation_interval = None
        if trial.evaluate is not None:
            every, evaluation = trial.evaluate.every, Evaluation(trial)
            evaluations.append((lambda: evaluation.columns(algorithm, every), every))
        yield Work(algorithm.train, evaluations=evaluations)


# From seconds an iteration to the sweep -------------------------------------------------------


def schedule(
    trials: Sequence[tuple[float, Mapping[str, float]]],
    present: Mapping[str, float],
    limit: int | None = None,
) -> tuple[float, int]:
    """Run trials in their order, each as soon as what it needs is free.

    Args:
        trials: of each its seconds, and what it holds for as long; no more than there is.
        present: what there is.
        limit: trials at a time, at most.

    Returns:
        When the last one ends, and how many ran side by side at most.
    """
    free, now, most = dict(present), 0.0, 0
    running: list[tuple[float, int, Mapping[str, float]]] = []
    for number, (seconds, needs) in enumerate(trials):
        while len(running) == limit or not _fits(needs, free):
            now, _, ended = heapq.heappop(running)
            for resource, amount in ended.items():
                free[resource] = free.get(resource, 0.0) + amount
        for resource, amount in needs.items():
            free[resource] = free.get(resource, 0.0) - amount
        heapq.heappush(running, (now + seconds, number, needs))
        most = max(most, len(running))
    return max((end for end, *_ in running), default=0.0), most


def _fits(needs: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(amount <= free.get(resource, 0.0) + 1e-9 for resource, amount in needs.items())


def estimate_lines(
    experiment: Experiment, measured: Callable[[TrialConfig, float, int], float] = measure
) -> Iterator[str]:
    """Estimate core hours and wall time of a sweep on this machine.

    A kind of trials that cannot be measured says so in its line, and is left out of the sum.

    Args:
        experiment: what is to run.
        measured: measures the seconds of an iteration, in about so many seconds and beside so many
            other trials.

    Yields:
        The lines of the estimate, each as soon as it is known.
    """
    kinds, present = kinds_of(experiment.examples), machine_resources()
    width = max(len(kind.name) for kind in kinds)
    load = f"a load of {os.getloadavg()[0]:.1f} on {present['CPU']:g} CPUs"
    yield f"estimate, from a few iterations of each on this machine as it is now, {load}:"
    yield f"  {'':{width}}  s/iteration  trials  core hours"
    limit = experiment.file.concurrency if isinstance(experiment.file.concurrency, int) else None
    fitting = [
        (1.0, kind.resources)
        for kind in kinds
        if _fits(kind.resources, present)
        for _ in kind.trials
    ]
    others = max(0, schedule(fitting, present, limit)[1] - 1)
    share = min(SECONDS, TOTAL_SECONDS / len(kinds))
    hours = 0.0
    seconds_of: dict[str, float] = {}
    had_ray = ray.is_initialized()
    try:
        for kind in kinds:
            start = f"  {kind.name:<{width}}  "
            try:
                _check(experiment, kind, present)
                seconds = measured(kind.trials[0].config, share, others)
            except Exception as error:
                said = one_line(error) if isinstance(error, UserError) else first_line(error)
                yield f"{start}not measured: {said}"
                continue
            own = seconds * kind.iterations * kind.resources["CPU"] / 3600
            yield f"{start}{_figure(seconds):>11}  {len(kind.trials):6}  {_figure(own):>10}"
            hours += own
            seconds_of |= {trial.name: seconds for trial in kind.trials}
    finally:
        if not had_ray and ray.is_initialized():
            ray.shutdown()
    needs = {trial.name: kind.resources for kind in kinds for trial in kind.trials}
    known = [trial for trial in experiment.examples if trial.name in seconds_of]
    if not known:
        return
    end, at_once = schedule(
        [(seconds_of[t.name] * t.config.stop.training_iteration, needs[t.name]) for t in known],
        present,
        limit,
    )
    left_out = len(experiment.examples) - len(known)
    without = f", without {left_out} trials not measured" if left_out else ""
    decides = experiment.file.search is not None or experiment.file.schedule is not None
    most = "at most" if decides else "in all"
    yield (f"{most} {_figure(hours)} core hours, {duration(end)} with {at_once} at a time{without}")


def _check(experiment: Experiment, kind: Kind, present: Mapping[str, float]) -> None:
    for resource, amount in kind.resources.items():
        if amount > present.get(resource, 0.0):
            has = present.get(resource, 0.0)
            raise UserError(f"needs {amount:g} {resource}s and there are {has:g}")
    of_kind = dataclasses.replace(experiment, examples=kind.trials[:1])
    check_backends(of_kind)
    check_packs(of_kind)


def _figure(value: float) -> str:
    """Two digits that count, without an exponent."""
    digits = next((d for d in itertools.count() if abs(value) >= 10 ** (1 - d) or d == 4), 0)
    return f"{value:.{digits}f}"
