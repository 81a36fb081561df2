"""One sample's parameter gradients as linear functions of the feedback, and sums over samples.

Everything else in the probe is computed from these sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sgrl.nn.mixing import unit
from sgrl.nn.neuron import Activation, SlotNeurons
from sgrl.nn.sgprop import mixture

W, S, M, B = range(4)  # the kinds of gradients, where they are an axis


class Seen(NamedTuple):
    """What J neurons computed for K samples, neurons first."""

    inputs: Float[Tensor, "J K I"]  # x
    attention: Float[Tensor, "J K M"]  # a
    slots: Float[Tensor, "J K M N"]  # y
    output: Float[Tensor, "J K N"]
    scale: float  # 1 / sqrt(I), all inputs counted

    @classmethod
    def of(
        cls, activation: Activation, scale: float, chosen: Int64[Tensor, " J"] | None = None
    ) -> Seen:
        """From a layer's activation [K, W, ...], of all its neurons or the chosen [J]."""
        chosen_ones = (value if chosen is None else value[:, chosen] for value in activation)
        inputs, attention, slots, output = (v.transpose(0, 1).contiguous() for v in chosen_ones)
        return cls(inputs, attention, slots, output, scale)

    def slopes(self) -> Float[Tensor, "J K M N"]:
        """Derivative of the output by the slots' pre-activations, a (1 - y^2) [J, K, M, N]."""
        return self.attention.unsqueeze(3) * (1 - self.slots.square())

    def arms(self) -> Float[Tensor, "J K M N"]:
        """a_m (y_m - output) [J, K, M, N]: a score's gradient is <feedback, arm>."""
        return self.attention.unsqueeze(3) * (self.slots - self.output.unsqueeze(2))


def isometry(seen: Seen) -> Float[Tensor, "J K N C"]:
    """Return the matrix E [J, K, N, N + M] of a sample's parameter gradients.

    Those from feedback g and g' [N] have the inner product <g E, g' E>; what
    `sgrl.nn.mixing.batch_moments` says of t and dq, as one.
    """
    square = seen.inputs.square().sum(2).unsqueeze(2)
    of_slots = ((1 + square) * seen.slopes().square().sum(2)).sqrt()
    of_keys = seen.scale * square.sqrt().unsqueeze(3) * seen.arms()
    return torch.cat([of_slots.diag_embed(), of_keys.transpose(2, 3)], dim=3)


def row_gradients(seen: Seen, feedback: Float[Tensor, "J K O N"]) -> Float[Tensor, "J K O R"]:
    """Gradients of the keys' and matrices' products with the inputs, [J, K, O, M + M*N].

    Args:
        seen: of K samples.
        feedback: gradients of the output [J, K, O, N], O for each sample.
    """
    keys = seen.scale * feedback @ seen.arms().transpose(2, 3)
    slots = seen.slopes().unsqueeze(2) * feedback.unsqueeze(3)
    return torch.cat([keys, slots.flatten(3)], dim=3)


def parameter_gradients(
    seen: Seen, feedback: Float[Tensor, "J K N"], weights: Float[Tensor, " K"]
) -> Float[Tensor, "J D"]:
    """Sum over samples of their weight times the parameter gradient: [J, D].

    Args:
        seen: of K samples.
        feedback: gradients of the output [J, K, N].
        weights: [K].

    D counts keys and matrices, row by row over all inputs, then the biases.
    """
    rows = row_gradients(seen, feedback.unsqueeze(2)).squeeze(2) * weights.unsqueeze(1)
    of_weights = rows.transpose(1, 2) @ seen.inputs
    of_biases = rows[:, :, seen.attention.shape[2] :].sum(1)
    return torch.cat([of_weights.flatten(1), of_biases], dim=1)


class Sums(NamedTuple):
    """Sums over the samples of a shard, weighted, for J neurons; over `weight` they are means.

    "unit" is about feedback normalised per sample and neuron, kinds received and synthetic, which
    the learned mixing weight is estimated from.
    """

    weight: float
    gradients: Float[Tensor, "4 J D"]  # of each kind
    products: Float[Tensor, "J 4 4"]  # <a, b> of the kinds
    noise: Float[Tensor, "J 4 4"]  # covariance given the observation, summed over parameters
    unit_gradients: Float[Tensor, "2 J D"]
    unit_products: Float[Tensor, "J 2 2"]

    @classmethod
    def total(cls, parts: Iterable[Self]) -> Self:
        """Sums over several parts of a sample, from those over each."""
        return cls(*(sum(values) for values in zip(*parts, strict=True)))  # type: ignore[arg-type]


class Feedback(NamedTuple):
    """What condition B is about, for J neurons and K samples: inputs, and gradients received."""

    inputs: Float[Tensor, "J K I"]  # x
    attention: Float[Tensor, "J K M"]  # a
    first: Float[Tensor, "J K N"]  # under backprop: the mean given the sample, or one replicate
    second: Float[Tensor, "J K N"]  # the other replicate, or the same mean
    prediction: Float[Tensor, "J K N"]  # s

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """The samples of several parts, one after the other."""
        return cls(*(torch.cat(values, dim=1) for values in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Group:
    """Neurons that rows and summaries are about together: those of a layer.

    Attributes:
        layer: its name.
        neurons: the chosen ones, int64 [J].
        mixing_weight: their lambda [J].
        step: of a recurrent network: the step whose contribution it is about; None: all steps.
        unit_samples: samples that one sample counts for in the estimate of lambda.
    """

    layer: str
    neurons: Int64[Tensor, " J"]
    mixing_weight: Float[Tensor, " J"]
    step: int | None = None
    unit_samples: float = 1.0


def backward_to_inputs(
    neurons: SlotNeurons, seen: Seen, feedback: Float[Tensor, "W K O N"]
) -> Float[Tensor, "W K O read"]:
    """Gradients of what neurons read of each other [W, K, O, P*N], from those of their output."""
    rows = row_gradients(seen, feedback)
    read = torch.bmm(rows.flatten(1, 2), neurons.weight_h.detach())
    return read.unflatten(1, rows.shape[1:3])


def scatter(
    read: Float[Tensor, "W K O read"], parents: Int64[Tensor, "W P"], size: int
) -> Float[Tensor, "W K O {size}"]:
    """Sum of the gradients [W, K, O, P*N] at the parents [W, P]: [W, K, O, N]."""
    num_neurons, samples, outcomes, _ = read.shape
    edges = read.unflatten(3, (-1, size)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    total = read.new_zeros(num_neurons, samples, outcomes, size)
    return total.index_add_(0, parents.flatten(), edges)


def sums_over_samples(
    seen: Seen,
    w: Float[Tensor, "J K O N"],
    s: Float[Tensor, "J K O N"],
    b: Float[Tensor, "J K O N"],
    mixing_weight: Float[Tensor, ...],
    probabilities: Float[Tensor, "K O"],
    weights: Float[Tensor, " K"],
) -> Sums:
    """Sums over K samples with O outcomes each.

    Args:
        seen: of the samples.
        w: received feedback of the output [J, K, O, N].
        s: synthetic feedback [J, K, O, N].
        b: backprop's feedback [J, K, O, N].
        mixing_weight: broadcast against them.
        probabilities: of the outcomes [K, O].
        weights: of the samples [K].
    """
    kinds = torch.stack([w, s, mixture(mixing_weight, w, s), b], dim=3)  # [J, K, O, 4, N]
    directions = torch.stack([unit(w), unit(s)], dim=3)
    matrix = isometry(seen).unsqueeze(2)

    def sums(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = torch.einsum("jkoan,ko->jkan", vectors, probabilities)
        gradients = [parameter_gradients(seen, part, weights) for part in means.unbind(2)]
        mapped = vectors @ matrix
        weighted = mapped * (probabilities * weights.unsqueeze(1)).view(*w.shape[1:3], 1, 1)
        products = weighted.flatten(1, 2).permute(0, 2, 1, 3).flatten(2)
        products = products @ mapped.flatten(1, 2).permute(0, 2, 1, 3).flatten(2).transpose(1, 2)
        mapped_means = torch.einsum("jkoac,ko->jkac", mapped, probabilities)
        between = torch.einsum("jkac,jkbc,k->jab", mapped_means, mapped_means, weights)
        return torch.stack(gradients), products.double(), between.double()

    gradients, products, between = sums(kinds)
    unit_gradients, unit_products, _ = sums(directions)
    total = float(weights.sum())
    return Sums(total, gradients, products, products - between, unit_gradients, unit_products)
