"""Estimation error of gradients: how far the mean of n samples is from the true gradient.

Every function takes per-sample parameter gradients [S, ..., D]: S samples, D parameters, and
between them any axes over which neurons are told apart, which all results keep. The S samples are
either a sample, weighted equally, or all outcomes of something discrete with their
`probabilities` [S]; then what comes back is exact. Moments are those of the given samples (sums
are divided by S, not S - 1).

The words are the paper's: w is the gradient that came through Jacobians, s the one from synthetic
gradients, u = s - w, and `target` the true mean gradient under backprop [..., D].

Source: the paper, Sections 3 and 4.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sgrl.nn.mixing import clipped_mixing_weight, estimate_mixing_weight, gradient_moments
from sgrl.nn.neuron import PerNeuron

Gradients = Float[Tensor, "S *W D"]
Target = Float[Tensor, "*W D"]
Probabilities = Float[Tensor, " S"]


class ErrorTerms(NamedTuple):
    """The three parts of the mean squared error, each [...]."""

    ecv: PerNeuron  # expected conditional variance: what the local observation does not tell
    vcm: PerNeuron  # variance of the conditional mean: what it does tell
    squared_bias: PerNeuron

    def mse(self, num_samples: int) -> PerNeuron:
        """Of the mean of so many independent samples: (ECV + VCM) / n + Bias^2 (Lemma 1)."""
        return (self.ecv + self.vcm) / num_samples + self.squared_bias


def mean(values: Float[Tensor, " S *W"], probabilities: Probabilities | None = None) -> PerNeuron:
    """Expectation over the first axis: [...] from [S, ...]."""
    if probabilities is None:
        return values.mean(0)
    return torch.tensordot(probabilities, values, dims=1)


def total_covariance(
    a: Gradients, b: Gradients, probabilities: Probabilities | None = None
) -> PerNeuron:
    """Trace of the covariance of two gradients [S, ..., D]: [...]."""
    a = a - mean(a, probabilities)
    b = b - mean(b, probabilities)
    return mean((a * b).sum(-1), probabilities)


def total_variance(gradients: Gradients, probabilities: Probabilities | None = None) -> PerNeuron:
    """Trace of the covariance matrix of gradients [S, ..., D]: [...]."""
    return total_covariance(gradients, gradients, probabilities)


def mean_squared_error(
    estimates: Gradients, target: Target, probabilities: Probabilities | None = None
) -> PerNeuron:
    """E |estimate - target|^2 by its definition (equation 7): [...].

    Args:
        estimates: repeated estimates [S, ..., D], such as means of n samples each.
        target: [..., D].
        probabilities: of the estimates [S].
    """
    return mean((estimates - target).square().sum(-1), probabilities)


def error_terms(
    gradients: Gradients,
    observations: Int64[Tensor, " S"],
    target: Target,
    probabilities: Probabilities | None = None,
) -> ErrorTerms:
    """ECV, VCM and Bias^2 of gradient samples (Definition 3).

    Args:
        gradients: [S, ..., D].
        observations: what the neuron saw in each sample, as integers [S] that are equal where its
            local observations are. Neurons that see different things need a call each.
        target: [..., D].
        probabilities: [S].

    A gradient that depends on nothing else than the observation has ECV 0. With a sample, and few
    samples for each observation, part of the ECV appears as VCM; their sum is not affected.
    """
    if probabilities is None:
        probabilities = gradients.new_full((len(gradients),), 1 / len(gradients))
    labels, group = observations.unique(return_inverse=True)
    weight = probabilities.new_zeros(len(labels)).index_add_(0, group, probabilities)
    weighted = torch.einsum("s,s...->s...", probabilities, gradients)
    sums = gradients.new_zeros(len(labels), *gradients.shape[1:]).index_add_(0, group, weighted)
    # Outcomes of probability 0 have no conditional mean, and need none.
    conditional_mean = torch.einsum("g...,g->g...", sums, 1 / weight.where(weight > 0, 1))[group]
    bias = mean(gradients, probabilities) - target
    return ErrorTerms(
        ecv=mean((gradients - conditional_mean).square().sum(-1), probabilities),
        vcm=total_variance(conditional_mean, probabilities),
        squared_bias=bias.square().sum(-1),
    )


def mixing_error(
    mixing_weight: Float[Tensor, "..."],
    w: Gradients,
    s: Gradients,
    target: Target,
    num_samples: int,
    probabilities: Probabilities | None = None,
) -> PerNeuron:
    """Mean squared error of the mean of n samples of lambda w + (1 - lambda) s (equation 17).

    Args:
        mixing_weight: lambda [...], or anything that broadcasts against it.
        w: gradients through Jacobians [S, ..., D]; above them the signal may be mixed already.
        s: gradients from predictions [S, ..., D].
        target: [..., D].
        num_samples: n.
        probabilities: [S].

    Returns:
        [...].
    """
    mixed = torch.lerp(s, w, torch.as_tensor(mixing_weight, dtype=w.dtype).unsqueeze(-1))
    bias = mean(mixed, probabilities) - target
    return total_variance(mixed, probabilities) / num_samples + bias.square().sum(-1)


def optimal_mixing_weight(
    w: Gradients,
    s: Gradients,
    target: Target,
    num_samples: int,
    probabilities: Probabilities | None = None,
) -> PerNeuron:
    """The lambda in [0, 1] with the least `mixing_error` (equation 18).

    It is 1 where u is always 0, or nothing but the rounding of w and s. Arguments are those of
    `mixing_error`; returns [...].
    """
    u = s - w
    u_mean = mean(u, probabilities)
    bias = mean(w, probabilities) - target
    square = mean((w.square() + s.square()).sum(-1), probabilities)
    rounding = square * (10 * torch.finfo(w.dtype).eps) ** 2
    covariance, variance = (total_covariance(v, u, probabilities) for v in (w, u))
    bias_u, square_mean_u = (bias * u_mean).sum(-1), u_mean.square().sum(-1)
    return mixing_weight_of_moments(
        covariance, variance, bias_u, square_mean_u, num_samples, rounding
    )


def mixing_weight_of_moments(
    covariance_wu: PerNeuron,
    variance_u: PerNeuron,
    bias_u: PerNeuron,
    square_mean_u: PerNeuron,
    num_samples: float,
    rounding: PerNeuron,
) -> PerNeuron:
    """Equation 18 from moments, all [...].

    Args:
        covariance_wu: trace of Cov(w, u).
        variance_u: trace of Cov(u).
        bias_u: <E[w] - target, E[u]>.
        square_mean_u: |E[u]|^2.
        num_samples: n.
        rounding: denominators up to here are 0 but for rounding.

    Returns:
        [...], in [0, 1]; 1 where u is always 0.
    """
    numerator = covariance_wu / num_samples + bias_u
    denominator = variance_u / num_samples + square_mean_u
    ones = torch.ones_like(denominator)
    return clipped_mixing_weight(numerator, denominator, rounding, ones)


def batch_mixing_weight(
    w: Gradients, s: Gradients, previous: PerNeuron, eps: float = 1e-12
) -> PerNeuron:
    """Estimate of lambda* from one batch of B samples, for the mean of this batch.

    The target is taken to be E[w]. This is what networks do (`sgrl.nn.mixing.batch_moments`), with
    gradients that are given; networks never form them, and normalise the feedback first.

    Args:
        w: gradients through Jacobians [B, ..., D].
        s: gradients from predictions [B, ..., D].
        previous: lambda where the batch tells nothing [...]: B = 1, or a denominator <= `eps`.
        eps: see `previous`.

    Returns:
        [...], in [0, 1].

    Source: the paper, Section H.2.
    """
    return estimate_mixing_weight(gradient_moments(w, s), previous, eps)


def mixing_gain(
    w: Gradients,
    s: Gradients,
    target: Target,
    num_samples: int,
    probabilities: Probabilities | None = None,
) -> PerNeuron:
    """By how much reduced variance beats bias (Theorem 3, exactly); arguments of `mixing_error`.

    Returns:
        [...]: (tr Cov(w) - tr Cov(w, s)) / n - <E[w] - target, E[s] - E[w]>. Some lambda < 1 has
        a smaller error than lambda = 1 where this is > 0, and nowhere else. It is half the slope
        of the error at lambda = 1.
    """
    saved = total_variance(w, probabilities) - total_covariance(w, s, probabilities)
    w_mean, s_mean = mean(w, probabilities), mean(s, probabilities)
    return saved / num_samples - ((w_mean - target) * (s_mean - w_mean)).sum(-1)
