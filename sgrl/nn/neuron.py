"""The slot neuron: its parameters, its output and its predictor of synthetic gradients.

A layer holds W neurons of dimension N. Neuron j reads I numbers x: its parents' states, P * N
numbers, then E external inputs, which are zeros for all but the first `num_input_neurons`
neurons. It has M slots, each with a key k_m [I], a matrix A_m [N, I] and a bias b_m [N]:

    a = softmax_m(<x, k_m> / sqrt(I)),   y_m = tanh(A_m x + b_m),   output = sum_m a_m y_m

Its predictor guesses the gradient that will arrive at the output, from the same local input:

    s = sum_m a_m (A^sg_m x + b^sg_m)       (a and x detached)

Source: the paper, Section H.2.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

#: One number for each neuron.
PerNeuron = Float[Tensor, " *W"]


class Activation(NamedTuple):
    """What a layer of slot neurons computed for K inputs: everything its backward needs."""

    inputs: Float[Tensor, "K W I"]  # x
    attention: Float[Tensor, "K W M"]  # a
    slots: Float[Tensor, "K W M N"]  # y
    output: Float[Tensor, "K W N"]


class Layer(NamedTuple):
    """A layer of slot neurons as kernels take it: sizes, connections, and the tensors themselves.

    Shapes are those of `SlotNeurons`; tensors that the layer lacks are None.
    """

    num_neurons: int  # W
    neuron_size: int  # N
    num_slots: int  # M
    external_size: int  # E
    num_input_neurons: int
    scale: float  # 1 / sqrt(I)
    noise_std: float  # of what is added to the outputs that others read; 0: nothing
    sources: Int64[Tensor, "W read"]  # what each neuron reads: P neurons, or P * N single numbers
    weight_h: Tensor
    weight_x: Tensor | None
    bias: Tensor
    predictor_h: Tensor | None
    predictor_x: Tensor | None
    predictor_bias: Tensor | None
    mixing_weight: Tensor
    mixing_memory: Tensor
    #: S, where the layers of so many runs are stacked, one run's neurons after the other's; W is
    #: then the number of all, `sources` are among all, and num_input_neurons is each run's.
    runs: int | None = None
    edges: Tensor | None = None  # `connectivity.edge_table` of the sources, where runs are stacked

    @property
    def num_runs(self) -> int:
        """S, 1 for a network by itself."""
        return self.runs or 1

    @property
    def num_parents(self) -> int:
        """P, of which each is N numbers."""
        return self.weight_h.shape[2] // self.neuron_size

    def parameters(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        every = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in every.items() if value is not None}


#: Names of a layer's parameters, in the order in which autograd functions take them.
PARAMETERS = ("weight_h", "weight_x", "bias", "predictor_h", "predictor_x", "predictor_bias")


class Stack(NamedTuple):
    """Layers of which each reads the one before; the first reads single numbers of the input."""

    layers: list[Layer]
    residual: list[bool]  # whether a layer's state is tanh(output) + state of the layer before

    def parameters(self) -> list[Tensor]:
        """weight_h and bias of every layer, then predictor_h and predictor_bias of every layer."""
        weights = [p for layer in self.layers for p in (layer.weight_h, layer.bias)]
        predictors = [(layer.predictor_h, layer.predictor_bias) for layer in self.layers]
        return weights + [p for pair in predictors for p in pair if p is not None]


class SlotNeurons(nn.Module):
    """Parameters and mixing weight of a layer of W slot neurons, and the plain forward pass.

    Keys and matrices are stored stacked, as `nn.GRU` stacks its gates: rows 0..M-1 of
    `weight_h[j]` are neuron j's keys and the other M * N rows its matrices, slot by slot.
    The columns of the external input are stored apart, in `weight_x`, and only for the neurons
    that read it: for all others those inputs are zero, and so would be the gradients.

    Args:
        num_neurons: W.
        neuron_size: N.
        num_parents: P.
        num_slots: M.
        external_size: E, length of the external input (0: none).
        num_input_neurons: the first so many neurons read the external input.
        noise_std: standard deviation of the noise that is added to the outputs, by the network.
        predictor: whether the neurons have a predictor of synthetic gradients.
        predictor_std: standard deviation of the predictor's initial weights and biases.
        mixing_weight: initial lambda of every neuron, in [0, 1].
        memory_rows: numbers per neuron that its mixing rule remembers (`MixingRule.memory`).
        generator: source of the initial weights, a CPU generator.
        predictor_generator: source of the predictor's, so that with and without predictors a seed
            gives the same network.

    Shapes:
        weight_h [W, M + M*N, P*N], weight_x [num_input_neurons, M + M*N, E], bias [W, M, N],
        predictor_h [W, M*N, P*N], predictor_x [num_input_neurons, M*N, E],
        predictor_bias [W, M, N], mixing_weight [W] and mixing_memory [memory_rows, W] (buffers;
        the latter is saved where it holds something). Without external input there is neither
        weight_x nor predictor_x.
    """

    weight_h: Tensor
    bias: Tensor
    predictor_h: Tensor
    predictor_bias: Tensor
    mixing_weight: Tensor
    mixing_memory: Tensor

    def __init__(
        self,
        num_neurons: int,
        neuron_size: int,
        num_parents: int,
        num_slots: int,
        external_size: int = 0,
        num_input_neurons: int = 0,
        noise_std: float = 0.0,
        predictor: bool = False,
        predictor_std: float = 0.0,
        mixing_weight: float = 1.0,
        memory_rows: int = 0,
        generator: torch.Generator | None = None,
        predictor_generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_neurons = num_neurons
        self.neuron_size = neuron_size
        self.num_slots = num_slots
        self.external_size = external_size
        self.num_input_neurons = num_input_neurons if external_size else 0
        # The external inputs count for every neuron, also where they are always zero.
        self.input_size = num_parents * neuron_size + external_size
        self.scale = 1 / math.sqrt(self.input_size)
        self.noise_std = noise_std
        self.has_predictor = predictor

        for name, shape in self.parameter_shapes(num_parents * neuron_size).items():
            std, source = self.scale, generator
            if name.startswith("predictor"):
                std, source = predictor_std, predictor_generator
            values = torch.zeros(shape, dtype=dtype)
            # Zeros draw nothing.
            values = values.normal_(0.0, std, generator=source) if std else values
            setattr(self, name, nn.Parameter(values))
        self.register_buffer(
            "mixing_weight", torch.full((num_neurons,), float(mixing_weight), dtype=dtype)
        )
        memory = torch.zeros(memory_rows, num_neurons, dtype=dtype)
        self.register_buffer("mixing_memory", memory, persistent=memory_rows > 0)

    def parameter_shapes(self, read: int) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name, for neurons that read so many numbers inside."""
        num_x, size_x = self.num_input_neurons, self.external_size
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows, bias in (
            ("weight", self.num_slots * (1 + self.neuron_size), "bias"),
            ("predictor", self.num_slots * self.neuron_size, "predictor_bias"),
        )[: 1 + self.has_predictor]:
            shapes[f"{part}_h"] = (self.num_neurons, rows, read)
            if num_x:
                shapes[f"{part}_x"] = (num_x, rows, size_x)
            shapes[bias] = (self.num_neurons, self.num_slots, self.neuron_size)
        return shapes

    def layer(self, sources: Tensor) -> Layer:
        """The layer as kernels take it, reading from `sources` (see `Layer`)."""
        # All have the same names here; some are not there without predictors or external input.
        own: dict[str, Any] = {**vars(self), **self._parameters, **self._buffers}
        own = {name: own.get(name) for name in Layer._fields}
        return Layer(**own | {"sources": sources})

    def join_columns(
        self, weight_h: Float[Tensor, "W R read"], weight_x: Float[Tensor, "X R E"] | None
    ) -> Float[Tensor, "W R I"]:
        """Weights over all I inputs [W, R, I]: zeros where a neuron has no external input."""
        if weight_x is None:
            return weight_h
        missing = weight_x.new_zeros(
            self.num_neurons - self.num_input_neurons, weight_h.shape[1], self.external_size
        )
        return torch.cat([weight_h, torch.cat([weight_x, missing])], dim=2)

    def keys_and_matrices(self) -> tuple[Float[Tensor, "W M I"], Float[Tensor, "W M N I"]]:
        """Keys [W, M, I] and matrices A [W, M, N, I], differentiable views of the parameters."""
        weight = self.join_columns(self.weight_h, getattr(self, "weight_x", None))
        keys, matrices = weight.split([self.num_slots, weight.shape[1] - self.num_slots], dim=1)
        return keys, matrices.unflatten(1, (self.num_slots, self.neuron_size))

    def read(
        self,
        states: Float[Tensor, "K S N"],
        parents: Int64[Tensor, "W P"],
        external: Float[Tensor, "K E"] | None,
    ) -> Float[Tensor, "K W I"]:
        """Neuron inputs x [K, W, I] from states [K, S, N], parents [W, P], external [K, E]."""
        read = states[:, parents].flatten(2)
        if external is None or not self.num_input_neurons:
            return read
        given = external.unsqueeze(1).expand(-1, self.num_input_neurons, -1)
        padding = (0, 0, 0, self.num_neurons - self.num_input_neurons)
        return torch.cat([read, nn.functional.pad(given, padding)], dim=2)

    def forward(self, inputs: Float[Tensor, "K W I"]) -> Activation:
        """Output of the layer, by the definition: inputs x [K, W, I] -> `Activation`."""
        keys, matrices = self.keys_and_matrices()
        scores = torch.einsum("kwi,wmi->kwm", inputs, keys) * self.scale
        attention = scores.softmax(dim=-1)
        slots = torch.tanh(torch.einsum("kwi,wmni->kwmn", inputs, matrices) + self.bias)
        output = torch.einsum("kwm,kwmn->kwn", attention, slots)
        return Activation(inputs, attention, slots, output)

    def predict(self, activation: Activation) -> Float[Tensor, "K W N"]:
        """Synthetic gradient s [K, W, N]; only the predictor's parameters are differentiable."""
        inputs, attention = activation.inputs.detach(), activation.attention.detach()
        matrices = self.join_columns(self.predictor_h, getattr(self, "predictor_x", None))
        matrices = matrices.unflatten(1, (self.num_slots, self.neuron_size))
        guesses = torch.einsum("kwi,wmni->kwmn", inputs, matrices) + self.predictor_bias
        return torch.einsum("kwm,kwmn->kwn", attention, guesses)


#: Added to the seed of a network's weights for that of its predictors.
_PREDICTOR_SEED_OFFSET = 0x5EED


def predictor_generator(generator: torch.Generator | None, part: int = 0) -> torch.Generator | None:
    """Source of the predictors' initial weights beside that of all others.

    Args:
        generator: source of the network's other weights; None (torch's global one) gives None.
        part: of the network; each has a stream of its own.
    """
    if generator is None:
        return None
    seed = generator.initial_seed() + _PREDICTOR_SEED_OFFSET * 2**16 + part
    return torch.Generator().manual_seed(seed % 2**32)
