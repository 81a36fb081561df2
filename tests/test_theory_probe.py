"""The probe: equal to enumeration and autograd on tiny networks, and what the command says."""

import pytest
import torch
from torch import Tensor

from sgrl.nn import feedforward
from sgrl.nn.mixing import unit
from sgrl.nn.policies import SparseMLPPolicy, make_policy
from sgrl.theory.estimation import (
    error_terms,
    mean,
    mixing_error,
    optimal_mixing_weight,
    total_variance,
)
from sgrl.theory.probe import (
    Group,
    bandit_sums,
    moments,
    neuron_numbers,
)

TRAINED_BATCH = 3
P_FLIP = 0.3


def tiny_bandit(residual: bool = True, actions: int = 3) -> SparseMLPPolicy:
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

    def __init__(self, policy: SparseMLPPolicy, num_images: int = 5) -> None:
        generator = torch.Generator().manual_seed(3)
        self.policy = policy
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
        chances = policy(self.images.unsqueeze(0)).logits[0].softmax(1).detach()
        self.probabilities = torch.stack(
            [
                self.weights[i] * chances[i, a] * (P_FLIP if flipped else 1 - P_FLIP)
                for i, a, flipped in outcomes
            ]
        )
        self.outcomes = outcomes
        self.seen = torch.tensor([image for image, _, _ in outcomes])

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
            logits = self.policy(self.images[image].view(1, 1, -1)).logits[0, 0]
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
        numbers = {k: v[0] for k, v in neuron_numbers(moments([of_layer]), n, group).items()}
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
