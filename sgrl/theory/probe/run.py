"""The whole probe: shards of the sample, spread over processes, and the rows that come of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch

from sgrl.envs.registry import make_vector
from sgrl.nn.feedforward_policies import ActionHead
from sgrl.nn.kernels.plain import is_plain
from sgrl.nn.registry import Policy, SparseMLPPolicy, SparseNetPolicy, make_policy, name_of
from sgrl.theory.probe.bandit import bandit_shard, choose_neurons
from sgrl.theory.probe.estimates import moments, neuron_numbers, resampled_counts, summarise
from sgrl.theory.probe.gradients import Feedback, Group, Sums
from sgrl.theory.probe.labyrinth import (
    Loss,
    choose_recurrent_neurons,
    labyrinth_shard,
    labyrinth_sums,
)
from sgrl.theory.probe.sufficiency import explain
from sgrl.theory.tasks import TheoryError, check_at_least, run_pieces

NUM_SHARDS = 24
#: Steps of a recurrent network that are reported apart, as shares of the episode length.
STEP_SHARES = (0, 1 / 8, 1 / 4, 1 / 2)


class Report(NamedTuple):
    """What the probe found; rows are columns by name, see docs/theory.md."""

    neurons: list[dict[str, object]]
    layers: list[dict[str, object]]
    samples: int
    batch_size: int
    predictors: bool  # False: a policy under backprop, which nothing can be mixed in from


class ProbeSettings(NamedTuple):
    """What a probe computes; see `check_settings`."""

    samples: int
    batch_size: int
    trained_batch: int
    neurons: int
    seed: int
    parallel: int


def check_settings(
    policy: Policy,
    env: str,
    samples: int | None = None,
    batch_size: int | None = None,
    trained_batch: int | None = None,
    neurons: int = 20,
    seed: int = 0,
    parallel: int = 1,
) -> ProbeSettings:
    """Check and complete the settings of a probe.

    Args:
        policy: a `sparse_mlp` on the bandit, or a `sparsenet` on a labyrinth.
        env: its environment.
        samples: size of the large sample, rounded up to a multiple of `NUM_SHARDS`.
        batch_size: n, of the estimators whose error is reported; `trained_batch` if None.
        trained_batch: samples that a training loss is the mean of; None: the published 64 images,
            or 20 episodes. Predictors learn gradients of that mean, of which a sample's own is so
            many times as large, and so are the predictions that are reported here.
        neurons: of each layer, drawn at random; 0 stands for all.
        seed: of everything random.
        parallel: with 2 or more, shards are spread over so many Ray tasks at a time; the rows are
            the same.

    Raises:
        TheoryError: another kind of policy, or settings that make no sense.
    """
    match policy:
        case SparseNetPolicy() if env.startswith("labyrinth"):
            recurrent, known = True, policy.core_is_plain()
        case SparseMLPPolicy() if env == "mnist_bandit":
            recurrent, known = False, policy.core_is_plain() and is_plain(policy.actor, ActionHead)
        case _:
            raise TheoryError(
                "the probe is for sparse_mlp on mnist_bandit and sparsenet on a labyrinth; "
                f"this is {name_of(policy)} on {env}"
            )
    if not known:
        raise TheoryError(
            f"the probe computes the gradients of {policy.name} as it is published; this one, a "
            f"{type(policy).__name__}, computes in another way"
        )
    samples = (960 if recurrent else 4800) if samples is None else samples
    trained_batch = (20 if recurrent else 64) if trained_batch is None else trained_batch
    batch_size = trained_batch if batch_size is None else batch_size
    check_at_least(
        samples=(samples, 2 * NUM_SHARDS),
        trained_batch=(trained_batch, 1),
        batch_size=(batch_size, 1),
        neurons=(neurons, 0),
        seed=(seed, 0),
        parallel=(parallel, 1),
    )
    return ProbeSettings(samples, batch_size, trained_batch, neurons, seed, parallel)


def probe(
    policy: Policy,
    env: str,
    env_config: dict | None,
    settings: ProbeSettings,
    advance: Callable[[], object] = lambda: None,
) -> Report:
    """Measure the estimation error of a policy's gradients on its task.

    Args:
        policy: that the settings were checked for.
        env: the name of its environment, as trained.
        env_config: the settings of the environment.
        settings: from `check_settings`.
        advance: called after each of `NUM_SHARDS` shards.

    Raises:
        DataError: MNIST cannot be had.
    """
    samples, batch_size, trained_batch, neurons, seed, parallel = settings
    assert isinstance(policy, SparseNetPolicy | SparseMLPPolicy)
    size = -(-samples // NUM_SHARDS)
    config = env_config or {}
    with one_thread():
        if isinstance(policy, SparseNetPolicy):
            groups, finished = _probe_labyrinth(policy, env, config, settings, size)
        else:
            groups = choose_neurons(policy, neurons, seed)
            same = (policy, config, groups, trained_batch, seed, size)
            pieces = [(*same, shard) for shard in range(NUM_SHARDS)]
            finished = run_pieces(bandit_shard, pieces, parallel)
        sums, feedback = [], []
        for of_sums, of_feedback in finished:
            sums.append(of_sums)
            feedback.append(of_feedback)
            advance()
        generator = np.random.default_rng([seed, NUM_SHARDS])
        counts = resampled_counts(NUM_SHARDS, generator)
        test_counts = resampled_counts(len(range(1, NUM_SHARDS, 2)), generator)
        rows: list[dict[str, object]] = []
        layers: list[dict[str, object]] = []
        predictors = policy.core.sgprop.mixes
        for index, group in enumerate(groups):
            of_layer = [of_shard[index] for of_shard in sums]
            numbers = neuron_numbers(moments(of_layer, counts), batch_size, group)
            of_group = [part for of_shard in feedback if (part := of_shard[index]) is not None]
            explained = explain(of_group) if of_group else None
            of_neurons, of_all = summarise(numbers, explained, test_counts, predictors)
            place: dict[str, object] = {"layer": group.layer}
            if isinstance(policy, SparseNetPolicy):
                place["step"] = "all" if group.step is None else str(group.step)
            for neuron, row in zip(group.neurons.tolist(), of_neurons, strict=True):
                rows.append({**place, "neuron": neuron, **row})
            layers.append({**place, "neurons": len(group.neurons), **of_all})
    return Report(rows, layers, size * NUM_SHARDS, batch_size, predictors)


def _probe_labyrinth(
    policy: SparseNetPolicy,
    env: str,
    env_config: dict,
    settings: ProbeSettings,
    size: int,
) -> tuple[list[Group], Iterator[tuple[list[Sums], list[Feedback | None]]]]:
    """First all episodes are played, whose returns then normalise the loss of each."""
    with contextlib.closing(make_vector(env, 1, env_config)) as vector:
        length = vector.episode_length
    _, _, trained_batch, neurons, seed, parallel = settings
    steps = sorted({int(length * share) for share in STEP_SHARES})
    pieces = [(policy, env, env_config, steps, seed, size, shard) for shard in range(NUM_SHARDS)]
    shards = list(run_pieces(labyrinth_shard, pieces, parallel))
    loss = Loss.of([shard.episodes for shard in shards])
    groups = choose_recurrent_neurons(policy, neurons, seed, steps, length, loss.steps)
    work = [(policy, shard, loss, groups, trained_batch) for shard in shards]
    return groups, run_pieces(labyrinth_sums, work, parallel)


def fresh_policy(policy: Policy, seed: int) -> Policy:
    """A policy of the same kind and settings with initial weights and connections of its own.

    It reads observations as the other does.
    """
    fresh = make_policy(
        name_of(policy),
        policy.observation_size,
        policy.num_actions,
        seed=seed,
        dtype=next(policy.parameters()).dtype,
        **asdict(policy.settings),
    )
    if fresh.normalizer is not None and policy.normalizer is not None:
        fresh.normalizer.load_state_dict(policy.normalizer.state_dict())
    return fresh


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a Ray task: sums do not depend on how many processors there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
