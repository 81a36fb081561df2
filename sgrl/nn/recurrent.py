"""SparseRNN: a sparse recurrent network of slot neurons, used like `torch.nn.GRU`.

    rnn = SparseRNN(input_size=128)
    output, h_n = rnn(x)                  # x [T, B, 128] -> output [T, B, W, N], h_n [B, W, N]
    output, h_n = rnn(x, h_0, mask)       # mask [T, B]: False where a sequence has ended
    output, h_n = rnn(x, noise=torch.randn(T, B, W, N))        # with neuron_noise above 0

Under `propagation="sgprop"` the backward pass of the layer mixes each neuron's prediction of its
incoming gradient into the gradient it uses and passes on through time, returns the predictor's
regression gradient as the gradient of the predictor's parameters (`split_parameters` tells them
apart: give them an optimizer or a parameter group of their own), and, if adaptive, updates the
mixing weight at its end. After a backward pass `statistics` holds what it measured.

Backends: "eager" is the plain loop over time below, the oracle for all others; "torch" runs the
whole unroll in one autograd function with a hand-written backward (`kernels/torch_unroll.py`);
"native" is compiled code for the CPU (`kernels/native_unroll.py`). "auto" takes the fastest that
can run: "torch" on a GPU or without a C++ compiler, "eager" where the neurons are not the plain
`SlotNeurons` that the others compute. A backend that is named and cannot run is an error. None
supports a second derivative. Under autocast all compute in the precision of the parameters.

Source: the paper, Sections 4, H.2 and H.4.
"""

from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sgrl.nn.connectivity import random_connectivity
from sgrl.nn.kernels import native, native_unroll, torch_unroll
from sgrl.nn.kernels.backends import check_backend, choose_backend, resolve_backend
from sgrl.nn.kernels.plain import is_autocast_on, is_plain
from sgrl.nn.mixing import batch_moments, episode_moments
from sgrl.nn.neuron import Activation, Layer, PerNeuron, SlotNeurons
from sgrl.nn.sgprop import MixGradient, Mixing, SGPropSettings, mix, temporal_schedule

#: Sizes of a layer, beside that of its input.
SIZES = ("num_neurons", "neuron_size", "num_parents", "num_slots", "num_input_neurons")


class SparseRNN(nn.Module):
    """Recurrent SparseNet layer: h_t = neuron([states of the parents at t-1, x_t]).

    Args:
        input_size: E, length of the input at each step.
        num_neurons: W.
        neuron_size: N, dimension of a neuron's state.
        num_parents: P, neurons each neuron reads, drawn at random once (may include itself).
        num_slots: M, slots of a neuron.
        num_input_neurons: the first so many neurons read x_t.
        sgprop: how it mixes; `SGPropSettings()` if None.
        flatten: True gives output [T, B, W*N] and h_n [B, W*N], and takes such an h_0.
        backend: "auto", "eager", "torch" or "native".
        generator: source of connectivity and initial weights, a CPU generator; None draws from
            torch's global one.
        dtype: floating-point type of the parameters.
        **settings: fields of `SGPropSettings`, in place of those of `sgprop`.

    Raises:
        ValueError: a size or setting that is impossible, or `backend="native"` without a compiler
            or for other numbers than float32 and float64.
        TypeError: a setting that there is not.
    """

    sgprop_defaults: ClassVar = SGPropSettings()

    parents: Int64[Tensor, "W P"]

    def __init__(
        self,
        input_size: int,
        num_neurons: int = 128,
        neuron_size: int = 6,
        num_parents: int = 6,
        num_slots: int = 6,
        num_input_neurons: int = 16,
        *,
        sgprop: SGPropSettings | None = None,
        flatten: bool = False,
        backend: str = "auto",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        sgprop = (sgprop or self.sgprop_defaults).changed(settings)
        self.check_settings(
            input_size=input_size,
            num_neurons=num_neurons,
            neuron_size=neuron_size,
            num_parents=num_parents,
            num_slots=num_slots,
            num_input_neurons=num_input_neurons,
            shuffle_predictions=sgprop.shuffle_predictions,
            backend=backend,
        )
        # Not kept: what "auto" stands for depends on what comes, too.
        of_numbers = torch.get_default_dtype() if dtype is None else dtype
        resolve_backend(backend, of_numbers, compiled=not sgprop.shuffle_predictions)
        self.backend = backend
        self.input_size = input_size
        self.num_neurons = num_neurons
        self.neuron_size = neuron_size
        self.sgprop = sgprop
        self.flatten = flatten
        self.rule = sgprop.make_rule()
        parents = random_connectivity(num_neurons, num_neurons, num_parents, generator)
        self.register_buffer("parents", parents)
        self.neurons = SlotNeurons(
            num_neurons,
            neuron_size,
            num_parents,
            num_slots,
            external_size=input_size,
            num_input_neurons=num_input_neurons,
            noise_std=sgprop.neuron_noise,
            predictor=sgprop.mixes,
            mixing_weight=sgprop.mixing_weight,
            memory_rows=len(self.rule.memory) if sgprop.mixes else 0,
            generator=generator,
            dtype=dtype,
        )
        self.shuffle = sgprop.make_shuffle(generator)
        #: What the last backward pass measured, 0-dim tensors: predictor_loss (mean over valid
        #: steps, neurons and dimensions), and received_grad_norm, mixed_grad_norm, prediction_norm
        #: (mean length, per neuron and valid step, of g, of the mixed gradient and of s).
        self.statistics: dict[str, Tensor] = {}

    @staticmethod
    def check_settings(**settings: Any) -> None:
        """Check arguments of the constructor.

        Raises:
            ValueError: one line that names the argument.
        """
        for name in ("input_size", *SIZES):
            if settings[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {settings[name]}")
        num_neurons = settings["num_neurons"]
        for name in ("num_parents", "num_input_neurons"):
            if settings[name] > num_neurons:
                raise ValueError(
                    f"{name} ({settings[name]}) must be at most num_neurons ({num_neurons})"
                )
        check_backend(settings["backend"], settings["shuffle_predictions"])

    def _obstacle(self, x: Tensor, backend: str) -> str | None:
        """Why a backend other than "eager" cannot unroll over x; None where it can."""
        neurons, sizes = self.neurons, (self.num_neurons, self.neuron_size, self.input_size)
        if not is_plain(neurons, SlotNeurons):
            return "the neurons are no plain SlotNeurons (another class, or changed, or with hooks)"
        if (neurons.num_neurons, neurons.neuron_size, neurons.external_size) != sizes:
            return "the neurons have other sizes than the layer"
        if backend == "torch":
            return None
        if self.shuffle is not None:
            return "shuffle_predictions is for the backends torch and eager"
        if type(self).schedule is not SparseRNN.schedule:
            return f"{type(self).__name__} has a schedule of its own"
        read = self.parents.shape[1] * self.neuron_size
        return native.obstacle(x, [(self.layer(), neurons.parameter_shapes(read))])

    def layer(self) -> Layer:
        """The neurons as kernels take them."""
        return self.neurons.layer(self.parents)

    def runs_on(self, x: Tensor) -> str:
        """The backend that unrolls over x.

        Raises:
            ValueError: the one that was asked for by name cannot.
        """
        return choose_backend(self.backend, partial(self._obstacle, x))

    @property
    def mixing_weights(self) -> list[PerNeuron]:
        """Lambda [W] of the layer, alone in a list; an empty list under backprop."""
        return [self.neurons.mixing_weight] if self.sgprop.mixes else []

    def extra_repr(self) -> str:
        return f"{self.input_size}, propagation={self.sgprop.propagation}, backend={self.backend}"

    def initial_state(self, batch_size: int) -> Float[Tensor, "{batch_size} ..."]:
        """Zero state [B, W, N] (flattened: [B, W*N])."""
        weight = self.neurons.weight_h
        state = weight.new_zeros(batch_size, self.num_neurons, self.neuron_size)
        return state.flatten(1) if self.flatten else state

    def schedule(self, length: int) -> Float[Tensor, "{length} W"]:
        """Lambda at every step: [T, W]; ones under backpropagation."""
        weights = self.neurons.mixing_weight
        if not self.sgprop.mixes:
            return torch.ones_like(weights).expand(length, -1)
        return temporal_schedule(weights, self.parents, length, self.sgprop.schedule_beta)

    def forward(
        self,
        x: Float[Tensor, "T B E"],
        h_0: Float[Tensor, "B ..."] | None = None,
        mask: Bool[Tensor, "T B"] | None = None,
        noise: Float[Tensor, "T B ..."] | None = None,
    ) -> tuple[Float[Tensor, "T B ..."], Float[Tensor, "B ..."]]:
        """Unroll over time.

        Args:
            x: inputs [T, B, E].
            h_0: state before the first step [B, W, N]; zeros if None.
            mask: bool [T, B], True at valid steps; all if None. It affects only the predictor's
                loss and the estimate of lambda (and, with `mask_predictions`, the mixture).
            noise: of noisy neurons, standard normal [T, B, W, N]: neuron_noise times these are
                added to what the neurons compute. Not used by others.

        Returns:
            (output [T, B, W, N], h_n [B, W, N] = output[-1]).

        Raises:
            ValueError: x, h_0, mask or noise of another shape, a mask that is not bool, no step or
                no sequence at all.
        """
        if is_autocast_on(x.device):
            # All backends compute in the parameters' precision.
            dtype = self.neurons.weight_h.dtype
            h_0 = None if h_0 is None else h_0.to(dtype)
            with torch.autocast(x.device.type, enabled=False):
                return SparseRNN.forward(self, x.to(dtype), h_0, mask, noise)
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x must be [T, B, {self.input_size}], got {list(x.shape)}")
        if 0 in x.shape[:2]:
            raise ValueError(f"x must hold at least one step of one sequence, got {list(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}"
            )
        state_shape = (x.shape[1], self.num_neurons, self.neuron_size)
        if h_0 is None:
            h_0 = x.new_zeros(state_shape)
        elif h_0.shape[0] != x.shape[1] or h_0[0].numel() != state_shape[1] * state_shape[2]:
            raise ValueError(f"h_0 must be {list(state_shape)}, got {list(h_0.shape)}")
        h_0 = h_0.reshape(state_shape)
        noise = self.sgprop.check_noise(noise, (len(x), *state_shape), x)
        backend, mixing = self.runs_on(x), Mixing.of(self)
        if backend == "eager":
            output = eager_unroll(self, x, h_0, mask, noise)
        elif backend == "native":
            output = native_unroll.unroll(self.layer(), mixing, x, h_0, mask, noise)
        else:
            given = self.layer(), mixing, self.schedule, x, h_0, mask
            output = torch_unroll.unroll(*given, noise=noise)
        if self.flatten:
            output = output.flatten(2)
        return output, output[-1]


def eager_unroll(
    rnn: SparseRNN,
    x: Float[Tensor, "T B E"],
    h_0: Float[Tensor, "B W N"],
    mask: Bool[Tensor, "T B"] | None,
    noise: Float[Tensor, "T B W N"] | None,
) -> Float[Tensor, "T B W N"]:
    """The unroll as a plain loop: x [T, B, E], h_0 [B, W, N], mask [T, B] -> [T, B, W, N]."""
    record = _BackwardRecord(rnn, len(x), x.shape[1], mask)
    h, outputs = h_0, []
    for t in range(len(x)):
        activation = rnn.neurons(rnn.neurons.read(h, rnn.parents, x[t]))
        h = activation.output
        if rnn.sgprop.mixes:
            prediction = rnn.neurons.predict(activation)
            record.activations.append(Activation(*(value.detach() for value in activation)))
            record.offered.append(prediction.detach())
            h = MixGradient.apply(h, partial(record.mix, t), (prediction,), prediction)
        if noise is not None:
            h = h + rnn.neurons.noise_std * noise[t]
        outputs.append(h)
    return torch.stack(outputs)


class _BackwardRecord:
    """What the mixing steps of one unroll share: the schedule, the mask, and what they saw."""

    def __init__(self, rnn: SparseRNN, length: int, batch_size: int, mask: Tensor | None) -> None:
        self.rnn = rnn
        self.length = length
        self.schedule = rnn.schedule(length)
        device = rnn.neurons.weight_h.device
        if mask is None:
            mask = torch.ones(length, batch_size, dtype=torch.bool, device=device)
        self.mask = mask
        self.activations: list[Activation] = []
        self.offered: list[Tensor] = []
        #: Of each step: received gradient, mixture, prediction, what was mixed in, and residual.
        self.steps: dict[int, tuple[Tensor, ...]] = {}

    def mix(self, t: int, gradient: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Received gradient and prediction of step t, both [B, W, N] -> (mixed, residual)."""
        if t == self.length - 1 and self.rnn.shuffle is not None:
            every = torch.stack(self.offered)
            order = self.rnn.shuffle.permutation(self.mask)
            self.offered = list(every.flatten(0, 1)[order].view_as(every))
        weight, valid = self.schedule[t].view(1, -1, 1), self.mask[t].view(-1, 1, 1)
        mixed, substitute, residual = mix(
            self.rnn.sgprop, weight, gradient, prediction, self.offered[t], valid
        )
        self.steps[t] = gradient, mixed, prediction, substitute, residual
        if t == 0:
            self.finish()
        return mixed, 2 * residual / self.count

    @property
    def count(self) -> Tensor:
        """Number of terms in the predictor's loss: valid steps x neurons x dimensions."""
        neurons = self.rnn.neurons
        return self.mask.sum().clamp(min=1) * neurons.num_neurons * neurons.neuron_size

    def finish(self) -> None:
        """Statistics, and the update of lambda from all valid steps, after the last mixture."""
        rnn, valid = self.rnn, self.mask
        every_step = zip(*(self.steps[t] for t in range(self.length)), strict=True)
        gradient, mixed, prediction, substitute, residual = map(torch.stack, every_step)

        def mean_norm(vectors: Tensor) -> Tensor:
            return vectors.norm(dim=-1).sum() / max(vectors[..., 0].numel(), 1)

        rnn.statistics = {
            "predictor_loss": residual[valid].square().sum() / self.count,
            "received_grad_norm": mean_norm(gradient[valid]),
            "mixed_grad_norm": mean_norm(mixed[valid]),
            "prediction_norm": mean_norm(prediction[valid]),
        }
        if not rnn.rule.updates:
            return
        every = Activation(*(torch.stack(values) for values in zip(*self.activations, strict=True)))
        scale, unit_gradients = rnn.neurons.scale, rnn.rule.unit_gradients
        if rnn.rule.samples == "episodes":
            given = every, gradient, substitute, valid
            moments = episode_moments(*given, scale, unit_gradients)
        else:
            activation = Activation(*(values[valid] for values in every))
            of_valid = activation, gradient[valid], substitute[valid]
            moments = batch_moments(*of_valid, scale, unit_gradients)
        rnn.rule.update(rnn.neurons, moments)
