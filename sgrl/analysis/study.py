"""The study: every claim of the paper beside what came out of our runs.

Reads what is in `results/published` and decides each claim by the test that docs/study.md names,
which was written before the confirmation runs. A claim whose runs are not there is "not run yet".
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from sgrl.analysis.statistics import (
    ALPHA,
    holm,
    learning_rate_columns,
    probability_of_improvement,
    rank_test,
    seeds_needed,
)
from sgrl.analysis.tables import within_interval
from sgrl.results.runs import Results, load_results
from sgrl.results.storage import is_archive, reading

#: The smallest difference of scores that we would call one.
SMALLEST = 0.05
#: Of a simulated law, the least share of a case's intervals that must hold it.
LEAST_COVERAGE = 0.88
RESAMPLES = 2000
#: Lines of docs/study.md between which the table of claims stands.
FINDINGS = ("<!-- findings -->", "<!-- end of findings -->")

Pairs = Sequence[tuple[np.ndarray, np.ndarray]]


class Finding(NamedTuple):
    """What our runs say of one claim.

    Attributes:
        ours: the figures, in words.
        runs: how many runs they come from, in words.
        p: p-value of the test against "no difference"; NaN where the claim is decided otherwise.
        verdict: where p is NaN, what it is; else empty.
        favoured: whether the difference is in the claim's direction.
        everywhere: whether it is so in each of several cases, where the claim says so.
        small: whether the test rejects a difference of `SMALLEST` in the claim's direction.
        needed: seeds that would tell such a difference.
    """

    ours: str
    runs: str
    p: float = math.nan
    verdict: str = ""
    favoured: bool = False
    everywhere: bool = True
    small: bool = False
    needed: float = math.nan


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, or a control of ours.

    Attributes:
        number: in docs/study.md; controls have none.
        text: the claim.
        source: figure or theorem.
        archives: what decides it, names in `results/published`.
        judge: decides it, given the results of those archives together; of a simulation, its
            folder.
        family: claims whose p-values are corrected together.
    """

    number: int | None
    text: str
    source: str
    archives: tuple[str, ...]
    judge: Callable[[Any], Finding]
    family: str = ""


def judge_claims(published: Path) -> pd.DataFrame:
    """Judge every claim.

    Args:
        published: folder of the archives.

    Returns:
        One row a claim or control: number (0 of a control), claim, source, ours, runs, p (Holm
        within its family), verdict.

    Raises:
        ValueError: an archive lacks runs that a claim needs; one line.
        StorageError: an archive is damaged.
    """
    findings: list[Finding] = []
    material: dict[tuple[str, ...], Results | Path] = {}
    for claim in CLAIMS:
        places = [published / name for name in claim.archives]
        if not all(place.is_dir() for place in places):
            findings.append(Finding("", "", verdict="not run yet"))
            continue
        if claim.archives not in material:
            simulated = not is_archive(places[0])
            material[claim.archives] = places[0] if simulated else _load(places)
        findings.append(claim.judge(material[claim.archives]))
    corrected = np.array([finding.p for finding in findings])
    for family in dict.fromkeys(claim.family for claim in CLAIMS):
        members = [i for i, claim in enumerate(CLAIMS) if claim.family == family]
        corrected[members] = holm(corrected[members])
    return pd.DataFrame(
        {
            "number": claim.number or 0,
            "claim": claim.text,
            "source": claim.source,
            "ours": finding.ours,
            "runs": finding.runs,
            "p": p,
            "verdict": finding.verdict or verdict(finding, p),
        }
        for claim, finding, p in zip(CLAIMS, findings, corrected, strict=True)
    )


def verdict(finding: Finding, p: float) -> str:
    """Confirmed, not confirmed, or how many seeds would tell, by docs/study.md's rule."""
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


def _load(archives: Sequence[Path]) -> Results:
    """The results of archives together. A trial that failed counts as 0 from there on, in equal
    shares of its planned iterations."""
    with ExitStack() as stack:
        results = load_results(*[stack.enter_context(reading(place)) for place in archives])
    trials = results.trials
    failed = trials["state"] == "failed"
    share = (trials["iterations"] / trials["planned"].astype(float)).where(failed, 1.0)
    trials["auc"] = trials["auc"].fillna(0.0) * share
    final = f"final_{results.measure}"
    trials[final] = trials[final].where(~failed, 0.0)
    unknown = trials["trial"][trials["auc"].isna() | trials[final].isna()]
    if len(unknown):
        raise ValueError(f"{archives[0].parent}: {unknown.iloc[0]} is complete without a score")
    return results


# ---------------------------------------------------------------- how claims are decided


def better(first: str, second: str, score: str = "auc") -> Callable[[Results], Finding]:
    """Decide that the first method is better than the second, over the tasks of both.

    Args:
        first, second: names of methods.
        score: "auc", or "final".
    """

    def judge(results: Results) -> Finding:
        column = score if score == "auc" else f"final_{results.measure}"
        return _compared(results, first, second, column)

    return judge


def better_everywhere(first: str, second: str) -> Callable[[Results], Finding]:
    """Decide by the final score, stratified over tasks; the mean must be higher in each of them."""

    def judge(results: Results) -> Finding:
        column = f"final_{results.measure}"
        finding = _compared(results, first, second, column)
        pairs = _pairs(results.trials, first, second, column)
        differences = [x.mean() - y.mean() for x, y in pairs]
        ours = f"{finding.ours}; by level {', '.join(f'{d:+.3f}' for d in differences)}"
        return finding._replace(ours=ours, everywhere=min(differences) > 0)

    return judge


def better_than_all(first: str, *others: str) -> Callable[[Results], Finding]:
    """Decide that a method is better than each of the others: the weakest comparison counts.

    Methods may come from different archives; which one is not a task.
    """

    def judge(results: Results) -> Finding:
        trials = results.trials.copy()
        swept = [name for name in results.swept if name != "experiment"]
        trials.attrs = results.trials.attrs | {"swept": swept}
        together = dataclasses.replace(results, trials=trials)
        findings = [_compared(together, first, other, "auc") for other in others]
        p = max(finding.p for finding in findings)
        return findings[0]._replace(
            ours="; ".join(finding.ours for finding in findings),
            runs="; ".join(finding.runs for finding in findings),
            p=p,
            favoured=all(finding.favoured for finding in findings),
            small=any(finding.small for finding in findings),
            needed=max(finding.needed for finding in findings),
        )

    return judge


def larger_best_rate(first: str, second: str) -> Callable[[Results], Finding]:
    """Decide that a method's best learning rate is larger, by drawing the seeds anew."""

    def judge(results: Results) -> Finding:
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

    return judge


def no_difference_in_halves(method: str) -> Callable[[Results], Finding]:
    """Compare a method with itself, seeds of even and of odd place: nothing may come out."""

    def judge(results: Results) -> Finding:
        mine = results.trials[results.trials["method"] == method].sort_values("seed")
        halves = mine.assign(method=np.where(np.arange(len(mine)) % 2, "odd", "even"))
        finding = _compared(dataclasses.replace(results, trials=halves), "even", "odd", "auc")
        as_it_must = finding.p >= ALPHA
        said = f"{'no difference' if as_it_must else 'DIFFERS'} (p = {finding.p:.2g})"
        return finding._replace(p=math.nan, verdict=said)

    return judge


def falls_with(method: str, swept: str, column: str) -> Callable[[Results], Finding]:
    """Decide that a metric's last value falls as a swept value grows: Page's test, seeds as blocks.

    Args:
        method: whose trials.
        swept: the swept value.
        column: of metrics.csv.
    """

    def judge(results: Results) -> Finding:
        mine = results.trials[results.trials["method"] == method]
        last = [float(results.curve(name, column).iloc[-1]) for name in mine["trial"]]
        table = mine.assign(last=last).pivot_table(index="seed", columns=swept, values="last")
        falling = table.to_numpy()[:, ::-1]
        p = float(scipy.stats.page_trend_test(falling).pvalue)
        rising = float(scipy.stats.page_trend_test(falling[:, ::-1]).pvalue)
        means = ", ".join(f"{value:g}: {mean:.3f}" for value, mean in table.mean().items())
        return Finding(
            f"{column} by {swept}: {means}",
            _runs(results, method),
            min(1.0, 2 * min(p, rising)),
            favoured=p < rising,
        )

    return judge


def as_good_as_fixed(adaptive: str, fixed: str, swept: str) -> Callable[[Results], Finding]:
    """Decide that adaptive mixing weights are no worse, by `SMALLEST`, than the best fixed ones."""

    def judge(results: Results) -> Finding:
        trials = results.trials
        mine = trials.loc[trials["method"] == adaptive, "auc"].to_numpy()
        others = trials[trials["method"] == fixed].groupby(swept)["auc"]
        best = others.mean().idxmax()
        pair = [(mine + SMALLEST, others.get_group(best).to_numpy())]
        rejected = rank_test(pair) < ALPHA and _share(pair) > 0.5
        worse = rank_test([(mine, pair[0][1])]) < ALPHA and _share([(mine, pair[0][1])]) < 0.5
        means = ", ".join(f"{value:g}: {mean:.3f}" for value, mean in others.mean().items())
        needed = seeds_needed([(mine, pair[0][1])], SMALLEST)
        said = "confirmed" if rejected else "not confirmed" if worse else ""
        return Finding(
            f"AUC {mine.mean():.3f}; fixed at {means}",
            _runs(results, adaptive, fixed),
            verdict=said or verdict(Finding("", "", needed=needed), math.nan),
        )

    return judge


def _pairs(trials: pd.DataFrame, first: str, second: str, column: str) -> Pairs:
    """Scores of both methods at every swept point that both have; learning rates are points too."""
    known = trials[trials["method"].isin([first, second]) & trials[column].notna()]
    swept = trials.attrs.get("swept", [])
    groups = known.groupby(swept, sort=False, dropna=False) if swept else [((), known)]
    sides = [
        tuple(rows.loc[rows["method"] == method, column].to_numpy() for method in (first, second))
        for _, rows in groups
    ]
    return [(x, y) for x, y in sides if len(x) and len(y)]


def _share(pairs: Pairs) -> float:
    return probability_of_improvement(pairs).value


def _compared(results: Results, first: str, second: str, column: str) -> Finding:
    pairs = _pairs(results.trials, first, second, column)
    if not pairs:
        raise ValueError(f"{first} and {second} have no runs at the same swept values")
    means = [float(np.mean([side[i].mean() for side in pairs])) for i in (0, 1)]
    chance = probability_of_improvement(pairs)
    shifted = [(x - SMALLEST, y) for x, y in pairs]
    word = "AUC" if column == "auc" else "final score"
    interval = "" if math.isnan(chance.low) else f" ({chance.low:.2f} to {chance.high:.2f})"
    return Finding(
        f"{word} {means[0]:.3f} against {second} {means[1]:.3f}, difference "
        f"{means[0] - means[1]:+.3f}, P(better) {chance.value:.2f}{interval}",
        _runs(results, first, second),
        rank_test(pairs),
        favoured=chance.value > 0.5,
        small=rank_test(shifted) < ALPHA and _share(shifted) < 0.5,
        needed=seeds_needed(pairs, SMALLEST),
    )


def _runs(results: Results, *methods: str) -> str:
    """How many there are of each method, and which of them failed."""
    of_method = [results.trials[results.trials["method"] == method] for method in methods]
    failed = [name for runs in of_method for name in runs["trial"][runs["state"] == "failed"]]
    counts = " against ".join(str(len(runs)) for runs in of_method)
    return counts + (f"; failed: {', '.join(failed)}" if failed else "")


def law_of_experts(folder: Path) -> Finding:
    """Decide that 2^(d-k) is the ratio of errors, from what `sgrl theory experts` wrote."""
    frame = pd.read_csv(folder / "expert_network.csv")
    inside = within_interval(frame)
    shares = inside.groupby(frame["case"], sort=False).mean()
    cases = ", ".join(f"{case} {share:.1%}" for case, share in shares.items())
    largest = frame["d"].max()
    return Finding(
        f"2^(d-k) is inside the 95% interval in {inside.mean():.1%} of {len(frame)} cells "
        f"({cases}), d up to {largest}",
        f"{len(frame)} cells",
        verdict="confirmed" if shares.min() >= LEAST_COVERAGE else "not confirmed",
    )


SPARSE = ("sparsenet_sgprop", "sparsenet_backprop")
BANDIT = ("sparse_sgprop", "sparse_backprop")
_ESCAPE, _EXPLORE = ("escape_confirmation",), ("explore_confirmation",)
#: GRU, LSTM and MLP have archives of their own, with fewer seeds.
_ESCAPE_ALL = (*_ESCAPE, "escape_confirmation_baselines")
_EXPLORE_ALL = (*_EXPLORE, "explore_confirmation_baselines")
_NOISE, _MNIST = ("mnist_reward_noise",), ("mnist_confirmation",)
_ESCAPE_SWEEPS = ("labyrinth_escape_20", "labyrinth_escape_40")
_EXPLORE_SWEEPS = ("labyrinth_explore_20", "labyrinth_explore_40")

_PLACEBO = "Control: placebo"

#: Numbered as in docs/study.md.
CLAIMS = (
    Claim(
        1,
        "In the expert network backprop's MSE is 2^(d-k) times that of sgprop",
        "Figure 2a, Theorem 5",
        ("expert_network",),
        law_of_experts,
    ),
    Claim(
        2,
        "On the bandit sgprop learns faster than backprop in the same network",
        "Figures 2b, 5",
        _MNIST,
        better(*BANDIT),
        "bandit",
    ),
    Claim(
        3,
        "On the bandit sgprop learns faster than a dense network of the same size",
        "Figures 2b, 5",
        _MNIST,
        better("sparse_sgprop", "dense"),
        "bandit",
    ),
    Claim(
        4,
        "sgprop's advantage over backprop is there at every level of reward noise",
        "Figure 2c",
        _NOISE,
        better_everywhere(*BANDIT),
        "bandit sweeps",
    ),
    Claim(
        5,
        "sgprop's best learning rate is larger than backprop's",
        "Figure 6",
        ("mnist_learning_rate",),
        larger_best_rate(*BANDIT),
    ),
    Claim(
        6,
        "sgprop's advantage is there at every number of parents",
        "Figure 6",
        ("mnist_parents",),
        better_everywhere(*BANDIT),
        "bandit sweeps",
    ),
    Claim(
        7,
        "The more noise, the smaller the mixing weights",
        "Figure 6",
        _NOISE,
        falls_with("sparse_sgprop", "p_flip", "mixing_weight_mean"),
        "bandit sweeps",
    ),
    Claim(
        8,
        "Adaptive mixing weights are as good as the best fixed ones",
        "Figure 6",
        ("mnist_fixed_mixing",),
        as_good_as_fixed("sparse_sgprop", "sparse_sgprop_fixed", "mixing_weight"),
    ),
    Claim(
        9,
        "On LabyrinthEscape sgprop learns faster than backprop in the same network",
        "Figure 3",
        _ESCAPE,
        better(*SPARSE),
        "escape",
    ),
    Claim(
        10,
        "On LabyrinthEscape sgprop learns faster than GRU and LSTM",
        "Figure 3",
        _ESCAPE_ALL,
        better_than_all("sparsenet_sgprop", "gru", "lstm"),
        "escape",
    ),
    Claim(
        11,
        "On LabyrinthExplore sgprop learns faster than backprop in the same network",
        "Figure 3",
        _EXPLORE,
        better(*SPARSE),
        "explore",
    ),
    Claim(
        12,
        "On LabyrinthExplore sgprop learns faster than GRU and LSTM",
        "Figure 3",
        _EXPLORE_ALL,
        better_than_all("sparsenet_sgprop", "gru", "lstm"),
        "explore",
    ),
    Claim(
        13,
        "Over the learning rates and batch sizes tried sgprop is better than backprop, escape",
        "Figure 7",
        _ESCAPE_SWEEPS,
        better(*SPARSE),
        "labyrinth sweeps",
    ),
    Claim(
        14,
        "Over the learning rates and batch sizes tried sgprop is better than backprop, explore",
        "Figure 7",
        _EXPLORE_SWEEPS,
        better(*SPARSE),
        "labyrinth sweeps",
    ),
    Claim(
        None,
        "Backprop's seeds in two halves, escape",
        "Control: A/A",
        _ESCAPE,
        no_difference_in_halves("sparsenet_backprop"),
    ),
    Claim(
        None,
        "Backprop's seeds in two halves, explore",
        "Control: A/A",
        _EXPLORE,
        no_difference_in_halves("sparsenet_backprop"),
    ),
    Claim(
        None,
        "On LabyrinthEscape sgprop learns faster than with shuffled predictions",
        _PLACEBO,
        ("labyrinth_placebo",),
        better("sparsenet_sgprop", "sparsenet_placebo"),
        "placebo",
    ),
    Claim(
        None,
        "On LabyrinthEscape shuffled predictions learn faster than backprop",
        _PLACEBO,
        ("labyrinth_placebo",),
        better("sparsenet_placebo", "sparsenet_backprop"),
        "placebo",
    ),
    Claim(
        None,
        "On the bandit sgprop learns faster than with shuffled predictions",
        _PLACEBO,
        ("mnist_placebo",),
        better("sparse_sgprop", "sparse_placebo"),
        "placebo",
    ),
    Claim(
        None,
        "On the bandit shuffled predictions learn faster than backprop",
        _PLACEBO,
        ("mnist_placebo",),
        better("sparse_placebo", "sparse_backprop"),
        "placebo",
    ),
)


# ---------------------------------------------------------------- as a table


def markdown(judged: pd.DataFrame) -> str:
    """The claims as a table in Markdown, one row each.

    Args:
        judged: from `judge_claims`.
    """
    lines = ["| claim | source | ours | runs | p (Holm) | verdict |", "|---|---|---|---|---|---|"]
    for row in judged.to_dict("records"):
        number = f"{row['number']}. " if row["number"] else ""
        p = "" if math.isnan(row["p"]) else f"{row['p']:.2g}"
        cells = (f"{number}{row['claim']}", row["source"], row["ours"], row["runs"], p)
        lines.append(f"| {' | '.join(cells)} | {row['verdict']} |")
    return "\n".join(lines) + "\n"


def write_into(page: Path, table: str) -> None:
    """Replace what stands between the marks `FINDINGS` of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    start, end = FINDINGS
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} does not hold the lines {start} and {end}")
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n\n{table}\n{end}{after}", encoding="utf-8")
