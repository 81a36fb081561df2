"""The "native" backend of SparseMLP."""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.nn.kernels.native import (
    STATISTICS,
    Record,
    gradients_structure,
    layer_structure,
    load,
    make_array,
    make_structure,
    mixing_structure,
    pointer,
)
from sgrl.nn.mixing import Moments
from sgrl.nn.neuron import Stack
from sgrl.nn.sgprop import Mixing

#: Samples that are run at once where no gradient is needed: small enough for the cache.
PIECE = 256


class StackForward:
    """A forward pass on x [B, input size] and noise [B, L, W, N], to be gone on from by `stack`."""

    def __init__(
        self, layers: Stack, x: Float[Tensor, "B F"], noise: Float[Tensor, "B L W N"] | None = None
    ) -> None:
        # Tensors of inference mode could not enter the update.
        with torch.inference_mode(False), torch.no_grad():
            self.x = x.clone()
            self.output, self.record = _forward(layers, self.x, noise, keep=True)


def stack(
    layers: Stack,
    mixing: Mixing,
    x: Float[Tensor, "B F"],
    noise: Float[Tensor, "B L W N"] | None = None,
    done: StackForward | None = None,
) -> Float[Tensor, "B W N"]:
    """Run layers one after the other.

    Args:
        layers: of one size.
        mixing: how predictions are mixed in.
        x: [B, input size].
        noise: of noisy layers, standard normal [B, L, W, N].
        done: a forward pass on this x, which is not run again. The caller guarantees that x, the
            noise and the parameters are unchanged.

    Returns:
        The last layer's state [B, W, N].
    """
    inputs = (x, *layers.parameters())
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        return _StackFunction.apply(layers, mixing, noise, done, *inputs)
    return _forward(layers, x.contiguous(), noise, keep=False)[0]


class _Structures:
    """A `Stack` of slot_neurons.cpp, and the tensors that it holds the addresses of."""

    def __init__(self, stack: Stack, input_size: int) -> None:
        self._stack, self._parameters = stack, []
        self._layers = make_array("Layer", len(stack.layers))
        for index, layer in enumerate(stack.layers):
            given = {name: p.detach().contiguous() for name, p in layer.parameters().items()}
            self._parameters.append(given)
            self._layers[index] = layer_structure(layer, given)
        self.pointer = ctypes.pointer(
            make_structure(
                "Stack",
                count=len(stack.layers),
                inputs=input_size,
                residual=any(stack.residual),
                layers=ctypes.addressof(self._layers),
            )
        )


def _forward(
    stack: Stack, x: Tensor, noise: Tensor | None, keep: bool
) -> tuple[Tensor, Record | None]:
    """-> output [B, W, N], and if to be kept what a backward pass needs."""
    noise = None if noise is None else noise.contiguous()
    core = load(x.dtype)
    layers, piece = _Structures(stack, x.shape[1]), len(x)
    if not keep:
        piece = min(piece, PIECE)
    size = core.sgrl_stack_workspace(layers.pointer, piece, keep)
    record = Record(size, x.dtype) if keep else None
    memory = x.new_empty(size) if record is None else record.memory
    output = x.new_empty(len(x), stack.layers[0].num_neurons, stack.layers[0].neuron_size)
    pointers = map(pointer, (x, noise, output, memory))
    core.sgrl_stack_forward(layers.pointer, len(x), piece, keep, *pointers)
    return output, record


class _StackFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        mixing: Mixing,
        noise: Tensor | None,
        done: StackForward | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        if done is None:
            output, ctx.record = _forward(stack, x.contiguous(), noise, keep=True)
        else:
            output, ctx.record = done.output.view_as(done.output), done.record
        ctx.stack, ctx.mixing, ctx.input_size = stack, mixing, x.shape[1]
        ctx.num_parameters = len(parameters)
        # The predictors are not saved: the policy step mixes in what they predict after their own
        # step, which changes them in place.
        ctx.save_for_backward(*parameters[: 2 * len(stack.layers)])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        stack: Stack = ctx.stack
        mixing: Mixing = ctx.mixing
        core, depth, rule = load(grad_output.dtype), len(stack.layers), mixing.rule
        weights = ctx.saved_tensors  # asked for, so that autograd notices a change
        structures = _Structures(stack, ctx.input_size)
        mixes = mixing.settings.mixes
        grad_output = grad_output.contiguous()
        grad_x = None
        if ctx.needs_input_grad[4]:
            grad_x = grad_output.new_empty(len(grad_output), ctx.input_size)
        grads: list[Tensor | None] = [None] * ctx.num_parameters
        if rule.phase != "predictor":
            grads[: 2 * depth] = map(torch.empty_like, weights)
        if mixes and rule.phase != "policy":
            grads[2 * depth :] = map(torch.empty_like, stack.parameters()[2 * depth :])
        num_neurons = stack.layers[0].num_neurons
        moments = torch.zeros(depth, 4, num_neurons, dtype=torch.float64)
        results, how = make_array("Gradients", depth), make_array("Mixing", depth)
        for index, layer in enumerate(stack.layers):
            wanted = dict(zip(("weight_h", "bias"), grads[2 * index : 2 * index + 2], strict=True))
            if mixes:
                place = 2 * (depth + index)
                wanted["predictor_h"], wanted["predictor_bias"] = grads[place : place + 2]
                how[index] = mixing_structure(
                    mixing, layer.mixing_weight, for_predictor=rule.phase != "policy"
                )
            results[index] = gradients_structure(wanted, moments[index])
        core.sgrl_stack_backward(
            *(structures.pointer, len(grad_output), how if mixes else None),
            *(grad_output.data_ptr(), pointer(grad_x), results, ctx.record.memory.data_ptr()),
        )
        if mixes:
            _write_statistics(mixing, grad_output.new_tensor([list(r.statistics) for r in results]))
            if rule.updates:
                for layer, sums in zip(stack.layers, moments, strict=True):
                    rule.update(layer, Moments.of_sums(sums.unbind(), len(grad_output)))
        return (None, None, None, None, grad_x, *grads)


def _write_statistics(mixing: Mixing, measured: Tensor) -> None:
    """Of every layer [L, 4]: the predictors' loss is summed, the rest are means."""
    sums = measured.sum(0)
    sums[1:] /= len(measured)
    statistics = dict(zip(STATISTICS, sums.unbind(), strict=True))
    if mixing.rule.phase == "policy":
        del statistics["predictor_loss"]
    mixing.statistics.update(statistics)
