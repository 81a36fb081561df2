"""Packs of trials in a sweep, which an experiment's key `pack` switches on: one process for many.

Trials that differ in nothing but their seed and a few numbers are trained as one
(`sgrl.reinforce.pack`). Each keeps its folder, rows, checkpoints and status, and goes on exactly,
by itself or in another pack: what it was packed with is written nowhere. Trials of a pack that are
not equally far, after a kill, catch up first.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ray import tune
from safetensors import safe_open
from safetensors.torch import save_file

from sgrl.envs.registry import make_device
from sgrl.nn.policy import Policy
from sgrl.nn.registry import make_policy, save_policy
from sgrl.reinforce.iterations import last_update, mean_row
from sgrl.reinforce.pack import Pack, RunSettings
from sgrl.reinforce.update import UpdateSettings
from sgrl.results.locations import open_store
from sgrl.results.plan import ExperimentError, Problem, TrialConfig
from sgrl.rllib.module import policy_arguments
from sgrl.rllib.runner import EpisodeRunner
from sgrl.tuning.experiment.load import Experiment
from sgrl.tuning.experiment.method import asks_for_gpus
from sgrl.tuning.experiment.resources import required_resources
from sgrl.tuning.experiment.sections import build_algorithm_config
from sgrl.tuning.rounds import Leg
from sgrl.tuning.trial import REPORT_SECONDS, TrialWork, is_disk_full

#: What trials of one pack may differ in, under config.training.
OWN_NUMBERS = ("lr", "predictor_lr", "gamma", "entropy_coeff", "grad_clip")
#: Trials of a pack that says auto, at most.
MOST = 32
STATE_FILE = "run.safetensors"


# Which trials make a pack ---------------------------------------------------------------------


def group_legs(legs: Sequence[Leg], slots: int = 1) -> list[list[Leg]]:
    """Put legs together that are run by one process, in their order.

    Args:
        legs: of a round.
        slots: packs that can run side by side; `pack: auto` fills them evenly.

    Returns:
        Packs; every leg whose experiment says nothing of packs by itself.
    """
    alike: dict[str, list[Leg]] = {}
    for leg in legs:
        packed = leg.trial.config.pack is not None
        alike.setdefault(_kind(leg) if packed else leg.trial.name, []).append(leg)
    groups = []
    for same in alike.values():
        size = same[0].trial.config.pack or 1
        if not isinstance(size, int):
            size = min(MOST, math.ceil(len(same) / max(1, slots)))
        groups += [same[first : first + size] for first in range(0, len(same), size)]
    return groups


def slots_of(experiment: Experiment, present: Mapping[str, float]) -> int:
    """How many of an experiment's processes run side by side.

    Args:
        experiment: what is run.
        present: what there is of each resource.
    """
    needed = required_resources(experiment.examples[0])
    fit = min(int(present.get(name, 0) / amount) for name, amount in needed.items() if amount)
    limit = experiment.file.concurrency
    return max(1, min(fit, limit) if isinstance(limit, int) else fit)


def _kind(leg: Leg) -> str:
    content = leg.trial.config.as_dict()
    training = content["config"].get("training", {})
    content["config"]["training"] = {k: v for k, v in training.items() if k not in OWN_NUMBERS}
    for key in ("method", "seed"):
        del content[key]
    return json.dumps([content, leg.until], sort_keys=True, default=str)


def check_packs(experiment: Experiment) -> None:
    """Check that the trials of an experiment that says so can be packed.

    Raises:
        ExperimentError: they cannot.
    """
    if experiment.file.pack is None:
        return
    reason: str | None = None
    if (experiment.file.schedule or {}).get("name") == "pbt":
        reason = "pbt hands a trial's state to another, which packs do not"
    for [leg, *_] in group_legs([Leg(trial, 1) for trial in experiment.examples]):
        reason = reason or _refusal(leg.trial.config)
    if reason is not None:
        raise ExperimentError(experiment.path, [Problem("pack", reason)])


def _refusal(trial: TrialConfig) -> str | None:
    """Why a trial cannot be packed, in words; None where it can."""
    if trial.algorithm != "Reinforce":
        return f"packs are for Reinforce, not for {trial.algorithm}"
    config = build_algorithm_config(trial)
    for name in ("num_env_runners", "num_learners", "evaluation_num_env_runners"):
        if getattr(config, name):
            return f"{name} is not for packs"
    unit, duration = config.evaluation_duration_unit, config.evaluation_duration
    if config.evaluation_interval and (unit, isinstance(duration, int)) != ("episodes", True):
        return "evaluation_duration must be a number of episodes in packs"
    if config.predictor_optimizer != "adam":
        return f"predictor_optimizer {config.predictor_optimizer} is not for packs"
    for name in ("lr", "predictor_lr", "entropy_coeff"):
        if not isinstance(getattr(config, name), int | float):
            return f"{name} is a schedule, and a pack takes numbers"
    backend = trial.model.get("backend", "auto")
    if backend not in ("auto", "torch"):
        return f"backend {backend} is not for packs, which compute with torch or in Triton kernels"
    try:
        run = PackedRun(trial, "cpu")
        run.pack_with([run])
    except ValueError as error:
        return str(error)
    return None


# What trains ----------------------------------------------------------------------------------


class PackedRun:
    """A run of a pack, in the place of the algorithm that trains a trial.

    Args:
        trial: what it is trained with.
        device: where; by default as the trial says.
    """

    def __init__(self, trial: TrialConfig, device: str | None = None) -> None:
        self.config = config = build_algorithm_config(trial)
        self.device = device or ("cuda" if asks_for_gpus(trial.sections) else "cpu")
        self.environment = {"env": str(config.env), "env_config": dict(config.env_config)}
        self.group: _Group | None = None
        self.evaluator: EpisodeRunner | None = None
        self.settings = RunSettings(
            trial.seed, config.lr, config.predictor_lr, UpdateSettings.of(config)
        )
        env = self._make_env(1, "cpu")
        self._policy: Policy = make_policy(
            observation_size=env.observation_size,
            num_actions=env.num_actions,
            **policy_arguments({"seed": trial.seed, **trial.model}),
        )
        self.state: dict[str, Any] | None = None
        self.result: dict[str, Any] = {}
        self.iteration = 0

    def _make_env(self, runs: int, device: str) -> Any:
        config = self.config
        env, envs = str(config.env), config.num_envs_per_env_runner
        return make_device(env, runs, envs, dict(config.env_config), device)

    def pack_with(self, runs: "Sequence[PackedRun]") -> Pack:
        """A pack of this run and others like it, in their order, as far as they have got.

        Raises:
            ValueError: they do not go together.
        """
        settings = [run.settings for run in runs]
        env = self._make_env(len(runs), self.device)
        pack = Pack([run._policy for run in runs], env, settings)
        states = [run.state for run in runs if run.state is not None]
        if states:
            pack.set_state(states)
        return pack

    @property
    def updates(self) -> int:
        """How many there had been when it was last kept."""
        return 0 if self.state is None else self.state["batches"]

    @property
    def policy(self) -> Policy:
        """The policy as trained so far."""
        if self.group is not None:
            self.group.keep()
        return self._policy

    def train(self) -> dict[str, Any]:
        """What the pack has trained: the last iteration's row.

        Raises:
            FloatingPointError: the run's loss or gradient is no longer finite.
        """
        if self.result.pop("failed"):
            raise FloatingPointError(
                "the loss or its gradient is no longer finite; try a smaller learning rate"
            )
        return self.result

    def evaluate(self) -> dict[str, float]:
        """The column of RLlib's evaluation, where the iteration has one."""
        config = self.config
        if not config.evaluation_interval or self.iteration % config.evaluation_interval:
            return {}
        if self.evaluator is None:
            apart = config.get_evaluation_config_object()
            self.evaluator = EpisodeRunner(config=apart, worker_index=0, num_workers=0)
        self.evaluator.module.policy.load_state_dict(self.policy.state_dict())
        batches = self.evaluator.sample(num_episodes=config.evaluation_duration)
        rewards = torch.cat([batch.rewards.double().sum(0) for batch in batches])
        return {"eval_reward": rewards.mean().item()}

    def save_checkpoint(self, directory: str) -> None:
        """Write the policy, and what the run goes on from, as of the last iteration."""
        policy, state = self.policy, self.state
        assert state is not None  # since an iteration is over
        save_policy(policy, directory, environment=self.environment, iteration=self.iteration)
        numbers = {key: value for key, value in state.items() if isinstance(value, int)}
        tensors = {**state["tensors"], "generator": state["generator"]}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, Path(directory) / STATE_FILE, {"numbers": json.dumps(numbers)})

    def load_checkpoint(self, directory: str) -> None:
        """Go on from what `save_checkpoint` wrote."""
        with safe_open(Path(directory) / STATE_FILE, "pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        generator = tensors.pop("generator")
        self.state = {**numbers, "generator": generator, "tensors": tensors}

    def stop(self) -> None:
        """Let its environments go."""
        if self.evaluator is not None:
            self.evaluator.env.close()


class _Member(TrialWork):
    """A trial of a pack."""

    algorithm: PackedRun

    def is_ended(self) -> bool:
        """Whether it ended before this process went on with its pack."""
        status = open_store(self.sweep, "trials").sweep.trial(self.name).read_status()
        return status.get("state") in ("completed", "failed")

    def _build(self, config: TrialConfig) -> PackedRun:
        return PackedRun(config)

    def _train_once(self) -> tuple[dict, float]:
        return self.algorithm.train(), self.algorithm.result["seconds"]


class _Group:
    """Trials that are equally far, and the pack that trains them.

    Args:
        members: the trials.
    """

    def __init__(self, members: Sequence[_Member]) -> None:
        self.members = list(members)
        self.runs = [member.algorithm for member in members]
        self.pack = self.runs[0].pack_with(self.runs)
        self.kept = self.pack.batches
        for run in self.runs:
            run.group = self

    @property
    def updates(self) -> int:
        """How many each has made."""
        return self.pack.batches

    def running(self) -> list[_Member]:
        """Those that are not over."""
        return [member for member in self.members if member.algorithm is not None]

    def iterate(self) -> None:
        """Train for an iteration, and write down what it measured of each."""
        start, pack, config = time.perf_counter(), self.pack, self.runs[0].config
        end = last_update(pack.batches, config.total_updates, config.total_iterations)
        rows: list[list[dict[str, float]]] = [[] for _ in self.runs]
        with self.running()[0]._watched():
            while pack.batches < end:
                for of_run, row in zip(rows, pack.train(), strict=True):
                    of_run.append(row)
            failed = pack.failed.tolist()
        # What the trials of a pack take is shared out, so that their times add up.
        seconds = (time.perf_counter() - start) / len(self.running())
        for member, run, of_run, has_failed in zip(
            self.members, self.runs, rows, failed, strict=True
        ):
            if member.algorithm is None:
                continue
            run.iteration = len(member.rows) + 1
            row = mean_row(of_run) | ({} if has_failed else run.evaluate())
            run.result = {"sgrl": row, "seconds": seconds, "failed": has_failed}
            try:
                member._iterate()
            except FloatingPointError as error:
                member._diverge(error)

    def keep(self) -> None:
        """Hand each run its policy, and what it goes on from."""
        if self.kept == self.pack.batches:
            return
        self.kept = self.pack.batches
        self.pack.unstack([run._policy for run in self.runs])
        for index, run in enumerate(self.runs):
            run.state = self.pack.get_state(index)


class PackRunner(tune.Trainable):
    """Runs the trials `config["trials"]` of the sweep in `config["sweep"]` as a pack.

    Up to the iteration `config["until"]`, or their last one.
    """

    def setup(self, config: dict) -> None:
        self.members: list[_Member] = []
        for name in config["trials"]:
            member = _Member()
            member.begin(name, config)
            self.members.append(member)
        self.groups: list[_Group] | None = None

    def reset_config(self, new_config: dict) -> bool:
        self._release()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._release()

    def step(self) -> dict:
        """Train for about a second, or to the trials' ends, and report their progress.

        Re-raises errors that may be transient: Tune then starts the pack again.
        """
        disk_full = False
        try:
            try:
                if self.groups is None:
                    self._start()
                self._train()
            except Exception as error:
                running = [member for member in self.members if member.lock is not None]
                for member in running:
                    member._write_error(error)
                again = [member._fails_again(error) for member in running]
                if not running or not all(again):
                    raise
                for member in running:
                    member._give_up(error)
        except BaseException as error:
            self._release()
            disk_full = is_disk_full(error)
            if not disk_full:
                raise
        reports = {member.name: member.report for member in self.members}
        done = all(report["done"] for report in reports.values())
        return {"trials": reports, "disk_full": disk_full, "done": done}

    def _start(self) -> None:
        by_updates: dict[int, list[_Member]] = {}
        for member in self.members:
            if member.is_ended():
                continue
            member._start()
            by_updates.setdefault(member.algorithm.updates, []).append(member)
        self.groups = [_Group(members) for _, members in sorted(by_updates.items())]

    def _train(self) -> None:
        deadline, groups = time.monotonic() + REPORT_SECONDS, self.groups
        assert groups is not None
        self._settle()
        while groups:
            groups[0].iterate()  # the ones that are furthest behind
            self._settle()
            if time.monotonic() >= deadline:
                break
        for group in groups:
            for member in group.running():
                member._send()

    def _settle(self) -> None:
        """End the trials that are over, and put groups together that are equally far."""
        groups = self.groups
        assert groups is not None
        for member in (member for group in groups for member in group.running()):
            if member._is_over():
                member._send()
                member._end_if_over()
        groups[:] = [group for group in groups if group.running()]
        while len(groups) > 1 and groups[0].updates == groups[1].updates:
            for group in groups[:2]:
                group.keep()
            members = [member for group in groups[:2] for member in group.running()]
            groups[:2] = [_Group(sorted(members, key=self.members.index))]

    def _release(self) -> None:
        self.groups = None
        for member in self.members:
            member._release()
