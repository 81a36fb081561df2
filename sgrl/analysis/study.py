"""The study: every claim of the paper beside the results of our runs.

Reads `results/published` and decides each claim by the test that docs/study.md names, which was
written before the confirmation runs. A claim whose runs do not exist is "not run yet".
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sgrl.analysis.judges import (
    Finding,
    as_good_as_fixed,
    better,
    better_everywhere,
    better_than_all,
    falls_with,
    larger_best_rate,
    law_of_experts,
    no_difference_in_halves,
    verdict,
)
from sgrl.analysis.rank_test import holm
from sgrl.results.locations import reading
from sgrl.results.runs import Results, ResultsError, load_results
from sgrl.results.storage import is_archive


@dataclass(frozen=True)
class Claim:
    """How a claim of the paper, or a control of ours, is decided.

    Attributes:
        number: its number in docs/study.md; 0 for a control.
        source: figure or theorem of the paper.
        archives: names in `results/published` of the archives that decide it.
        judge: decides it from the results of those archives; for a simulation, from its folder.
        arguments: further arguments of the judge, such as names of methods.
        family: name shared by claims whose p-values are corrected together.
    """

    number: int
    source: str
    archives: tuple[str, ...]
    judge: Callable[..., Finding]
    arguments: tuple[str, ...] = ()
    family: str = ""


SPARSE = ("sparsenet_sgprop", "sparsenet_backprop")
BASELINES = ("sparsenet_sgprop", "gru", "lstm")
BANDIT = ("sparse_sgprop", "sparse_backprop")
_MIXING_BY_NOISE = ("sparse_sgprop", "p_flip", "mixing_weight_mean")
_MIXING_BY_METHOD = ("sparse_sgprop", "sparse_sgprop_fixed", "mixing_weight")
_MNIST, _NOISE = ("mnist_confirmation",), ("mnist_reward_noise",)
_ESCAPE, _EXPLORE = ("escape_confirmation",), ("explore_confirmation",)
#: GRU, LSTM and MLP have archives of their own, with fewer seeds.
_ESCAPE_ALL = (*_ESCAPE, "escape_confirmation_baselines")
_EXPLORE_ALL = (*_EXPLORE, "explore_confirmation_baselines")
_ESCAPE_SWEEPS = ("labyrinth_escape_20", "labyrinth_escape_40")
_EXPLORE_SWEEPS = ("labyrinth_explore_20", "labyrinth_explore_40")
_PLACEBO = "Control: placebo"
_SHUFFLED, _MNIST_SHUFFLED = ("labyrinth_placebo",), ("mnist_placebo",)

CLAIMS = {
    "In the expert network backprop's MSE is 2^(d-k) times that of sgprop": Claim(
        1, "Figure 2a, Theorem 5", ("expert_network",), law_of_experts
    ),
    "On the bandit sgprop learns faster than backprop in the same network": Claim(
        2, "Figures 2b, 5", _MNIST, better, BANDIT, "bandit"
    ),
    "On the bandit sgprop learns faster than a dense network of the same size": Claim(
        3, "Figures 2b, 5", _MNIST, better, ("sparse_sgprop", "dense"), "bandit"
    ),
    "sgprop's advantage over backprop is there at every level of reward noise": Claim(
        4, "Figure 2c", _NOISE, better_everywhere, BANDIT, "bandit sweeps"
    ),
    "sgprop's best learning rate is larger than backprop's": Claim(
        5, "Figure 6", ("mnist_learning_rate",), larger_best_rate, BANDIT
    ),
    "sgprop's advantage is there at every number of parents": Claim(
        6, "Figure 6", ("mnist_parents",), better_everywhere, BANDIT, "bandit sweeps"
    ),
    "The more noise, the smaller the mixing weights": Claim(
        7, "Figure 6", _NOISE, falls_with, _MIXING_BY_NOISE, "bandit sweeps"
    ),
    "Adaptive mixing weights are as good as the best fixed ones": Claim(
        8, "Figure 6", ("mnist_fixed_mixing",), as_good_as_fixed, _MIXING_BY_METHOD
    ),
    "On LabyrinthEscape sgprop learns faster than backprop in the same network": Claim(
        9, "Figure 3", _ESCAPE, better, SPARSE, "escape"
    ),
    "On LabyrinthEscape sgprop learns faster than GRU and LSTM": Claim(
        10, "Figure 3", _ESCAPE_ALL, better_than_all, BASELINES, "escape"
    ),
    "On LabyrinthExplore sgprop learns faster than backprop in the same network": Claim(
        11, "Figure 3", _EXPLORE, better, SPARSE, "explore"
    ),
    "On LabyrinthExplore sgprop learns faster than GRU and LSTM": Claim(
        12, "Figure 3", _EXPLORE_ALL, better_than_all, BASELINES, "explore"
    ),
    "Over the learning rates and batch sizes tried sgprop is better than backprop, escape": Claim(
        13, "Figure 7", _ESCAPE_SWEEPS, better, SPARSE, "labyrinth sweeps"
    ),
    "Over the learning rates and batch sizes tried sgprop is better than backprop, explore": Claim(
        14, "Figure 7", _EXPLORE_SWEEPS, better, SPARSE, "labyrinth sweeps"
    ),
    "Backprop's seeds in two halves, escape": Claim(
        0, "Control: A/A", _ESCAPE, no_difference_in_halves, SPARSE[1:]
    ),
    "Backprop's seeds in two halves, explore": Claim(
        0, "Control: A/A", _EXPLORE, no_difference_in_halves, SPARSE[1:]
    ),
    "On LabyrinthEscape sgprop learns faster than with shuffled predictions": Claim(
        0, _PLACEBO, _SHUFFLED, better, ("sparsenet_sgprop", "sparsenet_placebo"), "placebo"
    ),
    "On LabyrinthEscape shuffled predictions learn faster than backprop": Claim(
        0, _PLACEBO, _SHUFFLED, better, ("sparsenet_placebo", "sparsenet_backprop"), "placebo"
    ),
    "On the bandit sgprop learns faster than with shuffled predictions": Claim(
        0, _PLACEBO, _MNIST_SHUFFLED, better, ("sparse_sgprop", "sparse_placebo"), "placebo"
    ),
    "On the bandit shuffled predictions learn faster than backprop": Claim(
        0, _PLACEBO, _MNIST_SHUFFLED, better, ("sparse_placebo", "sparse_backprop"), "placebo"
    ),
}


def judge_claims(published: Path) -> pd.DataFrame:
    """Judge every claim.

    Args:
        published: folder of the archives.

    Returns:
        One row per claim or control: number (0 for a control), claim, source, ours, runs, p (by
        Holm within its family), verdict.

    Raises:
        ResultsError: an archive lacks runs that a claim needs.
        StorageError: an archive is damaged.
    """
    findings: list[Finding] = []
    material: dict[tuple[str, ...], Results | Path] = {}
    for claim in CLAIMS.values():
        places = [published / name for name in claim.archives]
        if not all(place.is_dir() for place in places):
            findings.append(Finding("", "", verdict="not run yet"))
            continue
        if claim.archives not in material:
            simulated = not is_archive(places[0])
            material[claim.archives] = places[0] if simulated else _load(places)
        findings.append(claim.judge(material[claim.archives], *claim.arguments))
    corrected = np.array([finding.p for finding in findings])
    for family in dict.fromkeys(claim.family for claim in CLAIMS.values()):
        members = [i for i, claim in enumerate(CLAIMS.values()) if claim.family == family]
        corrected[members] = holm(corrected[members])
    return pd.DataFrame(
        {
            "number": claim.number,
            "claim": text,
            "source": claim.source,
            "ours": finding.ours,
            "runs": finding.runs,
            "p": p,
            "verdict": finding.verdict or verdict(finding, p),
        }
        for (text, claim), finding, p in zip(CLAIMS.items(), findings, corrected, strict=True)
    )


def _load(archives: Sequence[Path]) -> Results:
    """Load archives; a failed trial's score counts as 0 for its remaining planned iterations."""
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
        raise ResultsError(f"{archives[0].parent}: {unknown.iloc[0]} is complete without a score")
    return results
