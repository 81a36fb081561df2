"""`shuffle_predictions`: predictions keep their lengths and lose what they say."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.registry import load_policy, make_policy, save_policy
from sgrl.nn.sgprop import SampleShuffle

SIZES = {"num_neurons": 5, "neuron_size": 3, "num_parents": 2, "num_slots": 2}
T, B = 4, 6


def build(network: str, seed: int = 0, **settings: Any) -> SparseRNN | SparseMLP:
    """A small network whose predictors are not zero."""
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "mixing_weight": 0.4,
        "shuffle_predictions": True,
        "generator": generator,
        "dtype": torch.float64,
        **settings,
    }
    built: SparseRNN | SparseMLP
    if network == "recurrent":
        built = SparseRNN(4, **SIZES, num_input_neurons=2, **settings)
    else:
        built = SparseMLP(8, **SIZES, **{"num_layers": 3} | settings)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in built.named_parameters():
        if "predictor" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw).to(parameter))
    return built


def train_twice(network: SparseRNN | SparseMLP) -> dict[str, Tensor]:
    """Gradients of two backward passes, summed, and the mixing weights after them."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):
        if isinstance(network, SparseRNN):
            x = torch.randn(T, B, 4, generator=draw, dtype=torch.float64)
            mask = torch.rand(T, B, generator=draw) < 0.7
            output = network(x, mask=mask)[0]
        else:
            output = network(torch.randn(B, 8, generator=draw, dtype=torch.float64))
        output.backward(torch.randn(output.shape, generator=draw, dtype=torch.float64))
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return grads | {name: b for name, b in network.named_buffers() if "mixing_weight" in name}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor], exactly: bool) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(value, second[name], **tolerance)


def test_permutations() -> None:
    shuffle = SampleShuffle(torch.Generator().manual_seed(0))
    valid = torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    first, second = shuffle.permutation(valid), shuffle.permutation(valid)
    for order in (first, second):
        assert torch.equal(order.sort().values, torch.arange(60))
        assert torch.equal(valid.flatten()[order], valid.flatten())
    assert not torch.equal(first, second)
    again = SampleShuffle(torch.Generator().manual_seed(3))
    again.load_state_dict({"drawn": shuffle.drawn - torch.tensor([0, 1])})
    assert torch.equal(again.permutation(valid), second)
    other = SampleShuffle(torch.Generator().manual_seed(1))
    assert other.drawn[0] != shuffle.drawn[0]
    assert not torch.equal(other.permutation(valid), first)
    # Every sample comes to every place of its kind.
    places = torch.stack([shuffle.permutation(torch.ones(3, dtype=torch.bool)) for _ in range(60)])
    assert len(places.unique(dim=0)) == 6


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("network", ["recurrent", "feedforward"])
def test_backends_agree(network: str, projection: bool) -> None:
    settings = {"positive_projection": projection} if network == "recurrent" else {}
    eager, fast = (train_twice(build(network, backend=b, **settings)) for b in ("eager", "torch"))
    assert_equal(eager, fast, exactly=False)
    plain = train_twice(build(network, backend="eager", shuffle_predictions=False, **settings))
    assert any(not torch.allclose(value, plain[name]) for name, value in eager.items())


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("network", ["recurrent", "feedforward"])
def test_predictions_in_their_places_are_no_placebo(
    network: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SampleShuffle, "permutation", lambda self, valid: torch.arange(valid.numel())
    )
    placebo = train_twice(build(network, backend=backend))
    assert_equal(
        placebo, train_twice(build(network, backend=backend, shuffle_predictions=False)), True
    )


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_a_layer_by_its_definition(backend: str) -> None:
    """Feedback of sample b: lambda g_b + (1 - lambda) s_c, where c is the sample dealt to b."""
    layer = build("feedforward", backend=backend, num_layers=1, adaptive=False)
    plain = build("feedforward", backend=backend, num_layers=1, propagation="backprop")
    x, g = torch.randn(B, 8, dtype=torch.float64), torch.randn(B, 5, 3, dtype=torch.float64)
    neurons = layer.layers[0]
    s = neurons.predict(neurons(x[:, layer.pixels])).detach()
    twin = SampleShuffle(None)
    twin.load_state_dict(layer.shuffle.state_dict())
    order = twin.permutation(torch.ones(B, dtype=torch.bool))
    assert not torch.equal(order, torch.arange(B))
    layer(x).backward(g)
    plain(x).backward(0.4 * g + 0.6 * s[order])
    for name in ("weight_h", "bias"):
        torch.testing.assert_close(
            getattr(neurons, name).grad, getattr(plain.layers[0], name).grad, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("network", ["recurrent", "feedforward"])
def test_lambda_of_one_is_backprop(network: str) -> None:
    settings = {"mixing_weight": 1.0, "adaptive": False, "backend": "torch"}
    placebo, plain = (
        train_twice(build(network, shuffle_predictions=on, **settings)) for on in (True, False)
    )
    assert_equal(placebo, plain, exactly=True)


@pytest.mark.parametrize("name", ["sparsenet", "sparse_mlp"])
def test_policies(name: str, tmp_path: Any) -> None:
    settings = {"num_input_neurons": 2} if name == "sparsenet" else {}
    policy = make_policy(name, 12, 4, **SIZES, shuffle_predictions=True, **settings)
    assert policy.core.runs_on(next(policy.parameters())) == "torch"
    policy.core.shuffle.drawn[1] = 9
    save_policy(policy, tmp_path)
    assert torch.equal(load_policy(tmp_path).core.shuffle.drawn, policy.core.shuffle.drawn)
    with pytest.raises(ValueError, match="shuffle_predictions is for the backends torch and eager"):
        make_policy(name, 12, 4, **SIZES, shuffle_predictions=True, backend="native", **settings)
    # With and without it, a network starts the same.
    plain = make_policy(name, 12, 4, **SIZES, **settings)
    state = policy.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
