"""The feed-forward golden cases, on every backend: forward, both backward phases, training.

Files come from the folder in SGRL_GOLDEN_DIR, if set, else from tests/golden. The updates go
through `sgrl.reinforce.update` and, in float64 too, through the Learner of RLlib.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import tree
from golden_cases import ATOL_TRAINED, Case, assert_close, golden_files, load_case
from ray.rllib.core import DEFAULT_MODULE_ID
from torch import Tensor

from sgrl.envs.registry import make_device
from sgrl.nn.feedforward_policies import SparseMLPPolicy
from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.mixing import backward_phase, split_parameters
from sgrl.nn.registry import make_policy
from sgrl.nn.stacked import StackedActing
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.loss import reinforce_loss
from sgrl.reinforce.pack import Pack, PackBatch, RunSettings
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update
from sgrl.rllib import ReinforceConfig
from sgrl.rllib.learner import learner_batch

CASES = [
    pytest.param(file, backend, id=f"{file.stem}-{backend}")
    for file in golden_files("feedforward_*.npz")
    for backend in BACKENDS
]
SETTINGS = UpdateSettings(
    entropy_coeff=0.0, grad_clip=None, normalize_returns=False, two_phase=True
)
UNLIKE_LABYRINTHS = ("entropy_coeff", "grad_clip", "normalize_returns", "two_phase")


def policy_settings(case: Case, backend: str, propagation: str = "sgprop") -> dict[str, Any]:
    config = case.config
    return {
        "num_layers": config["num_layers"],
        "num_neurons": config["width"],
        "neuron_size": config["neuron_dim"],
        "num_parents": config["num_parents"],
        "num_slots": config["num_slots"],
        "residual": config["residual"],
        "propagation": propagation,
        "mixing_momentum": config["lambda_momentum"],
        "backend": backend,
    }


def build_policy(case: Case, backend: str, propagation: str = "sgprop") -> SparseMLPPolicy:
    policy = make_policy(
        "sparse_mlp",
        case.config["input_dim"],
        case.config["num_actions"],
        dtype=torch.float64,
        **policy_settings(case, backend, propagation),
    )
    load_parameters(policy, case)
    return policy


@torch.no_grad()
def load_parameters(policy: SparseMLPPolicy, case: Case) -> None:
    named = dict(policy.named_parameters())
    for name, value in to_policy_names(case.group("param")).items():
        if name in named:
            named[name].copy_(value)
    policy.core.pixels.copy_(case["pixels"])
    policy.core.parents.copy_(case["parents"])
    for neurons, weight in zip(policy.core.layers, case["lambda_before"], strict=True):
        neurons.mixing_weight.copy_(weight)


def to_policy_names(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Golden arrays (parameters or gradients) under the policy's parameter names."""
    values = {}
    for name in {name.split(".")[0] for name in arrays if name.startswith("layer")}:
        layer = f"core.layers.{name.removeprefix('layer')}"
        if f"{name}.keys" in arrays:
            stacked = (arrays[f"{name}.keys"], arrays[f"{name}.A"].flatten(1, 2))
            values[f"{layer}.weight_h"] = torch.cat(stacked, dim=1)
            values[f"{layer}.bias"] = arrays[f"{name}.b"]
        if f"{name}.sg_A" in arrays:
            values[f"{layer}.predictor_h"] = arrays[f"{name}.sg_A"].flatten(1, 2)
            values[f"{layer}.predictor_bias"] = arrays[f"{name}.sg_b"]
    for golden, name in (
        ("action_keys", "actor.keys"),
        ("action_sg_A", "actor.predictor_A"),
        ("action_sg_b", "actor.predictor_bias"),
    ):
        if golden in arrays:
            values[name] = arrays[golden]
    return values


def as_batch(contexts: Tensor, actions: Tensor, rewards: Tensor) -> EpisodeBatch:
    """One-step episodes."""
    mask = torch.ones(1, len(actions), dtype=torch.bool)
    return EpisodeBatch(contexts[None], actions[None], rewards[None], mask, mask.sum(0), mask[0])


def mixing_weights(policy: SparseMLPPolicy) -> Tensor:
    return torch.stack([neurons.mixing_weight for neurons in policy.core.layers])


def loss_of(policy: SparseMLPPolicy, case: Case) -> tuple[Tensor, Tensor]:
    batch = as_batch(case["batch/x0"], case["batch/action"], case["batch/reward"])
    logits = policy(batch.observations).logits
    loss = reinforce_loss(logits, batch.actions, batch.rewards, batch.mask, 0.0).loss
    return loss, logits[0]


def check_gradients(policy: SparseMLPPolicy, expected: dict[str, Tensor]) -> None:
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], what=name)
    policy.zero_grad()


@pytest.mark.parametrize(("file", "backend"), CASES)
def test_golden(file: Path, backend: str) -> None:
    case = load_case(file)
    check_forward_and_gradients(case, backend)
    check_training(case, backend)


def check_forward_and_gradients(case: Case, backend: str) -> None:
    policy = build_policy(case, backend, "backprop")
    loss, logits = loss_of(policy, case)
    assert_close(logits.detach(), case["logits"])
    assert_close(loss.item(), case["policy_loss"])
    loss.backward()
    check_gradients(policy, to_policy_names(case.group("backprop_grad")))

    policy = build_policy(case, backend)
    h = case["batch/x0"]
    for layer, neurons in enumerate(policy.core.layers):
        if layer:
            inputs = neurons.read(h, policy.core.parents[layer - 1], None)
        else:
            inputs = h[:, policy.core.pixels]
        activation = neurons(inputs)
        residual = policy.core.is_residual(layer)
        h = torch.tanh(activation.output) + h if residual else activation.output
        assert_close(h.detach(), case["hidden"][layer])
        assert_close(neurons.predict(activation).detach(), case["sg_prediction"][layer])
    assert_close(policy.core(case["batch/x0"]).detach(), case["hidden"][-1].flatten(1))

    loss, _ = loss_of(policy, case)
    with backward_phase(policy, "predictor"):
        torch.autograd.backward(loss, inputs=split_parameters(policy)[1], retain_graph=True)
    check_gradients(policy, to_policy_names(case.group("sg_grad")))
    assert_close(policy.core.statistics["predictor_loss"], case["sg_losses"][:-1].sum())
    assert_close(policy.actor.statistics["predictor_loss"], case["sg_losses"][-1])
    assert_close(mixing_weights(policy), case["lambda_before"])
    with backward_phase(policy, "policy"):
        torch.autograd.backward(loss, inputs=split_parameters(policy)[0])
    check_gradients(policy, to_policy_names(case.group("sgprop_grad")))
    assert_close(mixing_weights(policy), case["lambda_after"])


def check_training(case: Case, backend: str) -> None:
    policy = build_policy(case, backend)
    optimizers = make_optimizers(policy, case.config["policy_lr"], case.config["sg_lr"])
    for batch in training_batches(case):
        update(policy, optimizers, batch, SETTINGS)
    check_trained(policy, case)


def training_batches(case: Case) -> list[EpisodeBatch]:
    steps = sum(name.startswith("train") and name.endswith("/x0") for name in case.arrays)
    assert steps
    recorded = [case.group(f"train{i}") for i in range(steps)]
    return [as_batch(step["x0"], step["action"], step["reward"]) for step in recorded]


def check_trained(policy: SparseMLPPolicy, case: Case) -> None:
    trained = to_policy_names(case.group("trained"))
    parameters = dict(policy.named_parameters())
    assert set(trained) == set(parameters)
    for name, parameter in parameters.items():
        assert_close(parameter.detach(), trained[name], atol=ATOL_TRAINED, what=name)
    assert_close(mixing_weights(policy), case["trained_lambda"], atol=ATOL_TRAINED)


@pytest.mark.parametrize(("file", "backend"), CASES)
def test_golden_training_through_the_learner(file: Path, backend: str) -> None:
    case = load_case(file)
    config = (
        ReinforceConfig()
        .training(
            lr=case.config["policy_lr"],
            predictor_lr=case.config["sg_lr"],
            **{name: getattr(SETTINGS, name) for name in UNLIKE_LABYRINTHS},
        )
        .rl_module(
            model_config={
                "policy": "sparse_mlp",
                "dtype": "float64",
                **policy_settings(case, backend),
            }
        )
    )
    spaces = (
        gym.spaces.Box(-np.inf, np.inf, (case.config["input_dim"],)),
        gym.spaces.Discrete(case.config["num_actions"]),
    )
    learner = config.build_learner(spaces={DEFAULT_MODULE_ID: spaces})
    policy = learner.module[DEFAULT_MODULE_ID].policy
    load_parameters(policy, case)
    for episodes in training_batches(case):
        batch = learner_batch(episodes, DEFAULT_MODULE_ID)
        # As arrays, which RLlib converts to tensors (of float32, were it not overridden).
        for columns in batch.policy_batches.values():
            columns.update(tree.map_structure(torch.Tensor.numpy, dict(columns)))
        learner.update(batch=batch)
    check_trained(policy, case)


@pytest.mark.parametrize("file", golden_files("feedforward_*.npz"), ids=lambda file: file.stem)
def test_golden_training_through_a_stack(file: Path) -> None:
    """Between two runs of which one has other weights, the other another order of samples."""
    case = load_case(file)
    policies = [build_policy(case, "torch") for _ in range(3)]
    with torch.no_grad():
        for parameter in policies[0].parameters():
            parameter.mul_(2)
    batches = training_batches(case)
    run = RunSettings(0, case.config["policy_lr"], case.config["sg_lr"], SETTINGS)
    size = batches[0].num_episodes
    env = make_device("labyrinth_escape", 3, size)
    # Its batches are recorded: no environment is stepped.
    env.observation_size = policies[0].observation_size
    env.num_actions, env.episode_length = policies[0].num_actions, 1
    pack = Pack(policies, env, [run] * 3)
    for batch in batches:
        values = {
            name: torch.stack([value, value, value.roll(1, dims=1)], dim=1)
            for name, value in batch.tensors().items()
            if name in ("observations", "actions", "rewards", "mask")
        }
        success = torch.zeros(3, size, dtype=torch.bool)
        acted = StackedActing(pack.stacked, 1, size)
        pack.update(PackBatch(**values, success=success, acted=acted))
    pack.unstack(policies)
    check_trained(policies[1], case)
