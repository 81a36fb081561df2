"""Synthetic-gradient propagation: what a neuron does with the gradient it receives.

A neuron that receives the gradient g and predicts s uses and passes on
lambda * g + (1 - lambda) * s. Lambda = 1 everywhere is exactly backpropagation.

Here are the settings of all layers that do so (`SGPropSettings`), the mixture itself (`mixture`,
and with all that the settings add, `mix`), the autograd function that puts it into a backward pass
(`MixGradient`), and lambda's schedule over time (`temporal_schedule`). How lambda is estimated and
learned is in `mixing.py`.

Source: the paper, Definition 1 and Sections 4, H.2 to H.4.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from sgrl.nn.connectivity import edge_table, sum_over_children
from sgrl.nn.mixing import MIN_NORM, MixingRule, norm
from sgrl.nn.mixing_rules import mixing_rule
from sgrl.nn.neuron import predictor_generator

#: Mean norms that a backward pass measures: of the received gradients, the mixture of them and the
#: predictions, and the predictions.
NORMS = ("received_grad_norm", "mixed_grad_norm", "prediction_norm")


@dataclass(frozen=True)
class SGPropSettings:
    """Settings of synthetic-gradient propagation, taken by every layer that mixes.

    Attributes:
        propagation: "sgprop", or "backprop" for plain backpropagation without predictors.
        mixing_weight: initial lambda of every neuron, in [0, 1].
        adaptive: whether lambda follows its estimate from each batch.
        mixing_rule: how it follows, a key of `mixing_rules.MIXING_RULES`.
        mixing_momentum: weight of the past in that update, in [0, 1].
        schedule_beta: step of lambda's schedule over time, in [0, 1]; see `temporal_schedule`.
        positive_projection: mix the projection max(<g, s>, 0) s / |s|^2 instead of s.
        predictor_target: gradient the predictor regresses on, "mixed" or "received".
        mask_predictions: pass the received gradient on unmixed at masked steps. The published
            method mixes there too.
        shuffle_predictions: mix into each sample the prediction of another one of the batch, drawn
            at random (`SampleShuffle`); the predictors learn as ever. A control: what is gained
            with it is not due to prediction. Not in the backend "native".
        neuron_noise: standard deviation of the Gaussian noise in every number that a neuron puts
            out at each step, whatever the propagation (paper, condition A.2). Gradients go back
            through it as they are. 0 is none. With REINFORCE only, and not in packs.

    Raises:
        ValueError: a value that is impossible; one line that names the setting.
    """

    propagation: Literal["sgprop", "backprop"] = "sgprop"
    mixing_weight: float = 1.0
    adaptive: bool = True
    mixing_rule: str = "published"
    mixing_momentum: float = 0.9
    schedule_beta: float = 0.1
    positive_projection: bool = False
    predictor_target: Literal["mixed", "received"] = "mixed"
    mask_predictions: bool = False
    shuffle_predictions: bool = False
    neuron_noise: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("propagation", ("backprop", "sgprop")),
            ("predictor_target", ("mixed", "received")),
        ):
            if getattr(self, name) not in choices:
                known = " or ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name} must be {known}, got {getattr(self, name)!r}")
        for name in ("mixing_weight", "mixing_momentum", "schedule_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.neuron_noise < math.inf:
            raise ValueError(f"neuron_noise must be at least 0, got {self.neuron_noise}")
        mixing_rule(self.mixing_rule)

    @property
    def mixes(self) -> bool:
        """Whether predictions are mixed in at all."""
        return self.propagation == "sgprop"

    def make_rule(self, eps: float = 1e-12) -> MixingRule:
        """The rule by which lambda follows; `eps` as in `MixingRule`."""
        kind = mixing_rule(self.mixing_rule)
        return kind(adaptive=self.adaptive, momentum=self.mixing_momentum, eps=eps)

    def make_shuffle(self, generator: torch.Generator | None) -> "SampleShuffle | None":
        """The permutations that `shuffle_predictions` asks for; None where it does not."""
        return SampleShuffle(generator) if self.shuffle_predictions and self.mixes else None

    def check_noise(
        self, noise: Tensor | None, shape: tuple[int, ...], x: Tensor
    ) -> Float[Tensor, "..."] | None:
        """The noise as a layer takes it, of this shape; None where its neurons have none.

        Args:
            noise: standard normal numbers, as many.
            shape: of all the layer's outputs.
            x: its input, for device and type of numbers.

        Raises:
            ValueError: there is none though the neurons are noisy, or not as much.
        """
        if not self.neuron_noise:
            return None
        if noise is None or noise.numel() != math.prod(shape):
            got = "none" if noise is None else list(noise.shape)
            raise ValueError(
                f"neuron_noise is {self.neuron_noise}: give noise {list(shape)}, standard normal "
                f"numbers; got {got}"
            )
        return noise.reshape(shape).to(x)

    def changed(self, settings: dict[str, Any], unused: Sequence[str] = ()) -> Self:
        """These settings with some replaced.

        Args:
            settings: values by name.
            unused: names that mean nothing to the layer.

        Raises:
            TypeError: a name that is no setting of the layer.
            ValueError: an impossible value, or an unused setting that is not at its default.
        """
        known = {field.name: field.default for field in fields(SGPropSettings)}
        for name in settings:
            if name not in known or name in unused:
                raise TypeError(f"unexpected keyword argument {name!r}")
        for name in unused:
            if getattr(self, name) != known[name]:
                raise ValueError(f"{name} does nothing in this layer: leave it at {known[name]!r}")
        return replace(self, **settings) if settings else self


def mixture(
    weight: Float[Tensor, "..."], gradient: Float[Tensor, " *S"], substitute: Float[Tensor, "..."]
) -> Float[Tensor, " *S"]:
    """Definition 1: lambda * g + (1 - lambda) * s, all of shapes that broadcast."""
    return weight * gradient + (1 - weight) * substitute


class Mixed(NamedTuple):
    """What became of a received gradient, all of its shape."""

    gradient: Float[Tensor, "..."]  # the mixture, which the neurons use and pass on
    substitute: Float[Tensor, "..."]  # what was mixed in
    residual: Float[Tensor, "..."]  # the prediction less its target; 0 where not valid


def mix(
    settings: SGPropSettings,
    weight: Float[Tensor, "..."],
    gradient: Float[Tensor, "*S N"],
    prediction: Float[Tensor, "*S N"],
    offered: Float[Tensor, "*S N"] | None = None,
    valid: Bool[Tensor, "..."] | None = None,
) -> Mixed:
    """Mix predictions into received gradients.

    Args:
        settings: of the layer.
        weight: lambda, broadcast against the others.
        gradient: received g [..., N].
        prediction: s [..., N].
        offered: prediction to be mixed in, where it is not the sample's own.
        valid: bool, broadcast against the others, True at valid samples; all if None.
    """
    substitute = prediction if offered is None else offered
    if settings.positive_projection:
        substitute = positive_projection(gradient, substitute)
    mixed = mixture(weight, gradient, substitute)
    if settings.mask_predictions and valid is not None:
        mixed = torch.where(valid, mixed, gradient)
        substitute = torch.where(valid, substitute, gradient)
    residual = prediction - (mixed if settings.predictor_target == "mixed" else gradient)
    if valid is not None:
        residual = torch.where(valid, residual, 0.0)
    return Mixed(mixed, substitute, residual)


class MixGradient(torch.autograd.Function):
    """Identity going forward; going back, a function says what the gradient becomes.

    `MixGradient.apply(x, mix, saved, *predictor)` returns x. Going back, `mix(gradient, *saved)`
    returns the gradient of x and those of `predictor`, which are the predictor's loss's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mix: Callable[..., tuple[Tensor | None, ...]],
        saved: Sequence[Tensor | None],
        *predictor: Tensor,
    ) -> Tensor:
        ctx.mix = mix
        # Not held by `mix`: autograd notices where saved tensors are changed in place.
        ctx.save_for_backward(*saved)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        mixed, *of_predictor = ctx.mix(gradient, *ctx.saved_tensors)
        return mixed, None, None, *of_predictor


def positive_projection(
    gradient: Float[Tensor, " *S"], prediction: Float[Tensor, " *S"], dim: int = -1
) -> Float[Tensor, " *S"]:
    """max(<g, s>, 0) s / max(|s|^2, 1e-12), vectors along `dim` (paper, Section H.4)."""
    along = (gradient * prediction).sum(dim, keepdim=True).clamp(min=0)
    return along * prediction / prediction.square().sum(dim, keepdim=True).clamp(min=MIN_NORM)


def mean_norms(
    gradient: Float[Tensor, " *S"],
    mixed: Float[Tensor, " *S"],
    prediction: Float[Tensor, " *S"],
) -> dict[str, Float[Tensor, ""]]:
    """Mean norms of vectors along the last axis, under the names of the metrics columns."""
    vectors = (gradient, mixed, prediction)
    return {name: norm(v).mean() for name, v in zip(NORMS, vectors, strict=True)}


class SampleShuffle(nn.Module):
    """Permutations of a batch's samples: the placebo of `shuffle_predictions`.

    Predictions that are dealt out anew among the samples keep their lengths and their mean and lose
    what they say about the sample that they are mixed into. What a network gains by them is not due
    to prediction.

    Attributes:
        drawn: int64 [2], the seed and the number of permutations drawn so far; saved with the
            layer, so that a restored one draws on.
    """

    drawn: Int64[Tensor, " 2"]

    #: Apart from the streams of the predictors' initial weights, which are numbered from 0.
    STREAM = 1000

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        # Not from `generator` itself: with and without the placebo a network starts the same.
        own = predictor_generator(generator, self.STREAM)
        seed = torch.randint(2**31, (), generator=own)
        self.register_buffer("drawn", torch.stack([seed, torch.zeros_like(seed)]))

    def permutation(self, valid: Bool[Tensor, "..."]) -> Int64[Tensor, " K"]:
        """Draw the next permutation.

        Args:
            valid: bool, any shape of K elements; valid samples change places among themselves, and
                so do the others.

        Returns:
            Indices into the flattened samples, int64 [K]: place k takes the prediction of sample
            `permutation[k]`.
        """
        # Hashed: torch's generator sees only 32 bits of its seed.
        mixed = np.random.SeedSequence(self.drawn.tolist()).generate_state(1)
        self.drawn[1] += 1
        generator = torch.Generator().manual_seed(int(mixed[0]))
        flat = valid.flatten().cpu()
        order = torch.empty(len(flat), dtype=torch.int64)
        for kind in (flat, ~flat):
            places = kind.nonzero().squeeze(1)
            order[places] = places[torch.randperm(len(places), generator=generator)]
        return order.to(valid.device)


def temporal_schedule(
    mixing_weight: Float[Tensor, " W"],
    parents: Int64[Tensor, "W P"],
    length: int,
    beta: float | Float[Tensor, " W"],
    edges: Int64[Tensor, "W C"] | None = None,
) -> Float[Tensor, "{length} W"]:
    """Lambda of every neuron at every step of a sequence.

    lambda_T = lambda; going back in time, lambda_t[j] = min(1, lambda_{t+1}[j] + beta * mean over
    j's child edges of (1 - lambda_{t+1}[child])), the mean being 0 where j has no children.

    Args:
        mixing_weight: lambda [W].
        parents: [W, P].
        length: T.
        beta: step of the schedule, >= 0; may differ between neurons.
        edges: as of `connectivity.sum_over_children`.

    Returns:
        [T, W]; the last row is `mixing_weight`.

    Source: the paper, Section H.4.
    """
    schedule = mixing_weight.repeat(length, 1)
    if not isinstance(beta, Tensor) and beta == 0:
        return schedule
    count = len(mixing_weight)
    if edges is None and mixing_weight.is_cuda:
        edges = edge_table(parents, count)
    if edges is None:
        num_edges = torch.bincount(parents.flatten(), minlength=count).clamp(min=1)
    else:
        num_edges = (edges < parents.numel()).sum(1).clamp(min=1)
    for t in range(length - 2, -1, -1):
        distrust = (1 - schedule[t + 1]).repeat_interleave(parents.shape[1])
        total = sum_over_children(distrust, parents, count, edges)
        schedule[t] = (schedule[t + 1] + beta * total / num_edges).clamp(max=1)
    return schedule


class Mixing(NamedTuple):
    """How a network mixes, as kernels take it."""

    settings: SGPropSettings
    rule: MixingRule
    permutation: Callable[[Tensor], Tensor] | None  # of samples, under `shuffle_predictions`
    statistics: dict[str, Tensor]  # what a backward pass measures, written into it

    @classmethod
    def of(cls, network: Any) -> Self:
        """That of a network which has these as `sgprop`, `rule`, `shuffle` and `statistics`."""
        permutation = None if network.shuffle is None else network.shuffle.permutation
        return cls(network.sgprop, network.rule, permutation, network.statistics)
