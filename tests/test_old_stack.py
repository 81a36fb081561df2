"""The policies as models of RLlib's old API stack, under stock PPO."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.examples.envs.classes.random_env import RandomEnv
from sweeps import SPARSENET

import sgrl
from sgrl.nn.mixing import split_parameters
from sgrl.nn.registry import make_policy
from sgrl.results.evaluation import evaluate
from sgrl.rllib import (
    GRUNetwork,
    LSTMNetwork,
    PolicyModule,
    SparseNetwork,
    register_environment,
)
from sgrl.rllib import PPOConfig as OwnPPOConfig

DENSE = {"feature_size": 16, "embedding_size": 16, "hidden_size": 16}
SPARSE = {key: value for key, value in SPARSENET.items() if key != "policy"}
SETTINGS = {"gru": DENSE, "lstm": DENSE, "sparsenet": SPARSE}
NETWORKS = {"gru": GRUNetwork, "lstm": LSTMNetwork, "sparsenet": SparseNetwork}

MEMORY = "popgym-RepeatPreviousEasy-v0"
register_environment(MEMORY)


def ppo_config(
    name: str, env: Any, env_config: dict[str, Any], kind: type[PPOConfig] = PPOConfig
) -> PPOConfig:
    return (
        kind()
        .api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
        .environment(env, env_config=env_config)
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=2,
            batch_mode="complete_episodes",
            rollout_fragment_length=12,
        )
        .training(
            train_batch_size=48,
            minibatch_size=24,
            num_epochs=2,
            model={
                "custom_model": f"sgrl_{name}",
                "custom_model_config": SETTINGS[name],
                "max_seq_len": 12,
            },
        )
        .debugging(seed=0, log_level="ERROR")
    )


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", SETTINGS)
def test_ppo_trains_saves_and_restores(name: str, tmp_path: Path) -> None:
    config = ppo_config(name, "labyrinth_escape", {"episode_length": 12})
    algorithm = config.build_algo()
    policy = algorithm.get_policy().model.policy
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    for _ in range(3):
        algorithm.train()
    after = policy.state_dict()
    if name == "sparsenet":
        assert all(p.grad.abs().max() > 0 for p in split_parameters(policy)[1])
        mixing_weight = "core.neurons.mixing_weight"
        assert not torch.equal(after[mixing_weight], before[mixing_weight])
        assert ((after[mixing_weight] >= 0) & (after[mixing_weight] <= 1)).all()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert {key for key, _ in policy.named_parameters()} <= changed

    algorithm.save(str(tmp_path))
    restored = PPO.from_checkpoint(str(tmp_path))
    restored_state = restored.get_policy().model.policy.state_dict()
    assert restored_state.keys() == after.keys()
    for key, value in after.items():
        assert torch.equal(restored_state[key], value), key
    algorithm.stop()
    restored.stop()


def test_several_gpus_are_refused() -> None:
    config = ppo_config("sparsenet", "labyrinth_escape", {"episode_length": 12}, OwnPPOConfig)
    with pytest.raises(ValueError, match="num_gpus must be at most 1 on the old API stack, got 2"):
        config.resources(num_gpus=2).validate()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("name", "env"),
    [("gru", "labyrinth_escape"), ("sparsenet", "labyrinth_escape"), ("sparsenet", MEMORY)],
)
def test_predictors_have_a_learning_rate_of_their_own(name: str, env: str, tmp_path: Path) -> None:
    config = ppo_config(name, env, {"episode_length": 12}, OwnPPOConfig)
    config.training(lr_schedule=[[0, 1e-3], [96, 5e-4]], predictor_lr=2e-4, grad_clip=0.5)
    config.training(entropy_coeff_schedule=[[0, 0.1], [1000, 0.0]])
    algorithm = config.build_algo()
    rllib_policy = algorithm.get_policy()
    policy = rllib_policy.model.policy
    predictors = split_parameters(policy)[1]
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    for _ in range(3):
        algorithm.train()
    after = {key: value.clone() for key, value in policy.state_dict().items()}
    [optimizer] = rllib_policy._optimizers
    groups = optimizer.param_groups
    # RLlib's schedule is for the other parameters.
    assert [group["lr"] for group in groups] == [5e-4] + [2e-4] * bool(predictors)
    assert sum(len(group["params"]) for group in groups) == len(list(policy.parameters()))
    if predictors:
        assert [id(p) for p in groups[1]["params"]] == [id(p) for p in predictors]
        assert all(p.grad.abs().max() > 0 for p in predictors)
        mixing_weight = "core.neurons.mixing_weight"
        assert not torch.equal(after[mixing_weight], before[mixing_weight])
        # Each group is clipped by itself.
        for group in groups:
            assert torch.nn.utils.get_total_norm([p.grad for p in group["params"]]) <= 0.5001

    algorithm.save(str(tmp_path))
    restored = type(algorithm).from_checkpoint(str(tmp_path))
    for key, value in restored.get_policy().model.policy.state_dict().items():
        assert torch.equal(after[key], value), key
    for key, value in sgrl.load_policy(tmp_path).state_dict().items():
        assert torch.equal(after[key], value), key
    assert evaluate(tmp_path, episodes=2)["episodes"] == 2
    assert 0 < rllib_policy.entropy_coeff < 0.1
    assert restored.get_policy().entropy_coeff == rllib_policy.entropy_coeff
    restored.train()
    rates = [group["lr"] for group in restored.get_policy()._optimizers[0].param_groups]
    assert rates == [5e-4] + [2e-4] * bool(predictors)
    algorithm.stop()
    restored.stop()


@pytest.mark.usefixtures("ray_session")
def test_any_space_that_rllib_flattens() -> None:
    spaces = gym.spaces
    env_config = {
        "observation_space": spaces.Dict(
            {"image": spaces.Box(0, 1, (2, 3)), "pair": spaces.Tuple([spaces.Discrete(4)] * 2)}
        ),
        "action_space": spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]),
        "max_episode_len": 6,
    }
    algorithm = ppo_config("sparsenet", RandomEnv, env_config).build_algo()
    policy = algorithm.get_policy().model.policy
    assert policy.observation_size == 6 + 4 + 4
    assert policy.num_actions == 3 + 2 * 2
    algorithm.train()
    algorithm.stop()


@pytest.mark.parametrize("name", SETTINGS)
def test_same_logits_in_all_three(name: str) -> None:
    length, num_envs, size, num_actions = 7, 3, 5, 4
    settings = {**SETTINGS[name], "value_head": True}
    plain = make_policy(name, size, num_actions, seed=1, **settings)
    spaces = gym.spaces.Box(-np.inf, np.inf, (size,)), gym.spaces.Discrete(num_actions)
    network = NETWORKS[name](*spaces, num_actions, {"max_seq_len": length}, "test", **settings)
    module = PolicyModule(
        observation_space=spaces[0],
        action_space=spaces[1],
        model_config={"policy": name, **settings},
    )
    for other in (network, module):
        other.policy.load_state_dict(plain.state_dict())

    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(length, num_envs, size, generator=generator)
    expected = plain(observations)
    batch_major = observations.transpose(0, 1)

    state = plain.initial_state(num_envs)
    output = module.forward_train({Columns.OBS: batch_major, Columns.STATE_IN: state})
    torch.testing.assert_close(
        output[Columns.ACTION_DIST_INPUTS], expected.logits.transpose(0, 1), rtol=0, atol=0
    )
    values = module.compute_values(
        {Columns.OBS: batch_major, Columns.STATE_IN: state}, output[Columns.EMBEDDINGS]
    )
    torch.testing.assert_close(values, expected.values.transpose(0, 1), rtol=0, atol=0)

    initial = [torch.stack([part] * num_envs) for part in network.get_initial_state()]
    logits, new_state = network(
        {"obs": batch_major.reshape(-1, size)},
        initial,
        torch.full((num_envs,), length),
    )
    torch.testing.assert_close(
        logits, expected.logits.transpose(0, 1).reshape(-1, num_actions), rtol=0, atol=0
    )
    torch.testing.assert_close(
        network.value_function(), expected.values.transpose(0, 1).reshape(-1), rtol=0, atol=0
    )
    for part, value in zip(new_state, expected.state.values(), strict=True):
        torch.testing.assert_close(part, value, rtol=0, atol=0)


def test_noisy_neurons_are_refused() -> None:
    spaces = gym.spaces.Box(-np.inf, np.inf, (5,)), gym.spaces.Discrete(4)
    settings = {**SETTINGS["sparsenet"], "neuron_noise": 0.1}
    with pytest.raises(ValueError, match="neuron_noise must be 0 on the old API stack"):
        NETWORKS["sparsenet"](*spaces, 4, {"max_seq_len": 7}, "test", **settings)


def test_padding_is_masked() -> None:
    """Padded steps leave the predictors' gradients and the mixing weights as they are."""
    length, num_envs, size, num_actions = 6, 4, 5, 3
    spaces = gym.spaces.Box(-np.inf, np.inf, (size,)), gym.spaces.Discrete(num_actions)
    seq_lens = torch.tensor([6, 2, 4, 1])
    observations = torch.randn(num_envs, length, size, generator=torch.Generator().manual_seed(0))
    network = SparseNetwork(*spaces, num_actions, {}, "test", **SPARSE)
    plain = make_policy("sparsenet", size, num_actions, value_head=True, **SPARSE)

    initial = [torch.stack([part] * num_envs) for part in network.get_initial_state()]
    logits, _ = network({"obs": observations.reshape(-1, size)}, initial, seq_lens)
    logits.square().sum().backward()
    mask = torch.arange(length)[:, None] < seq_lens
    plain(observations.transpose(0, 1), mask=mask).logits.square().sum().backward()

    other = dict(plain.named_parameters())
    for key, parameter in network.policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other[key].grad)
    unmasked = make_policy("sparsenet", size, num_actions, value_head=True, **SPARSE)
    unmasked(observations.transpose(0, 1)).logits.square().sum().backward()
    mixing_weights = [p.core.neurons.mixing_weight for p in (network.policy, plain, unmasked)]
    torch.testing.assert_close(mixing_weights[0], mixing_weights[1])
    assert not torch.allclose(mixing_weights[0], mixing_weights[2])
