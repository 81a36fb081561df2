"""SyntheticGradient: sgprop at any place of any PyTorch network.

    block = SyntheticGradient(64)
    network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), block, nn.Linear(64, 2))

Going forward it is the identity. Going back, each neuron of the activations x that pass through it
predicts the gradient it is about to receive, and passes on lambda * g + (1 - lambda) * s instead of
the received gradient g. The gradient of the predictor's regression is left in the `.grad` of the
block's parameters, so the optimizer that steps the network trains the predictor too;
`sgrl.nn.mixing.split_parameters` tells both kinds apart.

Source: the paper, Definition 1 and Section H.2.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sgrl.nn.mixing import gradient_moments, unit
from sgrl.nn.neuron import PerNeuron
from sgrl.nn.sgprop import MixGradient, SGPropSettings, mean_norms, mix


class SyntheticGradient(nn.Module):
    """Identity whose backward pass mixes predictions into the gradient.

    The activations are W neurons of N numbers each; N = 1 makes every feature a neuron with a
    mixing weight of its own. All other axes hold the K samples of a batch. Each neuron's
    prediction is linear in a context c, what it sees locally, which receives no gradient through
    it:

        s_j = predictor_weight_j c + predictor_bias_j

    By default c is the whole x; pass the neurons' inputs, or features of them, to have them predict
    from those. Predictors start at zero. They are used as they are when the backward pass comes,
    which is what two-phase updates need (`sgrl.nn.mixing.backward_phase`).

    Each call is mixed, and lambda updated, once in every backward pass that reaches it. Under
    `torch.no_grad` and in inference mode x comes back as it is.

    Args:
        num_neurons: W.
        neuron_size: N.
        context_size: C, length of the context given to `forward`; None: x is the context.
        sgprop: how it mixes; `SyntheticGradient.sgprop_defaults` if None.
        dtype: floating-point type of predictor and lambda.
        **settings: fields of `SGPropSettings`, in place of those of `sgprop`: mixing_weight,
            adaptive, mixing_rule, mixing_momentum, positive_projection, predictor_target.

    Shapes:
        predictor_weight [W, N, C], predictor_bias [W, N], mixing_weight [W] and mixing_memory
        [numbers its rule remembers, W] (buffers; persistent, the second unless empty).

    Raises:
        ValueError: a size or setting that is impossible.
        TypeError: a setting that there is not.
    """

    sgprop_defaults: ClassVar = SGPropSettings(predictor_target="received")
    #: Settings of `SGPropSettings` that mean nothing here.
    unused: ClassVar = (
        "propagation",
        "schedule_beta",
        "mask_predictions",
        "shuffle_predictions",
        "neuron_noise",
    )

    mixing_weight: Float[Tensor, " W"]
    mixing_memory: Float[Tensor, "rows W"]

    def __init__(
        self,
        num_neurons: int,
        neuron_size: int = 1,
        *,
        context_size: int | None = None,
        sgprop: SGPropSettings | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_neurons", num_neurons),
            ("neuron_size", neuron_size),
            ("context_size", context_size),
        ):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.sgprop = (sgprop or self.sgprop_defaults).changed(settings, self.unused)
        self.num_neurons = num_neurons
        self.neuron_size = neuron_size
        self.context_size = context_size
        self.rule = self.sgprop.make_rule()
        read = num_neurons * neuron_size if context_size is None else context_size
        shape = (num_neurons, neuron_size)
        self.predictor_weight = nn.Parameter(torch.zeros(*shape, read, dtype=dtype))
        self.predictor_bias = nn.Parameter(torch.zeros(shape, dtype=dtype))
        weights = torch.full((num_neurons,), float(self.sgprop.mixing_weight), dtype=dtype)
        self.register_buffer("mixing_weight", weights)
        memory = torch.zeros(len(self.rule.memory), num_neurons, dtype=dtype)
        self.register_buffer("mixing_memory", memory, persistent=bool(self.rule.memory))
        #: What the last backward pass measured, 0-dim tensors: predictor_loss (mean over samples,
        #: neurons and dimensions), and received_grad_norm, mixed_grad_norm, prediction_norm (mean
        #: length, per neuron and sample, of g, of the mixed gradient and of s).
        self.statistics: dict[str, Tensor] = {}

    @property
    def mixing_weights(self) -> list[PerNeuron]:
        """Lambda [W] of the block, alone in a list."""
        return [self.mixing_weight]

    def extra_repr(self) -> str:
        adaptive = self.rule.adaptive
        return f"{self.num_neurons}, {self.neuron_size}, {self.context_size}, {adaptive=}"

    def forward(
        self,
        x: Float[Tensor, " *S"],
        context: Float[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, " *S"]:
        """Return x.

        Args:
            x: activations [..., W*N] or [..., W, N].
            context: [..., C], seen by all neurons, or [..., W, C], each neuron's own; the leading
                axes are those of x.
            mask: bool, of the leading axes, True at valid samples; all if None. The others pass
                the received gradient on as it is, and teach predictor and lambda nothing.

        Raises:
            ValueError: x, context or mask of another shape, a mask that is not bool, a context but
                no `context_size`, or the reverse; or a mixing rule on episodes, but more than one
                axis of samples, so that it cannot be told which steps make an episode.
        """
        shape = (self.num_neurons, self.neuron_size)
        # In this order, since the [1, N] of a single neuron is a batch of one sample.
        if x.dim() and x.shape[-1] == self.num_neurons * self.neuron_size:
            leading = x.shape[:-1]
        elif x.shape[-2:] == shape:
            leading = x.shape[:-2]
        else:
            raise ValueError(
                f"x must be [..., {shape[0] * shape[1]}] or [..., {shape[0]}, {shape[1]}], "
                f"got {list(x.shape)}"
            )
        if self.rule.samples == "episodes" and len(leading) > 1:
            raise ValueError(
                f"mixing_rule {self.sgprop.mixing_rule!r} takes each row of x for an episode: "
                f"flatten its leading axes or take another rule, got {list(x.shape)}"
            )
        if context is not None and self.context_size is None:
            raise ValueError("a context needs a block with its context_size")
        if context is None and self.context_size is not None:
            raise ValueError(f"context_size is {self.context_size}, but no context was given")
        read = self.predictor_weight.shape[-1]
        seen = x.reshape(*leading, read) if context is None else context
        allowed = (*leading, read), (*leading, self.num_neurons, read)
        if seen.shape not in allowed:
            shared, own = map(list, allowed)
            raise ValueError(f"context must be {shared} or {own}, got {list(seen.shape)}")
        if mask is not None and (mask.shape != leading or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be bool {list(leading)}, got {mask.dtype} {list(mask.shape)}"
            )
        if not torch.is_grad_enabled():
            return x
        seen = seen.detach().reshape(-1, *seen.shape[len(leading) :])
        valid = None if mask is None else mask.flatten()
        predictor = self.predictor_weight, self.predictor_bias
        return MixGradient.apply(x, self._backward, (seen, valid), *predictor)

    def _backward(
        self,
        gradient: Float[Tensor, "..."],
        context: Float[Tensor, "K ..."],
        valid: Bool[Tensor, " K"] | None,
    ) -> tuple[Tensor | None, ...]:
        # Under automatic mixed precision the activations may be narrower than the predictor.
        dtype = self.mixing_weight.dtype
        received = gradient.reshape(-1, self.num_neurons, self.neuron_size).to(dtype)
        context = context.to(dtype)
        if valid is None:
            mixed, *regression = self._mix(received, context)
        else:
            mixed = received.clone()
            mixed[valid], *regression = self._mix(received[valid], context[valid])
        return mixed.reshape(gradient.shape).to(gradient.dtype), *regression

    def _mix(
        self, gradient: Float[Tensor, "K W N"], context: Float[Tensor, "K ..."]
    ) -> tuple[Float[Tensor, "K W N"], Float[Tensor, "W N C"] | None, Float[Tensor, "W N"] | None]:
        """Predict, mix and learn.

        Args:
            gradient: received [K, W, N].
            context: [K, C] or [K, W, C].

        Returns:
            (mixed gradient, gradients of the predictor's weights and biases).
        """
        if not len(gradient):
            return gradient, None, None
        rule, weight = self.rule, self.mixing_weight.unsqueeze(-1)
        axes = "kc" if context.dim() == 2 else "kwc"
        prediction = torch.einsum(f"{axes},wnc->kwn", context, self.predictor_weight)
        prediction += self.predictor_bias
        mixed, substitute, residual = mix(self.sgprop, weight, gradient, prediction)
        measured = mean_norms(gradient, mixed, prediction)
        regression: tuple[Tensor | None, Tensor | None] = None, None
        if rule.phase != "policy":
            measured["predictor_loss"] = residual.square().mean()
            residual *= 2 / residual.numel()
            regression = torch.einsum(f"kwn,{axes}->wnc", residual, context), residual.sum(0)
        self.statistics = {**self.statistics, **measured}
        if rule.updates:
            # Of the neurons' output: their parameters are out of sight.
            if rule.unit_gradients:
                gradient, substitute = unit(gradient), unit(substitute)
            rule.update(self, gradient_moments(gradient, substitute))
        return mixed, *regression
