"""Every registered policy: the contract, initial values, saving and loading."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgrl import load_policy
from sgrl.nn.policies import (
    POLICIES,
    make_policy,
    mixing_statistics,
    policy_parameters,
    predictor_parameters,
    save_policy,
)

SMALL = {
    "gru": {"hidden_size": 8},
    "lstm": {"hidden_size": 8},
    "mlp": {"hidden_size": 8},
    "sparsenet": {"num_neurons": 8, "num_parents": 3, "num_input_neurons": 4},
}


def small(name: str, **settings: object) -> torch.nn.Module:
    return make_policy(name, 5, 3, **(SMALL.get(name, {}) | settings))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("value_head", [False, True])
def test_steps_equal_the_unroll(name: str, value_head: bool) -> None:
    policy = small(name, value_head=value_head)
    observations = torch.randn(6, 4, 5)
    whole = policy(observations)
    assert whole.logits.shape == (6, 4, 3)
    assert (whole.values is None) != value_head
    state = policy.initial_state(4)
    assert all(value.shape[0] == 4 and not value.any() for value in state.values())
    for t in range(6):
        step = policy.step(observations[t], state)
        state = step.state
        torch.testing.assert_close(step.logits, whole.logits[t])
        if value_head:
            torch.testing.assert_close(step.values, whole.values[t])
    assert state.keys() == whole.state.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, whole.state[key])
    whole.logits.sum().backward()


@pytest.mark.parametrize("name", POLICIES)
def test_the_seed_decides_everything(name: str) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = small(name, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    two, other = small(name, seed=7).state_dict(), small(name, seed=8).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_seed_gives_backprop_and_sgprop_the_same_network() -> None:
    sgprop, backprop = (
        small("sparsenet", seed=3),
        small("sparsenet", seed=3, propagation="backprop"),
    )
    state = sgprop.state_dict()
    for key, value in backprop.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = small(name, dtype=dtype, seed=3)
    save_policy(policy, tmp_path, environment={"env": "labyrinth_escape"})
    loaded = load_policy(tmp_path)
    assert loaded.settings == policy.settings
    state, expected = loaded.state_dict(), policy.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    description = json.loads((tmp_path / "policy.json").read_text())
    assert description["environment"] == {"env": "labyrinth_escape"}


def test_loading_needs_no_ray(tmp_path: Path) -> None:
    save_policy(small("sparsenet"), tmp_path)
    code = f"import sgrl, sys; sgrl.load_policy({str(tmp_path)!r}); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unreadable_policies(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no policy\.json"):
        load_policy(tmp_path)
    save_policy(small("gru"), tmp_path)
    weights = tmp_path / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no readable policy"):
        load_policy(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    edits = [{"settings": None}, {"dtype": "nn"}, {"num_actions": "4"}, {"format": 2}]
    for text in ["{", "[]", *(json.dumps(description | edit) for edit in edits)]:
        (tmp_path / "policy.json").write_text(text)
        with pytest.raises(ValueError, match="holds no readable policy"):
            load_policy(tmp_path)


def test_published_sizes_and_initial_values() -> None:
    policy = make_policy("sparsenet", 56, 4, seed=1)
    neurons = policy.core.neurons
    assert neurons.input_size == 164
    assert neurons.weight_h.shape == (128, 42, 36)
    assert neurons.weight_x.shape == (16, 42, 128)
    for parameter in (neurons.weight_h, neurons.weight_x, neurons.bias):
        assert parameter.std().item() == pytest.approx(164**-0.5, rel=0.05)
    assert not any(parameter.any() for parameter in predictor_parameters(policy))
    assert torch.equal(neurons.mixing_weight, torch.ones(128))
    assert policy.actor.keys.shape == policy.actor.A.shape == (4, 6, 768)
    for parameter in (policy.actor.keys, policy.actor.A):
        assert parameter.std().item() == pytest.approx(768**-0.5, rel=0.05)
    assert not policy.actor.b.any()

    for name, stacked in (("gru", 768), ("lstm", 1024)):
        core = make_policy(name, 56, 4).core
        assert core.weight_hh_l0.shape == (stacked, 256)
        for weight in (core.weight_hh_l0, core.weight_ih_l0):
            torch.testing.assert_close(
                weight.T @ weight, torch.eye(weight.shape[1]), rtol=0, atol=1e-5
            )
        assert not core.bias_hh_l0.any()
    actor = make_policy("gru", 56, 4).actor
    assert [layer.out_features for layer in actor[::2]] == [128, 128, 4]
    assert actor[4].weight.std().item() == pytest.approx(0.01, rel=0.2)
    encoder = policy.encoder
    torch.testing.assert_close(encoder[0].weight.T @ encoder[0].weight, torch.eye(56))
    torch.testing.assert_close(
        encoder[2].weight @ encoder[2].weight.T, torch.eye(128), rtol=0, atol=1e-5
    )


def test_parameters_are_split() -> None:
    policy = small("sparsenet")
    split = policy_parameters(policy) + predictor_parameters(policy)
    assert {id(p) for p in split} == {id(p) for p in policy.parameters()}
    assert len(predictor_parameters(policy)) == 3
    for name in ("gru", "lstm", "mlp"):
        assert predictor_parameters(small(name)) == []
        assert mixing_statistics(small(name)) == {}
    assert predictor_parameters(small("sparsenet", propagation="backprop")) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("grru", {}, "unknown policy 'grru'; did you mean 'gru'?"),
        ("gru", {"hiden_size": 8}, "has no setting 'hiden_size'; did you mean 'hidden_size'?"),
        ("gru", {"hidden_size": "big"}, "hidden_size must be a whole number, got 'big'"),
        ("gru", {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ("gru", {"value_head": 1}, "value_head must be true or false, got 1"),
        ("sparsenet", {"num_parents": 200}, r"num_parents \(200\) must be at most num_neurons"),
        ("sparsenet", {"propagation": "bp"}, "propagation must be 'sgprop' or 'backprop'"),
        ("sparsenet", {"mixing_weight": 2}, "mixing_weight must be between 0 and 1, got 2.0"),
        ("sparsenet", {"actor_slots": 0}, "actor_slots must be at least 1"),
    ],
)
def test_bad_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(name, 5, 3, **settings)
