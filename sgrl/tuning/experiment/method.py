"""A method's model: its policy, the policy's defaults, and the backend it computes with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sgrl.results.plan import Problem
from sgrl.tuning.experiment.file import check_known

ONE_POLICY = (
    "a method is one policy; compare several as methods of their own, "
    "as in gru: {model: {policy: gru}}"
)


def complete_model(method: str, model: dict[str, Any], configs: Sequence[Any]) -> None:
    """Write into a model what it leaves to defaults, and the backend that `auto` stands for.

    A resumed sweep computes with what it was started with.

    Args:
        method: its name.
        model: changed in place.
        configs: the sections of AlgorithmConfig that apply to it.

    Raises:
        Problem: there is no such policy.
    """
    from sgrl.nn.registry import POLICIES

    key = f"methods.{method}.model"
    if "policy" not in model:
        if "grid" in model:
            raise Problem(key, ONE_POLICY)
        raise Problem(f"{key}.policy", f"missing; one of {', '.join(POLICIES)}")
    if isinstance(model["policy"], dict):
        raise Problem(f"{key}.policy", f"expected the policy's name: {ONE_POLICY}")
    check_known(f"{key}.policy", "policy", model["policy"], list(POLICIES))
    model.update(with_defaults(model))
    backend = model.get("backend")
    if backend == "auto":
        model["backend"] = _automatic_backend(model, configs)
    elif isinstance(backend, dict) and isinstance(backend.get("grid"), list):
        backend["grid"] = [
            _automatic_backend(model, configs) if b == "auto" else b for b in backend["grid"]
        ]


def with_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's model with the settings that it leaves to its policy's defaults."""
    from sgrl.nn.registry import POLICIES

    fields = dataclasses.fields(POLICIES[model["policy"]].Settings)
    defaults = {field.name: field.default for field in fields}
    del defaults["value_head"]  # it depends on the algorithm
    return {**model, **{name: defaults[name] for name in defaults if name not in model}}


def _automatic_backend(model: Mapping[str, Any], configs: Sequence[Any]) -> str:
    """What `backend: auto` stands for in a model; "auto" itself where only a trial can tell."""
    from sgrl.nn.kernels.backends import resolve_backend
    from sgrl.nn.registry import POLICIES

    # On GPUs not what a runner on a CPU does; and compiled code may not know what is new in a
    # policy from elsewhere.
    if any(map(asks_for_gpus, configs)) or not POLICIES[model["policy"]].__module__.startswith(
        "sgrl.nn."
    ):
        return "auto"
    return resolve_backend("auto", compiled=not model.get("shuffle_predictions"))


def asks_for_gpus(sections: Any) -> bool:
    """Return whether AlgorithmConfig's sections put runners or learners on GPUs (or sweep that)."""
    keys = {"learners": "num_gpus_per_learner", "env_runners": "num_gpus_per_env_runner"}
    sections = sections if isinstance(sections, dict) else {}
    return any(
        isinstance(sections.get(section), dict) and sections[section].get(key)
        for section, key in keys.items()
    )
