"""What neurons saw and were told in single samples: episodes of a labyrinth, images of the bandit.

Where the probe's own sums are over samples, here are the samples themselves, a few at a time, for
what is fitted to them (`bounds.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sgrl.envs.registry import validate_env_config
from sgrl.nn.policy import given
from sgrl.nn.registry import SparseMLPPolicy, SparseNetPolicy
from sgrl.theory.probe.bandit import (
    bandit_images,
    bandit_outcomes,
    bandit_seeds,
    layer_feedback,
)
from sgrl.theory.probe.gradients import Group, Seen
from sgrl.theory.probe.labyrinth import Episodes, Loss, Shard, unroll
from sgrl.theory.probe.noise import noise_of

#: Samples worked on at once; no result depends on it but for rounding.
CHUNK = 10


class Told(NamedTuple):
    """What J neurons saw, and were told by backprop, in K samples of T steps (an image is one)."""

    which: Int64[Tensor, " K"]  # places of the samples in their shard
    seen: Seen  # [J, T * K, ...], steps first
    backprop: Float[Tensor, "T J K N"]  # 0 where not valid
    predicted: Float[Tensor, "T J K N"]  # by the trained predictor
    slope: Float[Tensor, "T J K N"]  # of a residual branch behind the neuron
    valid: Bool[Tensor, "T K"]

    def features(self) -> Float[Tensor, "J TK D"]:
        """What a predictor computes with, a (x) [x, 1]."""
        inputs = torch.nn.functional.pad(self.seen.inputs, (0, 1), value=1.0)
        return (self.seen.attention.unsqueeze(3) * inputs.unsqueeze(2)).flatten(2)


class Task(Protocol):
    """What is sampled, and how the neurons of each layer are told."""

    def told(self, shard: Any, groups: Sequence[Group]) -> Iterator[list[Told]]:
        """Some samples at a time, what each group's neurons saw; groups over all steps only.

        To be called within `torch.no_grad()`.
        """
        ...


class MazeTask(NamedTuple):
    """Episodes of a labyrinth, as `labyrinth_shard` plays them."""

    policy: SparseNetPolicy
    loss: Loss
    trained_batch: int

    def told(self, shard: Shard, groups: Sequence[Group]) -> Iterator[list[Told]]:
        """Episodes of about one length together, so that few steps after their ends are made."""
        episodes = shard.episodes
        kept = torch.cat([group.neurons for group in groups]).unique()
        scale = self.policy.core.neurons.scale
        for which in episodes.mask.sum(0).argsort(stable=True).split(CHUNK):
            length = int(episodes.mask[:, which].sum(0).max())
            some = Episodes(*(value[:length, which] for value in episodes))
            unrolled = unroll(self.policy, some, self.loss, self.trained_batch, kept)
            valid = some.mask.view(length, 1, -1, 1)
            yield [
                Told(
                    which,
                    unrolled.seen(range(length), group.neurons, scale),
                    torch.where(valid, unrolled.backprop[:, group.neurons], 0.0),
                    unrolled.predicted[:, group.neurons],
                    torch.ones_like(unrolled.backprop[:, group.neurons]),
                    some.mask,
                )
                for group in groups
            ]


class BanditTask(NamedTuple):
    """Images of the bandit, each with one guess and reward that followed it."""

    policy: SparseMLPPolicy
    env_config: dict
    trained_batch: int
    seed: int
    size: int

    def told(self, shard: int, groups: Sequence[Group]) -> Iterator[list[Told]]:
        """A few images at a time."""
        images, right = bandit_images(self.env_config, self.seed, self.size, shard)
        images = images.to(next(self.policy.parameters()).dtype)
        p_flip = validate_env_config("mnist_bandit", self.env_config)["p_flip"]
        generator = torch.Generator().manual_seed(self.seed * 2**16 + shard)
        seeds = bandit_seeds(self.policy, self.seed, self.size, shard)
        for which in torch.arange(self.size).split(8 * CHUNK):
            noise = noise_of(self.policy, seeds[:1, which])
            logits = self.policy(images[which].unsqueeze(0), **given(noise)).logits[0]
            probabilities, by_logits = bandit_outcomes(logits, right[which], p_flip)
            outcome = torch.multinomial(probabilities, 1, generator=generator)
            drawn = by_logits.take_along_dim(outcome.unsqueeze(2), dim=1)
            told: dict[int, Told] = {}
            how = (drawn, self.trained_batch, noise)
            for of_layer in layer_feedback(self.policy, images[which], *how):
                chosen = groups[of_layer.layer].neurons
                backprop, predicted, slope = (
                    part[chosen].squeeze(2).unsqueeze(0)
                    for part in (of_layer.backprop, of_layer.prediction, of_layer.slope)
                )
                seen = Seen.of(
                    of_layer.activation, self.policy.core.layers[of_layer.layer].scale, chosen
                )
                valid = torch.ones(1, len(which), dtype=torch.bool)
                told[of_layer.layer] = Told(which, seen, backprop, predicted, slope, valid)
            yield [told[index] for index in range(len(groups))]
