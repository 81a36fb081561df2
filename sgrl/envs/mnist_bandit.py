"""The MNIST contextual bandit: one image, one guess of its label, one noisy reward.

The context is an MNIST image, (pixel / 255 - 0.1307) / 0.3081; actions are indices into the list
of classes; the reward is 1 for the right one, else 0, and flipped with probability p_flip.
Training sees training images; evaluation sees test images and is never flipped.

An episode, its image and whether its reward is flipped, is a function of its seed alone, so
`MNISTBanditEnv` (gymnasium, registered as sgrl/MNISTBandit-v0) and `VectorMNISTBandit` (B at once)
give the same episodes.

Source: the paper, Section H.3.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sgrl.envs.mnist import PIXELS, Split, load
from sgrl.envs.vector import Observations, StepResult, VectorEnv

#: The published sweeps leave out the two.
PUBLISHED_CLASSES = (0, 1, 3, 4, 5, 6, 7, 8, 9)

_NORMALIZED = ((np.arange(256) / 255 - 0.1307) / 0.3081).astype(np.float32)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniform(seeds: NDArray[np.uint64], stream: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each seed, by SplitMix64 (Steele et al., OOPSLA 2014).

    Args:
        seeds: [B]; neighbouring ones give independent numbers.
        stream: which of a seed's numbers.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GAMMA) + np.uint64(stream) * _GAMMA)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class VectorMNISTBandit(VectorEnv):
    """B bandits side by side; every episode has one step.

    Success says that the guess was right, before any flip.

    Args:
        num_envs: B.
        classes: the digits that occur; an action is an index into them.
        p_flip: probability that a reward is flipped.
        split: "train" or "test" images.
        data_dir: folder of the MNIST files; see `sgrl.envs.mnist`.

    Attributes:
        images: as observed, float32 [B, 784].
        right: the right actions, int64 [B].
        flipped: whether the reward is flipped, bool [B].

    Raises:
        DataError: MNIST cannot be had.
    """

    episode_length = 1
    observation_size = PIXELS
    # Labyrinths of neighbouring run seeds share most of their mazes; bandits share nothing.
    seed_spacing = 2**32

    def __init__(
        self,
        num_envs: int,
        classes: Sequence[int],
        p_flip: float,
        split: Split,
        data_dir: str | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.num_actions = len(classes)
        self.p_flip = p_flip
        self._pixels, labels = load(split, data_dir)
        action_of_digit = np.full(10, -1)
        action_of_digit[list(classes)] = np.arange(len(classes))
        self._indices = np.flatnonzero(action_of_digit[labels] >= 0)
        self._labels = action_of_digit[labels[self._indices]]
        self._finished = np.ones(num_envs, bool)
        self.images = np.zeros((num_envs, PIXELS), np.float32)
        self.right = np.zeros(num_envs, np.int64)
        self.flipped = np.zeros(num_envs, bool)

    def reset(self, seeds: Sequence[int]) -> Observations:
        self._check_seeds(seeds)
        numbers = np.array([seed % 2**64 for seed in seeds], np.uint64)
        drawn = (uniform(numbers, 0) * len(self._indices)).astype(np.int64)
        self.images = _NORMALIZED[self._pixels[self._indices[drawn]]]
        self.right = self._labels[drawn]
        self.flipped = uniform(numbers, 1) < self.p_flip
        self._finished = np.zeros(self.num_envs, bool)
        return self.images.copy()

    def step(self, actions: NDArray[np.int64]) -> StepResult:
        running = ~self._finished
        right = actions == self.right
        rewards = np.where(running, right ^ self.flipped, 0).astype(np.float32)
        self._finished[:] = True
        truncated = np.zeros(self.num_envs, bool)
        return StepResult(self.images.copy(), rewards, running, truncated, running & right)


class MNISTBanditEnv(gym.Env[Observations, np.int64]):
    """One bandit as a gymnasium environment, sgrl/MNISTBandit-v0; see `VectorMNISTBandit`.

    Observations: Box(784), float32. Actions: Discrete(number of classes). Every episode terminates
    after one step; `info["success"]` says whether the guess was right, before any flip.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        classes: Sequence[int] = PUBLISHED_CLASSES,
        p_flip: float = 0.4,
        split: Split = "train",
        data_dir: str | None = None,
    ) -> None:
        self._bandit = VectorMNISTBandit(1, classes, p_flip, split, data_dir)
        low, high = _NORMALIZED[0], _NORMALIZED[-1]
        self.observation_space = gym.spaces.Box(low, high, (PIXELS,), np.float32)
        self.action_space = gym.spaces.Discrete(len(classes))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**63))
        return self._bandit.reset([seed])[0], {}

    def step(self, action: Any) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        step = self._bandit.step(np.array([action]))
        assert step.success is not None
        info = {"success": bool(step.success[0])}
        return step.observations[0], float(step.rewards[0]), True, False, info
