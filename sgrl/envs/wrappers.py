"""Wrappers around gymnasium environments: random state, actions, previous action."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from popgym.wrappers import PreviousAction as POPGymPreviousAction


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Put the process-wide `random` and `np.random` states back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def seed_of_32_bits(seed: int) -> int:
    """The seed itself below 2**32, others hashed: `np.random` and mazelib take no larger ones."""
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def seed_of_31_bits(seed: int) -> int:
    """Bring a seed below 2**31.

    What does not fit is hashed, so that no two ranges of seeds coincide.
    """
    seed = seed_of_32_bits(seed)
    if seed < 2**31:
        return seed
    return int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1


class IsolateRandomState(gym.Wrapper):
    """Keeps an environment's use of the process-wide generators inside it.

    popgym reseeds `random` and `np.random` in `reset(seed)` and draws its maze from them. Here
    both are put back afterwards, and a reset without a seed takes its seed from the
    environment's own `np_random`, so the episodes follow from the last seed alone.

    Args:
        env: the environment.
        seed_bits: 32 or 31; the size of the seeds that it gets.
    """

    def __init__(self, env: gym.Env, seed_bits: int = 32) -> None:
        super().__init__(env)
        self._fit = seed_of_32_bits if seed_bits == 32 else seed_of_31_bits

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is None:
            seed = int(self.np_random.integers(2**32))
        with preserved_random_state():
            return self.env.reset(seed=self._fit(seed), options=options)


class PreviousAction(gym.Wrapper):
    """Appends the previous action to the observation, as popgym's wrapper of this name does.

    That one takes popgym's environments only; its rules, which serve any, are used here. Before
    the first step the action is 0, or the space's lowest if 0 is not an action.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._inner_space = env.observation_space
        leaves = map(_null_action, _leaves(env.action_space))
        self._null_action = _nested(env.action_space, leaves)
        self.observation_space = POPGymPreviousAction.add_act_space_to_obs_space(
            env.observation_space, env.action_space
        )

    def _append(self, observation: Any, action: Any) -> Any:
        return POPGymPreviousAction.add_act_to_obs(self._inner_space, observation, action)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._append(observation, self._null_action), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._append(observation, action), reward, terminated, truncated, info


class PlainActions(gym.ActionWrapper):
    """Convert an environment's actions into those that policies give.

    These are Discrete or MultiDiscrete counted from 0, or a Box without bounds; MultiDiscrete and
    Box on one axis. What a Tuple or Dict holds, however deep, is put side by side: choices in a
    MultiDiscrete, numbers in a Box, and where there are both in a Tuple of these two, whose actions
    may also be given as one row of numbers.

    MultiBinary becomes MultiDiscrete. What a Box without bounds gives is clipped to the bounds of
    the environment's own. RLlib rescales actions of a bounded Box only, so the actions of its
    algorithms mean the same as ours.

    Raises ValueError for another action space.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space = self._space = env.action_space
        leaves = list(_leaves(space))
        plain = [_plain(leaf) for leaf in leaves]
        choices = [
            s.nvec if isinstance(s, gym.spaces.MultiDiscrete) else [s.n]
            for s in plain
            if not isinstance(s, gym.spaces.Box)
        ]
        numbers = sum(s.shape[0] for s in plain if isinstance(s, gym.spaces.Box))
        merged: list[gym.Space] = []
        if choices:
            merged.append(gym.spaces.MultiDiscrete(np.concatenate(choices)))
        if numbers:
            merged.append(gym.spaces.Box(-np.inf, np.inf, (numbers,), np.float32))
        if not merged:
            raise _unsupported(space)
        if isinstance(space, gym.spaces.Tuple | gym.spaces.Dict):
            self.action_space = merged[0] if len(merged) == 1 else gym.spaces.Tuple(merged)
        else:
            self.action_space = plain[0]
        #: Each leaf, and its place in a row of all choices and then all numbers.
        self._leaves: list[tuple[gym.Space, slice]] = []
        start = {False: 0, True: sum(map(len, choices))}
        for leaf, flat in zip(leaves, plain, strict=True):
            kind, size = isinstance(flat, gym.spaces.Box), int(np.prod(flat.shape or ()))
            self._leaves.append((leaf, slice(start[kind], start[kind] + size)))
            start[kind] += size

    def action(self, action: Any) -> Any:
        if isinstance(action, tuple):
            action = np.concatenate(action)
        row = np.ravel(action)
        return _nested(self._space, (_restored(leaf, row[where]) for leaf, where in self._leaves))


def _null_action(space: gym.Space) -> Any:
    if isinstance(space, gym.spaces.MultiDiscrete):  # popgym's fails where they do not start at 0
        zeros = np.zeros_like(space.start)
        return zeros if space.contains(zeros) else space.start
    return POPGymPreviousAction.get_null_action(space)


def _leaves(space: gym.Space) -> Iterator[gym.Space]:
    """What a Tuple or Dict holds, in its order."""
    match space:
        case gym.spaces.Tuple():
            for part in space.spaces:
                yield from _leaves(part)
        case gym.spaces.Dict():
            for part in space.spaces.values():
                yield from _leaves(part)
        case _:
            yield space


def _nested(space: gym.Space, leaves: Iterator[Any]) -> Any:
    """The leaves, in their order, in a space's Tuples and Dicts."""
    match space:
        case gym.spaces.Tuple():
            return tuple(_nested(part, leaves) for part in space.spaces)
        case gym.spaces.Dict():
            return {key: _nested(part, leaves) for key, part in space.spaces.items()}
    return next(leaves)


def _plain(space: gym.Space) -> gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.Box:
    match space:
        case gym.spaces.Discrete():
            return gym.spaces.Discrete(int(space.n))
        case gym.spaces.MultiDiscrete():
            return gym.spaces.MultiDiscrete(space.nvec.ravel())
        case gym.spaces.MultiBinary():
            return gym.spaces.MultiDiscrete([2] * int(np.prod(space.shape)))
        case gym.spaces.Box() if np.issubdtype(space.dtype, np.floating):
            return gym.spaces.Box(-np.inf, np.inf, (int(np.prod(space.shape)),), np.float32)
    raise _unsupported(space)


def _restored(space: gym.Space, row: NDArray[Any]) -> Any:
    """A row of a plain action, in the environment's own space."""
    if isinstance(space, gym.spaces.Discrete):
        return int(row[0]) + int(space.start)
    action = np.reshape(row, space.shape or ())
    if isinstance(space, gym.spaces.MultiDiscrete):
        action = action + space.start
    elif isinstance(space, gym.spaces.Box):
        action = np.clip(action, space.low, space.high)
    return np.array(action, space.dtype)


def _unsupported(space: gym.Space) -> ValueError:
    return ValueError(
        f"the action space {space} is not supported: it must be Discrete, MultiDiscrete, "
        "MultiBinary or a Box of real numbers, or a Tuple or Dict of these"
    )


#: Apart from an environment's other random numbers of the same seed.
_REWARD_NOISE_STREAM = 1


def reward_noise_of(seed: int | None) -> np.random.Generator:
    """Source of the standard normal numbers, one a step, behind an episode's `NoisyReward`."""
    return np.random.default_rng(None if seed is None else [seed, _REWARD_NOISE_STREAM])


class NoisyReward(gym.Wrapper):
    """Gaussian noise on every step's reward, from a generator of the episode's seed.

    What a policy earns in expectation stays as it is, and so does success: feedback merely tells
    less of it (the paper's condition A.1).
    """

    def __init__(self, env: gym.Env, std: float) -> None:
        super().__init__(env)
        self.std = std
        self._draws: np.random.Generator | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None or self._draws is None:
            self._draws = reward_noise_of(seed)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        assert self._draws is not None
        noisy = float(reward) + self.std * self._draws.standard_normal()
        return observation, noisy, terminated, truncated, info
