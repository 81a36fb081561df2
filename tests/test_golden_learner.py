"""The golden training cases through RLlib's Learner: its batches, optimizers, clips and metrics.

Files come from the folder in SGRL_GOLDEN_DIR, if set, else from tests/golden.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tree
from golden_cases import (
    ATOL_TRAINED,
    assert_close,
    golden_files,
    load_case,
    load_parameters,
    policy_settings,
    to_policy_names,
)
from ray.rllib.core import DEFAULT_MODULE_ID

from sgrl.nn.kernels.backends import BACKENDS
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.rllib import ReinforceConfig
from sgrl.rllib.learner import learner_batch

CASES = [
    pytest.param(file, backend, id=f"{file.stem}-{backend}")
    for file in golden_files("recurrent_train*.npz")
    for backend in BACKENDS
]


@pytest.mark.parametrize(("file", "backend"), CASES)
def test_golden_training(file: Path, backend: str) -> None:
    case = load_case(file)
    settings = case.config
    config = (
        ReinforceConfig()
        .training(
            lr=settings["policy_lr"],
            predictor_lr=settings["sg_lr"],
            gamma=settings["gamma"],
            entropy_coeff=settings["entropy_coef"],
            grad_clip=settings["max_grad_norm"],
        )
        .rl_module(
            model_config={
                "policy": "sparsenet",
                "dtype": "float64",
                **policy_settings(case, backend),
            }
        )
    )
    spaces = (
        gym.spaces.Box(-np.inf, np.inf, (settings["obs_dim"],)),
        gym.spaces.Discrete(settings["num_actions"]),
    )
    learner = config.build_learner(spaces={DEFAULT_MODULE_ID: spaces})
    policy = learner.module[DEFAULT_MODULE_ID].policy
    load_parameters(policy, case)

    updates = sum(name.startswith("train") and name.endswith("/obs") for name in case.arrays)
    assert updates
    for i in range(updates):
        recorded = case.group(f"train{i}")
        mask = recorded["valid_mask"]
        episodes = EpisodeBatch(
            recorded["obs"],
            recorded["actions"],
            recorded["rewards"],
            mask,
            lengths=mask.sum(0),
            success=recorded["dones"].any(0),
        )
        batch = learner_batch(episodes, DEFAULT_MODULE_ID)
        # As arrays, which RLlib converts to tensors (of float32, were it not overridden).
        for columns in batch.policy_batches.values():
            columns.update(tree.map_structure(torch.Tensor.numpy, dict(columns)))
        metrics = learner.update(batch=batch)[DEFAULT_MODULE_ID]["sgrl"]
        for name in ("policy_loss", "entropy", "grad_norm"):
            assert_close(metrics[name].peek(), recorded[name], what=f"train{i}/{name}")
        predictor_loss = metrics["predictor_loss"].peek()
        assert_close(predictor_loss, recorded["sg_loss"], what=f"train{i}/sg_loss")

    trained = to_policy_names(policy, case.group("trained"))
    parameters = dict(policy.named_parameters())
    assert set(trained) == set(parameters)
    for name, parameter in parameters.items():
        assert_close(parameter.detach(), trained[name], atol=ATOL_TRAINED, what=name)
    assert_close(policy.core.neurons.mixing_weight, case["trained_lambda"], atol=ATOL_TRAINED)
