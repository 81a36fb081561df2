"""The unroll of SparseRNN in Triton kernels: a launch for each time loop, S runs stacked.

Functions over the tensors of the torch backend (`torch_unroll.py`), in its layouts: run s holds
the neurons s * W to s * W + W - 1, and `sources` names them so. A run's numbers do not depend on
what it is stacked with. Nothing here waits for the device, so that all of it can be captured in a
CUDA graph.

Triton is imported when a kernel is first called; with TRITON_INTERPRET=1 they run on a CPU.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.nn.neuron import Layer

#: Samples in the tile of a program of a time loop, at most.
TILE_SAMPLES = 8
#: Neurons that the threads of a program hold at once, at most.
TILE_NEURONS = 128


def forward(
    layer: Layer,
    num_runs: int,
    x: Float[Tensor, "S T B E"],
    h_0: Float[Tensor, "F N B"],
    keeps: bool = True,
    tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Unroll forward over time.

    Args:
        layer: of all runs; of the parameters, only their values are used.
        num_runs: S.
        x: [S, T, B, E].
        h_0: states before the first step.
        keeps: whether the backward pass follows; otherwise only the states are made.
        tile: WB, BT and num_warps, in place of those that fit the sizes.

    Returns:
        states [T+1, F, N, B] (h_0 first), attention [T, F, M, B], slots [T, F, M, N, B]; the
        latter two are None if not `keeps`.
    """
    from sgrl.nn.kernels import triton_kernels

    assert layer.weight_x is not None
    sizes = _sizes(layer, num_runs)
    length, batch = x.shape[1:3]
    num_flat, size, num_slots = len(layer.sources), sizes["N"], sizes["M"]
    states = h_0.new_empty(length + 1, num_flat, size, batch)
    states[0] = h_0
    attention = h_0.new_empty(length, num_flat, num_slots, batch) if keeps else None
    slots = h_0.new_empty(length, num_flat, num_slots, size, batch) if keeps else None
    tile = tile or time_loop_tile(sizes["W"], batch)
    triton_kernels.forward_loop[(num_runs, -(-batch // tile["BT"]))](
        states,
        states if attention is None else attention,
        states if slots is None else slots,
        neurons_last(layer.weight_h, layer.bias),
        external_rows(layer.weight_x, x),
        layer.sources,
        length,
        B=batch,
        SCALE=layer.scale,
        KEEPS=keeps,
        **sizes,
        **tile,
    )
    return states, attention, slots


def _sizes(layer: Layer, num_runs: int) -> dict[str, Any]:
    """Sizes of one run as kernels take them."""
    assert layer.weight_x is not None
    num_slots, size = layer.bias.shape[1:]
    return {
        "W": len(layer.weight_h) // num_runs,
        "X": len(layer.weight_x) // num_runs,
        "P": layer.weight_h.shape[2] // size,
        "N": size,
        "M": num_slots,
    }


def time_loop_tile(num_neurons: int, batch: int) -> dict[str, int]:
    """The tile of a program of a time loop: a thread has one neuron and up to 4 samples."""
    samples = min(TILE_SAMPLES, _power_of_two(batch))
    neurons = min(TILE_NEURONS, _power_of_two(num_neurons))
    threads = neurons * samples // min(4, samples)
    return {"WB": neurons, "BT": samples, "num_warps": max(1, threads // 32)}


def _power_of_two(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << (number - 1).bit_length()


def neurons_last(
    weight: Float[Tensor, "F R L"], bias: Float[Tensor, "F M N"]
) -> Float[Tensor, "L+1 R F"]:
    """Weights and biases in the order in which the threads, one for each neuron, read them.

    The last column is the bias; it is 0 for the keys, which may be missing.
    """
    num_flat, rows, length = weight.shape
    columns = weight.new_zeros(length + 1, rows, num_flat)
    columns[:-1] = weight.detach().permute(2, 1, 0)
    columns[-1, rows - bias[0].numel() :] = bias.detach().flatten(1).t()
    return columns


def external_rows(weight_x: Tensor, x: Float[Tensor, "S T B E"]) -> Float[Tensor, "S X R T B"]:
    """What the input adds to the rows of the neurons that read it, before the time loop."""
    num_runs, length, batch, size = x.shape
    rows = weight_x.detach().reshape(num_runs, -1, size)
    made = torch.bmm(rows, x.detach().reshape(num_runs, -1, size).transpose(1, 2))
    return made.view(num_runs, -1, weight_x.shape[1], length, batch)
