"""Policies of checkpoints, evaluated on episodes that training never sees; without Ray or pickle.

torch is imported where a policy acts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sgrl.results.checkpoints import CheckpointError, open_policy

if TYPE_CHECKING:
    from torch import Tensor

    from sgrl.nn.registry import Policy
    from sgrl.reinforce.rollout import Rollout

#: Episodes that are played side by side.
EVALUATION_BATCH = 100


class Episodes(NamedTuple):
    """The outcomes of episodes.

    Attributes:
        returns: float64 [episodes], undiscounted.
        lengths: int64 [episodes], steps.
        success: bool [episodes]; None where the environment knows no success.
    """

    returns: Tensor
    lengths: Tensor
    success: Tensor | None


def play(
    policy: Policy, environment: Mapping[str, Any], episodes: int, seed: int, greedy: bool = False
) -> Episodes:
    """Play episodes that training never sees, always the same ones for a seed.

    In a labyrinth episode i starts from environment seed `2**31 + seed + i`; the bandit shows test
    images and flips no reward.

    Args:
        policy: acts.
        environment: keys env and env_config.
        episodes: how many, at least 1.
        seed: of the environments and of the actions.
        greedy: whether actions are the likeliest instead of sampled as in training.

    Raises:
        CheckpointError: the environment cannot be had here.
    """
    import torch

    batches = []
    for start in range(0, episodes, EVALUATION_BATCH):
        size = min(EVALUATION_BATCH, episodes - start)
        rollout = evaluation_rollout(policy, environment, seed + start, size, greedy)
        with contextlib.closing(rollout.env):
            batches.append(replace(rollout.collect(), noise=None))  # not kept: it is large
    known = [batch.success for batch in batches if batch.success is not None]
    return Episodes(
        returns=torch.cat([(batch.rewards * batch.mask).double().sum(0) for batch in batches]),
        lengths=torch.cat([batch.lengths for batch in batches]),
        success=torch.cat(known) if known else None,
    )


def evaluate(
    checkpoint: Path, episodes: int = 100, seed: int = 0, greedy: bool = False
) -> dict[str, float]:
    """Play episodes with a checkpoint's policy in its environment, without Ray or pickle.

    Args:
        checkpoint: folder of a checkpoint, or what `save_policy` wrote.
        episodes: as in `play`.
        seed: as in `play`.
        greedy: as in `play`.

    Returns:
        episodes, success_rate (unless the environment knows no success), episode_return_mean,
        episode_length_mean (steps), each of these followed by the limits of its 95% interval,
        `NAME_low` and `NAME_high`: of a rate Wilson's, of a mean Student's t (NaN for one episode).

    Raises:
        CheckpointError: as `open_policy` and `play`.
        ValueError: fewer than one episode.
    """
    from scipy import stats

    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    played = play(*open_policy(checkpoint), episodes, seed, greedy)
    found: dict[str, float] = {"episodes": episodes}
    if played.success is not None:
        successes = int(played.success.sum())
        rate = stats.binomtest(successes, episodes).proportion_ci(method="wilson")
        found |= _with_interval("success_rate", successes / episodes, rate.low, rate.high)
    for name, values in (
        ("episode_return_mean", played.returns),
        ("episode_length_mean", played.lengths.double()),
    ):
        mean, half = values.mean().item(), math.nan
        if episodes > 1:
            error = values.std().item() / math.sqrt(episodes)
            half = float(stats.t.ppf(0.975, episodes - 1)) * error
        found |= _with_interval(name, mean, mean - half, mean + half)
    return found


def _with_interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def evaluation_rollout(
    policy: Policy,
    environment: Mapping[str, Any],
    seed: int,
    episodes: int = EVALUATION_BATCH,
    greedy: bool = False,
) -> Rollout:
    """A rollout of `episodes` episodes side by side, as `play` runs them. Close its `env`.

    Args:
        policy: from `open_policy`.
        environment: from `open_policy`.
        seed: of the first environment, to which `EVALUATION_SEED_OFFSET` is added.
        episodes: how many are run side by side.
        greedy: whether actions are the likeliest.

    Raises:
        CheckpointError: the environment cannot be had here.
    """
    from sgrl.envs.registry import evaluation_config, make_vector
    from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET, Rollout

    settings = evaluation_config(environment["env"], environment.get("env_config"))
    try:
        vector = make_vector(environment["env"], episodes, settings)
    except ValueError as error:
        # An environment of gymnasium may not be installed here.
        raise CheckpointError(str(error)) from None
    return Rollout(vector, policy, seed=EVALUATION_SEED_OFFSET + seed, greedy=greedy)
