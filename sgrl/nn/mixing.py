"""Mixing weights: how lambda, the share of the received gradient, is estimated and learned.

Here are the moments of a batch's gradients (`batch_moments`), the estimate of the best lambda from
them (`estimate_mixing_weight`), and the published rule by which lambda follows it (`MixingRule`);
the others are in `mixing_rules.py`, the mixture itself in `sgprop.py`. Source: the paper, Sections
4 and H.2.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sgrl.nn.neuron import Activation, PerNeuron

#: Norms below this count as this where a vector is divided by its norm.
MIN_NORM = 1e-12


class Moments(NamedTuple):
    """What lambda is estimated from: means over the B samples of a batch, per neuron.

    With w the parameter gradient from the received gradient, s that from the prediction and
    u = s - w.
    """

    mean_u_square: PerNeuron  # mean of |u|^2
    mean_wu: PerNeuron  # mean of <w, u>
    square_mean_u: PerNeuron  # |mean u|^2
    mean_w_mean_u: PerNeuron  # <mean w, mean u>
    num_samples: int | PerNeuron  # B

    @classmethod
    def of_sums(cls, sums: Iterable[PerNeuron], num_samples: int | PerNeuron) -> Self:
        """Take the means of sums over samples.

        Args:
            sums: of |u|^2 and of <w, u>; |sum of u|^2 and <sum of w, sum of u>.
            num_samples: B; may be 0.
        """
        u_square, wu, square_sum_u, sum_w_sum_u = sums
        count = num_samples.clamp(min=1) if isinstance(num_samples, Tensor) else max(num_samples, 1)
        of_sums = square_sum_u / count**2, sum_w_sum_u / count**2
        return cls(u_square / count, wu / count, *of_sums, num_samples)


@dataclass
class MixingRule:
    """How lambda follows what the batches tell: as published.

    The other rules are its subclasses (`mixing_rules.py`). A rule says what lambda becomes after a
    batch (`next_weight`), of which gradients it wants the moments (`unit_gradients`, `samples`),
    and what it remembers between batches (`memory`).

    Attributes:
        unit_gradients: whether each step's received gradient and prediction are brought to
            length 1 before the moments are taken.
        samples: what is taken for an independent sample: every valid "steps" of every sequence, or
            the sequences themselves ("episodes"), each with the sum of its valid steps' parameter
            gradients. A sequence without valid step is no sample. The same where there is no time.
        memory: names of what the rule remembers, one number per neuron each; the rows of
            the layer's `mixing_memory`.
        adaptive: lambda follows the estimate from each batch; otherwise it stays as it is.
        momentum: m, weight of the past: lambda <- m * lambda + (1 - m) * estimate.
        eps: the estimate is used only where its denominator exceeds this. Made for vectors of
            length 1: without them 0 serves (the denominator is at least mean |u|^2 / B).
        phase: what a backward pass is for (see `backward_phase`).
    """

    unit_gradients: ClassVar[bool] = True
    samples: ClassVar[Literal["steps", "episodes"]] = "steps"
    memory: ClassVar[tuple[str, ...]] = ()

    adaptive: bool = True
    momentum: float = 0.9
    eps: float = 1e-12
    phase: Literal["joint", "predictor", "policy"] = "joint"

    @property
    def updates(self) -> bool:
        """Whether a backward pass changes lambda."""
        return self.adaptive and self.phase != "predictor"

    @property
    def least_denominator(self) -> float:
        """What the estimate's denominator must exceed."""
        return self.eps if self.unit_gradients else 0.0

    def update(self, neurons: Any, moments: Moments) -> None:
        """Update the layer's lambda after a backward pass, which used the previous value.

        Args:
            neurons: has tensors `mixing_weight` [W] and `mixing_memory`, changed in place.
            moments: of the batch.
        """
        precision = moments.mean_u_square.dtype  # not always that of the layer
        memory = neurons.mixing_memory.to(precision, copy=True)
        weight = self.next_weight(moments, neurons.mixing_weight.to(precision), memory)
        neurons.mixing_memory.copy_(memory)
        neurons.mixing_weight.copy_(weight)

    def next_weight(
        self, moments: Moments, previous: PerNeuron, memory: Float[Tensor, "rows W"]
    ) -> PerNeuron:
        """Lambda after a batch.

        Args:
            moments: of the batch.
            previous: lambda before it [W].
            memory: [rows named in the class's `memory`, W], zeros at first; changed in place.

        Returns:
            [W], in [0, 1].
        """
        estimate = estimate_mixing_weight(moments, previous, self.least_denominator)
        return self.momentum * previous + (1 - self.momentum) * estimate


@runtime_checkable
class MixingModule(Protocol):
    """A module that mixes predictions into gradients.

    Attributes:
        rule: by which its mixing weights follow the batches.
        statistics: what its last backward pass measured, by the names of the metrics columns.
        mixing_weights: lambda [W] of each of its layers; none where it does not mix, as under
            backprop.
    """

    rule: MixingRule
    statistics: dict[str, Tensor]

    @property
    def mixing_weights(self) -> list[PerNeuron]: ...


def mixing_modules(network: nn.Module) -> list[MixingModule]:
    """All modules inside that mix predictions into gradients, in the order of `modules()`."""
    modules = (m for m in network.modules() if isinstance(m, MixingModule))
    return [m for m in modules if isinstance(m.rule, MixingRule)]


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


def norm(vectors: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """Euclidean norm along `dim`, kept as an axis of 1 (Tensor.norm is slow on inner axes)."""
    return vectors.square().sum(dim, keepdim=True).sqrt()


def unit(vectors: Float[Tensor, " *S"], dim: int = -1) -> Float[Tensor, " *S"]:
    """Vectors along `dim` scaled to norm 1 (shorter than 1e-12: divided by 1e-12)."""
    return vectors / norm(vectors, dim).clamp(min=MIN_NORM)


def estimate_mixing_weight(moments: Moments, previous: PerNeuron, eps: float) -> PerNeuron:
    """Estimate of lambda* from the moments of one batch, for the mean of that batch.

    Covariances are the unbiased ones, and |E[u]|^2 is |mean u|^2 less what chance adds to it.

    Args:
        moments: of the batch.
        previous: lambda before [W], kept where nothing can be told.
        eps: least denominator.

    Returns:
        [W], in [0, 1].

    Source: the paper, Section H.2.
    """
    estimate = mixing_weight_from(mean_covariances(moments), previous, eps)
    return torch.where(several_samples(moments), estimate, previous)


def several_samples(moments: Moments) -> Bool[Tensor, "..."]:
    """Whether there are samples enough for covariances, 0-dim or per neuron."""
    enough = moments.num_samples > 1
    if isinstance(enough, Tensor):
        return enough
    # Made on the device: a copy to it could not be captured in a CUDA graph.
    return torch.full((), enough, device=moments.mean_wu.device)


def mean_covariances(moments: Moments) -> tuple[PerNeuron, PerNeuron, PerNeuron]:
    """Unbiased estimates of Var(mean u) and Cov(mean w, mean u), and |mean u|^2, all [W].

    They mean nothing unless there are 2 samples (`several_samples`).
    """
    mean_u_square, mean_wu, square_mean_u, mean_w_mean_u, num_samples = moments
    variance = ((mean_u_square - square_mean_u) / (num_samples - 1)).clamp(min=0)
    covariance = (mean_wu - mean_w_mean_u) / (num_samples - 1)
    return variance, covariance, square_mean_u


def mixing_weight_from(
    covariances: Sequence[PerNeuron], previous: PerNeuron, eps: float
) -> PerNeuron:
    """Lambda* from what `mean_covariances` returns, or averages of it.

    `previous` [W] is kept where the denominator is not above `eps`. Returns [W], in [0, 1].
    """
    variance, covariance, square_mean_u = covariances
    squared_bias = (square_mean_u - variance).clamp(min=0)
    return clipped_mixing_weight(covariance, variance + squared_bias, eps, previous)


def clipped_mixing_weight(
    numerator: PerNeuron, denominator: PerNeuron, least: PerNeuron | float, otherwise: PerNeuron
) -> PerNeuron:
    """Compute 1 + numerator / denominator, clipped to [0, 1].

    Returns:
        `otherwise` where the denominator is not above `least`.
    """
    known = denominator > least
    ratio = numerator / torch.where(known, denominator, torch.ones_like(denominator))
    return torch.where(known, (1 + ratio).clamp(0, 1), otherwise)


def gradient_moments(w: Float[Tensor, "B *W D"], s: Float[Tensor, "B *W D"]) -> Moments:
    """Moments of gradients that are given, w and s [B, ..., D]."""
    u = s - w
    w_bar, u_bar = w.mean(0), u.mean(0)
    return Moments(
        mean_u_square=u.square().sum(-1).mean(0),
        mean_wu=(w * u).sum(-1).mean(0),
        square_mean_u=u_bar.square().sum(-1),
        mean_w_mean_u=(w_bar * u_bar).sum(-1),
        num_samples=len(w),
    )


def batch_moments(
    activation: Activation,
    gradient: Float[Tensor, "K W N"],
    prediction: Float[Tensor, "K W N"],
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
    inputs = activation.inputs
    if unit_gradients:
        gradient, prediction = unit(gradient), unit(prediction)
    t_w, dq_w = _row_gradients(activation, gradient)
    of_s = _row_gradients(activation, prediction)
    t_u, dq_u = (s - w for s, w in zip(of_s, (t_w, dq_w), strict=True))
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


def _row_gradients(
    activation: Activation, feedback: Float[Tensor, "K W N"]
) -> tuple[Float[Tensor, "K W M N"], Float[Tensor, "K W M"]]:
    """Gradients t of the b_m and dq of the slots' scores, from that of the output."""
    _, attention, slots, _ = activation
    t = attention.unsqueeze(-1) * feedback.unsqueeze(2) * (1 - slots.square())
    v = torch.einsum("kwn,kwmn->kwm", feedback, slots)
    dq = attention * (v - (attention * v).sum(-1, keepdim=True))
    return t, dq


def episode_moments(
    activation: Activation,
    gradient: Float[Tensor, "T B W N"],
    prediction: Float[Tensor, "T B W N"],
    valid: Bool[Tensor, "T B"],
    scale: float,
    unit_gradients: bool = True,
) -> Moments:
    """Moments of the parameter gradients of B episodes, each the sum over its valid steps.

    Args:
        activation: of all steps, each tensor [T, B, ...].
        gradient: received gradient g.
        prediction: s.
        valid: True at valid steps; an episode without any is left out.
        scale: 1 / sqrt(I).
        unit_gradients: see `MixingRule`.
    """

    def sums(feedback: Tensor) -> Tensor:
        feedback = unit(feedback) if unit_gradients else feedback
        episodes = []
        for b in valid.any(0).nonzero().flatten().tolist():
            steps = Activation(*(value[valid[:, b], b] for value in activation))
            t, dq = _row_gradients(steps, feedback[valid[:, b], b])
            parts = [
                t.sum(0).flatten(1),
                torch.einsum("kwmn,kwi->wmni", t, steps.inputs).flatten(1),
                scale * torch.einsum("kwm,kwi->wmi", dq, steps.inputs).flatten(1),
            ]
            episodes.append(torch.cat(parts, dim=1))
        return torch.stack(episodes)

    if not valid.any():
        zero = torch.zeros_like(gradient[0, 0, :, 0])
        return Moments(zero, zero, zero, zero, num_samples=0)
    return gradient_moments(sums(gradient), sums(prediction))


def mixing_summary(mixing_weights: PerNeuron) -> Mapping[str, float]:
    """Mean, minimum, quartiles and maximum of lambda, under the names of the metrics columns."""
    values = mixing_weights.detach().flatten().double().cpu()
    return {name: of_one.item() for name, of_one in mixing_summaries(values[None]).items()}


def mixing_summaries(mixing_weights: Float[Tensor, "S W"]) -> dict[str, Float[Tensor, " S"]]:
    """`mixing_summary` of several networks at once, from float64."""
    marks = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    names = ("min", "p25", "median", "p75", "max")
    quantiles = torch.quantile(mixing_weights, marks, dim=1)
    summaries = {"mixing_weight_mean": mixing_weights.mean(1)}
    return summaries | {f"mixing_weight_{n}": q for n, q in zip(names, quantiles, strict=True)}


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """A module's parameters as (policy parameters, predictor parameters); together all of them."""
    policy: list[nn.Parameter] = []
    predictor: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_predictor = name.rpartition(".")[2].startswith("predictor_")
        (predictor if is_predictor else policy).append(parameter)
    return policy, predictor
