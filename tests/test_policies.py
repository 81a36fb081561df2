"""Every registered policy: the contract, initial values, saving and loading."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sgrl import load_policy
from sgrl.nn import SyntheticGradient
from sgrl.nn.mixing import mixing_modules, mixing_summary, split_parameters
from sgrl.nn.recurrent_policies import SparseNetPolicy
from sgrl.nn.registry import (
    POLICIES,
    make_policy,
    mixing_statistics,
    save_policy,
)
from sgrl.results.metrics import columns_of

SMALL = {
    "gru": {"hidden_size": 8},
    "lstm": {"hidden_size": 8},
    "mlp": {"hidden_size": 8},
    "sparsenet": {"num_neurons": 8, "num_parents": 3, "num_input_neurons": 4},
    "dense": {"hidden_size": 8},
    "sparse_mlp": {"num_neurons": 8, "neuron_size": 2, "num_parents": 2},
}
SPARSE = ("sparsenet", "sparse_mlp")


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


@pytest.mark.parametrize("name", SPARSE)
def test_a_seed_gives_backprop_and_sgprop_the_same_network(name: str) -> None:
    sgprop, backprop = (
        small(name, seed=3),
        small(name, seed=3, propagation="backprop"),
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
    assert not any(parameter.any() for parameter in split_parameters(policy)[1])
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


def test_published_sizes_of_the_bandits_policies() -> None:
    """2,818,000 policy parameters with nine actions; the dense network within 4,000 of it."""
    sparse, dense = make_policy("sparse_mlp", 784, 9), make_policy("dense", 784, 9)
    count = sum(p.numel() for p in split_parameters(sparse)[0])
    assert count == 2_818_000
    assert abs(sum(p.numel() for p in dense.parameters()) - count) <= 4_000
    expected = {"keys": 50, "predictor_A": 2000, "predictor_bias": 2000}
    for name, inputs in expected.items():
        assert getattr(sparse.actor, name).std().item() == pytest.approx(inputs**-0.5, rel=0.2)
    for neurons in sparse.core.layers:
        assert (neurons.mixing_weight == 0.9).all()
        for name in ("weight_h", "bias", "predictor_h", "predictor_bias"):
            assert getattr(neurons, name).std().item() == pytest.approx(50**-0.5, rel=0.05)
    assert sparse.core.pixels.shape == (200, 50)
    assert all(len(set(row.tolist())) == 50 for row in sparse.core.pixels)
    assert sparse.core.parents.shape == (4, 200, 5)
    assert [layer.in_features for layer in dense.core[::2]] == [784, 745, 745, 745, 745]
    for layer in (*dense.core[::2], dense.actor):
        spread = (2 / (layer.in_features + layer.out_features)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(spread, rel=0.05)
        assert not layer.bias.any()


def test_feed_forward_policies_pass_over_masked_steps() -> None:
    """A batch with padding trains as the same samples without it."""
    observations, mask = torch.randn(4, 3, 5), torch.rand(4, 3) < 0.6
    policies = [small("sparse_mlp", value_head=True) for _ in range(2)]
    padded = policies[0](observations, mask=mask)
    plain = policies[1](observations[mask].unsqueeze(0))
    assert torch.equal(padded.logits[mask], plain.logits[0])
    assert torch.equal(padded.values[mask], plain.values[0])
    assert not padded.logits[~mask].any()
    for output in (padded, plain):
        (output.logits.square().sum() + output.values.sum()).backward()
    for one, other in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    weights = [policy.core.layers[2].mixing_weight for policy in policies]
    assert torch.equal(*weights)


def test_parameters_are_split() -> None:
    policy = small("sparsenet")
    split = split_parameters(policy)[0] + split_parameters(policy)[1]
    assert {id(p) for p in split} == {id(p) for p in policy.parameters()}
    assert len(split_parameters(policy)[1]) == 3
    for name in ("gru", "lstm", "mlp", "dense"):
        assert split_parameters(small(name))[1] == []
        assert mixing_statistics(small(name)) == {}
    assert split_parameters(small("sparsenet", propagation="backprop"))[1] == []


class TwoBlocks(SparseNetPolicy):
    """Three layers that mix, of 8, 8 and 16 neurons."""

    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> torch.nn.Module:
        encoder = super()._build_encoder(generator, dtype)
        return torch.nn.Sequential(*encoder, SyntheticGradient(16, 8, mixing_weight=0.25))

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size = super()._build_core(generator, dtype)
        self.blocks = torch.nn.ModuleDict({"last": SyntheticGradient(8, size // 8)})
        return size

    def run_core(self, embeddings: torch.Tensor, state: dict, mask: torch.Tensor | None) -> tuple:
        features, state = super().run_core(embeddings, state, mask)
        return self.blocks["last"](features), state


def test_every_layer_that_mixes_has_its_part_in_the_columns() -> None:
    settings = TwoBlocks.Settings(**SMALL["sparsenet"], mixing_weight=0.5)
    generator = torch.Generator().manual_seed(0)
    policy = TwoBlocks(5, 3, settings, generator, torch.float32)
    policy(torch.randn(6, 4, 5)).logits.sin().sum().backward()
    layers = [policy.encoder[4], policy.core, policy.blocks["last"]]
    assert mixing_modules(policy) == layers
    columns = mixing_statistics(policy)
    found = [{name: float(v) for name, v in layer.statistics.items()} for layer in layers]
    assert all(f["received_grad_norm"] > 0 for f in found)
    assert columns["predictor_loss"] == pytest.approx(sum(f["predictor_loss"] for f in found))
    for name in ("received_grad_norm", "mixed_grad_norm", "prediction_norm"):
        values = [f[name] for f in found]
        assert columns[name] == pytest.approx(np.average(values, weights=[16, 8, 8])), name
    weights = [layers[0].mixing_weight, layers[1].neurons.mixing_weight, layers[2].mixing_weight]
    assert len({values.mean().item() for values in weights}) == 3
    for prefix, values in (
        ("", torch.cat(weights)),
        *((f"layer{index}_", values) for index, values in enumerate(weights)),
    ):
        for name, value in mixing_summary(values).items():
            assert columns[prefix + name] == value
    assert len(columns) == 4 + 4 * 6
    assert columns_of(columns)[-2] == "layer2_mixing_weight_max"
    # A block alone, in any network, and an actor that predicts without mixing.
    block = torch.nn.Sequential(torch.nn.Linear(2, 3), SyntheticGradient(3))
    assert set(mixing_statistics(block)) >= {"mixing_weight_mean", "layer0_mixing_weight_mean"}
    assert not any("layer" in name for name in mixing_statistics(small("sparsenet")))


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
