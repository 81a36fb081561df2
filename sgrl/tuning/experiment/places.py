"""Where the keys of an experiment stand, for hints about keys that stand in a wrong place."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from sgrl.tuning.experiment.file import ExperimentFile
from sgrl.tuning.experiment.sections import places_in, section_names


def places_of(content: Mapping[str, Any], config_class: Any) -> dict[str, str]:
    """Return the whole key of everything that an experiment can set, by its last step.

    Args:
        content: of the experiment file, which need not be sound.
        config_class: of the algorithm's configuration; None where there is no such algorithm.

    Returns:
        As in ``{"lr": "config.training.lr", "hidden_size": "methods.gru.model.hidden_size"}``. Of
        several methods that have a setting, the first is named.
    """
    from sgrl.envs.registry import ENVIRONMENTS
    from sgrl.nn.registry import policy_class

    methods = _mapping(content, "methods")
    first = next(iter(methods), "NAME")
    # RLlib's own `seed` would be one for all trials, and its `model` is not read.
    places = {"seed": "seeds", "model": f"methods.{first}.model"}
    places["policy"] = f"{places['model']}.policy"
    if config_class is not None:
        places = places_in(config_class) | places
        for section in section_names(config_class):
            places.setdefault(section, f"config.{section}")
    places |= {name: name for name in ExperimentFile.model_fields}
    places["training_iteration"] = "stop.training_iteration"
    for method in methods:
        places.setdefault(str(method), f"methods.{method}")
        policy = _mapping(methods, method, "model").get("policy")
        settings: tuple[Any, ...] = ()
        with contextlib.suppress(ValueError):
            settings = dataclasses.fields(policy_class(policy).Settings)
        for field in settings:
            places.setdefault(field.name, f"methods.{method}.model.{field.name}")
    env = _mapping(content, "config", "environment").get("env")
    if isinstance(env, str) and env in ENVIRONMENTS:
        for name in ENVIRONMENTS[env].defaults:
            places.setdefault(name, f"config.environment.env_config.{name}")
    return places


def _mapping(tree: Any, *steps: Any) -> Mapping[Any, Any]:
    """The mapping at the end of some steps; empty where there is none."""
    for step in steps:
        tree = tree.get(step) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}
