"""Comparisons of methods over seeds: what they reach, how sure that is, and who is better.

Final scores and areas under curves are those of `sgrl.tuning.metrics.score_of`. Intervals are
percentile bootstraps at 95% over seeds; they are stratified, that is, seeds are drawn anew within
every task (a swept point), never across. Everything random starts from one fixed seed: the same
results give the same numbers.

Source of the interquartile mean, stratified intervals and probability of improvement: Agarwal et
al., Deep reinforcement learning at the edge of the statistical precipice, 2021.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A value and its 95% interval; NaN bounds where there are too few samples for one."""

    value: float
    low: float
    high: float


def sem(values: pd.Series) -> float:
    """Standard error of the mean; NaN for fewer than two values; NaN values do not count."""
    return float(values.std(ddof=1) / np.sqrt(values.count()))


def interquartile_mean(scores: ArrayLike, axis: int = -1) -> Array:
    """Mean of the middle half: a quarter of the scores, rounded down, is cut off at either end."""
    return scipy.stats.trim_mean(scores, 0.25, axis=axis)


def stratified_interval(
    strata: Sequence[ArrayLike],
    statistic: Callable[..., Any] = interquartile_mean,
    seed: int = SEED,
) -> Interval:
    """A statistic of all scores together, with its stratified bootstrap interval.

    Args:
        strata: for each task the scores [n] of its seeds. Resamples draw n of each anew.
        statistic: called as `statistic(scores, axis=-1)` on all tasks' scores, concatenated.
        seed: of the resamples.

    Returns:
        The statistic of the scores, NaN of none; no interval where no stratum has two scores.
    """
    samples = [np.asarray(scores, dtype=float) for scores in strata]
    samples = [scores for scores in samples if len(scores)]
    if not samples:
        return Interval(np.nan, np.nan, np.nan)

    def together(*scores: Array) -> Any:
        return statistic(np.concatenate(scores, axis=-1), axis=-1)

    return _bootstrap(samples, together, seed)


def probability_of_improvement(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], seed: int = SEED
) -> Interval:
    """Probability that a run of the first method beats one of the second, ties counting half.

    It is the mean over tasks of the Mann-Whitney statistic U / (n m), with its stratified bootstrap
    interval.

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].
        seed: of the resamples.
    """
    samples = [np.asarray(scores, dtype=float) for pair in pairs for scores in pair]
    if not samples or any(len(scores) == 0 for scores in samples):
        return Interval(np.nan, np.nan, np.nan)

    def mean_wins(*scores: Array) -> Array:
        return np.mean(
            [_wins(x, y) for x, y in zip(scores[::2], scores[1::2], strict=True)], axis=0
        )

    return _bootstrap(samples, mean_wins, seed)


def _wins(first: Array, second: Array) -> Array:
    """Share of all pairs that the first wins, ties counting half: U / (n m), over the last axis."""
    n, m = first.shape[-1], second.shape[-1]
    ranks = scipy.stats.rankdata(np.concatenate([first, second], axis=-1), axis=-1)
    return (ranks[..., :n].sum(axis=-1) - n * (n + 1) / 2) / (n * m)


def _bootstrap(samples: Sequence[Array], statistic: Callable[..., Any], seed: int) -> Interval:
    # SciPy's own bootstrap refuses samples of one, which a sweep in progress has.
    value = float(statistic(*samples))
    if max(map(len, samples)) < 2:
        return Interval(value, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    picks = [generator.integers(len(scores), size=(RESAMPLES, len(scores))) for scores in samples]
    resampled = [scores[pick] for scores, pick in zip(samples, picks, strict=True)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(*resampled), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def rank_test(pairs: Sequence[tuple[ArrayLike, ArrayLike]], seed: int = SEED) -> float:
    """Two-sided p-value for the probability of improvement being one half.

    Of one task it is the Mann-Whitney test's (exact for few runs without ties, else normal). Of
    several it is that of a permutation test which exchanges runs within tasks, never across
    (2000 permutations).

    Args:
        pairs: for each task the scores of the first [n] and of the second method [m].
        seed: of the permutations.

    Returns:
        NaN where there is no task, or one in which a method has no run.
    """
    samples = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in pairs]
    if not samples or not all(len(x) and len(y) for x, y in samples):
        return np.nan
    if len(samples) == 1:
        return float(scipy.stats.mannwhitneyu(*samples[0]).pvalue)
    generator = np.random.default_rng(seed)
    distances = np.zeros((len(samples), RESAMPLES + 1))  # the runs as they are, then permuted
    for row, (x, y) in zip(distances, samples, strict=True):
        runs = np.tile(np.concatenate([x, y]), (RESAMPLES + 1, 1))
        generator.permuted(runs[1:], axis=1, out=runs[1:])
        row[:] = _wins(runs[:, : len(x)], runs[:, len(x) :]) - 0.5
    mean = np.abs(distances.mean(axis=0))
    return float(np.mean(mean >= mean[0] - 1e-12))


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
            that needs more than its budget; infinite where fewer than half are seen to.
        low, high: bounds of the median's 95% interval (log-log; infinite where not bounded).
    """

    runs: int
    reached: int
    median: float
    low: float
    high: float


def sample_efficiency(steps: ArrayLike, budgets: ArrayLike) -> Efficiency:
    """Summarise when runs reached a threshold.

    Args:
        steps: environment steps at which each run reached it [n]; NaN for those that did not.
        budgets: environment steps that each run was trained [n].
    """
    reached, budget = np.asarray(steps, dtype=float), np.asarray(budgets, dtype=float)
    seen = ~np.isnan(reached)
    if not len(reached):
        return Efficiency(0, 0, np.nan, np.nan, np.nan)
    censored = scipy.stats.CensoredData.right_censored(np.where(seen, reached, budget), ~seen)
    survival = scipy.stats.ecdf(censored).sf
    count = int(seen.sum())
    if count == 0:
        return Efficiency(len(reached), 0, np.inf, np.nan, np.nan)
    with warnings.catch_warnings(action="ignore"):  # no band where the curve is at 0 or 1
        band = survival.confidence_interval(CONFIDENCE, method="log-log")
    surviving = survival.probabilities
    median, low, high = (
        _first_half(survival.quantiles, np.where(np.isnan(curve), surviving, curve))
        for curve in (surviving, band.low.probabilities, band.high.probabilities)
    )
    return Efficiency(len(reached), count, median, low, high)


def _first_half(steps: Array, surviving: Array) -> float:
    """The first of `steps` from which at most half survive."""
    under = surviving <= 0.5
    return float(steps[under.argmax()]) if under.any() else np.inf


def steps_to_threshold(curve: pd.Series, threshold: float, window: int) -> float:
    """Environment steps after which the mean of the last `window` values of a curve is at least
    the threshold; NaN where it never is.

    Args:
        curve: values by environment steps, in order.
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
        that trials are judged by) and auc: the mean under that name, and with _sem, _median,
        _iqm, _iqm_ci_low and _iqm_ci_high.
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
            iqm = stratified_interval([scores])
            row[measure] = scores.mean()
            row[f"{measure}_sem"] = sem(scores)
            row[f"{measure}_median"] = scores.median()
            row[f"{measure}_iqm"], row[f"{measure}_iqm_ci_low"] = iqm.value, iqm.low
            row[f"{measure}_iqm_ci_high"] = iqm.high
        rows.append(row)
    comparison = pd.DataFrame(rows)
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


def compare_pairs(trials: pd.DataFrame, score: str = "auc") -> pd.DataFrame:
    """Every two methods against each other, over the completed trials that are given: those of
    each method's best learning rate, as a rule.

    Tasks are the points of the swept values other than learning rates at which both methods have
    completed trials. The p-values are `rank_test`'s; `p_holm` is corrected for the number of rows.

    Args:
        trials: from `runs.load_results`.
        score: "auc" or the final score's column.

    Returns:
        One row a pair, with columns first, second, tasks, first_trials, second_trials,
        probability, probability_ci_low, probability_ci_high (that a run of the first is better),
        p, p_holm.
    """
    scores = _scores(trials, score)
    pairs = itertools.combinations(dict.fromkeys(trials["method"]), 2)
    rows = [
        {"first": first, "second": second} | _versus(scores.get(first, {}), scores.get(second, {}))
        for first, second in pairs
    ]
    return pd.DataFrame(rows).assign(p_holm=holm([row["p"] for row in rows]))


def compare_experiments(
    first: pd.DataFrame, second: pd.DataFrame, score: str = "auc"
) -> pd.DataFrame:
    """The methods of two experiments, each against itself in the other one.

    Args:
        first, second: completed trials to compare, as for `compare_pairs`.
        score: "auc" or the final score's column.

    Returns:
        One row for each method that both have, in the first one's order, with column method and
        those of `compare_pairs`; the probability is that a run of the first experiment is better.
    """
    ours, theirs = _scores(first, score), _scores(second, score)
    rows = [{"method": name} | _versus(ours[name], theirs[name]) for name in ours if name in theirs]
    return pd.DataFrame(rows).assign(p_holm=holm([row["p"] for row in rows]))


def _scores(trials: pd.DataFrame, score: str) -> dict[str, dict[str, Array]]:
    """The completed trials' scores by method and task."""
    swept = trials.attrs.get("swept", [])
    others = [name for name in swept if name not in learning_rate_columns(swept)]
    completed = trials[(trials["state"] == "completed") & trials[score].notna()]
    tables: dict[str, dict[str, Array]] = {}
    for (method, *task), values in completed.groupby(["method", *others], sort=False, dropna=False):
        tables.setdefault(str(method), {})[str(task)] = values[score].to_numpy()
    return tables


def _versus(first: dict[str, Array], second: dict[str, Array]) -> dict[str, Any]:
    """Columns that compare two methods on the tasks that both have scores of."""
    tasks = [task for task in first if task in second]
    pairs = [(first[task], second[task]) for task in tasks]
    better = probability_of_improvement(pairs)
    return {
        "tasks": len(tasks),
        "first_trials": sum(len(first[task]) for task in tasks),
        "second_trials": sum(len(second[task]) for task in tasks),
        "probability": better.value,
        "probability_ci_low": better.low,
        "probability_ci_high": better.high,
        "p": rank_test(pairs),
    }
