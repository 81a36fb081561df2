"""Sums over images of the MNIST bandit, for the feed-forward network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sgrl.envs.registry import make_vector, validate_env_config
from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.neuron import Activation
from sgrl.nn.policy import given
from sgrl.nn.registry import SparseMLPPolicy
from sgrl.nn.sgprop import mixture
from sgrl.theory.probe.gradients import (
    Feedback,
    Group,
    Seen,
    Sums,
    backward_to_inputs,
    scatter,
    sums_over_samples,
)
from sgrl.theory.probe.noise import noise_of, noise_seeds

#: Images worked on at once; no result depends on it but for rounding.
CHUNK_IMAGES = 16


class LayerFeedback(NamedTuple):
    """Feedback of a layer's neurons, O gradients for each of K images."""

    layer: int
    activation: Activation  # [K, W, ...]
    received: Float[Tensor, "W K O N"]
    backprop: Float[Tensor, "W K O N"]
    prediction: Float[Tensor, "W K 1 N"]
    slope: Float[Tensor, "W K 1 N"]  # of the residual branch; ones where there is none


def choose_neurons(policy: SparseMLPPolicy, count: int, seed: int) -> list[Group]:
    """Random neurons of each layer, in their order; all of them where `count` is 0 or too many."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for index, neurons in enumerate(policy.core.layers):
        order = torch.randperm(neurons.num_neurons, generator=generator)
        chosen = order[: count or None].sort().values
        groups.append(Group(str(index), chosen, neurons.mixing_weight[chosen].clone()))
    return groups


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
    images, right = bandit_images(env_config, seed, size, shard)
    images = images.to(next(policy.parameters()).dtype)
    p_flip = validate_env_config("mnist_bandit", env_config)["p_flip"]
    seeds = bandit_seeds(policy, seed, size, shard)
    return bandit_sums(policy, images, right, p_flip, groups, trained_batch, None, seeds)


def bandit_seeds(policy: SparseMLPPolicy, seed: int, size: int, shard: int) -> Int64[Tensor, "2 K"]:
    """Seeds of the neurons' noise, of one shard's images and of a replicate of each."""
    return noise_seeds(policy, (2, size), [seed, shard, 0, 1])


def bandit_images(
    env_config: dict, seed: int, size: int, shard: int
) -> tuple[Float[Tensor, "K F"], Int64[Tensor, " K"]]:
    """Images of one shard, float32, and the right action of each."""
    generator = np.random.default_rng([seed, shard])
    env = make_vector("mnist_bandit", size, env_config)
    seeds = generator.integers(2**63, size=size).tolist()
    right = np.zeros(size, np.int64)
    with contextlib.closing(env):
        for action in range(env.num_actions):  # the environment tells which guess is right
            images = env.reset(seeds)
            right[env.step(np.full(size, action)).success] = action
    return torch.from_numpy(images), torch.from_numpy(right)


def bandit_outcomes(
    logits: Float[Tensor, "K A"], right: Int64[Tensor, " K"], p_flip: float
) -> tuple[Float[Tensor, "K A+1"], Float[Tensor, "K A+1 A"]]:
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
    images: Float[Tensor, "K F"],
    right: Int64[Tensor, " K"],
    p_flip: float,
    groups: Sequence[Group],
    trained_batch: int,
    weights: Float[Tensor, " K"] | None = None,
    seeds: Int64[Tensor, "2 K"] | None = None,
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
        seeds: of noisy neurons, from `bandit_seeds`.

    The observation that `Sums.noise` conditions on is the image, and the noise of the layers below,
    which determine everything a neuron sees: where these differ and look the same to it, the ECV is
    larger than that.
    """
    weights = images.new_ones(len(images)) if weights is None else weights
    if seeds is None:
        seeds = torch.zeros(2, len(images), dtype=torch.int64)
    chunks = zip(*(t.split(CHUNK_IMAGES) for t in (images, right, weights, seeds.T)), strict=True)
    parts = [
        _bandit_chunk(
            policy, some, their_right, their_weights, own.T, p_flip, groups, trained_batch
        )
        for some, their_right, their_weights, own in chunks
    ]
    sums, feedback = zip(*parts, strict=True)
    return (
        list(map(Sums.total, zip(*sums, strict=True))),
        list(map(Feedback.joined, zip(*feedback, strict=True))),
    )


def layer_feedback(
    policy: SparseMLPPolicy,
    images: Float[Tensor, "K F"],
    by_logits: Float[Tensor, "K O A"],
    trained_batch: int,
    noise: Float[Tensor, "1 K noise"] | None,
) -> Iterator[LayerFeedback]:
    """Forward and both backward passes, with and without mixing, from the last layer down.

    Args:
        policy: under backprop it has no predictions, and s is 0.
        images: [K, F].
        by_logits: of each image, O gradients of the loss by the logits [K, O, A].
        trained_batch: see `probe`.
        noise: of noisy neurons.
    """
    mlp: SparseMLP = policy.core
    shape = (len(images), len(mlp.layers), mlp.num_neurons, mlp.neuron_size)
    h, activations = policy.encode(images), []
    for index, neurons in enumerate(mlp.layers):
        parents = mlp.parents[index - 1] if index else None
        activation = neurons(
            h[:, mlp.pixels] if parents is None else neurons.read(h, parents, None)
        )
        output = activation.output
        h = torch.tanh(output) + h if mlp.is_residual(index) else output
        if noise is not None:
            h = h + neurons.noise_std * noise.view(shape)[:, index]
        activations.append(activation)
    head, count = policy.actor, by_logits.shape[1]
    by_state = (by_logits @ head.keys * head.scale).unflatten(2, h.shape[1:])
    # Those that were mixed and backprop's [W, K, O, N], side by side.
    received = by_state.permute(2, 0, 1, 3).repeat(1, 1, 2, 1)
    for index in range(len(mlp.layers) - 1, -1, -1):
        neurons, activation = mlp.layers[index], activations[index]
        prediction = torch.zeros_like(activation.output)
        if neurons.has_predictor:
            prediction = trained_batch * neurons.predict(activation)
        prediction = prediction.transpose(0, 1).unsqueeze(2)  # [W, K, 1, N]
        slope = torch.ones_like(prediction)
        if mlp.is_residual(index):
            slope = 1 - torch.tanh(activation.output).square().transpose(0, 1).unsqueeze(2)
        w, b = received.split(count, dim=2)
        yield LayerFeedback(index, activation, w, b, prediction, slope)
        if index:
            share = neurons.mixing_weight.view(-1, 1, 1, 1)
            passed = torch.cat([mixture(share, w, prediction), b], dim=2)
            everyone = Seen.of(activation, neurons.scale)
            read = backward_to_inputs(neurons, everyone, passed * slope)
            received = scatter(read, mlp.parents[index - 1], mlp.neuron_size)
            if mlp.is_residual(index):
                received += passed


def _bandit_chunk(
    policy: SparseMLPPolicy,
    images: Tensor,
    right: Tensor,
    weights: Tensor,
    seeds: Tensor,
    p_flip: float,
    groups: Sequence[Group],
    trained_batch: int,
) -> tuple[list[Sums], list[Feedback]]:
    noise = noise_of(policy, seeds[:1])
    logits = policy(images.unsqueeze(0), **given(noise)).logits[0]
    probabilities, by_logits = bandit_outcomes(logits, right, p_flip)
    sums, feedback = [], []
    for of_layer in layer_feedback(policy, images, by_logits, trained_batch, noise):
        index, activation, received, backprop, prediction, slope = of_layer
        group = groups[index]
        chosen = group.neurons
        w, b = received[chosen] * slope[chosen], backprop[chosen] * slope[chosen]
        s = (prediction[chosen] * slope[chosen]).expand_as(w)
        seen = Seen.of(activation, policy.core.layers[index].scale, chosen)
        share = group.mixing_weight.view(-1, 1, 1, 1)
        of_group = sums_over_samples(seen, w, s, b, share, probabilities, weights)
        mean = other = torch.einsum("jkon,ko->jkn", backprop[chosen], probabilities)
        if noise is not None:
            means = [torch.einsum("jkon,ko->jkn", kind, probabilities) for kind in (w, s, b)]
            others, other = _replicate(
                policy, images, right, seeds, p_flip, index, chosen, trained_batch, noise
            )
            w, s, b = ((m - o).unsqueeze(2) for m, o in zip(means, others, strict=True))
            one = torch.ones_like(weights).unsqueeze(1)
            of_noise = sums_over_samples(seen, w, s, b, share, one, weights)
            of_group = of_group._replace(noise=of_group.noise + of_noise.products / 2)
        sums.append(of_group)
        feedback.append(
            Feedback(seen.inputs, seen.attention, mean, other, prediction[chosen].squeeze(2))
        )
    return sums[::-1], feedback[::-1]


def _replicate(
    policy: SparseMLPPolicy,
    images: Tensor,
    right: Tensor,
    seeds: Tensor,
    p_flip: float,
    layer: int,
    chosen: Tensor,
    trained_batch: int,
    noise: Tensor,
) -> tuple[list[Float[Tensor, "J K N"]], Float[Tensor, "J K N"]]:
    """Means over outcomes with other noise from a layer's own on, which its neurons do not see.

    Returns:
        Those of the feedback w, s and b on the neurons' outputs, and of backprop's on their states.
    """
    own = noise_of(policy, seeds[1:])
    assert own is not None
    below = layer * (policy.noise_size // len(policy.core.layers))
    noise = torch.cat([noise[..., :below], own[..., below:]], dim=2)
    logits = policy(images.unsqueeze(0), noise=noise).logits[0]
    probabilities, by_logits = bandit_outcomes(logits, right, p_flip)
    for of_layer in layer_feedback(policy, images, by_logits, trained_batch, noise):
        if of_layer.layer == layer:
            break
    slope, prediction = of_layer.slope[chosen], of_layer.prediction[chosen]
    w, b = (
        torch.einsum("jkon,ko->jkn", kind[chosen], probabilities)
        for kind in (of_layer.received, of_layer.backprop)
    )
    s = prediction.squeeze(2)
    return [kind * slope.squeeze(2) for kind in (w, s, b)], b
