"""Checks around third-party environments.

Errors and invalid returns are reported where they occur, and state that outlives an episode can be
saved.
"""

import copy
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np

from sgrl.errors import UserError
from sgrl.user_code import FAILURES, described

FLOAT32_MAX = float(np.finfo(np.float32).max)
STEP_PARTS = "(observation, reward, terminated, truncated, info)"


class EnvironmentFailed(UserError):
    """An environment raised, or returned what it must not; the message is one line."""


class Guard(gym.Wrapper):
    """Checks all that an environment raises and returns.

    Raises, from `reset` and `step`, EnvironmentFailed: the environment raised (the message says
    what, in which file and line), its observation or reward is NaN or infinite, or what it
    returned has another form than gymnasium's. FloatingPointError: the action is NaN, which is the
    policy's fault.

    Attributes:
        environment_index: number of this environment among those beside it, for the messages.
    """

    environment_index = 0

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._seed: int | None = None
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self._seed, self._steps = seed, 0
        try:
            result = self.env.reset(seed=seed, options=options)
        except FAILURES as error:
            raise self._failed(failure(error)) from error
        if not isinstance(result, tuple) or len(result) != 2:
            raise self._failed(f"reset returned {_form(result)}, not (observation, info)")
        self._check(result[0], result[1])
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._steps += 1
        if not _is_finite(action):
            shown = action.tolist() if isinstance(action, np.ndarray) else action
            raise FloatingPointError(f"the policy's action is {shown}{self._where()}")
        try:
            result = self.env.step(action)
        except FAILURES as error:
            raise self._failed(failure(error)) from error
        if not isinstance(result, tuple) or len(result) != 5:
            raise self._failed(f"step returned {_form(result)}, not {STEP_PARTS}")
        observation, reward, terminated, truncated, info = result
        fault = reward_fault(reward) or flag_fault(terminated) or flag_fault(truncated)
        if fault:
            raise self._failed(fault)
        self._check(observation, info)
        return observation, reward, bool(terminated), bool(truncated), info

    def close(self) -> None:
        try:
            self.env.close()
        except FAILURES as error:
            raise EnvironmentFailed(f"close failed: {failure(error)}") from error

    def _check(self, observation: Any, info: Any) -> None:
        fault = observation_fault(observation, self.env.observation_space)
        if fault:
            raise self._failed(fault)
        if not isinstance(info, Mapping):
            raise self._failed(f"info is {_form(info)}, not a dict")

    def _failed(self, fault: str) -> EnvironmentFailed:
        return EnvironmentFailed(f"{fault}{self._where()}")

    def _where(self) -> str:
        moment = f"step {self._steps}" if self._steps else "the reset"
        seed = "" if self._seed is None else f" (its seed is {self._seed})"
        return f" at {moment} of environment {self.environment_index}{seed}"


def failure(error: BaseException) -> str:
    """Say what an environment raised, as `described`.

    A SystemExit with which Ray ends its process on SIGTERM does not come from the environment, and
    is re-raised.
    """
    if isinstance(error, SystemExit):
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "sigterm_handler" for frame in frames):
            raise error
    return described(error)


def reward_fault(reward: Any) -> str | None:
    """What is wrong with a reward, None where it is a number that float32 holds."""
    if not isinstance(reward, int | float):
        kind = getattr(getattr(reward, "dtype", None), "kind", "f")  # torch's dtypes have none
        is_array = getattr(reward, "ndim", 0) > 0
        if is_array or kind not in "biuf" or not isinstance(reward, SupportsFloat):
            return f"reward is {_form(reward)}, not a number"
    try:
        value = float(reward)
    except (TypeError, ValueError, OverflowError):
        return f"reward is {reward!r}, not a number"
    if abs(value) <= FLOAT32_MAX:
        return None
    return f"reward is {named(value)}{', too large for float32' if np.isfinite(value) else ''}"


def observation_fault(observation: Any, space: gym.Space, name: str = "observation") -> str | None:
    """Describe what is wrong with an observation.

    Returns:
        None where it fits the space, whose bounds and dtype are not insisted on, and is finite.
    """
    parts: list[tuple[Any, gym.Space, str]] = []
    try:
        match space:
            case gym.spaces.Box():
                array = np.asarray(observation, space.dtype)
                if array.shape != space.shape:
                    return f"{name} is {_form(observation)}, not of its space {space}"
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    return f"{name} is {named(array[~np.isfinite(array)][0])}"
            case gym.spaces.Discrete() | gym.spaces.MultiDiscrete() | gym.spaces.MultiBinary():
                if not space.contains(np.asarray(observation, space.dtype)):
                    return f"{name} is {observation!r}, not of its space {space}"
            case gym.spaces.Dict():
                parts = [(observation[key], s, f"{name}[{key!r}]") for key, s in space.items()]
            case gym.spaces.Tuple():
                pairs = enumerate(zip(observation, space.spaces, strict=True))
                parts = [(part, s, f"{name}[{i}]") for i, (part, s) in pairs]
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        return f"{name} is {_form(observation)}, not of its space {space}"
    return next(filter(None, (observation_fault(*part) for part in parts)), None)


def _is_finite(action: Any) -> bool:
    match action:
        case tuple():
            return all(map(_is_finite, action))
        case Mapping():
            return all(map(_is_finite, action.values()))
    return not isinstance(action, np.ndarray) or bool(np.isfinite(action).all())


def named(number: float) -> str:
    """NaN, inf, -inf or the number."""
    return "NaN" if np.isnan(number) else f"{number:g}"


def flag_fault(flag: Any) -> str | None:
    """What is wrong with terminated or truncated, None where it is a bool, 0 or 1."""
    if isinstance(flag, bool | np.bool_):
        return None
    if not isinstance(flag, float | np.floating) and not np.ndim(flag) and flag in (0, 1):
        return None
    return f"terminated or truncated is {_form(flag)}, not a bool"


def _form(value: Any) -> str:
    """What kind of thing a value is."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def number(envs: Iterable[gym.Env]) -> None:
    """Number environments side by side, for the messages of their guards."""
    for index, env in enumerate(envs):
        env.set_wrapper_attr("environment_index", index, force=False)


def get_state(env: gym.Env) -> Any:
    """Copy what an environment keeps beyond an episode.

    Returns:
        None where it offers nothing: it needs both `get_state()` and `set_state(state)`.
    """
    if not _offers_state(env):
        return None
    try:
        return copy.deepcopy(env.get_wrapper_attr("get_state")())
    except FAILURES as error:
        raise EnvironmentFailed(f"get_state failed: {failure(error)}") from error


def set_state(env: gym.Env, state: Any) -> None:
    """Give an environment back what `get_state` returned; None changes nothing."""
    if state is None or not _offers_state(env):
        return
    try:
        env.get_wrapper_attr("set_state")(copy.deepcopy(state))
    except FAILURES as error:
        raise EnvironmentFailed(f"set_state failed: {failure(error)}") from error


def _offers_state(env: gym.Env) -> bool:
    # MuJoCo's environments have a set_state, POPGym's a get_state, of another meaning.
    return env.has_wrapper_attr("get_state") and env.has_wrapper_attr("set_state")
