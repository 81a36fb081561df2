"""Every statistic against SciPy's own, or a count by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sgrl.analysis.comparison import (
    at_points,
    best_learning_rates,
    by_task,
    compare_methods,
    compare_pairs,
    confounding,
)
from sgrl.analysis.rank_test import (
    _critical_wins,
    detectable_difference,
    holm,
    rank_test,
    seeds_needed,
    smallest_p,
)
from sgrl.analysis.statistics import (
    _median_bounds,
    _wilson,
    median_interval,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
    steps_to_threshold,
    win_share,
)

SKEWED = {
    "beta(8, 2)": lambda g, shape: g.beta(8, 2, shape),
    "beta(2, 8)": lambda g, shape: g.beta(2, 8, shape),
    "beta(5, 0.7)": lambda g, shape: g.beta(5, 0.7, shape),
    "beta(0.5, 3)": lambda g, shape: g.beta(0.5, 3, shape),
    "two humps, 60 : 40": lambda g, shape: _humps(g, shape, 0.6),
    "two humps, 80 : 20": lambda g, shape: _humps(g, shape, 0.8),
    "lognormal": lambda g, shape: g.lognormal(0, 1, shape),
}


def _humps(generator, shape, share):
    """Runs that learn (near 0.95), and runs that do not (near 0.35)."""
    top = np.where(generator.random(shape) < share, 0.95, 0.35)
    return np.clip(top + 0.03 * generator.standard_normal(shape), 0, 1)


def covers(low, high, truth, repetitions):
    """Whether 95% are covered, to within three standard errors of a simulation."""
    return np.mean((low <= truth) & (truth <= high)) >= 0.95 - 3 * np.sqrt(
        0.95 * 0.05 / repetitions
    )


@pytest.mark.parametrize("name", SKEWED)
def test_intervals_cover_of_skewed_scores(name: str) -> None:
    """95%, of five seeds and of more: the median's, and the probability of improvement's over
    another method of the same kind, over a slower one, and over one of another kind, on one task
    and on three."""
    generator, draw = np.random.default_rng(0), SKEWED[name]
    many = draw(generator, 400_000)
    median = np.median(many)
    others = {
        "same": draw,
        "slower": lambda g, shape: 0.8 * draw(g, shape),
        "normal": lambda g, shape: median + 0.2 * g.standard_normal(shape),
    }
    truths = {
        other: win_share(many[None], rule(generator, (1, 400_000)))[0]
        for other, rule in others.items()
    }
    for n in (5, 6, 10, 20):
        scores = draw(generator, (4000, n))
        assert covers(*_median_bounds(scores), median, 4000), n
        wins = {}
        for other, rule in others.items():
            wins[other] = win_share(draw(generator, (4000, n)), rule(generator, (4000, n)))
            assert covers(*_wilson(wins[other], n), truths[other], 4000), (n, other)
        mean, truth = np.mean([*wins.values()], axis=0), np.mean([*truths.values()])
        assert covers(*_wilson(mean, 3 * n), truth, 4000), n


def test_median_interval() -> None:
    generator = np.random.default_rng(0)
    for n in (6, 7, 10, 19, 20, 40):
        scores = generator.lognormal(size=n)
        theirs = scipy.stats.quantile_test(scores, p=0.5).confidence_interval(0.95)
        assert median_interval(scores) == (np.median(scores), *theirs)
    assert median_interval([3, 1, 2, 4, 6]) == (3, 0.5, 6.5)
    few = median_interval([0.3, 0.1, 0.2, 0.4])
    assert few.value == pytest.approx(0.25)
    assert all(map(math.isnan, few[1:]))
    assert all(map(math.isnan, median_interval([])))


def test_probability_of_improvement() -> None:
    first, second = [1, 2, 2, 5], [2, 0, 3]
    wins = [(x > y) + (x == y) / 2 for x, y in itertools.product(first, second)]
    ours = probability_of_improvement([(first, second)])
    assert ours.value == pytest.approx(sum(wins) / 12)
    u = scipy.stats.mannwhitneyu(first, second).statistic
    assert ours.value == pytest.approx(u / 12)
    assert math.isnan(ours.low)
    assert math.isnan(ours.high)
    other = probability_of_improvement([(second, first)])
    assert other.value == pytest.approx(1 - ours.value)
    assert probability_of_improvement([([1, 2], [0, 0]), ([1], [1])]).value == 0.75
    assert all(map(math.isnan, probability_of_improvement([])))
    assert all(map(math.isnan, probability_of_improvement([([1], [])])))
    # Of two tasks that six runs win, one of them without exception: Wilson's of 9 in 12.
    tasks = [(range(6), [-1] * 7), ([0, 0, 0, 2, 2, 2], [1] * 6)]
    wilson = scipy.stats.binomtest(9, 12).proportion_ci(0.95, "wilson")
    assert probability_of_improvement(tasks) == pytest.approx((0.75, *wilson))
    won = probability_of_improvement([(range(5, 10), range(5))])
    assert won.low == pytest.approx(scipy.stats.binomtest(5, 5).proportion_ci(0.95, "wilson").low)
    assert won.high == 1


def test_performance_profile() -> None:
    share, low, high = performance_profile([[1, 2, 3, 4, 5]], [0, 1, 3, 5])
    assert list(share) == [1, 0.8, 0.4, 0]
    exact = [scipy.stats.binomtest(k, 5).proportion_ci(0.95, "exact") for k in (5, 4, 2, 0)]
    assert np.transpose([low, high]) == pytest.approx(np.array(exact))
    # Tasks count alike, however many runs they have; the smallest one gives the band.
    share, low, high = performance_profile([[1] * 5, [1] * 5 + [9] * 5], [2])
    assert share == 0.25
    assert low < 0.25 < high
    share, low, high = performance_profile([[1, 2, 3, 4]], [2])
    assert share == 0.5
    assert np.isnan([low, high]).all()


def test_profiles_cover() -> None:
    generator = np.random.default_rng(0)
    for n, levels in itertools.product((5, 6, 10, 20), ([0.5], [0.7], [0.95])):
        truth = np.mean([scipy.stats.beta.sf(levels, *shape) for shape in ((8, 2), (2, 8))])
        bands = [
            performance_profile([generator.beta(8, 2, n), generator.beta(2, 8, n)], levels)
            for _ in range(300)
        ]
        _, low, high = np.array(bands)[:, :, 0].T
        assert covers(low, high, truth, 300), (n, levels)


def test_rank_test() -> None:
    assert rank_test([([4, 5, 6], [1, 2, 3])]) == pytest.approx(2 / 20)  # two of 20 orders
    assert math.isnan(rank_test([]))
    assert math.isnan(rank_test([([], [1])]))
    # Three tasks of two runs against two: each has 6 orders, and all 18 runs won is one of 216.
    tasks = [([3, 4], [1, 2])] * 3
    assert rank_test(tasks) == pytest.approx(2 / 216)
    drawn = [([3, 4, 5], [1, 2])] * 4  # of 10000
    assert rank_test(drawn) == rank_test(drawn) == pytest.approx(2 / 10_000, abs=0.001)
    # Exchanged across tasks, runs of an easy task would beat those of a hard one.
    assert rank_test([([1], [0]), ([101], [100])]) == 2 / 4
    even = rank_test([([1, 2, 3], [1, 2, 3]), ([5], [5])])
    assert even == 1


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        ([1] * 3, [0] * 3, 2 / 20),
        ([1, 2, 3, 4], [0] * 4, 2 / 70),
        ([1], [0] * 3, 2 / 4),
        ([0] * 3, [1], 2 / 4),
        ([0] * 5, [0] * 5, 1),
    ],
)
def test_rank_test_of_ties(first, second, p) -> None:
    assert rank_test([(first, second)]) == pytest.approx(p)
    assert rank_test([(first, second)]) >= smallest_p([(first, second)]) - 1e-12
    # A task that tells nothing changes nothing.
    assert rank_test([(first, second), ([0], [0])]) == pytest.approx(p)


def test_rank_test_counts_all_ways_to_part_the_runs() -> None:
    """Against SciPy, which goes through them; without ties against its own exact test."""
    generator = np.random.default_rng(0)
    ways = scipy.stats.PermutationMethod(n_resamples=np.inf)
    for n, m in itertools.product((2, 4), (2, 3, 5)):
        for _ in range(3):
            x, y = generator.integers(0, 3, n) / 10, generator.integers(0, 3, m) / 10
            exact = scipy.stats.mannwhitneyu(x, y, method=ways).pvalue
            assert rank_test([(x, y)]) == pytest.approx(min(1, exact))
            x, y = generator.normal(size=2 * n), generator.normal(size=4 * m)
            exact = scipy.stats.mannwhitneyu(x, y, method="exact").pvalue
            assert rank_test([(x, y)]) == pytest.approx(exact)


def test_smallest_p() -> None:
    """That of runs of which one method's all beat the other's."""
    for n, m in ((2, 2), (3, 4), (5, 5), (8, 20)):
        exact = 2 / math.comb(n + m, n)
        assert smallest_p([(range(n), range(m))]) == pytest.approx(exact)
        assert rank_test([(range(m, m + n), range(m))]) == pytest.approx(exact)
    for tasks in (2, 3):
        pairs = [([3, 4], [1, 2])] * tasks
        assert smallest_p(pairs) == pytest.approx(2 / 6**tasks)
        assert rank_test(pairs) == pytest.approx(smallest_p(pairs))
    # Not all permutations are drawn, but the runs as they are count.
    assert smallest_p([([1] * 9, [0] * 9)] * 2) == 1 / 2001
    assert math.isnan(smallest_p([]))


def test_critical_wins_are_those_of_the_test() -> None:
    generator = np.random.default_rng(0)
    for sizes in (
        *([(5, 5)], [(4, 7)], [(12, 10)]),
        *([(3, 2), (3, 4)], [(5, 5), (4, 6)], [(10, 10), (9, 12)]),
    ):
        critical = _critical_wins(sizes, seed=0)
        for _ in range(60):
            pairs = [(generator.normal(0.7, 1, n), generator.normal(size=m)) for n, m in sizes]
            wins = abs(np.mean([win_share(x, y) for x, y in pairs]) - 0.5) + 0.5
            # Of several tasks with many runs both come from random permutations, and differ a
            # little.
            if len(sizes) == 1 or sizes[0] == (3, 2) or abs(wins - critical) > 0.02:
                assert (wins >= critical - 1e-9) == (rank_test(pairs) <= 0.05)
    assert _critical_wins([(3, 3)], seed=0) == math.inf  # 2 / 20 at best
    assert _critical_wins([(4, 4)], seed=0) == 1  # 2 / 70, and 4 / 70 for one win fewer
    assert _critical_wins([(2, 2), (1, 1)], seed=0) == math.inf  # 2 / 12


def found(first, second, difference: float, n: int, repetitions: int = 3000) -> float:
    """How often SciPy's test finds a difference between runs drawn anew."""
    generator = np.random.default_rng(1)
    x = first(generator, (repetitions, n)) + difference
    return float(
        np.mean(
            scipy.stats.mannwhitneyu(x, second(generator, (repetitions, n)), axis=1).pvalue < 0.05
        )
    )


@pytest.mark.parametrize("name", ["beta(8, 2)", "beta(0.5, 3)", "two humps, 60 : 40"])
def test_planned_seeds_find_the_difference(name: str) -> None:
    """The power of so many seeds, in experiments drawn anew, is 0.8, and of fewer below."""
    draw, generator = SKEWED[name], np.random.default_rng(0)
    pairs = [(draw(generator, 400), draw(generator, 400))]
    difference = 1.2 * np.std(pairs)
    seeds = int(seeds_needed(pairs, difference))
    error = 3 * np.sqrt(0.8 * 0.2 * (1 / 2000 + 1 / 3000))
    assert found(draw, draw, difference, seeds) >= 0.8 - error
    assert found(draw, draw, difference, int(0.7 * seeds)) < 0.8
    assert seeds_needed(pairs, difference / 1000) == math.inf
    assert seeds_needed(pairs, 100.0) == 4  # three against three cannot
    assert math.isnan(seeds_needed([([1], [2, 3])], 1.0))


@pytest.mark.parametrize("n", [5, 8, 15])
def test_detectable_difference(n: int) -> None:
    """It is found with power 0.8 where the seeds measured have the spread of all."""
    draw = SKEWED["beta(2, 8)"]
    quantiles = scipy.stats.beta.ppf((np.arange(n) + 0.5) / n, 2, 8)
    scores = quantiles * scipy.stats.beta.std(2, 8) / quantiles.std(ddof=1)
    difference = detectable_difference([(scores, scores)])
    error = 3 * np.sqrt(0.8 * 0.2 * (1 / 2000 + 1 / 3000)) + 0.02  # few quantiles: not the shape
    assert found(draw, draw, difference, n) == pytest.approx(0.8, abs=error)
    assert found(draw, draw, 0.6 * difference, n) < 0.6


def test_detectable_difference_over_tasks() -> None:
    generator = np.random.default_rng(0)
    known = [(generator.normal(size=200), 2 + 3 * generator.normal(size=200)) for _ in range(2)]
    seeds = int(seeds_needed(known, 2.0))
    first, second = generator.normal(size=(2, 300, 2, seeds))
    p = [
        rank_test([(2 + a, 3 * b) for a, b in zip(x, y, strict=True)])
        for x, y in zip(first, second, strict=True)
    ]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.8, abs=3 * np.sqrt(0.16 / 300))
    few = [(x[:seeds], y[:seeds]) for x, y in known]
    assert detectable_difference(few) == detectable_difference(few)
    assert detectable_difference(few) != detectable_difference(few, seed=1)


def test_detectable_difference_of_few() -> None:
    assert detectable_difference([([1, 2, 3], [1, 2, 4])]) == math.inf
    assert math.isnan(detectable_difference([([1], [1, 2])]))
    assert math.isnan(detectable_difference([]))
    assert detectable_difference([([1] * 5, [1] * 5)]) < 1e-9


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
    assert ours == (5, 3, 40)
    late = sample_efficiency([np.nan, 20, 30], [10, 60, 60])
    assert late.median == 20  # not 10, where the curve is at 1
    # Without drop-outs the median is an order statistic.
    for n in range(2, 81, 2):
        assert sample_efficiency(range(1, n + 1), [99] * n).median == n / 2
        half = [*range(1, n // 2 + 1), *[np.nan] * (n // 2)]
        assert sample_efficiency(half, [99] * n) == (n, n / 2, n / 2)
    assert sample_efficiency([1, np.nan, np.nan], [9] * 3).median == math.inf
    # The curve falls to a half, at the last of the runs that are left, but one in four got there.
    assert sample_efficiency([5, np.nan, np.nan, np.nan], [9, 1, 1, 1]) == (4, 1, math.inf)
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


def summary(scores: list[float]) -> pd.Series:
    """The row of a method with these scores."""
    trials = frame([("a", seed, "completed", value) for seed, value in enumerate(scores)], [])
    return compare_methods(trials).iloc[0]


def test_comparison_holds_medians_and_interquartile_means() -> None:
    scores = [0.1, 0.2, 0.4, 0.9, 0.5]
    row = summary(scores)
    names = ["auc_median", "auc_median_ci_low", "auc_median_ci_high"]
    assert tuple(row[names]) == median_interval(scores)
    assert row["auc_iqm"] == pytest.approx((0.2 + 0.4 + 0.5) / 3)
    assert summary([9, 1, 2, 3, 4, 5, 6, -100])["auc_iqm"] == (2 + 3 + 4 + 5) / 4
    assert summary([1, 2, 6])["auc_iqm"] == 3  # a quarter of three, rounded down, is none


def test_standard_error() -> None:
    values = [0.1, 0.5, 0.7, np.nan]
    assert summary(values)["auc_sem"] == pytest.approx(scipy.stats.sem(values[:3]))
    assert math.isnan(summary([0.3])["auc_sem"])


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


def judged(first: list[float], second: list[float]) -> pd.Series:
    rows = [
        (method, seed, "completed", score)
        for method, scores in (("a", first), ("b", second))
        for seed, score in enumerate(scores)
    ]
    return compare_pairs(frame(rows, []), plan=0.1).iloc[0]


def test_verdicts_tell_no_difference_from_cannot_tell() -> None:
    scores = [0.51, 0.52, 0.53, 0.54, 0.55, 0.56]
    near = [score + 0.001 for score in scores]
    same = judged(scores, near)
    detectable = same["detectable_difference"]
    assert detectable == detectable_difference([(scores, near)])
    assert same["verdict"] == f"no difference of {detectable:.2g} or more"
    # What is called excluded is excluded by the test, either way.
    for shift in (detectable, -detectable):
        assert rank_test([(np.array(scores) + shift, near)]) <= 0.05
    assert judged(scores, [score + 0.3 for score in scores])["verdict"] == "differs"
    unsure = judged(scores, [score + 0.02 for score in scores])
    assert unsure["p"] > 0.05
    needed = unsure["detectable_difference"]
    assert unsure["verdict"] == f"cannot tell: would have needed a difference of {needed:.2g}"
    assert unsure["difference"] == pytest.approx(-0.02)
    assert unsure["seeds_needed"] == seeds_needed([(scores, [s + 0.02 for s in scores])], 0.1)
    three = judged([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    assert three["verdict"] == "cannot tell: too few seeds for any p below 0.05"
    assert three["smallest_p"] == three["p"] == 2 / 20
    assert three["fewest_seeds"] == 3
    assert three["detectable_difference"] == math.inf
    assert three[["probability_ci_low", "probability_ci_high"]].isna().all()
    assert judged([0.5] * 5, [0.5] * 5)["verdict"] == "no difference: no run differs"


def test_confounded_comparisons() -> None:
    rows = [
        (method, envs, seed, "completed", 0.5)
        for method in "abc"
        for envs in (4, 20)
        for seed in range(2)
    ]
    trials = frame([*rows, ("c", 80, 0, "completed", 0.5)], ["envs"])
    trials["planned"] = 10.0
    trials["batch"] = trials["envs"].map("{} episodes".format)
    assert confounding(by_task(trials)) == []  # c's other task is compared with nothing
    assert set(compare_pairs(trials)["confounded_by"]) == {"nothing"}
    trials["parameters"] = trials["method"].map({"a": 1200.0, "b": 1200.0})
    assert confounding(by_task(trials)) == []  # what is not known differs from nothing
    trials.loc[trials["method"] == "c", "parameters"] = 99.0
    trials.loc[trials["method"] == "b", "planned"] = 20.0
    assert confounding(by_task(trials)) == [
        "Confounded by length of training: a 10 iterations, b 20 iterations, c 10 iterations.",
        "Confounded by network size: a 1,200 parameters, b 1,200 parameters, c 99 parameters.",
    ]
    assert list(compare_pairs(trials)["confounded_by"]) == [
        "length of training",
        "network size",
        "length of training, network size",
    ]
    trials.loc[trials["method"] == "a", "batch"] = "8 episodes"
    assert "a 8 episodes, b 4 or 20 episodes, c 4 or 20 or 80" in confounding(by_task(trials))[1]
