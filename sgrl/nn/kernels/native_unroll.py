"""The "native" backend of SparseRNN, and whole policy steps that an update can go on from."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgrl.nn.kernels.native import (
    STATISTICS,
    Record,
    StepRecorder,
    gradients_structure,
    layer_structure,
    load,
    make_structure,
    mixing_structure,
    pointer,
)
from sgrl.nn.mixing import Moments
from sgrl.nn.neuron import Layer
from sgrl.nn.sgprop import Mixing


def unroll(
    layer: Layer,
    mixing: Mixing,
    x: Float[Tensor, "T B E"],
    h_0: Float[Tensor, "B W N"],
    mask: Bool[Tensor, "T B"] | None,
    noise: Float[Tensor, "T B W N"] | None = None,
    recorder: "Recorder | None" = None,
) -> Float[Tensor, "T B W N"]:
    """Unroll a layer over time.

    Args:
        layer: reads its own states and x.
        mixing: how predictions are mixed in.
        x: [T, B, E].
        h_0: state before the first step [B, W, N].
        mask: bool [T, B], True at valid steps; all if None.
        noise: of a noisy layer, standard normal [T, B, W, N].
        recorder: has run the first steps of this x from the zero state, which are not run again.
            The caller guarantees that x, the noise and the parameters are unchanged.

    Returns:
        [T, B, W, N].
    """
    parameters = list(layer.parameters().values())
    inputs = (x, h_0, *parameters)
    noise = None if noise is None else noise.contiguous()
    if not (torch.is_grad_enabled() and any(v.requires_grad for v in inputs)):
        return _forward(layer, x.contiguous(), h_0.contiguous(), noise, parameters, keep=False)[0]
    return _Unroll.apply(layer, mixing, mask, noise, recorder, *inputs)


def _forward(
    layer: Layer,
    x: Tensor,
    h_0: Tensor,
    noise: Tensor | None,
    parameters: list[Tensor],
    keep: bool,
) -> tuple[Tensor, Record | None]:
    """-> output [T, B, W, N], and if to be kept what a backward pass needs."""
    core = load(x.dtype)
    length, batch, _ = x.shape
    parameters = [parameter.detach().contiguous() for parameter in parameters]
    structure = _structure(layer, parameters)
    size = core.sgrl_workspace(ctypes.byref(structure), length, batch, keep)
    record = Record(size, x.dtype) if keep else None
    memory = x.new_empty(size) if record is None else record.memory
    output = x.new_empty(length, batch, layer.num_neurons, layer.neuron_size)
    core.sgrl_forward(
        ctypes.byref(structure),
        *(length, batch, keep, 0, length),
        *map(pointer, (x, h_0, noise, output, memory)),
    )
    return output, record


def _structure(layer: Layer, parameters: Sequence[Tensor]) -> Any:
    """The layer with these in place of its parameters, in their order."""
    return layer_structure(layer, dict(zip(layer.parameters(), parameters, strict=True)))


class Recorder(StepRecorder):
    """A SparseNet policy's steps, which `unroll` can go on from.

    Args:
        layer: the core's, on the CPU.
        encoder: weight and bias of the first linear layer, then of the second.
        actor: stacked keys and matrices, and the bias (see `SlotActor`).
        length: T, the most steps it may take.
        batch_size: B.
        keep: False needs little memory and is only for acting.
        noise: of a noisy layer, standard normal [T, B, W * N].
    """

    def __init__(
        self,
        layer: Layer,
        encoder: Sequence[Tensor],
        actor: tuple[Tensor, Tensor],
        length: int,
        batch_size: int,
        keep: bool,
        noise: Float[Tensor, "T B neurons"] | None = None,
    ) -> None:
        core = load(layer.weight_h.dtype)
        self.noise = None if noise is None else noise.contiguous()
        parameters = [p.detach().contiguous() for p in layer.parameters().values()]
        around = [p.detach().contiguous() for p in (*encoder, *actor)]
        (features, observation_size), bias = encoder[0].shape, actor[1]
        names = ("weight_1", "bias_1", "weight_2", "bias_2", "actor", "actor_bias")
        structure = _structure(layer, parameters)
        policy = make_structure(
            "Policy",
            observation=observation_size,
            features=features,
            actions=bias.shape[0],
            slots=bias.shape[1],
            **dict(zip(names, map(pointer, around), strict=True)),
        )
        shape = ctypes.byref(structure)
        memory = (
            core.sgrl_workspace(shape, length, batch_size, keep),
            core.sgrl_policy_workspace(ctypes.byref(policy), shape, batch_size),
        )
        state = (layer.num_neurons, layer.neuron_size)
        shapes = ((observation_size,), (layer.external_size,), state, (len(bias),))
        held = (*parameters, layer.sources, *around)
        super().__init__(
            *("sgrl_policy_act", policy, structure, memory, held, length, batch_size, keep, shapes)
        )
        _, self.x, self.output, _ = self.buffers

    def inputs(self, row: int) -> tuple[int | None, ...]:
        return *super().inputs(row), self._noise()

    def _noise(self) -> int | None:
        """Address of the next step's."""
        return None if self.noise is None else pointer(self.noise[self.steps])

    def finish(self, x: Float[Tensor, "T B E"]) -> None:
        """The core's steps not yet taken, of x [T, B, E]."""
        if self.steps < self.length:
            self.x[self.steps :].copy_(x[self.steps :])
            pointers = [pointers[self.steps] for pointers in self.rows[1:]]
            self.library.sgrl_forward(
                *(self.core, *self.sizes, self.steps, self.length),
                *(pointers[0], None, self._noise(), pointers[1], self.memory.data_ptr()),
            )
            self.steps = self.length


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        mixing: Mixing,
        mask: Tensor | None,
        noise: Tensor | None,
        recorder: Recorder | None,
        x: Tensor,
        h_0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        if recorder is None:
            x = x.contiguous()
            given = (x, h_0.contiguous(), noise, list(parameters))
            output, ctx.record = _forward(layer, *given, keep=True)
        else:
            recorder.finish(x)
            x, ctx.record = recorder.x, recorder.record
            output = recorder.output.view_as(recorder.output)
        ctx.layer, ctx.mixing, ctx.mask = layer, mixing, mask
        # As it is now: a backward pass in between may change it.
        ctx.mixing_weight = layer.mixing_weight.clone()
        ctx.save_for_backward(x, *parameters)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        layer, mixing = ctx.layer, ctx.mixing
        x, *parameters = ctx.saved_tensors
        core = load(x.dtype)
        length, batch, _ = x.shape
        mask = None if ctx.mask is None else ctx.mask.contiguous()
        parameters = [parameter.detach().contiguous() for parameter in parameters]
        grad_output = grad_output.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[5] else None
        grad_h0 = None
        if ctx.needs_input_grad[6]:
            grad_h0 = x.new_empty(batch, layer.num_neurons, layer.neuron_size)
        grads = [torch.empty_like(parameter) for parameter in parameters]
        moments = torch.zeros(4, layer.num_neurons, dtype=torch.float64)
        results = gradients_structure(dict(zip(layer.parameters(), grads, strict=True)), moments)
        how, episodes = None, mixing.rule.samples == "episodes"
        if mixing.settings.mixes:
            beta = mixing.settings.schedule_beta
            structure = mixing_structure(mixing, ctx.mixing_weight, beta, episodes=episodes)
            how = ctypes.byref(structure)
        core.sgrl_backward(
            ctypes.byref(_structure(layer, parameters)),
            *(length, batch, x.data_ptr(), pointer(mask), how, grad_output.data_ptr()),
            *(pointer(grad_x), pointer(grad_h0), ctypes.byref(results)),
            ctx.record.memory.data_ptr(),
        )
        if mixing.settings.mixes:
            measured = x.new_tensor(list(results.statistics))
            mixing.statistics.update(zip(STATISTICS, measured.unbind(), strict=True))
            if mixing.rule.updates:
                samples = x.new_ones(length, batch, dtype=torch.bool) if mask is None else mask
                samples = samples.any(0) if episodes else samples
                mixing.rule.update(layer, Moments.of_sums(moments.unbind(), int(samples.sum())))
        return (None, None, None, None, None, grad_x, grad_h0, *grads)
