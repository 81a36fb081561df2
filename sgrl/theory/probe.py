"""How far gradients of a real network are from the true one, and what mixing in would save.

For a policy on its task: the true gradient g* under backprop, estimated from a large sample, and
per neuron the mean squared error of the mean of n samples under backprop and under sgprop
(Lemma 1), the best mixing weight (equation 18), and how much of what a neuron is told by the
network above it could know from its own inputs (condition B). A sample is one image or one whole
episode.

Neuron i receives the gradient g (layers above mix with their present lambda), predicts s, and its
parameter gradients, of keys, matrices and biases together, are of four kinds:

    received w (from g), synthetic s, mixed m = lambda w + (1 - lambda) s, and backprop b,
    which it would receive if nothing were mixed anywhere: g* = E[b]

One sample's parameter gradient is a linear function of its feedback, and `isometry` has the inner
products: <w, w'> = <g E, g' E> with a matrix E of N rows. So none is formed for a single sample,
but where an episode's is a sum over time; what is formed is each shard's mean, for the chosen
neurons.

What can follow an image on the bandit is enumerated, not drawn: all guesses and rewards with their
probabilities. Mean and variance of an image's gradients are exact, and only images are sampled. A
whole finite population can be given as one shard, with probabilities; then all numbers are exact.

Squared norms of means, |E w|^2 or Bias^2, are estimated from products between different shards
of the sample, which makes them unbiased (and, where they are small, at times negative). Intervals
are the percentile bootstrap's over shards: `RESAMPLES` times, as many shards are drawn with
replacement, the same for all neurons; products of a shard with itself are left out there too.

Source: the paper, Sections 3 and 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgrl.envs.registry import VectorEnv, make_vector, validate_env_config
from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.feedforward_policies import ActionHead
from sgrl.nn.kernels.plain import is_plain
from sgrl.nn.mixing import positive_projection, unit
from sgrl.nn.neuron import Activation, SlotNeurons
from sgrl.nn.policies import Policy, SparseMLPPolicy, SparseNetPolicy, make_policy
from sgrl.reinforce.loss import discounted_returns
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET
from sgrl.reinforce.update import UpdateSettings
from sgrl.theory.tasks import TheoryError, in_ray

W, S, M, B = range(4)  # the kinds of gradients, where they are an axis
NUM_SHARDS = 24
RESAMPLES = 500
CONFIDENCE = 0.95
#: Images, and episodes, worked on at once; no result depends on it but for rounding.
CHUNK_IMAGES = 16
CHUNK_EPISODES = 10
#: Steps of a recurrent network that are reported apart, as shares of the episode length.
STEP_SHARES = (0, 1 / 8, 1 / 4, 1 / 2)
#: Ridge penalties tried, as shares of the features' mean square.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Seen(NamedTuple):
    """What J neurons computed for K samples, neurons first."""

    inputs: Tensor  # x [J, K, I]
    attention: Tensor  # a [J, K, M]
    slots: Tensor  # y [J, K, M, N]
    output: Tensor  # [J, K, N]
    scale: float  # 1 / sqrt(I), all inputs counted

    @classmethod
    def of(cls, activation: Activation, scale: float, chosen: Tensor | None = None) -> Seen:
        """From a layer's activation [K, W, ...], of all its neurons or the chosen [J]."""
        chosen_ones = (value if chosen is None else value[:, chosen] for value in activation)
        inputs, attention, slots, output = (v.transpose(0, 1).contiguous() for v in chosen_ones)
        return cls(inputs, attention, slots, output, scale)

    def slopes(self) -> Tensor:
        """Derivative of the output by the slots' pre-activations, a (1 - y^2) [J, K, M, N]."""
        return self.attention.unsqueeze(3) * (1 - self.slots.square())

    def arms(self) -> Tensor:
        """a_m (y_m - output) [J, K, M, N]: a score's gradient is <feedback, arm>."""
        return self.attention.unsqueeze(3) * (self.slots - self.output.unsqueeze(2))


def isometry(seen: Seen) -> Tensor:
    """E [J, K, N, N + M]: a sample's parameter gradients from feedback g and g' [N] have the inner
    product <g E, g' E>; what `sgrl.nn.mixing.estimate_mixing_weight` says of t and dq, as one."""
    square = seen.inputs.square().sum(2).unsqueeze(2)
    of_slots = ((1 + square) * seen.slopes().square().sum(2)).sqrt()
    of_keys = seen.scale * square.sqrt().unsqueeze(3) * seen.arms()
    return torch.cat([of_slots.diag_embed(), of_keys.transpose(2, 3)], dim=3)


def row_gradients(seen: Seen, feedback: Tensor) -> Tensor:
    """Gradients of the keys' and matrices' products with the inputs, [J, K, O, M + M*N].

    Args:
        seen: of K samples.
        feedback: gradients of the output [J, K, O, N], O for each sample.
    """
    keys = seen.scale * feedback @ seen.arms().transpose(2, 3)
    slots = seen.slopes().unsqueeze(2) * feedback.unsqueeze(3)
    return torch.cat([keys, slots.flatten(3)], dim=3)


def parameter_gradients(seen: Seen, feedback: Tensor, weights: Tensor) -> Tensor:
    """Sum over samples of their weight times the parameter gradient: [J, D].

    Args:
        seen: of K samples.
        feedback: gradients of the output [J, K, N].
        weights: [K].

    D counts keys and matrices, row by row over all inputs, then the biases.
    """
    rows = row_gradients(seen, feedback.unsqueeze(2)).squeeze(2) * weights.unsqueeze(1)
    of_weights = rows.transpose(1, 2) @ seen.inputs
    of_biases = rows[:, :, seen.attention.shape[2] :].sum(1)
    return torch.cat([of_weights.flatten(1), of_biases], dim=1)


class Sums(NamedTuple):
    """Sums over the samples of a shard, weighted, for J neurons; over `weight` they are means.

    "unit" is about feedback normalised per sample and neuron, kinds received and synthetic, which
    the learned mixing weight is estimated from.
    """

    weight: float
    gradients: Tensor  # of each kind [4, J, D]
    products: Tensor  # <a, b> of the kinds [J, 4, 4]
    noise: Tensor  # covariance given the observation, summed over parameters [J, 4, 4]
    unit_gradients: Tensor  # [2, J, D]
    unit_products: Tensor  # [J, 2, 2]


class Feedback(NamedTuple):
    """What condition B is about, for J neurons and K samples: inputs, and gradients received."""

    inputs: Tensor  # x [J, K, I]
    attention: Tensor  # a [J, K, M]
    first: Tensor  # under backprop [J, K, N]: the mean given the sample, or one replicate
    second: Tensor  # the other replicate, or the same mean
    prediction: Tensor  # s [J, K, N]


@dataclass(frozen=True)
class Group:
    """Neurons that rows and summaries are about together: those of a layer.

    Attributes:
        layer: its name.
        neurons: the chosen ones, int64 [J].
        mixing_weight: their lambda [J].
        step: of a recurrent network: the step whose contribution it is about; None: all steps.
        unit_samples: samples that one sample counts for in the estimate of lambda.
    """

    layer: str
    neurons: Tensor
    mixing_weight: Tensor
    step: int | None = None
    unit_samples: float = 1.0


# ---------------------------------------------------------------- the feed-forward network


def backward_to_inputs(neurons: SlotNeurons, seen: Seen, feedback: Tensor) -> Tensor:
    """Gradients of what neurons read of each other [W, K, O, P*N], from those of their output."""
    rows = row_gradients(seen, feedback)
    read = torch.bmm(rows.flatten(1, 2), neurons.weight_h.detach())
    return read.unflatten(1, rows.shape[1:3])


def scatter(read: Tensor, parents: Tensor, size: int) -> Tensor:
    """Sum of the gradients [W, K, O, P*N] at the parents [W, P]: [W, K, O, N]."""
    num_neurons, samples, outcomes, _ = read.shape
    edges = read.unflatten(3, (-1, size)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    total = read.new_zeros(num_neurons, samples, outcomes, size)
    return total.index_add_(0, parents.flatten(), edges)


def bandit_outcomes(logits: Tensor, right: Tensor, p_flip: float) -> tuple[Tensor, Tensor]:
    """All that can follow an image: each guess rewarded, and no reward at all.

    Args:
        logits: [K, A].
        right: the right action of each image [K].
        p_flip: probability that a reward is flipped.

    Returns:
        Probabilities [K, A + 1], and the gradient of -reward * log pi(guess) by the logits
        [K, A + 1, A], which is 0 without reward.
    """
    policy = logits.softmax(1)
    rewarded = torch.full_like(policy, p_flip)
    rewarded.scatter_(1, right.unsqueeze(1), 1 - p_flip)
    with_reward = policy * rewarded
    probabilities = torch.cat([with_reward, 1 - with_reward.sum(1, keepdim=True)], dim=1)
    guess = torch.eye(policy.shape[1], dtype=policy.dtype, device=policy.device)
    gradients = policy.unsqueeze(1) - guess
    return probabilities, torch.nn.functional.pad(gradients, (0, 0, 0, 1))


@torch.no_grad()
def bandit_sums(
    policy: SparseMLPPolicy,
    images: Tensor,
    right: Tensor,
    p_flip: float,
    groups: Sequence[Group],
    trained_batch: int,
    weights: Tensor | None = None,
) -> tuple[list[Sums], list[Feedback]]:
    """Sums over images and all their outcomes, for each layer's chosen neurons.

    Args:
        policy: under backprop it has no predictions, and s is 0.
        images: [K, F].
        right: int64 [K], the right action.
        p_flip: probability that a reward is flipped.
        groups: one a layer.
        trained_batch: see `probe`.
        weights: of the images [K], as a population's probabilities; ones if None.

    The observation that `Sums.noise` conditions on is the image, which determines everything a
    neuron sees: where different images look the same to it, the ECV is larger than that.
    """
    weights = images.new_ones(len(images)) if weights is None else weights
    chunks = zip(*(t.split(CHUNK_IMAGES) for t in (images, right, weights)), strict=True)
    parts = [
        _bandit_chunk(policy, some, their_right, their_weights, p_flip, groups, trained_batch)
        for some, their_right, their_weights in chunks
    ]
    sums, feedback = zip(*parts, strict=True)
    return (
        [Sums(*map(sum, zip(*of_layer, strict=True))) for of_layer in zip(*sums, strict=True)],
        [
            Feedback(*(torch.cat(part, dim=1) for part in zip(*of_layer, strict=True)))
            for of_layer in zip(*feedback, strict=True)
        ],
    )


def _bandit_chunk(
    policy: SparseMLPPolicy,
    images: Tensor,
    right: Tensor,
    weights: Tensor,
    p_flip: float,
    groups: Sequence[Group],
    trained_batch: int,
) -> tuple[list[Sums], list[Feedback]]:
    mlp: SparseMLP = policy.core
    h, activations = images, []
    for index, neurons in enumerate(mlp.layers):
        parents = mlp.parents[index - 1] if index else None
        activation = neurons(
            h[:, mlp.pixels] if parents is None else neurons.read(h, parents, None)
        )
        output = activation.output
        h = torch.tanh(output) + h if mlp.is_residual(index) else output
        activations.append(activation)
    head = policy.actor
    probabilities, by_logits = bandit_outcomes(head(h.flatten(1)), right, p_flip)
    num_outcomes = probabilities.shape[1]
    by_state = (by_logits @ head.keys * head.scale).unflatten(2, h.shape[1:])
    # Backprop's gradients [W, K, A + 1, N] and those that were mixed, side by side.
    received = by_state.permute(2, 0, 1, 3).repeat(1, 1, 2, 1)
    sums, feedback = [], []
    for index in range(len(mlp.layers) - 1, -1, -1):
        neurons, activation, group = mlp.layers[index], activations[index], groups[index]
        prediction = torch.zeros_like(activation.output)
        if neurons.has_predictor:
            prediction = trained_batch * neurons.predict(activation)
        prediction = prediction.transpose(0, 1).unsqueeze(2)  # [W, K, 1, N]
        slope = torch.ones_like(prediction)
        if mlp.is_residual(index):
            slope = 1 - torch.tanh(activation.output).square().transpose(0, 1).unsqueeze(2)
        chosen = group.neurons
        b, w = (received[chosen] * slope[chosen]).split(num_outcomes, dim=2)
        s = (prediction[chosen] * slope[chosen]).expand_as(w)
        seen = Seen.of(activation, neurons.scale, chosen)
        sums.append(
            _sums(seen, w, s, b, group.mixing_weight.view(-1, 1, 1, 1), probabilities, weights)
        )
        mean = torch.einsum("jkon,ko->jkn", received[chosen][:, :, :num_outcomes], probabilities)
        feedback.append(
            Feedback(seen.inputs, seen.attention, mean, mean, prediction[chosen].squeeze(2))
        )
        if index:
            share = neurons.mixing_weight.view(-1, 1, 1, 1)
            passed = received.clone()
            passed[:, :, num_outcomes:].lerp_(
                prediction.expand_as(passed[:, :, num_outcomes:]), 1 - share
            )
            everyone = Seen.of(activation, neurons.scale)
            read = backward_to_inputs(neurons, everyone, passed * slope)
            received = scatter(read, mlp.parents[index - 1], mlp.neuron_size)
            if mlp.is_residual(index):
                received += passed
    return sums[::-1], feedback[::-1]


def _sums(
    seen: Seen,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    mixing_weight: Tensor,
    probabilities: Tensor,
    weights: Tensor,
) -> Sums:
    """Sums over K samples with O outcomes each.

    Args:
        seen: of the samples.
        w, s, b: received, synthetic and backprop's feedback of the output [J, K, O, N].
        mixing_weight: broadcast against them.
        probabilities: of the outcomes [K, O].
        weights: of the samples [K].
    """
    kinds = torch.stack([w, s, s + mixing_weight * (w - s), b], dim=3)  # [J, K, O, 4, N]
    directions = torch.stack([unit(w), unit(s)], dim=3)
    matrix = isometry(seen).unsqueeze(2)

    def sums(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = torch.einsum("jkoan,ko->jkan", vectors, probabilities)
        gradients = [parameter_gradients(seen, part, weights) for part in means.unbind(2)]
        images = vectors @ matrix
        weighted = images * (probabilities * weights.unsqueeze(1)).view(*w.shape[1:3], 1, 1)
        products = weighted.flatten(1, 2).permute(0, 2, 1, 3).flatten(2)
        products = products @ images.flatten(1, 2).permute(0, 2, 1, 3).flatten(2).transpose(1, 2)
        image_means = torch.einsum("jkoac,ko->jkac", images, probabilities)
        between = torch.einsum("jkac,jkbc,k->jab", image_means, image_means, weights)
        return torch.stack(gradients), products.double(), between.double()

    gradients, products, between = sums(kinds)
    unit_gradients, unit_products, _ = sums(directions)
    total = float(weights.sum())
    return Sums(total, gradients, products, products - between, unit_gradients, unit_products)


# ---------------------------------------------------------------- the recurrent network


class Episodes(NamedTuple):
    """K whole episodes of T steps; after its end an episode's last observation is repeated.

    (In a training batch zeros follow once all episodes have ended. Here an episode's gradient must
    not depend on the others.)
    """

    observations: Tensor  # [T, K, F]
    actions: Tensor  # int64 [T, K]
    returns: Tensor  # discounted, not normalised [T, K]
    mask: Tensor  # bool [T, K], True until the end


class Loss(NamedTuple):
    """What makes an episode's loss a function of that episode alone, and its coefficients."""

    mean: float = 0.0  # of the returns, over valid steps of the large sample
    std: float = 1.0
    steps: float = 1.0  # mean number of valid steps of its episodes
    entropy_coeff: float = UpdateSettings.entropy_coeff

    @classmethod
    def of(cls, samples: Sequence[Episodes]) -> Loss:
        """Normalisation by all episodes of the large sample."""
        valid = torch.cat([episodes.returns[episodes.mask] for episodes in samples]).double()
        count = sum(episodes.mask.shape[1] for episodes in samples)
        return cls(float(valid.mean()), float(valid.std(correction=0)), len(valid) / count)

    def by_states(self, policy: SparseNetPolicy, states: Tensor, episodes: Episodes) -> Tensor:
        """Gradient of every episode's loss by the core's states [T, K, W*N], through the actor."""
        advantages = (episodes.returns.double() - self.mean) / (self.std + 1e-8)
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            log_probs = policy.actor(states).log_softmax(2)
            chosen = log_probs.gather(2, episodes.actions.unsqueeze(2)).squeeze(2)
            entropy = -(log_probs.exp() * log_probs).sum(2)
            terms = chosen * advantages.to(chosen) + self.entropy_coeff * entropy
            loss = -torch.where(episodes.mask, terms, 0.0).sum() / self.steps
            return torch.autograd.grad(loss, states)[0]


class Unrolled(NamedTuple):
    """Feedback of every neuron at every step [T, W, K, N], and what it computed."""

    kept: Tensor  # the neurons whose inputs were kept, sorted
    activations: list[Activation]  # [K, W, ...], one a step; inputs of those neurons only
    received: Tensor
    synthetic: Tensor
    mixed: Tensor
    backprop: Tensor

    def seen(self, steps: Sequence[int], chosen: Tensor, scale: float) -> Seen:
        """Of the chosen neurons, K samples of each step after the other: [J, T * K, ...]."""
        of_inputs = torch.searchsorted(self.kept, chosen)
        parts = zip(*(self.activations[t] for t in steps), strict=True)
        places = (of_inputs, chosen, chosen, chosen)
        joined = [
            torch.cat([value[:, place] for value in part])
            for part, place in zip(parts, places, strict=True)
        ]
        return Seen.of(Activation(*joined), scale)

    def of_episodes(self, part: slice) -> Unrolled:
        """The same of some of the episodes."""
        return Unrolled(
            self.kept,
            [Activation(*(value[part] for value in a)) for a in self.activations],
            *(value[:, :, part] for value in self[2:]),
        )


@torch.no_grad()
def unroll(
    policy: SparseNetPolicy, episodes: Episodes, loss: Loss, trained_batch: int, kept: Tensor
) -> Unrolled:
    """Forward and both backward passes, with and without mixing, over K episodes.

    `kept` are the neurons whose inputs are kept; all those of all steps would fill the memory.
    """
    rnn, neurons = policy.core, policy.core.neurons
    num_neurons, size = neurons.num_neurons, neurons.neuron_size
    embeddings = policy.encoder(episodes.observations)
    length, count = episodes.mask.shape
    h = rnn.initial_state(count).view(count, num_neurons, size)
    activations, predictions = [], []
    for x in embeddings.unbind():
        activation = neurons(neurons.read(h, rnn.parents, x))
        h = activation.output
        predictions.append(torch.zeros_like(h))
        if neurons.has_predictor:
            predictions[-1] = trained_batch * neurons.predict(activation)
        activations.append(activation._replace(inputs=activation.inputs[:, kept]))
    states = torch.stack([activation.output for activation in activations])
    by_states = loss.by_states(policy, states.flatten(2), episodes).unflatten(
        2, (num_neurons, size)
    )
    by_states = by_states.permute(0, 2, 1, 3)  # [T, W, K, N]
    schedule = rnn.schedule(length)
    received, synthetic, mixed, backprop = (torch.empty_like(by_states) for _ in range(4))
    carried = by_states.new_zeros(num_neurons, count, 2, size)
    for t in range(length - 1, -1, -1):
        g, b = (by_states[t].unsqueeze(2) + carried).unbind(2)
        s = predictions[t].transpose(0, 1)
        if neurons.has_predictor and rnn.rule.positive_projection:
            s = positive_projection(g, s)
        if rnn.mask_predictions:
            s = torch.where(episodes.mask[t].view(1, -1, 1), s, g)
        received[t], synthetic[t], backprop[t] = g, s, b
        mixed[t] = s + schedule[t].view(-1, 1, 1) * (g - s)
        seen = Seen.of(activations[t], neurons.scale)
        read = backward_to_inputs(neurons, seen, torch.stack([mixed[t], b], dim=2))
        carried = scatter(read, rnn.parents, size)
    return Unrolled(kept, activations, received, synthetic, mixed, backprop)


class Shard(NamedTuple):
    """Episodes, and for each reported step a replicate of them that shares what came before it."""

    episodes: Episodes
    replicates: dict[int, Episodes]

    def chunks(self) -> Iterator[Shard]:
        """Few episodes at a time."""
        for start in range(0, self.episodes.mask.shape[1], CHUNK_EPISODES):
            part = slice(start, start + CHUNK_EPISODES)
            yield Shard(
                Episodes(*(value[:, part] for value in self.episodes)),
                {t: Episodes(*(v[:, part] for v in e)) for t, e in self.replicates.items()},
            )


def labyrinth_sums(
    policy: SparseNetPolicy,
    shard: Shard,
    loss: Loss,
    groups: Sequence[Group],
    trained_batch: int,
    weights: Tensor | None = None,
) -> tuple[list[Sums], list[Feedback | None]]:
    """Sums over episodes, for each group: neurons at one step, or over all steps.

    Args:
        policy: under backprop it has no predictions, and s is 0.
        shard: K episodes.
        loss: normalisation, the same for all shards.
        groups: see `Group`; those of one step need the step's replicate for `Sums.noise`, without
            which, and over all steps, it is NaN.
        trained_batch: see `probe`.
        weights: of the episodes [K], as a population's probabilities; ones if None.

    `Sums.noise` is the covariance given all that happened before the step's action (the episode's
    observations so far, and in explore also which rewards will be withheld): less than given the
    local observation only, since what is conditioned on includes it.

    Feedback is that of groups over all steps, at the steps that have replicates, while episodes
    last.
    """
    if weights is None:
        weights = shard.episodes.observations.new_ones(shard.episodes.mask.shape[1])
    chunks = zip(shard.chunks(), weights.split(CHUNK_EPISODES), strict=True)
    parts = [_labyrinth_chunk(policy, *chunk, loss, groups, trained_batch) for chunk in chunks]
    sums, feedback = zip(*parts, strict=True)
    return (
        [Sums(*map(sum, zip(*of_group, strict=True))) for of_group in zip(*sums, strict=True)],
        [
            None
            if of_group[0] is None
            else Feedback(*(torch.cat(part, dim=1) for part in zip(*of_group, strict=True)))
            for of_group in zip(*feedback, strict=True)
        ],
    )


def _labyrinth_chunk(
    policy: SparseNetPolicy,
    shard: Shard,
    weights: Tensor,
    loss: Loss,
    groups: Sequence[Group],
    trained_batch: int,
) -> tuple[list[Sums], list[Feedback | None]]:
    scale, schedule = policy.core.neurons.scale, policy.core.schedule(len(shard.episodes.mask))
    kept = torch.cat([group.neurons for group in groups]).unique()
    # All at once: it takes hardly longer.
    everything = (shard.episodes, *shard.replicates.values())
    joined = Episodes(*(torch.cat(part, dim=1) for part in zip(*everything, strict=True)))
    unrolled = unroll(policy, joined, loss, trained_batch, kept)
    first, *others = (
        unrolled.of_episodes(slice(start, start + len(weights)))
        for start in range(0, joined.mask.shape[1], len(weights))
    )
    second = dict(zip(shard.replicates, others, strict=True))
    one = weights.new_ones(len(weights), 1)
    sums: list[Sums] = []
    feedback: list[Feedback | None] = []
    for group in groups:
        chosen, t = group.neurons, group.step
        if t is None:
            sums.append(_totals(first, shard.episodes.mask, group, scale, weights, loss))
            feedback.append(_pairs(first, second, shard.episodes.mask, chosen, scale))
            continue
        kinds = [
            [of_kind[t, chosen].unsqueeze(2) for of_kind in (u.received, u.synthetic, u.backprop)]
            for u in (first, *(second[t],) * (t in second))
        ]
        seen = first.seen([t], chosen, scale)
        share = schedule[t, chosen].view(-1, 1, 1, 1)
        how = {"mixing_weight": share, "probabilities": one, "weights": weights}
        at_step = _sums(seen, *kinds[0], **how)
        noise = torch.full_like(at_step.noise, math.nan)
        if t in second:
            difference = [a - b for a, b in zip(*kinds, strict=True)]
            noise = _sums(seen, *difference, **how).products / 2
        sums.append(at_step._replace(noise=noise))
        feedback.append(None)
    return sums, feedback


def _totals(
    unrolled: Unrolled, mask: Tensor, group: Group, scale: float, weights: Tensor, loss: Loss
) -> Sums:
    """Sums over episodes of parameter gradients summed over time, formed one by one."""
    length, count = mask.shape
    chosen = group.neurons
    seen = unrolled.seen(range(length), chosen, scale)
    num_slots = seen.attention.shape[2]
    inputs = seen.inputs.unflatten(1, (length, count)).transpose(1, 2)  # [J, K, T, I]

    def of_episodes(feedback: Tensor) -> Tensor:  # [T, J, K, N] -> [J, K, D]
        rows = row_gradients(seen, feedback.transpose(0, 1).flatten(1, 2).unsqueeze(2)).squeeze(2)
        rows = rows.unflatten(1, (length, count)).transpose(1, 2)
        of_weights = rows.transpose(2, 3) @ inputs
        return torch.cat([of_weights.flatten(2), rows[..., num_slots:].sum(2)], dim=2)

    def products(gradients: Tensor) -> Tensor:
        return torch.einsum("ajkd,bjkd,k->jab", gradients, gradients, weights).double()

    kinds = (unrolled.received, unrolled.synthetic, unrolled.mixed, unrolled.backprop)
    gradients = torch.stack([of_episodes(kind[:, chosen]) for kind in kinds])
    valid = mask.view(length, 1, count, 1)
    directions = [torch.where(valid, unit(kind[:, chosen]), 0.0) for kind in kinds[:2]]
    unit_gradients = torch.stack([of_episodes(direction) for direction in directions])
    # In the estimate of lambda every valid step is a sample of its own.
    lengths = [d.transpose(0, 1).flatten(1, 2).unsqueeze(2) for d in directions]
    images = torch.stack([d @ isometry(seen) for d in lengths]).squeeze(3)
    of_steps = weights.repeat(length)
    return Sums(
        float(weights.sum()),
        torch.einsum("ajkd,k->ajd", gradients, weights),
        products(gradients),
        torch.full((len(chosen), 4, 4), math.nan, dtype=torch.float64),
        torch.einsum("ajkd,k->ajd", unit_gradients, weights) / loss.steps,
        torch.einsum("ajkc,bjkc,k->jab", images, images, of_steps).double() / loss.steps,
    )


def _pairs(
    first: Unrolled, second: dict[int, Unrolled], mask: Tensor, chosen: Tensor, scale: float
) -> Feedback | None:
    if not second:
        return None
    parts = []
    for t, replicate in second.items():
        seen, valid = first.seen([t], chosen, scale), mask[t]
        vectors = (first.backprop, replicate.backprop, first.synthetic)
        at_step = (seen.inputs, seen.attention, *(vector[t, chosen] for vector in vectors))
        parts.append([value[:, valid] for value in at_step])
    return Feedback(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def play(policy: SparseNetPolicy, env: VectorEnv, seeds: Sequence[int], noise: Tensor) -> Episodes:
    """Run an episode of each environment; `noise` [T, K, A] are logs of exponential numbers.

    As `Rollout`: an action is argmax(logits - noise).
    """
    length, count = noise.shape[:2]
    observations, rewards = [], []
    actions = torch.zeros(length, count, dtype=torch.int64)
    mask = torch.zeros(length, count, dtype=torch.bool)
    running = np.ones(count, bool)
    current = env.reset(seeds)
    acting = policy.acting(length, count)
    with torch.inference_mode():
        for t in range(length):
            observations.append(torch.from_numpy(current).to(noise))
            actions[t] = (acting.step(observations[t]) - noise[t]).argmax(-1)
            mask[t] = torch.from_numpy(running)
            step = env.step(actions[t].numpy())
            current = step.observations
            rewards.append(torch.from_numpy(step.rewards))
            running = running & ~(step.terminated | step.truncated)
    returns = discounted_returns(torch.stack(rewards), mask, UpdateSettings.gamma)
    return Episodes(torch.stack(observations).clone(), actions, returns, mask)


def labyrinth_shard(
    policy: SparseNetPolicy,
    env: str,
    env_config: dict,
    steps: Sequence[int],
    seed: int,
    size: int,
    shard: int,
) -> Shard:
    """Play one shard of the sample, with a replicate for each step.

    A replicate has the same mazes and the same actions before the step, then actions of its own.
    """
    generator = np.random.default_rng([seed, shard])
    vector = make_vector(env, size, env_config)
    seeds = generator.integers(EVALUATION_SEED_OFFSET, size=size).tolist()
    draws = torch.Generator().manual_seed(int(generator.integers(2**32)))
    dtype = next(policy.parameters()).dtype

    def noise() -> Tensor:
        shape = vector.episode_length, size, policy.num_actions
        return torch.empty(shape, dtype=dtype).exponential_(generator=draws).log_()

    shared = noise()
    episodes = play(policy, vector, seeds, shared)
    replicates = {}
    for t in steps:
        replicates[t] = play(policy, vector, seeds, torch.cat([shared[:t], noise()[t:]]))
    return Shard(episodes, replicates)


# ---------------------------------------------------------------- from sums to numbers


class Moments(NamedTuple):
    """Moments of the kinds of gradients, for J neurons; before J the bootstrap's resamples."""

    of_means: Tensor  # <E a, E b> [..., J, 4, 4]
    products: Tensor  # E <a, b>
    noise: Tensor  # E of the covariance given the observation
    unit_of_means: Tensor  # [..., J, 2, 2]
    unit_products: Tensor


def moments(shards: Sequence[Sums], counts: Tensor | None = None) -> Moments:
    """Moments from the shards of a sample.

    Args:
        shards: their sums.
        counts: how often each shard occurs in each resample [R, shards]; ones if None. A single
            shard is taken to be the whole population, whose moments are exact.

    Returns:
        With a first axis of R; R = 1 if `counts` is None.
    """
    if counts is None:
        counts = torch.ones(1, len(shards), dtype=torch.float64)
    mass = counts * torch.tensor([shard.weight for shard in shards], dtype=torch.float64)
    share = mass / mass.sum(1, keepdim=True)

    def mean(parts: list[Tensor]) -> Tensor:
        means = [part / shard.weight for part, shard in zip(parts, shards, strict=True)]
        return torch.tensordot(share, torch.stack(means), dims=1)

    def of_means(parts: list[Tensor]) -> Tensor:
        means = [part / shard.weight for part, shard in zip(parts, shards, strict=True)]
        products = []
        for j in range(means[0].shape[1]):  # a neuron at a time: in double precision they are big
            flat = torch.stack([m[:, j] for m in means]).double().flatten(0, 1)
            products.append(
                (flat @ flat.T).unflatten(1, (len(means), -1)).unflatten(0, (len(means), -1))
            )
        gram = torch.stack(products).permute(1, 3, 0, 2, 4)  # [shard, shard, J, a, b]
        pairs = share.unsqueeze(2) * share.unsqueeze(1)  # [R, shard, shard]
        if len(means) > 1:
            pairs = pairs * (1 - torch.eye(len(means), dtype=torch.float64))
        pairs = pairs / pairs.sum((1, 2), keepdim=True)
        return torch.tensordot(pairs, gram, dims=2)

    return Moments(
        of_means([shard.gradients for shard in shards]),
        mean([shard.products for shard in shards]),
        mean([shard.noise for shard in shards]),
        of_means([shard.unit_gradients for shard in shards]),
        mean([shard.unit_products for shard in shards]),
    )


def best_mixing_weight(
    var_w: Tensor, cov_ws: Tensor, var_s: Tensor, bias_u: Tensor, u_square: Tensor, n: float
) -> Tensor:
    """Equation 18, clipped; 1 where u is 0.

    Args:
        var_w, cov_ws, var_s: (co)variances of w and s, summed over parameters.
        bias_u: <E[w] - g*, E[u]>.
        u_square: |E[u]|^2.
        n: samples.
    """
    numerator = (cov_ws - var_w) / n + bias_u
    denominator = (var_s - 2 * cov_ws + var_w) / n + u_square
    # As in `estimation.optimal_mixing_weight`: nothing but rounding.
    known = denominator > (var_w.abs() + var_s.abs() + u_square.abs()) * 1e-14
    ratio = numerator / denominator.where(known, torch.ones_like(denominator))
    return (1 + ratio).clamp(0, 1).where(known, torch.ones_like(ratio))


def neuron_numbers(m: Moments, num_samples: int, group: Group) -> dict[str, Tensor]:
    """The numbers of each neuron, [..., J] each; docs/theory.md says what they are."""
    n = num_samples
    covariance = m.products - m.of_means

    def bias(kind: int) -> Tensor:
        mean = m.of_means
        return mean[..., kind, kind] - 2 * mean[..., kind, B] + mean[..., B, B]

    def variance(kind: int) -> Tensor:
        return covariance[..., kind, kind]

    mean_u = m.of_means[..., S, :] - m.of_means[..., W, :]  # <E u, E of each kind>
    bias_u = mean_u[..., W] - mean_u[..., B]
    u_square = mean_u[..., S] - mean_u[..., W]
    best = best_mixing_weight(variance(W), covariance[..., W, S], variance(S), bias_u, u_square, n)
    rest = 1 - best
    best_variance = (
        best.square() * variance(W)
        + 2 * best * rest * covariance[..., W, S]
        + rest.square() * variance(S)
    )
    best_bias = bias(W) + 2 * rest * bias_u + rest.square() * u_square
    unit_covariance = m.unit_products - m.unit_of_means
    unit_mean = m.unit_of_means
    best_unit = best_mixing_weight(
        unit_covariance[..., 0, 0],
        unit_covariance[..., 0, 1],
        unit_covariance[..., 1, 1],
        torch.zeros_like(u_square),  # its target is E[w] itself
        unit_mean[..., 1, 1] - 2 * unit_mean[..., 0, 1] + unit_mean[..., 0, 0],
        n * group.unit_samples,
    )
    if group.step is not None:  # lambda is learned from all steps together
        best_unit = torch.full_like(best, math.nan)
    learned = group.mixing_weight.double().expand_as(best)
    alignment = {}
    for kind, name in ((B, "backprop"), (M, "sgprop"), (S, "synthetic")):
        alignment[f"along_{name}"] = m.of_means[..., kind, B]
        alignment[f"square_{name}"] = variance(kind) / n + m.of_means[..., kind, kind]
    return {
        "target_square": m.of_means[..., B, B],
        "mse_backprop": variance(B) / n,
        "mse_sgprop": variance(M) / n + bias(M),
        "mse_best": best_variance / n + best_bias,
        "mse_synthetic": variance(S) / n + bias(S),
        "ecv_backprop": m.noise[..., B, B],
        "vcm_backprop": variance(B) - m.noise[..., B, B],
        "ecv_sgprop": m.noise[..., M, M],
        "vcm_sgprop": variance(M) - m.noise[..., M, M],
        "bias_square_sgprop": bias(M),
        "bias_square_synthetic": bias(S),
        "mixing_weight": learned,
        "best_mixing_weight": best,
        "best_unit_mixing_weight": best_unit,
        "distance": (learned - best_unit).abs(),
        **alignment,
    }


# ---------------------------------------------------------------- condition B


class Explained(NamedTuple):
    """Sums behind the explained shares, of each shard of the test half, [shards, J] each.

    The share that a guess f explains of the variance of the received gradient's conditional mean
    is 1 - error / total.
    """

    total: Tensor  # <g1 - mean, g2 - mean>, g1 and g2 replicates
    error: Tensor  # <g1 - f, g2 - f>, f the regression fitted on the other half
    predictor_error: Tensor  # f the trained predictor


def explain(shards: Sequence[Feedback]) -> Explained:
    """How well a neuron's own inputs tell the gradient that it will receive.

    A ridge regression in what a predictor can compute, the attention a_m and the routed inputs
    a_m x, fitted on every second shard: the penalty is the one of `PENALTIES` that does best on a
    fourth of these. The other shards test it. Both sides of the products are replicates that share
    what is conditioned on and nothing else, so that noise counts in neither: what is left is an
    estimate of a lower bound, since other functions of the inputs may tell more.
    """
    training, test = shards[::2], shards[1::2]
    result = []
    for j in range(len(shards[0].inputs)):
        features = [_features(shard, j) for shard in training]
        targets = [(shard.first[j] + shard.second[j]).double() / 2 for shard in training]
        held_out = range(3, len(training), 4)
        kept = [k for k in range(len(training)) if k not in held_out]
        fits = _ridge([features[k] for k in kept], [targets[k] for k in kept], PENALTIES)
        losses = [
            sum(float((targets[k] - fit(features[k])).square().sum()) for k in held_out)
            for fit in fits
        ]
        penalty = PENALTIES[int(np.argmin(losses))]
        (fit,) = _ridge(features, targets, (penalty,))
        pairs = [(shard.first[j].double(), shard.second[j].double()) for shard in test]
        mean = torch.cat([(a + b) / 2 for a, b in pairs]).mean(0)
        guesses = [
            (mean.expand_as(a), fit(_features(shard, j)), shard.prediction[j].double())
            for shard, (a, _) in zip(test, pairs, strict=True)
        ]
        result.append(
            [
                [float(((a - guess) * (b - guess)).sum()) for guess in of_shard]
                for of_shard, (a, b) in zip(guesses, pairs, strict=True)
            ]
        )
    return Explained(*torch.tensor(result, dtype=torch.float64).permute(2, 1, 0))


def _features(shard: Feedback, j: int) -> Tensor:
    """[K, M * (I + 1)]; the attention sums to 1, so that x itself and a constant are among them."""
    inputs, attention = shard.inputs[j].double(), shard.attention[j].double()
    inputs = torch.nn.functional.pad(inputs, (0, 1), value=1.0)
    return (attention.unsqueeze(2) * inputs.unsqueeze(1)).flatten(1)


def _ridge(
    features: Sequence[Tensor], targets: Sequence[Tensor], penalties: Sequence[float]
) -> list[Callable[[Tensor], Tensor]]:
    """Ridge regressions with an intercept, one for each penalty (a share of the mean square)."""
    x, y = torch.cat(list(features)), torch.cat(list(targets))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    values, vectors = torch.linalg.eigh(x.T @ x)
    along = vectors.T @ (x.T @ (y - y_mean))
    unit_penalty = float(values.mean().clamp(min=1e-30))

    def fit(penalty: float) -> Callable[[Tensor], Tensor]:
        coefficients = vectors @ (along / (values.clamp(min=0) + penalty * unit_penalty)[:, None])
        return lambda other: (other - x_mean) @ coefficients + y_mean

    return [fit(penalty) for penalty in penalties]


# ---------------------------------------------------------------- the whole probe


class Report(NamedTuple):
    """What the probe found; rows are columns by name, see docs/theory.md."""

    neurons: list[dict[str, object]]
    layers: list[dict[str, object]]
    samples: int
    batch_size: int
    predictors: bool  # False: a policy under backprop, which nothing can be mixed in from


def check_settings(
    policy: Policy,
    env: str,
    samples: int | None = None,
    batch_size: int | None = None,
    trained_batch: int | None = None,
    neurons: int = 20,
    seed: int = 0,
    parallel: int = 1,
) -> tuple[int, int, int]:
    """Check what `probe` takes; returns samples, batch_size and trained_batch, filled in.

    Raises:
        TheoryError: another kind of policy, or settings that make no sense.
    """
    recurrent = isinstance(policy, SparseNetPolicy) and env.startswith("labyrinth")
    if not recurrent and not (isinstance(policy, SparseMLPPolicy) and env == "mnist_bandit"):
        raise TheoryError(
            "the probe is for sparse_mlp on mnist_bandit and sparsenet on a labyrinth; "
            f"this is {policy.name} on {env}"
        )
    if not policy.core_is_plain() or not (recurrent or is_plain(policy.actor, ActionHead)):
        raise TheoryError(
            f"the probe computes the gradients of {policy.name} as it is published; this one, a "
            f"{type(policy).__name__}, computes in another way"
        )
    samples = (960 if recurrent else 4800) if samples is None else samples
    trained_batch = (20 if recurrent else 64) if trained_batch is None else trained_batch
    batch_size = trained_batch if batch_size is None else batch_size
    for name, value, least in (
        ("samples", samples, 2 * NUM_SHARDS),
        ("trained batch", trained_batch, 1),
        ("batch size", batch_size, 1),
        ("neurons", neurons, 0),
        ("seed", seed, 0),
        ("parallel", parallel, 1),
    ):
        if value < least:
            raise TheoryError(f"{name} must be at least {least}, got {value}")
    return samples, batch_size, trained_batch


def probe(
    policy: Policy,
    env: str,
    env_config: dict | None = None,
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    trained_batch: int | None = None,
    neurons: int = 20,
    seed: int = 0,
    parallel: int = 1,
    advance: Callable[[], object] = lambda: None,
) -> Report:
    """Measure the estimation error of a policy's gradients on its task.

    Args:
        policy: a `sparse_mlp` on the bandit, or a `sparsenet` on a labyrinth.
        env, env_config: its environment, as trained.
        samples: size of the large sample, rounded up to a multiple of `NUM_SHARDS`.
        batch_size: n, of the estimators whose error is reported; `trained_batch` if None.
        trained_batch: samples that a training loss is the mean of; None: the published 64 images,
            or 20 episodes. Predictors learn gradients of that mean, of which a sample's own is so
            many times as large, and so are the predictions that are reported here.
        neurons: of each layer, drawn at random; 0 stands for all.
        seed: of everything random.
        parallel: with 2 or more, shards are spread over so many Ray tasks at a time; the rows are
            the same.
        advance: called after each of `NUM_SHARDS` shards.

    Raises:
        TheoryError: another kind of policy, or settings that make no sense.
        DataError: MNIST cannot be had.
    """
    settings = check_settings(
        policy, env, samples, batch_size, trained_batch, neurons, seed, parallel
    )
    samples, batch_size, trained_batch = settings
    recurrent = isinstance(policy, SparseNetPolicy)
    size = -(-samples // NUM_SHARDS)
    config = env_config or {}
    with one_thread():
        if recurrent:
            groups, finished = _probe_labyrinth(
                policy, env, config, neurons, trained_batch, seed, size, parallel
            )
        else:
            groups = choose_neurons(policy, neurons, seed)
            same = (policy, config, groups, trained_batch, seed, size)
            pieces = [(*same, shard) for shard in range(NUM_SHARDS)]
            finished = _run(bandit_shard, pieces, parallel)
        sums, feedback = [], []
        for of_sums, of_feedback in finished:
            sums.append(of_sums)
            feedback.append(of_feedback)
            advance()
        generator = np.random.default_rng([seed, NUM_SHARDS])
        counts = resampled_counts(NUM_SHARDS, generator)
        test_counts = resampled_counts(len(range(1, NUM_SHARDS, 2)), generator)
        rows: list[dict[str, object]] = []
        layers: list[dict[str, object]] = []
        predictors = policy.core.propagation == "sgprop"
        for index, group in enumerate(groups):
            of_layer = [of_shard[index] for of_shard in sums]
            numbers = neuron_numbers(moments(of_layer, counts), batch_size, group)
            of_group = [of_shard[index] for of_shard in feedback]
            explained = (
                None
                if of_group[0] is None
                else explain([part for part in of_group if part is not None])
            )
            of_neurons, of_all = summarise(numbers, explained, test_counts, predictors)
            place: dict[str, object] = {"layer": group.layer}
            if recurrent:
                place["step"] = "all" if group.step is None else str(group.step)
            for neuron, row in zip(group.neurons.tolist(), of_neurons, strict=True):
                rows.append({**place, "neuron": neuron, **row})
            layers.append({**place, "neurons": len(group.neurons), **of_all})
    return Report(rows, layers, size * NUM_SHARDS, batch_size, predictors)


def _probe_labyrinth(
    policy: SparseNetPolicy,
    env: str,
    env_config: dict,
    neurons: int,
    trained_batch: int,
    seed: int,
    size: int,
    parallel: int,
) -> tuple[list[Group], Iterator[tuple[list[Sums], list[Feedback | None]]]]:
    """First all episodes are played, whose returns then normalise the loss of each."""
    length = make_vector(env, 1, env_config).episode_length
    steps = sorted({int(length * share) for share in STEP_SHARES})
    pieces = [(policy, env, env_config, steps, seed, size, shard) for shard in range(NUM_SHARDS)]
    shards = list(_run(labyrinth_shard, pieces, parallel))
    loss = Loss.of([shard.episodes for shard in shards])
    groups = choose_recurrent_neurons(policy, neurons, seed, steps, length, loss.steps)
    work = [(policy, shard, loss, groups, trained_batch) for shard in shards]
    return groups, _run(labyrinth_sums, work, parallel)


def choose_recurrent_neurons(
    policy: SparseNetPolicy,
    count: int,
    seed: int,
    steps: Sequence[int],
    length: int,
    valid_steps: float,
) -> list[Group]:
    """Random neurons of those that read the embedding ("input") and of the others ("hidden"):
    each over all steps, then at each of `steps`."""
    generator = torch.Generator().manual_seed(seed)
    rnn = policy.core
    num_input = rnn.neurons.num_input_neurons
    schedule = rnn.schedule(length)
    groups = []
    for layer, first, last in (("input", 0, num_input), ("hidden", num_input, rnn.num_neurons)):
        order = first + torch.randperm(last - first, generator=generator)
        chosen = order[: count or None].sort().values
        if not len(chosen):
            continue
        learned = rnn.neurons.mixing_weight[chosen].clone()
        groups.append(Group(layer, chosen, learned, None, valid_steps))
        groups += [Group(layer, chosen, schedule[t, chosen], t) for t in steps]
    return groups


def fresh_policy(policy: Policy, seed: int) -> Policy:
    """A policy of the same kind and settings with initial weights and connections of its own."""
    return make_policy(
        policy.name,
        policy.observation_size,
        policy.num_actions,
        seed=seed,
        dtype=next(policy.parameters()).dtype,
        **asdict(policy.settings),
    )


def choose_neurons(policy: SparseMLPPolicy, count: int, seed: int) -> list[Group]:
    """Random neurons of each layer, in their order; all of them where `count` is 0 or too many."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for index, neurons in enumerate(policy.core.layers):
        order = torch.randperm(neurons.num_neurons, generator=generator)
        chosen = order[: count or None].sort().values
        groups.append(Group(str(index), chosen, neurons.mixing_weight[chosen].clone()))
    return groups


def _run(function: Callable[..., Any], pieces: Sequence[tuple], parallel: int) -> Iterator[Any]:
    if parallel > 1:
        yield from in_ray(function, pieces, parallel)
        return
    for piece in pieces:
        yield function(*piece)


def bandit_shard(
    policy: SparseMLPPolicy,
    env_config: dict,
    groups: Sequence[Group],
    trained_batch: int,
    seed: int,
    size: int,
    shard: int,
) -> tuple[list[Sums], list[Feedback]]:
    """One shard of the sample: so many images of the training environment."""
    generator = np.random.default_rng([seed, shard])
    env = make_vector("mnist_bandit", size, env_config)
    seeds = generator.integers(2**63, size=size).tolist()
    right = np.zeros(size, np.int64)
    for action in range(env.num_actions):  # the environment tells which guess is right
        images = env.reset(seeds)
        right[env.step(np.full(size, action))[2]] = action
    dtype = next(policy.parameters()).dtype
    p_flip = validate_env_config("mnist_bandit", env_config)["p_flip"]
    return bandit_sums(
        policy,
        torch.from_numpy(images).to(dtype),
        torch.from_numpy(right),
        p_flip,
        groups,
        trained_batch,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a Ray task: sums do not depend on how many processors there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resampled_counts(shards: int, generator: np.random.Generator) -> Tensor:
    """How often each shard is drawn in each resample [1 + RESAMPLES, shards]; first, once each."""
    drawn = generator.multinomial(shards, np.full(shards, 1 / shards), size=RESAMPLES)
    return torch.from_numpy(np.concatenate([np.ones((1, shards), np.int64), drawn])).double()


#: Columns about synthetic gradients: empty under backprop.
SGPROP_COLUMNS = (
    "mse_sgprop",
    "mse_best",
    "mse_synthetic",
    "ecv_sgprop",
    "vcm_sgprop",
    "ecv_share_sgprop",
    "bias_square_sgprop",
    "bias_square_synthetic",
    "mixing_weight",
    "best_mixing_weight",
    "best_unit_mixing_weight",
    "distance",
    "sgprop_to_backprop",
    "best_to_backprop",
    "synthetic_to_backprop",
    "alignment_sgprop",
    "alignment_synthetic",
    "predictor_explained",
)


def summarise(
    numbers: dict[str, Tensor], explained: Explained | None, test_counts: Tensor, predictors: bool
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Rows of a layer's neurons, and the layer's own: each number with its interval.

    Args:
        numbers: [1 + RESAMPLES, J] each; a layer's are means over its neurons.
        explained: see `explain`; None where it was not measured.
        test_counts: resamples of its shards.
        predictors: whether the policy has any.
    """
    layer = {name: values.mean(1, keepdim=True) for name, values in numbers.items()}
    sums = None if explained is None else [test_counts @ part for part in explained]
    both = []
    for table in (numbers, layer):
        for name in ("sgprop", "best", "synthetic"):
            table[f"{name}_to_backprop"] = table[f"mse_{name}"] / table["mse_backprop"]
        for name in ("backprop", "sgprop"):
            ecv = table[f"ecv_{name}"]
            table[f"ecv_share_{name}"] = ecv / (ecv + table[f"vcm_{name}"])
        for name in ("backprop", "sgprop", "synthetic"):
            along, square = table.pop(f"along_{name}"), table.pop(f"square_{name}")
            # Not known (NaN) where chance makes a squared length negative.
            table[f"alignment_{name}"] = along / (table["target_square"] * square).sqrt()
        if sums is None:
            unknown = torch.full_like(table["mse_backprop"], math.nan)
            table["explained"] = table["predictor_explained"] = unknown
        else:
            parts = sums if table is numbers else [part.sum(1, keepdim=True) for part in sums]
            total, error, predictor_error = parts
            table["explained"] = 1 - error / total
            table["predictor_explained"] = 1 - predictor_error / total
        both.append(_rows(table, predictors))
    return both[0], both[1][0]


def _rows(table: dict[str, Tensor], predictors: bool) -> list[dict[str, object]]:
    tail = (1 - CONFIDENCE) / 2
    rows: list[dict[str, object]] = [{} for _ in next(iter(table.values()))[0]]
    for name, values in table.items():
        known = predictors or name not in SGPROP_COLUMNS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # columns without any number
            low, high = np.nanquantile(values[1:].numpy(), [tail, 1 - tail], axis=0)
        for j, row in enumerate(rows):
            row[name] = float(values[0, j]) if known else math.nan
            if name != "mixing_weight":
                row[f"{name}_ci_low"] = float(low[j]) if known else math.nan
                row[f"{name}_ci_high"] = float(high[j]) if known else math.nan
    return rows
