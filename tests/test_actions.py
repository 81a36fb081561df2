"""Distributions over actions, against RLlib's own with the same inputs."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchCategorical,
    TorchDiagGaussian,
    TorchMultiCategorical,
    TorchMultiDistribution,
)

from sgrl.nn.actions import ActionSpace, Box, Discrete, Mixed, MultiDiscrete, action_space_from
from sgrl.nn.registry import load_policy, make_policy, save_policy
from sgrl.reinforce import action_space_of

SPACES: list[ActionSpace] = [Discrete(5), MultiDiscrete((3, 2, 4)), Box(2), Mixed((3, 2), 2)]


def rllib_distribution(space: ActionSpace, outputs: torch.Tensor):
    if isinstance(space, MultiDiscrete):
        return TorchMultiCategorical.from_logits(outputs, input_lens=list(space.sizes))
    if isinstance(space, Mixed):
        choices, numbers = outputs.split([5, 4], -1)
        parts = rllib_distribution(space.parts[0], choices), TorchDiagGaussian.from_logits(numbers)
        return TorchMultiDistribution(parts)
    kind = TorchCategorical if isinstance(space, Discrete) else TorchDiagGaussian
    return kind.from_logits(outputs)


def some_outputs(space: ActionSpace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, space.num_outputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_log_probability_and_entropy_are_rllibs(space: ActionSpace) -> None:
    outputs = some_outputs(space)
    noise = space.noise(7, 3, generator=torch.Generator().manual_seed(1))
    actions = space.sample(outputs, noise).to(space.dtype)
    assert actions.shape == (7, 3, *space.shape)
    oracle = rllib_distribution(space, outputs)
    log_prob, entropy = space.log_prob_and_entropy(outputs, actions)
    given = actions.split([2, 2], -1) if isinstance(space, Mixed) else actions
    torch.testing.assert_close(log_prob, oracle.logp(given))
    torch.testing.assert_close(entropy, oracle.entropy())


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_samples_follow_the_distribution(space: ActionSpace) -> None:
    """The mean of -log probability is the entropy; many draws of one seed."""
    draws = 200_000
    outputs = some_outputs(space)[0, 0].expand(draws, -1)
    noise = space.noise(draws, generator=torch.Generator().manual_seed(2))
    actions = space.sample(outputs, noise)
    log_prob, entropy = space.log_prob_and_entropy(outputs, actions)
    torch.testing.assert_close(-log_prob.mean(), entropy[0], atol=0.01, rtol=0)
    for part in range(actions[0].numel() if isinstance(space, MultiDiscrete) else 0):
        logits = outputs[0].split(space.sizes)[part]  # type: ignore[attr-defined]
        counts = actions[:, part].bincount(minlength=len(logits)) / draws
        torch.testing.assert_close(counts.double(), logits.softmax(0), atol=0.005, rtol=0)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_greedy_actions_are_the_likeliest(space: ActionSpace) -> None:
    outputs = some_outputs(space)
    best, _ = space.log_prob_and_entropy(outputs, space.greedy(outputs))
    for seed in range(20):
        noise = space.noise(7, 3, generator=torch.Generator().manual_seed(seed))
        other, _ = space.log_prob_and_entropy(outputs, space.sample(outputs, noise))
        assert (other <= best + 1e-12).all()


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (gym.spaces.Discrete(5), Discrete(5)),
        (gym.spaces.MultiDiscrete([3, 2, 4]), MultiDiscrete((3, 2, 4))),
        (gym.spaces.Box(-1, 1, (2,)), Box(2)),
        (
            gym.spaces.Tuple((gym.spaces.MultiDiscrete([3, 2]), gym.spaces.Box(-1, 1, (4,)))),
            Mixed((3, 2), 4),
        ),
    ],
)
def test_kinds_of_gymnasium_spaces(space: gym.Space, expected: ActionSpace) -> None:
    assert action_space_of(space) == expected


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(3, start=1),
        gym.spaces.MultiDiscrete([[2, 2]]),
        gym.spaces.Box(-1, 1, (2, 2)),
        gym.spaces.Box(0, 9, (2,), np.int64),
        gym.spaces.Tuple((gym.spaces.Discrete(2),)),
        gym.spaces.Tuple((gym.spaces.Box(-1, 1, (4,)), gym.spaces.MultiDiscrete([3, 2]))),
    ],
    ids=str,
)
def test_other_spaces_are_refused(space: gym.Space) -> None:
    with pytest.raises(ValueError, match="is not supported: it must be Discrete or MultiDiscrete"):
        action_space_of(space)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_saved_policy_says_what_its_actions_are(space: ActionSpace, tmp_path: Path) -> None:
    policy = make_policy("mlp", 3, space, hidden_size=4)
    save_policy(policy, tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())["action_space"]
    assert action_space_from(description) == space
    loaded = load_policy(tmp_path)
    assert loaded.action_space == space
    observations = torch.ones(1, 1, 3)
    torch.testing.assert_close(
        loaded(observations).logits, policy(observations).logits, atol=0, rtol=0
    )


def test_policies_saved_before_there_were_other_actions_load(tmp_path: Path) -> None:
    save_policy(make_policy("mlp", 3, 4, hidden_size=4), tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    del description["action_space"]
    (tmp_path / "policy.json").write_text(json.dumps(description | {"num_actions": 4}))
    policy = load_policy(tmp_path)
    assert policy.num_actions == 4
    assert policy.action_space == Discrete(4)


@pytest.mark.parametrize("make", [lambda: Box(0), lambda: MultiDiscrete(()), lambda: Discrete(-1)])
def test_impossible_sizes(make) -> None:
    with pytest.raises(ValueError, match="actions must be at least 1"):
        make()
