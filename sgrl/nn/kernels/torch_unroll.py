"""The "torch" backend of SparseRNN: one autograd function for the whole unroll.

Inside, the batch is the innermost axis ([W, channels, B]): the gather of the parents' states is
then a copy of contiguous rows, and softmax and tanh need no permutation. Only what depends on
the previous state stays in the loop over time: gather, one small matrix product per neuron (keys
and matrices stacked), softmax, tanh; going back, their transposes and a scatter to the parents.
The contribution of the external input comes before the loop, and predictions, all parameter
gradients and the sums behind the estimate of lambda after it, as one product per neuron over
all T * B samples.

The backward pass does the latter by chunks of time, each small enough for the cache.

Letters: W neurons of size N, M slots, R = M + M*N rows of the stacked weights, L = P*N numbers
read from parents, E external inputs, X input neurons, K = T * B samples.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgrl.nn.mixing import Moments, norm, unit
from sgrl.nn.neuron import Layer
from sgrl.nn.sgprop import Mixing, positive_projection

#: Samples (steps x batch) that a chunk of the backward pass holds.
CHUNK_SAMPLES = 160


def unroll(
    layer: Layer,
    mixing: Mixing,
    schedule: Callable[[int], Tensor],
    x: Float[Tensor, "T B E"],
    h_0: Float[Tensor, "B W N"],
    mask: Bool[Tensor, "T B"] | None,
) -> Float[Tensor, "T B W N"]:
    """Unroll a layer over time.

    Args:
        layer: reads its own states and x.
        mixing: how predictions are mixed in.
        schedule: lambda at every step [T, W], from T.
        x: [T, B, E].
        h_0: state before the first step [B, W, N].
        mask: bool [T, B], True at valid steps; all if None.

    Returns:
        [T, B, W, N].
    """
    parameters = layer.parameters()
    inputs = (x, h_0, *parameters.values())
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in inputs)):
        states, _, _ = _forward(layer, x, h_0, *inputs[2:5])
        return states[1:].permute(0, 3, 1, 2)
    return _Unroll.apply(layer, mixing, schedule, mask, *inputs)


def _forward(
    layer: Layer, x: Tensor, h_0: Tensor, weight_h: Tensor, weight_x: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> states [T+1, W, N, B] (h_0 first), attention [T, W, M, B], slots [T, W, M, N, B]."""
    num_neurons, size, num_slots = layer.num_neurons, layer.neuron_size, layer.num_slots
    length, batch, _ = x.shape
    parents = layer.sources.flatten()
    scaled_h = _scale_keys(weight_h, num_slots, layer.scale)
    num_x, rows = weight_x.shape[:2]
    external = torch.matmul(weight_x.flatten(0, 1), x.transpose(1, 2)).view(
        length, num_x, rows, batch
    )
    external[:, :, :num_slots] *= layer.scale
    bias_rows = bias.view(num_neurons, -1, 1)
    states = x.new_empty(length + 1, num_neurons, size, batch)
    states[0] = h_0.permute(1, 2, 0)
    attention = x.new_empty(length, num_neurons, num_slots, batch)
    slots = x.new_empty(length, num_neurons, num_slots, size, batch)
    for t in range(length):
        read = states[t].view(num_neurons, -1).index_select(0, parents)
        scores = torch.bmm(scaled_h, read.view(num_neurons, -1, batch))
        scores[:num_x] += external[t]
        torch.softmax(scores[:, :num_slots], dim=1, out=attention[t])
        pre = slots[t].view(num_neurons, -1, batch)
        torch.add(scores[:, num_slots:], bias_rows, out=pre).tanh_()
        torch.sum(attention[t].unsqueeze(2) * slots[t], dim=1, out=states[t + 1])
    return states, attention, slots


def _scale_keys(weight: Tensor, num_slots: int, scale: float) -> Tensor:
    """Stacked weights [W, R, L] with the rows of the keys multiplied by the scale."""
    weight = weight.detach().clone()
    weight[:, :num_slots] *= scale
    return weight


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        mixing: Mixing,
        schedule: Callable[[int], Tensor],
        mask: Tensor | None,
        x: Tensor,
        h_0: Tensor,
        weight_h: Tensor,
        weight_x: Tensor,
        bias: Tensor,
        *predictor: Tensor,
    ) -> Tensor:
        states, attention, slots = _forward(layer, x, h_0, weight_h, weight_x, bias)
        ctx.layer, ctx.mixing, ctx.mask = layer, mixing, mask
        ctx.schedule = schedule(len(x)) if mixing.settings.mixes else None
        ctx.save_for_backward(x, weight_h, weight_x, states, attention, slots, *predictor)
        return states[1:].permute(0, 3, 1, 2).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        layer, mixing, mask = ctx.layer, ctx.mixing, ctx.mask
        x, weight_h, weight_x, states, attention, slots, *predictor = ctx.saved_tensors
        num_neurons, num_slots = layer.num_neurons, layer.num_slots
        length, batch, _ = x.shape
        rows, num_x = weight_h.shape[1], len(weight_x)
        parents = layer.sources.flatten()

        scaled_t = _scale_keys(weight_h, num_slots, layer.scale).transpose(1, 2)
        scaled_x = _scale_keys(weight_x, num_slots, layer.scale).flatten(0, 1)
        grad_output = grad_output.permute(0, 2, 3, 1)  # [T, W, N, B]
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[4] else None
        grads = [torch.zeros_like(p) for p in (weight_h, weight_x, layer.bias)]
        grad_predictor = [torch.zeros_like(p) for p in predictor]
        measured = None
        if mixing.settings.mixes:
            measured = _Measured(layer, mixing, mask, length * batch)
        carried = x.new_zeros(num_neurons, layer.neuron_size, batch)
        shuffled = None
        if mixing.permutation is not None:
            valid = x.new_ones(length, batch, dtype=torch.bool) if mask is None else mask
            order = mixing.permutation(valid)
            shuffled = _shuffled_predictions(layer, order, predictor, states, x, attention)

        # Chunk after chunk from the end, so that what is needed only for the sums over all
        # samples stays small enough for the cache and never fills the memory.
        chunk = max(1, CHUNK_SAMPLES // batch)
        for stop in range(length, 0, -chunk):
            steps = slice(max(0, stop - chunk), stop)
            count = steps.stop - steps.start
            a, y, h = attention[steps], slots[steps], states[1:][steps]
            # Every neuron's inputs at these steps, [W, L, K] and [E, K].
            before = states[steps].permute(1, 2, 0, 3).reshape(num_neurons, -1)
            read = before.index_select(0, parents).view(num_neurons, -1, count * batch)
            external = x[steps].permute(2, 0, 1).reshape(-1, count * batch)
            grad_rows = x.new_empty(count, num_neurons, rows, batch)
            if measured is not None:
                mixture = _Mixture(
                    mixing, predictor, read, external, a, ctx.schedule[steps], mask, steps, shuffled
                )
            for t in range(count - 1, -1, -1):
                feedback = grad_output[steps.start + t] + carried
                if measured is not None:
                    feedback = mixture.mix(t, feedback)
                _row_gradients(grad_rows[t], feedback, a[t], y[t], h[t])
                grad_read = torch.bmm(scaled_t, grad_rows[t]).view(len(parents), -1)
                carried = torch.zeros_like(carried)
                carried.view(num_neurons, -1).index_add_(0, parents, grad_read)
            by_neuron = grad_rows.permute(1, 2, 0, 3).reshape(num_neurons, rows, -1)
            _add(grads, _parameter_gradients(layer, by_neuron, read, external))
            if grad_x is not None:
                grad_external = scaled_x.t() @ by_neuron[:num_x].flatten(0, 1)
                grad_x[steps] = grad_external.t().view(count, batch, -1)
            if measured is not None:
                grad_prediction = measured.add(mixture)
                parts = _predictor_gradients(layer, grad_prediction, a, read, external)
                _add(grad_predictor, parts)
                if mixing.rule.updates:
                    measured.add_moments(mixture, a, y, h, read, external)
        if measured is not None:
            measured.finish()
        grad_h0 = carried.permute(2, 0, 1) if ctx.needs_input_grad[5] else None
        return (None, None, None, None, grad_x, grad_h0, *grads, *grad_predictor)


def _add(totals: list[Tensor], parts: tuple[Tensor, ...]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


class _Mixture:
    """Predictions of a chunk of steps, and the gradients they are mixed into, [T, W, N, B]."""

    def __init__(
        self,
        mixing: Mixing,
        predictor: list[Tensor],
        read: Tensor,
        external: Tensor,
        attention: Tensor,
        schedule: Tensor,
        mask: Tensor | None,
        steps: slice,
        shuffled: Tensor | None,
    ) -> None:
        self.projects = mixing.settings.positive_projection
        self.valid = None if mask is None else mask[steps].view(len(schedule), 1, 1, -1)
        self.prediction = _predict(predictor, read, external, attention)
        self.weight = schedule.view(*schedule.shape, 1, 1)
        if mixing.settings.mask_predictions and self.valid is not None:
            self.weight = torch.where(self.valid, self.weight, 1.0)
        self.offered = self.prediction if shuffled is None else shuffled[steps]
        self.injected = (1 - self.weight) * self.offered
        self.substitute = torch.empty_like(self.prediction) if self.projects else self.offered
        self.received = torch.empty_like(self.prediction)
        self.mixed = torch.empty_like(self.prediction)

    def mix(self, t: int, gradient: Tensor) -> Tensor:
        """Received gradient of step t of the chunk [W, N, B] -> the gradient to pass on."""
        self.received[t] = gradient
        if self.projects:
            self.substitute[t] = positive_projection(gradient, self.offered[t], dim=1)
            torch.mul(1 - self.weight[t], self.substitute[t], out=self.injected[t])
        return torch.addcmul(self.injected[t], self.weight[t], gradient, out=self.mixed[t])


class _Measured:
    """Sums over all valid samples of an unroll: statistics, and the moments behind lambda*.

    The same sums as `mixing.batch_moments`, as products over all samples of a chunk.
    """

    def __init__(self, layer: Layer, mixing: Mixing, mask: Tensor | None, samples: int) -> None:
        self.layer, self.mixing = layer, mixing
        self.num_valid = samples if mask is None else int(mask.sum())
        self.terms = max(self.num_valid, 1) * layer.num_neurons * layer.neuron_size
        zero = layer.bias.new_zeros(())
        names = ("predictor_loss", "received_grad_norm", "mixed_grad_norm", "prediction_norm")
        self.statistics = {name: zero.clone() for name in names}
        self.u_square = torch.zeros_like(layer.mixing_weight)
        self.wu = torch.zeros_like(layer.mixing_weight)
        parameters = list(layer.parameters().values())[:3]
        self.w_sum = [torch.zeros_like(p) for p in parameters]
        self.u_sum = [torch.zeros_like(p) for p in parameters]

    def add(self, mixture: _Mixture) -> Tensor:
        """Add a chunk's statistics; returns the gradient of its predictions [T, W, N, B]."""
        received = self.mixing.settings.predictor_target == "received"
        residual = mixture.prediction - (mixture.received if received else mixture.mixed)
        if mixture.valid is not None:
            residual = torch.where(mixture.valid, residual, 0.0)
        self.statistics["predictor_loss"] += residual.square().sum() / self.terms
        share = 1 / (max(self.num_valid, 1) * self.layer.num_neurons)
        for name, vectors in (
            ("received_grad_norm", mixture.received),
            ("mixed_grad_norm", mixture.mixed),
            ("prediction_norm", mixture.prediction),
        ):
            norms = norm(vectors, dim=2)
            if mixture.valid is not None:
                norms = torch.where(mixture.valid, norms, 0.0)
            self.statistics[name] += norms.sum() * share
        return 2 * residual / self.terms

    def add_moments(
        self,
        mixture: _Mixture,
        attention: Tensor,
        slots: Tensor,
        output: Tensor,
        read: Tensor,
        external: Tensor,
    ) -> None:
        """Add a chunk's moments of w and u = s - w."""
        layer = self.layer
        num_slots, num_x = layer.num_slots, layer.num_input_neurons
        gradient, synthetic = mixture.received, mixture.substitute
        if self.mixing.rule.unit_gradients:
            gradient, synthetic = unit(gradient, dim=2), unit(synthetic, dim=2)
        difference = synthetic - gradient
        if mixture.valid is not None:
            gradient = torch.where(mixture.valid, gradient, 0.0)
            difference = torch.where(mixture.valid, difference, 0.0)

        def rows_of(feedback: Tensor) -> Tensor:
            count, num_neurons, _, batch = feedback.shape
            rows = feedback.new_empty(count, num_neurons, layer.weight_h.shape[1], batch)
            _row_gradients(rows, feedback, attention, slots, output)
            return rows.permute(1, 2, 0, 3).reshape(num_neurons, rows.shape[2], -1)

        rows_w, rows_u = rows_of(gradient), rows_of(difference)
        x_square = read.square().sum(1)
        x_square[:num_x] += external.square().sum(0)

        def inner(rows: Tensor, other: Tensor) -> Tensor:
            product = rows * other
            slot_part = (1 + x_square) * product[:, num_slots:].sum(1)
            key_part = layer.scale**2 * x_square * product[:, :num_slots].sum(1)
            return (slot_part + key_part).sum(1)

        self.u_square += inner(rows_u, rows_u)
        self.wu += inner(rows_w, rows_u)
        _add(self.w_sum, _parameter_gradients(layer, rows_w, read, external))
        _add(self.u_sum, _parameter_gradients(layer, rows_u, read, external))

    def finish(self) -> None:
        """Hand over the statistics and, if lambda is adaptive, update it."""
        self.mixing.statistics.update(self.statistics)
        if not self.mixing.rule.updates:
            return

        def inner_of_sums(one: list[Tensor], other: list[Tensor]) -> Tensor:
            total = torch.zeros_like(self.u_square)
            for a, b in zip(one, other, strict=True):
                total[: len(a)] += (a * b).flatten(1).sum(1)
            return total

        count = max(self.num_valid, 1)
        moments = Moments(
            mean_u_square=self.u_square / count,
            mean_wu=self.wu / count,
            square_mean_u=inner_of_sums(self.u_sum, self.u_sum) / count**2,
            mean_w_mean_u=inner_of_sums(self.w_sum, self.u_sum) / count**2,
            num_samples=self.num_valid,
        )
        self.mixing.rule.update(self.layer, moments)


def _predict(predictor: list[Tensor], read: Tensor, external: Tensor, attention: Tensor) -> Tensor:
    """Predictions s of every neuron at every step, [T, W, N, B]."""
    predictor_h, predictor_x, predictor_bias = predictor
    num_neurons, num_slots, size = predictor_bias.shape
    length, batch = len(attention), attention.shape[-1]
    guesses = torch.bmm(predictor_h, read)  # [W, M*N, K]
    guesses += predictor_bias.view(num_neurons, -1, 1)
    num_x = len(predictor_x)
    guesses[:num_x] += (predictor_x.flatten(0, 1) @ external).view(num_x, -1, guesses.shape[2])
    guesses = guesses.view(num_neurons, num_slots, size, length, batch)
    weights = attention.permute(1, 2, 0, 3).unsqueeze(2)  # [W, M, 1, T, B]
    return (guesses * weights).sum(1).permute(2, 0, 1, 3).contiguous()


def _shuffled_predictions(
    layer: Layer,
    order: Tensor,
    predictor: list[Tensor],
    states: Tensor,
    x: Tensor,
    attention: Tensor,
) -> Tensor:
    """Predictions of all steps, dealt out anew among the samples, [T, W, N, B]."""
    length, batch, _ = x.shape
    read = states[:-1].permute(1, 2, 0, 3).reshape(layer.num_neurons, -1)
    read = read.index_select(0, layer.sources.flatten())
    read = read.view(layer.num_neurons, -1, length * batch)
    external = x.permute(2, 0, 1).reshape(-1, length * batch)
    prediction = _predict(predictor, read, external, attention)
    by_sample = prediction.permute(0, 3, 1, 2).flatten(0, 1)[order]
    return by_sample.view(length, batch, *by_sample.shape[1:]).permute(0, 2, 3, 1).contiguous()


def _row_gradients(
    out: Tensor, feedback: Tensor, attention: Tensor, slots: Tensor, output: Tensor
) -> None:
    """Gradients of the scores and pre-activations, [..., W, M + M*N, B], into `out`.

    feedback and output [..., W, N, B], attention [..., W, M, B], slots [..., W, M, N, B].
    """
    num_slots = attention.shape[-2]
    value = (feedback.unsqueeze(-3) * slots).sum(-2)  # v_m = <g, y_m>
    value -= (feedback * output).sum(-2).unsqueeze(-2)  # sum_k a_k v_k = <g, output>
    torch.mul(attention, value, out=out[..., :num_slots, :])
    slope = torch.addcmul(slots.new_ones(()), slots, slots, value=-1)
    slope *= attention.unsqueeze(-2)
    slope *= feedback.unsqueeze(-3)
    out[..., num_slots:, :] = slope.flatten(-3, -2)


def _parameter_gradients(
    layer: Layer, grad_rows: Tensor, read: Tensor, external: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight_h, weight_x, bias from those of the rows [W, R, K], summed over K."""
    num_x, num_slots = layer.num_input_neurons, layer.num_slots
    grad_h = torch.bmm(grad_rows, read.transpose(1, 2))
    grad_x = (grad_rows[:num_x].flatten(0, 1) @ external.t()).view(num_x, -1, len(external))
    grad_h[:, :num_slots] *= layer.scale
    grad_x[:, :num_slots] *= layer.scale
    grad_bias = grad_rows[:, num_slots:].sum(-1).view_as(layer.bias)
    return grad_h, grad_x, grad_bias


def _predictor_gradients(
    layer: Layer, grad_prediction: Tensor, attention: Tensor, read: Tensor, external: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the predictor's parameters from that of its prediction [T, W, N, B]."""
    num_x = layer.num_input_neurons
    weighted = attention.unsqueeze(3) * grad_prediction.unsqueeze(2)  # [T, W, M, N, B]
    rows = weighted.flatten(2, 3).permute(1, 2, 0, 3).reshape(len(read), -1, read.shape[2])
    grad_h = torch.bmm(rows, read.transpose(1, 2))
    grad_x = (rows[:num_x].flatten(0, 1) @ external.t()).view(num_x, -1, len(external))
    return grad_h, grad_x, rows.sum(-1).view(len(read), layer.num_slots, -1)
