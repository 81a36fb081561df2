"""From sums to numbers: errors, variances and best mixing weights, and their intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.nn.neuron import PerNeuron
from sgrl.theory.estimation import mixing_weight_of_moments
from sgrl.theory.probe.gradients import B, Group, M, S, Sums, W
from sgrl.theory.probe.sufficiency import Explained

RESAMPLES = 500
CONFIDENCE = 0.95


def resampled_counts(shards: int, generator: np.random.Generator) -> Float[Tensor, "R {shards}"]:
    """How often each shard is drawn in each resample [1 + RESAMPLES, shards]; first, once each."""
    drawn = generator.multinomial(shards, np.full(shards, 1 / shards), size=RESAMPLES)
    return torch.from_numpy(np.concatenate([np.ones((1, shards), np.int64), drawn])).double()


class Moments(NamedTuple):
    """Moments of the kinds of gradients, for J neurons; before J the bootstrap's resamples."""

    of_means: Float[Tensor, "... J 4 4"]  # <E a, E b>
    products: Float[Tensor, "... J 4 4"]  # E <a, b>
    noise: Float[Tensor, "... J 4 4"]  # E of the covariance given the observation
    unit_of_means: Float[Tensor, "... J 2 2"]
    unit_products: Float[Tensor, "... J 2 2"]


def moments(shards: Sequence[Sums], counts: Float[Tensor, "R shards"] | None = None) -> Moments:
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
    var_w: PerNeuron,
    cov_ws: PerNeuron,
    var_s: PerNeuron,
    bias_u: PerNeuron,
    u_square: PerNeuron,
    n: float,
) -> PerNeuron:
    """Compute equation 18 from (co)variances that are summed over parameters.

    Args:
        var_w: variance of w.
        cov_ws: covariance of w and s.
        var_s: variance of s.
        bias_u: <E[w] - g*, E[u]>.
        u_square: |E[u]|^2.
        n: samples.
    """
    variance_u = var_s - 2 * cov_ws + var_w
    rounding = (var_w.abs() + var_s.abs() + u_square.abs()) * 1e-14
    return mixing_weight_of_moments(cov_ws - var_w, variance_u, bias_u, u_square, n, rounding)


def neuron_numbers(m: Moments, num_samples: int, group: Group) -> dict[str, Float[Tensor, "... J"]]:
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


#: Columns that are known under backprop too; those about synthetic gradients are then empty.
BACKPROP_COLUMNS = (
    "target_square",
    "mse_backprop",
    "ecv_backprop",
    "vcm_backprop",
    "ecv_share_backprop",
    "alignment_backprop",
    "explained",
)


def summarise(
    numbers: dict[str, Float[Tensor, "R J"]],
    explained: Explained | None,
    test_counts: Float[Tensor, "R shards"],
    predictors: bool,
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
        known = predictors or name in BACKPROP_COLUMNS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # columns without any number
            low, high = np.nanquantile(values[1:].numpy(), [tail, 1 - tail], axis=0)
        for j, row in enumerate(rows):
            row[name] = float(values[0, j]) if known else math.nan
            if name != "mixing_weight":
                row[f"{name}_ci_low"] = float(low[j]) if known else math.nan
                row[f"{name}_ci_high"] = float(high[j]) if known else math.nan
    return rows
