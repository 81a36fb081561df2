"""Bounds on what predictions can save: the best linear predictor that a neuron's inputs allow.

A neuron sees its inputs x and its attention a. The predictor s = C (a (x) [x, 1]) is what its own
predictor could become at best; here C is not learned step by step but fitted by ridge regression
on backprop's gradients of m samples (images, or whole episodes), the same for all time steps, and
tested on samples that it has not seen. From the test come the share of a single sample's gradient
that it explains, and the mean squared error of n samples' mean parameter gradient (Lemma 1) if the
neuron used s, or the best mixture of s and what it receives. No predictor that is linear in these
inputs and learns from m samples can save more, save for luck of the fit; what a mixture saves the
neurons below, whose feedback passes through it, is not counted.

Every second shard of the sample is for the fit. The penalty is that of `PENALTIES` which does best
on a fourth of the m samples. Moments and intervals are as in `estimates.py`.

Source: the paper, Section 4 (condition B).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgrl.envs.registry import make_vector
from sgrl.nn.registry import Policy, SparseMLPPolicy, SparseNetPolicy
from sgrl.theory.probe.bandit import choose_neurons
from sgrl.theory.probe.estimates import (
    CONFIDENCE,
    Moments,
    best_mixing_weight,
    moments,
    resampled_counts,
)
from sgrl.theory.probe.gradients import Group, Seen, Sums, row_gradients
from sgrl.theory.probe.labyrinth import (
    Loss,
    choose_recurrent_neurons,
    labyrinth_shard,
)
from sgrl.theory.probe.run import NUM_SHARDS, STEP_SHARES, ProbeSettings, one_thread
from sgrl.theory.probe.sufficiency import PENALTIES
from sgrl.theory.probe.told import BanditTask, MazeTask, Task, Told
from sgrl.theory.tasks import TheoryError, run_pieces


class Regression(NamedTuple):
    """Sums of a least-squares problem, for J neurons."""

    gram: Float[Tensor, "J D D"]
    cross: Float[Tensor, "J D N"]
    square: Float[Tensor, " J"]  # of the targets

    def plus(self, other: Regression) -> Regression:
        """Over both samples."""
        return Regression(*(a + b for a, b in zip(self, other, strict=True)))

    def solutions(self, penalties: Sequence[float]) -> list[Float[Tensor, "J D N"]]:
        """The ridge regressions' coefficients; penalties are shares of the mean square."""
        values, vectors = torch.linalg.eigh(self.gram)
        values = values.clamp(min=0)
        along = vectors.mT @ self.cross
        mean = values.mean(1, keepdim=True).clamp(min=1e-300)
        return [vectors @ (along / (values + p * mean).unsqueeze(2)) for p in penalties]

    def errors(self, coefficients: Float[Tensor, "J D N"]) -> Float[Tensor, " J"]:
        """Squared errors on these samples, summed."""
        fitted = (coefficients * (self.gram @ coefficients)).sum((1, 2))
        return self.square - 2 * (coefficients * self.cross).sum((1, 2)) + fitted


@torch.no_grad()
def regression_sums(
    task: Task, shard: object, groups: Sequence[Group], first: int, cuts: Sequence[int]
) -> dict[tuple[int, bool], list[Regression]]:
    """Sums of a shard's samples, apart for each segment between cuts and each fold.

    Args:
        task: what is sampled.
        shard: of the sample.
        groups: whose neurons.
        first: number of the shard's first sample among all that fits are made of.
        cuts: numbers of samples that fits are made of, in ascending order; a sample of a number
            beyond the last is left out.

    Returns:
        By (place among `cuts`, whether it is held out), for every group.
    """
    sums: dict[tuple[int, bool], list[Regression]] = {}
    for of_groups in task.told(shard, groups):
        numbers = first + of_groups[0].which
        segments = torch.searchsorted(torch.tensor(cuts), numbers, right=True)
        for segment in range(len(cuts)):
            for held_out in (False, True):
                some = (segments == segment) & ((numbers % 4 == 3) == held_out)
                if not some.any():
                    continue
                parts = [_regression(told, some) for told in of_groups]
                key = (segment, held_out)
                before = sums.get(key)
                sums[key] = (
                    [a.plus(b) for a, b in zip(before, parts, strict=True)] if before else parts
                )
    return sums


def _regression(told: Told, some: Bool[Tensor, " K"]) -> Regression:
    used = (told.valid & some).flatten()
    features = told.features()[:, used]
    targets = told.backprop.transpose(0, 1).flatten(1, 2)[:, used]
    return Regression(
        (features.mT @ features).double(),
        (features.mT @ targets).double(),
        targets.square().sum((1, 2)).double(),
    )


def fit(
    segments: Sequence[dict[tuple[int, bool], list[Regression]]], num_cuts: int, group: int
) -> list[Float[Tensor, "J D N"]]:
    """Coefficients of a group's predictors, one for every cut, each neuron's penalty its own."""
    fits = []
    folds: list[Regression | None] = [None, None]
    for segment in range(num_cuts):
        for held_out in (False, True):
            for of_shard in segments:
                if (segment, held_out) in of_shard:
                    part = of_shard[segment, held_out][group]
                    before = folds[held_out]
                    folds[held_out] = part if before is None else before.plus(part)
        kept, left = folds
        assert kept is not None
        assert left is not None
        tried = kept.solutions(PENALTIES)
        best = torch.stack([left.errors(c) for c in tried]).argmin(0)
        solved = torch.stack(kept.plus(left).solutions(PENALTIES))
        fits.append(solved[best, torch.arange(len(best))])
    return fits


class Tested(NamedTuple):
    """Sums over a shard of the test half; kinds are backprop, each fit, the trained predictor."""

    sums: Sums  # of parameter gradients
    error: Float[Tensor, "kinds J"]  # sum of |g - s|^2; of backprop itself |g - mean|^2


@torch.no_grad()
def sums_of_test(
    task: Task,
    shard: object,
    groups: Sequence[Group],
    coefficients: Sequence[Sequence[Tensor]],
    steps: Sequence[int],
) -> list[Tested]:
    """Sums over a shard of the test half: for every group over all steps, then at each of `steps`.

    Args:
        task: what is sampled.
        shard: of the sample.
        groups: whose neurons.
        coefficients: of each group, from `fit`.
        steps: that are looked at alone.
    """
    totals: list[Tested] | None = None
    for of_groups in task.told(shard, groups):
        parts = []
        for told, fits in zip(of_groups, coefficients, strict=True):
            kinds = _kinds(told, fits)
            parts.append(_tested(told, kinds, range(len(kinds[0]))))
            parts += [_tested(told, kinds, [t] if t < len(kinds[0]) else []) for t in steps]
        totals = (
            parts
            if totals is None
            else [
                Tested(Sums.total([a.sums, b.sums]), a.error + b.error)
                for a, b in zip(totals, parts, strict=True)
            ]
        )
    assert totals is not None
    return totals


def _kinds(told: Told, fits: Sequence[Tensor]) -> Float[Tensor, "kinds T J K N"]:
    length, _, count, _ = told.backprop.shape
    features = told.features()
    guesses = [
        (features @ c.to(features)).unflatten(1, (length, count)).transpose(0, 1) for c in fits
    ]
    valid = told.valid.view(length, 1, count, 1)
    kinds = [told.backprop, *guesses, told.predicted]
    return torch.stack([torch.where(valid, kind, 0.0) for kind in kinds])


def _tested(told: Told, kinds: Tensor, steps: Sequence[int]) -> Tested:
    """Sums of the episodes' parameter gradients, over the given steps."""
    num_kinds, length, neurons, count, _ = kinds.shape
    num_slots, used = told.seen.attention.shape[2], list(steps)
    by_output = kinds * told.slope

    def at_steps(value: Tensor) -> Tensor:  # [J, T * K, ...] -> [J, steps * K, ...]
        return value.unflatten(1, (length, count))[:, used].flatten(1, 2)

    x, attention, slots, output, scale = told.seen
    seen = Seen(at_steps(x), at_steps(attention), at_steps(slots), at_steps(output), scale)
    inputs = seen.inputs.unflatten(1, (len(used), count)).transpose(1, 2)  # [J, K, steps, I]
    gradients = []
    for kind in by_output[:, used]:
        rows = row_gradients(seen, kind.transpose(0, 1).flatten(1, 2).unsqueeze(2)).squeeze(2)
        rows = rows.unflatten(1, (len(used), count)).transpose(1, 2)
        of_weights = rows.mT @ inputs
        gradients.append(torch.cat([of_weights.flatten(2), rows[..., num_slots:].sum(2)], dim=2))
    of_kinds = torch.stack(gradients, dim=2)  # [J, K, kinds, D]
    flat = of_kinds.flatten(1, 2).unflatten(1, (count, num_kinds))
    products = torch.einsum("jkad,jkbd->jab", flat, flat).double()
    nothing = torch.zeros(neurons, 2, 2, dtype=torch.float64)
    sums = Sums(
        float(count),
        of_kinds.sum(1).transpose(0, 1),
        products,
        torch.zeros_like(products),
        of_kinds.new_zeros(2, neurons, 1),
        nothing,
    )
    differences = (kinds[:1] - kinds)[:, used].double()
    error = differences.square().sum((1, 3, 4))
    error[0] = kinds[0, used].double().square().sum((0, 2, 3))
    return Tested(sums, error)


#: Numbers of a row beside the place it is about; each has `_ci_low` and `_ci_high`.
NUMBERS = (
    "explained",
    "mse_backprop",
    "synthetic_to_backprop",
    "best_to_backprop",
    "shrunk_to_backprop",
    "best_weight",
    "cosine_backprop",
    "cosine_synthetic",
    "gain",
)


def _numbers(
    tested: Sequence[Tested], kind: int, n: int, counts: Float[Tensor, "R shards"]
) -> dict[str, Float[Tensor, " R"]]:
    """Of one kind of prediction, means over a group's neurons, for every resample."""
    m = moments([t.sums for t in tested], counts)
    covariance = m.products - m.of_means
    target = m.of_means[..., 0, 0]
    u_square = m.of_means[..., kind, kind] - 2 * m.of_means[..., kind, 0] + m.of_means[..., 0, 0]
    var_w, var_s = covariance[..., 0, 0], covariance[..., kind, kind]
    cov = covariance[..., 0, kind]
    best = best_mixing_weight(var_w, cov, var_s, torch.zeros_like(u_square), u_square, n)
    rest = 1 - best
    mixed = best.square() * var_w + 2 * best * rest * cov + rest.square() * var_s
    backprop = (var_w / n).mean(1)
    shrunk = target * var_w / n / (target + var_w / n)
    cosine_backprop, cosine_synthetic = (_cosine(m, place, n) for place in (0, kind))
    errors = counts @ torch.stack([t.error for t in tested]).sum(2).to(counts)
    return {
        "explained": 1 - errors[:, kind] / errors[:, 0],
        "mse_backprop": backprop,
        "synthetic_to_backprop": (var_s / n + u_square).mean(1) / backprop,
        "best_to_backprop": (mixed / n + rest.square() * u_square).mean(1) / backprop,
        "shrunk_to_backprop": shrunk.mean(1) / backprop,
        "best_weight": best.mean(1),
        "cosine_backprop": cosine_backprop,
        "cosine_synthetic": cosine_synthetic,
        "gain": _signal(cosine_synthetic) / _signal(cosine_backprop),
    }


def _signal(cosine: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Squared signal over squared noise, which grows as the number of samples.

    NaN where it is not known, 0 where there is none.
    """
    square = cosine.clamp(min=0).square()
    return torch.where(square < 1, square / (1 - square), math.nan)


def _cosine(m: Moments, kind: int, n: int) -> Float[Tensor, " R"]:
    """Cosine of the mean of n samples to the true gradient, a whole layer as one vector.

    NaN where chance makes a squared length negative.
    """
    mean, products = (part.sum(1) for part in m[:2])
    square = (products - mean)[:, kind, kind] / n + mean[:, kind, kind]
    return mean[:, kind, 0] / (mean[:, 0, 0] * square).sqrt()


def measure_bounds(
    policy: Policy,
    env: str,
    env_config: dict | None,
    settings: ProbeSettings,
    fitted: Sequence[int] = (),
    advance: Callable[[], object] = lambda: None,
) -> BoundsReport:
    """Measure what the best linear predictors of each layer's neurons would save.

    Args:
        policy: that the settings were checked for.
        env: the name of its environment, as trained.
        env_config: the settings of the environment.
        settings: from `check_settings`; n is their batch size.
        fitted: numbers of samples m that predictors are fitted to, in ascending order; the half of
            the sample that is for fits comes last in any case.
        advance: called after each of `NUM_SHARDS` shards.

    Raises:
        TheoryError: a number of samples that cannot be.
        DataError: MNIST cannot be had.
    """
    samples, batch_size, trained_batch, neurons, seed, parallel = settings
    assert isinstance(policy, SparseNetPolicy | SparseMLPPolicy)
    size = -(-samples // NUM_SHARDS)
    half = size * len(range(0, NUM_SHARDS, 2))
    if any(not 4 <= m <= half for m in fitted) or list(fitted) != sorted(set(fitted)):
        raise TheoryError(
            f"fits are made of 4 to {half} of {samples} samples, in ascending order; "
            f"got {', '.join(map(str, fitted))}"
        )
    cuts = [*(m for m in fitted if m < half), half]
    with one_thread():
        steps: list[int] = []
        task: Task
        shards: list
        if isinstance(policy, SparseNetPolicy):
            with contextlib.closing(make_vector(env, 1, env_config or {})) as vector:
                length = vector.episode_length
            steps = sorted({int(length * share) for share in STEP_SHARES})
            same: tuple = (policy, env, env_config or {}, [], seed, size)
            played = run_pieces(labyrinth_shard, [(*same, k) for k in range(NUM_SHARDS)], parallel)
            shards = list(played)
            loss = Loss.of([shard.episodes for shard in shards])
            task = MazeTask(policy, loss, trained_batch)
            groups = choose_recurrent_neurons(policy, neurons, seed, [], length, loss.steps)
        else:
            shards = list(range(NUM_SHARDS))
            task = BanditTask(policy, env_config or {}, trained_batch, seed, size)
            groups = choose_neurons(policy, neurons, seed)
        pieces = [
            (task, shard, groups, place * size, cuts) for place, shard in enumerate(shards[::2])
        ]
        segments = []
        for of_shard in run_pieces(regression_sums, pieces, parallel):
            segments.append(of_shard)
            advance()
        fits = [fit(segments, len(cuts), index) for index in range(len(groups))]
        tests = [(task, shard, groups, fits, steps) for shard in shards[1::2]]
        tested = []
        for of_test in run_pieces(sums_of_test, tests, parallel):
            tested.append(of_test)
            advance()
    counts = resampled_counts(len(tested), np.random.default_rng([seed, NUM_SHARDS]))
    places = [(group.layer, step) for group in groups for step in ["all", *map(str, steps)]]
    kinds: list[object] = [*cuts, *(["trained"] if policy.core.sgprop.mixes else [])]
    rows: list[dict[str, object]] = []
    for place, (layer, step) in enumerate(places):
        for kind, name in enumerate(kinds, 1):
            numbers = _numbers([of_test[place] for of_test in tested], kind, batch_size, counts)
            pooled = (name + batch_size) / batch_size if isinstance(name, int) else math.nan
            row: dict[str, object] = {"layer": layer, "step": step, "fitted": str(name)}
            row["pooled"] = pooled
            for key in NUMBERS:
                low, high = _interval(numbers[key])
                value = float(numbers[key][0])
                row |= {key: value, f"{key}_ci_low": low, f"{key}_ci_high": high}
            rows.append(row)
    return BoundsReport(rows, size * NUM_SHARDS, batch_size)


class BoundsReport(NamedTuple):
    """What was found.

    Attributes:
        rows: of every layer and step ("all" or one), and every fit: `fitted`, the m samples it was
            made of, or "trained" for the policy's own predictor; `pooled`, (m + n) / n, the `gain`
            of a mean over both samples; and `NUMBERS` with their intervals.
        samples: of the large sample.
        batch_size: n.
    """

    rows: list[dict[str, object]]
    samples: int
    batch_size: int


def _interval(values: Float[Tensor, " R"]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    resamples = values[1:].double().numpy()
    if np.isnan(resamples).all():
        return math.nan, math.nan
    low, high = np.nanquantile(resamples, [tail, 1 - tail])
    return float(low), float(high)
