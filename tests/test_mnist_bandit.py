"""The MNIST bandit: its distribution, its two forms, and learning on it."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from sgrl.envs.mnist import load
from sgrl.envs.mnist_bandit import PUBLISHED_CLASSES, MNISTBanditEnv, uniform
from sgrl.envs.registry import evaluation_config, make_vector, validate_env_config
from sgrl.nn.registry import make_policy
from sgrl.reinforce.rollout import Rollout

MANY = 20_000


def test_registered_with_gymnasium() -> None:
    env = gym.make("sgrl.envs:sgrl/MNISTBandit-v0", p_flip=0.0, split="test")
    assert isinstance(env.unwrapped, MNISTBanditEnv)
    assert env.action_space == gym.spaces.Discrete(9)
    check_env(env.unwrapped)
    first, _ = env.reset(seed=3)
    assert not np.array_equal(env.reset()[0], first)  # goes on by itself
    assert np.array_equal(env.reset(seed=3)[0], first)


def test_uniform_numbers() -> None:
    seeds = np.arange(MANY, dtype=np.uint64)
    first, second = uniform(seeds, 0), uniform(seeds, 1)
    assert uniform(seeds[7:8], 0) == first[7]
    for numbers in (first, second):
        assert ((numbers >= 0) & (numbers < 1)).all()
        counts, _ = np.histogram(numbers, 20, (0, 1))
        # Chi-squared of 19 degrees of freedom: 43.8 is passed once in a thousand times.
        assert ((counts - MANY / 20) ** 2 / (MANY / 20)).sum() < 43.8
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_contexts_labels_and_flips() -> None:
    classes = [7, 1, 4]
    env = make_vector("mnist_bandit", MANY, {"classes": classes, "p_flip": 0.25})
    observations = env.reset(range(MANY))
    images, labels = load("train")
    allowed = np.isin(labels, classes)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    pixels = np.rint((observations * 0.3081 + 0.1307) * 255).astype(np.uint8)
    digits = np.array([known[row.tobytes()] for row in pixels])
    expected = ((pixels / 255 - 0.1307) / 0.3081).astype(np.float32)
    np.testing.assert_array_equal(observations, expected)
    for digit in classes:
        share = (labels[allowed] == digit).mean()
        assert (digits == digit).mean() == pytest.approx(share, abs=0.015)
    actions = np.arange(MANY) % 3
    stepped = env.step(actions)
    right = digits == np.array(classes)[actions]
    np.testing.assert_array_equal(stepped.success, right)
    assert stepped.terminated.all()
    assert not stepped.truncated.any()
    flipped = stepped.rewards != right
    for kind in (right, ~right):
        assert flipped[kind].mean() == pytest.approx(0.25, abs=0.02)


def test_evaluation_sees_test_images_and_no_flips() -> None:
    settings = evaluation_config("mnist_bandit", {"classes": [3, 8], "p_flip": 0.4})
    assert settings == {"classes": [3, 8], "p_flip": 0.0, "split": "test"}
    env = make_vector("mnist_bandit", 500, settings)
    observations = env.reset(range(500))
    images, _ = load("test")
    known = {image.tobytes() for image in images}
    pixels = np.rint((observations * 0.3081 + 0.1307) * 255).astype(np.uint8)
    assert all(row.tobytes() in known for row in pixels)
    step = env.step(np.zeros(500, np.int64))
    np.testing.assert_array_equal(step.rewards, step.success)


def test_run_seeds_share_nothing() -> None:
    """Neighbouring seeds of a run start far apart, unlike the published labyrinths'."""
    policy = make_policy("dense", 784, 9, num_layers=1, hidden_size=4)
    batches = [Rollout(make_vector("mnist_bandit", 64), policy, seed).collect() for seed in (0, 1)]
    contexts = [{row.numpy().tobytes() for row in batch.observations[0]} for batch in batches]
    assert len(contexts[0] & contexts[1]) <= 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classes": [3]}, "classes must be at least two different digits"),
        ({"classes": [3, 3]}, "classes must be at least two different digits"),
        ({"classes": [3, 10]}, "classes must be at least two different digits"),
        ({"classes": "all"}, "classes must be at least two different digits"),
        ({"p_flip": 1.5}, "p_flip must be a number from 0 to 1"),
        ({"p_flip": "often"}, "p_flip must be a number from 0 to 1"),
        ({"split": "valid"}, "split must be 'train' or 'test'"),
        ({"data_dir": 3}, "data_dir must be a folder's name"),
        ({"pflip": 0.1}, "did you mean 'p_flip'"),
    ],
)
def test_bad_settings(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        validate_env_config("mnist_bandit", config)
    assert "\n" not in str(error.value)


def test_defaults() -> None:
    assert PUBLISHED_CLASSES == (0, 1, 3, 4, 5, 6, 7, 8, 9)
    defaults = validate_env_config("mnist_bandit", {})
    assert defaults["classes"] == list(PUBLISHED_CLASSES)
    assert (defaults["p_flip"], defaults["split"]) == (0.4, "train")
