"""The recurrent layer in Triton kernels: a launch for each time loop, S runs stacked.

Functions over the tensors of the torch backend (`torch_layer.py`), in its layouts: run s holds
the neurons s * W to s * W + W - 1 of all F = S * W, and `sources` names them so. A run's numbers
do not depend on what it is stacked with. Nothing here waits for the device, so that all of it can
be captured in a CUDA graph.

Triton is imported when a kernel is first called; with TRITON_INTERPRET=1 they run on a CPU.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgrl.nn.mixing import MIN_NORM
from sgrl.nn.neuron import Layer

#: Samples in the tile of a program of a time loop, at most.
TILE_SAMPLES = 8
#: Of products over all samples: "tf32x3" is as exact as "ieee" up to a few last digits.
PRECISION = "tf32x3"


def forward_steps(
    layer: Layer,
    columns: Float[Tensor, "S C R W"],
    external: Float[Tensor, "S X R T B"],
    states: Float[Tensor, "steps F N B"],
    attention: Float[Tensor, "T F M B"],
    slots: Float[Tensor, "T F M N B"],
    tile: dict[str, int] | None = None,
) -> None:
    """Make steps in place, of which only the first state is given.

    Args:
        layer: of all runs; of the parameters, only their values are used.
        columns: from `neurons_last`.
        external: from `external_rows`.
        states: T+1 steps; written but for the first.
        attention: written.
        slots: written.
        tile: WB, BT and num_warps, in place of those that fit the sizes.
    """
    from sgrl.nn.kernels import triton_kernels

    sizes = _sizes(layer)
    length, batch = external.shape[3:]
    tile = tile or time_loop_tile(sizes["W"], batch)
    triton_kernels.forward_loop[(layer.num_runs, -(-batch // tile["BT"]))](
        states,
        attention,
        slots,
        columns,
        external.contiguous(),
        layer.sources,
        length,
        B=batch,
        SCALE=layer.scale,
        **sizes,
        **tile,
    )


def predict(
    layer: Layer,
    x: Float[Tensor, "S T B E"],
    states: Float[Tensor, "T+1 F N B"],
    attention: Float[Tensor, "T F M B"],
    tile: dict[str, int] | None = None,
) -> Float[Tensor, "T F N B"]:
    """Make all predictions, from what `forward_steps` made.

    Args:
        layer: of all runs.
        x: [S, T, B, E].
        states: [T+1, F, N, B].
        attention: [T, F, M, B].
        tile: KB, CB and num_warps, in place of the usual.

    Returns:
        [T, F, N, B].
    """
    from sgrl.nn.kernels import triton_sums

    assert layer.predictor_h is not None
    assert layer.predictor_x is not None
    assert layer.predictor_bias is not None
    sizes = _sizes(layer)
    length, num_flat, _, batch = states[1:].shape
    prediction = torch.empty_like(states[1:])
    tile = tile or {"KB": 64, "CB": 64, "num_warps": 4}
    slots = max(_power_of_two(sizes["M"]), 16 // _power_of_two(sizes["N"]))
    triton_sums.predict[(num_flat, -(-length * batch // tile["KB"]))](
        prediction,
        states,
        attention,
        x.detach().contiguous(),
        layer.predictor_h.detach().contiguous(),
        layer.predictor_x.detach().contiguous(),
        layer.predictor_bias.detach().contiguous(),
        layer.sources,
        length,
        B=batch,
        E=x.shape[3],
        PRECISION=PRECISION,
        MP=slots,
        NP=_power_of_two(sizes["N"]),
        **sizes,
        **tile,
    )
    return prediction


class Mixture(NamedTuple):
    """What the backward pass mixes in, and how."""

    schedule: Float[Tensor, "T F"]  # lambda
    offered: Float[Tensor, "T F N B"]  # predictions
    positive_projection: bool = False
    #: At steps where it is False, the received gradient is passed on unmixed.
    passes: Bool[Tensor, "S T B"] | None = None


class Passed(NamedTuple):
    """What the backward pass over time makes."""

    received: Float[Tensor, "T F N B"]  # gradients that arrive at the neurons
    mixed: Float[Tensor, "T F N B"]  # and what they use and pass on; the same if nothing is mixed
    grad_rows: Float[Tensor, "S X R T B"]  # of the neurons that read the input
    grad_h0: Float[Tensor, "F N B"]


def backward(
    layer: Layer,
    gradient: Float[Tensor, "T F N B"],
    states: Float[Tensor, "T+1 F N B"],
    attention: Float[Tensor, "T F M B"],
    slots: Float[Tensor, "T F M N B"],
    mixture: Mixture | None = None,
    tile: dict[str, int] | None = None,
) -> Passed:
    """Pass gradients back through time.

    Args:
        layer: of all runs, with its edges.
        gradient: of the states after each step.
        states: from `forward_steps`.
        attention: from `forward_steps`.
        slots: from `forward_steps`.
        mixture: what is mixed in; nothing if None.
        tile: see `forward_steps`.
    """
    from sgrl.nn.kernels import triton_kernels

    assert layer.edges is not None
    sizes = _sizes(layer)
    length, num_flat, size, batch = gradient.shape
    mixed = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    received = mixed if mixture is None else torch.empty_like(mixed)
    rows = layer.weight_h.shape[1]
    grad_rows = gradient.new_empty(layer.num_runs, sizes["X"], rows, length, batch)
    grad_h0 = gradient.new_empty(num_flat, size, batch)
    scratch = gradient.new_empty(2, num_flat, sizes["P"], size, batch)
    passes = None if mixture is None else mixture.passes
    tile = tile or time_loop_tile(sizes["W"], batch)
    triton_kernels.backward_loop[(layer.num_runs, -(-batch // tile["BT"]))](
        received,
        mixed,
        grad_rows,
        grad_h0,
        scratch,
        gradient.contiguous(),
        states,
        attention,
        slots,
        neurons_last(layer),
        states if mixture is None else mixture.offered,
        states if mixture is None else mixture.schedule,
        states if passes is None else passes.to(torch.uint8).contiguous(),
        layer.sources,
        layer.edges,
        layer.edges.shape[1],
        length,
        B=batch,
        SCALE=layer.scale,
        MIXES=mixture is not None,
        PROJECTS=mixture is not None and mixture.positive_projection,
        MASKS=passes is not None,
        MIN_NORM=MIN_NORM,
        **sizes,
        **tile,
    )
    return Passed(received, mixed, grad_rows, grad_h0)


class Measured(NamedTuple):
    """What is measured beside the gradients of the parameters, and how."""

    prediction: Float[Tensor, "T F N B"]  # of `predict`; what was mixed in may have been others
    valid: Bool[Tensor, "S T B"] | None  # steps that count; all if None
    on_received: bool = False  # whether the predictors regress on the received gradients
    moments: bool = True  # whether lambda is to be estimated
    unit_gradients: bool = True  # see `MixingRule`


class Sums(NamedTuple):
    """Sums over all samples."""

    gradients: dict[str, Tensor]  # of the parameters, by name
    #: Sums over valid samples of |u|^2 and <w, u>, and of their sums |sum u|^2 and
    #: <sum w, sum u>; then the statistics' sums: |residual|^2, |received|, |mixed|, |prediction|.
    parts: Float[Tensor, "F 8"]


def sums_over_samples(
    layer: Layer,
    x: Float[Tensor, "S T B E"],
    states: Float[Tensor, "T+1 F N B"],
    attention: Float[Tensor, "T F M B"],
    slots: Float[Tensor, "T F M N B"],
    passed: Passed,
    mixture: Mixture | None = None,
    measured: Measured | None = None,
    precision: str = PRECISION,
    tile: dict[str, int] | None = None,
) -> Sums:
    """Sum over all steps and samples, after `backward`.

    Args:
        layer: of all runs.
        x: [S, T, B, E].
        states: from `forward_steps`.
        attention: from `forward_steps`.
        slots: from `forward_steps`.
        passed: from `backward`.
        mixture: as `backward` had it.
        measured: given if and only if `mixture` is.
        precision: of the products, see `PRECISION`.
        tile: KB, CB and num_warps, in place of the usual.
    """
    from sgrl.nn.kernels import triton_sums

    tile = tile or {"KB": 32, "CB": 64, "num_warps": 8}
    sizes = _sizes(layer)
    size, batch, external = sizes["N"], x.shape[2], x.shape[3]
    num_flat = len(layer.sources)
    gradients = {
        name: torch.empty_like(value, memory_format=torch.contiguous_format).detach()
        for name, value in layer.parameters().items()
        if measured is not None or not name.startswith("predictor")
    }
    tiles = -(-(sizes["P"] * size + 1) // tile["CB"]) - (-external // tile["CB"])
    parts = states.new_zeros(num_flat, tiles, 8)
    weight_h, weight_x, bias = (gradients[name] for name in ("weight_h", "weight_x", "bias"))
    missing = parts
    valid = None if measured is None else measured.valid
    groups = max(_power_of_two(1 + size), 16 // _power_of_two(sizes["M"]))
    triton_sums.sums_over_samples[(num_flat, tiles)](
        weight_h,
        weight_x,
        bias,
        gradients.get("predictor_h", missing),
        gradients.get("predictor_x", missing),
        gradients.get("predictor_bias", missing),
        parts,
        states,
        attention,
        slots,
        x.detach().contiguous(),
        passed.mixed,
        passed.received,
        missing if measured is None else measured.prediction,
        missing if mixture is None else mixture.offered,
        missing if valid is None else valid.to(torch.uint8).contiguous(),
        missing if measured is None else _loss_factor(layer, x, valid),
        layer.sources,
        x.shape[1],
        B=batch,
        E=external,
        SCALE=layer.scale,
        MIXES=measured is not None,
        MEASURES=measured is not None and measured.moments,
        UNIT=measured is not None and measured.unit_gradients,
        PROJECTS=mixture is not None and mixture.positive_projection,
        ON_RECEIVED=measured is not None and measured.on_received,
        MASKS=valid is not None,
        MIN_NORM=MIN_NORM,
        PRECISION=precision,
        MP=_power_of_two(sizes["M"]),
        GP=groups,
        **sizes,
        **tile,
    )
    # Statistics are whole in every tile, moments made of all: added in one order, whatever S.
    moments = parts[:, 0, :4]
    for index in range(1, tiles):
        moments = moments + parts[:, index, :4]
    return Sums(gradients, torch.cat([moments, parts[:, 0, 4:]], dim=1))


def _loss_factor(layer: Layer, x: Tensor, valid: Tensor | None) -> Tensor:
    """2 / number of terms in the predictor's loss of each run [S]."""
    size = layer.num_neurons // layer.num_runs * layer.neuron_size
    if valid is None:
        return x.new_full((layer.num_runs,), 2 / (x.shape[1] * x.shape[2] * size))
    return 2 / (valid.sum((1, 2)).clamp(min=1) * size).to(x.dtype)


def temporal_schedule(
    layer: Layer, length: int, beta: Float[Tensor, " F"]
) -> Float[Tensor, "{length} F"]:
    """Lambda at every step in one launch, see `sgprop.temporal_schedule`.

    Args:
        layer: of all runs, with its edges.
        length: T.
        beta: step of the schedule.

    Returns:
        [T, F]; the last row is the layer's `mixing_weight`.
    """
    from sgrl.nn.kernels import triton_kernels

    assert layer.edges is not None
    sizes = _sizes(layer)
    schedule = layer.mixing_weight.new_empty(length, layer.num_neurons)
    triton_kernels.schedule_loop[(layer.num_runs,)](
        schedule,
        layer.mixing_weight,
        layer.edges,
        beta,
        layer.edges.shape[1],
        length,
        W=sizes["W"],
        P=sizes["P"],
        WB=_power_of_two(sizes["W"]),
    )
    return schedule


def _sizes(layer: Layer) -> dict[str, Any]:
    """Sizes of one run as kernels take them."""
    return {
        "W": layer.num_neurons // layer.num_runs,
        "X": layer.num_input_neurons,
        "P": layer.num_parents,
        "N": layer.neuron_size,
        "M": layer.num_slots,
    }


def time_loop_tile(num_neurons: int, batch: int) -> dict[str, int]:
    """The tile of a program of a time loop: all neurons, each thread one and up to 4 samples."""
    neurons = _power_of_two(num_neurons)
    samples = min(TILE_SAMPLES if neurons <= 128 else TILE_SAMPLES // 2, _power_of_two(batch))
    threads = neurons * samples // min(4, samples)
    return {"WB": neurons, "BT": samples, "num_warps": min(max(1, threads // 32), 32)}


def _power_of_two(number: int) -> int:
    """The smallest that is not below the number."""
    return 1 << (number - 1).bit_length()


def neurons_last(layer: Layer) -> Float[Tensor, "S C R W"]:
    """Weights and biases in the order in which the threads, one for each neuron, read them.

    The last column is the bias; it is 0 for the keys.
    """
    by_run = (layer.num_runs, layer.num_neurons // layer.num_runs)
    rows, read = layer.weight_h.shape[1:]
    columns = layer.weight_h.new_zeros(layer.num_runs, read + 1, rows, by_run[1])
    columns[:, :-1] = layer.weight_h.detach().unflatten(0, by_run).permute(0, 3, 2, 1)
    slots = layer.bias.detach().flatten(1).unflatten(0, by_run).transpose(1, 2)
    columns[:, -1, layer.num_slots :] = slots
    return columns


def external_rows(weight_x: Tensor, x: Float[Tensor, "S T B E"]) -> Float[Tensor, "S X R T B"]:
    """What the input adds to the rows of the neurons that read it, before the time loop."""
    num_runs, length, batch, size = x.shape
    rows = weight_x.detach().reshape(num_runs, -1, size)
    made = torch.bmm(rows, x.detach().reshape(num_runs, -1, size).transpose(1, 2))
    return made.view(num_runs, -1, weight_x.shape[1], length, batch)
