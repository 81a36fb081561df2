"""The interface every environment is stepped through: B episodes side by side, one array each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sgrl.envs import guard

Observations = NDArray[np.float32]


def is_image(space: gym.Space) -> bool:
    """Whether observations are images: a Box of uint8 [height, width, channels]."""
    return isinstance(space, gym.spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8


def observation_shape(space: gym.Space) -> tuple[int, ...]:
    """The shape of observations as policies take it.

    Args:
        space: of observations.

    Returns:
        (height, width, channels) of images; else (F,), how many numbers a flat observation has.
    """
    if is_image(space) and space.shape is not None:
        return space.shape
    return (gym.spaces.flatdim(space),)


class StepResult(NamedTuple):
    """What one step of B environments gives; the arrays are new and the caller's to keep.

    Attributes:
        observations: float32 [B, F].
        rewards: float32 [B].
        terminated: bool [B], the episode ended by itself at this step, well or badly.
        truncated: bool [B], it was cut off by its length.
        success: bool [B], it ended in success; None unless `VectorEnv.has_success`.
    """

    observations: Observations
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: NDArray[np.bool_] | None


def is_success(terminated: bool, info: Mapping[str, Any]) -> bool:
    """Whether a step of a gymnasium environment that knows success ended its episode in success.

    It did if it terminated the episode, unless its info says "success": False.
    """
    return bool(terminated and info.get("success", True))


class VectorEnv(ABC):
    """B independent environments that start together and run one episode each per reset.

    All state after `reset(seeds)` derives from the seeds, so nothing has to be saved between
    batches, unless `get_state` returns something. A finished environment ignores its actions until
    the next reset: it repeats its terminal observation with reward 0 and all flags False.

    Attributes:
        num_envs: B.
        episode_length: configured length T; every episode ends within T steps.
        observation_size: F, length of a flat observation.
        num_actions: number of discrete actions; of environments with Discrete actions only.
        has_success: whether steps tell success. Where they do not, there is no success rate.
        seed_spacing: distance between the environment seeds of neighbouring run seeds. The
            published labyrinths have 1: run s + 1 starts with all but the first maze of run s.
    """

    num_envs: int
    episode_length: int
    observation_size: int
    num_actions: int
    has_success: bool = True
    seed_spacing: int = 1

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of one environment, see the function of that name; observations are flat in any case."""
        return (self.observation_size,)

    @property
    def action_space(self) -> gym.Space:
        """Of one environment: Discrete, MultiDiscrete, a Box [D] or a Tuple of these last two.

        Discrete and MultiDiscrete count from 0, a Box has no bounds.
        """
        return gym.spaces.Discrete(self.num_actions)

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> Observations:
        """Start one episode in every environment.

        Args:
            seeds: B integers in [0, seed_spacing * 2**32), environment e's episode is a function
                of seeds[e].

        Returns:
            First observations, float32 [B, F].

        Raises:
            ValueError: not exactly B seeds, or a seed out of range.
        """

    @abstractmethod
    def step(self, actions: NDArray[Any]) -> StepResult:
        """Advance every unfinished environment by one step.

        Args:
            actions: ignored where finished. Discrete: int64 [B], each in [0, num_actions);
                MultiDiscrete: int64 [B, number of factors]; Box: float32 [B, D]; Tuple: float32,
                the factors and then the numbers of the Box.

        Returns:
            What the step gave each environment.
        """

    def get_state(self) -> Any:
        """Return what the next episodes depend on beside their seeds, picklable.

        Returns:
            None where that is nothing.
        """
        return None

    def set_state(self, state: Any) -> None:  # noqa: B027 - not every environment has any
        """Continue from what `get_state` returned."""

    def close(self) -> None:  # noqa: B027 - not every environment holds anything
        """Release what the environments hold, such as windows and processes.

        Nothing else may be called afterwards.
        """

    def _check_seeds(self, seeds: Sequence[int]) -> None:
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"reset needs {self.num_envs} seeds, one per environment, got {len(seeds)}"
            )


class PythonVectorEnv(VectorEnv):
    """Gymnasium environments with Box observations, stepped one by one.

    Args:
        envs: B environments of one kind. What of their endings is a success, `is_success` says.
            `get_state` and `set_state` are theirs, where they have both.
        episode_length: their configured length T.
        seed_spacing: see `VectorEnv`.
        has_success: see `VectorEnv`.
    """

    def __init__(
        self,
        envs: Sequence[gym.Env],
        episode_length: int,
        seed_spacing: int = 1,
        has_success: bool = True,
    ) -> None:
        self.envs = list(envs)
        guard.number(self.envs)
        self.seed_spacing = seed_spacing
        self.has_success = has_success
        self.num_envs = len(self.envs)
        self.episode_length = episode_length
        self.observation_size = gym.spaces.flatdim(self.envs[0].observation_space)
        space = self.action_space
        self._discrete = isinstance(space, gym.spaces.Discrete)
        if isinstance(space, gym.spaces.Discrete):
            self.num_actions = int(space.n)
        self._observations = np.zeros((self.num_envs, self.observation_size), np.float32)
        self._finished = np.ones(self.num_envs, bool)

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return observation_shape(self.envs[0].observation_space)

    @property
    def action_space(self) -> gym.Space:
        return self.envs[0].action_space

    def reset(self, seeds: Sequence[int]) -> Observations:
        self._check_seeds(seeds)
        for e, (env, seed) in enumerate(zip(self.envs, seeds, strict=True)):
            observation, _ = env.reset(seed=int(seed))
            self._observations[e] = np.ravel(observation)
        self._finished[:] = False
        return self._observations.copy()

    def step(self, actions: NDArray[Any]) -> StepResult:
        rewards = np.zeros(self.num_envs, np.float32)
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.zeros(self.num_envs, bool)
        success = np.zeros(self.num_envs, bool) if self.has_success else None
        for e in np.flatnonzero(~self._finished):
            action = int(actions[e]) if self._discrete else actions[e]
            stepped = self.envs[e].step(action)
            observation, rewards[e], terminated[e], truncated[e], info = stepped
            self._observations[e] = np.ravel(observation)
            if success is not None:
                success[e] = is_success(terminated[e], info)
        self._finished |= terminated | truncated
        return StepResult(self._observations.copy(), rewards, terminated, truncated, success)

    def get_state(self) -> Any:
        states = [guard.get_state(env) for env in self.envs]
        return None if all(state is None for state in states) else states

    def set_state(self, state: Any) -> None:
        for env, its_state in zip(self.envs, state or [], strict=False):
            guard.set_state(env, its_state)

    def close(self) -> None:
        for env in self.envs:
            env.close()
