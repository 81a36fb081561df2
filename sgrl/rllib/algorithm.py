"""Full-episode REINFORCE as an RLlib algorithm (new API stack).

    config = (
        ReinforceConfig()
        .environment("labyrinth_escape", env_config={"maze_dims": [6, 6]})
        .env_runners(num_envs_per_env_runner=20)
        .rl_module(model_config={"policy": "sparsenet"})
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    algorithm.train()["sgrl"]["success_rate"]

Training is `sgrl.reinforce`'s: this runs it on RLlib's runners, learner and checkpoints. The same
config gives the same numbers as `sgrl.reinforce.train`, and a restored algorithm continues exactly
(for one CPU type, thread count and runner count).
"""

import dataclasses
from operator import itemgetter
from typing import Any, Literal, Self

import ray
from ray.rllib.algorithms import Algorithm, AlgorithmConfig
from ray.rllib.algorithms.algorithm_config import NotProvided
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    EVALUATION_RESULTS,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    TIMERS,
)

from sgrl.envs.registry import check_flat, validate_env_config
from sgrl.names import did_you_mean
from sgrl.nn.registry import Policy, policy_class
from sgrl.reinforce.batch import EpisodeBatch, StepCounts, concatenate
from sgrl.reinforce.iterations import last_update, mean_row
from sgrl.reinforce.predictors import PREDICTOR_OPTIMIZERS
from sgrl.reinforce.update import UpdateSettings
from sgrl.rllib.base import Components, PolicyCheckpoints, PolicyConfig
from sgrl.rllib.learner import ReinforceLearner, learner_batch
from sgrl.rllib.module import policy_arguments
from sgrl.rllib.runner import COMPONENT_ROLLOUT, EVALUATION_REWARD, EpisodeRunner
from sgrl.rllib.settings import (
    BOUNDS,
    REINFORCE_READS,
    check_numbers,
    refuse_ignored,
    silence_notes,
)

COMPONENT_REINFORCE = "reinforce"


class ReinforceConfig(PolicyConfig):
    """Settings of `Reinforce`; those not named here are RLlib's."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class=algo_class or Reinforce)
        self.seed = 0
        self.lr = 2e-3
        self.predictor_lr = 1e-5
        self.predictor_optimizer = "adam"
        self.predictor_memory = 0.95
        for setting in dataclasses.fields(UpdateSettings):
            setattr(self, setting.name, setting.default)
        self.total_updates: int | None = None
        self.total_iterations: int | None = None
        self.batch_mode = "complete_episodes"
        self.num_env_runners = 0
        self.num_envs_per_env_runner = 20
        self.env_runner_cls = EpisodeRunner
        # An episode batch without some environments is a different experiment: a lost runner ends
        # the trial, which continues exactly from its checkpoint.
        self.restart_failed_env_runners = False
        # A monitor of processor and memory in a thread of its own, not needed here.
        self.log_sys_usage = False
        # The runners have no connectors whose states would need merging.
        self._dont_auto_sync_env_runner_states = True
        self.merge_env_runner_states = False
        self.broadcast_env_runner_states = False

    def training(
        self,
        *,
        predictor_lr: float | list[list[float]] = NotProvided,
        predictor_optimizer: Literal["adam", "scaled", "averaged", "least_squares"] = NotProvided,
        predictor_memory: float = NotProvided,
        entropy_coeff: float | list[list[float]] = NotProvided,
        normalize_returns: bool = NotProvided,
        two_phase: bool = NotProvided,
        baseline: Literal["none", "batch_mean", "value_head"] = NotProvided,
        value_coeff: float = NotProvided,
        total_updates: int | None = NotProvided,
        total_iterations: int | None = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Set the training settings.

        `lr`, `predictor_lr` and `entropy_coeff` may be schedules, [[0, 1e-3], [1e6, 1e-4]]: by
        environment steps taken, with straight lines between.

        Args:
            predictor_lr: learning rate of the predictors of synthetic gradients, default 1e-5.
            predictor_optimizer: how these learn, default "adam"; docs/predictors.md has the others.
            predictor_memory: weight of the past in what that averages, default 0.95.
            entropy_coeff: weight of the entropy bonus, default 0.01.
            normalize_returns: whether returns are normalised over the batch, default True.
            two_phase: whether the predictors take their step before the policy's backward pass,
                default False (see `sgrl.reinforce.UpdateSettings`).
            baseline: what is subtracted from the returns before they are normalised: "none" (the
                default), "batch_mean" (at each time step, of the batch's other episodes) or
                "value_head" (what the policy's value head says; it is then on by default).
            value_coeff: weight of the value head's squared error in the loss, default 0.5.
            total_updates: with `total_iterations`, the updates of the whole run, spread evenly:
                iteration i ends after update int(linspace(1, total_updates, total_iterations))[i].
                Default None: every iteration is one update.
            total_iterations: iterations over which `total_updates` are spread, default None.
            **kwargs: RLlib's own; of these `lr` (default 2e-3, of all other parameters), `gamma`
                (0.95) and `grad_clip` (0.5, the global norm of each of the two groups; None
                switches it off) matter.
        """
        super().training(**kwargs)
        own = {
            "predictor_lr": predictor_lr,
            "predictor_optimizer": predictor_optimizer,
            "predictor_memory": predictor_memory,
            "entropy_coeff": entropy_coeff,
            "normalize_returns": normalize_returns,
            "two_phase": two_phase,
            "baseline": baseline,
            "value_coeff": value_coeff,
            "total_updates": total_updates,
            "total_iterations": total_iterations,
        }
        for name, value in own.items():
            if value is not NotProvided:
                setattr(self, name, value)
        return self

    def get_default_learner_class(self) -> type[ReinforceLearner]:
        """Return `ReinforceLearner`."""
        return ReinforceLearner

    def build_learner_connector(self, *args: Any, **kwargs: Any) -> None:
        """Return no connector: the learner takes whole episode batches."""

    def get_state(self) -> dict[str, Any]:
        """Return all settings."""
        # RLlib leaves out whatever equals its mark for deprecated settings, which is -1: a
        # learning rate of -1 would quietly become the default.
        return super().get_state() | {name: getattr(self, name) for name in BOUNDS}

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        included = super()._model_config_auto_includes | {"policy": "sparsenet", "seed": self.seed}
        return included | ({"value_head": True} if self.baseline == "value_head" else {})

    def validate(self) -> None:
        """Check the settings.

        Raises:
            ValueError: one line that names the setting.
        """
        check_numbers(self)
        for name in ("normalize_returns", "two_phase"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        UpdateSettings.of(self)  # which checks them
        if self.predictor_optimizer not in PREDICTOR_OPTIMIZERS:
            known = did_you_mean(self.predictor_optimizer, PREDICTOR_OPTIMIZERS)
            raise ValueError(f"unknown predictor_optimizer {self.predictor_optimizer!r}; {known}")
        updates, iterations = self.total_updates, self.total_iterations
        if updates is None or iterations is None:
            if updates is not iterations:
                raise ValueError(
                    "total_updates and total_iterations belong together: set both or none"
                )
        elif not 2 <= iterations <= updates:
            raise ValueError(
                f"total_iterations must be from 2 to total_updates ({updates}), got {iterations}"
            )
        for name, only in (
            ("grad_clip_by", "global_norm"),
            ("num_epochs", 1),
            ("minibatch_size", None),
        ):
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name} must stay {only!r}, got {getattr(self, name)!r}: an update takes the "
                    "whole batch once, clipped by global norm"
                )
        refuse_ignored(self, ReinforceConfig(), REINFORCE_READS)
        if self.num_learners > 1:
            raise ValueError(
                f"num_learners must be 0 or 1, got {self.num_learners}: several learners would "
                "each estimate mixing weights of their own"
            )
        if self.restart_failed_env_runners or self.ignore_env_runner_failures:
            raise ValueError(
                "every batch needs all environments: leave restart_failed_env_runners and "
                "ignore_env_runner_failures off, and restart from a checkpoint instead"
            )
        check_flat(self.env, validate_env_config(self.env, self.env_config))
        if self._rl_module_spec is None:
            model = policy_arguments(self.model_config)
            policy = model["name"]
            if self.baseline == "value_head" and not model["value_head"]:
                raise ValueError('value_head must be true for the baseline "value_head"')
            if self.two_phase and not policy_class(policy).two_phase:
                raise ValueError(f"two_phase must be false for the policy {policy!r}")
        silence_notes(self)
        super().validate()


class Reinforce(PolicyCheckpoints):
    """Full-episode REINFORCE: an update takes one episode of every environment.

    An iteration is one update, or as many as `total_updates` spreads over `total_iterations`.

    `train()` returns RLlib's result dict; under "sgrl" it holds the metrics of the iteration as
    flat floats: so far env_steps (steps really taken), padded_env_steps (batches x environments x
    T, the published axis) and episodes; success_rate (unless the environment knows no success),
    episode_return_mean, episode_length_mean, policy_loss, entropy, grad_norm (of the policy's
    gradients, before clipping), under sgprop predictor_loss, received_grad_norm, mixed_grad_norm,
    prediction_norm and mixing_weight_{mean,min,p25,median,p75,max} (feed-forward: of each layer
    too), and where the iteration ended with an evaluation eval_reward (its mean reward an
    episode). Over several updates they are means; counts and the mixing weights are those after
    the last.

    Source: the paper, Sections H.3 and H.4.
    """

    config_class = ReinforceConfig

    def setup(self, config: AlgorithmConfig) -> None:
        """Build runners and learner.

        Raises:
            ValueError: the Ray cluster has too few processors for them.
        """
        _check_resources(self.config)
        self._updates = 0
        self._counts = StepCounts()
        #: Steps learned from that RLlib's own counters lack; none at an iteration's end.
        self._steps_to_tell = 0
        self._row: dict[str, float] = {}
        super().setup(config)
        if self._is_all_local:
            self.env_runner.share_module(self.learner_group._learner.module[DEFAULT_MODULE_ID])

    @property
    def _is_all_local(self) -> bool:
        """Whether one process samples and learns, and so on one device."""
        return self.learner_group.is_local and self.env_runner_group.num_remote_env_runners() == 0

    @property
    def policy(self) -> Policy:
        """The policy as trained so far: the local learner's own, or a copy of the remote one's."""
        if self.learner_group.is_local:
            return self.learner_group._learner.module[DEFAULT_MODULE_ID].policy
        module = self.config.get_rl_module_spec(spaces=self.spaces).build()
        module.set_state(self._weights())
        return module.policy

    def _weights(self) -> dict[str, Any]:
        if self.learner_group.is_local:
            return self.learner_group._learner.module[DEFAULT_MODULE_ID].get_state()
        return self.learner_group.get_weights()[DEFAULT_MODULE_ID]

    def step(self) -> dict[str, Any]:
        """Train for one iteration."""
        result = super().step()
        result["sgrl"] = self._row
        interval = self.config.evaluation_interval
        # In between, RLlib repeats the last evaluation's results.
        if interval and (self.iteration + 1) % interval == 0:
            evaluated = result[EVALUATION_RESULTS][ENV_RUNNER_RESULTS]
            self._row["eval_reward"] = float(evaluated[EVALUATION_REWARD])
        return result

    def training_step(self) -> None:
        """Run every environment once and update, as often as the iteration has updates.

        The local runner is handed the new weights.
        """
        rows = []
        config = self.config
        end = last_update(self._updates, config.total_updates, config.total_iterations)
        while self._updates < end:
            with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
                batch = self._sample()
            self._updates += 1
            self._counts.add(batch)
            with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
                measured = self._learn(batch, ends_iteration=self._updates == end)
            if self.env_runner_group.num_remote_env_runners() == 0 and not self._is_all_local:
                self.env_runner.set_state({COMPONENT_RL_MODULE: self._weights()})
            rows.append({**vars(self._counts), **batch.statistics(), **measured})
        self._row = mean_row(rows)

    def _sample(self) -> EpisodeBatch:
        if self.env_runner_group.num_remote_env_runners() == 0:
            samples = [_sample_on(self.env_runner)]
        else:
            # Remote runners get the weights with the request: RLlib's own synchronisation does
            # not wait for them, and skips busy ones. A dead one must not be passed over.
            samples = self.env_runner_group.foreach_env_runner(
                _sample_on,
                kwargs={"weights": ray.put(self._weights())},
                local_env_runner=False,
                healthy_only=False,
            )
        _, batches, metrics = zip(*sorted(samples, key=itemgetter(0)), strict=True)
        self.metrics.aggregate(list(metrics), key=ENV_RUNNER_RESULTS)
        return concatenate(batches)

    def _learn(self, batch: EpisodeBatch, ends_iteration: bool) -> dict[str, float]:
        self._steps_to_tell += batch.num_steps
        if self.learner_group.is_local and not ends_iteration:
            # RLlib's bookkeeping around an update costs as much as a small one.
            return self.learner_group._learner.update_policy(batch)
        rllib_batch = learner_batch(batch, DEFAULT_MODULE_ID, self._steps_to_tell)
        self._steps_to_tell = 0
        if self.learner_group.is_local:
            self.learner_group._learner.acted = batch.acted
            results = self.learner_group.update(batch=rllib_batch)
        else:
            # By reference: RLlib splits other batches along their first axis.
            results = self.learner_group.update(batch_refs=[ray.put(rllib_batch)])
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        return self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, "sgrl"))

    def get_state(
        self, components: Components = None, *, not_components: Components = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return RLlib's algorithm state, and the step counter and remote runners' rollouts."""
        state = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(COMPONENT_REINFORCE, components, not_components):
            # The local runner's too, although RLlib saves it: a remote one may continue from it.
            rollouts = self.env_runner_group.foreach_env_runner(
                lambda runner: (runner.worker_index, runner.get_state(COMPONENT_ROLLOUT)),
                local_env_runner=self.env_runner_group.num_remote_env_runners() == 0,
            )
            state[COMPONENT_REINFORCE] = {
                "updates": self._updates,
                **vars(self._counts),
                "rollouts": dict(rollouts),
            }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Set whatever `state` holds of what `get_state` returns.

        Raises:
            ValueError: it was saved with another number of remote runners, above 1.
        """
        super().set_state(state)
        if COMPONENT_REINFORCE not in state:
            return
        self._updates = state[COMPONENT_REINFORCE]["updates"]
        rollouts = state[COMPONENT_REINFORCE]["rollouts"]
        self._counts = self._counts_from(state[COMPONENT_REINFORCE])
        saved = sum(index > 0 for index in rollouts)
        present = self.env_runner_group.num_remote_env_runners()
        if saved != present:
            if max(saved, present) > 1 or not rollouts:
                raise ValueError(
                    f"the checkpoint was written with {saved} remote runners, there are "
                    f"{present}: set num_env_runners to {saved} to continue it"
                )
            # The only runner's environments are the same ones, wherever it runs.
            [only] = rollouts.values()
            rollouts = {0: only, 1: only}
        if rollouts:
            self.env_runner_group.foreach_env_runner(
                lambda runner: runner.set_state(rollouts[runner.worker_index]),
                local_env_runner=present == 0,
            )

    def _counts_from(self, state: dict[str, Any]) -> StepCounts:
        if "padded_env_steps" not in state:
            # Of an older version, whose env_steps were padded; RLlib's counter was not.
            taken = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
            envs = self.config.num_envs_per_env_runner * max(1, self.config.num_env_runners)
            return StepCounts(
                env_steps=int(self.metrics.peek(taken, default=0)),
                padded_env_steps=state["env_steps"],
                episodes=self._updates * envs,
            )
        names = (field.name for field in dataclasses.fields(StepCounts))
        return StepCounts(**{name: state[name] for name in names})


def _check_resources(config: AlgorithmConfig) -> None:
    # RLlib would wait in silence, without end, for actors that fit nowhere.
    _, *actors = Reinforce.default_resource_request(config).bundles
    if not actors or not ray.is_initialized():
        return
    present = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        needed = sum(bundle.get(kind, 0) for bundle in actors)
        if needed > present.get(kind, 0):
            raise ValueError(
                f"the runners and learners need {needed:g} {kind}, the Ray cluster has "
                f"{present.get(kind, 0):g}: lower num_env_runners or num_learners"
            )


def _sample_on(
    runner: EpisodeRunner, weights: dict[str, Any] | None = None
) -> tuple[int, EpisodeBatch, dict[str, Any]]:
    if weights is not None:
        runner.set_state({COMPONENT_RL_MODULE: weights})
    [batch] = runner.sample()
    return runner.worker_index, batch, runner.get_metrics()
