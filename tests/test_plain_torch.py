"""The frozen baseline computes what sgrl computes, so that ratios of time mean something."""

import sys
from pathlib import Path

import pytest
import torch

from sgrl.envs.registry import make_vector
from sgrl.nn.registry import make_policy
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import plain_mnist
import plain_torch


@torch.no_grad()
def copy_sparse(plain: plain_torch.SparsePolicy, policy: torch.nn.Module) -> None:
    neurons = policy.core.neurons
    keys, matrices = neurons.keys_and_matrices()
    plain.keys.copy_(keys)
    plain.A.copy_(matrices)
    plain.b.copy_(neurons.bias)
    for name in ("keys", "A", "b"):
        getattr(plain, f"actor_{name}").copy_(getattr(policy.actor, name))
    plain.encoder.layers.load_state_dict(policy.encoder.state_dict())
    plain.parents.copy_(policy.core.parents)


@torch.no_grad()
def copy_dense(plain: plain_torch.DensePolicy, policy: torch.nn.Module) -> None:
    core = {name.removesuffix("_l0"): value for name, value in policy.core.state_dict().items()}
    plain.cell.load_state_dict(core)
    plain.actor.load_state_dict(policy.actor.state_dict())
    plain.encoder.layers.load_state_dict(policy.encoder.state_dict())


@pytest.mark.parametrize("name", plain_torch.POLICIES)
def test_the_same_numbers(name: str) -> None:
    env = make_vector("labyrinth_escape", 3, {"episode_length": 12})
    settings = {}
    if name.startswith("sparsenet"):
        settings["propagation"] = "sgprop" if "sgprop" in name else "backprop"
        settings["adaptive"] = name == "sparsenet_sgprop"
    policy = make_policy(name.partition("_")[0], 56, 4, **settings)
    plain = plain_torch.make_policy(name, 56, 4)
    (copy_sparse if name.startswith("sparsenet") else copy_dense)(plain, policy)

    optimizers = make_optimizers(policy, 1e-3, 1e-3)
    plain_optimizers = plain_torch.make_optimizers(plain, 1e-3, 1e-3)
    rollout = Rollout(env, policy, seed=0)
    for _ in range(3):
        batch = rollout.collect()
        metrics = update(policy, optimizers, batch, UpdateSettings())
        loss = plain_torch.update(
            plain, plain_optimizers, batch.observations, batch.actions, batch.rewards, batch.mask
        )
        assert metrics["policy_loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    if name.startswith("sparsenet"):
        assert torch.allclose(plain.lam, policy.core.neurons.mixing_weight, atol=1e-3)


def test_its_loop_runs() -> None:
    rows = plain_torch.train("sparsenet_sgprop", num_envs=2, length=10)
    first = next(rows)
    assert set(first) == {"success_rate", "rollout_seconds", "update_seconds"}


@torch.no_grad()
def copy_feed_forward(plain: plain_mnist.SparseMLP, policy: torch.nn.Module) -> None:
    for layer, neurons in zip(plain.layers, policy.core.layers, strict=True):
        keys, matrices = neurons.keys_and_matrices()
        layer.keys.copy_(keys)
        layer.A.copy_(matrices)
        layer.b.copy_(neurons.bias)
        layer.predictor_A.copy_(neurons.predictor_h.view_as(layer.predictor_A))
        layer.predictor_b.copy_(neurons.predictor_bias)
    plain.action_keys.copy_(policy.actor.keys)
    plain.action_predictor_A.copy_(policy.actor.predictor_A)
    plain.action_predictor_b.copy_(policy.actor.predictor_bias)
    plain.pixels.copy_(policy.core.pixels)
    plain.parents.copy_(policy.core.parents)


def test_the_same_numbers_on_the_bandit() -> None:
    sizes = {"num_layers": 3, "num_neurons": 12, "neuron_size": 4, "num_parents": 3, "num_slots": 2}
    policy = make_policy("sparse_mlp", 784, 9, **sizes)
    plain = plain_mnist.SparseMLP(layers=3, neurons=12, size=4, parents=3, slots=2)
    copy_feed_forward(plain, policy)
    optimizers = make_optimizers(policy, 5e-3, 5e-3)
    plain_optimizers = plain_mnist.make_optimizers(plain, 5e-3, 5e-3)
    rollout = Rollout(make_vector("mnist_bandit", 16), policy, seed=0)
    settings = UpdateSettings(
        entropy_coeff=0.0, grad_clip=None, normalize_returns=False, two_phase=True
    )
    for _ in range(4):
        batch = rollout.collect()
        metrics = update(policy, optimizers, batch, settings)
        one_step = (batch.observations[0], batch.actions[0], batch.rewards[0])
        loss = plain_mnist.update(plain, plain_optimizers, *one_step)
        assert metrics["policy_loss"] == pytest.approx(loss, rel=1e-4)
    for layer, neurons in zip(plain.layers, policy.core.layers, strict=True):
        torch.testing.assert_close(layer.lam, neurons.mixing_weight, rtol=1e-3, atol=1e-4)
    reward = plain_mnist.evaluate(plain, *one_step[:2])
    assert 0 <= reward <= 1
