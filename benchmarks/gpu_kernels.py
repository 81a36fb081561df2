"""The Triton kernels of SparseRNN on a GPU: milliseconds by tile, and errors against float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgrl.nn.kernels import triton_unroll
from sgrl.nn.neuron import PARAMETERS, Layer
from sgrl.nn.recurrent import SparseRNN

#: Samples of a tile and warps of a program, beside those that the kernels choose.
TILES = [{"BT": 4, "num_warps": 4}, {"BT": 4, "num_warps": 8}, {"BT": 8, "num_warps": 16}]


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
        self.children = triton_unroll.children_table(self.layer.sources)


def stacked(layers: list[Layer]) -> Layer:
    """One layer that holds several of the same sizes, side by side."""
    width = len(layers[0].weight_h)
    values = {
        name: torch.cat([getattr(layer, name).detach() for layer in layers])
        for name in (*PARAMETERS, "mixing_weight")
    }
    sources = torch.cat([layer.sources + s * width for s, layer in enumerate(layers)])
    return layers[0]._replace(sources=sources, **values)


def measure_kernels(
    device: torch.device,
    milliseconds: Callable[[Callable[[], Any], int], float],
    tiny: bool = False,
    num_runs: tuple[int, ...] = (1, 6, 30),
) -> dict[str, Any]:
    """Run the kernels on stacks of several sizes.

    Args:
        device: a GPU; or the CPU, with TRITON_INTERPRET=1 and `tiny`, to test this function.
        milliseconds: of a call, from the call and how often it is repeated.
        tiny: networks of 8 neurons.
        num_runs: how many are stacked.
    """
    results: dict[str, Any] = {}
    first: dict[str, Tensor] = {}
    for count in num_runs:
        case = Case(device, count, tiny)
        rows: dict[str, Any] = {}
        results[f"S={count}"] = rows
        kernels = calls(case)
        made = {name: call(None) for name, call in kernels.items()}
        rows["max_error"] = errors(case, made)
        alone = {name: of_first_run(case, name, value) for name, value in flat(made).items()}
        first = first or alone
        rows["first_run_as_alone"] = {
            name: torch.equal(value, first[name]) for name, value in alone.items()
        }
        for name, call in kernels.items():
            for tile in [None, *TILES] if name in ("forward", "predict", "backward") else [None]:
                chosen = tile and {"WB": case.nets[0].num_neurons, **tile}
                label = f"{name} {tile or ''}".strip()
                rows[label] = timed(device, milliseconds, call, chosen)
    return results


def calls(case: Case) -> dict[str, Callable[[dict[str, int] | None], Any]]:
    """Each kernel with what leads to its launch, as functions of a tile."""
    given = (case.layer, case.num_runs)
    parents = case.layer.sources.shape[1]
    states, attention, slots = triton_unroll.forward(*given, case.x, case.h_0)
    assert attention is not None
    assert slots is not None
    schedule = triton_unroll.temporal_schedule(
        case.layer.mixing_weight, case.children, case.num_runs, parents, case.length, 0.1
    )
    prediction = triton_unroll.predict(*given, case.x, states, attention)
    mixture = triton_unroll.Mixture(schedule, prediction)
    return {
        "forward": lambda tile: triton_unroll.forward(*given, case.x, case.h_0, tile=tile),
        "forward only": lambda tile: triton_unroll.forward(*given, case.x, case.h_0, False),
        "schedule": lambda tile: triton_unroll.temporal_schedule(
            case.layer.mixing_weight, case.children, case.num_runs, parents, case.length, 0.1
        ),
        "predict": lambda tile: triton_unroll.predict(*given, case.x, states, attention, tile=tile),
        "backward": lambda tile: triton_unroll.backward(
            *given, case.children, case.gradient, states, attention, slots, mixture, tile=tile
        ),
    }


def timed(
    device: torch.device,
    milliseconds: Callable[[Callable[[], Any], int], float],
    call: Callable[[Any], Any],
    tile: dict[str, int] | None,
) -> dict[str, Any]:
    """Milliseconds of a call, launched one by one and in a CUDA graph."""
    try:
        # In the interpreter a call takes seconds.
        repeats = 10 if device.type == "cuda" else 1
        row = {"ms": round(milliseconds(lambda: call(tile), repeats), 3)}
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(tile)
            row["graph_ms"] = round(milliseconds(graph.replay, repeats), 3)
        return row
    except Exception as problem:
        return {"error": repr(problem)[:300]}


def flat(made: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors that kernels returned, by name."""
    tensors = {}
    for name, value in made.items():
        parts = value if isinstance(value, tuple) else (value,)
        for i, part in enumerate(parts):
            if part is not None:
                tensors[f"{name} {i}"] = part
    return tensors


def of_first_run(case: Case, name: str, value: Tensor) -> Tensor:
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
    case.nets[-1].float()
    return {
        name: ((one - other).abs().max() / other.abs().max()).item()
        for name, (one, other) in pairs.items()
    }
