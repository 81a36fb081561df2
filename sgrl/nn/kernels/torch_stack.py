"""The "torch" backend of SparseMLP: one autograd function for all layers.

As in `torch_unroll.py` the batch is the innermost axis ([W, channels, B]), keys and matrices are
stacked, and every product is one batched product over neurons. Without gradients the batch is run
in pieces small enough for the cache.

Letters: W neurons of size N, M slots, R = M + M*N rows of the stacked weights, I = P*N numbers
read by a neuron. S runs may be stacked (`Layer.runs`): W neurons, w = W / S of each.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.nn.connectivity import sum_over_children
from sgrl.nn.mixing import MIN_NORM, MixingRule, Moments, norm
from sgrl.nn.neuron import Layer, Stack
from sgrl.nn.sgprop import NORMS, Mixing

#: Samples run at once where no gradient is needed.
CHUNK_SAMPLES = 256


class _Pass(NamedTuple):
    """What the backward pass needs of one layer."""

    read: Tensor  # inputs of every neuron [W, I, B]
    read_square: Tensor  # their squared lengths [W, B]
    attention: Tensor  # a [W, M, B]
    slots: Tensor  # y [W, M, N, B]
    output: Tensor  # [W, N, B], before the residual


def stack(
    layers: Stack,
    mixing: Mixing,
    x: Float[Tensor, "*S B F"],
    noise: Float[Tensor, "B L W N"] | None = None,
) -> Float[Tensor, "*S B w N"]:
    """Run layers one after the other; where runs are stacked all shapes begin with S.

    Args:
        layers: of one size.
        mixing: how predictions are mixed in.
        x: [B, input size].
        noise: of noisy layers, standard normal; not where runs are stacked.

    Returns:
        The last layer's state [B, W, N].
    """
    alone = layers.layers[0].runs is None
    inputs = (x[None] if alone else x, *layers.parameters())
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        output = _Stack.apply(layers, mixing, noise, *inputs)
    else:
        parts = inputs[0].split(CHUNK_SAMPLES, dim=1)
        noises = [None] * len(parts) if noise is None else noise.split(CHUNK_SAMPLES)
        pieces = [_forward(layers, *part)[0] for part in zip(parts, noises, strict=True)]
        output = _by_run(torch.cat(pieces, dim=2), len(inputs[0]))
    return output[0] if alone else output


def _by_run(h: Tensor, runs: int) -> Tensor:
    """States [W, N, B] -> [S, B, w, N]."""
    return h.unflatten(0, (runs, -1)).permute(0, 3, 1, 2)


def _forward(stack: Stack, x: Tensor, noise: Tensor | None) -> tuple[Tensor, list[_Pass]]:
    """From x [S, B, F]: last state [W, N, B], and what all layers computed."""
    batch = x.shape[1]
    passes = []
    h = x.transpose(1, 2).reshape(-1, batch)
    for index, (layer, residual) in enumerate(zip(stack.layers, stack.residual, strict=True)):
        num_neurons, sources = layer.num_neurons, layer.sources.flatten()
        states = h.view(len(h), -1, batch)  # single inputs, or neurons
        read = states.flatten(1).index_select(0, sources).view(num_neurons, -1, batch)
        squares = states.square().sum(1).index_select(0, sources)
        read_square = squares.view(num_neurons, -1, batch).sum(1)
        rows = torch.bmm(layer.weight_h, read)
        attention = torch.softmax(rows[:, : layer.num_slots] * layer.scale, dim=1)
        slots = torch.add(rows[:, layer.num_slots :], layer.bias.view(num_neurons, -1, 1)).tanh_()
        slots = slots.view(num_neurons, layer.num_slots, -1, batch)
        output = (attention.unsqueeze(2) * slots).sum(1)
        h = torch.tanh(output).add_(h) if residual else output
        if noise is not None:
            h = torch.add(h, noise[:, index].permute(1, 2, 0), alpha=layer.noise_std)
        passes.append(_Pass(read, read_square, attention, slots, output))
    return h, passes


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        mixing: Mixing,
        noise: Tensor | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        weights = parameters[: 2 * len(stack.layers) : 2]
        h, passes = _forward(stack, x, noise)
        ctx.stack, ctx.mixing, ctx.num_inputs = stack, mixing, 1 + len(parameters)
        ctx.slopes, ctx.scratch = [None] * len(passes), None
        # The predictors are not saved: the policy step mixes in what they predict after their own
        # step, which changes them in place.
        ctx.save_for_backward(x, *weights, *(value for one in passes for value in one))
        return _by_run(h, len(x)).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        stack: Stack = ctx.stack
        mixing: Mixing = ctx.mixing
        rule, depth = mixing.rule, len(stack.layers)
        x, *saved = ctx.saved_tensors
        weights, values = saved[:depth], saved[depth:]
        grad_x: Tensor | None = None
        grads: list[Tensor | None] = [None] * (ctx.num_inputs - 1)
        sums: dict[str, Tensor] = {}
        runs = len(x)
        gradient = grad_output.permute(0, 2, 3, 1).flatten(0, 1).contiguous()
        if ctx.scratch is None:
            ctx.scratch = _Scratch(_Pass(*values[:5]))
        for index in range(depth - 1, -1, -1):
            layer, residual = stack.layers[index], stack.residual[index]
            done = _Pass(*values[5 * index : 5 * index + 5])
            if ctx.slopes[index] is None:  # kept: two-phase updates go back twice
                ctx.slopes[index] = _Slopes(done, residual, ctx.scratch)
            slopes = ctx.slopes[index]
            mixed = gradient
            scores: Tensor | None = None
            if mixing.settings.mixes:
                prediction = offered = _predict(layer, done, slopes)
                if mixing.permutation is not None:
                    valid = x.new_ones(x.shape[1], dtype=torch.bool)
                    offered = prediction[..., mixing.permutation(valid)]
                mixed = torch.lerp(offered, gradient, layer.mixing_weight.view(-1, 1, 1))
                vectors = (gradient, mixed, prediction)
                norms = [_mean_of_runs(norm(value, dim=1), runs) / depth for value in vectors]
                measured = dict(zip(NORMS, norms, strict=True))
                if rule.phase != "policy":
                    received = mixing.settings.predictor_target == "received"
                    error = prediction - (gradient if received else mixed)
                    measured["predictor_loss"] = _mean_of_runs(error.square(), runs)
                    place = 2 * (depth + index)
                    grads[place : place + 2] = _predictor_gradients(
                        done, slopes, error.mul_(2 * runs / error.numel())
                    )
                for name, value in measured.items():
                    sums[name] = sums[name] + value if name in sums else value
                if rule.updates:
                    scores = _update_mixing_weight(rule, layer, done, slopes, gradient, offered)
            feedback = slopes.of_residual(mixed)
            if scores is None:
                scores = _score_gradients(done, slopes, feedback)
            rows = _row_gradients(slopes, feedback, scores, layer.scale)
            if rule.phase != "predictor":
                grad_bias = rows[:, layer.num_slots :].sum(-1).view_as(layer.bias)
                grads[2 * index] = torch.bmm(rows, done.read.transpose(1, 2))
                grads[2 * index + 1] = grad_bias
            if index or ctx.needs_input_grad[3]:
                grad_read = ctx.scratch.read
                torch.bmm(weights[index].transpose(1, 2), rows, out=grad_read)
                sources = layer.sources.flatten()
                if index:
                    gradient = mixed.clone() if residual else torch.zeros_like(mixed)
                    total = gradient.view(layer.num_neurons, -1)
                    _add_to_sources(total, layer, grad_read.view(len(sources), -1))
                else:
                    grad_x = x.new_zeros(runs * x.shape[2], x.shape[1])
                    _add_to_sources(grad_x, layer, grad_read.flatten(0, 1))
                    grad_x = grad_x.unflatten(0, (runs, -1)).transpose(1, 2)
        for name, value in sums.items():
            mixing.statistics[name] = value[0] if stack.layers[0].runs is None else value
        return (None, None, None, grad_x, *grads)


def _mean_of_runs(values: Tensor, runs: int) -> Tensor:
    """Values [W, ...] -> mean of each run's, [S]."""
    return values.reshape(runs, -1).mean(1)


def _add_to_sources(total: Tensor, layer: Layer, values: Tensor) -> None:
    """Add in place to every source [sources, K] what its edges carry [W * P, K]."""
    if total.is_cuda or layer.edges is not None:
        total += sum_over_children(values, layer.sources, len(total), layer.edges)
    else:
        total.index_add_(0, layer.sources.flatten(), values)


class _Scratch:
    """Memory for what lives shortly: fresh memory costs as much time as what is computed in it."""

    def __init__(self, done: _Pass) -> None:
        num_neurons, num_slots, size, batch = done.slots.shape
        shape = (num_neurons, num_slots * (1 + size), batch)
        self.product = torch.empty_like(done.slots)
        self.rows = [done.slots.new_empty(shape) for _ in range(2)]
        self.sums = [done.slots.new_empty(*shape[:2], done.read.shape[1]) for _ in range(2)]
        self.read = torch.empty_like(done.read)


class _Slopes:
    """Derivatives of a layer, the same in every backward pass over one forward."""

    def __init__(self, done: _Pass, residual: bool, scratch: _Scratch) -> None:
        self.scratch = scratch
        #: a (1 - y^2) [W, M, N, B]: of the output by the pre-activations.
        self.slots = torch.addcmul(done.slots.new_ones(()), done.slots, done.slots, value=-1)
        self.slots *= done.attention.unsqueeze(2)
        #: 1 - tanh^2 [W, N, B]: of a residual layer's state by its output.
        self.residual = 1 - torch.tanh(done.output).square_() if residual else None
        #: Sum over slots of the squared slopes [W, N, B], once needed.
        self.squares: Tensor | None = None

    def of_residual(self, feedback: Tensor) -> Tensor:
        """Gradient of the output from that of the layer's state, both [W, N, B]."""
        return feedback if self.residual is None else feedback * self.residual


def _score_gradients(done: _Pass, slopes: _Slopes, feedback: Tensor) -> Tensor:
    """Gradients of the scores [W, M, B] from that of the output [W, N, B]."""
    product = torch.mul(feedback.unsqueeze(1), done.slots, out=slopes.scratch.product)
    value = product.sum(2)  # v_m = <g, y_m>
    value -= (feedback * done.output).sum(1, keepdim=True)  # sum_k a_k v_k = <g, output>
    return value.mul_(done.attention)


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


def _predict(layer: Layer, done: _Pass, slopes: _Slopes) -> Tensor:
    """Predictions s [W, N, B]."""
    assert layer.predictor_h is not None
    assert layer.predictor_bias is not None
    guesses = slopes.scratch.product
    torch.bmm(layer.predictor_h, done.read, out=guesses.flatten(1, 2))
    weighted = guesses.mul_(done.attention.unsqueeze(2)).sum(1)
    return weighted.baddbmm_(layer.predictor_bias.transpose(1, 2), done.attention)


def _predictor_gradients(
    done: _Pass, slopes: _Slopes, grad_prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of predictor_h and predictor_bias from that of the prediction [W, N, B]."""
    routed = slopes.scratch.product
    torch.mul(done.attention.unsqueeze(2), grad_prediction.unsqueeze(1), out=routed)
    grad_h = torch.bmm(routed.flatten(1, 2), done.read.transpose(1, 2))
    return grad_h, routed.sum(-1)


def _update_mixing_weight(
    rule: MixingRule,
    layer: Layer,
    done: _Pass,
    slopes: _Slopes,
    gradient: Tensor,
    prediction: Tensor,
) -> Tensor:
    """Update lambda: the moments of `mixing.batch_moments`, batch innermost.

    Returns `_score_gradients` of the mixture of the two under the lambda before: all are linear in
    the feedback, so those of g and s serve for everything.
    """
    gradient, prediction = slopes.of_residual(gradient), slopes.of_residual(prediction)
    norms = [gradient.new_ones(()), gradient.new_ones(())]
    if rule.unit_gradients:
        norms = [norm(v, dim=1).clamp(min=MIN_NORM) for v in (gradient, prediction)]
    scores = [_score_gradients(done, slopes, v) for v in (gradient, prediction)]
    w, u = gradient / norms[0], prediction / norms[1]
    u -= w
    scores_w = scores[0] / norms[0]
    scores_u = scores[1] / norms[1] - scores_w
    rows_w = _row_gradients(slopes, w, scores_w, layer.scale, place=0)
    rows_u = _row_gradients(slopes, u, scores_u, layer.scale, place=1)
    batch, num_slots = w.shape[-1], layer.num_slots
    squares = slopes.squares
    if squares is None:
        squares = torch.square(slopes.slots, out=slopes.scratch.product).sum(1)
        slopes.squares = squares
    x_square = done.read_square

    def inner(feedback: Tensor, rows: Tensor) -> Tensor:
        # <t, t'> summed over slots first: both are slopes times feedback.
        slot_part = (1 + x_square) * (squares * feedback * u).sum(1)
        key_part = x_square * (rows[:, :num_slots] * rows_u[:, :num_slots]).sum(1)
        return (slot_part + key_part).mean(1)

    means_w, means_u = (
        (torch.bmm(rows, done.read.transpose(1, 2), out=out), rows[:, num_slots:].sum(-1))
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
    mixed_scores = torch.lerp(scores[1], scores[0], layer.mixing_weight.view(-1, 1, 1))
    rule.update(layer, moments)
    return mixed_scores
