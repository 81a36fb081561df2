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

from sgrl.nn.mixing import MIN_NORM, Moments, norm
from sgrl.nn.neuron import SlotNeurons

if TYPE_CHECKING:
    from sgrl.nn.feedforward import SparseMLP

#: Samples run at once where no gradient is needed.
CHUNK_SAMPLES = 256


class _Layer(NamedTuple):
    """What the backward pass needs of one layer."""

    read: Tensor  # inputs of every neuron [W, I, B]
    read_square: Tensor  # their squared lengths [W, B]
    attention: Tensor  # a [W, M, B]
    slots: Tensor  # y [W, M, N, B]
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
        sources = (mlp.pixels if index == 0 else mlp.parents[index - 1]).flatten()
        states = h.view(len(h), -1, batch)  # single inputs, or neurons
        read = states.flatten(1).index_select(0, sources).view(num_neurons, -1, batch)
        squares = states.square().sum(1).index_select(0, sources)
        read_square = squares.view(num_neurons, -1, batch).sum(1)
        rows = torch.bmm(weight, read)
        attention = torch.softmax(rows[:, : neurons.num_slots] * neurons.scale, dim=1)
        slots = torch.add(rows[:, neurons.num_slots :], bias.view(num_neurons, -1, 1)).tanh_()
        slots = slots.view(num_neurons, neurons.num_slots, -1, batch)
        output = (attention.unsqueeze(2) * slots).sum(1)
        h = torch.tanh(output).add_(h) if mlp.is_residual(index) else output
        layers.append(_Layer(read, read_square, attention, slots, output))
    return h, layers


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mlp: "SparseMLP", x: Tensor, *parameters: Tensor) -> Tensor:
        weights = list(parameters[: 2 * len(mlp.layers)])
        h, layers = _forward(mlp, x, weights)
        ctx.mlp, ctx.num_inputs = mlp, 1 + len(parameters)
        ctx.slopes, ctx.scratch = [None] * len(layers), None
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
        if ctx.scratch is None:
            ctx.scratch = _Scratch(_Layer(*values[:5]))
        for index in range(depth - 1, -1, -1):
            neurons: SlotNeurons = mlp.layers[index]
            layer = _Layer(*values[5 * index : 5 * index + 5])
            residual = mlp.is_residual(index)
            if ctx.slopes[index] is None:  # kept: two-phase updates go back twice
                ctx.slopes[index] = _Slopes(layer, residual, ctx.scratch)
            slopes = ctx.slopes[index]
            mixed = gradient
            if mlp.propagation == "sgprop":
                prediction = offered = _predict(neurons, layer, slopes)
                if mlp.shuffle is not None:
                    valid = x.new_ones(len(x), dtype=torch.bool)
                    offered = prediction[..., mlp.shuffle.permutation(valid)]
                weight = neurons.mixing_weight.view(-1, 1, 1)
                mixed = torch.lerp(offered, gradient, weight)
                measured = _norms(gradient, mixed, prediction, depth)
                if for_predictor:
                    target = mixed if mlp.rule.predictor_target == "mixed" else gradient
                    error = prediction - target
                    measured["predictor_loss"] = error.square().mean()
                    place = 2 * (depth + index)
                    grads[place : place + 2] = _predictor_gradients(
                        neurons, layer, slopes, error.mul_(2 / error.numel())
                    )
                for name, value in measured.items():
                    sums[name] = sums[name] + value if name in sums else value
            feedback = slopes.of_residual(mixed)
            scores: Tensor | None = None
            if mlp.rule.updates and mlp.propagation == "sgprop":
                scores = _update_mixing_weight(mlp, neurons, layer, slopes, gradient, offered)
            if scores is None:
                scores = _score_gradients(layer, slopes, feedback)
            rows = _row_gradients(slopes, feedback, scores, neurons.scale)
            if for_policy:
                grads[2 * index : 2 * index + 2] = _parameter_gradients(neurons, layer, rows)
            if index or ctx.needs_input_grad[1]:
                grad_read = ctx.scratch.read
                torch.bmm(weights[index].transpose(1, 2), rows, out=grad_read)
                if index:
                    sources = mlp.parents[index - 1].flatten()
                    gradient = mixed.clone() if residual else torch.zeros_like(mixed)
                    gradient.view(mlp.num_neurons, -1).index_add_(
                        0, sources, grad_read.view(len(sources), -1)
                    )
                else:
                    grad_x = x.new_zeros(x.shape[1], len(x))
                    grad_x.index_add_(0, mlp.pixels.flatten(), grad_read.flatten(0, 1))
                    grad_x = grad_x.t()
        if sums:
            mlp.statistics = {**mlp.statistics, **sums}
        return (None, grad_x, *grads)


class _Scratch:
    """Memory for what lives shortly: fresh memory costs as much time as what is computed in it."""

    def __init__(self, layer: _Layer) -> None:
        num_neurons, num_slots, size, batch = layer.slots.shape
        shape = (num_neurons, num_slots * (1 + size), batch)
        self.product = torch.empty_like(layer.slots)
        self.rows = [layer.slots.new_empty(shape) for _ in range(2)]
        self.sums = [layer.slots.new_empty(*shape[:2], layer.read.shape[1]) for _ in range(2)]
        self.read = torch.empty_like(layer.read)


class _Slopes:
    """Derivatives of a layer, the same in every backward pass over one forward."""

    def __init__(self, layer: _Layer, residual: bool, scratch: _Scratch) -> None:
        self.scratch = scratch
        #: a (1 - y^2) [W, M, N, B]: of the output by the pre-activations.
        self.slots = torch.addcmul(layer.slots.new_ones(()), layer.slots, layer.slots, value=-1)
        self.slots *= layer.attention.unsqueeze(2)
        #: 1 - tanh^2 [W, N, B]: of a residual layer's state by its output.
        self.residual = 1 - torch.tanh(layer.output).square_() if residual else None
        #: Sum over slots of the squared slopes [W, N, B], once needed.
        self.squares: Tensor | None = None

    def of_residual(self, feedback: Tensor) -> Tensor:
        """Gradient of the output from that of the layer's state, both [W, N, B]."""
        return feedback if self.residual is None else feedback * self.residual


def _score_gradients(layer: _Layer, slopes: _Slopes, feedback: Tensor) -> Tensor:
    """Gradients of the scores [W, M, B] from that of the output [W, N, B]."""
    product = torch.mul(feedback.unsqueeze(1), layer.slots, out=slopes.scratch.product)
    value = product.sum(2)  # v_m = <g, y_m>
    value -= (feedback * layer.output).sum(1, keepdim=True)  # sum_k a_k v_k = <g, output>
    return value.mul_(layer.attention)


def _row_gradients(
    slopes: _Slopes, feedback: Tensor, scores: Tensor, scale: float, place: int = 0
) -> Tensor:
    """Gradients of the keys' and matrices' products with the inputs [W, R, B].

    Args:
        slopes: of the layer.
        feedback: gradient of the output [W, N, B].
        scores: `_score_gradients` of it.
        scale: of the scores.
        place: where in the scratch memory they are kept, 0 or 1.
    """
    rows, num_slots = slopes.scratch.rows[place], scores.shape[1]
    torch.mul(scores, scale, out=rows[:, :num_slots])
    of_slots = rows[:, num_slots:].unflatten(1, slopes.slots.shape[1:3])
    torch.mul(slopes.slots, feedback.unsqueeze(1), out=of_slots)
    return rows


def _parameter_gradients(
    neurons: SlotNeurons, layer: _Layer, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight_h and bias, summed over the batch."""
    grad_bias = rows[:, neurons.num_slots :].sum(-1).view_as(neurons.bias)
    return torch.bmm(rows, layer.read.transpose(1, 2)), grad_bias


def _predict(neurons: SlotNeurons, layer: _Layer, slopes: _Slopes) -> Tensor:
    """Predictions s [W, N, B]."""
    guesses = slopes.scratch.product
    torch.bmm(neurons.predictor_h.detach(), layer.read, out=guesses.flatten(1, 2))
    weighted = guesses.mul_(layer.attention.unsqueeze(2)).sum(1)
    return weighted.baddbmm_(neurons.predictor_bias.detach().transpose(1, 2), layer.attention)


def _predictor_gradients(
    neurons: SlotNeurons, layer: _Layer, slopes: _Slopes, grad_prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of predictor_h and predictor_bias from that of the prediction [W, N, B]."""
    routed = slopes.scratch.product
    torch.mul(layer.attention.unsqueeze(2), grad_prediction.unsqueeze(1), out=routed)
    grad_h = torch.bmm(routed.flatten(1, 2), layer.read.transpose(1, 2))
    return grad_h, routed.sum(-1)


def _norms(gradient: Tensor, mixed: Tensor, prediction: Tensor, depth: int) -> dict[str, Tensor]:
    return {
        "received_grad_norm": norm(gradient, dim=1).mean() / depth,
        "mixed_grad_norm": norm(mixed, dim=1).mean() / depth,
        "prediction_norm": norm(prediction, dim=1).mean() / depth,
    }


def _update_mixing_weight(
    mlp: "SparseMLP",
    neurons: SlotNeurons,
    layer: _Layer,
    slopes: _Slopes,
    gradient: Tensor,
    prediction: Tensor,
) -> Tensor:
    """Move lambda: the moments of `mixing.batch_moments`, batch innermost.

    Returns `_score_gradients` of the mixture of the two under the lambda before: all are linear in
    the feedback, so those of g and s serve for everything.
    """
    gradient, prediction = slopes.of_residual(gradient), slopes.of_residual(prediction)
    norms = [gradient.new_ones(()), gradient.new_ones(())]
    if mlp.rule.unit_gradients:
        norms = [norm(v, dim=1).clamp(min=MIN_NORM) for v in (gradient, prediction)]
    scores = [_score_gradients(layer, slopes, v) for v in (gradient, prediction)]
    w, u = gradient / norms[0], prediction / norms[1]
    u -= w
    scores_w = scores[0] / norms[0]
    scores_u = scores[1] / norms[1] - scores_w
    rows_w = _row_gradients(slopes, w, scores_w, neurons.scale, place=0)
    rows_u = _row_gradients(slopes, u, scores_u, neurons.scale, place=1)
    batch, num_slots = w.shape[-1], neurons.num_slots
    if slopes.squares is None:
        slopes.squares = torch.square(slopes.slots, out=slopes.scratch.product).sum(1)
    x_square = layer.read_square

    def inner(feedback: Tensor, rows: Tensor) -> Tensor:
        # <t, t'> summed over slots first: both are slopes times feedback.
        slot_part = (1 + x_square) * (slopes.squares * feedback * u).sum(1)
        key_part = x_square * (rows[:, :num_slots] * rows_u[:, :num_slots]).sum(1)
        return (slot_part + key_part).mean(1)

    means_w, means_u = (
        (torch.bmm(rows, layer.read.transpose(1, 2), out=out), rows[:, num_slots:].sum(-1))
        for rows, out in zip((rows_w, rows_u), slopes.scratch.sums, strict=True)
    )

    def inner_of_means(means: tuple[Tensor, Tensor]) -> Tensor:
        parts = zip(means, means_u, strict=True)
        total = sum(torch.linalg.vecdot(a.flatten(1), b.flatten(1)) for a, b in parts)
        return total / batch**2

    moments = Moments(
        mean_u_square=inner(u, rows_u),
        mean_wu=inner(w, rows_w),
        square_mean_u=inner_of_means(means_u),
        mean_w_mean_u=inner_of_means(means_w),
        num_samples=batch,
    )
    mixed_scores = torch.lerp(scores[1], scores[0], neurons.mixing_weight.view(-1, 1, 1))
    mlp.rule.update(neurons, moments)
    return mixed_scores
