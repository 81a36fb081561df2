"""The "torch" backend of SparseMLP: one autograd function for all layers.

As in `unroll.py` the batch is the innermost axis ([W, channels, B]), keys and matrices are stacked,
and every product is one batched product over neurons. Without gradients the batch is run in pieces
small enough for the cache.

Letters: W neurons of size N, M slots, R = M + M*N rows of the stacked weights, I = P*N numbers
read by a neuron.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sgrl.nn.kernels.unroll import row_gradients, scale_keys
from sgrl.nn.mixing import length, optimal_mixing_weight, unit
from sgrl.nn.neuron import SlotNeurons

if TYPE_CHECKING:
    from sgrl.nn.feedforward import SparseMLP

#: Samples run at once where no gradient is needed.
CHUNK_SAMPLES = 256


class _Layer(NamedTuple):
    """What the backward pass needs of one layer."""

    read: Tensor  # inputs of every neuron [W, I, B]
    attention: Tensor  # [W, M, B]
    slots: Tensor  # [W, M, N, B]
    output: Tensor  # [W, N, B], before the residual


def stack(mlp: "SparseMLP", x: Tensor) -> Tensor:
    """The layers of SparseMLP: x [B, input_size] -> [B, W, N]."""
    parameters = [p for neurons in mlp.layers for p in (neurons.weight_h, neurons.bias)]
    predictors = [
        p
        for neurons in mlp.layers
        if neurons.has_predictor
        for p in (neurons.predictor_h, neurons.predictor_bias)
    ]
    inputs = (x, *parameters, *predictors)
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        return _Stack.apply(mlp, *inputs)
    pieces = [_forward(mlp, piece, parameters)[0] for piece in x.split(CHUNK_SAMPLES)]
    return torch.cat(pieces, dim=2).permute(2, 0, 1)


def _forward(mlp: "SparseMLP", x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[_Layer]]:
    """-> last state [W, N, B], and all layers."""
    batch, num_neurons = len(x), mlp.num_neurons
    layers = []
    h = x.t().contiguous()
    for index, neurons in enumerate(mlp.layers):
        weight, bias = parameters[2 * index : 2 * index + 2]
        if index == 0:
            read = h.index_select(0, mlp.pixels.flatten())
        else:
            sources = mlp.parents[index - 1].flatten()
            read = h.reshape(num_neurons, -1).index_select(0, sources)
        read = read.view(num_neurons, -1, batch)
        rows = torch.bmm(scale_keys(weight, neurons.num_slots, neurons.scale), read)
        attention = torch.softmax(rows[:, : neurons.num_slots], dim=1)
        slots = torch.add(rows[:, neurons.num_slots :], bias.view(num_neurons, -1, 1)).tanh_()
        slots = slots.view(num_neurons, neurons.num_slots, -1, batch)
        output = (attention.unsqueeze(2) * slots).sum(1)
        h = torch.tanh(output).add_(h) if mlp.is_residual(index) else output
        layers.append(_Layer(read, attention, slots, output))
    return h, layers


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mlp: "SparseMLP", x: Tensor, *parameters: Tensor) -> Tensor:
        weights = list(parameters[: 2 * len(mlp.layers)])
        h, layers = _forward(mlp, x, weights)
        ctx.mlp, ctx.num_inputs = mlp, 1 + len(parameters)
        # The predictors are not saved: the policy step mixes in what they predict after their own
        # step, which changes them in place.
        ctx.save_for_backward(x, *weights[::2], *(value for layer in layers for value in layer))
        return h.permute(2, 0, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        mlp: SparseMLP = ctx.mlp
        depth = len(mlp.layers)
        x, *saved = ctx.saved_tensors
        weights, values = saved[:depth], saved[depth:]
        for_policy, for_predictor = mlp.rule.phase != "predictor", mlp.rule.phase != "policy"
        grad_x: Tensor | None = None
        grads: list[Tensor | None] = [None] * (ctx.num_inputs - 1)
        sums: dict[str, Tensor] = {}
        gradient = grad_output.permute(1, 2, 0).contiguous()
        for index in range(depth - 1, -1, -1):
            neurons: SlotNeurons = mlp.layers[index]
            layer = _Layer(*values[4 * index : 4 * index + 4])
            slope = 1 - torch.tanh(layer.output).square_() if mlp.is_residual(index) else None
            mixed = gradient
            if mlp.propagation == "sgprop":
                prediction = _predict(neurons, layer)
                weight = neurons.mixing_weight.view(-1, 1, 1)
                mixed = torch.addcmul((1 - weight) * prediction, weight, gradient)
                measured = _norms(gradient, mixed, prediction, depth)
                if for_predictor:
                    target = mixed if mlp.rule.predictor_target == "mixed" else gradient
                    residual = prediction - target
                    measured["predictor_loss"] = residual.square().mean()
                    place = 2 * (depth + index)
                    grads[place : place + 2] = _predictor_gradients(
                        neurons, layer, residual.mul_(2 / residual.numel())
                    )
                for name, value in measured.items():
                    sums[name] = sums[name] + value if name in sums else value
                if mlp.rule.updates:
                    _update_mixing_weight(neurons, layer, gradient, prediction, slope, mlp)
            rows = _rows(layer, mixed if slope is None else mixed * slope)
            if for_policy:
                grads[2 * index : 2 * index + 2] = _parameter_gradients(neurons, layer, rows)
            if index or ctx.needs_input_grad[1]:
                scaled = scale_keys(weights[index], neurons.num_slots, neurons.scale)
                grad_read = torch.bmm(scaled.transpose(1, 2), rows)
                if index:
                    sources = mlp.parents[index - 1].flatten()
                    gradient = mixed.clone() if slope is not None else torch.zeros_like(mixed)
                    gradient.view(mlp.num_neurons, -1).index_add_(
                        0, sources, grad_read.view(len(sources), -1)
                    )
                else:
                    grad_x = torch.zeros_like(x.t()).index_add_(
                        0, mlp.pixels.flatten(), grad_read.flatten(0, 1)
                    )
                    grad_x = grad_x.t()
        if sums:
            mlp.statistics = {**mlp.statistics, **sums}
        return (None, grad_x, *grads)


def _rows(layer: _Layer, feedback: Tensor) -> Tensor:
    """Gradients of the scores and pre-activations [W, R, B] from that of the output [W, N, B]."""
    num_neurons, num_slots, size, batch = layer.slots.shape
    rows = feedback.new_empty(num_neurons, num_slots * (1 + size), batch)
    row_gradients(rows, feedback, layer.attention, layer.slots, layer.output)
    return rows


def _parameter_gradients(
    neurons: SlotNeurons, layer: _Layer, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight_h and bias, summed over the batch."""
    grad_weight = torch.bmm(rows, layer.read.transpose(1, 2))
    grad_weight[:, : neurons.num_slots] *= neurons.scale
    return grad_weight, rows[:, neurons.num_slots :].sum(-1).view_as(neurons.bias)


def _predict(neurons: SlotNeurons, layer: _Layer) -> Tensor:
    """Predictions s [W, N, B]."""
    bias = neurons.predictor_bias.detach().view(neurons.num_neurons, -1, 1)
    guesses = torch.baddbmm(bias, neurons.predictor_h.detach(), layer.read)
    return (guesses.view_as(layer.slots) * layer.attention.unsqueeze(2)).sum(1)


def _predictor_gradients(
    neurons: SlotNeurons, layer: _Layer, grad_prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of predictor_h and predictor_bias from that of the prediction [W, N, B]."""
    rows = (layer.attention.unsqueeze(2) * grad_prediction.unsqueeze(1)).flatten(1, 2)
    grad_h = torch.bmm(rows, layer.read.transpose(1, 2))
    return grad_h, rows.sum(-1).view_as(neurons.predictor_bias)


def _norms(gradient: Tensor, mixed: Tensor, prediction: Tensor, depth: int) -> dict[str, Tensor]:
    return {
        "true_grad_norm": length(gradient, dim=1).mean() / depth,
        "mixed_grad_norm": length(mixed, dim=1).mean() / depth,
        "prediction_norm": length(prediction, dim=1).mean() / depth,
    }


def _update_mixing_weight(
    neurons: SlotNeurons,
    layer: _Layer,
    gradient: Tensor,
    prediction: Tensor,
    slope: Tensor | None,
    mlp: "SparseMLP",
) -> None:
    """Move lambda towards its estimate: `mixing.estimate_mixing_weight`, batch innermost."""
    if slope is not None:
        gradient, prediction = gradient * slope, prediction * slope
    gradient = unit(gradient, dim=1)
    rows_w, rows_u = _rows(layer, gradient), _rows(layer, unit(prediction, dim=1) - gradient)
    batch, x_square = gradient.shape[-1], layer.read.square().sum(1)

    def inner(rows: Tensor, other: Tensor) -> Tensor:
        product = rows * other
        slot_part = (1 + x_square) * product[:, neurons.num_slots :].sum(1)
        key_part = neurons.scale**2 * x_square * product[:, : neurons.num_slots].sum(1)
        return (slot_part + key_part).mean(1)

    def mean(rows: Tensor) -> Tensor:
        weight, bias = _parameter_gradients(neurons, layer, rows)
        return torch.cat([weight.flatten(1), bias.flatten(1)], dim=1) / batch

    w_bar, u_bar = mean(rows_w), mean(rows_u)
    previous, rule = neurons.mixing_weight, mlp.rule
    estimate = optimal_mixing_weight(
        mean_u_square=inner(rows_u, rows_u),
        mean_wu=inner(rows_w, rows_u),
        square_mean_u=u_bar.square().sum(1),
        mean_w_mean_u=(w_bar * u_bar).sum(1),
        num_samples=batch,
        previous=previous,
        eps=rule.eps,
    )
    previous.copy_(rule.momentum * previous + (1 - rule.momentum) * estimate)
