"""Mixing weights: how much of the received gradient a neuron uses and passes on.

A neuron that receives the gradient g and predicts s uses and passes on
lambda * g + (1 - lambda) * s. Lambda = 1 everywhere is exactly backpropagation.

Here are the mixture, its schedule over time in BPTT (`temporal_schedule`), the estimate of the
best lambda from one batch (`estimate_mixing_weight`), and the published rule by which lambda
follows it (`MixingRule`); the others are in `mixing_rules.py`. Source: the paper, Sections 4 and
H.2.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sgrl.nn.connectivity import child_counts
from sgrl.nn.neuron import Activation, predictor_generator

#: Norms below this count as this where a vector is divided by its norm.
MIN_NORM = 1e-12


class Moments(NamedTuple):
    """What lambda is estimated from: means over the B samples of a batch, per neuron.

    With w the parameter gradient from the received gradient, s that from the prediction and
    u = s - w.
    """

    mean_u_square: Tensor  # mean of |u|^2 [W]
    mean_wu: Tensor  # mean of <w, u> [W]
    square_mean_u: Tensor  # |mean u|^2 [W]
    mean_w_mean_u: Tensor  # <mean w, mean u> [W]
    num_samples: int  # B


@dataclass
class MixingRule:
    """How a layer mixes predictions into its gradients, and how lambda follows: as published.

    The other rules are its subclasses (`mixing_rules.py`). A rule says what lambda becomes after a
    batch (`next_weight`), of which gradients it wants the moments (`unit_gradients`), and what it
    remembers between batches (`memory`).

    Attributes:
        unit_gradients: whether each sample's received gradient and prediction are brought to
            length 1 before the moments are taken.
        memory: names of what the rule remembers, one number per neuron each; the rows of
            the layer's `mixing_memory`.
        adaptive: lambda follows the estimate from each batch; otherwise it stays as it is.
        update_enabled: switch of the adaptive update, for a backward pass that must leave
            lambda alone (the predictor step of the two-phase update).
        momentum: m, weight of the past: lambda <- m * lambda + (1 - m) * estimate.
        eps: the estimate is used only where its denominator exceeds this. Made for vectors of
            length 1: without them 0 serves (the denominator is at least mean |u|^2 / B).
        positive_projection: mix max(<g, s>, 0) s / |s|^2 instead of s.
        predictor_target: what the predictor regresses on: the "mixed" gradient or the "received".
        phase: what a backward pass is for (see `backward_phase`).
    """

    unit_gradients: ClassVar[bool] = True
    memory: ClassVar[tuple[str, ...]] = ()

    adaptive: bool = True
    update_enabled: bool = True
    momentum: float = 0.9
    eps: float = 1e-12
    positive_projection: bool = False
    predictor_target: Literal["mixed", "received"] = "mixed"
    phase: Literal["joint", "predictor", "policy"] = "joint"

    @property
    def updates(self) -> bool:
        """Whether a backward pass changes lambda."""
        return self.adaptive and self.update_enabled and self.phase != "predictor"

    @property
    def least_denominator(self) -> float:
        """What the estimate's denominator must exceed."""
        return self.eps if self.unit_gradients else 0.0

    def update(self, neurons: nn.Module, moments: Moments) -> None:
        """Move the layer's lambda, after a backward pass that has mixed with the old one.

        `neurons` holds `mixing_weight` and `mixing_memory`, as `SlotNeurons` and
        `SyntheticGradient` do.
        """
        precision = moments.mean_u_square.dtype  # not always that of the layer
        memory = neurons.mixing_memory.to(precision, copy=True)
        weight = self.next_weight(moments, neurons.mixing_weight.to(precision), memory)
        neurons.mixing_memory.copy_(memory)
        neurons.mixing_weight.copy_(weight)

    def next_weight(self, moments: Moments, previous: Tensor, memory: Tensor) -> Tensor:
        """Lambda after a batch.

        Args:
            moments: of the batch.
            previous: lambda before it [W].
            memory: [rows named in the class's `memory`, W], zeros at first; changed in place.

        Returns:
            [W], in [0, 1].
        """
        estimate = optimal_mixing_weight(*moments, previous, self.least_denominator)
        return self.momentum * previous + (1 - self.momentum) * estimate


def mixing_modules(network: nn.Module) -> list[nn.Module]:
    """All modules inside that mix predictions into gradients, in the order of `modules()`.

    Such a module holds a `MixingRule` as `rule`, and for the metrics what its last backward pass
    measured as `statistics`, and as `mixing_weights` the lambdas [W] of each of its layers (none
    where it does not mix, as under backprop).
    """
    return [m for m in network.modules() if isinstance(getattr(m, "rule", None), MixingRule)]


@contextmanager
def backward_phase(module: nn.Module, phase: Literal["predictor", "policy"]) -> Iterator[None]:
    """Backward passes inside serve one half of the two-phase update (paper, Section H.3).

    "predictor": only the predictors' gradients are made, and lambda is left alone; "policy": all
    others are made, and lambda is updated. Outside, one backward pass does both ("joint").

    Args:
        module: all layers inside it that mix predictions are concerned.
        phase: of the two.
    """
    rules = [m.rule for m in mixing_modules(module)]
    try:
        for rule in rules:
            rule.phase = phase
        yield
    finally:
        for rule in rules:
            rule.phase = "joint"


class SampleShuffle(nn.Module):
    """Permutations of a batch's samples: the placebo of `shuffle_predictions`.

    Predictions that are dealt out anew among the samples keep their lengths and their mean and lose
    what they say about the sample that they are mixed into. What a network gains by them is not due
    to prediction.

    Attributes:
        drawn: int64 [2], the seed and the number of permutations drawn so far; saved with the
            layer, so that a restored one draws on.
    """

    drawn: Tensor

    #: Apart from the streams of the predictors' initial weights, which are numbered from 0.
    STREAM = 1000

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        # Not from `generator` itself: with and without the placebo a network starts the same.
        own = predictor_generator(generator, self.STREAM)
        seed = torch.randint(2**31, (), generator=own)
        self.register_buffer("drawn", torch.stack([seed, torch.zeros_like(seed)]))

    def permutation(self, valid: Tensor) -> Tensor:
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


def check_mixing(settings: Mapping[str, Any]) -> None:
    """Check the settings that a layer passes on to its rule.

    Raises:
        ValueError: one line that names the setting.
    """
    for name, choices in (
        ("propagation", ("backprop", "sgprop")),
        ("predictor_target", ("mixed", "received")),
    ):
        if settings[name] not in choices:
            known = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name} must be {known}, got {settings[name]!r}")
    if settings.get("shuffle_predictions") and settings["backend"] == "native":
        raise ValueError(
            "shuffle_predictions is for the backends torch and eager: leave backend at auto"
        )
    for name in ("mixing_weight", "mixing_momentum", "schedule_beta"):
        if name in settings and not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {settings[name]}")


def temporal_schedule(mixing_weight: Tensor, parents: Tensor, length: int, beta: float) -> Tensor:
    """Lambda of every neuron at every step of a sequence.

    lambda_T = lambda; going back in time, lambda_t[j] = min(1, lambda_{t+1}[j] + beta * mean over
    j's child edges of (1 - lambda_{t+1}[child])), the mean being 0 where j has no children.

    Args:
        mixing_weight: lambda [W].
        parents: [W, P].
        length: T.
        beta: step of the schedule, >= 0.

    Returns:
        [T, W]; the last row is `mixing_weight`.

    Source: the paper, Section H.4.
    """
    schedule = mixing_weight.repeat(length, 1)
    if beta == 0:
        return schedule
    edges = child_counts(parents, len(mixing_weight)).clamp(min=1)
    parent_of_edge = parents.flatten()
    for t in range(length - 2, -1, -1):
        distrust = (1 - schedule[t + 1]).repeat_interleave(parents.shape[1])
        total = torch.zeros_like(mixing_weight).index_add_(0, parent_of_edge, distrust)
        schedule[t] = (schedule[t + 1] + beta * total / edges).clamp(max=1)
    return schedule


def positive_projection(gradient: Tensor, prediction: Tensor, dim: int = -1) -> Tensor:
    """max(<g, s>, 0) s / max(|s|^2, 1e-12), vectors along `dim` (paper, Section H.4)."""
    along = (gradient * prediction).sum(dim, keepdim=True).clamp(min=0)
    return along * prediction / prediction.square().sum(dim, keepdim=True).clamp(min=MIN_NORM)


def norm(vectors: Tensor, dim: int = -1) -> Tensor:
    """Euclidean norm along `dim`, kept as an axis of 1 (Tensor.norm is slow on inner axes)."""
    return vectors.square().sum(dim, keepdim=True).sqrt()


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors along `dim` scaled to norm 1 (shorter than 1e-12: divided by 1e-12)."""
    return vectors / norm(vectors, dim).clamp(min=MIN_NORM)


def optimal_mixing_weight(
    mean_u_square: Tensor,
    mean_wu: Tensor,
    square_mean_u: Tensor,
    mean_w_mean_u: Tensor,
    num_samples: int,
    previous: Tensor,
    eps: float,
) -> Tensor:
    """Lambda* from the moments of one batch (paper, equations 17 and 18, estimated as in H.2).

    With w the parameter gradient from the received gradient, s that from the prediction and
    u = s - w, per neuron over the batch:

    Args:
        mean_u_square: mean of |u|^2 [W].
        mean_wu: mean of <w, u> [W].
        square_mean_u: |mean u|^2 [W].
        mean_w_mean_u: <mean w, mean u> [W].
        num_samples: B.
        previous: lambda before [W], kept where nothing can be told.
        eps: least denominator.

    Returns:
        [W], in [0, 1].
    """
    if num_samples <= 1:
        return previous.clone()
    variance = ((mean_u_square - square_mean_u) / (num_samples - 1)).clamp(min=0)
    covariance = (mean_wu - mean_w_mean_u) / (num_samples - 1)
    return best_mixture(variance, covariance, square_mean_u, previous, eps)


def best_mixture(
    variance: Tensor, covariance: Tensor, square_mean_u: Tensor, previous: Tensor, eps: float
) -> Tensor:
    """Lambda* from estimates of Var(mean u), Cov(mean w, mean u) and the raw |mean u|^2, all [W].

    `previous` [W] is kept where the denominator is not above `eps`. Returns [W], in [0, 1].
    """
    squared_bias = (square_mean_u - variance).clamp(min=0)
    denominator = variance + squared_bias
    known = denominator > eps
    ratio = covariance / torch.where(known, denominator, torch.ones_like(denominator))
    return torch.where(known, (1 + ratio).clamp(0, 1), previous)


def estimate_mixing_weight(
    activation: Activation,
    gradient: Tensor,
    prediction: Tensor,
    scale: float,
    previous: Tensor,
    eps: float,
) -> Tensor:
    """Estimate of lambda* from one batch of K samples, by the formulas of the paper's H.2.

    Args:
        activation: of the same K samples.
        gradient: received gradient g [K, W, N].
        prediction: s [K, W, N].
        scale: 1 / sqrt(I).
        previous: lambda before [W].
        eps: see `MixingRule`.

    Returns:
        [W], in [0, 1].
    """
    moments = batch_moments(activation, gradient, prediction, scale)
    return optimal_mixing_weight(*moments, previous, eps)


def batch_moments(
    activation: Activation,
    gradient: Tensor,
    prediction: Tensor,
    scale: float,
    unit_gradients: bool = True,
) -> Moments:
    """Moments of the parameter gradients of one batch of K samples.

    The per-sample parameter gradients w and u are never materialised: with t the gradient of b_m
    and dq that of the slot's score, their squared norms and dot products are
    (1 + |x|^2) <t, t'> + scale^2 |x|^2 <dq, dq'>.

    Args:
        activation: of the same K samples.
        gradient: received gradient g [K, W, N].
        prediction: s [K, W, N].
        scale: 1 / sqrt(I).
        unit_gradients: see `MixingRule`.
    """
    inputs, attention, slots, _ = activation
    if unit_gradients:
        gradient, prediction = unit(gradient), unit(prediction)

    def parameter_gradient(feedback: Tensor) -> tuple[Tensor, Tensor]:
        t = attention.unsqueeze(-1) * feedback.unsqueeze(2) * (1 - slots.square())
        v = torch.einsum("kwn,kwmn->kwm", feedback, slots)
        dq = attention * (v - (attention * v).sum(-1, keepdim=True))
        return t, dq

    t_w, dq_w = parameter_gradient(gradient)
    t_u, dq_u = (s - w for s, w in zip(parameter_gradient(prediction), (t_w, dq_w), strict=True))
    x_square = inputs.square().sum(-1)

    def inner(t: Tensor, dq: Tensor, t_other: Tensor, dq_other: Tensor) -> Tensor:
        slot_part = (1 + x_square) * (t * t_other).sum((-1, -2))
        key_part = scale**2 * x_square * (dq * dq_other).sum(-1)
        return (slot_part + key_part).mean(0)

    def mean_gradient(t: Tensor, dq: Tensor) -> Tensor:
        count = len(inputs)
        parts = [
            t.mean(0).flatten(1),
            (torch.einsum("kwmn,kwi->wmni", t, inputs) / count).flatten(1),
            (scale * torch.einsum("kwm,kwi->wmi", dq, inputs) / count).flatten(1),
        ]
        return torch.cat(parts, dim=1)

    w_bar, u_bar = mean_gradient(t_w, dq_w), mean_gradient(t_u, dq_u)
    return Moments(
        mean_u_square=inner(t_u, dq_u, t_u, dq_u),
        mean_wu=inner(t_w, dq_w, t_u, dq_u),
        square_mean_u=u_bar.square().sum(1),
        mean_w_mean_u=(w_bar * u_bar).sum(1),
        num_samples=len(inputs),
    )


def mixing_summary(mixing_weights: Tensor) -> Mapping[str, float]:
    """Mean, minimum, quartiles and maximum of lambda, under the names of the metrics columns."""
    values = mixing_weights.detach().flatten().double().cpu()
    marks = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    names = ("min", "p25", "median", "p75", "max")
    quantiles = torch.quantile(values, marks).tolist()
    summary = {"mixing_weight_mean": values.mean().item()}
    summary |= {f"mixing_weight_{n}": q for n, q in zip(names, quantiles, strict=True)}
    return summary


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A module's parameters as (policy parameters, predictor parameters); together all of them."""
    policy: list[nn.Parameter] = []
    predictor: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_predictor = name.rpartition(".")[2].startswith("predictor_")
        (predictor if is_predictor else policy).append(parameter)
    return policy, predictor
