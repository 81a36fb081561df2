"""Lemma 1, Theorems 1 to 3 and formula (18) on small networks, by enumeration of all outcomes."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sgrl.nn.mixing import batch_moments, estimate_mixing_weight, unit
from sgrl.nn.neuron import SlotNeurons
from sgrl.theory.estimation import (
    batch_mixing_weight,
    error_terms,
    mean,
    mean_squared_error,
    mixing_error,
    mixing_gain,
    optimal_mixing_weight,
    total_covariance,
    total_variance,
)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Outcomes(NamedTuple):
    """A layered network with everything that can happen to it, S outcomes.

    Layer l holds tanh(W_l x_{l-1}) + noise; where `masks` is 0 there is no connection. The terminal
    feedback is x_T - target + noise.
    """

    weights: list[Tensor]  # W_l [n_l, n_{l-1}]
    masks: list[Tensor]
    activations: list[Tensor]  # [S, n_l], layer 0: the input
    feedback: Tensor  # [S, n_T]
    probabilities: Tensor  # [S]

    def observation(self, layer: int, neuron: int) -> Tensor:
        """What a neuron of a layer sees, as integers [S]."""
        read = self.activations[layer - 1] * self.masks[layer - 1][neuron]
        return read.mul(1e9).round().unique(dim=0, return_inverse=True)[1]

    def jacobian(self, layer: int) -> Tensor:
        """Of a layer with respect to the one below [S, n_l, n_{l-1}]."""
        return self.slope(layer).unsqueeze(2) * self.weights[layer - 1] * self.masks[layer - 1]

    def slope(self, layer: int) -> Tensor:
        weights = self.weights[layer - 1] * self.masks[layer - 1]
        return 1 - torch.tanh(self.activations[layer - 1] @ weights.T).square()

    def parameter_gradients(self, layer: int, feedback: Tensor) -> Tensor:
        """(d x_i / d w_i)^T g_i of each neuron [S, n_l, n_{l-1}] from feedback [S, n_l]."""
        read = self.activations[layer - 1].unsqueeze(1) * self.masks[layer - 1]
        return (self.slope(layer) * feedback).unsqueeze(2) * read


def network(
    sizes: list[int],
    seed: int,
    terminal_noise: float = 0.0,
    neuron_noise: float = 0.0,
    noisy_layer: int = 1,
    sparse_layer: int = 0,
    coarse: bool = False,
) -> Outcomes:
    """All outcomes: every input in {-1, 1}^n, with unequal probabilities, and every noise, -1 or 1
    times its size.

    Neurons of the sparse layer see only every second neuron. Weights of a coarse network differ
    in sign only, so that different inputs can look the same.
    """
    generator = torch.Generator().manual_seed(seed)
    weights, masks = [], []
    for layer in range(1, len(sizes)):
        shape = sizes[layer], sizes[layer - 1]
        weight = torch.randn(shape, generator=generator)
        weights.append(weight.sign() if coarse else 1.5 * weight)
        apart = torch.arange(shape[0])[:, None] - torch.arange(shape[1])
        every_second = (apart % 2 == 0).double()
        masks.append(every_second if layer == sparse_layer else torch.ones(shape))
    # Noise of each neuron of the noisy layer, then of each terminal neuron.
    num_neurons = sizes[noisy_layer] if neuron_noise else 0
    num_terminals = sizes[-1] if terminal_noise else 0
    signs = itertools.product((-1.0, 1.0), repeat=sizes[0] + num_neurons + num_terminals)
    inputs, on_neurons, on_terminals = torch.tensor(list(signs)).split(
        [sizes[0], num_neurons, num_terminals], dim=1
    )
    likely = torch.rand(2 ** sizes[0], generator=generator) + 0.2
    number = inputs.gt(0).long() @ 2 ** torch.arange(sizes[0])
    probabilities = likely[number] / likely[number].sum()

    activations = [inputs]
    for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True), start=1):
        output = torch.tanh(activations[-1] @ (weight * mask).T)
        if layer == noisy_layer and neuron_noise:
            output = output + neuron_noise * on_neurons
        activations.append(output)
    feedback = activations[-1] - torch.randn(sizes[-1], generator=generator)
    if terminal_noise:
        feedback = feedback + terminal_noise * on_terminals
    return Outcomes(weights, masks, activations, feedback, probabilities)


def backpropagate(net: Outcomes) -> list[Tensor]:
    """Gradients with respect to the activations of layers 1..T, each [S, n_l]."""
    gradients = [net.feedback]
    for layer in range(len(net.weights), 1, -1):
        below = torch.einsum("sji,sj->si", net.jacobian(layer), gradients[0])
        gradients.insert(0, below)
    return gradients


def oracle(net: Outcomes, gradients: list[Tensor]) -> list[Tensor]:
    """E[g_j | o_j] of all neurons, each [S, n_l]."""
    predictions = []
    for layer, gradient in enumerate(gradients, start=1):
        prediction = torch.empty_like(gradient)
        for j in range(gradient.shape[1]):
            seen = net.observation(layer, j)
            same = (seen[:, None] == seen) * net.probabilities
            prediction[:, j] = same @ gradient[:, j] / same.sum(1)
        predictions.append(prediction)
    return predictions


def propagate(net: Outcomes, predictions: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Synthetic-gradient propagation (Definition 1), lambda_l [n_l] of the receiving neurons."""
    feedback = [net.feedback]
    for layer in range(len(net.weights), 1, -1):
        parts = through_and_synthetic(net, layer, feedback[0], predictions[layer - 1])
        feedback.insert(0, torch.lerp(parts[1], parts[0], weights[layer - 2]))
    return feedback


def through_and_synthetic(
    net: Outcomes, layer: int, feedback: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """What the layer below receives through Jacobians, and from predictions."""
    jacobian = net.jacobian(layer)
    through = torch.einsum("sji,sj->si", jacobian, feedback)
    return through, torch.einsum("sji,sj->si", jacobian, prediction)


def neurons(net: Outcomes):
    for layer in range(1, len(net.weights) + 1):
        for i in range(net.weights[layer - 1].shape[0]):
            yield layer, i


NETWORKS = {
    "deterministic": {},
    "A.1": {"terminal_noise": 0.7},
    "A.2": {"neuron_noise": 0.5},
    "A.3": {"sparse_layer": 1},
    "all": {"terminal_noise": 0.7, "neuron_noise": 0.5, "sparse_layer": 1},
}


def gradients_of(net: Outcomes, feedback: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Parameter gradients of each neuron by (layer, index), [S, n_{l-1}]."""
    per_layer = [net.parameter_gradients(layer, g) for layer, g in enumerate(feedback, start=1)]
    return {(layer, i): per_layer[layer - 1][:, i] for layer, i in neurons(net)}


def test_the_networks_gradients_are_autograds() -> None:
    net = network([3, 2, 3, 2], 0, **NETWORKS["all"])
    gradients = gradients_of(net, backpropagate(net))
    noise = net.activations[1] - torch.tanh(net.activations[0] @ (net.weights[0] * net.masks[0]).T)
    for outcome in (0, 17, len(net.feedback) - 1):
        weights = [w.clone().requires_grad_() for w in net.weights]
        x = net.activations[0][outcome]
        for layer, (weight, mask) in enumerate(zip(weights, net.masks, strict=True)):
            x = torch.tanh((weight * mask) @ x) + (noise[outcome] if layer == 0 else 0)
        expected = torch.autograd.grad(x, weights, net.feedback[outcome])
        for (layer, i), gradient in gradients.items():
            torch.testing.assert_close(gradient[outcome], expected[layer - 1][i])


def empirical_means(gradients: Tensor, probabilities: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """All means of n samples, and their probabilities."""
    picks = torch.tensor(list(itertools.product(range(len(gradients)), repeat=n)))
    return gradients[picks].mean(1), probabilities[picks].prod(1)


@pytest.mark.parametrize("kind", NETWORKS)
def test_lemma_1(kind: str) -> None:
    """Over all n-tuples of outcomes: for backprop, and for biased synthetic gradients."""
    net = network([2, 2, 1], 1, **NETWORKS[kind])
    truth = gradients_of(net, backpropagate(net))
    generator = torch.Generator().manual_seed(2)
    wrong = [torch.randn(g.shape, generator=generator) for g in backpropagate(net)]
    mixed = gradients_of(net, propagate(net, wrong, [torch.full((2,), 0.4)]))
    for layer, i in neurons(net):
        target = mean(truth[layer, i], net.probabilities)
        for samples in (truth[layer, i], mixed[layer, i]):
            terms = error_terms(samples, net.observation(layer, i), target, net.probabilities)
            for n in (1, 2, 3) if len(samples) < 30 else (1, 2):
                means, likely = empirical_means(samples, net.probabilities, n)
                error = mean_squared_error(means, target, likely)
                torch.testing.assert_close(terms.mse(n), error, rtol=1e-10, atol=1e-14)
    bias = [mixed[1, i] - truth[1, i] for i in range(2)]
    assert all(mean(b, net.probabilities).norm() > 1e-3 for b in bias)


def test_lemma_1_on_simulated_data() -> None:
    """Without probabilities, samples count equally, and neurons keep their axis."""
    generator = torch.Generator().manual_seed(3)
    seen = torch.randint(7, (300,), generator=generator)
    gradients = torch.randn(300, 4, 3, generator=generator) + seen[:, None, None]
    target = torch.randn(4, 3, generator=generator)
    terms = error_terms(gradients, seen, target)
    assert terms.ecv.shape == (4,)
    error = mean_squared_error(gradients, target)
    torch.testing.assert_close(terms.mse(1), error, rtol=1e-12, atol=0.0)
    expected = torch.zeros(4)
    for value in range(7):
        group = gradients[seen == value]
        expected += (group - group.mean(0)).square().sum((0, 2)) / 300
    torch.testing.assert_close(terms.ecv, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(terms.ecv + terms.vcm, total_variance(gradients))


@pytest.mark.parametrize("seed", range(4))
def test_theorem_1(seed: int) -> None:
    """Without (A), backprop has no conditional variance: nothing unbiased given o is better."""
    net = network([3, 4, 3, 1], seed)
    generator = torch.Generator().manual_seed(seed)
    for (layer, i), gradients in gradients_of(net, backpropagate(net)).items():
        seen, target = net.observation(layer, i), mean(gradients, net.probabilities)
        terms = error_terms(gradients, seen, target, net.probabilities)
        assert terms.ecv < 1e-28
        assert terms.squared_bias < 1e-28
        # Another estimator, unbiased given o: each outcome splits into two.
        noise = torch.randn(gradients.shape, generator=generator)
        other = torch.cat([gradients + noise, gradients - noise])
        worse = error_terms(other, seen.repeat(2), target, net.probabilities.repeat(2) / 2)
        torch.testing.assert_close(worse.vcm, terms.vcm, rtol=1e-10, atol=1e-14)
        assert worse.mse(3) > terms.mse(3)


@pytest.mark.parametrize("kind", ["A.1", "A.2", "A.3"])
@pytest.mark.parametrize("seed", range(3))
def test_every_source_of_uncertainty_gives_conditional_variance(kind: str, seed: int) -> None:
    net = network([3, 4, 3, 1], seed, **NETWORKS[kind])
    ecv = [
        error_terms(g, net.observation(*place), g[0], net.probabilities).ecv
        for place, g in gradients_of(net, backpropagate(net)).items()
    ]
    assert max(ecv) > 1e-3


def compare(net: Outcomes, mixing_weight: float, own: bool = False) -> tuple[list, list]:
    """Squared bias of sgprop with the oracle at every neuron, and by how much its error with two
    samples is below backprop's.

    With `own`, neurons mix their own prediction into what they use themselves, as the project's
    networks do; without, as in Definition 1, only into what they pass on.
    """
    gradients = backpropagate(net)
    predictions = oracle(net, gradients)
    weights = [torch.full(g.shape[1:], mixing_weight) for g in gradients[:-1]]
    feedback = propagate(net, predictions, weights)
    if own:
        pairs = zip(predictions, feedback, strict=True)
        feedback = [torch.lerp(s, g, mixing_weight) for s, g in pairs]
    mixed, biases, gains = gradients_of(net, feedback), [], []
    for place, truth in gradients_of(net, gradients).items():
        target, seen = mean(truth, net.probabilities), net.observation(*place)
        backprop = error_terms(truth, seen, target, net.probabilities)
        sgprop = error_terms(mixed[place], seen, target, net.probabilities)
        biases.append(sgprop.squared_bias)
        gains.append(backprop.mse(2) - sgprop.mse(2))
    return biases, gains


@pytest.mark.parametrize("mixing_weight", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"terminal_noise": 0.7}, {"neuron_noise": 0.5, "noisy_layer": 2}],
    ids=["deterministic", "A.1", "A.2"],
)
def test_theorem_2(settings: dict, own: bool, mixing_weight: float) -> None:
    """A dense layer sees all that matters, so (B) holds: oracle predictions are unbiased, nowhere
    worse than backprop and, where (A) holds too, somewhere better."""
    for seed in range(3):
        biases, gains = compare(network([3, 3, 2, 1], seed, **settings), mixing_weight, own)
        assert max(biases) < 1e-24
        assert min(gains) > -1e-12
        if not settings or mixing_weight == 1:
            assert max(gains) < 1e-12
        else:
            assert max(gains) > 1e-4


def test_noise_that_every_child_sees() -> None:
    """Noise of the lowest neurons moves their gradients, but their children see it: only their own
    predictions can average it away."""
    net = network([3, 3, 2, 1], 0, neuron_noise=0.5, noisy_layer=1)
    assert max(compare(net, 0.0)[1]) < 1e-12
    biases, gains = compare(net, 0.0, own=True)
    assert max(biases) < 1e-24
    assert max(gains) > 1e-4


def test_theorem_2_needs_condition_b() -> None:
    """A neuron whose siblings know more about its gradient than itself makes oracles biased."""
    net = network([2, 2, 2, 1], 5, sparse_layer=2, coarse=True)
    assert len(net.observation(2, 0).unique()) == 3  # of four inputs
    biases, _ = compare(net, 0.0)
    assert max(biases) > 1e-4


def imperfect(net: Outcomes, gradients: list[Tensor], seed: int, error: float) -> list[Tensor]:
    """The oracle, and something wrong about each observation."""
    generator = torch.Generator().manual_seed(seed)
    predictions = oracle(net, gradients)
    for layer, prediction in enumerate(predictions, start=1):
        for j in range(prediction.shape[1]):
            seen = net.observation(layer, j)
            wrong = error * torch.randn(int(seen.max()) + 1, generator=generator)
            prediction[:, j] += wrong[seen]
    return predictions


@pytest.mark.parametrize("sizes", [[3, 4, 1], [3, 3, 3, 2, 1]], ids=["one layer", "three layers"])
@pytest.mark.parametrize("error", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("num_samples", [1, 8])
def test_formula_18_beats_a_grid(sizes: list[int], error: float, num_samples: int) -> None:
    """Layer by layer from the top, each below feedback that is mixed, and biased, already."""
    grid = torch.linspace(0, 1, 1001)
    found = []
    for seed in range(3):
        net = network(sizes, seed, terminal_noise=0.7, neuron_noise=0.5, noisy_layer=1)
        gradients = backpropagate(net)
        predictions = imperfect(net, gradients, seed, error)
        feedback = net.feedback
        for layer in range(len(sizes) - 1, 1, -1):
            parts = through_and_synthetic(net, layer, feedback, predictions[layer - 1])
            w, s = (net.parameter_gradients(layer - 1, part) for part in parts)
            truth = net.parameter_gradients(layer - 1, gradients[layer - 2])
            target = mean(truth, net.probabilities)
            rest = (w, s, target, num_samples, net.probabilities)
            best = optimal_mixing_weight(*rest)
            least = mixing_error(best, *rest)
            errors = torch.stack([mixing_error(point, *rest) for point in grid])
            on_grid, where = errors.min(0)
            assert (least <= on_grid * (1 + 1e-12)).all()
            curved = errors.amax(0) - on_grid > 1e-12  # elsewhere there is nothing to mix
            assert ((best - grid[where]).abs() <= 0.0005 + 1e-6)[curved].all()
            # Theorem 3: some weight below 1 is better exactly where reduced variance beats bias.
            gain = mixing_gain(*rest)
            assert torch.equal((gain > 0)[curved], (best < 1)[curved])
            slope = (errors[-1] - mixing_error(torch.tensor(1 - 1e-6), *rest)) / 1e-6
            torch.testing.assert_close(2 * gain, slope, rtol=1e-3, atol=1e-4)
            assert (best == 1)[~curved].all()
            found.append(best[curved])
            feedback = torch.lerp(parts[1], parts[0], best)
    weights = torch.cat(found)
    if error == 0:
        assert (weights < 0.5).all()
    if error == 3:
        assert (weights > 0.5).any()


def test_formula_18_is_the_error_of_all_tuples() -> None:
    """The error that (17) names, from every mean of n samples."""
    net = network([2, 2, 1], 4, terminal_noise=0.7)
    gradients = backpropagate(net)
    predictions = imperfect(net, gradients, 4, 0.5)
    parts = through_and_synthetic(net, 2, net.feedback, predictions[1])
    w, s = (net.parameter_gradients(1, part) for part in parts)
    target = mean(net.parameter_gradients(1, gradients[0]), net.probabilities)
    for point in (0.0, 0.35, 1.0):
        mixed = point * w + (1 - point) * s
        for n in (1, 2, 3):
            means, likely = empirical_means(mixed, net.probabilities, n)
            torch.testing.assert_close(
                mixing_error(torch.tensor(point), w, s, target, n, net.probabilities),
                mean_squared_error(means, target, likely),
            )


def test_nothing_to_mix() -> None:
    w = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(optimal_mixing_weight(w, w, w.mean(0), 4), torch.ones(2))
    previous = torch.tensor([0.3, 0.6])
    assert torch.equal(batch_mixing_weight(w, w, previous), previous)
    assert torch.equal(batch_mixing_weight(w[:1], -w[:1], previous), previous)


def test_batch_covariance_is_unbiased() -> None:
    """Averaged over all batches, a batch's covariances of its means are the exact ones."""
    generator = torch.Generator().manual_seed(5)
    w, s = torch.randn(2, 4, 3, generator=generator)
    likely = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for size in (2, 3):
        picks = torch.tensor(list(itertools.product(range(4), repeat=size)))
        estimates = total_covariance(w[picks].transpose(0, 1), s[picks].transpose(0, 1))
        average = mean(estimates / (size - 1), likely[picks].prod(1))
        torch.testing.assert_close(average, total_covariance(w, s, likely) / size)


def test_batches_find_the_optimum() -> None:
    """With the target E[w]; so many parameters that one batch tells all lengths well."""
    generator = torch.Generator().manual_seed(6)
    batch, size = 40, 20000
    bias = torch.tensor([[0.0], [0.1], [0.3]])
    noise = torch.randn(2, batch, 3, size, generator=generator)
    w, s = 1 + noise[0], 1 + bias + 0.5 * noise[0] + 0.2 * noise[1]
    # Per parameter Cov(w, u) = -1/2 and Var(u) = 1/4 + 1/25.
    exact = 1 - (0.5 / batch) / (0.29 / batch + bias.square()).squeeze(1)
    estimate = batch_mixing_weight(w, s, torch.zeros(3))
    assert exact[1] > 0.1
    torch.testing.assert_close(estimate, exact.clamp(0, 1), rtol=0, atol=0.02)


@pytest.mark.parametrize("samples", [2, 9])
def test_the_networks_closed_form(samples: int) -> None:
    """The layer's estimate equals the one from per-sample gradients by autograd."""
    generator = torch.Generator().manual_seed(7)
    num_neurons, size = 6, 3
    layer = SlotNeurons(
        num_neurons, size, 2, 2, external_size=4, num_input_neurons=3, generator=generator
    )
    inputs = torch.randn(samples, num_neurons, 10, generator=generator)
    inputs[:, 3:, 6:] = 0  # no input neurons
    gradient, prediction = torch.randn(2, samples, num_neurons, size, generator=generator)
    prediction[:, 1] += 2 * gradient[:, 1]
    prediction[:, 2] = gradient[:, 2]  # nothing to mix
    previous = torch.linspace(0.2, 0.7, num_neurons)
    with torch.no_grad():
        activation = layer(inputs)
        moments = batch_moments(activation, gradient, prediction, layer.scale)
        estimate = estimate_mixing_weight(moments, previous, 1e-12)

    def per_sample(feedback: Tensor) -> Tensor:
        """Gradients of keys, matrices and biases [B, W, D], zeros where a neuron has none."""
        rows = []
        for k in range(samples):
            output = layer(inputs[k : k + 1]).output
            parameters = [layer.weight_h, layer.weight_x, layer.bias]
            gradients = torch.autograd.grad(output, parameters, unit(feedback)[k : k + 1])
            flat = [g.new_zeros(num_neurons, g[0].numel()) for g in gradients]
            for rows_of, g in zip(flat, gradients, strict=True):
                rows_of[: len(g)] = g.flatten(1)
            rows.append(torch.cat(flat, 1))
        return torch.stack(rows)

    expected = batch_mixing_weight(per_sample(gradient), per_sample(prediction), previous)
    torch.testing.assert_close(estimate, expected, rtol=1e-10, atol=1e-12)
