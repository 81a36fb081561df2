"""SparseMLP: backends against each other, gradients against finite differences, the interface."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.mixing import backward_phase, split_parameters


def randomise(mlp: SparseMLP, generator: torch.Generator) -> None:
    """Spread mixing weights, so that every term counts."""
    for neurons in mlp.layers:
        neurons.mixing_weight.uniform_(0, 1, generator=generator)


def run(mlp: SparseMLP, x: Tensor, weights: Tensor, phases: tuple[str, ...] = ()) -> dict:
    """Forward, and the backward passes of a loss, one after another on the same graph."""
    mlp = copy.deepcopy(mlp)
    x = x.clone().requires_grad_()
    output = mlp(x)
    loss = (output * weights).sum()
    if not phases:
        loss.backward()
    for phase in phases:
        trained = split_parameters(mlp)[phase == "predictor"]
        inputs = trained if phase == "predictor" else [x, *trained]
        with backward_phase(mlp, phase):
            torch.autograd.backward(loss, inputs=inputs or [x], retain_graph=True)
        with torch.no_grad():
            for parameter in split_parameters(mlp)[1]:
                parameter.add_(0.1)  # what is mixed is what they predict now
    results = {f"grad {name}": p.grad for name, p in mlp.named_parameters()}
    results |= {"output": output.detach(), "x": x.grad, **mlp.statistics}
    results |= {f"lambda {i}": n.mixing_weight for i, n in enumerate(mlp.layers)}
    return results


@st.composite
def problems(draw: st.DrawFn) -> dict:
    num_neurons, size = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    num_parents = draw(st.integers(1, num_neurons))
    return {
        "settings": {
            "input_size": num_parents * size + draw(st.integers(0, 3)),
            "num_layers": draw(st.integers(1, 4)),
            "num_neurons": num_neurons,
            "neuron_size": size,
            "num_parents": num_parents,
            "num_slots": draw(st.integers(1, 4)),
            "residual": draw(st.booleans()),
            "propagation": draw(st.sampled_from(["sgprop", "sgprop", "backprop"])),
            "adaptive": draw(st.booleans()),
            "predictor_target": draw(st.sampled_from(["mixed", "received"])),
        },
        "phases": draw(st.sampled_from([(), ("predictor", "policy")])),
        "batch": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 2**31)),
    }


def compare(problem: dict, backend: str, dtype: torch.dtype, rtol: float, atol: float) -> None:
    generator = torch.Generator().manual_seed(problem["seed"])
    mlp = SparseMLP(**problem["settings"], generator=generator, dtype=dtype)
    randomise(mlp, generator)
    x = torch.randn(problem["batch"], mlp.input_size, generator=generator, dtype=dtype)
    shape = (problem["batch"], mlp.num_neurons, mlp.neuron_size)
    weights = torch.randn(shape, generator=generator, dtype=dtype)
    results = []
    for name in ("eager", backend):
        mlp.backend = name
        results.append(run(mlp, x, weights, problem["phases"]))
    expected, actual = results
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


OTHERS = [name for name in BACKENDS if name != "eager"]


@pytest.mark.parametrize("backend", OTHERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_backends_agree_on_random_sizes(backend: str, problem: dict) -> None:
    compare(problem, backend, torch.float64, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", OTHERS)
def test_backends_agree_at_the_published_size(backend: str) -> None:
    problem = {
        "settings": {"input_size": 784},
        "phases": ("predictor", "policy"),
        "batch": 16,
        "seed": 3,
    }
    compare(problem, backend, torch.float64, rtol=1e-9, atol=1e-11)
    compare(problem, backend, torch.float32, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backprop_equals_finite_differences(backend: str, residual: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mlp = SparseMLP(
        7,
        3,
        4,
        2,
        2,
        2,
        residual=residual,
        propagation="backprop",
        backend=backend,
        generator=generator,
        dtype=torch.float64,
    )
    x = torch.randn(3, 7, dtype=torch.float64, generator=generator, requires_grad=True)

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return mlp(x)

    assert torch.autograd.gradcheck(function, (x, *mlp.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_of_one_is_backprop(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = (12, 3, 6, 2, 2, 2)
    sgprop = SparseMLP(
        *sizes, adaptive=False, mixing_weight=1, backend=backend, generator=generator
    )
    backprop = SparseMLP(*sizes, propagation="backprop", backend=backend)
    backprop.load_state_dict(sgprop.state_dict(), strict=False)
    x, weights = torch.randn(5, 12, generator=generator), torch.randn(5, 6, 2, generator=generator)
    expected, actual = run(backprop, x, weights), run(sgprop, x, weights)
    for name in [f"grad {n}" for n, _ in backprop.named_parameters()] + ["output", "x"]:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_phase_makes_its_own_gradients(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    mlp = SparseMLP(12, 3, 6, 2, 2, 2, backend=backend, generator=generator)
    x = torch.randn(5, 12, generator=generator)
    weights = torch.randn(5, 6, 2, generator=generator)
    names = {"policy": [], "predictor": []}
    for name, _ in mlp.named_parameters():
        kind = "predictor" if "predictor" in name else "policy"
        names[kind].append(f"grad {name}")
    both = run(mlp, x, weights)
    for phase, other in (("policy", "predictor"), ("predictor", "policy")):
        results = run(mlp, x, weights, (phase,))
        assert all(results[name] is None for name in names[other])
        for name in names[phase]:
            torch.testing.assert_close(results[name], both[name])
        moved = not torch.equal(results["lambda 0"], mlp.layers[0].mixing_weight)
        assert moved == (phase == "policy")
        assert ("predictor_loss" in results) == (phase == "predictor")
    assert mlp.rule.phase == "joint"


@pytest.mark.parametrize("backend", BACKENDS)
def test_used_like_a_sequential(backend: str) -> None:
    """Any leading axes, any optimizer, deep copies, state dicts, and dtype changes."""
    mlp = SparseMLP(12, 3, 6, 2, 2, 2, flatten=True, backend=backend).double()
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    network = torch.nn.Sequential(torch.nn.Linear(12, 12).double(), mlp)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    output = network(x)
    assert output.shape == (4, 5, 12)
    output.square().sum().backward()
    optimizer.step()
    twin = SparseMLP(12, 3, 6, 2, 2, 2, flatten=True, backend=backend).double()
    twin.load_state_dict(mlp.state_dict())
    assert torch.equal(twin(x), mlp(x))
    with torch.no_grad():
        many = torch.randn(700, 12, dtype=torch.float64)
        torch.testing.assert_close(mlp(many)[513], mlp(many[513:514])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_parents": 9}, "num_parents (9) must be at most num_neurons (6)"),
        ({"neuron_size": 7}, "num_parents * neuron_size (14) must be at most input_size (12)"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"propagation": "bptt"}, "propagation must be 'backprop' or 'sgprop'"),
        ({"mixing_weight": 1.5}, "mixing_weight must be between 0 and 1"),
        ({"backend": "eagre"}, "did you mean 'eager'?"),
    ],
)
def test_impossible_settings(arguments: dict, message: str) -> None:
    sizes = {"num_neurons": 6, "num_parents": 2, "neuron_size": 2}
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseMLP(12, **(sizes | arguments))


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_shapes() -> None:
    mlp = SparseMLP(12, 3, 6, 2, 2, 2)
    for shape in ((5, 11), (12,), (0, 12)):
        with pytest.raises(ValueError, match="x must be"):
            mlp(torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_cuda_equals_cpu(backend: str, dtype: torch.dtype, rtol: float) -> None:
    generator = torch.Generator().manual_seed(5)
    mlp = SparseMLP(40, 3, 12, 3, 3, 2, backend=backend, generator=generator, dtype=dtype)
    x = torch.randn(6, 40, generator=generator, dtype=dtype)
    weights = torch.randn(6, 12, 3, generator=generator, dtype=dtype)
    phases = ("predictor", "policy")
    expected = run(mlp, x, weights, phases)
    if backend == "native":
        with pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
            run(mlp.cuda(), x.cuda(), weights.cuda(), phases)
        return
    actual = run(mlp.cuda(), x.cuda(), weights.cuda(), phases)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value, rtol=rtol, atol=rtol / 100)
