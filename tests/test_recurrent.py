"""SparseRNN: backends against each other, gradients against finite differences, the interface."""

import copy
import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.mixing import split_parameters
from sgrl.nn.recurrent import SparseRNN

NORMS = ("predictor_loss", "received_grad_norm", "mixed_grad_norm", "prediction_norm")


def randomise(rnn: SparseRNN, generator: torch.Generator) -> None:
    """Non-zero predictors and spread mixing weights, so that every term counts."""
    with torch.no_grad():
        for parameter in split_parameters(rnn)[1]:
            parameter.normal_(0, 0.1, generator=generator)
        rnn.neurons.mixing_weight.uniform_(0, 1, generator=generator)


def run(rnn: SparseRNN, x: Tensor, h_0: Tensor, mask: Tensor | None, weights: Tensor) -> dict:
    """Forward and backward of a loss that uses the output and the last state."""
    rnn = copy.deepcopy(rnn)
    x, h_0 = x.clone().requires_grad_(), h_0.clone().requires_grad_()
    output, h_n = rnn(x, h_0, mask)
    ((output * weights).sum() + h_n.sin().sum()).backward()
    results = {f"grad {name}": p.grad for name, p in rnn.named_parameters()}
    results |= {"output": output.detach(), "h_n": h_n.detach(), "x": x.grad, "h_0": h_0.grad}
    results |= {"lambda": rnn.neurons.mixing_weight, **rnn.statistics}
    return results


@st.composite
def problems(draw: st.DrawFn) -> dict:
    num_neurons = draw(st.integers(1, 7))
    return {
        "sizes": {
            "input_size": draw(st.integers(1, 5)),
            "num_neurons": num_neurons,
            "neuron_size": draw(st.integers(1, 4)),
            "num_parents": draw(st.integers(1, num_neurons)),
            "num_slots": draw(st.integers(1, 4)),
            "num_input_neurons": draw(st.integers(1, num_neurons)),
        },
        "options": {
            "propagation": draw(st.sampled_from(["sgprop", "sgprop", "backprop"])),
            "adaptive": draw(st.booleans()),
            "mixing_rule": draw(st.sampled_from(["published", "episodes"])),
            "schedule_beta": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "positive_projection": draw(st.booleans()),
            "predictor_target": draw(st.sampled_from(["mixed", "received"])),
            "mask_predictions": draw(st.booleans()),
        },
        "length": draw(st.integers(1, 6)),
        "batch": draw(st.integers(1, 4)),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def make_problem(problem: dict, dtype: torch.dtype) -> tuple[SparseRNN, tuple]:
    generator = torch.Generator().manual_seed(problem["seed"])
    rnn = SparseRNN(**problem["sizes"], **problem["options"], generator=generator, dtype=dtype)
    randomise(rnn, generator)
    length, batch = problem["length"], problem["batch"]
    x = torch.randn(length, batch, rnn.input_size, generator=generator, dtype=dtype)
    h_0 = torch.randn(batch, rnn.num_neurons, rnn.neuron_size, generator=generator, dtype=dtype)
    weights = torch.randn(length, *h_0.shape, generator=generator, dtype=dtype)
    mask = None
    if problem["masked"]:
        mask = torch.rand(length, batch, generator=generator) < 0.7
    return rnn, (x, h_0, mask, weights)


def compare(problem: dict, dtype: torch.dtype, rtol: float, atol: float) -> None:
    rnn, arguments = make_problem(problem, dtype)
    rnn.backend = "eager"
    expected = run(rnn, *arguments)
    rnn.backend = "torch"
    actual = run(rnn, *arguments)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_backends_agree_on_random_sizes(problem: dict) -> None:
    compare(problem, torch.float64, rtol=1e-9, atol=1e-11)


def test_backends_agree_at_the_published_size() -> None:
    problem = {
        "sizes": {"input_size": 128},
        "options": {},
        "length": 12,
        "batch": 5,
        "masked": True,
        "seed": 3,
    }
    compare(problem, torch.float64, rtol=1e-9, atol=1e-11)
    compare(problem, torch.float32, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backprop_equals_finite_differences(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rnn = SparseRNN(
        3, 5, 2, 3, 2, 2, propagation="backprop", backend=backend, generator=generator
    ).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    h_0 = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    parameters = list(rnn.parameters())

    def function(x: Tensor, h_0: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return rnn(x, h_0)

    assert torch.autograd.gradcheck(function, (x, h_0, *parameters))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_of_one_is_backprop(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sgprop = SparseRNN(3, 6, 2, 2, 2, 2, adaptive=False, backend=backend, generator=generator)
    randomise(sgprop, generator)
    sgprop.neurons.mixing_weight.fill_(1)
    backprop = SparseRNN(3, 6, 2, 2, 2, 2, propagation="backprop", backend=backend)
    backprop.load_state_dict(sgprop.state_dict(), strict=False)
    x, h_0 = torch.randn(5, 4, 3, generator=generator), torch.zeros(4, 6, 2)
    weights = torch.randn(5, 4, 6, 2, generator=generator)
    expected = run(backprop, x, h_0, None, weights)
    actual = run(sgprop, x, h_0, None, weights)
    for name in [f"grad {n}" for n, _ in backprop.named_parameters()] + ["output", "x", "h_0"]:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_switches(backend: str) -> None:
    """The lambda update can be turned off; a target changes only the predictor's gradient."""
    generator = torch.Generator().manual_seed(2)
    rnn = SparseRNN(3, 6, 2, 2, 2, 2, backend=backend, generator=generator)
    randomise(rnn, generator)
    x, h_0 = torch.randn(5, 4, 3, generator=generator), torch.zeros(4, 6, 2)
    weights = torch.randn(5, 4, 6, 2, generator=generator)
    mixed = run(rnn, x, h_0, None, weights)
    assert not torch.equal(mixed["lambda"], rnn.neurons.mixing_weight)
    rnn.rule.adaptive = False
    rnn.sgprop = dataclasses.replace(rnn.sgprop, predictor_target="received")
    received = run(rnn, x, h_0, None, weights)
    assert torch.equal(received["lambda"], rnn.neurons.mixing_weight)
    for name in mixed:
        same = torch.equal(mixed[name], received[name])
        changes = "predictor" in name or name == "lambda"
        assert same != changes, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_can_be_cut(backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    rnn = SparseRNN(3, 6, 2, 2, 2, 2, backend=backend, flatten=True, generator=generator)
    x = torch.randn(7, 4, 3, generator=generator)
    whole, last = rnn(x)
    assert whole.shape == (7, 4, 12)
    first, h = rnn(x[:3])
    second, h = rnn(x[3:], h)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(h, last)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x)[0], whole)


def test_used_like_a_gru() -> None:
    """Any optimizer, deep copies, state dicts, and dtype changes work as for nn.GRU."""
    rnn = SparseRNN(3, 6, 2, 2, 2, 2, mixing_weight=1).double()
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    output, h_n = rnn(torch.randn(5, 4, 3, dtype=torch.float64))
    assert output.shape == (5, 4, 6, 2)
    assert torch.equal(h_n, output[-1])
    output.square().sum().backward()
    optimizer.step()
    twin = SparseRNN(3, 6, 2, 2, 2, 2).double()
    twin.load_state_dict(rnn.state_dict())
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    assert torch.equal(twin(x)[0], rnn(x)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_parents": 9}, "num_parents (9) must be at most num_neurons (6)"),
        ({"num_input_neurons": 9}, "num_input_neurons (9) must be at most num_neurons (6)"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"propagation": "bptt"}, "propagation must be 'backprop' or 'sgprop'"),
        ({"mixing_weight": 1.5}, "mixing_weight must be between 0 and 1"),
        ({"backend": "eagre"}, "did you mean 'eager'?"),
    ],
)
def test_impossible_settings(arguments: dict, message: str) -> None:
    sizes = {"num_neurons": 6, "num_parents": 2, "num_input_neurons": 2}
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseRNN(3, **(sizes | arguments))


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_shapes() -> None:
    rnn = SparseRNN(3, 6, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="x must be"):
        rnn(torch.zeros(5, 4, 2))
    with pytest.raises(ValueError, match="mask must be bool"):
        rnn(torch.zeros(5, 4, 3), mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        rnn(torch.zeros(5, 4, 3), mask=torch.ones(5, 4))
    with pytest.raises(ValueError, match="at least one step"):
        rnn(torch.zeros(0, 4, 3))
    with pytest.raises(ValueError, match="h_0 must be"):
        rnn(torch.zeros(5, 4, 3), torch.zeros(4, 6, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_cuda_equals_cpu(backend: str, dtype: torch.dtype, rtol: float) -> None:
    problem = {
        "sizes": {"input_size": 16, "num_neurons": 24},
        "options": {},
        "length": 6,
        "batch": 4,
        "masked": True,
        "seed": 5,
    }
    problem["sizes"]["num_input_neurons"] = 8
    rnn, arguments = make_problem(problem, dtype)
    rnn.backend = backend
    expected = run(rnn, *arguments)
    on_gpu = [a if a is None else a.cuda() for a in arguments]
    if backend == "native":
        with pytest.raises(ValueError, match="runs on the CPU, not on cuda"):
            run(rnn.cuda(), *on_gpu)
        return
    actual = run(rnn.cuda(), *on_gpu)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value, rtol=rtol, atol=rtol / 100)
