"""Checks of one grid point of one method, before a trial's processes would find out."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sgrl.annotations import MAPPING
from sgrl.errors import one_line
from sgrl.results.plan import Point, Problem, TrialConfig
from sgrl.tuning.experiment.file import ALIASES, check_known, stop_problems
from sgrl.tuning.experiment.sections import build_algorithm_config, section_problems
from sgrl.user_code import FAILURES, described, module_of


def point_problems(
    algorithm: str, config_class: Any, point: Point, places: Callable[[], Mapping[str, str]]
) -> list[Problem]:
    """Return what is wrong with a grid point, its keys as in config.training.lr and model.

    Args:
        algorithm: its name.
        config_class: of the algorithm's configuration; None where there is no such algorithm.
        point: what is checked; an empty model is said to be wrong already.
        places: tells where keys stand that may have been meant.
    """
    content = point.content
    found = stop_problems(content["stop"])
    has_model = bool(content["model"])
    if has_model:
        found += _model_problems(content["model"], places)
    if not isinstance(content["config"], dict):
        return [*found, Problem("config", f"expected {MAPPING}, got {content['config']!r}")]
    if config_class is not None:
        found += section_problems(config_class, content["config"], places)
    has_model = has_model and not any(p.key == "model" for p in found)
    if not any(f"{p.key}.".startswith("config.environment.") for p in found):
        environment = list(_environment_problems(content["config"].get("environment", {})))
        if has_model and not environment:
            environment += _observation_problems(content)
        found += environment
    if has_model and not found and config_class is not None:
        found += _rllib_problems(algorithm, point)
    return found


def _model_problems(
    model: dict[str, Any], places: Callable[[], Mapping[str, str]]
) -> Iterator[Problem]:
    from sgrl.rllib.module import policy_arguments

    try:
        policy_arguments(model)
    except (ValueError, TypeError) as error:
        said = one_line(error)
        for key in model:
            wrong, meant = f"has no setting {key!r};", places().get(ALIASES.get(key, key))
            if meant and wrong in said:
                said = f"{said.partition(wrong)[0]}{wrong} did you mean {meant!r}?"
        yield Problem("model", said)


def _environment_problems(section: dict[str, Any]) -> Iterator[Problem]:
    from gymnasium import registry

    from sgrl.envs.by_id import is_known, unknown_of_module
    from sgrl.envs.registry import ENVIRONMENTS, validate_env_config

    key = "config.environment.env"
    env = section.get("env")
    if env is None:
        ids = "or an id of gymnasium, as in CartPole-v1 or popgym-RepeatPreviousEasy-v0"
        yield Problem(key, f"missing; one of {', '.join(ENVIRONMENTS)}, {ids}")
        return
    try:
        if not is_known(env):
            if missing := unknown_of_module(env):
                raise Problem(key, missing)
            check_known(key, "environment", env, [*ENVIRONMENTS, *registry])
        key = "config.environment.env_config"
        validate_env_config(env, section.get("env_config") or {})
    except ValueError as error:
        yield Problem(key, one_line(error))


def _observation_problems(content: dict[str, Any]) -> Iterator[Problem]:
    """Whether the policy can read what the environment shows.

    One of the user's own is built and run for a step.
    """
    import torch

    from sgrl.envs.registry import observation_shape
    from sgrl.nn.registry import make_policy, policy_settings
    from sgrl.rllib.module import policy_arguments

    section = content["config"]["environment"]
    arguments = policy_arguments(content["model"])
    settings = {key: arguments[key] for key in arguments if key not in ("name", "seed", "dtype")}
    name, shape = arguments["name"], observation_shape(section["env"], section.get("env_config"))
    try:
        policy_settings(name, settings).check_observations(shape)
    except ValueError as error:
        yield Problem("model", one_line(error))
        return
    if module_of(name):
        try:
            observations = torch.zeros(1, 1, math.prod(shape))
            logits = make_policy(name, shape, 2, **settings)(observations).logits
            if logits.shape != (1, 1, 2):
                found = tuple(logits.shape)
                yield Problem("model", f"{name} returns logits {found} where [T, B, A] = (1, 1, 2)")
        except FAILURES as error:
            yield Problem("model", f"{name} fails: {described(error)}")


def _rllib_problems(algorithm: str, point: Point) -> Iterator[Problem]:
    trial = {"algorithm": algorithm, "method": point.method, "seed": 0, **point.content}
    try:
        build_algorithm_config(TrialConfig.from_dict(trial)).validate()
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        # RLlib's advice at the end is to check nothing.
        message = one_line(error).partition(" To suppress all validation errors")[0]
        yield Problem("config", message)
