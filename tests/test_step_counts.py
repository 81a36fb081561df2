"""env_steps are the steps that environments really took, whatever trained on them."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray import cloudpickle
from ray.rllib.algorithms import AlgorithmConfig

from sgrl.envs.registry import VectorEnv, make_vector
from sgrl.nn.registry import make_policy
from sgrl.reinforce.loop import train
from sgrl.results.rllib_metrics import metrics_row
from sgrl.rllib import APPOConfig, IMPALAConfig, PPOConfig, ReinforceConfig, register_environment

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    # RLlib makes its vector of environments under one id, again and again.
    pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning"),
]

CARDS = "popgym-RepeatPreviousEasy-v0"
#: Settings of an environment, T, and the length of all its episodes where they have one.
ENVIRONMENTS: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "labyrinth_escape": ({"episode_length": 60}, 60, None),
    "labyrinth_explore": ({"episode_length": 60}, 60, None),
    "mnist_bandit": ({}, 1, 1),
    CARDS: ({}, 51, 51),
    "CartPole-v1": ({"episode_length": 30}, 30, None),
}
for _env in (CARDS, "CartPole-v1"):
    register_environment(_env)
ENVS = 4
# Remote runners do not find this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
STOCK = {"PPO": PPOConfig, "APPO": APPOConfig, "IMPALA": IMPALAConfig}


def count_on(runner: Any) -> None:
    """Wrap a runner's environments so that `runner.counted` is [steps, episodes that ended]."""
    counted = runner.counted = [0, 0]

    class Single(gym.Wrapper):
        def step(self, action: Any) -> Any:
            result = self.env.step(action)
            counted[0] += 1
            counted[1] += bool(result[2] or result[3])
            return result

    class Vector:
        def __init__(self, env: Any) -> None:
            self.env = env

        def __getattr__(self, name: str) -> Any:
            return getattr(self.env, name)

        def reset(self, seeds: Any) -> Any:
            self.running = np.ones(self.env.num_envs, bool)
            return self.env.reset(seeds)

        def step(self, actions: Any) -> Any:
            result = self.env.step(actions)
            counted[0] += int(self.running.sum())
            ended = self.running & (result.terminated | result.truncated)
            counted[1] += int(ended.sum())
            self.running &= ~ended
            return result

    if hasattr(runner, "rollout"):
        if runner.rollout is not None:
            runner.rollout.env = Vector(runner.rollout.env)
    else:
        vector = runner.env.unwrapped
        vector.envs = [Single(env) for env in vector.envs]


def configuration(name: str, env: str) -> AlgorithmConfig:
    env_config, length, _ = ENVIRONMENTS[env]
    model = {"policy": "mlp", "hidden_size": 4}
    if name.startswith("Reinforce"):
        runners = 2 if name.endswith("remote") else 0
        config: AlgorithmConfig = ReinforceConfig().env_runners(
            num_env_runners=runners, num_envs_per_env_runner=ENVS
        )
        config.training(total_updates=5, total_iterations=3)
    else:
        config = STOCK[name]().env_runners(num_env_runners=0, num_envs_per_env_runner=ENVS)
        config.learners(num_learners=0).reporting(min_time_s_per_iteration=0)
        # Fragments end in the middle of episodes.
        batch = 3 * ENVS * length // 2 + 1
        config.training(train_batch_size_per_learner=batch)
        if name == "PPO":
            config.training(num_epochs=1, minibatch_size=batch)
        else:
            config.env_runners(rollout_fragment_length=max(1, length // 2))
    config.environment(env, env_config=env_config).rl_module(model_config=model)
    config.evaluation(evaluation_interval=2, evaluation_duration=3)
    return config.debugging(seed=3)


CASES = [(name, env) for name in ("Reinforce", *STOCK) for env in ENVIRONMENTS]
CASES += [("Reinforce, remote", "labyrinth_escape")]


@pytest.mark.parametrize(("name", "env"), CASES)
def test_env_steps_are_the_steps_taken(name: str, env: str) -> None:
    """In every row; evaluations count nowhere."""
    algorithm = configuration(name, env).build_algo()
    try:
        group = algorithm.env_runner_group
        group.foreach_env_runner(count_on)
        for iteration in range(1, 4):
            row = metrics_row(algorithm.train(), iteration, 0.0)
            counted = group.foreach_env_runner(lambda runner: runner.counted)
            steps, episodes = np.sum(counted, axis=0).tolist()
            assert steps > 0
            assert (row["env_steps"], row["episodes"]) == (steps, episodes)
            _, length, every = ENVIRONMENTS[env]
            if name.startswith("Reinforce"):
                assert row["padded_env_steps"] == episodes * length
                assert steps == episodes * every if every else steps < episodes * length
            else:
                assert np.isnan(row["padded_env_steps"])
    finally:
        algorithm.stop()


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_plain_loop_counts_the_same(env: str) -> None:
    env_config, length, _ = ENVIRONMENTS[env]

    class Runner:
        rollout: Any

    runner = Runner()
    runner.rollout = Runner()
    runner.rollout.env = make_vector(env, ENVS, env_config)
    count_on(runner)
    vector: VectorEnv = runner.rollout.env
    policy = make_policy("mlp", vector.observation_size, vector.num_actions, hidden_size=4)
    for row in train(policy, vector, 3):
        assert [row["env_steps"], row["episodes"]] == runner.counted  # type: ignore[attr-defined]
        assert row["padded_env_steps"] == row["episodes"] * length
