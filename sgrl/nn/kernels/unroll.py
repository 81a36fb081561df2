"""The "torch" backend of SparseRNN: one autograd function for the whole unroll.

Inside, the batch is the innermost axis ([W, channels, B]): the gather of the parents' states is
then a copy of contiguous rows, and softmax and tanh need no permutation. Only what depends on
the previous state stays in the loop over time: gather, one small matrix product per neuron (keys
and matrices stacked), softmax, tanh; going back, their transposes and a scatter to the parents.
The contribution of the external input comes before the loop, and predictions, all parameter
gradients and the sums behind the estimate of lambda after it, as one product per neuron over
all T * B samples.

Letters: W neurons of size N, M slots, R = M + M*N rows of the stacked weights, L = P*N numbers
read from parents, E external inputs, X input neurons, K = T * B samples.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgrl.nn.mixing import length as length_of
from sgrl.nn.mixing import optimal_mixing_weight, positive_projection, unit

if TYPE_CHECKING:
    from sgrl.nn.recurrent import SparseRNN


def unroll(rnn: "SparseRNN", x: Tensor, h_0: Tensor, mask: Tensor | None) -> Tensor:
    """The unroll of SparseRNN: x [T, B, E], h_0 [B, W, N], mask [T, B] -> [T, B, W, N]."""
    neurons = rnn.neurons
    predictor = (
        (neurons.predictor_h, neurons.predictor_x, neurons.predictor_bias)
        if rnn.propagation == "sgprop"
        else (None, None, None)
    )
    parameters = (neurons.weight_h, neurons.weight_x, neurons.bias, *predictor)
    inputs = (x, h_0, *parameters)
    if not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)):
        states, _, _ = _forward(rnn, x, h_0, *parameters[:3])
        return states[1:].permute(0, 3, 1, 2)
    return _Unroll.apply(rnn, mask, *inputs)


def _forward(
    rnn: "SparseRNN", x: Tensor, h_0: Tensor, weight_h: Tensor, weight_x: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> states [T+1, W, N, B] (h_0 first), attention [T, W, M, B], slots [T, W, M, N, B]."""
    neurons = rnn.neurons
    num_neurons, size, num_slots = neurons.num_neurons, neurons.neuron_size, neurons.num_slots
    length, batch, _ = x.shape
    parents = rnn.parents.flatten()
    scaled_h = _scale_keys(weight_h, num_slots, neurons.scale)
    num_x, rows = weight_x.shape[:2]
    external = torch.matmul(weight_x.flatten(0, 1), x.transpose(1, 2)).view(
        length, num_x, rows, batch
    )
    external[:, :, :num_slots] *= neurons.scale
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
        rnn: "SparseRNN",
        mask: Tensor | None,
        x: Tensor,
        h_0: Tensor,
        weight_h: Tensor,
        weight_x: Tensor,
        bias: Tensor,
        *predictor: Tensor,
    ) -> Tensor:
        states, attention, slots = _forward(rnn, x, h_0, weight_h, weight_x, bias)
        ctx.rnn, ctx.mask = rnn, mask
        ctx.schedule = rnn.schedule(len(x)) if rnn.propagation == "sgprop" else None
        # The states are both kept and returned (as a view), so not through save_for_backward.
        ctx.states = states
        ctx.save_for_backward(x, weight_h, weight_x, attention, slots, *predictor)
        return states[1:].permute(0, 3, 1, 2).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        rnn, mask, states = ctx.rnn, ctx.mask, ctx.states
        x, weight_h, weight_x, attention, slots, *predictor = ctx.saved_tensors
        neurons, rule = rnn.neurons, rnn.rule
        num_neurons, size, num_slots = neurons.num_neurons, neurons.neuron_size, neurons.num_slots
        length, batch, _ = x.shape
        samples = length * batch
        rows, num_x = weight_h.shape[1], len(weight_x)
        parents = rnn.parents.flatten()
        sgprop = rnn.propagation == "sgprop"

        # Every neuron's inputs at every step, [W, L, K] and [E, K].
        before = states[:-1].permute(1, 2, 0, 3).reshape(num_neurons, -1)
        read = before.index_select(0, parents).view(num_neurons, -1, samples)
        external = x.permute(2, 0, 1).reshape(-1, samples)

        if sgprop:
            prediction = _predict(rnn, predictor, read, external, attention)  # [T, W, N, B]
            valid = None if mask is None else mask.view(length, 1, 1, batch)
            weight = ctx.schedule.view(length, num_neurons, 1, 1)
            if rnn.mask_predictions and valid is not None:
                weight = torch.where(valid, weight, 1.0).expand(-1, -1, 1, -1)
            injected = (1 - weight) * prediction
            substitute = torch.empty_like(prediction) if rule.positive_projection else prediction
            received, mixed = torch.empty_like(prediction), torch.empty_like(prediction)

        scaled_t = _scale_keys(weight_h, num_slots, neurons.scale).transpose(1, 2)
        grad_output = grad_output.permute(0, 2, 3, 1)  # [T, W, N, B]
        grad_rows = x.new_empty(length, num_neurons, rows, batch)
        carried = x.new_zeros(num_neurons, size, batch)
        for t in range(length - 1, -1, -1):
            feedback = grad_output[t] + carried
            if sgprop:
                received[t] = feedback
                if rule.positive_projection:
                    substitute[t] = positive_projection(feedback, prediction[t], dim=1)
                    torch.mul(1 - weight[t], substitute[t], out=injected[t])
                feedback = torch.addcmul(injected[t], weight[t], feedback, out=mixed[t])
            _row_gradients(grad_rows[t], feedback, attention[t], slots[t], states[t + 1])
            grad_read = torch.bmm(scaled_t, grad_rows[t]).view(len(parents), -1)
            carried = torch.zeros_like(carried)
            carried.view(num_neurons, -1).index_add_(0, parents, grad_read)

        grad_rows = grad_rows.permute(1, 2, 0, 3).reshape(num_neurons, rows, samples)
        grads = _parameter_gradients(rnn, grad_rows, read, external)
        grad_x = None
        if ctx.needs_input_grad[2]:
            scaled_x = _scale_keys(weight_x, num_slots, neurons.scale).flatten(0, 1)
            grad_x = (scaled_x.t() @ grad_rows[:num_x].flatten(0, 1)).t().view(length, batch, -1)
        grad_h0 = carried.permute(2, 0, 1) if ctx.needs_input_grad[3] else None
        grad_predictor: tuple[Tensor | None, ...] = (None, None, None)
        if sgprop:
            target = mixed if rule.predictor_target == "mixed" else received
            residual = prediction - target
            if valid is not None:
                residual = torch.where(valid, residual, 0.0)
            valid_steps = mask.sum().clamp(min=1) if mask is not None else samples
            count = valid_steps * num_neurons * size
            grad_predictor = _predictor_gradients(
                rnn, 2 * residual / count, attention, read, external
            )
            share = (
                x.new_full((length, 1, batch), 1 / samples)
                if valid is None
                else (valid.squeeze(2).to(x.dtype) / valid_steps)
            )

            def mean_length(vectors: Tensor) -> Tensor:
                return (length_of(vectors, dim=2).squeeze(2) * share).sum() / num_neurons

            rnn.statistics = {
                "predictor_loss": residual.square().sum() / count,
                "true_grad_norm": mean_length(received),
                "mixed_grad_norm": mean_length(mixed),
                "prediction_norm": mean_length(prediction),
            }
            if rule.updates:
                _update_mixing_weight(
                    rnn, received, substitute, attention, slots, states, read, external, mask
                )
        return (None, None, grad_x, grad_h0, *grads, *grad_predictor)


def _predict(
    rnn: "SparseRNN", predictor: list[Tensor], read: Tensor, external: Tensor, attention: Tensor
) -> Tensor:
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
    rnn: "SparseRNN", grad_rows: Tensor, read: Tensor, external: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight_h, weight_x, bias from those of the rows [W, R, K], summed over K."""
    neurons = rnn.neurons
    num_x, num_slots = neurons.num_input_neurons, neurons.num_slots
    grad_h = torch.bmm(grad_rows, read.transpose(1, 2))
    grad_x = (grad_rows[:num_x].flatten(0, 1) @ external.t()).view(num_x, -1, len(external))
    grad_h[:, :num_slots] *= neurons.scale
    grad_x[:, :num_slots] *= neurons.scale
    grad_bias = grad_rows[:, num_slots:].sum(-1).view_as(neurons.bias)
    return grad_h, grad_x, grad_bias


def _predictor_gradients(
    rnn: "SparseRNN", grad_prediction: Tensor, attention: Tensor, read: Tensor, external: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the predictor's parameters from that of its prediction [T, W, N, B]."""
    neurons = rnn.neurons
    num_x = neurons.num_input_neurons
    weighted = attention.unsqueeze(3) * grad_prediction.unsqueeze(2)  # [T, W, M, N, B]
    rows = weighted.flatten(2, 3).permute(1, 2, 0, 3).reshape(len(read), -1, read.shape[2])
    grad_h = torch.bmm(rows, read.transpose(1, 2))
    grad_x = (rows[:num_x].flatten(0, 1) @ external.t()).view(num_x, -1, len(external))
    return grad_h, grad_x, rows.sum(-1).view_as(neurons.predictor_bias)


def _update_mixing_weight(
    rnn: "SparseRNN",
    received: Tensor,
    substitute: Tensor,
    attention: Tensor,
    slots: Tensor,
    states: Tensor,
    read: Tensor,
    external: Tensor,
    mask: Tensor | None,
) -> None:
    """Estimate lambda* from all valid samples and move the mixing weight towards it.

    The same sums as `mixing.estimate_mixing_weight`, as products over all samples.
    """
    neurons, rule = rnn.neurons, rnn.rule
    num_neurons, num_slots = neurons.num_neurons, neurons.num_slots
    num_x, samples = neurons.num_input_neurons, read.shape[2]
    num_valid = samples if mask is None else int(mask.sum())
    previous = neurons.mixing_weight
    gradient, synthetic = unit(received, dim=2), unit(substitute, dim=2)
    if mask is not None:
        valid = mask.view(len(mask), 1, 1, -1).to(gradient.dtype)
        gradient, synthetic = gradient * valid, synthetic * valid
    difference = synthetic.sub_(gradient) if mask is not None else synthetic - gradient

    def rows_of(feedback: Tensor) -> Tensor:
        rows = feedback.new_empty(
            len(feedback), num_neurons, neurons.weight_h.shape[1], feedback.shape[-1]
        )
        _row_gradients(rows, feedback, attention, slots, states[1:])
        return rows.permute(1, 2, 0, 3).reshape(num_neurons, -1, samples)

    rows_w, rows_u = rows_of(gradient), rows_of(difference)
    x_square = read.square().sum(1)
    x_square[:num_x] += external.square().sum(0)

    def inner(rows: Tensor, other: Tensor) -> Tensor:
        product = rows * other
        slot_part = (1 + x_square) * product[:, num_slots:].sum(1)
        key_part = neurons.scale**2 * x_square * product[:, :num_slots].sum(1)
        return (slot_part + key_part).sum(1) / num_valid

    w_bar = _parameter_gradients(rnn, rows_w, read, external)
    u_bar = _parameter_gradients(rnn, rows_u, read, external)

    def inner_of_means(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
        total = previous.new_zeros(num_neurons)
        for a, b in zip(one, other, strict=True):
            total[: len(a)] += (a * b).flatten(1).sum(1)
        return total / num_valid**2

    estimate = optimal_mixing_weight(
        mean_u_square=inner(rows_u, rows_u),
        mean_wu=inner(rows_w, rows_u),
        square_mean_u=inner_of_means(u_bar, u_bar),
        mean_w_mean_u=inner_of_means(w_bar, u_bar),
        num_samples=num_valid,
        previous=previous,
        eps=rule.eps,
    )
    previous.copy_(rule.momentum * previous + (1 - rule.momentum) * estimate)
