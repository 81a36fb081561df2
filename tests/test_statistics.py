"""Every statistic against SciPy's own, or a count by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sgrl.analysis.statistics import (
    at_points,
    best_learning_rates,
    compare_methods,
    compare_pairs,
    holm,
    interquartile_mean,
    probability_of_improvement,
    rank_test,
    sample_efficiency,
    sem,
    steps_to_threshold,
    stratified_interval,
)


def test_interquartile_mean() -> None:
    assert interquartile_mean([9, 1, 2, 3, 4, 5, 6, -100]) == (2 + 3 + 4 + 5) / 4
    assert interquartile_mean([1, 2, 6]) == 3  # a quarter of three, rounded down, is none
    assert interquartile_mean([[0, 1, 1, 9], [4, 0, 2, 2]]).tolist() == [1, 2]


def test_standard_error() -> None:
    values = pd.Series([0.1, 0.5, 0.7, np.nan])
    assert sem(values) == pytest.approx(scipy.stats.sem(values.dropna()))
    assert math.isnan(sem(pd.Series([0.3])))


def test_interval_is_scipys() -> None:
    scores = np.random.default_rng(0).gamma(2, size=30)
    ours = stratified_interval([scores])
    theirs = scipy.stats.bootstrap(
        (scores,), interquartile_mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    assert ours.value == interquartile_mean(scores)
    assert ours[1:] == pytest.approx(theirs, abs=0.05)
    assert ours == stratified_interval([scores])
    assert ours != stratified_interval([scores], seed=1)


def test_interval_is_stratified() -> None:
    """Seeds are drawn within tasks: two tasks without spread have no spread together."""
    low, high = [0.0] * 4, [1.0] * 4
    assert stratified_interval([low, high]) == (0.5, 0.5, 0.5)
    both = stratified_interval([low + high])
    assert both.low < 0.5 < both.high
    exact = stratified_interval([[0, 1], [5]], statistic=np.mean)
    assert exact == (2, (0 + 0 + 5) / 3, (1 + 1 + 5) / 3)


def test_interval_of_few() -> None:
    assert stratified_interval([[0.3], []])[:1] == (0.3,)
    assert math.isnan(stratified_interval([[0.3], [0.2]]).low)
    assert all(map(math.isnan, stratified_interval([])))


def test_probability_of_improvement() -> None:
    first, second = [1, 2, 2, 5], [2, 0, 3]
    wins = [(x > y) + (x == y) / 2 for x, y in itertools.product(first, second)]
    ours = probability_of_improvement([(first, second)])
    assert ours.value == pytest.approx(sum(wins) / 12)
    u = scipy.stats.mannwhitneyu(first, second).statistic
    assert ours.value == pytest.approx(u / 12)
    assert ours.low < ours.value < ours.high
    other = probability_of_improvement([(second, first)])
    assert other.value == pytest.approx(1 - ours.value)
    assert probability_of_improvement([([1, 2], [0, 0]), ([1], [1])]) == (0.75, 0.75, 0.75)
    assert all(map(math.isnan, probability_of_improvement([])))


def test_rank_test() -> None:
    assert rank_test([([4, 5, 6], [1, 2, 3])]) == pytest.approx(2 / 20)  # two of 20 orders
    assert math.isnan(rank_test([]))
    assert math.isnan(rank_test([([], [1])]))
    # Three tasks of two runs against two: each has 6 orders, and all 18 runs won is one of 216.
    tasks = [([3, 4], [1, 2])] * 3
    assert rank_test(tasks) == pytest.approx(2 / 216, abs=0.006)
    assert rank_test(tasks) == rank_test(tasks)
    # Exchanged across tasks, runs of an easy task would beat those of a hard one.
    assert rank_test([([1], [0]), ([101], [100])]) == pytest.approx(2 / 4, abs=0.03)
    even = rank_test([([1, 2, 3], [1, 2, 3]), ([5], [5])])
    assert even == 1


def test_holm() -> None:
    # By hand: .01 x 4, then .02 x 3, .03 x 2, and never less than one before.
    assert holm([0.03, 0.01, 0.02, 0.8]) == pytest.approx([0.06, 0.04, 0.06, 0.8])
    assert holm([0.9, np.nan, 0.6])[[0, 2]] == pytest.approx([1, 1])
    assert math.isnan(holm([0.9, np.nan])[1])


def test_steps_to_threshold() -> None:
    curve = pd.Series([0.1, 0.9, 0.4, 0.6, 0.8], index=[10, 20, 30, 40, 50])
    assert steps_to_threshold(curve, 0.5, window=1) == 20
    assert steps_to_threshold(curve, 0.5, window=2) == 20
    assert steps_to_threshold(curve, 0.6, window=3) == 40
    assert math.isnan(steps_to_threshold(curve, 0.95, window=1))
    assert math.isnan(steps_to_threshold(curve[:2], 0.1, window=3))


def test_sample_efficiency() -> None:
    """Kaplan and Meier by hand: at 10 one of five reaches it, at 20 one drops out, at 30 one of
    three, at 40 one of two: 0.8, 0.8 x 2/3, and half of that."""
    steps, budgets = [10, np.nan, 30, 40, np.nan], [60, 20, 60, 60, 60]
    ours = sample_efficiency(steps, budgets)
    assert (ours.runs, ours.reached, ours.median) == (5, 3, 40)
    assert (
        ours.low == 10
    )  # where the log-log band begins at .8 ^ exp(1.96 sqrt(1/20) / -ln .8) = 0.2
    assert ours.high == math.inf
    late = sample_efficiency([np.nan, 20, 30], [10, 60, 60])
    assert (late.median, late.low) == (20, 20)  # not 10, where the curve is at 1
    # Without drop-outs the median is an order statistic.
    assert sample_efficiency([1, 2, 3, 4], [9] * 4).median == 2
    assert sample_efficiency([1, np.nan, np.nan], [9] * 3).median == math.inf
    none = sample_efficiency([np.nan] * 3, [9] * 3)
    assert (none.reached, none.median) == (0, math.inf)
    assert sample_efficiency([], []).runs == 0


def frame(rows: list[tuple], swept: list[str]) -> pd.DataFrame:
    trials = pd.DataFrame(rows, columns=["method", *swept, "seed", "state", "auc"])
    trials.insert(0, "trial", [str(i) for i in range(len(rows))])
    trials["final_success_rate"] = trials["auc"]
    trials.attrs = {"swept": swept, "measure": "success_rate"}
    return trials


def test_best_learning_rate_is_one_that_never_failed() -> None:
    rows = [("a", 1e-3, seed, "completed", 0.5) for seed in range(3)]
    rows += [("a", 2e-3, 0, "completed", 0.9), ("a", 2e-3, 1, "failed", 0.2)]
    rows += [("b", 4e-3, 0, "completed", 0.3), ("b", 4e-3, 1, "failed", 0.2)]
    trials = frame(rows, ["lr"])
    comparison = compare_methods(trials)
    assert list(comparison["trials"]) == [3, 1, 1]
    best = best_learning_rates(comparison)
    assert list(best["lr"]) == [1e-3, 4e-3]
    assert list(at_points(trials, best)["trial"]) == ["0", "1", "2", "5", "6"]


def test_comparison_holds_medians_and_interquartile_means() -> None:
    scores = [0.1, 0.2, 0.4, 0.9]
    row = compare_methods(
        frame([("a", seed, "completed", value) for seed, value in enumerate(scores)], [])
    ).iloc[0]
    assert row["auc_median"] == pytest.approx(0.3)
    assert row["auc_iqm"] == pytest.approx(0.3)
    assert tuple(row[["auc_iqm", "auc_iqm_ci_low", "auc_iqm_ci_high"]]) == stratified_interval(
        [scores]
    )


def test_pairs_of_one_task() -> None:
    first, second, third = [0.6, 0.7, 0.8], [0.1, 0.2, 0.3], [0.25, 0.65]
    rows = [
        (method, 1e-3, seed, "completed", score)
        for method, scores in (("a", first), ("b", second), ("c", third))
        for seed, score in enumerate(scores)
    ]
    pairs = compare_pairs(frame([*rows, ("a", 1e-3, 9, "failed", 0.0)], ["lr"]))
    assert list(pairs["first"] + pairs["second"]) == ["ab", "ac", "bc"]
    assert list(pairs["probability"]) == pytest.approx([1, 5 / 6, 1 / 6])
    assert pairs["p"][0] == rank_test([(first, second)])
    assert list(pairs["p_holm"]) == pytest.approx(list(holm(pairs["p"])))


def test_pairs_of_several_tasks() -> None:
    tasks = {4: (0.5, 0.4), 20: (0.7, 0.8), 40: (0.9, 0.1)}
    rows = [
        (method, envs, seed, "completed", score + seed / 100)
        for envs, scores in tasks.items()
        for method, score in zip("ab", scores, strict=True)
        for seed in range(2)
    ]
    rows.append(("a", 80, 0, "completed", 0.9))  # where only one has trials
    (pair,) = compare_pairs(frame(rows, ["envs"])).to_dict("records")
    assert (pair["tasks"], pair["first_trials"], pair["second_trials"]) == (3, 6, 6)
    assert pair["probability"] == pytest.approx(2 / 3)
    both = [([a, a + 0.01], [b, b + 0.01]) for a, b in tasks.values()]
    assert pair["p"] == rank_test(both)
