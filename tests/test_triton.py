"""Triton kernels against the torch backend: on the CPU in Triton's interpreter, and compiled."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
# Before triton is imported, and never where it is to run on a GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sgrl.nn.connectivity import edge_table
from sgrl.nn.kernels import triton_layer, triton_unroll
from sgrl.nn.neuron import Layer
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.registry import make_policy
from sgrl.nn.sgprop import temporal_schedule
from sgrl.nn.stacking import stack_policies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: On a GPU the kernels serve float32 alone.
DTYPES = [torch.float32] if DEVICE == "cuda" else [torch.float32, torch.float64]

#: num_runs, T, B, E, W, N, P, M, num_input_neurons
SIZES = {
    "one": (1, 3, 4, 3, 8, 2, 2, 2, 4),
    "odd batch": (2, 3, 5, 3, 8, 3, 2, 2, 3),
    "tiles of neurons": (1, 2, 3, 2, 11, 2, 3, 3, 7),
    "three": (3, 2, 9, 4, 6, 1, 2, 1, 6),
    "one of all": (2, 1, 1, 1, 1, 1, 1, 1, 1),
}


class Case:
    """Separate networks, the same ones stacked, and inputs."""

    def __init__(self, sizes, dtype=torch.float32, **settings):
        self.num_runs, self.length, self.batch, external, width, size, parents, slots, inputs = (
            sizes
        )
        sources = [torch.Generator().manual_seed(seed) for seed in range(self.num_runs)]
        self.nets = [
            SparseRNN(
                external,
                width,
                size,
                parents,
                slots,
                inputs,
                backend="torch",
                generator=source,
                dtype=dtype,
                **settings,
            )
            for source in sources
        ]
        draw = torch.Generator().manual_seed(100)

        def normal(*shape):
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE, dtype)

        for net in self.nets:
            net.to(DEVICE)
            with torch.no_grad():
                net.neurons.bias.copy_(normal(*net.neurons.bias.shape))
                net.neurons.weight_h.mul_(3)
                if net.neurons.has_predictor:
                    for name in ("predictor_h", "predictor_x", "predictor_bias"):
                        parameter = getattr(net.neurons, name)
                        parameter.copy_(0.5 * normal(*parameter.shape))
                    net.neurons.mixing_weight.copy_(normal(width).abs().clamp(max=1))
        self.x = normal(self.num_runs, self.length, self.batch, external)
        self.h_0 = normal(self.num_runs * width, size, self.batch)
        self.layer = stacked([net.layer() for net in self.nets])

    def run(self, values, axis=0):
        """The parts of F neurons along an axis, run by run."""
        return values.chunk(self.num_runs, dim=axis)


def stacked(layers):
    """One layer that holds several, side by side."""
    width = len(layers[0].weight_h)
    sources = torch.cat([x.sources + s * width for s, x in enumerate(layers)])
    changed = {"sources": sources, "edges": edge_table(sources, len(sources))}
    changed |= {"runs": len(layers), "num_neurons": len(sources)}
    for name in ("weight_h", "weight_x", "bias", "predictor_h", "predictor_x", "predictor_bias"):
        values = [getattr(layer, name) for layer in layers]
        changed[name] = None if values[0] is None else torch.cat([v.detach() for v in values])
    changed["mixing_weight"] = torch.cat([layer.mixing_weight for layer in layers])
    return Layer(**{**layers[0]._asdict(), **changed})


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def new_empty(self, *size, **kwargs):
        made = empty(self, *size, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **kwargs: empty_like(x, **kwargs).fill_(torch.nan)
    )


def forward(case):
    """States, attention and slots of a whole pass."""
    h_0 = case.h_0.unflatten(0, (case.num_runs, -1)).permute(0, 3, 1, 2)
    passed = triton_unroll.Pass(case.layer, case.length, h_0)
    passed.steps(0, passed.external(case.x))
    return passed.states, passed.attention, passed.slots


def close(actual, expected, tolerance=None):
    tolerance = tolerance or (1e-6 if expected.dtype == torch.float32 else 1e-12)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def eager(case):
    """States after each step, attention, slots and predictions by the definition."""
    runs = []
    for s, net in enumerate(case.nets):
        state, made = case.run(case.h_0)[s].permute(2, 0, 1), []
        for x in case.x[s]:
            activation = net.neurons(net.neurons.read(state, net.parents, x))
            state = activation.output
            guess = net.neurons.predict(activation) if net.sgprop.mixes else state
            made.append((state, activation.attention, activation.slots, guess))
        # Samples last: [T, W, ..., B].
        runs.append([torch.stack(values).movedim(1, -1) for values in zip(*made, strict=True)])
    return [torch.cat(values, dim=1) for values in zip(*runs, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_forward_and_predictions_equal_eager(sizes, dtype):
    case = Case(sizes, dtype, propagation="sgprop")
    states, attention, slots = forward(case)
    prediction = triton_layer.predict(case.layer, case.x, states, attention)
    close(states[0], case.h_0)
    made = (states[1:], attention, slots, prediction)
    for actual, expected in zip(made, eager(case), strict=True):
        close(actual, expected)


SETTINGS = {
    "backprop": {"propagation": "backprop", "adaptive": False},
    "sgprop": {},
    "projection": {"positive_projection": True, "mixing_rule": "raw"},
    "mask": {"mask_predictions": True, "predictor_target": "received"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_backward_equals_the_torch_backend(sizes, settings):
    # Each kind of numbers with either kind of settings.
    dtype = DTYPES[0] if settings in ({}, SETTINGS["backprop"]) else DTYPES[-1]
    case = Case(sizes, dtype, **settings)
    mixes = settings.get("propagation") != "backprop"
    draw = torch.Generator().manual_seed(5)
    shape = (case.length, *case.h_0.shape)
    gradient = torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
    mask = (torch.rand(case.x.shape[:3], generator=draw) < 0.7).to(DEVICE)

    kept = forward(case)
    mixture = measured = None
    if mixes:
        schedule = torch.cat([net.schedule(case.length) for net in case.nets], dim=1)
        prediction = triton_layer.predict(case.layer, case.x, *kept[:2])
        projects = settings.get("positive_projection", False)
        passes = mask if settings.get("mask_predictions") else None
        mixture = triton_layer.Mixture(schedule, prediction, projects, passes)
        measured = triton_layer.Measured(
            prediction,
            mask,
            on_received=settings.get("predictor_target") == "received",
            unit_gradients=case.nets[0].rule.unit_gradients,
        )
    passed = triton_layer.backward(case.layer, gradient, *kept, mixture)
    sums = triton_layer.sums_over_samples(case.layer, case.x, *kept, passed, mixture, measured)

    tolerance = 5e-6 if dtype == torch.float32 else None
    for s, net in enumerate(case.nets):
        moments = []
        net.rule.update = lambda layer, values, moments=moments: moments.extend(values)
        h_0 = case.run(case.h_0)[s].permute(2, 0, 1).clone().requires_grad_()
        x = case.x[s].clone().requires_grad_()
        output, _ = net(x, h_0, mask[s])
        output.backward(case.run(gradient, 1)[s].permute(0, 3, 1, 2))
        close(case.run(passed.grad_h0)[s], h_0.grad.permute(1, 2, 0), tolerance)
        weight = net.neurons.weight_x.detach().clone()
        weight[:, : net.neurons.num_slots] *= net.neurons.scale
        grad_x = torch.einsum("xre,xrtb->tbe", weight, passed.grad_rows[s])
        close(grad_x, x.grad, tolerance)
        for name, value in net.neurons.named_parameters():
            close(case.run(sums.gradients[name])[s], value.grad, tolerance)
        if not mixes:
            continue
        count = mask[s].sum()
        parts = case.run(sums.parts)[s]
        divisor = torch.stack([count, count, count**2, count**2]).clamp(min=1)
        for actual, expected in zip((parts[:, :4] / divisor).T, moments[:4], strict=True):
            close(actual, expected.view(-1), tolerance)
        neurons = net.num_neurons * count.clamp(min=1)
        statistics = parts[:, 4:].sum(0) / neurons
        statistics[0] /= net.neuron_size
        close(statistics, torch.stack([*net.statistics.values()]).view(-1), tolerance)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_schedule_equals_that_of_separate_networks(sizes):
    case = Case(sizes, propagation="sgprop")
    beta = torch.full_like(case.layer.mixing_weight, 0.1)
    actual = triton_layer.temporal_schedule(case.layer, 6, beta)
    expected = [
        temporal_schedule(net.neurons.mixing_weight, net.parents, 6, 0.1) for net in case.nets
    ]
    close(actual, torch.cat(expected, dim=1))


def trained(policies, monkeypatch, fused):
    """Of two updates of stacked policies, all that they make: outputs, gradients, lambda."""
    monkeypatch.setattr(triton_unroll, "serves", lambda layer: fused)
    stacked = stack_policies(policies, DEVICE)
    draw = torch.Generator().manual_seed(3)
    shape = (3, len(policies), 5)
    made = []
    for _ in range(2 if policies[0].settings.adaptive else 1):
        observations = torch.randn(*shape, 7, generator=draw).to(DEVICE, DTYPES[-1])
        mask = (torch.rand(shape, generator=draw) < 0.7).to(DEVICE)
        acting = stacked.start(3, 5)
        logits = torch.stack([acting.step(step) for step in observations])
        again = stacked(observations, mask).logits
        output = acting.replay(observations, mask).logits
        gradients = torch.autograd.grad(output.square().sum(), [*stacked.parameters.values()])
        made += [logits, again.detach(), output.detach(), *gradients]
        made += [*stacked.statistics().values(), *stacked.buffers.values()]
    return made


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_stacked_policies_are_the_same_with_the_kernels(settings, monkeypatch):
    sizes = {"num_neurons": 9, "neuron_size": 3, "num_parents": 2, "num_slots": 2}
    policies = [
        make_policy(
            "sparsenet",
            7,
            3,
            seed=seed,
            dtype=DTYPES[-1],
            num_input_neurons=4,
            **sizes,
            **settings,
        )
        for seed in range(2)
    ]
    draw = torch.Generator().manual_seed(4)
    for policy in policies:
        for name, parameter in policy.named_parameters():
            if "predictor" in name:
                parameter.data.normal_(0, 0.1, generator=draw)
        policy.core.neurons.mixing_weight.fill_(0.6)
    expected = trained(policies, monkeypatch, fused=False)
    for one, other in zip(trained(policies, monkeypatch, fused=True), expected, strict=True):
        close(one.double(), other.double(), 1e-10 if DTYPES[-1] == torch.float64 else 2e-5)


#: Compile the kernel that is named for sizes as published, and print what ptxas says of it.
COMPILE = """
import subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from sgrl.nn.kernels import triton_kernels, triton_layer, triton_sums

tile = triton_layer.time_loop_tile(128, 20)
warps = tile.pop("num_warps")
values = dict(
    B=20, W=128, X=16, V=16, P=6, N=6, M=6, E=128, SCALE=0.06, MIXES=True, MEASURES=True, UNIT=True,
    PROJECTS=False, ON_RECEIVED=False, MASKS=True, MIN_NORM=1e-12, PRECISION="tf32x3", MP=8, GP=8,
    KB=32, CB=64, NP=8, **tile,
)
types = {"T": "i32", "C": "i32", "sources": "*i64", "edges": "*i64", "valid": "*u8"}

def compiled(name):
    kernel = getattr(triton_kernels, name, None) or getattr(triton_sums, name)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in values else types.get(n, "*fp32") for n in names}
    constants = {(i,): values[n] for i, n in enumerate(names) if n in values}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": 1}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"]
        return name + " " + subprocess.run(command, capture_output=True, text=True).stderr

with ThreadPoolExecutor() as pool:
    for said in pool.map(compiled, sys.argv[1:]):
        print(said)
"""
KERNELS = ["forward_loop", "predict", "backward_loop", "sums_over_samples", "schedule_loop"]


def test_kernels_compile_for_a_gpu_without_spills():
    # In another process: here they are for the interpreter.
    environment = {n: value for n, value in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *KERNELS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    spills = re.findall("([0-9]+) bytes spill stores, ([0-9]+) bytes spill loads", run.stdout)
    assert spills == [("0", "0")] * len(KERNELS), run.stdout
