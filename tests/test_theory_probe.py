"""The probe: equal to enumeration and autograd on tiny networks, and what the command says."""

import functools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from sgrl.analysis import theory_figures
from sgrl.analysis.findings import probe_finding
from sgrl.analysis.outputs import write_probe
from sgrl.analysis.theory_figures import probe_errors
from sgrl.cli import app
from sgrl.envs.mnist import load as load_mnist
from sgrl.envs.mnist_bandit import PUBLISHED_CLASSES
from sgrl.envs.registry import make_vector
from sgrl.nn import feedforward, recurrent
from sgrl.nn.mixing import split_parameters, unit
from sgrl.nn.policy import given
from sgrl.nn.registry import (
    SparseMLPPolicy,
    SparseNetPolicy,
    make_policy,
    save_policy,
)
from sgrl.reinforce import Rollout, UpdateSettings, discounted_returns, reinforce_loss, train
from sgrl.results.checkpoints import open_policy, write_checkpoint
from sgrl.theory.estimation import (
    error_terms,
    mean,
    mixing_error,
    optimal_mixing_weight,
    total_variance,
)
from sgrl.theory.probe import bandit as bandit_room
from sgrl.theory.probe import check_settings, probe
from sgrl.theory.probe.bandit import bandit_sums
from sgrl.theory.probe.estimates import BACKPROP_COLUMNS, moments, neuron_numbers, resampled_counts
from sgrl.theory.probe.gradients import Feedback, Group, Sums
from sgrl.theory.probe.labyrinth import Episodes, Loss, Shard, labyrinth_shard, labyrinth_sums, play
from sgrl.theory.probe.noise import noise_of
from sgrl.theory.probe.sufficiency import explain
from sgrl.theory.tasks import TheoryError

DOCUMENT = (Path(__file__).parent.parent / "docs" / "theory.md").read_text()

TRAINED_BATCH = 3
P_FLIP = 0.3


def tiny_bandit(
    residual: bool = True, actions: int = 3, neuron_noise: float = 0.0
) -> SparseMLPPolicy:
    """Three layers of four neurons, each with a mixing weight of its own."""
    policy = make_policy(
        "sparse_mlp",
        6,
        actions,
        seed=1,
        dtype=torch.float64,
        num_layers=3,
        num_neurons=4,
        neuron_size=2,
        num_parents=2,
        num_slots=3,
        residual=residual,
        neuron_noise=neuron_noise,
        adaptive=False,
        backend="eager",
    )
    generator = torch.Generator().manual_seed(2)
    for neurons in policy.core.layers:
        neurons.mixing_weight.copy_(torch.rand(4, generator=generator))
    return policy


def all_neurons(policy: SparseMLPPolicy) -> list[Group]:
    return [
        Group(str(index), torch.arange(neurons.num_neurons), neurons.mixing_weight.clone())
        for index, neurons in enumerate(policy.core.layers)
    ]


class Population:
    """A few images with unequal probabilities, and all that can follow them, by autograd."""

    def __init__(
        self, policy: SparseMLPPolicy, num_images: int = 5, noise: Tensor | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.policy, self.noise = policy, noise
        self.images = torch.randn(num_images, 6, dtype=torch.float64, generator=generator)
        self.right = torch.arange(num_images) % policy.num_actions
        weights = torch.rand(num_images, dtype=torch.float64, generator=generator) + 0.2
        self.weights = weights / weights.sum()
        outcomes = [
            (image, action, flipped)
            for image in range(num_images)
            for action in range(policy.num_actions)
            for flipped in (False, True)
        ]
        chances = torch.stack([self.logits(image) for image in range(num_images)])
        chances = chances.softmax(1).detach()
        self.probabilities = torch.stack(
            [
                self.weights[i] * chances[i, a] * (P_FLIP if flipped else 1 - P_FLIP)
                for i, a, flipped in outcomes
            ]
        )
        self.outcomes = outcomes
        self.seen = torch.tensor([image for image, _, _ in outcomes])

    def logits(self, image: int) -> Tensor:
        noise = {} if self.noise is None else {"noise": self.noise[image].view(1, 1, -1)}
        return self.policy(self.images[image].view(1, 1, -1), **noise).logits[0, 0]

    def gradients(self, layer: int, own: float | None, above: float | None) -> Tensor:
        """Each outcome's parameter gradients of a layer's neurons [S, W, D], by the network's own
        backward pass, with its mixing weights, or these instead, in the layer and above it."""
        layers = self.policy.core.layers
        kept = [neurons.mixing_weight.clone() for neurons in layers]
        for index, neurons in enumerate(layers):
            replaced = own if index == layer else above
            if replaced is not None:
                neurons.mixing_weight.fill_(replaced)
        rows = []
        for image, action, flipped in self.outcomes:
            logits = self.logits(image)
            reward = float((action == int(self.right[image])) != flipped)
            loss = -reward * logits.log_softmax(0)[action] / TRAINED_BATCH
            neurons = layers[layer]
            gradients = torch.autograd.grad(loss, (neurons.weight_h, neurons.bias))
            rows.append(torch.cat([g.flatten(1) for g in gradients], dim=1) * TRAINED_BATCH)
        for neurons, weight in zip(layers, kept, strict=True):
            neurons.mixing_weight.copy_(weight)
        return torch.stack(rows)

    def units(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Parameter gradients [S, W, D] of the received and the predicted feedback, each brought to
        unit length behind the residual branch, and the feedback received [S, W, N]."""
        recorded: dict[int, Tensor] = {}
        mix = feedforward._BackwardRecord.mix

        def record(self: feedforward._BackwardRecord, index: int, gradient: Tensor) -> tuple:
            recorded[index] = gradient * TRAINED_BATCH
            return mix(self, index, gradient)

        core, kinds, received = self.policy.core, ([], []), []
        neurons, size = core.layers[layer], core.neuron_size
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feedforward._BackwardRecord, "mix", record)
            for image, action, flipped in self.outcomes:
                x = self.images[image].view(1, -1)
                logits = self.policy(x.unsqueeze(0)).logits[0, 0]
                reward = float((action == int(self.right[image])) != flipped)
                (-reward * logits.log_softmax(0)[action] / TRAINED_BATCH).backward()
                received.append(recorded[layer][0])
                h = x
                for index in range(layer + 1):
                    of_index = core.layers[index]
                    parents = core.parents[index - 1] if index else None
                    read = h[:, core.pixels] if parents is None else of_index.read(h, parents, None)
                    activation = of_index(read)
                    output = activation.output
                    before, h = h, output
                    if core.is_residual(index):
                        h = torch.tanh(output) + before
                slope = 1 - torch.tanh(output).square() if core.is_residual(layer) else 1
                for rows, feedback in zip(
                    kinds, (recorded[layer], neurons.predict(activation)), strict=True
                ):
                    direction = unit((feedback * slope).detach()).view(1, -1, size)
                    gradients = torch.autograd.grad(
                        output, (neurons.weight_h, neurons.bias), direction, retain_graph=True
                    )
                    rows.append(torch.cat([g.flatten(1) for g in gradients], dim=1))
        return torch.stack(kinds[0]), torch.stack(kinds[1]), torch.stack(received)

    def kinds(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.gradients(layer, own=1, above=None),
            self.gradients(layer, own=0, above=None),
            self.gradients(layer, own=None, above=None),
            self.gradients(layer, own=1, above=1),
        )


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max())
    )


@pytest.mark.parametrize("residual", [True, False])
def test_bandit_equals_enumeration(residual: bool) -> None:
    policy = tiny_bandit(residual)
    population = Population(policy)
    groups = all_neurons(policy)
    sums, feedback = bandit_sums(
        policy,
        population.images,
        population.right,
        P_FLIP,
        groups,
        TRAINED_BATCH,
        population.weights,
    )
    n, p, seen = 4, population.probabilities, population.seen
    for layer, (of_layer, group) in enumerate(zip(sums, groups, strict=True)):
        numbers = numbers_of(of_layer, n, group)
        w, s, m, b = population.kinds(layer)
        target = mean(b, p)
        terms = {name: error_terms(g, seen, target, p) for name, g in (("m", m), ("b", b))}
        best = optimal_mixing_weight(w, s, target, n, p)
        unit_w, unit_s, _ = population.units(layer)
        best_unit = optimal_mixing_weight(unit_w, unit_s, mean(unit_w, p), n, p)
        expected = {
            "target_square": target.square().sum(1),
            "mse_backprop": terms["b"].mse(n),
            "mse_sgprop": terms["m"].mse(n),
            "mse_best": mixing_error(best, w, s, target, n, p),
            "mse_synthetic": mixing_error(torch.zeros(4), w, s, target, n, p),
            "ecv_backprop": terms["b"].ecv,
            "vcm_backprop": terms["b"].vcm,
            "ecv_sgprop": terms["m"].ecv,
            "vcm_sgprop": terms["m"].vcm,
            "bias_square_sgprop": terms["m"].squared_bias,
            "bias_square_synthetic": (mean(s, p) - target).square().sum(1),
            "mixing_weight": group.mixing_weight,
            "best_mixing_weight": best,
            "best_unit_mixing_weight": best_unit,
            "distance": (best_unit - group.mixing_weight).abs(),
        }
        for name, gradients in (("backprop", b), ("sgprop", m), ("synthetic", s)):
            expected[f"along_{name}"] = (mean(gradients, p) * target).sum(1)
            square = total_variance(gradients, p) / n + mean(gradients, p).square().sum(1)
            expected[f"square_{name}"] = square
        assert numbers.keys() == expected.keys()
        for name, value in expected.items():
            equal(numbers[name], value)
        for neurons in policy.core.layers:
            neurons.mixing_weight.fill_(1)
        received = population.units(layer)[2]
        for neurons, other in zip(policy.core.layers, groups, strict=True):
            neurons.mixing_weight.copy_(other.mixing_weight)
        for image, weight in enumerate(population.weights):
            of_image = seen == image
            expected_mean = mean(received[of_image], p[of_image] / weight)
            equal(feedback[layer].first[:, image], expected_mean)
        assert feedback[layer].second is feedback[layer].first or torch.equal(*feedback[layer][2:4])


@pytest.mark.parametrize("residual", [True, False])
def test_a_noisy_bandit_equals_enumeration(residual: bool) -> None:
    """An image and its noise are a sample; the ECV counts noise that the neuron does not see."""
    policy = tiny_bandit(residual, neuron_noise=0.4)
    seeds = torch.arange(10).view(2, 5)
    noise, other = (noise_of(policy, row.view(5, 1)).squeeze(1) for row in seeds)
    population = Population(policy, noise=noise)
    groups = all_neurons(policy)
    arguments = (population.images, population.right, P_FLIP, groups, TRAINED_BATCH)
    sums, feedback = bandit_sums(policy, *arguments, population.weights, seeds)
    n, p, seen = 4, population.probabilities, population.seen
    for layer, (of_layer, group) in enumerate(zip(sums, groups, strict=True)):
        numbers = numbers_of(of_layer, n, group)
        shared = 8 * layer
        replicate = Population(policy, noise=torch.cat([noise[:, :shared], other[:, shared:]], 1))
        w, s, m, b = population.kinds(layer)
        target = mean(b, p)
        for name, kind, again in (
            ("sgprop", m, replicate.kinds(layer)[2]),
            ("backprop", b, replicate.kinds(layer)[3]),
        ):
            terms = error_terms(kind, seen, target, p)
            equal(numbers[f"mse_{name}"], terms.mse(n))
            ecv = terms.ecv
            for image, weight in enumerate(population.weights):
                here = seen == image
                one = mean(kind[here], p[here] / weight)
                two = mean(again[here], replicate.probabilities[here] / weight)
                ecv = ecv + weight * (one - two).square().sum(1) / 2
            equal(numbers[f"ecv_{name}"], ecv)
            equal(numbers[f"vcm_{name}"], total_variance(kind, p) - ecv)
        equal(numbers["best_mixing_weight"], optimal_mixing_weight(w, s, target, n, p))
        assert not torch.allclose(feedback[layer].first, feedback[layer].second)


LENGTH = 5


def numbers_of(sums: Sums, num_samples: int, group: Group) -> dict[str, Tensor]:
    numbers = neuron_numbers(moments([sums]), num_samples, group)
    return {name: values[0] for name, values in numbers.items()}


def tiny_recurrent(**settings: object) -> SparseNetPolicy:
    policy = make_policy(
        "sparsenet",
        4,
        3,
        seed=1,
        dtype=torch.float64,
        feature_size=5,
        embedding_size=3,
        num_neurons=5,
        neuron_size=2,
        num_parents=2,
        num_slots=2,
        num_input_neurons=2,
        actor_slots=2,
        adaptive=False,
        backend="eager",
        **settings,
    )
    generator = torch.Generator().manual_seed(2)
    policy.core.neurons.mixing_weight.copy_(torch.rand(5, generator=generator))
    for parameter in split_parameters(policy)[1]:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.02 * values)  # they start as zeros
    return policy


def random_episodes(seed: int, count: int) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH, (count,), generator=generator)
    mask = torch.arange(LENGTH).unsqueeze(1) < lengths
    shape = LENGTH, count
    return Episodes(
        torch.randn(*shape, 4, dtype=torch.float64, generator=generator),
        torch.randint(3, shape, generator=generator),
        torch.where(mask, torch.randn(shape, dtype=torch.float64, generator=generator), 0.0),
        mask,
        torch.randint(2**40, shape, generator=generator),
    )


class RecurrentOracle:
    """Parameter gradients of one episode after the other, by the eager network's backward pass."""

    def __init__(self, policy: SparseNetPolicy, loss: Loss) -> None:
        self.policy, self.loss = policy, loss

    def run(self, episodes: Episodes, e: int) -> tuple[Tensor, recurrent._BackwardRecord]:
        """The network's parameter gradients [W, D], and what its backward pass recorded."""
        one = slice(e, e + 1)
        records = []
        finish = recurrent._BackwardRecord.finish

        def keep(self: recurrent._BackwardRecord) -> None:
            records.append(self)
            finish(self)

        neurons, mask = self.policy.core.neurons, episodes.mask[:, one]
        parameters = (neurons.weight_h, neurons.weight_x, neurons.bias)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recurrent._BackwardRecord, "finish", keep)
            noise = given(noise_of(self.policy, episodes.seeds[:, one]))
            logits = self.policy(episodes.observations[:, one], mask=mask, **noise).logits
            returns = (episodes.returns[:, one] - self.loss.mean) / (self.loss.std + 1e-8)
            terms = reinforce_loss(
                logits, episodes.actions[:, one], returns, mask, self.loss.entropy_coeff
            )
            # That one divides by this episode's steps, the probe by the mean of the sample's.
            scale = float(mask.sum()) / self.loss.steps / TRAINED_BATCH
            gradients = torch.autograd.grad(terms.loss * scale, parameters)
        return self.flat(gradients) * TRAINED_BATCH, records[0]

    def flat(self, gradients: tuple[Tensor, ...]) -> Tensor:
        of_h, of_x, of_bias = gradients
        of_x = torch.nn.functional.pad(of_x, (0, 0, 0, 0, 0, len(of_h) - len(of_x)))
        joined = torch.cat([of_h, of_x], dim=2)
        return torch.cat([joined.flatten(1), of_bias.flatten(1)], dim=1)

    def of_feedback(self, record: recurrent._BackwardRecord, t: int, feedback: Tensor) -> Tensor:
        """Contribution of step t [W, D] from feedback [1, W, N]."""
        neurons = self.policy.core.neurons
        output = neurons(record.activations[t].inputs).output
        parameters = (neurons.weight_h, neurons.weight_x, neurons.bias)
        return self.flat(torch.autograd.grad(output, parameters, feedback.detach()))

    def kinds(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Gradients of every step [4, T, K, W, D], and of its unit feedback [2, T, K, W, D]."""
        rows, units = [], []
        weights = self.policy.core.neurons.mixing_weight
        for e in range(episodes.mask.shape[1]):
            mixed, record = self.run(episodes, e)
            kept = weights.clone()
            weights.fill_(1)
            backprop, other = self.run(episodes, e)
            weights.copy_(kept)
            steps, of_units = [], []
            for t in range(LENGTH):
                received, combined, _, substitute, _ = record.steps[t]
                if self.policy.core.sgprop.mask_predictions and not record.mask[t].all():
                    substitute = received
                feedback = received, substitute, combined, other.steps[t][0]
                parts = [self.of_feedback(record, t, TRAINED_BATCH * f) for f in feedback]
                steps.append(torch.stack(parts))
                of_units.append(
                    torch.stack([self.of_feedback(record, t, unit(f)) for f in feedback[:2]])
                )
            rows.append(torch.stack(steps, dim=1))
            units.append(torch.stack(of_units, dim=1))
            equal(rows[-1][2].sum(0), mixed)
            equal(rows[-1][3].sum(0), backprop)
        return torch.stack(rows, dim=2), torch.stack(units, dim=2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"positive_projection": True, "mask_predictions": True}, {"neuron_noise": 0.4}],
    ids=["", "variant", "noisy"],
)
def test_recurrent_equals_autograd(settings: dict) -> None:
    policy = tiny_recurrent(**settings)
    episodes, others, count, n = random_episodes(3, 7), random_episodes(4, 7), 7, 3
    # A replicate of step 2 has seen the same until then.
    others = Episodes(*(torch.cat([a[:3], b[3:]]) for a, b in zip(episodes, others, strict=True)))
    loss = Loss.of([episodes])
    probabilities = torch.rand(count, dtype=torch.float64) + 0.2
    probabilities /= probabilities.sum()
    weights = policy.core.neurons.mixing_weight
    schedule = policy.core.schedule(LENGTH)
    everyone = torch.arange(5)
    groups = [
        Group("all", everyone, weights.clone(), None, loss.steps),
        Group("all", everyone, schedule[2], 2),
    ]
    shard = Shard(episodes, {2: others})
    sums, feedback = labyrinth_sums(policy, shard, loss, groups, TRAINED_BATCH, probabilities)
    oracle = RecurrentOracle(policy, loss)
    steps, units = oracle.kinds(episodes)
    replicates, _ = oracle.kinds(others)
    for group, of_group, (w, s, m, b) in zip(
        groups, sums, (steps.sum(1), steps[:, 2]), strict=True
    ):
        numbers = numbers_of(of_group, n, group)
        target = mean(b, probabilities)
        best = optimal_mixing_weight(w, s, target, n, probabilities)
        equal(numbers["best_mixing_weight"], best)
        for name, gradients in (("backprop", b), ("sgprop", m), ("synthetic", s)):
            bias = (mean(gradients, probabilities) - target).square().sum(1)
            error = total_variance(gradients, probabilities) / n + bias
            equal(numbers[f"mse_{name}"], error)
        equal(numbers["mse_best"], mixing_error(best, w, s, target, n, probabilities))
        equal(numbers["mixing_weight"], group.mixing_weight)

    # Each valid step is a sample of its own in the estimate of lambda, as likely as its episode.
    of_steps = (episodes.mask * probabilities)[episodes.mask] / loss.steps
    assert loss.steps == pytest.approx(float(episodes.mask.sum()) / count)
    unit_w, unit_s = (kind[episodes.mask] for kind in units)
    total = numbers_of(sums[0], n, groups[0])
    mean_w, mean_s = (torch.einsum("s,swd->wd", of_steps, kind) for kind in (unit_w, unit_s))
    unit_u, mean_u = unit_s - unit_w, mean_s - mean_w

    def covariance(a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
        return torch.einsum("s,swd,swd->w", of_steps, a, b) - (mean_a * mean_b).sum(1)

    samples = n * loss.steps
    slope = covariance(unit_w, unit_u, mean_w, mean_u) / samples
    spread = covariance(unit_u, unit_u, mean_u, mean_u) / samples + mean_u.square().sum(1)
    equal(total["best_unit_mixing_weight"], (1 + slope / spread).clamp(0, 1))

    at_step = numbers_of(sums[1], n, groups[1])
    for name, kind in (("sgprop", 2), ("backprop", 3)):
        difference = steps[kind, 2] - replicates[kind, 2]
        ecv = mean(difference.square().sum(2), probabilities) / 2
        equal(at_step[f"ecv_{name}"], ecv)
        assert total[f"ecv_{name}"].isnan().all()
    assert at_step["best_unit_mixing_weight"].isnan().all()
    assert feedback[1] is None


def test_play_is_a_rollout() -> None:
    env = make_vector("labyrinth_escape", 3, {"episode_length": 12})
    policy = make_policy("sparsenet", env.observation_size, env.num_actions, num_neurons=16)
    rollout = Rollout(env, policy, seed=5)
    kept = rollout.generator.get_state()
    batch = rollout.collect()
    noise = torch.empty(12, 3, 4)
    noise.exponential_(generator=torch.Generator().set_state(kept)).log_()
    episodes = play(policy, env, [5, 6, 7], noise)
    steps = int(batch.lengths.max())
    assert torch.equal(episodes.mask, batch.mask)
    assert torch.equal(episodes.actions[:steps], batch.actions[:steps])
    assert torch.equal(episodes.observations[:steps], batch.observations[:steps])
    assert torch.equal(episodes.returns, discounted_returns(batch.rewards, batch.mask, 0.95))
    for t in range(steps, 12):  # the last observation goes on, whatever others do
        assert torch.equal(episodes.observations[t], episodes.observations[steps])


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_replicates_share_the_past(sigma: float) -> None:
    env = "labyrinth_explore"
    policy = make_policy("sparsenet", 56, 4, num_neurons=16, neuron_noise=sigma)
    settings = policy, env, {"episode_length": 12}, [0, 4], 3, 20
    episodes, replicates = labyrinth_shard(*settings, 1)
    again = labyrinth_shard(*settings, 1)
    assert all(torch.equal(a, b) for a, b in zip(episodes, again.episodes, strict=True))
    other = labyrinth_shard(*settings, 2).episodes
    assert not torch.equal(other.observations[0], episodes.observations[0])
    for t, replicate in replicates.items():
        same = replicate.observations == episodes.observations
        assert same[: t + 1].all()
        assert not same[t + 1 :].all()
        assert torch.equal(replicate.actions[:t], episodes.actions[:t])
        same = replicate.seeds == episodes.seeds
        assert same[:t].all()
        assert bool(same[t:].any()) == (sigma == 0)
        assert not torch.equal(replicate.actions[t], episodes.actions[t])


def test_sampled_moments_are_unbiased_and_inside_their_intervals() -> None:
    policy = tiny_bandit()
    population, groups = Population(policy), all_neurons(policy)
    arguments = population.images, population.right, P_FLIP, groups, TRAINED_BATCH
    exact, _ = bandit_sums(policy, *arguments, population.weights)
    # Sums are linear in the weights: those of single images give those of any sample.
    alone = [
        bandit_sums(policy, *arguments, row)[0][1] for row in torch.eye(5, dtype=torch.float64)
    ]
    group, n, repeats = groups[1], 4, 40
    truth = numbers_of(exact[1], n, group)
    names = "mse_backprop", "mse_sgprop", "bias_square_sgprop", "best_mixing_weight", "mse_best"
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    inside = []
    generator = np.random.default_rng(0)
    for _ in range(repeats):
        drawn = generator.multinomial(50, population.weights.numpy(), size=24)
        shards = [
            Sums(*(sum(c * part for c, part in zip(row, parts, strict=True))
                   for parts in zip(*alone, strict=True)))
            for row in drawn.tolist()
        ]  # fmt: skip
        counts = resampled_counts(24, generator)
        numbers = neuron_numbers(moments(shards, counts), n, group)
        for name in names:
            estimate, resamples = numbers[name][0], numbers[name][1:]
            low, high = resamples.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
            inside.append((low <= truth[name]) & (truth[name] <= high))
            found[name].append(estimate)
    assert 0.85 <= torch.stack(inside).double().mean() <= 0.99
    for name in names[:3]:
        estimates = torch.stack(found[name])
        error = estimates.std(0) / repeats**0.5
        assert ((estimates.mean(0) - truth[name]).abs() < 4 * error).all()


def test_explained_share() -> None:
    """Of a gradient that is half a function of the inputs and half of something else, with noise
    that is larger than both."""
    generator = torch.Generator().manual_seed(0)

    def shard(count: int = 400) -> Feedback:
        x = torch.randn(2, count, 3, generator=generator)
        attention = torch.randn(2, count, 2, generator=generator).softmax(2)
        seen = (attention[:, :, :1] * x)[:, :, :2]
        unseen = torch.randn(2, count, 2, generator=generator)
        unseen *= seen.std() * torch.tensor([0.0, 1.0]).view(2, 1, 1)
        noise = 2 * seen.std() * torch.randn(2, 2, count, 2, generator=generator)
        return Feedback(x, attention, *(seen + unseen + noise), seen + 0.5 * unseen)

    total, error, predictor_error = explain([shard() for _ in range(24)])
    assert total.shape == (12, 2)
    shares = 1 - error.sum(0) / total.sum(0)
    assert shares.tolist() == pytest.approx([1, 0.5], abs=0.1)
    # The "prediction" has half of what the inputs do not tell: 1 - (1/2)^2 / 2 is explained.
    by_predictor = 1 - predictor_error.sum(0) / total.sum(0)
    assert by_predictor.tolist() == pytest.approx([1, 0.875], abs=0.1)


SMALL_BANDIT = {"num_layers": 2, "num_neurons": 6, "neuron_size": 3, "num_parents": 3}
SMALL_MAZE = {"num_neurons": 20, "num_input_neurons": 4, "embedding_size": 6, "feature_size": 8}


def save(
    folder: Path, name: str, env: str, sizes: tuple[int, int], env_config: dict, **settings: object
) -> Path:
    folder.mkdir()
    policy = make_policy(name, *sizes, **settings)
    save_policy(policy, folder, environment={"env": env, "env_config": env_config})
    return folder


@pytest.fixture
def bandit(tmp_path: Path) -> Path:
    settings = {**SMALL_BANDIT, "num_slots": 2}
    return save(tmp_path / "bandit", "sparse_mlp", "mnist_bandit", (784, 9), {}, **settings)


@pytest.fixture
def maze(tmp_path: Path) -> Path:
    config = {"episode_length": 12}
    return save(tmp_path / "maze", "sparsenet", "labyrinth_escape", (56, 4), config, **SMALL_MAZE)


def test_parallel_is_equal(bandit: Path, maze: Path, ray_session: None) -> None:
    for folder in (bandit, maze):
        policy, environment = open_policy(folder)
        done: list[int] = []
        arguments = policy, environment["env"], environment["env_config"]
        serial, spread = (
            probe(
                *arguments,
                check_settings(*arguments[:2], samples=50, neurons=2, parallel=count),
                functools.partial(done.append, 1),
            )
            for count in (1, 2)
        )
        assert repr(serial) == repr(spread)
        assert serial.samples == 72  # 24 shards of 3
        assert len(done) == 48


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)])


def test_command_on_a_bandit(bandit: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    arguments = "--samples", 48, "--neurons", 3, "--batch-size", 10, "--out", out
    result = run(bandit, *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "from n = 10 samples against g*, the mean of 48" in result.stdout
    assert (out / "probe.png").read_bytes().startswith(b"\x89PNG")
    neurons, layers = (pd.read_csv(out / f"{name}.csv") for name in ("neurons", "layers"))
    assert neurons.groupby("layer").size().tolist() == [3, 3] == layers["neurons"].tolist()
    mean = neurons.groupby("layer").mean()
    for name in ("mse_backprop", "mse_sgprop", "best_mixing_weight", "distance"):
        assert layers[name].tolist() == pytest.approx(mean[name].tolist())
        assert (layers[f"{name}_ci_low"] <= layers[f"{name}_ci_high"]).all()
    ratio = layers["mse_best"] / layers["mse_backprop"]
    assert layers["best_to_backprop"].tolist() == pytest.approx(ratio.tolist())
    variance = neurons["ecv_backprop"] + neurons["vcm_backprop"]
    assert result.stdout.endswith(f"{probe_finding(layers)}\n")
    assert (variance / 10).tolist() == pytest.approx(neurons["mse_backprop"].tolist())  # Lemma 1
    for column in layers.columns:
        name = re.sub("_ci_(low|high)$", "", column)
        assert f"`{name}`" in DOCUMENT, name

    found = json.loads(run(bandit, *arguments, "--json").stdout)
    assert found["layers"][1]["mse_sgprop"] == pytest.approx(layers["mse_sgprop"][1])
    assert (found["samples"], len(found["neurons"])) == (48, 6)

    table = result.stdout
    run(bandit, *arguments)
    assert run(bandit, *arguments).stdout == table
    assert run(bandit, *arguments, "--seed", 1).stdout != table
    assert run(bandit, *arguments, "--fresh", "--seed", 1).stdout != table


def test_command_on_a_maze(maze: Path, tmp_path: Path) -> None:
    result = run(maze, "--samples", 48, "--neurons", 3, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "hidden, step 6" in result.stdout
    layers = pd.read_csv(tmp_path / "layers.csv")
    steps = ["all", "0", "1", "3", "6"]
    assert layers["layer"].tolist() == ["input"] * 5 + ["hidden"] * 5
    assert layers["step"].tolist() == steps * 2
    assert len(pd.read_csv(tmp_path / "neurons.csv")) == 30
    over_time = layers[layers["step"] == "all"]
    assert over_time["ecv_backprop"].isna().all()
    assert over_time["best_unit_mixing_weight"].notna().all()


def test_backprop(tmp_path: Path) -> None:
    """Backprop's own numbers, and no others."""
    settings = {**SMALL_BANDIT, "num_slots": 2}
    for propagation in ("sgprop", "backprop"):
        settings["propagation"] = propagation
        folder = tmp_path / propagation
        save(folder, "sparse_mlp", "mnist_bandit", (784, 9), {}, **settings)
        result = run(folder, "--samples", 48, "--neurons", 0, "--out", folder)
        assert (result.exit_code, result.stderr) == (0, "")
    assert "under backprop: there are no predictions" in result.stdout
    assert "lambda" not in result.stdout
    sgprop, backprop = (pd.read_csv(tmp_path / p / "neurons.csv") for p in ("sgprop", "backprop"))
    for name in ("mse_backprop", "ecv_backprop", "explained"):
        assert backprop[name].tolist() == pytest.approx(sgprop[name].tolist())
    others = [
        name for name in backprop if not name.startswith(("layer", "neuron", *BACKPROP_COLUMNS))
    ]
    assert {"mse_sgprop", "mixing_weight", "predictor_explained"} < set(others)
    assert backprop[others].isna().all(axis=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch-size 0", "batch size must be at least 1, got 0"),
        ("--trained-batch 0", "trained batch must be at least 1, got 0"),
        ("--samples 47", "samples must be at least 48, got 47"),
        ("--samples 0", "samples must be at least 48, got 0"),
        ("--neurons -1", "neurons must be at least 0, got -1"),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--parallel 0", "parallel must be at least 1, got 0"),
        ("--out bandit/policy.json", "bandit/policy.json: File exists"),
    ],
)
def test_bad_settings(
    arguments: str, message: str, bandit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bandit.parent)
    result = run("bandit", *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"sgrl: {message}\n"
    assert [path.name for path in bandit.parent.iterdir()] == ["bandit"]


def test_policies_that_compute_otherwise_are_refused() -> None:
    bandit, recurrent = tiny_bandit(), tiny_recurrent()
    for policy, env in ((bandit, "mnist_bandit"), (recurrent, "labyrinth_escape")):
        check_settings(policy, env)
    bandit.encoder = torch.nn.Tanh()
    recurrent.core.register_forward_hook(lambda _, __, output: output)
    for policy, env in ((bandit, "mnist_bandit"), (recurrent, "labyrinth_escape")):
        with pytest.raises(TheoryError, match="as it is published; this one"):
            check_settings(policy, env)


def test_bad_checkpoints(bandit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "gru", "gru", "labyrinth_escape", (56, 4), {}, hidden_size=8)
    save(tmp_path / "dense", "dense", "mnist_bandit", (784, 9), {}, hidden_size=8)
    (tmp_path / "empty").mkdir()
    manifest = {"format": 1, "iteration": 3, "files": {"policy.json": {"size": 1, "sha256": "0"}}}
    (bandit / "manifest.json").write_text(json.dumps(manifest))
    for folder, message in (
        ("gru", "the probe is for sparse_mlp on mnist_bandit and sparsenet on a labyrinth; "
         "this is gru on labyrinth_escape"),
        ("dense", "this is dense on mnist_bandit"),
        ("empty", "empty is no checkpoint: give a folder such as"),
        ("nowhere", "nowhere is no checkpoint"),
        ("bandit", "bandit is damaged"),
    ):  # fmt: skip
        result = run(folder)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_the_documents_commands(
    bandit: Path, maze: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    """Those of docs/theory.md, on smaller policies and samples."""
    commands = re.findall(r"^\.venv/bin/sgrl (probe .*)$", DOCUMENT, flags=re.MULTILINE)
    monkeypatch.chdir(bandit.parent)
    for command, policy in zip(commands, (bandit, maze), strict=True):
        arguments = shlex.split(command.replace("--samples 2400", "--samples 48"))
        folder = Path(arguments[1])
        names = [path.name for path in policy.iterdir()]
        write_checkpoint(
            folder.parent,
            int(folder.name),
            lambda to, names=names, policy=policy: [shutil.copy(policy / n, to) for n in names],
            keep=1,
        )
        small = [] if "--samples" in arguments else ["--samples", "48"]
        result = run(*arguments[1:], *small)
        assert (result.exit_code, result.stderr) == (0, "")
    for name in ("probe", "probe_maze"):
        assert (bandit.parent / "results" / name / "probe.png").is_file()


def layer(name: str | int, sgprop: tuple, best: tuple, explained: tuple) -> dict[str, object]:
    columns = {"sgprop_to_backprop": sgprop, "best_to_backprop": best, "explained": explained}
    row: dict[str, object] = {"layer": name}
    for column, (value, low, high) in columns.items():
        row |= {column: value, f"{column}_ci_low": low, f"{column}_ci_high": high}
    return row


def test_what_the_numbers_mean() -> None:
    unknown = (math.nan, math.nan, math.nan)
    layers = pd.DataFrame(
        [
            layer(1, (0.5, 0.4, 0.6), (0.4, 0.3, 0.5), (0.2, -0.1, 0.4)),
            layer(2, (1.5, 1.2, 1.6), (0.9, -0.1, 1.1), (0.3, 0.1, 0.5)),
            layer("hidden", (0.9, 0.7, 1.1), (0.8, 0.6, 1.0), unknown),
        ]
    )
    assert probe_finding(layers) == (
        "Mixing predictions in lowers the error of gradients in layer 1, and raises the error of "
        "gradients in layer 2, and does not demonstrably change the error of gradients in hidden "
        "neurons; of backprop's error the best lambda would leave 40% in layer 1 (95% interval 30% "
        "to 50%), 90% in layer 2 (95% interval 0% to 110%) and 80% in hidden neurons (95% interval "
        "60% to 100%); of what layer 2 is told, its own inputs explain 30% (95% interval 10% to "
        "50%; condition B)."
    )
    backprop = pd.DataFrame([layer(1, unknown, unknown, (0.2, -0.1, 0.4))])
    assert probe_finding(backprop) == (
        "Under backprop there are no predictions to mix in, so their gain is not known; no layer's "
        "own inputs are shown to explain what it is told (condition B)."
    )


@pytest.mark.parametrize("negative", [False, True])
def test_the_figure_shows_estimates_below_0(
    bandit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, negative: bool
) -> None:
    """On a logarithmic axis they would be lost."""
    assert run(bandit, "--samples", 48, "--neurons", 3, "--out", tmp_path).exit_code == 0
    neurons, layers = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("neurons", "layers"))
    for column in [name for name in layers if name.startswith("mse_")]:
        layers[column] = layers[column].abs()
        if column in neurons:
            neurons[column] = neurons[column].abs()
    if negative:
        layers.loc[0, "mse_best"] *= -1
    drawn: list[Any] = []
    monkeypatch.setattr(theory_figures, "save", lambda figure, *_: drawn.append(figure))
    probe_errors(neurons, layers, tmp_path / "probe.png", "")
    axis = drawn[0].axes[0]
    assert axis.get_yscale() == ("symlog" if negative else "log")
    marked = [line for line in axis.lines if line.get_label() == "sgprop, best lambda"]
    assert marked[0].get_ydata().tolist() == layers["mse_best"].tolist()
    low, high = axis.get_ylim()
    assert low < layers["mse_best"].min()
    assert high > layers["mse_best"].max()


def test_without_ray(bandit: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; import sgrl.cli; sgrl.cli.main()"
    arguments = "probe bandit --samples 48 --neurons 1 --out out"
    command = [sys.executable, "-c", code, *arguments.split()]
    subprocess.run(command, cwd=bandit.parent, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_numbers_are_stable_when_the_sample_is_doubled(tmp_path: Path) -> None:
    """The published network after 400 updates: minutes on one core."""
    env = make_vector("mnist_bandit", 64, {})
    policy = make_policy("sparse_mlp", env.observation_size, env.num_actions)
    settings = UpdateSettings(
        entropy_coeff=0, grad_clip=None, normalize_returns=False, two_phase=True
    )
    for _ in train(policy, env, 400, lr=5e-3, predictor_lr=5e-3, settings=settings):
        pass
    frames = []
    for samples in (2400, 4800):
        checked = check_settings(policy, "mnist_bandit", samples)
        report = probe(policy, "mnist_bandit", {}, checked)
        write_probe(report, tmp_path)
        frames.append(pd.DataFrame(report.layers))
    some, twice = frames
    same = []
    for column in some.columns:
        if f"{column}_ci_low" not in some or "explained" in column:
            continue  # the regression knows more from more samples
        same += (
            (some[f"{column}_ci_low"] <= twice[f"{column}_ci_high"])
            & (twice[f"{column}_ci_low"] <= some[f"{column}_ci_high"])
        ).tolist()
    assert np.mean(same) > 0.95
    for column in ("mse_backprop", "mse_sgprop", "mse_best", "mse_synthetic"):
        assert some[column].tolist() == pytest.approx(twice[column].tolist(), rel=0.1)


def test_which_guesses_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment tells which, also of guesses that were wrong."""
    monkeypatch.setattr(bandit_room, "bandit_sums", lambda *arguments: arguments)
    policy = make_policy("sparse_mlp", 784, 9, num_layers=1, num_neurons=4)
    _, images, right, p_flip, *_ = bandit_room.bandit_shard(
        policy, {}, [], 3, seed=0, size=50, shard=0
    )
    pixels = np.rint((images.numpy() * 0.3081 + 0.1307) * 255).astype(np.uint8)
    known = {image.tobytes(): label for image, label in zip(*load_mnist("train"), strict=True)}
    digits = [known[row.tobytes()] for row in pixels]
    assert np.array(PUBLISHED_CLASSES)[right.numpy()].tolist() == digits
    assert p_flip == 0.4
