"""Estimates from the scores of several seeds, with 95% intervals.

Final scores and areas under curves are those of `sgrl.results.metrics.score_of`. Intervals need
five seeds and assume nothing about how scores are distributed (their coverage on skewed and bimodal
scores is in docs/results.md, and tested).

Source of the probability of improvement and of performance profiles: Agarwal et al., Deep
reinforcement learning at the edge of the statistical precipice, 2021. Its bootstrap intervals are
not used: at five to ten seeds they cover far less than 95%.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
#: With fewer seeds there are no intervals or bands; the seeds' own values are shown instead.
INTERVAL_SEEDS = 5

Array = NDArray[np.float64]
#: For each task the scores of the first method [n] and of the second [m].
Pairs = Sequence[tuple[ArrayLike, ArrayLike]]


class Interval(NamedTuple):
    """An estimate and the bounds of its 95% interval, NaN where there are too few seeds."""

    value: float
    low: float
    high: float


def median_interval(scores: ArrayLike) -> Interval:
    """Estimate the median of one task's scores.

    The interval lies between two order statistics. With six or more scores it covers for any
    distribution. The range of five scores covers 93.75%, so it is widened by a tenth on either
    side, which is enough unless the median lies in a gap between two modes.

    Args:
        scores: the scores [n].

    Returns:
        The median and its interval; NaN without scores.
    """
    values = np.asarray(scores, dtype=float)
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    if len(values) < INTERVAL_SEEDS:
        return Interval(float(np.median(values)), np.nan, np.nan)
    return Interval(float(np.median(values)), *map(float, _median_bounds(values)))


def _median_bounds(scores: Array) -> tuple[Array, Array]:
    """Bounds of `median_interval`, over the last axis of at least five scores."""
    values, n = np.sort(scores, axis=-1), scores.shape[-1]
    # As in scipy.stats.quantile_test, which returns no interval for five.
    rank = int(scipy.stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))
    if rank:
        return values[..., rank - 1], values[..., n - rank]
    margin = 0.1 * (values[..., -1] - values[..., 0])
    return values[..., 0] - margin, values[..., -1] + margin


def probability_of_improvement(pairs: Pairs) -> Interval:
    """Estimate the probability that a run of the first method beats one of the second.

    The estimate is the Mann-Whitney statistic U / (n m), in which ties count one half, averaged
    over tasks. Its interval is Wilson's, for as many independent runs as the method with fewer has:
    for any distributions the variance of U / (n m) is at most p (1 - p) / min(n, m) (Birnbaum and
    Klose, Bounds for the variance of the Mann-Whitney statistic, 1957).

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].

    Returns:
        The probability and its interval; NaN without tasks, or if a method has no run in one.
    """
    samples = as_arrays(pairs)
    if not samples:
        return Interval(np.nan, np.nan, np.nan)
    value = np.mean([win_share(x, y) for x, y in samples])
    fewest = min(min(len(x), len(y)) for x, y in samples)
    if fewest < INTERVAL_SEEDS:
        return Interval(float(value), np.nan, np.nan)
    return Interval(float(value), *map(float, _wilson(value, fewest * len(samples))))


def as_arrays(pairs: Pairs) -> list[tuple[Array, Array]]:
    """Convert the scores of each task to arrays.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].

    Returns:
        The arrays; an empty list if a method has no run in one of the tasks.
    """
    samples = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in pairs]
    return samples if all(len(x) and len(y) for x, y in samples) else []


def win_share(first: Array, second: Array) -> Array:
    """Compute U / (n m), the share of pairs of runs that the first method wins; ties count half.

    Args:
        first: scores [..., n].
        second: scores [..., m].

    Returns:
        The shares [...].
    """
    n, m = first.shape[-1], second.shape[-1]
    ranks = scipy.stats.rankdata(np.concatenate([first, second], axis=-1), axis=-1)
    return (ranks[..., :n].sum(axis=-1) - n * (n + 1) / 2) / (n * m)


def _wilson(share: Any, runs: int) -> tuple[Array, Array]:
    """Bounds of Wilson's interval for a share of `runs` runs."""
    z = scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)
    scale = 1 + z**2 / runs
    centre = (share + z**2 / (2 * runs)) / scale
    spread = np.sqrt(share * (1 - share) / runs + (z / (2 * runs)) ** 2) * z / scale
    # Rounding must not exclude a share of 0 or 1.
    return np.minimum(centre - spread, share), np.maximum(centre + spread, share)


def performance_profile(tasks: Sequence[ArrayLike], levels: ArrayLike) -> tuple[Array, ...]:
    """Compute the share of runs whose score is above each level, averaged over tasks.

    Args:
        tasks: for each task the scores [n] of a method's seeds, at least one.
        levels: the levels [L].

    Returns:
        The shares [L], and the lower and upper bounds [L] of their pointwise 95% intervals
        (Clopper and Pearson's for the runs of the smallest task times the number of tasks); NaN
        where the smallest task has fewer than five runs.
    """
    level = np.asarray(levels, dtype=float)
    above = [np.asarray(scores, dtype=float)[:, None] > level for scores in tasks]
    share = np.mean([runs.mean(axis=0) for runs in above], axis=0)
    fewest = min(map(len, above))
    if fewest < INTERVAL_SEEDS:
        return share, np.full_like(share, np.nan), np.full_like(share, np.nan)
    runs, tail = fewest * len(above), (1 - CONFIDENCE) / 2
    count = share * runs
    # The beta distributions of none and of all runs are points, for which SciPy returns NaN.
    low = np.nan_to_num(scipy.stats.beta.ppf(tail, count, runs - count + 1))
    high = np.nan_to_num(scipy.stats.beta.ppf(1 - tail, count + 1, runs - count), nan=1.0)
    return share, low, high


class Efficiency(NamedTuple):
    """Environment steps until a threshold is reached, over runs some of which never reached it.

    Attributes:
        runs: number of runs.
        reached: how many of them reached the threshold.
        median: Kaplan-Meier estimate, in which a run that did not reach the threshold is censored
            at its budget; infinite if fewer than half of the runs reached it.
    """

    runs: int
    reached: int
    median: float


def sample_efficiency(steps: ArrayLike, budgets: ArrayLike) -> Efficiency:
    """Summarise when runs reached a threshold.

    Args:
        steps: where on the axis each run reached it [n]; NaN for those that did not.
        budgets: how far on the axis each run was trained [n].

    Returns:
        The number of runs, how many reached the threshold, and the median; NaN without runs.
    """
    reached, budget = np.asarray(steps, dtype=float), np.asarray(budgets, dtype=float)
    seen = ~np.isnan(reached)
    runs, count = len(seen), int(seen.sum())
    if not runs or 2 * count < runs:
        return Efficiency(runs, count, np.inf if runs else np.nan)
    censored = scipy.stats.CensoredData.right_censored(np.where(seen, reached, budget), ~seen)
    survival = scipy.stats.ecdf(censored).sf
    under = survival.probabilities <= 0.5 + 1e-9  # a product of fractions, each rounded
    median = float(survival.quantiles[under.argmax()]) if under.any() else np.inf
    return Efficiency(runs, count, median)


def steps_to_threshold(curve: pd.Series, threshold: float, window: int) -> float:
    """Find where the rolling mean of a curve first reaches a threshold.

    Args:
        curve: values, indexed by their place on the axis, in order.
        threshold: the value to reach.
        window: number of values that are averaged.

    Returns:
        The place on the axis; NaN if the threshold is never reached.
    """
    mean = curve.rolling(window).mean()
    reached = mean[mean >= threshold - 1e-12]
    return float(reached.index[0]) if len(reached) else np.nan
