"""The Triton kernels of SparseRNN on a GPU: milliseconds by tile, and errors against float64."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgrl.nn.connectivity import edge_table
from sgrl.nn.kernels import triton_layer, triton_unroll
from sgrl.nn.neuron import PARAMETERS, Layer
from sgrl.nn.recurrent import SparseRNN

#: Of the time loops: samples of a tile and warps of a program, beside what the kernels choose.
TILES = [{"BT": 4, "num_warps": 4}, {"BT": 8, "num_warps": 16}]
#: Of products over all samples: how they are made, tiles and warps beside what kernels choose.
SUMS: list[dict[str, Any]] = [
    {"precision": "ieee"},
    {"tile": {"KB": 64, "CB": 64, "num_warps": 8}},
]
PREDICT = [{"KB": 32, "CB": 64, "num_warps": 4}, {"KB": 64, "CB": 64, "num_warps": 8}]


class Case:
    """Networks of the published size, stacked, and inputs."""

    def __init__(self, device: torch.device, num_runs: int, tiny: bool) -> None:
        self.num_runs = num_runs
        self.length, self.batch, width = (3, 5, 8) if tiny else (80, 20, 128)
        sizes = {"num_neurons": 8, "num_parents": 2, "num_slots": 2, "num_input_neurons": 3}
        self.nets, inputs = [], []
        for seed in range(num_runs):
            draw = torch.Generator().manual_seed(seed)

            def normal(*shape: int, draw: torch.Generator = draw) -> Tensor:
                return torch.randn(shape, generator=draw).to(device)

            net = SparseRNN(
                width,
                backend="torch",
                propagation="sgprop",
                generator=torch.Generator().manual_seed(seed),
                **(sizes if tiny else {}),
            ).to(device)
            with torch.no_grad():
                for name in ("bias", "predictor_h", "predictor_x", "predictor_bias"):
                    parameter = getattr(net.neurons, name)
                    parameter.copy_(0.1 * normal(*parameter.shape))
                net.neurons.mixing_weight.copy_(normal(net.num_neurons).abs().clamp(max=1))
            self.nets.append(net)
            shape = (net.num_neurons, net.neuron_size, self.batch)
            x = normal(self.length, self.batch, width)
            inputs.append((x, normal(*shape), normal(self.length, *shape)))
        self.x = torch.stack([x for x, _, _ in inputs])
        self.h_0 = torch.cat([h_0 for _, h_0, _ in inputs])
        self.gradient = torch.cat([gradient for _, _, gradient in inputs], dim=1)
        self.layer = stacked([net.layer() for net in self.nets])


def stacked(layers: list[Layer]) -> Layer:
    """One layer that holds several of the same sizes, side by side."""
    width = len(layers[0].weight_h)
    values = {
        name: torch.cat([getattr(layer, name).detach() for layer in layers])
        for name in (*PARAMETERS, "mixing_weight")
    }
    sources = torch.cat([layer.sources + s * width for s, layer in enumerate(layers)])
    return layers[0]._replace(
        num_neurons=len(sources),
        sources=sources,
        edges=edge_table(sources, len(sources)),
        runs=len(layers),
        **values,
    )


def measure_kernels(
    device: torch.device,
    milliseconds: Callable[[Callable[[], Any], int], float],
    tiny: bool = False,
    num_runs: tuple[int, ...] = (30, 1, 6),
) -> dict[str, Any]:
    """Run the kernels on stacks of several sizes, and print every row as it is measured.

    Args:
        device: a GPU; or the CPU, with TRITON_INTERPRET=1 and `tiny`, to test this function.
        milliseconds: of a call, from the call and how often it is repeated.
        tiny: networks of 8 neurons.
        num_runs: how many are stacked.
    """
    rows: dict[str, Any] = {}
    begun = time.perf_counter()

    def add(label: str, row: Any) -> None:
        rows[label] = row
        print(f"{time.perf_counter() - begun:.1f} s: {label}: {row}", flush=True)

    first: dict[str, Tensor] = {}
    for count in num_runs:
        case = Case(device, count, tiny)
        made: dict[str, Any] = {}
        if device.type == "cuda" and not first:
            started = time.perf_counter()
            compile_together(case)
            add("compile_s", round(time.perf_counter() - started, 1))
        for name, call in calls(case, made).items():
            started = time.perf_counter()
            try:
                value = call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = round(time.perf_counter() - started, 2)
                made.setdefault(name.split(",")[0], value)
                row = {"first_call_s": seconds, **timed(device, milliseconds, call)}
            except Exception as problem:
                row = {"error": repr(problem)[:300]}
            add(f"S={count} {name}", row)
        add(f"S={count} max_error", errors(case, made))
        of_first = {name: of_first_run(case, value) for name, value in flat(made).items()}
        first = first or of_first
        differ = [name for name, value in of_first.items() if not torch.equal(value, first[name])]
        add(f"S={count} first run differs in", differ)
    return rows


def calls(case: Case, made: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each kernel with what leads to its launch; later ones take what earlier ones `made`."""
    layer, width = case.layer, case.nets[0].num_neurons
    beta = torch.full_like(layer.mixing_weight, 0.1)
    every_step = torch.ones(case.x.shape[:3], dtype=torch.bool, device=case.x.device)

    def forward(**options: Any) -> Any:
        h_0 = case.h_0.unflatten(0, (case.num_runs, -1)).permute(0, 3, 1, 2)
        passed = triton_unroll.Pass(layer, case.length, h_0)
        kept = (passed.states, passed.attention, passed.slots)
        external = passed.external(case.x)
        triton_layer.forward_steps(layer, passed.columns, external, *kept, **options)
        return kept

    def schedule() -> Any:
        return triton_layer.temporal_schedule(layer, case.length, beta)

    def predict(**options: Any) -> Any:
        return triton_layer.predict(layer, case.x, *made["forward"][:2], **options)

    def backward(**options: Any) -> Any:
        mixture = triton_layer.Mixture(made["schedule"], made["predict"])
        return triton_layer.backward(layer, case.gradient, *made["forward"], mixture, **options)

    def sums(**options: Any) -> Any:
        mixture = triton_layer.Mixture(made["schedule"], made["predict"])
        measured = triton_layer.Measured(made["predict"], every_step)
        return triton_layer.sums_over_samples(
            layer, case.x, *made["forward"], made["backward"], mixture, measured, **options
        )

    every: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "schedule": schedule,
        "predict": predict,
        "backward": backward,
        "sums": sums,
    }
    if case.num_runs > 2:
        for options in SUMS:
            every[f"sums, {options}"] = partial(sums, **options)
        for other in PREDICT:
            every[f"predict, {other}"] = partial(predict, tile=other)
    for tile in TILES:
        every[f"forward, {tile}"] = partial(forward, tile={"WB": width, **tile})
        every[f"backward, {tile}"] = partial(backward, tile={"WB": width, **tile})
    return every


def compile_together(case: Case) -> None:
    """Compile all kernels side by side, by calls with whatever numbers there are."""
    length, num_flat, size, batch = case.gradient.shape
    num_slots = case.layer.num_slots
    states = case.gradient.new_zeros(length + 1, num_flat, size, batch)
    attention = case.gradient.new_zeros(length, num_flat, num_slots, batch)
    slots = case.gradient.new_zeros(length, num_flat, num_slots, size, batch)
    made = {
        "forward": (states, attention, slots),
        "schedule": case.gradient.new_zeros(length, num_flat),
        "predict": case.gradient,
        "backward": triton_layer.Passed(case.gradient, case.gradient, states, case.h_0),
    }
    with ThreadPoolExecutor() as pool:
        wait([pool.submit(call) for call in calls(case, made).values()])
    torch.cuda.synchronize()


def timed(
    device: torch.device,
    milliseconds: Callable[[Callable[[], Any], int], float],
    call: Callable[[], Any],
) -> dict[str, Any]:
    """Milliseconds of a call, launched one by one and in a CUDA graph."""
    if device.type != "cuda":
        return {}  # in the interpreter a call takes seconds
    row = {"ms": round(milliseconds(call, 5), 3)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    row["graph_ms"] = round(milliseconds(graph.replay, 5), 3)
    return row


def flat(made: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors that kernels returned, by name."""
    tensors = {}
    for name, value in made.items():
        if isinstance(value, triton_layer.Sums):
            value = (*value.gradients.values(), value.parts)
        parts = value if isinstance(value, tuple) else (value,)
        tensors |= {f"{name} {i}": part for i, part in enumerate(parts)}
    return tensors


def of_first_run(case: Case, value: Tensor) -> Tensor:
    """What belongs to the first run."""
    num_flat = len(case.layer.sources)
    axis = next((i for i, size in enumerate(value.shape) if size == num_flat), 0)
    return value.chunk(case.num_runs, dim=axis)[0].clone()


def errors(case: Case, made: dict[str, Any]) -> dict[str, float]:
    """Greatest differences of the last run from float64, relative to the greatest value."""
    net = case.nets[-1].double()
    h_0 = case.h_0.chunk(case.num_runs)[-1].permute(2, 0, 1).double().requires_grad_()
    x = case.x[-1].double().requires_grad_()
    gradient = case.gradient.chunk(case.num_runs, dim=1)[-1].permute(0, 3, 1, 2).double()
    schedule = net.schedule(case.length)
    output, _ = net(x, h_0)
    output.backward(gradient)
    assert h_0.grad is not None
    assert x.grad is not None
    states = made["forward"][0].chunk(case.num_runs, dim=1)[-1][1:]
    passed = made["backward"]
    weight = case.layer.weight_x
    assert weight is not None
    weight = weight.chunk(case.num_runs)[-1].clone()
    weight[:, : case.layer.num_slots] *= case.layer.scale
    grad_x = torch.einsum("xre,xrtb->tbe", weight.double(), passed.grad_rows[-1].double())
    pairs = {
        "states": (states.permute(0, 3, 1, 2), output),
        "schedule": (made["schedule"].chunk(case.num_runs, dim=1)[-1], schedule),
        "grad_h0": (passed.grad_h0.chunk(case.num_runs)[-1].permute(2, 0, 1), h_0.grad),
        "grad_x": (grad_x, x.grad),
    }
    for name, value in net.neurons.named_parameters():
        assert value.grad is not None
        ours = made["sums"].gradients[name].chunk(case.num_runs)[-1]
        pairs[f"grad {name}"] = (ours, value.grad)
    return {
        name: ((one - other).abs().max() / other.abs().max()).item()
        for name, (one, other) in pairs.items()
    }
