"""What every registered environment promises; a new entry is tested by being registered."""

import random
import warnings
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from sgrl.envs.registry import ENVIRONMENTS, VectorEnv, make_single, make_vector
from sgrl.envs.vector import PythonVectorEnv
from sgrl.nn.registry import make_policy
from sgrl.reinforce.batch import concatenate
from sgrl.reinforce.rollout import Rollout


def run_episodes(env: VectorEnv, seeds: list[int], actions: np.ndarray) -> list[np.ndarray]:
    """Observations [B, T + 1, F], rewards, terminated, truncated and success [B, T] of one episode
    each."""
    first = env.reset(seeds)
    steps = [env.step(step_actions) for step_actions in actions]
    observations, *outcomes = (np.stack(column, 1) for column in zip(*steps, strict=True))
    return [np.concatenate([first[:, None], observations], 1), *outcomes]


def some_actions(env: VectorEnv, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(env.num_actions, size=(env.episode_length, env.num_envs))


def assert_all_equal(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def process_random_state() -> tuple:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), name, keys.tolist(), *rest


class VectorEnvContract:
    """The promises of `VectorEnv`; a subclass says which implementation is meant."""

    vectorized: bool

    @pytest.fixture(params=list(ENVIRONMENTS))
    def make(self, request: pytest.FixtureRequest) -> Callable[[int], VectorEnv]:
        return lambda num_envs: make_vector(
            request.param, num_envs, {"vectorized": self.vectorized}
        )

    def test_shapes_and_types(self, make: Callable[[int], VectorEnv]) -> None:
        env = make(3)
        shape = (3, env.observation_size)
        first = env.reset([0, 1, 2])
        assert (first.shape, first.dtype) == (shape, np.float32)
        observations, rewards, *flags = env.step(np.zeros(3, np.int64))
        assert (observations.shape, observations.dtype) == (shape, np.float32)
        assert (rewards.shape, rewards.dtype) == ((3,), np.float32)
        for flag in flags:
            assert (flag.shape, flag.dtype) == ((3,), bool)

    def test_every_episode_ends_once_within_its_length(
        self, make: Callable[[int], VectorEnv]
    ) -> None:
        env = make(8)
        _, _, terminated, truncated, success = run_episodes(env, list(range(8)), some_actions(env))
        assert ((terminated | truncated).sum(1) == 1).all()
        assert not (success & ~terminated).any()

    def test_a_finished_environment_ignores_its_actions(
        self, make: Callable[[int], VectorEnv]
    ) -> None:
        env = make(2)
        run_episodes(env, [0, 1], some_actions(env))
        terminal = env.step(np.zeros(2, np.int64)).observations
        for action in range(env.num_actions):
            observations, *rest = env.step(np.full(2, action))
            np.testing.assert_array_equal(observations, terminal)
            assert not any(array.any() for array in rest)

    def test_an_episode_is_a_function_of_its_seed(self, make: Callable[[int], VectorEnv]) -> None:
        """The same in any batch, after any history; other seeds differ."""
        env, alone = make(4), make(1)
        seeds, actions = [11, 7, 11, 2**32 - 1], some_actions(env)
        actions[:, 2] = actions[:, 0]
        together = run_episodes(env, seeds, actions)
        run_episodes(env, [1, 2, 3, 4], some_actions(env, 1))
        assert_all_equal(run_episodes(env, seeds, actions), together)
        for e, seed in enumerate(seeds):
            single = run_episodes(alone, [seed], actions[:, e : e + 1])
            assert_all_equal(single, [array[e : e + 1] for array in together])
        np.testing.assert_array_equal(together[0][0], together[0][2])
        firsts = [env.reset(list(range(4 * k, 4 * k + 4))) for k in range(5)]
        assert len(np.unique(np.concatenate(firsts), axis=0)) > 1

    def test_results_are_the_callers_to_keep(self, make: Callable[[int], VectorEnv]) -> None:
        env = make(2)
        first = env.reset([0, 1])
        kept = first.copy()
        env.step(np.zeros(2, np.int64))
        np.testing.assert_array_equal(first, kept)
        first[:] = -1
        np.testing.assert_array_equal(env.reset([0, 1]), kept)

    def test_process_random_state_is_untouched(self, make: Callable[[int], VectorEnv]) -> None:
        before = process_random_state()
        env = make(2)
        run_episodes(env, [5, 6], some_actions(env))
        assert process_random_state() == before

    def test_wrong_number_of_seeds_is_refused(self, make: Callable[[int], VectorEnv]) -> None:
        with pytest.raises(ValueError, match="needs 3 seeds"):
            make(3).reset([1, 2])


class TestVectorisedEnvironments(VectorEnvContract):
    vectorized = True


class TestPythonEnvironments(VectorEnvContract):
    vectorized = False


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_vectorised_equals_python(name: str) -> None:
    envs = [make_vector(name, 10, {"vectorized": vectorized}) for vectorized in (True, False)]
    seeds, actions = list(range(40, 50)), some_actions(envs[0])
    vectorised, python = (run_episodes(env, seeds, actions) for env in envs)
    assert_all_equal(vectorised, python)


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version:UserWarning")
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_single_environment(name: str) -> None:
    """Gymnasium's own checker, quietly, and without touching the process's random state."""
    before = process_random_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        env = make_single(name)
    env.reset(seed=1)
    env.reset()
    env.step(0)
    assert process_random_state() == before
    check_env(env, skip_render_check=True)


class Quiz(gym.Env):
    """Ends after three steps: action 0 passes, 1 fails, 2 never gets that far."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple:
        self.steps += 1
        done = self.steps == 3
        info = {"success": False} if done and action == 1 else {}
        return np.zeros(1, np.float32), 0.0, done and action < 2, done and action == 2, info


@pytest.mark.parametrize("has_success", [True, False])
def test_success_termination_and_truncation_are_told_apart(has_success: bool) -> None:
    """An ending in failure is a termination too; where success is unknown, batches have none."""
    env = PythonVectorEnv([Quiz() for _ in range(3)], 3, has_success=has_success)
    env.reset([0, 1, 2])
    steps = [env.step(np.arange(3)) for _ in range(4)]
    for t, step in enumerate(steps):
        assert step.terminated.tolist() == [t == 2, t == 2, False]
        assert step.truncated.tolist() == [False, False, t == 2]
        if has_success:
            assert step.success is not None
            assert step.success.tolist() == [t == 2, False, False]
        else:
            assert step.success is None

    policy = make_policy("gru", 1, 3, hidden_size=4)
    batches = [Rollout(env, policy, seed).collect() for seed in (0, 1)]
    both = concatenate(batches)
    last = both.actions[2]
    expected = (last == 0).tolist() if has_success else None
    assert (both.success if both.success is None else both.success.tolist()) == expected
    assert ("success_rate" in both.statistics()) == has_success
    assert ("success" in both.tensors()) == has_success


def test_no_environments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        make_vector("labyrinth_escape", 0)
