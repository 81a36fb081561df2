"""Policies by name: made, saved, loaded, and asked for what they measured.

policy = make_policy("sparsenet", observation_size=56, num_actions=4, propagation="sgprop")
output = policy(observations)                     # logits [T, B, A]
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from inspect import get_annotations
from pathlib import Path
from statistics import fmean
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sgrl.annotations import accepts, in_words
from sgrl.names import did_you_mean
from sgrl.nn.actions import ActionSpace, action_space_from
from sgrl.nn.feedforward_policies import DensePolicy, MLPPolicy, SparseMLPPolicy
from sgrl.nn.mixing import mixing_modules, mixing_summary, split_parameters
from sgrl.nn.policy import Policy, PolicySettings
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.recurrent_policies import GRUPolicy, LSTMPolicy, SparseNetPolicy
from sgrl.nn.sgprop import NORMS
from sgrl.user_code import module_of, named_class

FORMAT_VERSION = 1
#: What a saved policy consists of.
WEIGHTS_FILE, DESCRIPTION_FILE = "policy.safetensors", "policy.json"

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        GRUPolicy,
        LSTMPolicy,
        MLPPolicy,
        SparseNetPolicy,
        DensePolicy,
        SparseMLPPolicy,
    )
}


def policy_class(name: Any) -> type[Policy]:
    """Return the policy of that name, or of the user's own, the class at `module:Class`.

    Raises:
        ValueError: there is none; one line with the nearest name.
    """
    if isinstance(name, str) and name in POLICIES:
        return POLICIES[name]
    if not module_of(name):
        raise ValueError(f"unknown policy {name!r}; {did_you_mean(name, POLICIES)}")
    found = named_class(name, Policy)
    kind = getattr(found, "Settings", None)
    if not (isinstance(kind, type) and issubclass(kind, PolicySettings)):
        raise ValueError(
            f"{name}: Settings must be a dataclass derived from sgrl.nn.policy.PolicySettings"
        )
    try:
        get_type_hints(kind)
    except NameError as error:
        raise ValueError(f"{name}: the types of its settings cannot be read: {error}") from None
    undeclared = [key for key in get_annotations(kind) if key not in setting_defaults(kind)]
    if "__dataclass_fields__" not in vars(kind) and undeclared:
        raise ValueError(f"{name}: put @dataclass(frozen=True) before its settings")
    return found


def setting_defaults(kind: type[PolicySettings]) -> dict[str, Any]:
    """Return the settings of a policy and their defaults; `dataclasses.MISSING` where none is."""
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(kind)
    }


def name_of(policy: Policy) -> str:
    """Return the name by which `policy_class` finds a policy's class."""
    kind = type(policy)
    name = getattr(kind, "name", "")
    return name if POLICIES.get(name) is kind else f"{kind.__module__}:{kind.__qualname__}"


def policy_settings(name: str, settings: Mapping[str, Any]) -> PolicySettings:
    """Validated settings of the policy `name`, defaults filled in.

    Raises:
        ValueError: unknown policy, unknown setting, wrong type or impossible size.
    """
    kind = policy_class(name).Settings
    known, types = setting_defaults(kind), get_type_hints(kind)
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"policy {name!r} has no setting {key!r}; {did_you_mean(key, known)}")
        if not accepts(types[key], value):
            raise ValueError(f"{key} must be {in_words(types[key])}, got {value!r}")
    for key, default in known.items():
        if default is dataclasses.MISSING and key not in settings:
            raise ValueError(f"policy {name!r} needs the setting {key!r}")
    return kind(**settings)


def recorded_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a record has them, and those that there were not yet when it was written.

    Only these, and only where they are not what is the default now.

    Args:
        name: the policy's.
        settings: of the record.

    Raises:
        ValueError: unknown policy.
    """
    older = policy_class(name).Settings.older
    return {**settings, **{key: older[key] for key in older if key not in settings}}


def make_policy(
    name: str,
    observation_size: int | Sequence[int],
    num_actions: int | ActionSpace,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Policy:
    """Build the policy `name`; the same seed gives the same connectivity and weights.

    Args:
        name: a key of `POLICIES`, or a class as in my_package.models:MyPolicy.
        observation_size: F of flat observations, or [height, width, channels] of images.
        num_actions: A of Discrete actions, or another kind of `sgrl.nn.actions`.
        seed: of connectivity and initial weights.
        dtype: of the parameters.
        settings: fields of the policy's `Settings`.

    Raises:
        ValueError: unknown policy or setting, wrong type, impossible size.
    """
    checked = policy_settings(name, settings)
    generator = torch.Generator().manual_seed(seed)
    return policy_class(name)(observation_size, num_actions, checked, generator, dtype)


def count_parameters(path: str | Path) -> int:
    """Count the trainable parameters of a saved policy, without the predictors'.

    Args:
        path: as of `load_policy`, which says what is raised.
    """
    return sum(weights.numel() for weights in split_parameters(load_policy(path))[0])


def mixing_statistics(network: nn.Module) -> dict[str, float]:
    """What sgprop measured in the last backward pass, and the spread of the mixing weights.

    Of every layer inside that mixes, whatever policy or network it is part of (`mixing_modules`).
    Keys:

    - predictor_loss: the sum of all layers' losses.
    - received_grad_norm, mixed_grad_norm, prediction_norm: means over all layers' neurons.
    - mixing_weight_mean, _min, _p25, _median, _p75, _max: over all layers' neurons.
    - layer{l}_mixing_weight_*: of each layer by itself, in the order of `network.modules()`; not
      where a `SparseRNN` is all there is.

    Empty where nothing uses sgprop.
    """
    modules = [m for m in mixing_modules(network) if m.mixing_weights or m.statistics]
    measured: dict[str, float] = {}
    losses = [m.statistics["predictor_loss"] for m in modules if "predictor_loss" in m.statistics]
    if losses:
        measured["predictor_loss"] = sum(map(float, losses))
    for name in NORMS:
        norms = [float(m.statistics[name]) for m in modules if name in m.statistics]
        counts = [sum(map(len, m.mixing_weights)) for m in modules if name in m.statistics]
        if norms:
            measured[name] = norms[0] if len(norms) == 1 else fmean(norms, counts)
    weights = [w.detach().double().cpu() for m in modules for w in m.mixing_weights]
    if weights:
        measured |= mixing_summary(torch.cat(weights))
    if len(modules) == 1 and isinstance(modules[0], SparseRNN):
        return measured
    for layer, values in enumerate(weights):
        summary = mixing_summary(values)
        measured |= {f"layer{layer}_{name}": value for name, value in summary.items()}
    return measured


def save_policy(policy: Policy, directory: str | Path, **extra: Any) -> None:
    """Write `policy.safetensors` and `policy.json` into an existing folder.

    Args:
        policy: to save.
        directory: where to.
        extra: further JSON values for policy.json (the environment, for instance).
    """
    directory = Path(directory)
    state = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    description = {
        "format": FORMAT_VERSION,
        "policy": name_of(policy),
        "observation_size": policy.observation_size,
        "observation_shape": list(policy.observation_shape),
        "action_space": policy.action_space.description(),
        "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        "settings": dataclasses.asdict(policy.settings),
        **extra,
    }
    save_file(state, directory / WEIGHTS_FILE)
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def load_policy(path: str | Path) -> Policy:
    """Load a policy from a checkpoint, or any folder that `save_policy` wrote; without Ray.

    One that was trained in compiled code comes with backend "auto", and so also runs where there is
    no compiler.

    Args:
        path: the folder that holds `policy.safetensors` and `policy.json`.

    Raises:
        FileNotFoundError: the folder does not hold them.
        ValueError: they cannot be read, or do not belong together.
    """
    directory = Path(path)
    description_file, weights_file = directory / DESCRIPTION_FILE, directory / WEIGHTS_FILE
    for file in (description_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(f"{directory} holds no {file.name}; give a checkpoint's folder")
    try:
        description = json.loads(description_file.read_text())
        if description["format"] != FORMAT_VERSION:
            raise ValueError(f"{description_file} has the unknown format {description['format']}")
        settings = recorded_settings(description["policy"], description["settings"])
        if settings.get("backend") == "native":
            settings["backend"] = "auto"
        policy = make_policy(
            description["policy"],
            # Only their number where it was written before images had a shape.
            description.get("observation_shape") or description["observation_size"],
            # Only a number where it was written before there were other actions than Discrete.
            description.get("num_actions") or action_space_from(description["action_space"]),
            dtype=getattr(torch, description["dtype"]),
            **settings,
        )
        policy.load_state_dict(load_file(weights_file))
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{directory} holds no readable policy: {line}") from error
    return policy
