"""What every policy and every environment promises; a new one is tested by being registered.

Every policy trains on every kind of action, under REINFORCE and under RLlib's PPO, and continues
from a checkpoint.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from sgrl.envs.by_id import POPGYM_IDS
from sgrl.envs.registry import make_single, make_vector
from sgrl.nn.policies import POLICIES, load_policy, make_policy, save_policy
from sgrl.reinforce import Rollout, UpdateSettings, action_space_of, train
from sgrl.tuning.experiment import build_algorithm_config

# RLlib makes its vector of environments under one id, again and again.
pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning")

EPISODE_LENGTH = 4


class Tiny(gym.Env):
    """Rewards actions that are large where the first observation is."""

    observation_space = gym.spaces.Box(-1, 1, (6,), np.float32)
    action_space: gym.Space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seen = self.np_random.uniform(-1, 1, 6).astype(np.float32)
        return self.seen, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        reward = float(self.seen[0] * np.sum(action))
        self.seen = self.np_random.uniform(-1, 1, 6).astype(np.float32)
        return self.seen, reward, False, False, {}


class TinyParts(Tiny):
    action_space = gym.spaces.MultiDiscrete([2, 3])


class TinyBox(Tiny):
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


SPACES = {"discrete": Tiny, "multi_discrete": TinyParts, "box": TinyBox}
for _name, _class in SPACES.items():
    gym.register(f"sgrl-contract/{_name}-v0", entry_point=_class)

# Settings that make a policy small, of those that it has.
SMALL = {
    "feature_size": 6,
    "embedding_size": 6,
    "hidden_size": 6,
    "num_layers": 2,
    "num_neurons": 6,
    "neuron_size": 2,
    "num_parents": 2,
    "num_slots": 2,
    "num_input_neurons": 3,
    "actor_slots": 2,
}
TRAINING: dict[str, dict[str, Any]] = {
    "Reinforce": {"lr": 1e-3},
    "PPO": {
        "lr": 1e-3,
        "train_batch_size_per_learner": 4 * EPISODE_LENGTH,
        "minibatch_size": 4 * EPISODE_LENGTH,
        "num_epochs": 1,
    },
}
COMBINATIONS = list(itertools.product(POLICIES, SPACES, TRAINING))
# Every policy once, with all kinds of actions and both algorithms among them.
SAMPLE = [
    (policy, list(SPACES)[index % 3], list(TRAINING)[index // 3 % 2])
    for index, policy in enumerate(POLICIES)
]


def build(policy: str, space: str, algorithm: str) -> Any:
    fields = {field.name for field in dataclasses.fields(POLICIES[policy].Settings)}
    model = {"policy": policy} | {key: SMALL[key] for key in SMALL if key in fields}
    environment = {
        "env": f"sgrl-contract/{space}-v0",
        "env_config": {"episode_length": EPISODE_LENGTH},
    }
    return build_algorithm_config(
        {
            "algorithm": algorithm,
            "seed": 0,
            "num_threads": 1,
            "model": model,
            "config": {
                "environment": environment,
                "env_runners": {"num_env_runners": 0, "num_envs_per_env_runner": 2},
                "training": TRAINING[algorithm],
            },
        }
    ).build_algo()


@pytest.fixture
def algorithms(ray_session: None) -> Iterator[list[Any]]:
    """Those in the list are stopped at the test's end."""
    started: list[Any] = []
    yield started
    for algorithm in started:
        algorithm.stop()


def weights(algorithm: Any) -> dict[str, np.ndarray]:
    """A copy of what the learner holds."""
    module = algorithm.learner_group._learner.module["default_policy"]
    return {name: np.array(value) for name, value in module.get_state().items()}


@pytest.mark.parametrize(("policy", "space", "algorithm"), COMBINATIONS)
def test_every_policy_trains_on_every_kind_of_action(
    policy: str, space: str, algorithm: str, algorithms: list[Any]
) -> None:
    trained = build(policy, space, algorithm)
    algorithms.append(trained)
    before = weights(trained)
    trained.train()
    after = weights(trained)
    assert all(np.isfinite(value).all() for value in after.values())
    actor = [name for name in after if ".actor." in name and "predictor" not in name]
    assert any((after[name] != before[name]).any() for name in actor)


@pytest.mark.parametrize("space", SPACES)
def test_the_plain_loop_gives_the_numbers_of_the_algorithm(
    space: str, algorithms: list[Any]
) -> None:
    algorithm = build("gru", space, "Reinforce")
    algorithms.append(algorithm)
    env = make_vector(f"sgrl-contract/{space}-v0", 2, {"episode_length": EPISODE_LENGTH})
    settings = {key: SMALL[key] for key in ("feature_size", "embedding_size", "hidden_size")}
    actions = action_space_of(env.action_space)
    policy = make_policy("gru", env.observation_size, actions, seed=0, **settings)
    for row in train(policy, env, 2, lr=1e-3, seed=0):
        reported = algorithm.train()["sgrl"]
        for name in ("env_steps", "episode_return_mean", "policy_loss", "entropy", "grad_norm"):
            assert reported[name] == row[name]


@pytest.mark.parametrize(("space", "best"), [("discrete", 2), ("multi_discrete", 3), ("box", 4)])
def test_reinforce_learns_every_kind_of_action(space: str, best: float) -> None:
    """To more than half of what the best actions earn on average, from nothing."""
    env = make_vector(f"sgrl-contract/{space}-v0", 20, {"episode_length": EPISODE_LENGTH})
    actions = action_space_of(env.action_space)
    policy = make_policy("mlp", env.observation_size, actions, hidden_size=16)
    settings = UpdateSettings(gamma=0.0)
    returns = [
        row["episode_return_mean"] for row in train(policy, env, 60, lr=1e-3, settings=settings)
    ]
    assert abs(returns[0]) < 0.25 * best
    assert np.mean(returns[-5:]) > 0.6 * best


def check_restored(
    policy: str, space: str, algorithm: str, algorithms: list[Any], tmp_path: Path
) -> None:
    trained = build(policy, space, algorithm)
    algorithms.append(trained)
    trained.train()
    saved = weights(trained)
    trained.save_checkpoint(str(tmp_path))
    restored = build(policy, space, algorithm)
    algorithms.append(restored)
    restored.load_checkpoint(str(tmp_path))
    for name, value in weights(restored).items():
        np.testing.assert_array_equal(value, saved[name])
    if algorithm == "Reinforce":  # which also continues exactly
        trained.train()
        restored.train()
        going_on = weights(trained)
        for name, value in weights(restored).items():
            np.testing.assert_array_equal(value, going_on[name])
    else:
        restored.train()

    # What acts without Ray is the same policy.
    module = trained.learner_group._learner.module["default_policy"]
    save_policy(module.policy, tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.action_space == module.policy.action_space
    env = make_vector(f"sgrl-contract/{space}-v0", 2, {"episode_length": EPISODE_LENGTH})
    batches = [Rollout(env, acting, seed=3).collect() for acting in (module.policy, loaded)]
    torch.testing.assert_close(batches[0].actions, batches[1].actions, atol=0, rtol=0)


@pytest.mark.parametrize(("policy", "space", "algorithm"), SAMPLE)
def test_a_policy_of_each_kind_is_saved_and_restored(
    policy: str, space: str, algorithm: str, algorithms: list[Any], tmp_path: Path
) -> None:
    check_restored(policy, space, algorithm, algorithms, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "space", "algorithm"), [one for one in COMBINATIONS if one not in SAMPLE]
)
def test_every_policy_is_saved_and_restored(
    policy: str, space: str, algorithm: str, algorithms: list[Any], tmp_path: Path
) -> None:
    check_restored(policy, space, algorithm, algorithms, tmp_path)


@pytest.mark.parametrize("env", POPGYM_IDS)
def test_every_popgym_environment_is_made_and_steps(env: str) -> None:
    """One by one and side by side, to the end of its episodes."""
    single = make_single(env, {"previous_action": True})
    single.action_space.seed(0)
    single.reset(seed=0)
    size = single.observation_space.shape
    observation, reward, *_ = single.step(single.action_space.sample())
    assert observation.shape == size
    assert np.isfinite(reward)

    vector = make_vector(env, 2)
    current, ends = vector.reset([0, 1]), np.zeros(2, int)
    for _ in range(vector.episode_length):
        assert current.shape == (2, vector.observation_size)
        action = np.stack([single.action_space.sample() for _ in range(2)])
        step = vector.step(action)
        current = step.observations
        assert np.isfinite(step.rewards).all()
        ends += step.terminated | step.truncated
    assert ends.tolist() == [1, 1]
