"""Sums over episodes of a labyrinth, for the recurrent network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sgrl.envs.registry import VectorEnv, make_vector
from sgrl.nn.mixing import unit
from sgrl.nn.neuron import Activation
from sgrl.nn.registry import SparseNetPolicy
from sgrl.nn.sgprop import mix
from sgrl.reinforce.loss import discounted_returns
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET
from sgrl.reinforce.update import UpdateSettings
from sgrl.theory.probe.gradients import (
    Feedback,
    Group,
    Seen,
    Sums,
    backward_to_inputs,
    isometry,
    row_gradients,
    scatter,
    sums_over_samples,
)
from sgrl.theory.probe.noise import noise_of, noise_seeds

#: Episodes worked on at once; no result depends on it but for rounding.
CHUNK_EPISODES = 10


def choose_recurrent_neurons(
    policy: SparseNetPolicy,
    count: int,
    seed: int,
    steps: Sequence[int],
    length: int,
    valid_steps: float,
) -> list[Group]:
    """Draw neurons of those that read the embedding ("input") and of the others ("hidden").

    Each group comes over all steps, then at each of `steps`.
    """
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


class Episodes(NamedTuple):
    """K whole episodes of T steps; after its end an episode's last observation is repeated.

    (In a training batch zeros follow once all episodes have ended. Here an episode's gradient must
    not depend on the others.)
    """

    observations: Float[Tensor, "T K F"]
    actions: Int64[Tensor, "T K"]
    returns: Float[Tensor, "T K"]  # discounted, not normalised
    mask: Bool[Tensor, "T K"]  # True until the end
    seeds: Int64[Tensor, "T K"]  # of the neurons' noise (`noise_of`)


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

    def by_states(
        self, policy: SparseNetPolicy, states: Float[Tensor, "T K H"], episodes: Episodes
    ) -> Float[Tensor, "T K H"]:
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

    kept: Int64[Tensor, " kept"]  # the neurons whose inputs were kept, sorted
    activations: list[Activation]  # [K, W, ...], one a step; inputs of those neurons only
    received: Float[Tensor, "T W K N"]
    synthetic: Float[Tensor, "T W K N"]
    mixed: Float[Tensor, "T W K N"]
    backprop: Float[Tensor, "T W K N"]
    predicted: Float[Tensor, "T W K N"]  # synthetic, before any projection

    def seen(self, steps: Sequence[int], chosen: Int64[Tensor, " J"], scale: float) -> Seen:
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
    policy: SparseNetPolicy,
    episodes: Episodes,
    loss: Loss,
    trained_batch: int,
    kept: Int64[Tensor, " kept"],
) -> Unrolled:
    """Forward and both backward passes, with and without mixing, over K episodes.

    `kept` are the neurons whose inputs are kept; all those of all steps would fill the memory.
    """
    rnn, neurons = policy.core, policy.core.neurons
    num_neurons, size = neurons.num_neurons, neurons.neuron_size
    embeddings = policy.encode(episodes.observations)
    length, count = episodes.mask.shape
    h = rnn.initial_state(count).view(count, num_neurons, size)
    noise = noise_of(policy, episodes.seeds)
    activations, predictions, states = [], [], []
    for t, x in enumerate(embeddings.unbind()):
        activation = neurons(neurons.read(h, rnn.parents, x))
        h = activation.output
        predictions.append(torch.zeros_like(h))
        if neurons.has_predictor:
            predictions[-1] = trained_batch * neurons.predict(activation)
        if noise is not None:
            h = h + neurons.noise_std * noise[t].view_as(h)
        states.append(h)
        activations.append(activation._replace(inputs=activation.inputs[:, kept]))
    by_states = loss.by_states(policy, torch.stack(states).flatten(2), episodes).unflatten(
        2, (num_neurons, size)
    )
    by_states = by_states.permute(0, 2, 1, 3)  # [T, W, K, N]
    schedule = rnn.schedule(length)
    received, synthetic, mixed, backprop = (torch.empty_like(by_states) for _ in range(4))
    carried = by_states.new_zeros(num_neurons, count, 2, size)
    for t in range(length - 1, -1, -1):
        g, b = (by_states[t].unsqueeze(2) + carried).unbind(2)
        weight, valid = schedule[t].view(-1, 1, 1), episodes.mask[t].view(1, -1, 1)
        step = mix(rnn.sgprop, weight, g, predictions[t].transpose(0, 1), valid=valid)
        received[t], synthetic[t], backprop[t] = g, step.substitute, b
        mixed[t] = step.gradient
        seen = Seen.of(activations[t], neurons.scale)
        read = backward_to_inputs(neurons, seen, torch.stack([mixed[t], b], dim=2))
        carried = scatter(read, rnn.parents, size)
    predicted = torch.stack(predictions).transpose(1, 2)
    return Unrolled(kept, activations, received, synthetic, mixed, backprop, predicted)


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
    weights: Float[Tensor, " K"] | None = None,
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
    observations so far, the noise of the neurons before, and in explore also which rewards will be
    withheld): less than given the local observation only, since what is conditioned on includes it.

    Feedback is that of groups over all steps, at the steps that have replicates, while episodes
    last.
    """
    if weights is None:
        weights = shard.episodes.observations.new_ones(shard.episodes.mask.shape[1])
    chunks = zip(shard.chunks(), weights.split(CHUNK_EPISODES), strict=True)
    parts = [_labyrinth_chunk(policy, *chunk, loss, groups, trained_batch) for chunk in chunks]
    sums, feedback = zip(*parts, strict=True)
    return (
        list(map(Sums.total, zip(*sums, strict=True))),
        [
            None if of_group[0] is None else Feedback.joined(of_group)
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
            for u in (first, *([second[t]] if t in second else []))
        ]
        seen = first.seen([t], chosen, scale)
        share = schedule[t, chosen].view(-1, 1, 1, 1)
        how = {"mixing_weight": share, "probabilities": one, "weights": weights}
        at_step = sums_over_samples(seen, *kinds[0], **how)
        noise = torch.full_like(at_step.noise, math.nan)
        if t in second:
            difference = [a - b for a, b in zip(*kinds, strict=True)]
            noise = sums_over_samples(seen, *difference, **how).products / 2
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
    by_neuron = [d.transpose(0, 1).flatten(1, 2).unsqueeze(2) for d in directions]
    mapped = torch.stack([d @ isometry(seen) for d in by_neuron]).squeeze(3)
    of_steps = weights.repeat(length)
    return Sums(
        float(weights.sum()),
        torch.einsum("ajkd,k->ajd", gradients, weights),
        products(gradients),
        torch.full((len(chosen), 4, 4), math.nan, dtype=torch.float64),
        torch.einsum("ajkd,k->ajd", unit_gradients, weights) / loss.steps,
        torch.einsum("ajkc,bjkc,k->jab", mapped, mapped, of_steps).double() / loss.steps,
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


def play(
    policy: SparseNetPolicy,
    env: VectorEnv,
    seeds: Sequence[int],
    noise: Float[Tensor, "T K A"],
    neuron_seeds: Int64[Tensor, "T K"] | None = None,
) -> Episodes:
    """Run an episode of each environment; `noise` [T, K, A] are logs of exponential numbers.

    As `Rollout`: an action is argmax(logits - noise). `neuron_seeds` are of the neurons' noise.
    """
    length, count = noise.shape[:2]
    if neuron_seeds is None:
        neuron_seeds = torch.zeros(length, count, dtype=torch.int64)
    observations, rewards = [], []
    actions = torch.zeros(length, count, dtype=torch.int64)
    mask = torch.zeros(length, count, dtype=torch.bool)
    running = np.ones(count, bool)
    current = env.reset(seeds)
    acting = policy.acting(length, count, noise=noise_of(policy, neuron_seeds))
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
    return Episodes(torch.stack(observations).clone(), actions, returns, mask, neuron_seeds)


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

    A replicate has the same mazes, and the same actions and noise of neurons before the step, then
    of its own.
    """
    generator = np.random.default_rng([seed, shard])
    vector = make_vector(env, size, env_config)
    seeds = generator.integers(EVALUATION_SEED_OFFSET, size=size).tolist()
    draws = torch.Generator().manual_seed(int(generator.integers(2**32)))
    dtype = next(policy.parameters()).dtype

    def noise() -> Tensor:
        shape = vector.episode_length, size, policy.num_actions
        return torch.empty(shape, dtype=dtype).exponential_(generator=draws).log_()

    def neuron_seeds(replicate: int) -> Tensor:
        return noise_seeds(policy, (vector.episode_length, size), [seed, shard, replicate, 1])

    shared = noise(), neuron_seeds(0)
    with contextlib.closing(vector):
        episodes = play(policy, vector, seeds, *shared)
        replicates = {}
        for t in steps:
            own = noise(), neuron_seeds(1 + t)
            both = (torch.cat([a[:t], b[t:]]) for a, b in zip(shared, own, strict=True))
            replicates[t] = play(policy, vector, seeds, *both)
    return Shard(episodes, replicates)
