"""Tests that decide the claims of the study, as docs/study.md names them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from sgrl.analysis.comparison import learning_rate_columns
from sgrl.analysis.rank_test import ALPHA, rank_test, seeds_needed
from sgrl.analysis.statistics import probability_of_improvement
from sgrl.analysis.tables import within_interval
from sgrl.results.folder import ExpertNetworkFolder
from sgrl.results.runs import Results, ResultsError

#: The smallest difference of scores that matters.
SMALLEST = 0.05
#: Share of each case's intervals that must contain a simulated law.
LEAST_COVERAGE = 0.88
RESAMPLES = 2000

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]


class Finding(NamedTuple):
    """What our runs say about one claim.

    Attributes:
        ours: the result, in words.
        runs: the number of runs, in words.
        p: p-value of the test against "no difference"; NaN if the claim is decided otherwise.
        verdict: the verdict if p is NaN, else empty.
        favoured: whether the difference is in the claim's direction.
        everywhere: whether it is so in each of several cases, if the claim says so.
        small: whether the test rejects a difference of `SMALLEST` in the claim's direction.
        needed: seeds that would detect such a difference.
    """

    ours: str
    runs: str
    p: float = math.nan
    verdict: str = ""
    favoured: bool = False
    everywhere: bool = True
    small: bool = False
    needed: float = math.nan


def verdict(finding: Finding, p: float) -> str:
    """Decide a claim by the rule in docs/study.md.

    Args:
        finding: what the runs say.
        p: its p-value, corrected for the family of claims.

    Returns:
        Confirmed, not confirmed, or how many seeds would decide it.
    """
    if p < ALPHA and not finding.favoured:
        return "not confirmed"
    if p < ALPHA:
        return "confirmed" if finding.everywhere else "cannot tell (not so in every case)"
    if finding.small:
        return "not confirmed"
    if math.isnan(finding.needed):
        return "cannot tell"
    seeds = f"{finding.needed:.0f}" if math.isfinite(finding.needed) else "more than 1,000"
    return f"cannot tell (would need {seeds} seeds)"


def better(results: Results, first: str, second: str, column: str = "auc") -> Finding:
    """Judge whether a method's scores are higher than another's, over the tasks of both.

    Args:
        results: of the claim's archives.
        first: the method that is claimed to be better.
        second: the other method.
        column: "auc" or the final score's column.

    Returns:
        The finding.
    """
    pairs = _pairs(results.trials, first, second, column)
    if not pairs:
        raise ResultsError(f"{first} and {second} have no runs at the same swept values")
    means = [float(np.mean([side[i].mean() for side in pairs])) for i in (0, 1)]
    chance = probability_of_improvement(pairs)
    word = "AUC" if column == "auc" else "final score"
    interval = "" if math.isnan(chance.low) else f" ({chance.low:.2f} to {chance.high:.2f})"
    return Finding(
        f"{word} {means[0]:.3f} against {second} {means[1]:.3f}, difference "
        f"{means[0] - means[1]:+.3f}, P(better) {chance.value:.2f}{interval}",
        _runs(results, first, second),
        rank_test(pairs),
        favoured=chance.value > 0.5,
        small=_direction([(x - SMALLEST, y) for x, y in pairs]) < 0,
        needed=seeds_needed(pairs, SMALLEST),
    )


def better_everywhere(results: Results, first: str, second: str) -> Finding:
    """Judge whether a method's final score is higher, stratified over tasks, and in each task.

    Args:
        results: of the claim's archives.
        first: the method that is claimed to be better.
        second: the other method.

    Returns:
        The finding.
    """
    column = f"final_{results.measure}"
    finding = better(results, first, second, column)
    pairs = _pairs(results.trials, first, second, column)
    differences = [x.mean() - y.mean() for x, y in pairs]
    ours = f"{finding.ours}; by level {', '.join(f'{d:+.3f}' for d in differences)}"
    return finding._replace(ours=ours, everywhere=min(differences) > 0)


def better_than_all(results: Results, first: str, *others: str) -> Finding:
    """Judge whether a method's AUC is higher than that of each other method.

    The weakest comparison counts.

    Args:
        results: of the claim's archives, from which methods are taken whichever archive holds them.
        first: the method that is claimed to be better.
        others: the other methods.

    Returns:
        The finding.
    """
    trials = results.trials.copy()
    swept = [name for name in results.swept if name != "experiment"]
    trials.attrs = results.trials.attrs | {"swept": swept}
    together = dataclasses.replace(results, trials=trials)
    findings = [better(together, first, other) for other in others]
    return findings[0]._replace(
        ours="; ".join(finding.ours for finding in findings),
        runs="; ".join(finding.runs for finding in findings),
        p=max(finding.p for finding in findings),
        favoured=all(finding.favoured for finding in findings),
        small=any(finding.small for finding in findings),
        needed=max(finding.needed for finding in findings),
    )


def larger_best_rate(results: Results, first: str, second: str) -> Finding:
    """Judge whether a method's best learning rate is larger, by resampling seeds.

    Args:
        results: of the claim's archives.
        first: the method whose best learning rate is claimed to be larger.
        second: the other method.

    Returns:
        The finding.
    """
    generator = np.random.default_rng(0)
    (rate,) = learning_rate_columns(results.swept)
    best, drawn = {}, {}
    for method in (first, second):
        mine = results.trials[results.trials["method"] == method]
        by_rate = mine.pivot(index="seed", columns=rate, values="auc")
        table, rates = by_rate.to_numpy(), by_rate.columns.to_numpy()
        best[method] = rates[table.mean(axis=0).argmax()]
        seeds = generator.integers(len(table), size=(RESAMPLES, len(table)))
        drawn[method] = rates[table[seeds].mean(axis=1).argmax(axis=1)]
    share = float(np.mean(drawn[first] > drawn[second]))
    ours = f"{best[first]:g} against {best[second]:g}; larger in {share:.1%} of resamples"
    said = "confirmed" if share >= 0.95 else "not confirmed" if share <= 0.05 else "cannot tell"
    return Finding(ours, _runs(results, first, second), verdict=said)


def no_difference_in_halves(results: Results, method: str) -> Finding:
    """Check that the two halves of a method's seeds, of even and odd rank, do not differ.

    Args:
        results: of the claim's archives.
        method: the method.

    Returns:
        The finding.
    """
    mine = results.trials[results.trials["method"] == method].sort_values("seed")
    halves = mine.assign(method=np.where(np.arange(len(mine)) % 2, "odd", "even"))
    finding = better(dataclasses.replace(results, trials=halves), "even", "odd")
    said = "no difference" if finding.p >= ALPHA else "DIFFERS"
    return finding._replace(p=math.nan, verdict=f"{said} (p = {finding.p:.2g})")


def falls_with(results: Results, method: str, swept: str, column: str) -> Finding:
    """Judge whether a metric's last value falls as a swept value grows (Page's trend test).

    Args:
        results: of the claim's archives.
        method: the method; its seeds are the test's blocks.
        swept: the swept value.
        column: the metric, a column of metrics.csv.

    Returns:
        The finding.
    """
    mine = results.trials[results.trials["method"] == method]
    last = [float(results.curve(name, column).iloc[-1]) for name in mine["trial"]]
    table = mine.assign(last=last).pivot_table(index="seed", columns=swept, values="last")
    falling = table.to_numpy()[:, ::-1]
    p = float(scipy.stats.page_trend_test(falling).pvalue)
    rising = float(scipy.stats.page_trend_test(falling[:, ::-1]).pvalue)
    means = ", ".join(f"{value:g}: {mean:.3f}" for value, mean in table.mean().items())
    ours, both = f"{column} by {swept}: {means}", min(1.0, 2 * min(p, rising))
    return Finding(ours, _runs(results, method), both, favoured=p < rising)


def as_good_as_fixed(results: Results, adaptive: str, fixed: str, swept: str) -> Finding:
    """Judge whether adaptive mixing weights are at most `SMALLEST` worse than the best fixed ones.

    Args:
        results: of the claim's archives.
        adaptive: the method with adaptive mixing weights.
        fixed: the method with fixed ones.
        swept: the swept value that holds these.

    Returns:
        The finding.
    """
    trials = results.trials
    mine = trials.loc[trials["method"] == adaptive, "auc"].to_numpy()
    others = trials[trials["method"] == fixed].groupby(swept)["auc"]
    best = others.get_group(others.mean().idxmax()).to_numpy()
    means = ", ".join(f"{value:g}: {mean:.3f}" for value, mean in others.mean().items())
    if _direction([(mine + SMALLEST, best)]) > 0:
        said = "confirmed"
    elif _direction([(mine, best)]) < 0:
        said = "not confirmed"
    else:
        needed = seeds_needed([(mine, best)], SMALLEST)
        said = verdict(Finding("", "", needed=needed), math.nan)
    ours = f"AUC {mine.mean():.3f}; fixed at {means}"
    return Finding(ours, _runs(results, adaptive, fixed), verdict=said)


def law_of_experts(folder: Path) -> Finding:
    """Judge whether the ratio of errors is 2^(d-k).

    Args:
        folder: written by `sgrl theory experts`.

    Returns:
        The finding.
    """
    frame = pd.read_csv(ExpertNetworkFolder(folder).results)
    inside = within_interval(frame)
    shares = inside.groupby(frame["case"], sort=False).mean()
    cases = ", ".join(f"{case} {share:.1%}" for case, share in shares.items())
    return Finding(
        f"2^(d-k) is inside the 95% interval in {inside.mean():.1%} of {len(frame)} cells "
        f"({cases}), d up to {frame['d'].max()}",
        f"{len(frame)} cells",
        verdict="confirmed" if shares.min() >= LEAST_COVERAGE else "not confirmed",
    )


def _pairs(trials: pd.DataFrame, first: str, second: str, column: str) -> Pairs:
    """Scores of both methods at each swept point that both have, learning rates included."""
    known = trials[trials["method"].isin([first, second]) & trials[column].notna()]
    swept = trials.attrs.get("swept", [])
    groups = known.groupby(swept, sort=False, dropna=False) if swept else [((), known)]
    sides = [
        tuple(rows.loc[rows["method"] == method, column].to_numpy() for method in (first, second))
        for _, rows in groups
    ]
    return [(x, y) for x, y in sides if len(x) and len(y)]


def _direction(pairs: Pairs) -> int:
    """1 if the test finds the first method better, -1 if worse, else 0."""
    if not rank_test(pairs) < ALPHA:
        return 0
    return 1 if probability_of_improvement(pairs).value > 0.5 else -1


def _runs(results: Results, *methods: str) -> str:
    """The number of runs of each method, and the failed ones."""
    of_method = [results.trials[results.trials["method"] == method] for method in methods]
    failed = [name for runs in of_method for name in runs["trial"][runs["state"] == "failed"]]
    counts = " against ".join(str(len(runs)) for runs in of_method)
    return counts + (f"; failed: {', '.join(failed)}" if failed else "")
