"""Mixing rules by name: how lambda follows what a batch says about the best one.

The published rule is `MixingRule` itself, with the estimate it follows in `mixing.py`. A rule is
added as a subclass, named `module:Class` or by a line in `MIXING_RULES`; docs/mixing_rules.md tells
how.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.names import did_you_mean
from sgrl.nn.mixing import (
    MixingRule,
    Moments,
    mean_covariances,
    mixing_weight_from,
    several_samples,
)
from sgrl.nn.neuron import PerNeuron
from sgrl.user_code import module_of, named_class


class RunningRule(MixingRule):
    """Lambda* of moments averaged over batches, not an average of the batches' lambda*.

    Lambda* is a clipped ratio, so its mean over noisy batches is not lambda* of the mean. Here what
    enters the ratio is averaged: the estimates v of Var(mean u) and c of Cov(mean w, mean u), and
    |mean u|^2, each without bias in every batch. Lambda is the ratio of these averages,
    clip(1 + c / (v + max(|mean u|^2 - v, 0)), 0, 1), and not smoothed again.

    The averages are exponential, average <- m * average + (1 - m) * batch with m = `momentum`, from
    zero, divided by 1 - m^k after k batches. A batch of one valid sample changes nothing.
    """

    memory = ("variance", "covariance", "square_mean_u", "total_weight")

    def next_weight(
        self, moments: Moments, previous: PerNeuron, memory: Float[Tensor, "rows W"]
    ) -> PerNeuron:
        variance, covariance, square_mean_u = mean_covariances(moments)
        batch = torch.stack([variance, covariance, square_mean_u, torch.ones_like(variance)])
        enough = several_samples(moments)
        memory.copy_(
            torch.where(enough, self.momentum * memory + (1 - self.momentum) * batch, memory)
        )
        # No weight at all (m = 1): zeros, from which nothing can be told.
        total = memory[3].clamp(min=torch.finfo(memory.dtype).tiny)
        covariances = (memory[:3] / total).unbind()
        weight = mixing_weight_from(covariances, previous, self.least_denominator)
        return torch.where(enough, weight, previous)


class RawRule(MixingRule):
    """The published rule on gradients and predictions of the lengths they have.

    The published estimate brings each sample's received gradient and prediction to length 1, so
    that all samples count alike and only directions are compared, while what is mixed are the
    vectors as they are. Here w and s are the very parameter gradients that are mixed, and lambda*
    the least error of their mixture: samples count by the size of their feedback, and a prediction
    that is too long or too short counts as wrong. The slope of a residual branch stays in: it is
    part of the parameter gradient. So does the positive projection.

    A common factor of all gradients changes nothing. The estimate is used wherever some u is not 0.
    """

    unit_gradients = False


class RunningRawRule(RunningRule, RawRule):
    """`RunningRule` on the gradients of `RawRule`: batches, too, count by their feedback's size."""


class EpisodesRule(RawRule):
    """The estimate of `RawRule` from whole episodes, the independent samples of a batch.

    What is mixed and averaged is the mean over a batch of B episodes, and its variance is that of
    an episode's sum of parameter gradients, divided by B. The steps of one episode share its
    return, its maze and its states: taken for independent samples, as by the rules on steps, they
    make the mean look more certain than it is, by up to the length of an episode, and lambda come
    out too close to 1. Where an episode is one step, as for feed-forward networks, this is
    `RawRule`.
    """

    samples = "episodes"


class RunningEpisodesRule(RunningRule, EpisodesRule):
    """`RunningRule` on the episodes of `EpisodesRule`."""


class HalfwayRule(RunningEpisodesRule):
    """Half the way from backpropagation to where `RunningEpisodesRule` goes: (1 + its lambda) / 2.

    The error of a mixture is a parabola in lambda, lowest at lambda*: what goes half the way to an
    estimate of lambda* is no worse than backpropagation unless the estimate is off by as much again
    as lambda* is from 1. From one batch, and for that very batch, it is a James-Stein estimate,
    which never has a larger expected error (docs/mixing_rules.md has the argument and its
    conditions).
    """

    def next_weight(
        self, moments: Moments, previous: PerNeuron, memory: Float[Tensor, "rows W"]
    ) -> PerNeuron:
        # Halved with the rest, so that it stays where nothing can be told.
        whole = super().next_weight(moments, 2 * previous - 1, memory)
        return (1 + whole) / 2


MIXING_RULES: dict[str, type[MixingRule]] = {
    "published": MixingRule,
    "running": RunningRule,
    "raw": RawRule,
    "running_raw": RunningRawRule,
    "episodes": EpisodesRule,
    "running_episodes": RunningEpisodesRule,
    "halfway": HalfwayRule,
}


def mixing_rule(name: str) -> type[MixingRule]:
    """The rule of that name, or of the user's own, the class at `module:Class`.

    Raises:
        ValueError: there is none; one line that names those there are.
    """
    if name in MIXING_RULES:
        return MIXING_RULES[name]
    if module_of(name):
        return named_class(name, MixingRule)
    raise ValueError(f"unknown mixing_rule {name!r}; {did_you_mean(name, MIXING_RULES)}")
