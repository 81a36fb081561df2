"""Mixing weights: the schedule and the estimate against their definitions."""

import pytest
import torch

from sgrl.nn.connectivity import (
    edge_table,
    random_connectivity,
    sum_over_children,
)
from sgrl.nn.mixing import (
    Moments,
    batch_moments,
    estimate_mixing_weight,
    mixing_summary,
    unit,
)
from sgrl.nn.neuron import SlotNeurons
from sgrl.nn.sgprop import positive_projection, temporal_schedule


def test_connectivity_is_uniform_without_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    parents = random_connectivity(4000, 8, 3, generator)
    assert parents.shape == (4000, 3)
    assert all(len(set(row)) == 3 for row in parents.tolist())
    counts = torch.bincount(parents.flatten(), minlength=8)
    assert counts.sum() == 12000
    # Each source is read with probability 3/8: 1500 times, standard deviation about 31.
    assert (counts - 1500).abs().max() < 150
    again = random_connectivity(4000, 8, 3, torch.Generator().manual_seed(0))
    assert torch.equal(parents, again)


@pytest.mark.parametrize("num_parents", [1, 2, 5])
def test_sums_over_edges(num_parents: int) -> None:
    generator = torch.Generator().manual_seed(num_parents)
    parents = random_connectivity(11, 13, num_parents, generator)
    values = torch.randn(11 * num_parents, 2, dtype=torch.float64, generator=generator)
    edges = edge_table(parents, 13)
    assert [row[row < len(values)].tolist() for row in edges] == [
        [e for e, parent in enumerate(parents.flatten().tolist()) if parent == source]
        for source in range(13)
    ]
    by_index_add = sum_over_children(values, parents, 13)
    torch.testing.assert_close(sum_over_children(values, parents, 13, edges), by_index_add)
    weight = torch.rand(13, generator=generator, dtype=torch.float64)[:11]
    parents = parents.clamp(max=10)
    torch.testing.assert_close(
        temporal_schedule(weight, parents, 7, 0.3, edge_table(parents, 11)),
        temporal_schedule(weight, parents, 7, 0.3),
    )


def test_schedule_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    num_neurons, length, beta = 9, 6, 0.3
    parents = random_connectivity(num_neurons, num_neurons, 2, generator)
    parents[parents == 4] = 5  # neuron 4 has no children; some edges are double
    weights = torch.rand(num_neurons, generator=generator, dtype=torch.float64)
    expected = weights.clone()
    schedule = temporal_schedule(weights, parents, length, beta)
    for t in range(length - 1, -1, -1):
        assert torch.allclose(schedule[t], expected, rtol=0, atol=1e-14)
        before = expected.clone()
        for j in range(num_neurons):
            edges = [child for child in range(num_neurons) for p in parents[child] if p == j]
            step = sum(1 - before[child].item() for child in edges) / max(len(edges), 1)
            expected[j] = min(1.0, before[j].item() + beta * step)
    assert schedule[0, 4] == weights[4]


def test_estimate_equals_materialised_gradients() -> None:
    """The factored sums equal those over per-sample gradients computed by autograd."""
    generator = torch.Generator().manual_seed(2)
    samples, num_neurons, size, slots = 7, 5, 3, 2
    neurons = SlotNeurons(num_neurons, size, 2, slots, 4, 3, generator=generator).double()
    inputs = torch.randn(samples, num_neurons, 10, generator=generator, dtype=torch.float64)
    inputs[:, 3:, 6:] = 0  # no input neurons
    gradient, prediction = torch.randn(
        2, samples, num_neurons, size, generator=generator, dtype=torch.float64
    )
    prediction += gradient
    activation = neurons(inputs)
    previous = torch.full((num_neurons,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        moments = batch_moments(activation, gradient, prediction, neurons.scale)
        estimate = estimate_mixing_weight(moments, previous, 1e-12)

    parameters = [neurons.weight_h, neurons.weight_x, neurons.bias]

    def per_sample(feedback: torch.Tensor) -> torch.Tensor:
        """[K, W, parameters of a neuron]."""
        rows = []
        for k in range(samples):
            output = neurons(inputs[k : k + 1]).output
            grads = torch.autograd.grad(output, parameters, unit(feedback)[k : k + 1])
            flat = torch.zeros(num_neurons, sum(g[0].numel() for g in grads), dtype=torch.float64)
            at = 0
            for grad in grads:
                width = grad[0].numel()
                flat[: len(grad), at : at + width] = grad.flatten(1)
                at += width
            rows.append(flat)
        return torch.stack(rows)

    w, s = per_sample(gradient), per_sample(prediction)
    u = s - w
    w_bar, u_bar = w.mean(0), u.mean(0)
    variance = (u.square().sum(-1).mean(0) - u_bar.square().sum(-1)) / (samples - 1)
    covariance = ((w * u).sum(-1).mean(0) - (w_bar * u_bar).sum(-1)) / (samples - 1)
    bias = (u_bar.square().sum(-1) - variance).clamp(min=0)
    expected = (1 + covariance / (variance + bias)).clamp(0, 1)
    assert torch.allclose(estimate, expected, rtol=1e-10)
    assert ((estimate > 0) & (estimate < 1)).any()


def test_estimate_keeps_what_it_cannot_tell() -> None:
    one, previous = torch.ones(2), torch.tensor([0.3, 0.7])
    single = Moments(one, one, one, one, num_samples=1)
    assert torch.equal(estimate_mixing_weight(single, previous, 0.0), previous)
    zero = torch.zeros(2)
    equal = Moments(zero, zero, zero, zero, num_samples=5)
    assert torch.equal(estimate_mixing_weight(equal, previous, 0.0), previous)


def test_positive_projection() -> None:
    gradient = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [1.0, 1.0]])
    prediction = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    expected = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert torch.equal(positive_projection(gradient, prediction), expected)


def test_summary() -> None:
    summary = mixing_summary(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert summary == pytest.approx(
        {
            "mixing_weight_mean": 0.5,
            "mixing_weight_min": 0.0,
            "mixing_weight_p25": 0.25,
            "mixing_weight_median": 0.5,
            "mixing_weight_p75": 0.75,
            "mixing_weight_max": 1.0,
        }
    )
