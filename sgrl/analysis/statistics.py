"""Comparisons of methods over seeds: what they reach, how sure that is, and who is better.

Final scores and areas under curves are those of `sgrl.results.metrics.score_of`. Intervals are at
95%, and need five seeds; they assume nothing about how scores are distributed (what they cover on
skewed and two-humped scores is in docs/results.md, and tested). Seeds are compared within every
task (a swept point), never across. Everything random starts from one fixed seed: the same results
give the same numbers.

Source of the probability of improvement and of performance profiles: Agarwal et al., Deep
reinforcement learning at the edge of the statistical precipice, 2021. Its bootstrap intervals are
not used: at five to ten seeds they cover far less than they say.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
#: Below so many seeds there are no intervals and no bands, but the seeds' own values.
INTERVAL_SEEDS = 5
#: Level of tests, two-sided.
ALPHA = 0.05
#: With which a difference is to be found that is called detectable.
POWER = 0.8
PERMUTATIONS = 2000
#: Runs of a method up to which the test of one task is exact.
EXACT_RUNS = 8
SIMULATIONS = 2000
#: Simulated in all, so that many tasks and seeds take seconds; but at least 500 experiments.
MOST_RUNS = 2_000_000
#: Seeds a method beyond which `seeds_needed` does not look.
MOST_SEEDS = 1000
SEED = 0

Array = NDArray[np.float64]
#: For each task the scores of the first method [n] and of the second [m].
Pairs = Sequence[tuple[ArrayLike, ArrayLike]]
#: A method's trials by task.
Tasks = Mapping[str, pd.DataFrame]


class Interval(NamedTuple):
    """A value and its 95% interval; NaN bounds where there are too few seeds for one."""

    value: float
    low: float
    high: float


def sem(values: pd.Series) -> float:
    """Standard error of the mean; NaN for fewer than two values; NaN values do not count."""
    return float(values.std(ddof=1) / np.sqrt(values.count()))


def interquartile_mean(scores: ArrayLike, axis: int = -1) -> Array:
    """Mean of the middle half: a quarter of the scores, rounded down, is cut off at either end."""
    return scipy.stats.trim_mean(scores, 0.25, axis=axis)


def median_interval(scores: ArrayLike) -> Interval:
    """Median of one task's scores [n], with its 95% interval between two order statistics.

    From six scores on it covers whatever the distribution. The range of five covers 93.75%: it is
    widened by a tenth to either side, which is enough unless the median lies in a gap between two
    kinds of runs.
    """
    values = np.asarray(scores, dtype=float)
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    if len(values) < INTERVAL_SEEDS:
        return Interval(float(np.median(values)), np.nan, np.nan)
    return Interval(float(np.median(values)), *map(float, _median_bounds(values)))


def _median_bounds(scores: Array) -> tuple[Array, Array]:
    """The bounds of `median_interval`, over the last axis of at least five scores."""
    values, n = np.sort(scores, axis=-1), scores.shape[-1]
    # As in scipy.stats.quantile_test, which has no interval of five.
    rank = int(scipy.stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))
    if rank:
        return values[..., rank - 1], values[..., n - rank]
    margin = 0.1 * (values[..., -1] - values[..., 0])
    return values[..., 0] - margin, values[..., -1] + margin


def probability_of_improvement(pairs: Pairs) -> Interval:
    """Probability that a run of the first method beats one of the second, ties counting half.

    It is the mean over tasks of the Mann-Whitney statistic U / (n m). Its interval is Wilson's for
    as many independent runs as the method with fewer has: whatever the distributions, the variance
    of U / (n m) is at most p (1 - p) / min(n, m) (Birnbaum and Klose, Bounds for the variance of
    the Mann-Whitney statistic, 1957).

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].
    """
    samples = _samples(pairs)
    if not samples:
        return Interval(np.nan, np.nan, np.nan)
    value = np.mean([_wins(x, y) for x, y in samples])
    fewest = min(min(len(x), len(y)) for x, y in samples)
    if fewest < INTERVAL_SEEDS:
        return Interval(float(value), np.nan, np.nan)
    return Interval(float(value), *map(float, _wilson(value, fewest * len(samples))))


def _wilson(share: Any, runs: int) -> tuple[Array, Array]:
    """The bounds of Wilson's interval for a share of so many runs."""
    z = scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)
    scale = 1 + z**2 / runs
    centre = (share + z**2 / (2 * runs)) / scale
    spread = np.sqrt(share * (1 - share) / runs + (z / (2 * runs)) ** 2) * z / scale
    # Rounding must not cut off a share of 0 or 1.
    return np.minimum(centre - spread, share), np.maximum(centre + spread, share)


def performance_profile(tasks: Sequence[ArrayLike], levels: ArrayLike) -> tuple[Array, ...]:
    """Share of runs whose score is above each level, averaged over tasks.

    Args:
        tasks: for each task the scores [n] of a method's seeds, at least one.
        levels: the levels [L].

    Returns:
        The shares [L], and the bounds of their pointwise 95% intervals [L], by Clopper and Pearson
        for as many runs as the smallest task has, times the number of tasks; NaN where the
        smallest has fewer than five.
    """
    level = np.asarray(levels, dtype=float)
    above = [np.asarray(scores, dtype=float)[:, None] > level for scores in tasks]
    share = np.mean([runs.mean(axis=0) for runs in above], axis=0)
    fewest = min(map(len, above))
    if fewest < INTERVAL_SEEDS:
        return share, np.full_like(share, np.nan), np.full_like(share, np.nan)
    runs, tail = fewest * len(above), (1 - CONFIDENCE) / 2
    count = share * runs
    # The beta distributions of none and of all runs are points, which SciPy calls NaN.
    low = np.nan_to_num(scipy.stats.beta.ppf(tail, count, runs - count + 1))
    high = np.nan_to_num(scipy.stats.beta.ppf(1 - tail, count + 1, runs - count), nan=1.0)
    return share, low, high


def _samples(pairs: Pairs) -> list[tuple[Array, Array]]:
    """The pairs as arrays; none where a method has no run in one of them."""
    samples = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in pairs]
    return samples if all(len(x) and len(y) for x, y in samples) else []


def _wins(first: Array, second: Array) -> Array:
    """Share of all pairs that the first wins, ties counting half: U / (n m), over the last axis."""
    n, m = first.shape[-1], second.shape[-1]
    ranks = scipy.stats.rankdata(np.concatenate([first, second], axis=-1), axis=-1)
    return (ranks[..., :n].sum(axis=-1) - n * (n + 1) / 2) / (n * m)


def rank_test(pairs: Pairs, seed: int = SEED) -> float:
    """Two-sided p-value for the probability of improvement being one half.

    Of one task it is the Mann-Whitney test's, exact where a method has at most 8 runs, tied or
    not, else normal. Of several it is that of a permutation test which exchanges runs within tasks,
    never across: of all permutations where there are at most 2000, else of 2000 drawn ones.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].
        seed: of the permutations.

    Returns:
        NaN where there is no task, or one in which a method has no run.
    """
    samples = _samples(pairs)
    if not samples:
        return np.nan
    if _is_exact([(len(x), len(y)) for x, y in samples]):
        shares, chances = _permuted_wins(samples)
        wins = np.mean([_wins(x, y) for x, y in samples])
        tails = chances[shares >= wins - 1e-9].sum(), chances[shares <= wins + 1e-9].sum()
        return float(min(1, 2 * min(tails)))
    if len(samples) == 1:
        return float(scipy.stats.mannwhitneyu(*samples[0], method="asymptotic").pvalue)
    generator = np.random.default_rng(seed)
    distances = np.zeros((len(samples), PERMUTATIONS + 1))  # the runs as they are, then permuted
    for row, (x, y) in zip(distances, samples, strict=True):
        runs = np.tile(np.concatenate([x, y]), (PERMUTATIONS + 1, 1))
        generator.permuted(runs[1:], axis=1, out=runs[1:])
        row[:] = _wins(runs[:, : len(x)], runs[:, len(x) :]) - 0.5
    mean = np.abs(distances.mean(axis=0))
    return float(np.mean(mean >= mean[0] - 1e-12))


def _is_exact(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether `rank_test` counts all permutations of so many runs [(n, m), ...]."""
    if len(sizes) == 1:
        return min(sizes[0]) <= EXACT_RUNS
    return _ways(sizes) <= PERMUTATIONS


def _ways(sizes: Sequence[tuple[int, int]]) -> int:
    """In how many ways the runs can be parted within tasks."""
    return math.prod(math.comb(n + m, n) for n, m in sizes)


def _permuted_wins(samples: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The shares of wins, averaged over tasks, that permutations within tasks give [W], and how
    likely each of them is [W]."""
    shares: Array = np.zeros(1)
    chances: Array = np.ones(1)
    for x, y in samples:
        share, chance = _permuted_wins_of_task(x, y)
        sums = np.add.outer(shares, share).round(9)
        shares, where = np.unique(sums, return_inverse=True)
        chances = np.bincount(where.ravel(), np.outer(chances, chance).ravel()).astype(float)
    return shares / len(samples), chances


def _permuted_wins_of_task(x: Array, y: Array) -> tuple[Array, Array]:
    """The same of one task, tied scores included."""
    if len(x) > len(y):
        share, chance = _permuted_wins_of_task(y, x)
        return 1 - share, chance
    # SciPy counts ways of untied scores alone, or goes through all of them one by one.
    twice = (2 * scipy.stats.rankdata(np.concatenate([x, y]))).astype(int)
    ways = np.zeros((len(x) + 1, twice.sum() + 1))  # to take so many ranks of such a sum
    ways[0, 0] = 1
    for rank in twice:
        ways[1:, rank:] += ways[:-1, :-rank]
    sums = np.flatnonzero(ways[-1])
    share = (sums / 2 - len(x) * (len(x) + 1) / 2) / (len(x) * len(y))
    return share, ways[-1, sums] / ways[-1].sum()


def smallest_p(pairs: Pairs) -> float:
    """The smallest p-value that `rank_test` can give for so many runs: where it is exact two of all
    ways to part them (within tasks), of drawn permutations the runs as they are, one in all; of the
    normal distribution that of untied runs.

    NaN where there is no task, or one in which a method has no run.
    """
    samples = _samples(pairs)
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
    """Scores [n] and [m] without ties, of which the first win `count` pairs."""
    whole, rest = divmod(count, m)  # runs that beat all others, and how many the next one beats
    first = [m + i for i in range(whole)] + [rest - 0.5] + [-1 - i for i in range(n - whole - 1)]
    return np.array(first[:n], dtype=float), np.arange(m, dtype=float)


def detectable_difference(pairs: Pairs, seed: int = SEED) -> float:
    """The smallest true difference that `rank_test` finds, at the 5% level, with power 0.8.

    Runs are simulated from each method's own spread (see `_Simulation`) and moved apart by the
    same difference in every task; it must be found whichever method is the better one.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].
        seed: of the simulation.

    Returns:
        In units of the scores. Infinite where so few runs cannot give a p-value below 0.05; NaN
        where a method has fewer than two runs in a task, so that its spread is not known.
    """
    samples = _samples(pairs)
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
    """Seeds that each method needs in every task so that a true difference is found with power 0.8.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m], of which the
            spread is measured, as for `detectable_difference`.
        difference: to find, in units of the scores.
        seed: of the simulation.

    Returns:
        The number; infinite beyond `MOST_SEEDS`, NaN where a spread is not known.
    """
    samples = _samples(pairs)
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
    """Experiments like a measured one, in which the methods' means are equal until moved apart.

    A run is one of the method's own in the task, less their mean, plus normal noise of variance
    s^2 / n: together they have the variance s^2 of its n runs.
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
        #: A difference that parts all runs.
        self.range = max(max(x.max() - y.min(), y.max() - x.min()) for x, y in self.tasks)

    def power(self, difference: float) -> float:
        """How often the difference is found, by the less lucky method."""
        up, down = (
            np.mean([_untied_wins(x + d, y) for x, y in self.tasks], axis=0)
            for d in (difference, -difference)
        )
        found = up >= self.critical - 1e-9, 1 - down >= self.critical - 1e-9
        return float(min(map(np.mean, found)))


def _untied_wins(first: Array, second: Array) -> Array:
    """`_wins` of scores without ties [R, n] and [R, m], several times faster."""
    n, m = first.shape[-1], second.shape[-1]
    order = np.concatenate([first, second], axis=-1).argsort(axis=-1)
    return ((order < n) @ np.arange(1.0, n + m + 1) - n * (n + 1) / 2) / (n * m)


def _critical_wins(sizes: Sequence[tuple[int, int]], seed: int) -> float:
    """The share of wins from which on `rank_test` gives a p-value of at most 0.05; infinite where
    none does. Of untied scores it depends on the numbers of runs [(n, m), ...] alone."""
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
    if min(map(min, sizes)) > EXACT_RUNS:  # as of one task, normal
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


def holm(p_values: ArrayLike) -> Array:
    """p-values corrected for several comparisons by Holm's method; NaN ones are none of them."""
    p = np.asarray(p_values, dtype=float)
    corrected = np.full_like(p, np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    scaled = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


class Efficiency(NamedTuple):
    """Environment steps until a threshold is reached, over runs of which some never did.

    Attributes:
        runs, reached: how many there are, and how many of them reached it.
        median: by Kaplan and Meier, which takes a run that did not reach the threshold for one
            that needs more than its budget; infinite where fewer than half of the runs reached it.
    """

    runs: int
    reached: int
    median: float


def sample_efficiency(steps: ArrayLike, budgets: ArrayLike) -> Efficiency:
    """Summarise when runs reached a threshold.

    Args:
        steps: where on the axis each run reached it [n]; NaN for those that did not.
        budgets: how far on the axis each run was trained [n].
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
    """Where on its axis the mean of the last `window` values of a curve first is at least
    the threshold; NaN where it never is.

    Args:
        curve: values by their place on the axis, in order.
    """
    mean = curve.rolling(window).mean()
    reached = mean[mean >= threshold - 1e-12]
    return float(reached.index[0]) if len(reached) else np.nan


def compare_methods(trials: pd.DataFrame) -> pd.DataFrame:
    """What each method reaches at each swept point, over its completed trials.

    Args:
        trials: from `runs.load_results`.

    Returns:
        One row a method and swept point, in the order of `trials`: method, the swept columns,
        trials (completed ones), failed, unfinished, then for final_success_rate (or another measure
        that trials are judged by) and auc: the mean under that name, and with _sem, _iqm, _median,
        _median_ci_low and _median_ci_high (NaN of fewer than five seeds); last x, the axis of auc.
    """
    final = f"final_{measure_of(trials)}"
    swept = trials.attrs.get("swept", [])
    rows = []
    for key, group in trials.groupby(["method", *swept], sort=False, dropna=False):
        states = group["state"]
        completed = group[states == "completed"]
        row = dict(zip(["method", *swept], key, strict=True))
        row["trials"] = len(completed)
        row["failed"] = int((states == "failed").sum())
        row["unfinished"] = len(group) - row["trials"] - row["failed"]
        for measure in (final, "auc"):
            scores = completed[measure].dropna()
            row[measure] = scores.mean()
            row[f"{measure}_sem"] = sem(scores)
            row[f"{measure}_iqm"] = interquartile_mean(scores) if len(scores) else np.nan
            names = [f"{measure}_median{end}" for end in ("", "_ci_low", "_ci_high")]
            row |= zip(names, median_interval(scores), strict=True)
        rows.append(row)
    comparison = pd.DataFrame(rows)
    comparison["x"] = axis_of(trials)
    comparison.attrs = {"swept": swept, "measure": measure_of(trials)}
    return comparison


def measure_of(frame: pd.DataFrame) -> str:
    """What the trials of a frame are judged by, a key of `MEASURES`."""
    return frame.attrs.get("measure", "success_rate")


BEST_RULE = (
    "each method at its best learning rate: of those at which no trial failed (of all where there "
    "is none) the one with the highest mean AUC, of equal ones the smallest"
)


def best_learning_rates(comparison: pd.DataFrame) -> pd.DataFrame:
    """Keep one learning rate for each method and each point of the other swept values, by
    `BEST_RULE`.

    Args:
        comparison: from `compare_methods`.

    Returns:
        The kept rows; all of them where no learning rate was swept.
    """
    swept = comparison.attrs.get("swept", [])
    rates = learning_rate_columns(swept)
    if not rates:
        return comparison
    others = ["method", *(name for name in swept if name not in rates)]
    ranked = comparison.assign(failing=comparison["failed"] > 0).sort_values(
        ["failing", "auc", *rates], ascending=[True, False, *(True for _ in rates)]
    )
    best = ranked.groupby(others, sort=False, dropna=False).head(1).sort_index()
    best = best.drop(columns="failing")
    best.attrs = comparison.attrs
    return best


def learning_rate_columns(swept: list[str]) -> list[str]:
    """The swept columns that are learning rates of the policy."""
    return [name for name in swept if name.split(".")[-1] == "lr"]


def at_points(trials: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """The trials at the methods and swept points that are rows of `points`."""
    keys = ["method", *trials.attrs.get("swept", [])]
    # Numbered groups, as NaN (a value that a method does not have) must equal NaN.
    number = pd.concat([trials[keys], points[keys]]).groupby(keys, dropna=False).ngroup()
    chosen = trials[number[: len(trials)].isin(set(number[len(trials) :])).to_numpy()]
    chosen.attrs = trials.attrs
    return chosen


def compare_pairs(
    trials: pd.DataFrame, score: str = "auc", plan: float | None = None
) -> pd.DataFrame:
    """Every two methods against each other, over the completed trials that are given: those of
    each method's best learning rate, as a rule.

    Tasks are the points of the swept values other than learning rates at which both methods have
    completed trials. The p-values are `rank_test`'s; `p_holm` is corrected for the number of rows.

    Args:
        trials: from `runs.load_results`.
        score: "auc" or the final score's column.
        plan: a difference of scores, of which to say how many seeds would find it.

    Returns:
        One row a pair, with columns first, second, tasks, first_trials, second_trials, fewest_seeds
        (of a method in a task), difference (of the means, averaged over tasks), probability,
        probability_ci_low, probability_ci_high (that a run of the first is better), p, smallest_p,
        detectable_difference, confounded_by, with a plan seeds_needed, then p_holm, verdict and x,
        the axis.
    """
    tables = by_task(trials, score)
    pairs = itertools.combinations(dict.fromkeys(trials["method"]), 2)
    rows = [
        {"first": first, "second": second}
        | _versus(tables.get(first, {}), tables.get(second, {}), score, plan)
        for first, second in pairs
    ]
    return _judged(rows, trials)


def compare_experiments(
    first: pd.DataFrame, second: pd.DataFrame, score: str = "auc", plan: float | None = None
) -> pd.DataFrame:
    """The methods of two experiments, each against itself in the other one.

    Args:
        first, second: completed trials to compare, as for `compare_pairs`.
        score: "auc" or the final score's column.
        plan: as for `compare_pairs`.

    Returns:
        One row for each method that both have, in the first one's order, with column method and
        those of `compare_pairs`; the probability is that a run of the first experiment is better.
    """
    ours, theirs = by_task(first, score), by_task(second, score)
    rows = [
        {"method": name} | _versus(ours[name], theirs[name], score, plan)
        for name in ours
        if name in theirs
    ]
    return _judged(rows, first)


def by_task(trials: pd.DataFrame, score: str = "auc") -> dict[str, dict[str, pd.DataFrame]]:
    """The completed trials that have a score, by method and task."""
    swept = trials.attrs.get("swept", [])
    others = [name for name in swept if name not in learning_rate_columns(swept)]
    completed = trials[(trials["state"] == "completed") & trials[score].notna()]
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for (method, *task), rows in completed.groupby(["method", *others], sort=False, dropna=False):
        tables.setdefault(str(method), {})[str(task)] = rows
    return tables


def _versus(first: Tasks, second: Tasks, score: str, plan: float | None) -> dict[str, Any]:
    """Columns that compare two methods on the tasks that both have scores of."""
    tasks = [task for task in first if task in second]
    pairs = [(first[task][score].to_numpy(), second[task][score].to_numpy()) for task in tasks]
    better = probability_of_improvement(pairs)
    difference, differing = [x.mean() - y.mean() for x, y in pairs], _differing(first, second)
    detectable = detectable_difference(pairs)
    row = {
        "tasks": len(tasks),
        "first_trials": sum(len(x) for x, _ in pairs),
        "second_trials": sum(len(y) for _, y in pairs),
        "fewest_seeds": min((len(scores) for pair in pairs for scores in pair), default=0),
        "difference": np.mean(difference) if tasks else np.nan,
        "probability": better.value,
        "probability_ci_low": better.low,
        "probability_ci_high": better.high,
        "p": rank_test(pairs),
        "smallest_p": smallest_p(pairs),
        "detectable_difference": detectable,
        "excluded": _excluded(pairs, detectable),
        "confounded_by": ", ".join(CONFOUNDERS[name] for name in differing) or "nothing",
    }
    return row if plan is None else row | {"seeds_needed": seeds_needed(pairs, plan)}


def _excluded(pairs: Pairs, difference: float) -> bool:
    """Whether `rank_test` rejects a true difference of that size, either way."""
    if not np.isfinite(difference):
        return False
    for shift in (difference, -difference):
        moved = [(np.asarray(x) + shift, y) for x, y in pairs]
        wins = np.mean([_wins(x, np.asarray(y)) for x, y in moved])
        if rank_test(moved) > ALPHA or (wins - 0.5) * shift <= 0:
            return False
    return True


def axis_of(frame: pd.DataFrame) -> str:
    """What the areas of a frame were taken against, a key of `AXES`."""
    return frame.attrs.get("x", "env_steps")


def _judged(rows: list[dict[str, Any]], trials: pd.DataFrame) -> pd.DataFrame:
    """The rows with corrected p-values, what follows of each, and the trials' axis."""
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"], row["verdict"] = p, _verdict(row, p, row.pop("excluded"))
        row["x"] = axis_of(trials)
    return pd.DataFrame(rows)


def _verdict(row: Mapping[str, Any], p_holm: float, excluded: bool) -> str:
    needed = row["detectable_difference"]
    if not row["tasks"]:
        return ""
    if p_holm <= ALPHA:
        return "differs"
    if row["p"] <= ALPHA:
        return f"cannot tell: p (Holm) is above {ALPHA:g}"
    if row["smallest_p"] > ALPHA:
        return f"cannot tell: too few seeds for any p below {ALPHA:g}"
    if np.isnan(needed):
        return "cannot tell: one seed has no spread"
    if needed == 0:
        return "no difference: no run differs"
    if excluded:
        return f"no difference of {needed:.2g} or more"
    return f"cannot tell: would have needed a difference of {needed:.2g}"


#: What makes a comparison one of more than methods: columns of `runs.load_results`.
CONFOUNDERS = {
    "planned": "length of training",
    "budget": "budget",
    "batch": "batch size",
    "parameters": "network size",
}


def confounding(methods: Mapping[str, Tasks]) -> list[str]:
    """One line for each of `CONFOUNDERS` in which methods differ within a task.

    Args:
        methods: their completed trials by task, from `by_task`.
    """
    differing = {
        column
        for first, second in itertools.combinations(methods.values(), 2)
        for column in _differing(first, second)
    }
    lines = []
    for column, word in CONFOUNDERS.items():
        if column in differing:
            known = {method: _known(tasks.values(), column) for method, tasks in methods.items()}
            said = (f"{method} {_either(values)}" for method, values in known.items() if values)
            lines.append(f"Confounded by {word}: {', '.join(said)}.")
    return lines


def _differing(first: Tasks, second: Tasks) -> list[str]:
    """The `CONFOUNDERS` in which two methods differ: in a task of both, or on the whole where
    there is none."""
    common = [([first[task]], [second[task]]) for task in first if task in second]
    found = []
    for column in CONFOUNDERS:
        for ours, theirs in common or [(list(first.values()), list(second.values()))]:
            values = set(_known(ours, column)), set(_known(theirs, column))
            if all(values) and values[0] != values[1]:
                found.append(column)
                break
    return found


def _known(frames: Iterable[pd.DataFrame], column: str) -> list[str]:
    """A column's values in words, each once; none where it is not recorded."""
    values = (value for frame in frames if column in frame for value in frame[column].dropna())
    unit = "iterations" if column == "planned" else column
    said = (value if isinstance(value, str) else f"{value:,.0f} {unit}" for value in values)
    return list(dict.fromkeys(said))


def _either(values: Sequence[str]) -> str:
    """Numbers with their units, the same unit said once."""
    units = {value.partition(" ")[2] for value in values}
    if len(units) > 1:
        return " or ".join(values)
    return f"{' or '.join(value.partition(' ')[0] for value in values)} {units.pop()}"
