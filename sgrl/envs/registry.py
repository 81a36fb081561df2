"""Environments by name, as experiment files write them.

A name is one of `ENVIRONMENTS` or any id of gymnasium, POPGym's among them (see `sgrl.envs.by_id`).
Of those, "success" is unknown: a policy is judged by the return of its episodes.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from sgrl.annotations import accepts
from sgrl.envs import by_id
from sgrl.envs.cards import GAMES
from sgrl.envs.labyrinth import VectorEscape, VectorExplore, make_escape, make_explore
from sgrl.envs.mnist import Report, fetch
from sgrl.envs.mnist_bandit import PUBLISHED_CLASSES, MNISTBanditEnv, VectorMNISTBandit
from sgrl.envs.vector import PythonVectorEnv, VectorEnv
from sgrl.names import did_you_mean
from sgrl.user_code import UserCodeError

if TYPE_CHECKING:
    import torch

    from sgrl.envs.device import DeviceEnv


@dataclass(frozen=True)
class EnvEntry:
    """One registered environment.

    Attributes:
        defaults: every key its env_config may hold, with the default. All are keyword arguments
            of `single` and `vector`, so a key is declared here and nowhere else.
        single: builds one gymnasium environment.
        vector: the `VectorEnv` class of the vectorised environment; its first argument is
            num_envs.
        check: raises ValueError (one line, naming the key) on an impossible value.
        evaluation: settings in which evaluation differs from training.
        prepare: fetches what the environment needs, once, before many processes build it; raises
            an error whose message is one line.
    """

    defaults: Mapping[str, Any]
    single: Callable[..., gym.Env]
    vector: Any
    check: Callable[[Mapping[str, Any]], None]
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Mapping[str, Any], Report], object] | None = None


def _check_probability(key: str, value: Any) -> None:
    if not accepts(float, value) or not 0 <= value <= 1:
        raise ValueError(f"{key} must be a number from 0 to 1, got {value!r}")


def _check_labyrinth(config: Mapping[str, Any]) -> None:
    dims, length = config["maze_dims"], config["episode_length"]
    if not accepts(tuple[int, int], dims) or any(size < 6 or size % 2 for size in dims):
        raise ValueError(
            f"maze_dims must be [height, width], two even numbers of at least 6, got {dims!r}"
        )
    if not accepts(int, length) or length < 2:
        raise ValueError(f"episode_length must be a whole number of at least 2, got {length!r}")
    _check_probability("zero_reward_probability", config.get("zero_reward_probability", 0))
    noise = config["reward_noise"]
    if not accepts(float, noise) or not 0 <= noise < math.inf:
        raise ValueError(f"reward_noise must be a number of at least 0, got {noise!r}")


def _check_bandit(config: Mapping[str, Any]) -> None:
    classes = config["classes"]
    digits = set(classes) if accepts(list[int], classes) else set()
    if len(digits) < 2 or len(digits) != len(classes) or not digits <= set(range(10)):
        raise ValueError(f"classes must be at least two different digits, got {classes!r}")
    _check_probability("p_flip", config["p_flip"])
    if config["split"] not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {config['split']!r}")
    if not isinstance(config["data_dir"], str | None):
        raise ValueError(f"data_dir must be a folder's name, got {config['data_dir']!r}")


ENVIRONMENTS: dict[str, EnvEntry] = {
    "labyrinth_escape": EnvEntry(
        defaults={"maze_dims": [6, 6], "episode_length": 80, "reward_noise": 0.0},
        single=make_escape,
        vector=VectorEscape,
        check=_check_labyrinth,
        evaluation={"reward_noise": 0.0},
    ),
    "labyrinth_explore": EnvEntry(
        defaults={
            "maze_dims": [6, 6],
            "episode_length": 40,
            "zero_reward_probability": 0.75,
            "reward_noise": 0.0,
        },
        single=make_explore,
        vector=VectorExplore,
        check=_check_labyrinth,
        evaluation={"reward_noise": 0.0},
    ),
    "mnist_bandit": EnvEntry(
        defaults={
            "classes": list(PUBLISHED_CLASSES),
            "p_flip": 0.4,
            "split": "train",
            "data_dir": None,
        },
        single=MNISTBanditEnv,
        vector=VectorMNISTBandit,
        check=_check_bandit,
        evaluation={"split": "test", "p_flip": 0.0},
        prepare=lambda config, report: fetch(config["data_dir"], report),
    ),
}


#: The seeds of a run of one gymnasium environment are a stretch of their own, as the bandit's are.
GYMNASIUM_SEED_SPACING = 2**32


def validate_env_config(env: str, env_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check an environment's name and settings before anything is built.

    An environment of gymnasium is built once, to see that it can be.

    Args:
        env: a name in `ENVIRONMENTS`, or an id of gymnasium.
        env_config: settings that differ from the entry's defaults; besides them `vectorized`
            (true; false steps the Python environments one by one). Of a gymnasium environment:
            `sgrl.envs.by_id.make`'s, `vectorized`, and any keyword the environment itself takes.

    Returns:
        The settings with every default filled in, `vectorized` included.

    Raises:
        ValueError: unknown name or key (with the nearest valid one), or an impossible value.
    """
    try:
        there = isinstance(env, str) and (env in ENVIRONMENTS or by_id.is_known(env))
    except UserCodeError as error:
        raise ValueError(f"{env}: {error}") from error
    if not there:
        missing = by_id.unknown_of_module(env)
        if missing is not None:
            raise ValueError(f"unknown environment {env!r}: {missing}")
        raise ValueError(
            f"unknown environment {env!r}; "
            f"{did_you_mean(env, [*ENVIRONMENTS, *gym.registry])} (there are "
            f"{', '.join(ENVIRONMENTS)}, and gymnasium's and POPGym's ids; one that a module of "
            "yours registers is written module:Id-v0, a class of yours module:Class)"
        )
    if not isinstance(env_config, Mapping | None):
        raise ValueError(f"{env}: env_config must hold keys and values, got {env_config!r}")
    entry = ENVIRONMENTS.get(env)
    known = {**(entry.defaults if entry else by_id.DEFAULTS), "vectorized": True}
    config = copy.deepcopy({**known, **(env_config or {})})
    for key in config:
        if entry and key not in known:
            raise ValueError(f"{env}: unknown env_config key {key!r}; {did_you_mean(key, known)}")
    if not isinstance(config["vectorized"], bool):
        raise ValueError(f"{env}: vectorized must be true or false, got {config['vectorized']!r}")
    try:
        if entry:
            entry.check(config)
        else:
            settings = {key: value for key, value in config.items() if key != "vectorized"}
            config["episode_length"] = by_id.describe(env, settings).episode_length
    except ValueError as error:
        raise ValueError(f"{env}: {error}") from None
    return config


def check_flat(env: str, env_config: Mapping[str, Any]) -> None:
    """Check that settings flatten observations, since episode batches hold flat ones.

    Raises:
        ValueError: they leave observations as they are.
    """
    if not env_config.get("flatten", True):
        raise ValueError(
            f"{env}: flatten must be true here: episode batches hold flat observations"
        )


def observation_shape(env: str, env_config: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The shape of an environment's observations, as `VectorEnv.observation_shape`.

    Raises as `validate_env_config`.
    """
    config = validate_env_config(env, env_config)
    if env in ENVIRONMENTS:
        return (ENVIRONMENTS[env].vector.observation_size,)
    del config["vectorized"]
    return by_id.describe(env, config).observation_shape


def has_success(env: str) -> bool:
    """Whether an environment tells success from failure: ours do, those of gymnasium do not."""
    return env in ENVIRONMENTS


def evaluation_config(env: str, env_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings under which a policy trained with `env_config` is evaluated."""
    entry = ENVIRONMENTS.get(env)
    return {**(env_config or {}), **(entry.evaluation if entry else {})}


def prepare(env: str, env_config: Mapping[str, Any] | None, report: Report) -> None:
    """Fetch what an environment needs, once, before many processes build it.

    Args:
        env: a name in `ENVIRONMENTS`, or an id of gymnasium (which needs nothing).
        env_config: its settings.
        report: told of progress; see `sgrl.envs.mnist`.

    Raises:
        DataError: it cannot be had.
    """
    entry = ENVIRONMENTS.get(env)
    if entry is not None and entry.prepare is not None:
        entry.prepare(validate_env_config(env, env_config), report)


def make_single(env: str, env_config: Mapping[str, Any] | None = None) -> gym.Env:
    """One gymnasium environment with flat observations or images, its random state kept to itself.

    For the labyrinths it is popgym's own, wrapped. Raises ValueError as `validate_env_config`.
    Actions are as `sgrl.envs.wrappers.PlainActions` has them.
    """
    config = validate_env_config(env, env_config)
    del config["vectorized"]
    if env in ENVIRONMENTS:
        return ENVIRONMENTS[env].single(**config)
    return by_id.make(env, **config)


def make_vector(env: str, num_envs: int, env_config: Mapping[str, Any] | None = None) -> VectorEnv:
    """B = num_envs environments behind the `VectorEnv` interface.

    With `vectorized: false` in env_config, and where there is no vectorised version, they are
    `make_single` environments stepped one by one; the episodes are the same. Raises ValueError as
    `validate_env_config` and if num_envs is not positive.
    """
    config = validate_env_config(env, env_config)
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    vectorized = config.pop("vectorized")
    if env not in ENVIRONMENTS:
        check_flat(env, config)
        # Laid out for popgym's own settings, not for further ones.
        if vectorized and env in GAMES and set(config) == set(by_id.DEFAULTS):
            return GAMES[env](num_envs, config["episode_length"], config["previous_action"])
        singles = [by_id.make(env, **config) for _ in range(num_envs)]
        length = config["episode_length"]
        return PythonVectorEnv(singles, length, GYMNASIUM_SEED_SPACING, has_success(env))
    vector = ENVIRONMENTS[env].vector
    if vectorized:
        return vector(num_envs, **config)
    singles = [make_single(env, config) for _ in range(num_envs)]
    # Without that setting an environment's episodes have one step.
    length = config.get("episode_length", 1)
    return PythonVectorEnv(singles, length, vector.seed_spacing, has_success(env))


def make_device(
    env: str,
    num_runs: int,
    num_envs: int,
    env_config: Mapping[str, Any] | None = None,
    device: "torch.device | str" = "cpu",
) -> "DeviceEnv":
    """S = num_runs times B = num_envs environments as tensor code; see `sgrl.envs.device`.

    The episodes are those of `make_vector`. Raises ValueError as that does, if num_runs is not
    positive, for an environment that has no such version, and where there is no GPU.
    """
    # Not all who look up environments need it.
    import torch

    from sgrl.envs.device import DEVICE_ENVIRONMENTS

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"no GPU for the device {str(device)!r}: leave it at cpu")
    config = validate_env_config(env, env_config) | {"vectorized": True}
    if env not in DEVICE_ENVIRONMENTS:
        raise ValueError(
            f"{env} does not run on a device; there are {', '.join(DEVICE_ENVIRONMENTS)}"
        )
    if config.get("reward_noise"):
        raise ValueError(f"{env} has no reward_noise on a device: leave it at 0")
    if num_runs < 1 or num_envs < 1:
        raise ValueError(f"num_runs and num_envs must be at least 1, got {num_runs}, {num_envs}")
    vector = make_vector(env, num_runs * num_envs, config)
    return DEVICE_ENVIRONMENTS[env](vector, num_runs, device)
