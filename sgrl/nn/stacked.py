"""Stacked policies: what all kinds share, and those of the labyrinths (see `stacking.py`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import layer_norm, leaky_relu

from sgrl.nn.connectivity import edge_table
from sgrl.nn.encoder import DenseCoreSettings
from sgrl.nn.kernels import torch_unroll, triton_layer, triton_unroll
from sgrl.nn.kernels.torch_layer import Pass
from sgrl.nn.mixing import MixingRule
from sgrl.nn.neuron import Layer
from sgrl.nn.policy import Policy, PolicyOutput
from sgrl.nn.recurrent_policies import SparseNetPolicy
from sgrl.nn.sgprop import Mixing, temporal_schedule


class Stacked(ABC):
    """S policies of one kind, as one.

    Attributes:
        runs: S.
        parameters: [S, ...] by the name that they have in a policy, in its order; leaves, all of
            which are trained.
        buffers: likewise; changed in place.
        rules: by which lambda follows the batches; none where nothing is mixed.
    """

    def __init__(self, policies: Sequence[Policy], device: torch.device) -> None:
        first = policies[0]
        self.runs = len(policies)
        self.policy = first
        self.action_space = first.action_space
        self.parameters = {
            name: _stack(policies, name, device).requires_grad_()
            for name, _ in first.named_parameters()
        }
        self.buffers = {name: _stack(policies, name, device) for name, _ in first.named_buffers()}
        self.rules: list[MixingRule] = []

    def unstack(self, policies: Sequence[Policy]) -> None:
        """Copy each run's tensors into its policy, on whatever device that is.

        Raises:
            ValueError: there is not one for each run, or one of another kind or type; none was
                changed.
        """
        if len(policies) != self.runs:
            raise ValueError(f"{len(policies)} policies are not one for each of {self.runs} runs")
        tensors = self.parameters | self.buffers
        for policy in policies:
            own = dict(policy.named_parameters()) | dict(policy.named_buffers())
            reason = misfit(own, tensors)
            if reason is not None:
                raise ValueError(f"a policy {policy.name!r} is none of these runs': {reason}")
        with torch.no_grad():
            for name, stacked in tensors.items():
                for policy, value in zip(policies, stacked, strict=True):
                    _find(policy, name).copy_(value)

    def connect(self) -> None:  # noqa: B027 - most kinds have nothing of the sort
        """Take note that buffers which say what is connected have changed."""

    def split(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters of the policies, and of their predictors (as `mixing.split_parameters`)."""
        predictor = {n: p for n, p in self.parameters.items() if ".predictor_" in n}
        return {n: p for n, p in self.parameters.items() if n not in predictor}, predictor

    def linear(self, name: str, x: Float[Tensor, "S K i"]) -> Float[Tensor, "S K o"]:
        """The linear layer of that name, of each run."""
        return self.affine(f"{name}.weight", f"{name}.bias", x)

    def affine(self, weight: str, bias: str, x: Float[Tensor, "S K i"]) -> Float[Tensor, "S K o"]:
        """The same, of parameters of any names."""
        matrices = self.parameters[weight].transpose(1, 2)
        return torch.baddbmm(self.parameters[bias].unsqueeze(1), x, matrices)

    def encode(self, observations: Float[Tensor, "S K F"]) -> Float[Tensor, "S K E"]:
        """The encoder."""
        if isinstance(self.policy.encoder, nn.Identity):
            return observations
        features = self.linear("encoder.0", observations)
        features = layer_norm(features, features.shape[-1:], eps=1e-5)
        return leaky_relu(self.linear("encoder.2", features), 0.01)

    def actor_rows(self) -> Float[Tensor, "S rows H"] | None:
        """What `act` needs of the actor's parameters, the same at every step; None: nothing."""
        return None

    def act(
        self, features: Float[Tensor, "S K H"], rows: Float[Tensor, "S rows H"] | None = None
    ) -> Float[Tensor, "S K A"]:
        """The actor; `rows` is what `actor_rows` returned."""
        for layer in ("actor.0", "actor.2"):
            features = leaky_relu(self.linear(layer, features), 0.01)
        return self.linear("actor.4", features)

    @abstractmethod
    def core(self, length: int, batch_size: int) -> "Core":
        """The core, before the first of T steps of B episodes of each run."""

    def start(self, length: int, batch_size: int) -> "StackedActing":
        """For acting through whole episodes, then replaying them for the update."""
        return StackedActing(self, length, batch_size)

    def __call__(
        self, observations: Float[Tensor, "T S B F"], mask: Bool[Tensor, "T S B"] | None = None
    ) -> PolicyOutput:
        """Whole sequences, from the initial state: logits [T, S, B, A], values [T, S, B]."""
        length, _, batch_size, _ = observations.shape
        return self.run(self.core(length, batch_size), observations, mask)

    def run(self, core: "Core", observations: Tensor, mask: Tensor | None) -> PolicyOutput:
        """As `__call__`, by a core that may have made its steps already."""
        length, _, batch_size, _ = observations.shape
        by_run = observations.transpose(0, 1)
        embeddings = self.encode(by_run.flatten(1, 2)).unflatten(1, (length, batch_size))
        features = core.run(embeddings, None if mask is None else mask.transpose(0, 1))
        features = features.flatten(1, 2)
        values = None
        if self.policy.value_head is not None:
            values = self.linear("value_head", features).squeeze(-1)
            values = values.unflatten(1, (length, batch_size)).transpose(0, 1)
        logits = self.act(features).unflatten(1, (length, batch_size)).transpose(0, 1)
        return PolicyOutput(logits, values, {})

    def statistics(self) -> dict[str, Tensor]:
        """What the last backward pass measured, each [S], by name."""
        return {}

    def mixing_weights(self) -> list[Float[Tensor, "S W"]]:
        """Lambda of every layer; an empty list where nothing is mixed."""
        return []

    def per_run(self, values: Sequence[float], repeat: int = 1) -> Float[Tensor, " numbers"]:
        """A number of each run, so often each."""
        like = next(iter(self.parameters.values()))
        tensor = torch.tensor(values, dtype=like.dtype, device=like.device)
        return tensor.repeat_interleave(repeat)


class Core(ABC):
    """The part of a policy that runs over time, for T steps of B episodes of each of S runs."""

    @abstractmethod
    def step(self, embeddings: Float[Tensor, "S B E"]) -> Float[Tensor, "S B H"]:
        """The next step, without gradient."""

    @abstractmethod
    def run(
        self, embeddings: Float[Tensor, "S T B E"], mask: Bool[Tensor, "S T B"] | None
    ) -> Float[Tensor, "S T B H"]:
        """All steps, from the initial state, for a gradient."""


class StackedActing:
    """Stacked policies taking one step of S x B episodes after the other."""

    def __init__(self, stacked: Stacked, length: int, batch_size: int) -> None:
        self.stacked = stacked
        with torch.no_grad():
            self.core = stacked.core(length, batch_size)
            self.actor_rows = stacked.actor_rows()

    @torch.no_grad()
    def step(self, observations: Float[Tensor, "S B F"]) -> Float[Tensor, "S B A"]:
        """Observations -> logits."""
        features = self.core.step(self.stacked.encode(observations))
        return self.stacked.act(features, self.actor_rows)

    def replay(
        self, observations: Float[Tensor, "T S B F"], mask: Bool[Tensor, "T S B"]
    ) -> PolicyOutput:
        """As the stacked policies' `__call__`, without the steps of the core already made."""
        return self.stacked.run(self.core, observations, mask)


class StackedNeurons:
    """`SlotNeurons` of several runs as one layer, run after run.

    Args:
        stacked: whose parameters and buffers they are.
        name: of the neurons in a policy.
    """

    def __init__(self, stacked: Stacked, name: str) -> None:
        self.stacked, self.name = stacked, name
        kept = f"{name}.mixing_memory"  # changed in place, like its view by run
        self.memory = stacked.buffers[kept].transpose(0, 1).flatten(1).contiguous()
        stacked.buffers[kept] = self.memory.unflatten(1, (stacked.runs, -1)).transpose(0, 1)

    def connect(
        self, sources: Int64[Tensor, "S W read"], num_sources: int, with_edges: bool = True
    ) -> None:
        """Take what each run's neurons read of that run's sources.

        Args:
            sources: by run.
            num_sources: of one run.
            with_edges: whether the sources need a gradient.
        """
        runs = self.stacked.runs
        offset = num_sources * torch.arange(runs, device=sources.device).view(-1, 1, 1)
        self.sources = (sources + offset).flatten(0, 1)
        self.edges = edge_table(self.sources, runs * num_sources) if with_edges else None

    @property
    def mixing_weight(self) -> Float[Tensor, "S W"]:
        """Lambda of each run."""
        return self.stacked.buffers[f"{self.name}.mixing_weight"]

    def layer(self, plain: Layer) -> Layer:
        """All runs' neurons as the kernels take them, given those of one policy."""
        parameters = self.stacked.parameters
        tensors: dict[str, Any] = {
            name: parameters[f"{self.name}.{name}"].flatten(0, 1) for name in plain.parameters()
        }
        return plain._replace(
            num_neurons=self.stacked.runs * plain.num_neurons,
            sources=self.sources,
            edges=self.edges,
            runs=self.stacked.runs,
            mixing_weight=self.mixing_weight.view(-1),
            mixing_memory=self.memory,
            **tensors,
        )


class StackedSparseNet(Stacked):
    """`SparseNetPolicy` of several runs: their cores' neurons are one layer, run after run."""

    policy: SparseNetPolicy  # the first run's

    def __init__(self, policies: Sequence[Policy], device: torch.device) -> None:
        super().__init__(policies, device)
        first = self.policy
        neurons = first.settings.num_neurons
        self.neurons = StackedNeurons(self, "core.neurons")
        self.connect()
        self.measured: dict[str, Tensor] = {}
        settings: list[Any] = [policy.settings for policy in policies]
        self.beta = self.per_run([s.schedule_beta for s in settings], neurons)
        self.rule = copy(first.core.rule)
        momentum = self.per_run([s.mixing_momentum for s in settings], neurons)
        self.rule.momentum = momentum  # type: ignore[assignment]
        self.rules = [self.rule]
        #: Whether the time loops run in Triton kernels: not with backend "torch".
        self.fused = (
            triton_unroll.serves(self.layer())
            and self.rule.samples == "steps"
            and all(s.backend != "torch" for s in settings)
        )

    def connect(self) -> None:
        self.neurons.connect(self.buffers["core.parents"], self.policy.settings.num_neurons)

    def layer(self) -> Layer:
        """All runs' cores, as the kernels take them."""
        return self.neurons.layer(self.policy.core.layer())

    def core(self, length: int, batch_size: int) -> Core:
        return _SparseNetCore(self, length, batch_size)

    def schedule(self, length: int) -> Tensor:
        """Lambda at every step, [T, S * W]."""
        layer = self.layer()
        if self.fused:
            return triton_layer.temporal_schedule(layer, length, self.beta)
        weight = layer.mixing_weight
        return temporal_schedule(weight, layer.sources, length, self.beta, layer.edges)

    def actor_rows(self) -> Tensor:
        keys, values = (self.parameters[f"actor.{name}"].flatten(1, 2) for name in ("keys", "A"))
        return torch.cat([keys * self.policy.actor.scale, values], dim=1)

    def act(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        bias = self.parameters["actor.b"]
        rows = self.actor_rows() if rows is None else rows
        products = torch.bmm(features, rows.transpose(1, 2))
        scores, values = products.unflatten(-1, (2, *bias.shape[1:])).unbind(-3)
        return (scores.softmax(dim=-1) * (values + bias.unsqueeze(1))).sum(-1)

    def statistics(self) -> dict[str, Tensor]:
        return self.measured

    def mixing_weights(self) -> list[Tensor]:
        return [self.neurons.mixing_weight] if self.policy.settings.mixes else []


class _SparseNetCore(Core):
    def __init__(self, stacked: StackedSparseNet, length: int, batch_size: int) -> None:
        self.stacked = stacked
        self.length = length
        self.steps = 0
        settings = stacked.policy.settings
        weight = stacked.parameters["core.neurons.weight_h"]
        shape = (stacked.runs, batch_size, settings.num_neurons, settings.neuron_size)
        self.h_0 = weight.new_zeros(shape)
        self.passed: Pass | None = None

    def step(self, embeddings: Tensor) -> Tensor:
        if self.passed is None:
            kind = triton_unroll.Pass if self.stacked.fused else Pass
            self.passed = kind(self.stacked.layer(), self.length, self.h_0)
        passed = self.passed
        passed.step(self.steps, passed.external(embeddings.unsqueeze(1))[:, :, :, 0])
        self.steps += 1
        state = passed.states[self.steps].unflatten(0, (self.stacked.runs, -1))
        return state.flatten(1, 2).transpose(1, 2)

    def run(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        stacked = self.stacked
        layer = stacked.layer()
        mixing = Mixing(stacked.policy.settings, stacked.rule, None, stacked.measured)
        passed = self.passed if self.steps == self.length else None
        unroll = triton_unroll.unroll if stacked.fused else torch_unroll.unroll
        output = unroll(layer, mixing, stacked.schedule, embeddings, self.h_0, mask, passed)
        return output.flatten(3)


#: (embeddings [S, T, B, E], run's tensors by name, state) -> features and state after each step.
Cell = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


class _DenseRNN(Stacked):
    """Policies whose core computes one step as a function of embedding and state."""

    #: How many tensors its state consists of.
    state_size: ClassVar[int]

    def core(self, length: int, batch_size: int) -> Core:
        return _DenseCore(self, batch_size)

    def embed(self, embeddings: Float[Tensor, "S K E"]) -> Float[Tensor, "S K rows"]:
        """What the embeddings add to each step."""
        return self.affine("core.weight_ih_l0", "core.bias_ih_l0", embeddings)

    def recur(self, h: Float[Tensor, "S B H"]) -> Float[Tensor, "S B rows"]:
        """What the state before adds to a step."""
        return self.affine("core.weight_hh_l0", "core.bias_hh_l0", h)

    @abstractmethod
    def cell(self, embedded: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step: what `embed` returned, and the state before, to the state after."""


class _DenseCore(Core):
    def __init__(self, stacked: _DenseRNN, batch_size: int) -> None:
        self.stacked = stacked
        first = next(iter(stacked.parameters.values()))
        settings = stacked.policy.settings
        assert isinstance(settings, DenseCoreSettings)
        shape = (stacked.runs, batch_size, settings.hidden_size)
        self.initial = tuple(first.new_zeros(shape) for _ in range(stacked.state_size))
        self.state = self.initial

    def step(self, embeddings: Tensor) -> Tensor:
        self.state = self.stacked.cell(self.stacked.embed(embeddings), self.state)
        return self.state[0]

    def run(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        embedded = self.stacked.embed(embeddings.flatten(1, 2))
        embedded = embedded.unflatten(1, embeddings.shape[1:3])
        state, features = self.initial, []
        for now in embedded.unbind(1):
            state = self.stacked.cell(now, state)
            features.append(state[0])
        return torch.stack(features, dim=1)


class StackedGRU(_DenseRNN):
    """`GRUPolicy` of several runs."""

    state_size = 1

    def cell(self, embedded: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        recurrent = self.recur(h)
        size = h.shape[-1]
        gates = _sigmoid(embedded[..., : 2 * size] + recurrent[..., : 2 * size])
        reset, update = gates.chunk(2, -1)
        new = torch.tanh(embedded[..., 2 * size :] + reset * recurrent[..., 2 * size :])
        return (new + update * (h - new),)


class StackedLSTM(_DenseRNN):
    """`LSTMPolicy` of several runs."""

    state_size = 2

    def cell(self, embedded: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = state
        put, forget, value, out = (embedded + self.recur(h)).chunk(4, -1)
        c = _sigmoid(forget) * c + _sigmoid(put) * value.tanh()
        return _sigmoid(out) * c.tanh(), c


def _sigmoid(x: Tensor) -> Tensor:
    # Torch's own rounds a tensor's last numbers otherwise on a CPU, and so a pack's last run.
    return (torch.tanh(x / 2) + 1) / 2


def _find(policy: nn.Module, name: str) -> Tensor:
    module, _, last = name.rpartition(".")
    return getattr(policy.get_submodule(module), last)


def _stack(policies: Sequence[Policy], name: str, device: torch.device) -> Tensor:
    return torch.stack([_find(policy, name).detach().to(device) for policy in policies])


def misfit(tensors: Mapping[str, Tensor], stacked: Mapping[str, Tensor]) -> str | None:
    """Why tensors by name are not those of one run of `stacked` [S, ...]; None if they are."""
    for name in [*stacked, *tensors]:
        if name not in tensors or name not in stacked:
            return f"{name} is {'missing' if name in stacked else 'unknown'}"
        one, run = tensors[name], stacked[name][0]
        if (one.shape, one.dtype) != (run.shape, run.dtype):
            sizes = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (one, run)]
            return f"{name} is {sizes[0]}, not {sizes[1]}"
    return None
