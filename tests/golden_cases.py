"""The numeric cases of `tests/golden` (its README says what they hold), as policies and batches."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgrl.nn.neuron import SlotNeurons
from sgrl.nn.recurrent_policies import SparseNetPolicy
from sgrl.nn.registry import make_policy

RTOL, ATOL, ATOL_TRAINED = 1e-9, 1e-12, 1e-10

PROJECT_COPIES = Path(__file__).parent / "golden"


def golden_files(pattern: str) -> list[Path]:
    """Files of the folder named by SGRL_GOLDEN_DIR, or of the project's copies if it is not set.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = Path(os.environ.get("SGRL_GOLDEN_DIR") or PROJECT_COPIES)
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no {pattern} in {folder}")
    return files


@dataclass
class Case:
    """One golden file: its settings and its arrays as tensors."""

    config: dict[str, Any]
    arrays: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All arrays below `prefix/`."""
        names = [name for name in self.arrays if name.startswith(f"{prefix}/")]
        return {name.removeprefix(f"{prefix}/"): self[name] for name in names}


def load_case(path: Path) -> Case:
    with np.load(path) as arrays:
        return Case(json.loads(str(arrays["config"])), {name: arrays[name] for name in arrays})


def policy_settings(case: Case, backend: str) -> dict[str, Any]:
    """Settings of the case's SparseNet policy, for `make_policy`."""
    config = case.config
    return {
        "feature_size": config["embedding_size"],
        "embedding_size": config["input_size"],
        "num_neurons": config["width"],
        "neuron_size": config["neuron_dim"],
        "num_parents": config["num_parents"],
        "num_slots": config["num_slots"],
        "num_input_neurons": config["num_input_neurons"],
        "actor_slots": config["actor_num_slots"],
        "propagation": config["mode"],
        "adaptive": config["adaptive"],
        "mixing_momentum": config["lambda_momentum"],
        "schedule_beta": config["beta"],
        "positive_projection": config.get("substitute") == "positive_projection",
        "backend": backend,
    }


def build_policy(case: Case, backend: str) -> SparseNetPolicy:
    """The case's policy in float64, with its parameters, connectivity and mixing weight."""
    policy = make_policy(
        "sparsenet",
        case.config["obs_dim"],
        case.config["num_actions"],
        dtype=torch.float64,
        **policy_settings(case, backend),
    )
    load_parameters(policy, case)
    return policy


@torch.no_grad()
def load_parameters(policy: SparseNetPolicy, case: Case) -> None:
    """Copy the case's parameters, connectivity and mixing weight into the policy."""
    parameters = dict(policy.named_parameters())
    for name, value in to_policy_names(policy, case.group("param")).items():
        parameters[name].copy_(value)
    policy.core.parents.copy_(case["parents"])
    policy.core.neurons.mixing_weight.copy_(case["lambda_before"])


_DIRECT = {
    "encoder.0.weight": "feature_map.weight",
    "encoder.0.bias": "feature_map.bias",
    "encoder.2.weight": "preprocessor.weight",
    "encoder.2.bias": "preprocessor.bias",
    "actor.keys": "actor_keys",
    "actor.A": "actor_A",
    "actor.b": "actor_b",
    "core.neurons.bias": "b",
}


def to_policy_names(policy: SparseNetPolicy, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Golden arrays (parameters or gradients) under the policy's parameter names."""
    neurons: SlotNeurons = policy.core.neurons
    read, num_x = neurons.weight_h.shape[2], neurons.num_input_neurons
    values = {name: arrays[golden] for name, golden in _DIRECT.items()}
    stacked = torch.cat([arrays["keys"], arrays["A"].flatten(1, 2)], dim=1)
    values["core.neurons.weight_h"] = stacked[..., :read]
    values["core.neurons.weight_x"] = stacked[:num_x, :, read:]
    if "sg_A" in arrays and neurons.has_predictor:
        matrices = arrays["sg_A"].flatten(1, 2)
        values["core.neurons.predictor_h"] = matrices[..., :read]
        values["core.neurons.predictor_x"] = matrices[:num_x, :, read:]
        values["core.neurons.predictor_bias"] = arrays["sg_b"]
    return values


def assert_close(actual: Any, expected: Any, atol: float = ATOL, what: str = "") -> None:
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=RTOL, atol=atol, err_msg=what
    )
