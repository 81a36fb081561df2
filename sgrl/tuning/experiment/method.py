"""A method's model: its policy, the policy's defaults, and the backend it computes with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sgrl.errors import one_line
from sgrl.results.grids import is_open
from sgrl.results.plan import Problem
from sgrl.tuning.experiment.file import check_known
from sgrl.user_code import module_of

ONE_POLICY = (
    "a method is one policy; compare several as methods of their own, "
    "as in gru: {model: {policy: gru}}"
)


def complete_model(
    method: str, model: dict[str, Any], configs: Sequence[Any], packed: bool = False
) -> None:
    """Write into a model what it leaves to defaults, and the backend that `auto` stands for.

    A resumed sweep computes with what it was started with.

    Args:
        method: its name.
        model: changed in place.
        configs: the sections of AlgorithmConfig that apply to it.
        packed: whether its trials are packed.

    Raises:
        Problem: there is no such policy.
    """
    from sgrl.nn.registry import POLICIES, policy_class

    key = f"methods.{method}.model"
    if "policy" not in model:
        if "grid" in model:
            raise Problem(key, ONE_POLICY)
        raise Problem(f"{key}.policy", f"missing; one of {', '.join(POLICIES)}")
    if isinstance(model["policy"], dict):
        raise Problem(f"{key}.policy", f"expected the policy's name: {ONE_POLICY}")
    if module_of(model["policy"]):
        try:
            policy_class(model["policy"])
        except ValueError as error:
            raise Problem(f"{key}.policy", one_line(error)) from None
    else:
        check_known(f"{key}.policy", "policy", model["policy"], list(POLICIES))
    model.update(with_defaults(model))
    backend = model.get("backend")
    if backend == "auto":
        model["backend"] = _automatic_backend(model, configs, packed)
    elif isinstance(backend, dict) and isinstance(backend.get("grid"), list):
        backend["grid"] = [
            _automatic_backend(model, configs, packed) if b == "auto" else b
            for b in backend["grid"]
        ]


def as_recorded(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model of a sweep that has begun, with what its trials were computed with.

    Older sweeps do not say it of settings that there were not yet.
    """
    from sgrl.nn.registry import recorded_settings

    try:
        return recorded_settings(model["policy"], model)
    except (ValueError, KeyError):
        return dict(model)  # and whoever needs its policy says what is wrong


def with_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's model with the settings that it leaves to its policy's defaults."""
    from sgrl.nn.registry import policy_class, setting_defaults

    defaults = setting_defaults(policy_class(model["policy"]).Settings)
    del defaults["value_head"]  # it depends on the algorithm
    given = {key: value for key, value in defaults.items() if value is not dataclasses.MISSING}
    return {**model, **{key: given[key] for key in given if key not in model}}


def _automatic_backend(model: Mapping[str, Any], configs: Sequence[Any], packed: bool) -> str:
    """What `backend: auto` stands for in a model; "auto" itself where only a trial can tell."""
    from sgrl.nn.kernels.backends import resolve_backend
    from sgrl.nn.registry import policy_class

    # Compiled code may not know what is new in a policy from elsewhere.
    on_gpus = asks_for_gpus(*configs)
    if packed and on_gpus:
        return "auto"  # Triton's kernels where there are any
    if on_gpus is None or not policy_class(model["policy"]).__module__.startswith("sgrl.nn."):
        return "auto"
    # Runners on CPUs compute as a learner on a GPU does.
    compiled = not (on_gpus or packed or model.get("shuffle_predictions"))
    return resolve_backend("auto", compiled=compiled)


def asks_for_gpus(*configs: Any) -> bool | None:
    """Return whether AlgorithmConfig's sections put runners or learners on GPUs.

    Args:
        *configs: sections, of which later ones go before earlier ones.

    Returns:
        None where that is swept.
    """
    asked: dict[str, Any] = {"num_gpus_per_learner": 0, "num_gpus_per_env_runner": 0}
    for config in configs:
        for section, key in zip(("learners", "env_runners"), asked, strict=True):
            given = config.get(section) if isinstance(config, dict) else None
            if isinstance(given, dict):
                asked[key] = given if is_open(given) else given.get(key, asked[key])
    swept = [isinstance(value, dict) for value in asked.values()]
    if any(value and not grid for value, grid in zip(asked.values(), swept, strict=True)):
        return True
    return None if any(swept) else False
