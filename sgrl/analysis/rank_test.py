"""Tests of two methods against each other, and how many seeds a test needs.

Seeds are compared within each task (a swept point), never across tasks. Everything random starts
from one fixed seed: the same results give the same numbers.
"""

import bisect
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from sgrl.analysis.statistics import Array, Pairs, as_arrays, win_share

#: Significance level of tests, two-sided.
ALPHA = 0.05
#: Power with which a detectable difference is found.
POWER = 0.8
PERMUTATIONS = 2000
#: Largest number of runs of a method for which the test of one task is exact.
EXACT_RUNS = 8
SIMULATIONS = 2000
#: Limit on simulated runs, so that many tasks and seeds take seconds; at least 500 experiments.
MOST_RUNS = 2_000_000
#: `seeds_needed` searches up to so many seeds a method.
MOST_SEEDS = 1000
SEED = 0


def rank_test(pairs: Pairs, seed: int = SEED) -> float:
    """Test whether the probability of improvement is one half.

    For one task this is the Mann-Whitney test: exact, with ties, if a method has at most 8 runs,
    else by the normal approximation. For several tasks it is a permutation test that exchanges runs
    within tasks only: over all permutations if there are at most 2000, else over 2000 random ones.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].
        seed: of the permutations.

    Returns:
        The two-sided p-value; NaN without tasks, or if a method has no run in one.
    """
    samples = as_arrays(pairs)
    if not samples:
        return np.nan
    if _is_exact([(len(x), len(y)) for x, y in samples]):
        shares, chances = _permuted_wins(samples)
        wins = np.mean([win_share(x, y) for x, y in samples])
        tails = chances[shares >= wins - 1e-9].sum(), chances[shares <= wins + 1e-9].sum()
        return float(min(1, 2 * min(tails)))
    if len(samples) == 1:
        return float(scipy.stats.mannwhitneyu(*samples[0], method="asymptotic").pvalue)
    generator = np.random.default_rng(seed)
    distances = np.zeros((len(samples), PERMUTATIONS + 1))  # the runs as they are, then permuted
    for row, (x, y) in zip(distances, samples, strict=True):
        runs = np.tile(np.concatenate([x, y]), (PERMUTATIONS + 1, 1))
        generator.permuted(runs[1:], axis=1, out=runs[1:])
        row[:] = win_share(runs[:, : len(x)], runs[:, len(x) :]) - 0.5
    mean = np.abs(distances.mean(axis=0))
    return float(np.mean(mean >= mean[0] - 1e-12))


def _is_exact(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether `rank_test` enumerates all permutations of so many runs [(n, m), ...]."""
    if len(sizes) == 1:
        return min(sizes[0]) <= EXACT_RUNS
    return _ways(sizes) <= PERMUTATIONS


def _ways(sizes: Sequence[tuple[int, int]]) -> int:
    """Number of ways to assign the runs to two methods within tasks."""
    return math.prod(math.comb(n + m, n) for n, m in sizes)


def _permuted_wins(samples: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Distribution of the mean win share under permutation within tasks: values, probabilities."""
    shares: Array = np.zeros(1)
    chances: Array = np.ones(1)
    for x, y in samples:
        share, chance = _permuted_wins_of_task(x, y)
        sums = np.add.outer(shares, share).round(9)
        shares, where = np.unique(sums, return_inverse=True)
        chances = np.bincount(where.ravel(), np.outer(chances, chance).ravel()).astype(float)
    return shares / len(samples), chances


def _permuted_wins_of_task(x: Array, y: Array) -> tuple[Array, Array]:
    """The same for one task, tied scores included."""
    if len(x) > len(y):
        share, chance = _permuted_wins_of_task(y, x)
        return 1 - share, chance
    # SciPy has this distribution for untied scores alone; with ties it enumerates permutations.
    twice = (2 * scipy.stats.rankdata(np.concatenate([x, y]))).astype(int)
    ways = np.zeros((len(x) + 1, twice.sum() + 1))  # ways to pick i ranks of sum j
    ways[0, 0] = 1
    for rank in twice:
        ways[1:, rank:] += ways[:-1, :-rank]
    sums = np.flatnonzero(ways[-1])
    share = (sums / 2 - len(x) * (len(x) + 1) / 2) / (len(x) * len(y))
    return share, ways[-1, sums] / ways[-1].sum()


def smallest_p(pairs: Pairs) -> float:
    """Compute the smallest p-value that `rank_test` can return for so many runs.

    An exact test can return two over the number of assignments, a test with random permutations
    one over their number, and the normal approximation its value for untied runs.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].

    Returns:
        The p-value; NaN without tasks, or if a method has no run in one.
    """
    samples = as_arrays(pairs)
    if not samples:
        return np.nan
    sizes = [(len(x), len(y)) for x, y in samples]
    if _is_exact(sizes):
        return 2 / _ways(sizes)
    if len(samples) == 1:
        ((n, m),) = sizes
        return rank_test([_runs_that_win(n * m, n, m)])
    return 1 / (PERMUTATIONS + 1)


def _runs_that_win(count: int, n: int, m: int) -> tuple[Array, Array]:
    """Untied scores [n] and [m] such that the first win `count` of the n m pairs."""
    whole, rest = divmod(count, m)  # runs that beat all m, and how many the next one beats
    first = [m + i for i in range(whole)] + [rest - 0.5] + [-1 - i for i in range(n - whole - 1)]
    return np.array(first[:n], dtype=float), np.arange(m, dtype=float)


def holm(p_values: ArrayLike) -> Array:
    """Correct p-values for multiple comparisons by Holm's method.

    Args:
        p_values: the p-values [n]; NaN ones do not count as comparisons and stay NaN.

    Returns:
        The corrected p-values [n].
    """
    p = np.asarray(p_values, dtype=float)
    corrected = np.full_like(p, np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    scaled = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def detectable_difference(pairs: Pairs, seed: int = SEED) -> float:
    """Estimate the smallest true difference that `rank_test` detects at the 5% level, power 0.8.

    Runs are simulated from each method's own spread (see `_Simulation`) and shifted by the same
    difference in every task; it must be detected whichever method is the better one.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].
        seed: of the simulation.

    Returns:
        The difference, in units of the scores. Infinite if so few runs cannot yield a p-value
        below 0.05; NaN if a method has fewer than two runs in a task, which leave its spread
        unknown.
    """
    samples = as_arrays(pairs)
    if not samples or min(min(len(x), len(y)) for x, y in samples) < 2:
        return np.nan
    simulation = _Simulation(samples, None, seed)
    if simulation.critical > 1:
        return np.inf
    low, high = 0.0, simulation.range
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if simulation.power(middle) >= POWER else (middle, high)
    return high


def seeds_needed(pairs: Pairs, difference: float, seed: int = SEED) -> float:
    """Estimate how many seeds detect a true difference at the 5% level with power 0.8.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m]; their spread
            is used as in `detectable_difference`.
        difference: the true difference, in units of the scores.
        seed: of the simulation.

    Returns:
        Seeds of each method in every task; infinite beyond `MOST_SEEDS`, NaN if a spread is
        unknown.
    """
    samples = as_arrays(pairs)
    if not samples or min(min(len(x), len(y)) for x, y in samples) < 2:
        return np.nan

    def enough(seeds: int) -> bool:
        return bool(_Simulation(samples, seeds, seed).power(difference) >= POWER)

    few, many = 1, 2
    while not enough(many):
        if many == MOST_SEEDS:
            return np.inf
        few, many = many, min(2 * many, MOST_SEEDS)
    return few + 1 + bisect.bisect_left(range(few + 1, many), True, key=enough)


class _Simulation:
    """Simulated experiments like a measured one, with equal means until shifted.

    A simulated run is one of the method's n runs in the task, minus their mean, plus normal noise
    of variance s^2 / n; together these have the runs' variance s^2.
    """

    def __init__(
        self, samples: Sequence[tuple[Array, Array]], seeds: int | None, seed: int
    ) -> None:
        generator = np.random.default_rng(seed)
        runs = sum(2 * seeds if seeds else len(x) + len(y) for x, y in samples)
        simulations = min(SIMULATIONS, max(500, MOST_RUNS // runs))

        def drawn(scores: Array) -> Array:
            shape = (simulations, seeds or len(scores))
            noise = scores.std(ddof=1) / np.sqrt(len(scores))
            picked = generator.choice(scores - scores.mean(), shape)
            return picked + noise * generator.standard_normal(shape)

        self.tasks = [(drawn(x), drawn(y)) for x, y in samples]
        self.critical = _critical_wins([(x.shape[1], y.shape[1]) for x, y in self.tasks], seed)
        #: A difference that separates all runs.
        self.range = max(max(x.max() - y.min(), y.max() - x.min()) for x, y in self.tasks)

    def power(self, difference: float) -> float:
        """Share of experiments that detect the difference, for the worse of both directions."""
        up, down = (
            np.mean([_untied_wins(x + d, y) for x, y in self.tasks], axis=0)
            for d in (difference, -difference)
        )
        found = up >= self.critical - 1e-9, 1 - down >= self.critical - 1e-9
        return float(min(map(np.mean, found)))


def _untied_wins(first: Array, second: Array) -> Array:
    """`win_share` for scores without ties [R, n] and [R, m], several times faster."""
    n, m = first.shape[-1], second.shape[-1]
    order = np.concatenate([first, second], axis=-1).argsort(axis=-1)
    return ((order < n) @ np.arange(1.0, n + m + 1) - n * (n + 1) / 2) / (n * m)


def _critical_wins(sizes: Sequence[tuple[int, int]], seed: int) -> float:
    """The smallest win share with a `rank_test` p-value of at most 0.05, infinite if there is none.

    For untied scores it depends on the numbers of runs [(n, m), ...] alone.
    """
    if len(sizes) == 1:
        ((n, m),) = sizes

        def significant(count: int) -> bool:
            return rank_test([_runs_that_win(count, n, m)]) <= ALPHA

        counts = range((n * m + 1) // 2, n * m + 1)
        place = bisect.bisect_left(counts, True, key=significant)
        return counts[place] / (n * m) if place < len(counts) else np.inf
    if _is_exact(sizes):
        untied = [(np.arange(n, dtype=float), np.arange(n, n + m, dtype=float)) for n, m in sizes]
        values, chances = _permuted_wins(untied)
        found = values[2 * chances[::-1].cumsum()[::-1] <= ALPHA + 1e-12]
        return float(found[0]) if len(found) else np.inf
    if min(map(min, sizes)) > EXACT_RUNS:  # normal, as for one task
        variance = sum((n + m + 1) / (12 * n * m) for n, m in sizes) / len(sizes) ** 2
        return float(0.5 - scipy.stats.norm.ppf(ALPHA / 2) * np.sqrt(variance))
    generator = np.random.default_rng(seed)
    shares = [
        _untied_wins(generator.random((20_000, n)), generator.random((20_000, m))) for n, m in sizes
    ]
    distances = np.abs(np.mean(shares, axis=0) - 0.5).round(9)
    values, times = np.unique(distances, return_counts=True)
    p = times[::-1].cumsum()[::-1] / len(distances)
    return float(0.5 + values[p <= ALPHA][0]) if p[-1] <= ALPHA else np.inf
