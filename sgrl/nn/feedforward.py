"""SparseMLP: feed-forward layers of slot neurons, used like an `nn.Sequential`.

    mlp = SparseMLP(input_size=784)
    output = mlp(x)                       # x [B, 784] -> output [B, W, N]

Each neuron of the first layer reads P * N random numbers of the input; each neuron of a later
layer reads P neurons of the layer below. Those layers are residual: h_l = tanh(neuron(h_{l-1})) +
h_{l-1}, or, with `residual=False`, plain: h_l = neuron(h_{l-1}).

Under `propagation="sgprop"` the backward pass mixes each neuron's prediction of its incoming
gradient into the gradient it uses and passes on, returns the predictor's regression gradient as
the gradient of the predictor's parameters, and, if adaptive, updates the mixing weights. The
predictions are made in the backward pass, from the predictors as they are then: that is what the
two-phase update needs (`sgrl.nn.mixing.backward_phase`, `sgrl.reinforce.update`), which goes back
twice over one forward pass.

Backends: "eager" is the plain loop over layers below, the oracle for all others; "torch" is one
autograd function with a hand-written backward (`kernels/stack.py`); "native" is compiled code for
the CPU (`kernels/native.py`). "auto" takes the fastest that can run, and one that is named and
cannot run is an error, as in `recurrent.py`. None supports a second derivative.

Source: the paper, Sections 4, H.2 and H.3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sgrl.nn.connectivity import random_connectivity
from sgrl.nn.kernels import native
from sgrl.nn.kernels.backends import check_backend, choose_backend, resolve_backend
from sgrl.nn.kernels.plain import is_autocast_on, is_plain
from sgrl.nn.kernels.stack import stack
from sgrl.nn.mixing import SampleShuffle, batch_moments, check_mixing, norm
from sgrl.nn.mixing_rules import mixing_rule as rule_of_name
from sgrl.nn.neuron import Activation, SlotNeurons, predictor_generator

_SIZES = ("input_size", "num_layers", "num_neurons", "neuron_size", "num_parents", "num_slots")


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
        propagation: "backprop", or "sgprop" for synthetic-gradient propagation.
        mixing_weight: initial lambda, in [0, 1].
        adaptive: whether lambda follows its estimate from each batch.
        mixing_rule: how it follows, a key of `mixing_rules.MIXING_RULES`.
        mixing_momentum: weight of the past in that update.
        predictor_target: gradient the predictor regresses on, "received" or "mixed".
        shuffle_predictions: True mixes into each sample the prediction of another one of the batch,
            drawn at random (`mixing.SampleShuffle`); the predictors learn as ever. A control: with
            it, whatever is gained is not due to prediction. Not in the backend "native".
        flatten: True gives output [B, W*N].
        backend: "auto", "eager", "torch" or "native".
        generator: source of connectivity and initial weights, a CPU generator; None draws from
            torch's global one.

    Raises:
        ValueError: a size or setting that is impossible, or `backend="native"` without a compiler
            or for other numbers than float32 and float64.
    """

    pixels: Tensor
    parents: Tensor

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
        propagation: Literal["backprop", "sgprop"] = "sgprop",
        mixing_weight: float = 0.9,
        adaptive: bool = True,
        mixing_rule: str = "published",
        mixing_momentum: float = 0.9,
        predictor_target: Literal["received", "mixed"] = "received",
        shuffle_predictions: bool = False,
        flatten: bool = False,
        backend: str = "auto",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.check_settings(
            input_size=input_size,
            num_layers=num_layers,
            num_neurons=num_neurons,
            neuron_size=neuron_size,
            num_parents=num_parents,
            num_slots=num_slots,
            propagation=propagation,
            mixing_weight=mixing_weight,
            mixing_rule=mixing_rule,
            mixing_momentum=mixing_momentum,
            predictor_target=predictor_target,
            shuffle_predictions=shuffle_predictions,
            backend=backend,
        )
        # Not kept: what "auto" stands for depends on what comes, too.
        of_numbers = torch.get_default_dtype() if dtype is None else dtype
        resolve_backend(backend, of_numbers, compiled=not shuffle_predictions)
        self.backend = backend
        self.input_size = input_size
        self.num_neurons = num_neurons
        self.neuron_size = neuron_size
        self.residual = residual
        self.propagation = propagation
        self.flatten = flatten
        self.rule = rule_of_name(mixing_rule)(
            adaptive=adaptive,
            momentum=mixing_momentum,
            eps=1e-6,
            predictor_target=predictor_target,
        )
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
        self.layers = nn.ModuleList(
            SlotNeurons(
                num_neurons,
                neuron_size,
                num_parents,
                num_slots,
                predictor=propagation == "sgprop",
                predictor_std=read**-0.5,
                mixing_weight=mixing_weight,
                memory_rows=len(self.rule.memory) if propagation == "sgprop" else 0,
                generator=generator,
                predictor_generator=of_predictors,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.shuffle = (
            SampleShuffle(generator) if shuffle_predictions and propagation == "sgprop" else None
        )
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
        for name in _SIZES:
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
        check_mixing(settings)
        rule_of_name(settings["mixing_rule"])
        check_backend(settings["backend"])

    @property
    def mixing_weights(self) -> list[Tensor]:
        """Lambda [W] of each layer; an empty list under backprop."""
        return [n.mixing_weight for n in self.layers] if self.propagation == "sgprop" else []

    def extra_repr(self) -> str:
        return f"{self.input_size}, propagation={self.propagation}, backend={self.backend}"

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
        sources = (self.pixels, *self.parents.unbind())
        return native.obstacle(
            x, [(*pair, read) for pair in zip(self.layers, sources, strict=True)]
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

    def forward(self, x: Tensor, done: native.StackForward | None = None) -> Tensor:
        """Run all layers: x [..., input_size] -> [..., W, N] (flattened: [..., W*N]).

        Args:
            x: the input.
            done: a forward pass on the same x with the same parameters, which is then not run
                again. The caller sees to "same".

        Raises:
            ValueError: x of another shape, or of no sample at all.
        """
        if is_autocast_on(x.device):
            # All backends compute in the parameters' precision.
            with torch.autocast(x.device.type, enabled=False):
                return SparseMLP.forward(self, x.to(self.layers[0].weight_h.dtype))
        if x.dim() < 2 or x.shape[-1] != self.input_size or x.numel() == 0:
            raise ValueError(f"x must be [B, {self.input_size}], got {list(x.shape)}")
        flat = x.flatten(0, -2)
        if done is not None:
            output = native.stack(self, flat, done)
        else:
            output = STACKS[self.runs_on(flat)](self, flat)
        output = output.unflatten(0, x.shape[:-1])
        return output.flatten(-2) if self.flatten else output


def eager_stack(mlp: SparseMLP, x: Tensor) -> Tensor:
    """The layers as a plain loop: x [B, input_size] -> [B, W, N]."""
    record = _BackwardRecord(mlp)
    h = x
    for layer, neurons in enumerate(mlp.layers):
        inputs = x[:, mlp.pixels] if layer == 0 else neurons.read(h, mlp.parents[layer - 1], None)
        activation = neurons(inputs)
        output = activation.output
        h = torch.tanh(output) + h if mlp.is_residual(layer) else output
        if mlp.propagation == "sgprop":
            record.activations.append(Activation(*(value.detach() for value in activation)))
            h = _MixPrediction.apply(h, layer, record, neurons.predictor_h, neurons.predictor_bias)
    return h


STACKS: dict[str, Callable[..., Tensor]] = {
    "eager": eager_stack,
    "torch": stack,
    "native": native.stack,
}


class _BackwardRecord:
    """What the mixing steps of one forward pass share, and what they saw going back."""

    def __init__(self, mlp: SparseMLP) -> None:
        self.mlp = mlp
        self.activations: list[Activation] = []
        self.sums: dict[str, Tensor] = {}

    def mix(self, layer: int, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Received gradient of a layer [B, W, N] -> (mixed, gradients of the predictor's
        weights and biases)."""
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
        mixed = weight * gradient + (1 - weight) * offered
        share = 1 / len(mlp.layers)
        measured = {
            "received_grad_norm": norm(gradient).mean() * share,
            "mixed_grad_norm": norm(mixed).mean() * share,
            "prediction_norm": norm(synthetic).mean() * share,
        }
        regression: tuple[Tensor | None, Tensor | None] = None, None
        if rule.phase != "policy":
            target = mixed if rule.predictor_target == "mixed" else gradient
            residual = synthetic - target
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
            mlp.statistics = {**mlp.statistics, **self.sums}
        return mixed, *regression


class _MixPrediction(torch.autograd.Function):
    """Identity going forward; going back, mixes the prediction into the gradient of the state.

    The gradient it returns for the predictor's parameters is that of the predictor's loss.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, layer: int, record: _BackwardRecord, *predictor: Tensor
    ) -> Tensor:
        ctx.layer, ctx.record = layer, record
        return h.view_as(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        mixed, *regression = ctx.record.mix(ctx.layer, gradient)
        return mixed, None, None, *regression
