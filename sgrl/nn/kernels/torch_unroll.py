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
read from parents, E external inputs, X input neurons, K = T * B samples. S runs may be stacked
(`Layer.runs`): W neurons, w = W / S of each.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgrl.nn.connectivity import edge_table, sum_over_children
from sgrl.nn.kernels.torch_layer import (
    Pass,
    external_gradient,
    forward_pass,
    of_input_neurons,
    parameter_gradients,
    row_gradients,
    scale_keys,
)
from sgrl.nn.mixing import Moments, norm, unit
from sgrl.nn.neuron import Layer
from sgrl.nn.sgprop import NORMS, Mixing, positive_projection

#: Samples (steps x batch) that a chunk of the backward pass holds, for the processor's cache or the
#: GPU's memory. Sums are taken by chunks, so it must not depend on how many runs are stacked.
CHUNK_SAMPLES = {"cpu": 160, "cuda": 800}
#: Numbers that the gradients of a chunk of neurons fill, where lambda is estimated from episodes.
CHUNK_NUMBERS = {"cpu": 2**20, "cuda": 2**27}


def unroll(
    layer: Layer,
    mixing: Mixing,
    schedule: Callable[[int], Tensor],
    x: Float[Tensor, "*S T B E"],
    h_0: Float[Tensor, "*S B w N"],
    mask: Bool[Tensor, "*S T B"] | None,
    passed: Pass | None = None,
    noise: Float[Tensor, "T B W N"] | None = None,
) -> Float[Tensor, "*S T B w N"]:
    """Unroll a layer over time; where runs are stacked all shapes begin with S, w being W / S.

    Args:
        layer: reads its own states and x.
        mixing: how predictions are mixed in.
        schedule: lambda at every step [T, W], from T.
        x: [T, B, E].
        h_0: state before the first step [B, W, N].
        mask: bool [T, B], True at valid steps; all if None.
        passed: this very forward pass, if it was made already.
        noise: of a noisy layer, standard normal; not where runs are stacked.

    Returns:
        [T, B, W, N].
    """
    if layer.runs is None:
        x, h_0, mask = x[None], h_0[None], None if mask is None else mask[None]
    parameters = layer.parameters()
    inputs = (x, h_0, *parameters.values())
    passed = passed or forward_pass(layer, x, h_0, noise)
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        output = _Unroll.apply(layer, mixing, schedule, mask, passed, *inputs)
    else:
        output = passed.output()
    return output[0] if layer.runs is None else output


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        mixing: Mixing,
        schedule: Callable[[int], Tensor],
        mask: Tensor | None,
        passed: Pass,
        x: Tensor,
        h_0: Tensor,
        weight_h: Tensor,
        weight_x: Tensor,
        bias: Tensor,
        *predictor: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.mixing, ctx.mask = layer, mixing, mask
        ctx.schedule = schedule(x.shape[1]) if mixing.settings.mixes else None
        kept = (passed.states, passed.outputs, passed.attention, passed.slots)
        ctx.save_for_backward(x, weight_h, weight_x, *kept, *predictor)
        return passed.output().clone(memory_format=torch.contiguous_format)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        layer, mixing, mask = ctx.layer, ctx.mixing, ctx.mask
        x, weight_h, weight_x, states, outputs, attention, slots, *predictor = ctx.saved_tensors
        num_neurons, num_slots = layer.num_neurons, layer.num_slots
        runs, length, batch, _ = x.shape
        rows = weight_h.shape[1]
        parents = layer.sources.flatten()
        edges = layer.edges
        if edges is None and x.is_cuda:
            edges = edge_table(layer.sources, num_neurons)

        scaled_t = scale_keys(weight_h, num_slots, layer.scale).transpose(1, 2)
        scaled_x = scale_keys(weight_x, num_slots, layer.scale).view(runs, -1, x.shape[3])
        grad_output = grad_output.permute(1, 0, 3, 4, 2)  # [T, S, w, N, B]
        if layer.runs is not None:  # sums over N follow the order in memory
            grad_output = grad_output.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[5] else None
        grads = [torch.zeros_like(p) for p in (weight_h, weight_x, layer.bias)]
        grad_predictor = [torch.zeros_like(p) for p in predictor]
        measured = None
        if mixing.settings.mixes:
            measured = _Measured(layer, mixing, mask, length * batch)
        carried = x.new_zeros(num_neurons, layer.neuron_size, batch)
        shuffled = None
        if mixing.permutation is not None:
            valid = x.new_ones(length, batch, dtype=torch.bool) if mask is None else mask[0]
            predictions = _predict(predictor, *_inputs(layer, states[:-1], x), attention)
            shuffled = _dealt_out(predictions, mixing.permutation(valid))

        # Chunk after chunk from the end, so that what is needed only for the sums over all
        # samples stays small enough for the cache and never fills the memory.
        chunk = max(1, CHUNK_SAMPLES.get(x.device.type, 160) // batch)
        for stop in range(length, 0, -chunk):
            steps = slice(max(0, stop - chunk), stop)
            count = steps.stop - steps.start
            a, y, h = attention[steps], slots[steps], outputs[steps]
            inputs = _inputs(layer, states[steps], x[:, steps])
            grad_rows = x.new_empty(count, num_neurons, rows, batch)
            if measured is not None:
                offered = None if shuffled is None else shuffled[steps]
                valid = None if mask is None else mask[:, steps]
                prediction = _predict(predictor, *inputs, a)
                mixture = _Mixture(mixing, prediction, ctx.schedule[steps], valid, offered)
            for t in range(count - 1, -1, -1):
                feedback = grad_output[steps.start + t].reshape_as(carried) + carried
                if measured is not None:
                    feedback = mixture.mix(t, feedback)
                row_gradients(grad_rows[t], feedback, a[t], y[t], h[t])
                grad_read = torch.bmm(scaled_t, grad_rows[t]).view(len(parents), -1)
                carried = sum_over_children(grad_read, layer.sources, num_neurons, edges)
                carried = carried.view(num_neurons, -1, batch)
            by_neuron = grad_rows.permute(1, 2, 0, 3).reshape(num_neurons, rows, -1)
            _add(grads, parameter_gradients(layer, by_neuron, *inputs))
            if grad_x is not None:
                of_input = of_input_neurons(layer, by_neuron)
                grad_external = torch.bmm(scaled_x.transpose(1, 2), of_input)
                grad_x[:, steps] = grad_external.transpose(1, 2).unflatten(1, (count, batch))
            if measured is not None:
                grad_prediction = measured.add(mixture)
                parts = _predictor_gradients(layer, grad_prediction, a, *inputs)
                _add(grad_predictor, parts)
                if mixing.rule.updates:
                    measured.add_moments(mixture, a, y, h, *inputs)
        if measured is not None:
            measured.finish(x, states, outputs, attention, slots)
        grad_h0 = None
        if ctx.needs_input_grad[6]:
            grad_h0 = carried.unflatten(0, (runs, -1)).permute(0, 3, 1, 2)
        return (None, None, None, None, None, grad_x, grad_h0, *grads, *grad_predictor)


def _add(totals: list[Tensor], parts: tuple[Tensor, ...]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


class _Mixture:
    """Predictions of a chunk of steps, and the gradients they are mixed into, [T, W, N, B]."""

    def __init__(
        self,
        mixing: Mixing,
        prediction: Tensor,
        schedule: Tensor,
        mask: Tensor | None,
        offered: Tensor | None,
    ) -> None:
        self.projects = mixing.settings.positive_projection
        self.valid = None  # [T, W or 1, 1, B]
        if mask is not None:
            self.valid = mask.transpose(0, 1).unsqueeze(2)
            if len(mask) > 1:
                self.valid = self.valid.repeat_interleave(schedule.shape[1] // len(mask), 1)
        self.prediction = prediction
        self.weight = schedule.view(*schedule.shape, 1, 1)
        if mixing.settings.mask_predictions and self.valid is not None:
            self.weight = torch.where(self.valid, self.weight, 1.0)
        self.offered = prediction if offered is None else offered
        self.injected = (1 - self.weight) * self.offered
        self.substitute = torch.empty_like(prediction) if self.projects else self.offered
        self.received = torch.empty_like(prediction)
        self.mixed = torch.empty_like(prediction)

    def mix(self, t: int, gradient: Tensor) -> Tensor:
        """Received gradient of step t of the chunk [W, N, B] -> the gradient to pass on."""
        self.received[t] = gradient
        if self.projects:
            self.substitute[t] = positive_projection(gradient, self.offered[t], dim=1)
            torch.mul(1 - self.weight[t], self.substitute[t], out=self.injected[t])
        return torch.addcmul(self.injected[t], self.weight[t], gradient, out=self.mixed[t])


class _Measured:
    """Sums over all valid samples of an unroll: statistics, and the moments behind lambda*.

    The same sums as `mixing.batch_moments`, as products over all samples of a chunk. Where samples
    are episodes (`mixing.episode_moments`) the vectors of all chunks are kept (`episodes`), and
    their gradients made at the end.
    """

    def __init__(self, layer: Layer, mixing: Mixing, mask: Tensor | None, samples: int) -> None:
        self.layer, self.mixing, self.mask = layer, mixing, mask
        valid = torch.full_like(layer.mixing_weight[: layer.num_runs], samples)
        #: Valid samples of each run [S].
        self.num_valid = valid if mask is None else mask.sum((1, 2)).to(valid)
        self.terms = self.num_valid.clamp(min=1) * (layer.num_neurons // layer.num_runs)
        zero = torch.zeros_like(valid)
        self.statistics = {name: zero.clone() for name in ("predictor_loss", *NORMS)}
        self.u_square = torch.zeros_like(layer.mixing_weight)
        self.wu = torch.zeros_like(layer.mixing_weight)
        parameters = list(layer.parameters().values())[:3]
        self.w_sum = [torch.zeros_like(p) for p in parameters]
        self.u_sum = [torch.zeros_like(p) for p in parameters]
        #: Received gradient and its difference to the prediction at chunks of steps, from the end.
        self.episodes: list[tuple[Tensor, Tensor]] = []

    def add(self, mixture: _Mixture) -> Tensor:
        """Add a chunk's statistics; returns the gradient of its predictions [T, W, N, B]."""
        received = self.mixing.settings.predictor_target == "received"
        residual = mixture.prediction - (mixture.received if received else mixture.mixed)
        if mixture.valid is not None:
            residual = torch.where(mixture.valid, residual, 0.0)
        size = self.layer.neuron_size
        loss = self._sum_of_runs(residual.square()) / (self.terms * size)
        self.statistics["predictor_loss"] += loss
        measured = (mixture.received, mixture.mixed, mixture.prediction)
        for name, vectors in zip(NORMS, measured, strict=True):
            norms = norm(vectors, dim=2)
            if mixture.valid is not None:
                norms = torch.where(mixture.valid, norms, 0.0)
            self.statistics[name] += self._sum_of_runs(norms) * self.terms.reciprocal()
        return 2 * residual / (self._of_neurons(self.terms) * size).view(-1, 1, 1)

    def _sum_of_runs(self, values: Tensor) -> Tensor:
        """Values [T, W, ...] -> sums over each run's, [S]."""
        return values.unflatten(1, (self.layer.num_runs, -1)).transpose(0, 1).flatten(1).sum(1)

    def _of_neurons(self, of_runs: Tensor) -> Tensor:
        """Values of runs [S] -> of their neurons [W]."""
        return of_runs.repeat_interleave(self.layer.num_neurons // self.layer.num_runs)

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
        num_slots = layer.num_slots
        gradient, synthetic = mixture.received, mixture.substitute
        if self.mixing.rule.unit_gradients:
            gradient, synthetic = unit(gradient, dim=2), unit(synthetic, dim=2)
        difference = synthetic - gradient
        if mixture.valid is not None:
            gradient = torch.where(mixture.valid, gradient, 0.0)
            difference = torch.where(mixture.valid, difference, 0.0)
        if self.mixing.rule.samples == "episodes":
            self.episodes.append((gradient, difference))
            return

        def rows_of(feedback: Tensor) -> Tensor:
            count, num_neurons, _, batch = feedback.shape
            rows = feedback.new_empty(count, num_neurons, layer.weight_h.shape[1], batch)
            row_gradients(rows, feedback, attention, slots, output)
            return rows.permute(1, 2, 0, 3).reshape(num_neurons, rows.shape[2], -1)

        rows_w, rows_u = rows_of(gradient), rows_of(difference)
        x_square = read.square().sum(1)
        of_runs = x_square.view(layer.num_runs, -1, x_square.shape[1])
        of_runs[:, : layer.num_input_neurons] += external.square().sum(1, keepdim=True)

        def inner(rows: Tensor, other: Tensor) -> Tensor:
            product = rows * other
            slot_part = (1 + x_square) * product[:, num_slots:].sum(1)
            key_part = layer.scale**2 * x_square * product[:, :num_slots].sum(1)
            return (slot_part + key_part).sum(1)

        self.u_square += inner(rows_u, rows_u)
        self.wu += inner(rows_w, rows_u)
        _add(self.w_sum, parameter_gradients(layer, rows_w, read, external))
        _add(self.u_sum, parameter_gradients(layer, rows_u, read, external))

    def finish(
        self,
        x: Float[Tensor, "S T B E"],
        states: Float[Tensor, "T+1 W N B"],
        outputs: Float[Tensor, "T W N B"],
        attention: Float[Tensor, "T W M B"],
        slots: Float[Tensor, "T W M N B"],
    ) -> None:
        """Hand over the statistics and, if lambda is adaptive, update it."""
        for name, value in self.statistics.items():
            self.mixing.statistics[name] = value[0] if self.layer.runs is None else value
        if not self.mixing.rule.updates:
            return
        if self.mixing.rule.samples == "episodes":
            moments = self._episode_moments(x, states, outputs, attention, slots)
        else:
            moments = self._step_moments()
        self.mixing.rule.update(self.layer, moments)

    def _step_moments(self) -> Moments:
        def inner_of_sums(one: list[Tensor], other: list[Tensor]) -> Tensor:
            total = torch.zeros_like(self.u_square)
            for a, b in zip(one, other, strict=True):
                products = (a * b).flatten(1).sum(1)
                runs = self.layer.num_runs
                total.view(runs, -1)[:, : len(a) // runs] += products.view(runs, -1)
            return total

        of_means = (inner_of_sums(one, self.u_sum) for one in (self.u_sum, self.w_sum))
        sums, num_samples = (self.u_square, self.wu, *of_means), self._of_neurons(self.num_valid)
        return Moments.of_sums(sums, num_samples)

    def _episode_moments(
        self, x: Tensor, states: Tensor, outputs: Tensor, attention: Tensor, slots: Tensor
    ) -> Moments:
        """Those of the sums over each episode, some neurons of every run at a time."""
        layer = self.layer
        runs, length, batch, size_x = x.shape
        width, num_input = layer.num_neurons // runs, layer.num_input_neurons
        received, difference = (
            torch.cat(chunks[::-1]) for chunks in zip(*self.episodes, strict=True)
        )
        sources = layer.sources.unflatten(0, (runs, -1))
        external = x.permute(1, 0, 3, 2)  # [T, S, E, B]
        sums = x.new_empty(4, runs, width)
        for first, stop, size in ((0, num_input, size_x), (num_input, width, 0)):
            rows, columns = layer.weight_h.shape[1], layer.weight_h.shape[2] + size + 1
            numbers = runs * batch * (2 * length * (rows + columns) + 4 * rows * columns)
            chunk = max(1, CHUNK_NUMBERS.get(x.device.type, 2**20) // numbers)
            for part in (slice(i, min(i + chunk, stop)) for i in range(first, stop, chunk)):
                gradient, other, a, y, h = (
                    values.unflatten(1, (runs, -1))[:, :, part].flatten(1, 2)
                    for values in (received, difference, attention, slots, outputs)
                )
                read = states[:-1].index_select(1, sources[:, part].flatten())
                inputs = [read.view(length, len(a[0]), -1, batch)]
                if size:
                    inputs.append(external.repeat_interleave(part.stop - part.start, 1))
                inputs.append(torch.ones_like(inputs[0][:, :, :1]))
                columns_of_x = torch.cat(inputs, dim=2).permute(1, 3, 0, 2)  # [.., B, T, columns]
                w, u = (
                    _episode_gradients(layer, feedback, a, y, h, columns_of_x)
                    for feedback in (gradient, other)
                )
                w_sum, u_sum = w.sum(1), u.sum(1)
                found = [(u * u).sum(2).sum(1), (w * u).sum(2).sum(1)]
                found += [(u_sum * u_sum).sum(1), (w_sum * u_sum).sum(1)]
                sums[:, :, part] = torch.stack(found).unflatten(1, (runs, -1))
        num_episodes = self.num_valid.new_full((runs,), batch)
        if self.mask is not None:
            num_episodes = self.mask.any(1).sum(1).to(num_episodes)
        return Moments.of_sums(sums.flatten(1), self._of_neurons(num_episodes))


def _episode_gradients(
    layer: Layer, feedback: Tensor, attention: Tensor, slots: Tensor, output: Tensor, inputs: Tensor
) -> Float[Tensor, "W B numbers"]:
    """Parameter gradients, summed over each episode, of some neurons.

    From feedback [T, W, N, B], the record of the forward pass, and what the neurons read, with a 1
    at the end for the bias [W, B, T, columns].
    """
    length, count, _, batch = feedback.shape
    rows = feedback.new_empty(length, count, layer.weight_h.shape[1], batch)
    row_gradients(rows, feedback, attention, slots, output)
    rows[:, :, : layer.num_slots] *= layer.scale
    gradients = torch.matmul(rows.permute(1, 3, 2, 0), inputs)
    gradients[:, :, : layer.num_slots, -1] = 0  # keys have no bias
    return gradients.flatten(2)


def _inputs(layer: Layer, states: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every neuron's inputs at some steps, [W, L, K] and [S, E, K].

    Args:
        layer: that reads them.
        states: before each of the steps [T, W, N, B].
        x: external inputs [S, T, B, E].
    """
    before = states.permute(1, 2, 0, 3).reshape(layer.num_neurons, -1)
    read = before.index_select(0, layer.sources.flatten())
    external = x.permute(0, 3, 1, 2).flatten(2)
    return read.view(layer.num_neurons, -1, external.shape[2]), external


def _predict(predictor: list[Tensor], read: Tensor, external: Tensor, attention: Tensor) -> Tensor:
    """Predictions s of every neuron at every step, [T, W, N, B]."""
    predictor_h, predictor_x, predictor_bias = predictor
    num_neurons, num_slots, size = predictor_bias.shape
    length, batch = len(attention), attention.shape[-1]
    guesses = torch.bmm(predictor_h, read)  # [W, M*N, K]
    guesses += predictor_bias.view(num_neurons, -1, 1)
    runs, rows = len(external), predictor_x.shape[1]
    of_external = torch.bmm(predictor_x.view(runs, -1, external.shape[1]), external)
    of_external = of_external.unflatten(1, (-1, rows))
    of_runs = guesses.view(runs, -1, rows, guesses.shape[2])
    of_runs[:, : of_external.shape[1]] += of_external
    guesses = guesses.view(num_neurons, num_slots, size, length, batch)
    weights = attention.permute(1, 2, 0, 3).unsqueeze(2)  # [W, M, 1, T, B]
    return (guesses * weights).sum(1).permute(2, 0, 1, 3).contiguous()


def _dealt_out(predictions: Tensor, order: Tensor) -> Tensor:
    """Predictions of all steps, dealt out anew among the samples, [T, W, N, B]."""
    length, *_, batch = predictions.shape
    by_sample = predictions.permute(0, 3, 1, 2).flatten(0, 1)[order]
    return by_sample.unflatten(0, (length, batch)).permute(0, 2, 3, 1).contiguous()


def _predictor_gradients(
    layer: Layer, grad_prediction: Tensor, attention: Tensor, read: Tensor, external: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the predictor's parameters from that of its prediction [T, W, N, B]."""
    weighted = attention.unsqueeze(3) * grad_prediction.unsqueeze(2)  # [T, W, M, N, B]
    rows = weighted.flatten(2, 3).permute(1, 2, 0, 3).reshape(len(read), -1, read.shape[2])
    grad_h = torch.bmm(rows, read.transpose(1, 2))
    grad_x = external_gradient(layer, rows, external)
    return grad_h, grad_x, rows.sum(-1).view(len(read), layer.num_slots, -1)
