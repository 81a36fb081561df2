"""Any environment that gymnasium knows by an id; POPGym's are registered here.

Ids are gymnasium's, as in `popgym-RepeatPreviousEasy-v0` or `CartPole-v1`; of a module that
registers its environments when imported, `module:Id-v0`. A class that is registered nowhere is
named `module:Class`. Observations are flattened to a Box [F]
(Discrete and MultiDiscrete one-hot, the parts of a Tuple or Dict one after the other), but for
images, a Box of uint8 [height, width, channels].

Source of POPGym: Morad et al., "POPGym", ICLR 2023.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import popgym.envs
from gymnasium.envs.registration import EnvSpec
from popgym.core.env import POPGymEnv

from sgrl.envs.guard import Guard, failure
from sgrl.envs.vector import is_image, observation_shape
from sgrl.envs.wrappers import IsolateRandomState, PlainActions, PreviousAction
from sgrl.errors import one_line
from sgrl.names import did_you_mean
from sgrl.user_code import FAILURES, import_named

#: Ids of POPGym's environments, every family and difficulty.
POPGYM_IDS: tuple[str, ...] = tuple(entry["id"] for entry in popgym.envs.ALL.values())

#: The env_config keys that are ours; all others are handed to the environment's constructor.
DEFAULTS: dict[str, Any] = {"episode_length": None, "previous_action": False, "flatten": True}


class Description(NamedTuple):
    """Properties of an environment that are known once it is built.

    Attributes:
        observation_shape: (F,) of the flattened observation, or (height, width, channels).
        episode_length: T.
    """

    observation_shape: tuple[int, ...]
    episode_length: int


def is_known(env: Any) -> bool:
    """Whether gymnasium has an environment of that id, or a module such a class.

    Raises:
        UserCodeError: the module of `module:Id-v0` cannot be imported.
    """
    return isinstance(env, str) and _spec(env) is not None


def _spec(env: str) -> EnvSpec | None:
    """What gymnasium makes an environment from; None of one that is not known."""
    module, colon, name = env.rpartition(":")
    if not module:
        return None if colon else gym.registry.get(name)
    before = set(gym.registry)
    there = vars(import_named(module))
    _registered.setdefault(module, set()).update(gym.registry.keys() - before)
    if name in gym.registry:
        return gym.registry[name]
    return EnvSpec(env, entry_point=there[name]) if _is_class(there.get(name)) else None


def _is_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, gym.Env)


#: The ids that appeared when a module was imported.
_registered: dict[str, set[str]] = {}


def unknown_of_module(env: Any) -> str | None:
    """What to say of `module:Id-v0` whose id is not known; None of an id without a module."""
    module, _, name = str(env).rpartition(":")
    if not module:
        return None
    there = vars(import_named(module))
    if name in there:
        return f"{name} of the module {module} is not derived from gymnasium.Env"
    own = [
        f"{module}:{known}"
        for known, spec in gym.registry.items()
        if known in _registered.get(module, ()) or _is_within(spec.entry_point, module)
    ]
    own += [
        f"{module}:{key}"
        for key, value in there.items()
        if _is_class(value) and value.__module__ == module
    ]
    meant = f"; {did_you_mean(env, own)}" if own else ""
    return f"the module {module} registers no {name}{meant}"


def _is_within(entry_point: Any, module: str) -> bool:
    place = entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return f"{place.partition(':')[0]}.".startswith(f"{module}.")


def make(
    env: str,
    episode_length: int | None = None,
    previous_action: bool = False,
    flatten: bool = True,
    **kwargs: Any,
) -> gym.Env:
    """Build one environment, watched, its random state kept to itself, its actions plain.

    Args:
        env: an id that `is_known`.
        episode_length: T, after which episodes are truncated; None leaves it to the environment.
        previous_action: whether observations end with the previous action (one-hot), as POPGym's
            wrapper of that name has it.
        flatten: whether observations other than images are flattened to a Box [F].
        kwargs: of the environment itself.

    Raises:
        ValueError: in one line, where it cannot be built or its spaces are not supported.
    """
    if kwargs and env in POPGYM_IDS and "Easy" not in env:
        # popgym's medium and hard classes are fixed, and some swallow whatever they are given.
        key = next(iter(kwargs))
        raise ValueError(f"unknown env_config key {key!r}; {did_you_mean(key, DEFAULTS)}")
    spec = _spec(env)
    assert spec is not None  # since it is known
    try:
        # Time is limited outside of the guard, which sees what the environment itself returns.
        made = gym.make(spec, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        raise ValueError(f"a package is missing: {one_line(error)}") from None
    except FAILURES as error:
        # Whatever a constructor that is not ours raises; a keyword it does not take above all.
        # A TypeError is worded anew by gymnasium.
        reworded = "was raised from the environment creator" in str(error)
        original = (reworded and error.__context__) or error
        raise ValueError(f"cannot be built: {failure(original)}") from original
    made = Guard(made)
    length = episode_length or spec.max_episode_steps
    if length is not None:
        made = gym.wrappers.TimeLimit(made, length)
    if previous_action:
        made = PreviousAction(made)
    if flatten and not is_image(made.observation_space):
        try:
            made = gym.wrappers.FlattenObservation(made)
        except (NotImplementedError, ValueError, TypeError):
            space = made.observation_space
            raise ValueError(f"the observation space {space} cannot be flattened") from None
        if not isinstance(made.observation_space, gym.spaces.Box):
            raise ValueError(f"the observation space {made.observation_space} has no fixed size")
    # Some environments take no seed beyond a signed 32-bit number. POPGym's all do.
    bits = 32 if isinstance(made.unwrapped, POPGymEnv) else 31
    return IsolateRandomState(PlainActions(made), seed_bits=bits)


_descriptions: dict[tuple[str, str], Description] = {}


def describe(env: str, config: Mapping[str, Any]) -> Description:
    """Instantiate the environment once to read its observation size and episode length.

    Args:
        env: an id that `is_known`.
        config: arguments of `make`.

    Raises:
        ValueError: in one line; as `make`, for an impossible setting, or where nothing says how
            long an episode is.
    """
    key = env, repr(sorted(config.items()))
    if key not in _descriptions:
        _check(config)
        made = make(env, **config)
        length = config["episode_length"] or _own_length(made)
        if length is None:
            raise ValueError("its episodes have no end of their own: give episode_length, in steps")
        shape = observation_shape(made.observation_space)
        made.close()
        _descriptions[key] = Description(shape, length)
    return _descriptions[key]


def _check(config: Mapping[str, Any]) -> None:
    length = config["episode_length"]
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"episode_length must be a whole number of at least 1, got {length!r}")
    for name in ("previous_action", "flatten"):
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be true or false, got {config[name]!r}")


def _own_length(env: gym.Env) -> int | None:
    """Steps after which the environment ends its episodes by itself, where it says so."""
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return env.spec.max_episode_steps
    plain: Any = env.unwrapped
    if not isinstance(plain, POPGymEnv):
        return None
    # Concentration and HigherLower have names of their own for it.
    for name in ("max_episode_length", "episode_length"):
        if hasattr(plain, name):
            return getattr(plain, name)
    return plain.deck_size - 1
