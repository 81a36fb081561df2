"""The vectorised card games against popgym's own, stepped one by one."""

import numpy as np
import pytest

from sgrl.envs.cards import GAMES, VectorCards
from sgrl.envs.registry import VectorEnv, make_vector, observation_shape

# Of 415 and 831 steps.
FEWER_EPISODES = {"popgym-RepeatFirstMedium-v0": 8, "popgym-RepeatFirstHard-v0": 4}


def episodes(env: VectorEnv, seeds: list[int], actions: np.ndarray) -> list[np.ndarray]:
    """Observations [B, T + 1, F], rewards, terminated and truncated [B, T]."""
    first = env.reset(seeds)
    steps = [env.step(step_actions) for step_actions in actions]
    observations, rewards, terminated, truncated = (
        np.stack([getattr(step, name) for step in steps], 1)
        for name in ("observations", "rewards", "terminated", "truncated")
    )
    return [np.concatenate([first[:, None], observations], 1), rewards, terminated, truncated]


@pytest.mark.parametrize("env", GAMES)
@pytest.mark.parametrize("previous_action", [False, True])
def test_random_episodes_equal_popgym(env: str, previous_action: bool) -> None:
    """Past their end, too; with small seeds and with ones of more than 32 bits."""
    count = FEWER_EPISODES.get(env, 100 if "RepeatPrevious" in env else 30)
    config = {"previous_action": previous_action}
    vectorised = make_vector(env, count, config)
    python = make_vector(env, count, config | {"vectorized": False})
    assert isinstance(vectorised, VectorCards)
    assert not isinstance(python, VectorCards)
    assert vectorised.observation_shape == observation_shape(env, config)
    assert vectorised.observation_shape == python.observation_shape
    assert vectorised.action_space == python.action_space
    assert vectorised.seed_spacing == python.seed_spacing
    assert vectorised.has_success == python.has_success
    rng = np.random.default_rng(len(env))
    length = vectorised.episode_length
    actions = rng.integers(vectorised.num_actions, size=(length + 2, count))
    seeds = [*range(count // 2), *rng.integers(2**60, size=count - count // 2).tolist()]
    for one, other in zip(
        episodes(vectorised, seeds, actions), episodes(python, seeds, actions), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("env", [name for name in GAMES if "Easy" in name])
def test_right_answers_equal_popgym(env: str) -> None:
    """Nothing is lost where every answer is right."""
    vectorised = make_vector(env, 5)
    python = make_vector(env, 5, {"vectorized": False})
    assert isinstance(vectorised, VectorCards)
    seeds = [3, 4, 5, 6, 7]
    vectorised.reset(seeds)
    actions = np.maximum(vectorised._answers, 0)
    outcomes = [episodes(one, seeds, actions) for one in (vectorised, python)]
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])
    assert (outcomes[0][1] >= 0).all()
    if "HigherLower" not in env:
        np.testing.assert_allclose(outcomes[0][1].sum(1), 1, atol=0.05)


def test_shorter_episodes_equal_popgym() -> None:
    config = {"episode_length": 20}
    actions = np.random.default_rng(0).integers(4, size=(22, 10))
    vectorised, python = (
        make_vector("popgym-RepeatPreviousEasy-v0", 10, config | {"vectorized": vectorized})
        for vectorized in (True, False)
    )
    seeds = list(range(10))
    for one, other in zip(
        episodes(vectorised, seeds, actions), episodes(python, seeds, actions), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_other_settings_are_popgyms_own() -> None:
    env = make_vector("popgym-RepeatPreviousEasy-v0", 2, {"k": 2})
    assert not isinstance(env, VectorCards)
