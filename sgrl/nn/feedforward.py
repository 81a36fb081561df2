"""SparseMLP: feed-forward layers of slot neurons, used like an `nn.Sequential`.

    mlp = SparseMLP(input_size=784)
    output = mlp(x)                       # x [B, 784] -> output [B, W, N]

Each neuron of the first layer reads P * N random numbers of the input; each neuron of a later
layer reads P neurons of the layer below. Those layers are residual: h_l = tanh(neuron(h_{l-1})) +
h_{l-1}, or, with `residual=False`, plain: h_l = neuron(h_{l-1}). To all layers' h_l `neuron_noise`
adds noise, which then also passes on through the residual branches.

Under `propagation="sgprop"` the backward pass mixes each neuron's prediction of its incoming
gradient into the gradient it uses and passes on, returns the predictor's regression gradient as
the gradient of the predictor's parameters, and, if adaptive, updates the mixing weights. The
predictions are made in the backward pass, from the predictors as they are then: that is what the
two-phase update needs (`sgrl.nn.mixing.backward_phase`, `sgrl.reinforce.update`), which goes back
twice over one forward pass.

Backends: "eager" is the plain loop over layers below, the oracle for all others; "torch" is one
autograd function with a hand-written backward (`kernels/torch_stack.py`); "native" is compiled code
for the CPU (`kernels/native_stack.py`). "auto" takes the fastest that can run, and one that is
named and cannot run is an error, as in `recurrent.py`. None supports a second derivative.

Source: the paper, Sections 4, H.2 and H.3.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sgrl.nn.connectivity import random_connectivity
from sgrl.nn.kernels import native, native_stack, torch_stack
from sgrl.nn.kernels.backends import check_backend, choose_backend, resolve_backend
from sgrl.nn.kernels.plain import is_autocast_on, is_plain
from sgrl.nn.mixing import batch_moments
from sgrl.nn.neuron import Activation, PerNeuron, SlotNeurons, Stack, predictor_generator
from sgrl.nn.sgprop import MixGradient, Mixing, SGPropSettings, mean_norms, mix

#: Sizes of a network, beside that of its input.
SIZES = ("num_layers", "num_neurons", "neuron_size", "num_parents", "num_slots")


class SparseMLP(nn.Module):
    """Feed-forward SparseNet.

    Args:
        input_size: numbers in one input.
        num_layers: L.
        num_neurons: W, neurons of a layer.
        neuron_size: N, dimension of a neuron's state.
        num_parents: P, neurons each neuron reads; in the first layer P * N numbers of the input.
        num_slots: M, slots of a neuron.
        residual: whether all layers but the first are residual.
        sgprop: how it mixes; `SparseMLP.sgprop_defaults` if None.
        flatten: True gives output [B, W*N].
        backend: "auto", "eager", "torch" or "native".
        generator: source of connectivity and initial weights, a CPU generator; None draws from
            torch's global one.
        dtype: floating-point type of the parameters.
        **settings: fields of `SGPropSettings`, in place of those of `sgprop`. Those for recurrent
            networks are none of this one's: schedule_beta, positive_projection, mask_predictions.

    Raises:
        ValueError: a size or setting that is impossible, or `backend="native"` without a compiler
            or for other numbers than float32 and float64.
        TypeError: a setting that there is not.
    """

    sgprop_defaults: ClassVar = SGPropSettings(mixing_weight=0.9, predictor_target="received")
    #: Settings of `SGPropSettings` that mean nothing here.
    unused: ClassVar = ("schedule_beta", "positive_projection", "mask_predictions")

    pixels: Int64[Tensor, "W read"]
    parents: Int64[Tensor, "L W P"]
    layers: Sequence[SlotNeurons]

    def __init__(
        self,
        input_size: int,
        num_layers: int = 5,
        num_neurons: int = 200,
        neuron_size: int = 10,
        num_parents: int = 5,
        num_slots: int = 5,
        *,
        residual: bool = True,
        sgprop: SGPropSettings | None = None,
        flatten: bool = False,
        backend: str = "auto",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        sgprop = (sgprop or self.sgprop_defaults).changed(settings, self.unused)
        self.check_settings(
            input_size=input_size,
            num_layers=num_layers,
            num_neurons=num_neurons,
            neuron_size=neuron_size,
            num_parents=num_parents,
            num_slots=num_slots,
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
        self.residual = residual
        self.sgprop = sgprop
        self.flatten = flatten
        self.rule = sgprop.make_rule(eps=1e-6)
        read = num_parents * neuron_size
        self.register_buffer(
            "pixels", random_connectivity(num_neurons, input_size, read, generator)
        )
        parents = [
            random_connectivity(num_neurons, num_neurons, num_parents, generator)
            for _ in range(num_layers - 1)
        ]
        none = torch.empty(0, num_neurons, num_parents, dtype=torch.int64)
        self.register_buffer("parents", torch.stack(parents) if parents else none)
        of_predictors = predictor_generator(generator)
        self.layers = nn.ModuleList(  # type: ignore[assignment]  # not generic
            SlotNeurons(
                num_neurons,
                neuron_size,
                num_parents,
                num_slots,
                noise_std=sgprop.neuron_noise,
                predictor=sgprop.mixes,
                predictor_std=read**-0.5,
                mixing_weight=sgprop.mixing_weight,
                memory_rows=len(self.rule.memory) if sgprop.mixes else 0,
                generator=generator,
                predictor_generator=of_predictors,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.shuffle = sgprop.make_shuffle(generator)
        #: What the last backward pass measured, 0-dim tensors: predictor_loss (mean over samples,
        #: neurons and dimensions, summed over layers), and received_grad_norm, mixed_grad_norm,
        #: prediction_norm (mean length, per layer, neuron and sample, of g, of the mixed gradient
        #: and of s).
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
        if settings["num_layers"] > 1 and settings["num_parents"] > settings["num_neurons"]:
            raise ValueError(
                f"num_parents ({settings['num_parents']}) must be at most num_neurons "
                f"({settings['num_neurons']})"
            )
        read = settings["num_parents"] * settings["neuron_size"]
        if read > settings["input_size"]:
            raise ValueError(
                f"num_parents * neuron_size ({read}) must be at most input_size "
                f"({settings['input_size']}): neurons of the first layer read that many inputs"
            )
        check_backend(settings["backend"], settings["shuffle_predictions"])

    @property
    def mixing_weights(self) -> list[PerNeuron]:
        """Lambda [W] of each layer; an empty list under backprop."""
        return [n.mixing_weight for n in self.layers] if self.sgprop.mixes else []

    def extra_repr(self) -> str:
        return f"{self.input_size}, propagation={self.sgprop.propagation}, backend={self.backend}"

    def _obstacle(self, x: Tensor, backend: str) -> str | None:
        """Why a backend other than "eager" cannot run the layers on x; None where it can."""
        if not all(is_plain(neurons, SlotNeurons) for neurons in self.layers):
            return "the layers are no plain SlotNeurons (another class, or changed, or with hooks)"
        sizes = {(neurons.num_neurons, neurons.neuron_size) for neurons in self.layers}
        if sizes != {(self.num_neurons, self.neuron_size)}:
            return "the layers have other sizes than the network"
        if backend == "torch":
            return None
        if self.shuffle is not None:
            return "shuffle_predictions is for the backends torch and eager"
        if type(self).is_residual is not SparseMLP.is_residual:
            return f"{type(self).__name__} says for itself what is residual"
        read = self.pixels.shape[1]
        shapes = [neurons.parameter_shapes(read) for neurons in self.layers]
        return native.obstacle(x, zip(self.stack().layers, shapes, strict=True))

    def stack(self) -> Stack:
        """The layers as kernels take them."""
        sources = (self.pixels, *self.parents.unbind())
        layers = zip(self.layers, sources, strict=True)
        return Stack(
            [neurons.layer(read) for neurons, read in layers],
            [self.is_residual(index) for index in range(len(self.layers))],
        )

    def runs_on(self, x: Tensor) -> str:
        """The backend that runs the layers on x.

        Raises:
            ValueError: the one that was asked for by name cannot.
        """
        return choose_backend(self.backend, partial(self._obstacle, x))

    def is_residual(self, layer: int) -> bool:
        """Whether h_l = tanh(neuron output) + h_{l-1}; else h_l is the neuron output."""
        return self.residual and layer > 0

    def forward(
        self, x: Float[Tensor, "*B F"], noise: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """Run all layers: x [..., input_size] -> [..., W, N] (flattened: [..., W*N]).

        Args:
            x: inputs.
            noise: of noisy neurons, standard normal [..., L, W, N]: neuron_noise times these are
                added to the layers' states. Not used by others.

        Raises:
            ValueError: x or noise of another shape, or of no sample at all.
        """
        if is_autocast_on(x.device):
            # All backends compute in the parameters' precision.
            with torch.autocast(x.device.type, enabled=False):
                return SparseMLP.forward(self, x.to(self.layers[0].weight_h.dtype), noise)
        if x.dim() < 2 or x.shape[-1] != self.input_size or x.numel() == 0:
            raise ValueError(f"x must be [B, {self.input_size}], got {list(x.shape)}")
        flat = x.flatten(0, -2)
        shape = (len(self.layers), self.num_neurons, self.neuron_size)
        noise = self.sgprop.check_noise(noise, (len(flat), *shape), x)
        backend = self.runs_on(flat)
        if backend == "eager":
            output = eager_stack(self, flat, noise)
        else:
            kernel = native_stack if backend == "native" else torch_stack
            output = kernel.stack(self.stack(), Mixing.of(self), flat, noise)
        output = output.unflatten(0, x.shape[:-1])
        return output.flatten(-2) if self.flatten else output


def eager_stack(
    mlp: SparseMLP, x: Float[Tensor, "B F"], noise: Float[Tensor, "B L W N"] | None
) -> Float[Tensor, "B W N"]:
    """The layers as a plain loop: x [B, input_size] -> [B, W, N]."""
    record = _BackwardRecord(mlp)
    h = x
    for layer, neurons in enumerate(mlp.layers):
        inputs = x[:, mlp.pixels] if layer == 0 else neurons.read(h, mlp.parents[layer - 1], None)
        activation = neurons(inputs)
        output = activation.output
        h = torch.tanh(output) + h if mlp.is_residual(layer) else output
        if mlp.sgprop.mixes:
            record.activations.append(Activation(*(value.detach() for value in activation)))
            predictor = neurons.predictor_h, neurons.predictor_bias
            h = MixGradient.apply(h, partial(record.mix, layer), (), *predictor)
        if noise is not None:
            h = h + neurons.noise_std * noise[:, layer]
    return h


class _BackwardRecord:
    """What the mixing steps of one forward pass share, and what they saw going back."""

    def __init__(self, mlp: SparseMLP) -> None:
        self.mlp = mlp
        self.activations: list[Activation] = []
        self.sums: dict[str, Tensor] = {}

    def mix(self, layer: int, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Mix the gradient that a layer receives, [B, W, N].

        Returns:
            The mixed gradient, and the gradients of the predictor's weights and biases.
        """
        mlp, rule, neurons = self.mlp, self.mlp.rule, self.mlp.layers[layer]
        activation = self.activations[layer]
        if layer == len(mlp.layers) - 1:
            self.sums = {}
        with torch.enable_grad():
            prediction = neurons.predict(activation)
        synthetic = offered = prediction.detach()
        if mlp.shuffle is not None:
            valid = synthetic.new_ones(len(synthetic), dtype=torch.bool)
            offered = synthetic[mlp.shuffle.permutation(valid)]
        weight = neurons.mixing_weight.view(1, -1, 1)
        mixed, _, residual = mix(mlp.sgprop, weight, gradient, synthetic, offered)
        norms = mean_norms(gradient, mixed, synthetic)
        measured = {name: value * (1 / len(mlp.layers)) for name, value in norms.items()}
        regression: tuple[Tensor | None, ...] = None, None
        if rule.phase != "policy":
            measured["predictor_loss"] = residual.square().mean()
            regression = torch.autograd.grad(
                prediction,
                (neurons.predictor_h, neurons.predictor_bias),
                2 * residual / residual.numel(),
            )
        for name, value in measured.items():
            self.sums[name] = self.sums.get(name, 0) + value
        if rule.updates:
            slope: Tensor | float = 1.0
            if mlp.is_residual(layer):
                slope = 1 - torch.tanh(activation.output).square()
            moments = batch_moments(
                activation,
                gradient * slope,
                offered * slope,
                neurons.scale,
                rule.unit_gradients,
            )
            rule.update(neurons, moments)
        if layer == 0:
            mlp.statistics.update(self.sums)
        return mixed, *regression
