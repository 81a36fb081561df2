"""What numbers mean, in one sentence each."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from sgrl.analysis.statistics import INTERVAL_SEEDS


def pair_findings(pairs: pd.DataFrame) -> list[str]:
    """Say what each comparison of two methods found, and how certain it is.

    A method is called better only where the test, corrected for all rows, says so. Of fewer than
    five seeds nothing is claimed.

    Args:
        pairs: from `comparison.compare_pairs`.

    Returns:
        One sentence for each pair that has trials of the same task.
    """
    return [_pair(row) for row in pairs.to_dict("records") if row["tasks"]]


def _pair(row: Mapping[Any, Any]) -> str:
    first, second = row["first"], row["second"]
    trials = f"{row['first_trials']} and {row['second_trials']} trials"
    over = f" in {row['tasks']} tasks" if row["tasks"] > 1 else ""
    if row["fewest_seeds"] < INTERVAL_SEEDS:
        return f"No claim about {first} and {second}: fewer than five seeds ({trials}{over})."
    difference, verdict = row["difference"], row["verdict"]
    if verdict == "differs" and difference < 0:  # the better one first
        first, second = second, first
    numbers = f"{_numbers(row, first)}; {trials}{over}"
    if verdict == "differs":
        said = f"{first} {_better(row)} {second}: p (Holm) = {row['p_holm']:.2g}, {numbers}"
    elif verdict.startswith("cannot tell: "):
        reason = verdict.removeprefix("cannot tell: ")
        said = f"Cannot tell {first} and {second} apart: {reason} ({numbers})"
    else:
        said = f"{first} and {second}: {verdict} ({numbers})"
    if row["confounded_by"] != "nothing":
        said += f". They also differ in {row['confounded_by']}"
    return said + "."


def _numbers(row: Mapping[Any, Any], method: str) -> str:
    """The difference and the probability, seen from one of the two methods."""
    difference, chance = row["difference"], row["probability"]
    low, high = row["probability_ci_low"], row["probability_ci_high"]
    if method != row["first"]:
        difference, chance, low, high = -difference, 1 - chance, 1 - high, 1 - low
    even = ", which includes even chances" if low <= 0.5 <= high else ""
    return (
        f"difference in mean AUC {difference:+.3f}, a run of {method} is the better one with "
        f"probability {chance:.2f} (95% interval {low:.2f} to {high:.2f}{even})"
    )


def _better(row: Mapping[Any, Any]) -> str:
    agree = row["difference"] * (row["probability"] - 0.5) > 0
    return "learns better than" if agree else "differs, not in one direction, from"


def probe_finding(layers: pd.DataFrame) -> str:
    """Say what a probe's numbers mean.

    A layer's error is called lower or higher only where the 95% interval says so. Of a network with
    memory the rows over all steps count.

    Args:
        layers: rows of the probe's `layers.csv`.

    Returns:
        One sentence: whether mixing predictions in lowers the error of gradients, what the best
        lambda would leave of it, and how much local inputs explain (condition B).
    """
    layers = layers.assign(layer=[_named(layer) for layer in layers["layer"]])
    whole = layers[layers["step"].astype(str) == "all"] if "step" in layers else layers
    return f"{_mixing(whole)}; {_condition(layers)}."


def _named(layer: object) -> str:
    return f"layer {layer}" if str(layer).isdigit() else f"{layer} neurons"


def _mixing(layers: pd.DataFrame) -> str:
    name = "sgprop_to_backprop"
    known = layers[layers[f"{name}_ci_low"].notna() & layers[f"{name}_ci_high"].notna()]
    if known.empty:
        return "Under backprop there are no predictions to mix in, so their gain is not known"
    low, high = known[f"{name}_ci_low"], known[f"{name}_ci_high"]
    effects = np.select([high < 1, low > 1], ["lowers", "raises"], "does not demonstrably change")
    said = [
        f"{effect} the error of gradients in {_listed(known['layer'][effects == effect])}"
        for effect in dict.fromkeys(effects)
    ]
    left = [
        f"{row['best_to_backprop']:.0%} in {row['layer']} ({_interval(row, 'best_to_backprop')})"
        for row in known.to_dict("records")
    ]
    return (
        f"Mixing predictions in {', and '.join(said)}; of backprop's error the best lambda would "
        f"leave {_listed(left)}"
    )


def _condition(layers: pd.DataFrame) -> str:
    known = layers[layers["explained_ci_low"].notna()]
    if known.empty:
        return "what local inputs explain was not measured"
    most = known.sort_values("explained_ci_low").iloc[-1].to_dict()
    if most["explained_ci_low"] <= 0:
        return "no layer's own inputs are shown to explain what it is told (condition B)"
    at = "" if most.get("step", "all") == "all" else f" at step {most['step']}"
    return (
        f"of what {most['layer']}{at} is told, its own inputs explain {most['explained']:.0%} "
        f"({_interval(most, 'explained')}; condition B)"
    )


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _interval(row: Mapping[Any, Any], name: str) -> str:
    """A share's interval. Its unbiased estimate may lie below 0, which the share itself cannot."""
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f"95% interval {max(low, 0):.0%} to {high:.0%}"
