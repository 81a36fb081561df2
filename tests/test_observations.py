"""Running normalisation of observations: its statistics, and that acting and learning use them."""

import copy
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from sgrl import load_policy
from sgrl.envs.registry import make_vector
from sgrl.nn.observations import CLIP, EPSILON, RunningNormalizer
from sgrl.nn.policy import Policy
from sgrl.nn.registry import make_policy, save_policy
from sgrl.reinforce import Rollout, train
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.results.evaluation import evaluate
from sgrl.rllib import GRUNetwork

PAGE = Path(__file__).parent.parent / "docs" / "observations.md"
SIZES = {
    "gru": {"hidden_size": 8, "feature_size": 8, "embedding_size": 8},
    "mlp": {"hidden_size": 8},
    "sparsenet": {"num_neurons": 8, "num_parents": 3, "num_input_neurons": 4},
    "dense": {"hidden_size": 8},
    "sparse_mlp": {"num_neurons": 8, "neuron_size": 2, "num_parents": 2},
}
KINDS = [(name, {}) for name in SIZES]
KINDS += [(name, {"backend": b}) for name in ("gru", "sparsenet") for b in ("native", "eager")]
KINDS += [("sparsenet", {"backend": "torch", "neuron_noise": 0.1})]


def make(name: str, **settings: object) -> Policy:
    return make_policy(name, 5, 3, seed=1, **(SIZES[name] | settings))


def test_the_statistics_are_those_of_all_valid_steps() -> None:
    draws = np.random.default_rng(0)
    normalizer = RunningNormalizer(3)
    seen = []
    for length in (1, 7, 4):
        batch = draws.normal(1e4, [1e-2, 1, 1e3], (length, 5, 3))
        batch[..., 2] = 0.1  # one that never changes
        mask = draws.random((length, 5)) < 0.7
        batch[~mask] = np.nan  # neither these nor a batch without valid steps count
        normalizer.observe(torch.from_numpy(batch), torch.from_numpy(mask))
        normalizer.observe(torch.from_numpy(batch), torch.zeros(length, 5, dtype=torch.bool))
        seen.append(batch[mask])
    steps = np.concatenate(seen)
    assert int(normalizer.count) == len(steps)
    np.testing.assert_allclose(normalizer.mean, steps.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.variance, steps.var(0), rtol=1e-9, atol=1e-20)

    x = torch.tensor([[1e4 + 1e-2, 1e4 - 50.0, 0.1]], dtype=torch.float64)
    expected = (x.numpy() - steps.mean(0)) / np.sqrt(steps.var(0) + EPSILON)
    assert expected[0, 1] < -CLIP
    expected = expected.clip(-CLIP, CLIP)
    np.testing.assert_allclose(normalizer(x), expected, rtol=1e-6, atol=1e-6)


def test_what_is_not_finite_is_refused() -> None:
    normalizer = RunningNormalizer(2)
    normalizer.observe(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    before = copy.deepcopy(normalizer.state_dict())
    for value in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="an observation is NaN or infinite: "):
            normalizer.observe(torch.tensor([[0.0, 1.0], [value, 2.0]]))
    for name, value in normalizer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("name", "settings"), KINDS)
def test_acting_and_learning_read_normalised_observations(name: str, settings: dict) -> None:
    """As a policy without the setting does that is given them normalised by hand."""
    policy = make(name, normalize_observations=True, **settings)
    plain = make(name, **settings)
    length = 1 if name == "sparse_mlp" else 6
    observations = 100 + 20 * torch.randn(length, 4, 5)
    policy.observe(observations + torch.randn(5))
    state = policy.state_dict()
    mean, variance = (state[f"normalizer.{key}"].float() for key in ("mean", "variance"))
    by_hand = ((observations - mean) / (variance + EPSILON).sqrt()).clamp(-CLIP, CLIP)
    mask = torch.ones(length, 4, dtype=torch.bool)
    noise = torch.randn(length, 4, policy.noise_size) if policy.noise_size else None

    outputs = []
    for one, seen in ((policy, observations), (plain, by_hand)):
        acting = one.acting(length, 4, keep=True, noise=noise)
        with torch.inference_mode():
            logits = torch.stack([acting.step(now).clone() for now in seen])
        replayed = acting.replay(one, seen, mask, noise)
        replayed.logits.square().sum().backward()
        outputs.append((logits, replayed.logits, acting.is_of(one, one.prepare(seen), noise)))
    (logits, replayed, kept), expected = outputs[0], outputs[1]
    torch.testing.assert_close(logits, expected[0])
    torch.testing.assert_close(replayed, expected[1])
    torch.testing.assert_close(logits, replayed)
    assert kept == expected[2]
    assert kept or settings.get("backend") != "native"
    for one, other in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_what_was_kept_goes_with_its_statistics() -> None:
    """Not used for an update once they have changed."""
    policy = make("sparsenet", normalize_observations=True, backend="native")
    observations = 3 + torch.randn(6, 4, 5)
    acting = policy.acting(6, 4, keep=True)
    with torch.inference_mode():
        for now in observations:
            acting.step(now)
    assert acting.is_of(policy, policy.prepare(observations))
    policy.observe(observations)
    assert not acting.is_of(policy, policy.prepare(observations))
    replayed = acting.replay(policy, observations, None)
    assert torch.equal(replayed.logits, policy(observations).logits)


def test_a_batch_is_taken_in_after_its_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, its valid steps alone; sampling leaves the statistics as they are."""
    env = make_vector("labyrinth_escape", 3, {"episode_length": 12})
    settings = {"normalize_observations": True, **SIZES["gru"]}
    policy = make_policy("gru", env.observation_size, env.num_actions, **settings)
    batches = []
    collect = Rollout.collect

    def spy(rollout: Rollout, *args: Any) -> EpisodeBatch:
        assert rollout.policy.normalizer is not None
        before = int(rollout.policy.normalizer.count)
        batches.append(collect(rollout, *args))
        assert int(rollout.policy.normalizer.count) == before
        return batches[-1]

    monkeypatch.setattr(Rollout, "collect", spy)
    steps = torch.empty(0, env.observation_size, dtype=torch.float64)
    for row in train(policy, env, 2, seed=3):
        steps = torch.cat([steps, batches[-1].observations[batches[-1].mask].double()])
        assert policy.normalizer is not None
        assert int(policy.normalizer.count) == len(steps) == row["env_steps"]
        torch.testing.assert_close(policy.normalizer.mean, steps.mean(0))
        torch.testing.assert_close(policy.normalizer.variance, steps.var(0, correction=0))


def test_evaluation_leaves_them_alone(tmp_path: Path) -> None:
    env = make_vector("labyrinth_escape", 3, {"episode_length": 12})
    policy = make_policy("mlp", env.observation_size, 4, normalize_observations=True)
    for _ in train(policy, env, 1):
        pass
    environment = {"env": "labyrinth_escape", "env_config": {"episode_length": 12}}
    save_policy(policy, tmp_path, environment=environment)
    loaded = load_policy(tmp_path)
    for name, value in policy.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value), name
    Rollout(env, loaded, seed=9).collect()
    evaluate(tmp_path, episodes=2)
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_old_stack_refuses_it() -> None:
    spaces = (gym.spaces.Box(-1, 1, (5,)), gym.spaces.Discrete(3))
    with pytest.raises(ValueError, match="normalize_observations must be false on the old API"):
        GRUNetwork(*spaces, 3, {"max_seq_len": 4}, "gru", normalize_observations=True)


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/observations.md runs."""
    monkeypatch.delitem(gym.registry, "Corners-v0", raising=False)
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(code, PAGE.name, "exec"), {})
