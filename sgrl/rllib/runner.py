"""The RLlib environment runner around `sgrl.reinforce.rollout` (new API stack).

Runner w of R holds environments (w-1)*B .. w*B-1 of one batch of R*B episodes, so the environment
seeds of R runners are those of one big runner. Actions are sampled on the runner's device: of a
remote runner the one that `num_gpus_per_env_runner` says, of the local one the learner's.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.framework import get_device
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MEAN,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
)

from sgrl.envs.registry import evaluation_config, make_vector
from sgrl.envs.vector import VectorEnv
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.generators import generators_aside
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET, Rollout
from sgrl.rllib.base import Components
from sgrl.rllib.module import PolicyModule

COMPONENT_ROLLOUT = "rollout"
#: Where batches are that another process learns from, or none.
CPU = torch.device("cpu")
#: Statistics that RLlib calls otherwise.
RLLIB_NAMES = {"episode_length_mean": EPISODE_LEN_MEAN}
#: Mean reward an episode, of an evaluation.
EVALUATION_REWARD = "evaluation_reward"


class SampledBatch(EpisodeBatch):
    """An episode batch with the step counts that RLlib's evaluation asks for."""

    def env_steps(self) -> int:
        """Steps really taken, without padding."""
        return self.num_steps

    def agent_steps(self) -> int:
        """The same: one agent."""
        return self.env_steps()


class EpisodeRunner(EnvRunner, Checkpointable):
    """Runs every environment once to its episode's end, per batch.

    `sample()` returns the next training batch. `sample(num_episodes=n)` is RLlib's evaluation: at
    least n episodes (whole batches) on mazes that training never sees, the same ones at every
    evaluation; it leaves the training state untouched.

    The local runner beside remote ones only stands in for them: no environments, no module.
    """

    env: VectorEnv
    module: PolicyModule
    shares_module = False

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.spaces = kwargs.get("spaces") or {}
        self.rollout: Rollout | None = None
        if self.worker_index or not self.num_workers:
            self.make_env()
            self.make_module()
            self.rollout = self._make_rollout(self.config.seed)

    def make_env(self) -> None:
        """Make the environments, `config.num_envs_per_env_runner` of them."""
        self.env = self._make_vector(evaluating=self.config.in_evaluation)
        shape = self.env.observation_shape
        observations = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        if len(shape) == 3:
            observations = gym.spaces.Box(0, 255, shape, np.uint8)
        spaces = (observations, self.env.action_space)
        self.spaces = {
            DEFAULT_MODULE_ID: spaces,
            INPUT_ENV_SPACES: spaces,
            INPUT_ENV_SINGLE_SPACES: spaces,
        }

    def _make_vector(self, evaluating: bool) -> VectorEnv:
        settings = self.config.env_config
        if evaluating:
            settings = evaluation_config(self.config.env, settings)
        return make_vector(self.config.env, self.config.num_envs_per_env_runner, settings)

    def make_module(self) -> None:
        """Make the module that chooses the actions."""
        device = get_device(
            self.config, self.config.num_gpus_per_env_runner if self.worker_index else 0
        )
        spec = self.config.get_rl_module_spec(spaces=self.spaces, inference_only=False)
        self.module = spec.build().to(prepare_device(device))

    def share_module(self, module: PolicyModule) -> None:
        """Act with the learner's own module, on its device.

        There are no weights to copy, no forward pass to repeat and no batch to move.
        """
        assert self.rollout is not None
        self.module, self.shares_module = module, True
        self.rollout.policy, self.rollout.keep = module.policy, True

    def _make_rollout(self, seed: int, evaluating: bool = False) -> Rollout:
        num_envs = self.config.num_envs_per_env_runner
        # The training runner stands in where no runner is there to evaluate.
        stands_in = evaluating and not self.config.in_evaluation
        return Rollout(
            self._make_vector(evaluating=True) if stands_in else self.env,
            self.module.policy,
            seed,
            first_env=max(self.worker_index - 1, 0) * num_envs,
            total_envs=max(self.num_workers, 1) * num_envs,
            greedy=not self.config.explore,
        )

    def get_spaces(self) -> dict[str, tuple[gym.Space, gym.Space]]:
        """Return the observation and action space of one environment, by RLlib's names."""
        return self.spaces

    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        **kwargs: Any,
    ) -> list[SampledBatch]:
        """Run episodes and log their statistics.

        Args:
            num_timesteps: evaluate on at least this many environment steps.
            num_episodes: evaluate on at least this many episodes.
            **kwargs: not used.

        Returns:
            One batch of episodes; several when evaluating more episodes than environments.
        """
        if self.rollout is None:
            raise ValueError("the local runner has no environments: set evaluation_interval")
        if num_timesteps is None and num_episodes is None:
            return [self._log(self.rollout.collect(None if self.shares_module else CPU))]
        with generators_aside([self.config.seed, self.worker_index]):
            return self._evaluate(num_timesteps or 0, num_episodes or 0)

    def _evaluate(self, num_timesteps: int, num_episodes: int) -> list[SampledBatch]:
        evaluation = self._make_rollout(self.config.seed + EVALUATION_SEED_OFFSET, evaluating=True)
        batches: list[SampledBatch] = []
        with contextlib.ExitStack() as stack:
            if evaluation.env is not self.env:
                stack.enter_context(contextlib.closing(evaluation.env))
            while (
                sum(batch.env_steps() for batch in batches) < num_timesteps
                or len(batches) * evaluation.env.num_envs < num_episodes
            ):
                # Without the neurons' noise, which is large.
                batches.append(self._log(replace(evaluation.collect(CPU), noise=None)))
        rewards = torch.cat([batch.rewards.double().sum(0) for batch in batches])
        self.metrics.log_value(EVALUATION_REWARD, rewards.mean().item(), reduce="item")
        return batches

    def _log(self, batch: EpisodeBatch) -> SampledBatch:
        sampled = SampledBatch(**vars(batch))
        for name, value in sampled.statistics().items():
            self.metrics.log_value(RLLIB_NAMES.get(name, name), value, reduce="mean")
        self.metrics.log_value(NUM_EPISODES, sampled.num_episodes, reduce="sum")
        steps = sampled.num_steps
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED, steps, reduce="sum")
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, steps, reduce="lifetime_sum")
        return sampled

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func` with this runner.

        RLlib's own ends the process at any error, and with it what the error said.
        """
        return func(self, *args, **kwargs)

    def get_metrics(self) -> dict[str, Any]:
        """Return what was logged since the last call."""
        return self.metrics.reduce()

    def get_state(
        self, components: Components = None, *, not_components: Components = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the module's weights and the rollout's batch counter and action generator."""
        state: dict[str, Any] = {}
        if self.rollout is None:
            return state
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = self.module.get_state()
        if self._check_component(COMPONENT_ROLLOUT, components, not_components):
            state[COMPONENT_ROLLOUT] = self.rollout.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Set whatever `state` holds of what `get_state` returns."""
        if self.rollout is None:
            return
        if COMPONENT_RL_MODULE in state:
            weights = state[COMPONENT_RL_MODULE]
            self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
        if COMPONENT_ROLLOUT in state:
            self.rollout.set_state(state[COMPONENT_ROLLOUT])

    def get_ctor_args_and_kwargs(self) -> tuple[tuple, dict[str, Any]]:
        """Return what RLlib needs to make this runner again from a checkpoint."""
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        """Return no components: the checkpoint's weights are the learner's."""
        return []

    def assert_healthy(self) -> None:
        """Check that the constructor has finished."""
        assert hasattr(self, "rollout")
