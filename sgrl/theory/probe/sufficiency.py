"""Condition B: how much of the feedback a neuron could know from its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.theory.probe.gradients import Feedback

#: Ridge penalties tried, as shares of the features' mean square.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Explained(NamedTuple):
    """Sums behind the explained shares, of each shard of the test half, [shards, J] each.

    The share that a guess f explains of the variance of the received gradient's conditional mean
    is 1 - error / total.
    """

    total: Float[Tensor, "shards J"]  # <g1 - mean, g2 - mean>, g1 and g2 replicates
    error: Float[Tensor, "shards J"]  # <g1 - f, g2 - f>, f the regression fitted on the other half
    predictor_error: Float[Tensor, "shards J"]  # f the trained predictor


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
