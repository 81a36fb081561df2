"""Stacked policies without memory: see `stacking.py`."""

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.nn.connectivity import edge_table
from sgrl.nn.feedforward_policies import DensePolicy, SparseMLPPolicy
from sgrl.nn.kernels import torch_stack
from sgrl.nn.mixing import MixingRule
from sgrl.nn.neuron import PARAMETERS, Stack
from sgrl.nn.policy import Policy
from sgrl.nn.sgprop import MixGradient, Mixing
from sgrl.nn.stacked import Core, Stacked


class _FeedForward(Stacked):
    """Policies whose core computes each step by itself."""

    def core(self, length: int, batch_size: int) -> Core:
        return _FeedForwardCore(self)

    @abstractmethod
    def features(self, embeddings: Float[Tensor, "S K E"]) -> Float[Tensor, "S K H"]:
        """The core's output."""


class _FeedForwardCore(Core):
    def __init__(self, stacked: _FeedForward) -> None:
        self.stacked = stacked

    def step(self, embeddings: Tensor) -> Tensor:
        return self.stacked.features(embeddings)

    def run(self, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        features = self.stacked.features(embeddings.flatten(1, 2))
        return features.unflatten(1, embeddings.shape[1:3])


class StackedMLP(_FeedForward):
    """`MLPPolicy` of several runs."""

    def features(self, embeddings: Tensor) -> Tensor:
        return self.linear("core.0", embeddings).tanh()


class StackedDense(_FeedForward):
    """`DensePolicy` of several runs."""

    policy: DensePolicy

    def features(self, embeddings: Tensor) -> Tensor:
        for layer in range(self.policy.settings.num_layers):
            embeddings = self.linear(f"core.{2 * layer}", embeddings).tanh()
        return embeddings

    def act(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.linear("actor", features)


class StackedSparseMLP(_FeedForward):
    """`SparseMLPPolicy` of several runs, for episodes of one step."""

    policy: SparseMLPPolicy

    def __init__(self, policies: Sequence[Policy], device: torch.device) -> None:
        super().__init__(policies, device)
        first = self.policy
        if first.settings.shuffle_predictions:
            raise ValueError("shuffle_predictions does not stack: draw each run's by itself")
        self.memories = []
        for layer in range(first.settings.num_layers):
            name = f"core.layers.{layer}.mixing_memory"  # changed in place, like its view by run
            memory = self.buffers[name].transpose(0, 1).flatten(1).contiguous()
            self.memories.append(memory)
            self.buffers[name] = memory.unflatten(1, (self.runs, -1)).transpose(0, 1)
        self.connect()
        self.measured: dict[str, Tensor] = {}
        self.of_head: dict[str, Tensor] = {}
        settings: list[Any] = [policy.settings for policy in policies]
        self.rule = copy(first.core.rule)
        momentum = [s.mixing_momentum for s in settings]
        self.rule.momentum = self.per_run(momentum, first.settings.num_neurons)  # type: ignore[assignment]
        self.head_rule = MixingRule(adaptive=False)
        self.rules = [self.rule, self.head_rule] if first.settings.mixes else []

    def connect(self) -> None:
        neurons, pixels = self.policy.settings.num_neurons, self.policy.observation_size
        runs = torch.arange(self.runs, device=self.buffers["core.pixels"].device).view(-1, 1, 1)
        parents = self.buffers["core.parents"].unbind(1)
        self.sources = [
            (self.buffers["core.pixels"] + pixels * runs).flatten(0, 1),
            *((read + neurons * runs).flatten(0, 1) for read in parents),
        ]
        # Of the first layer's none is needed: pixels need no gradient.
        of_neurons = [edge_table(read, self.runs * neurons) for read in self.sources[1:]]
        self.edges = [None, *of_neurons]

    def layers(self) -> Stack:
        """All runs' layers, as the kernels take them."""
        plain = self.policy.core.stack()
        layers = []
        for index, layer in enumerate(plain.layers):
            tensors: dict[str, Any] = dict.fromkeys(PARAMETERS)
            for name in PARAMETERS:
                value = self.parameters.get(f"core.layers.{index}.{name}")
                tensors[name] = None if value is None else value.flatten(0, 1)
            weight = self.buffers[f"core.layers.{index}.mixing_weight"].view(-1)
            layers.append(
                layer._replace(
                    num_neurons=self.runs * layer.num_neurons,
                    sources=self.sources[index],
                    edges=self.edges[index],
                    runs=self.runs,
                    mixing_weight=weight,
                    mixing_memory=self.memories[index],
                    **tensors,
                )
            )
        return Stack(layers, plain.residual)

    def features(self, embeddings: Tensor) -> Tensor:
        mixing = Mixing(self.policy.settings, self.rule, None, self.measured)
        return torch_stack.stack(self.layers(), mixing, embeddings).flatten(2)

    def act(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        keys = self.parameters["actor.keys"]
        logits = torch.bmm(features, keys.transpose(1, 2)) * self.policy.actor.scale
        if self.policy.actor.has_predictor and torch.is_grad_enabled():
            predictor = [self.parameters[f"actor.predictor_{name}"] for name in ("A", "bias")]
            seen = [logits.detach(), features.detach()]
            logits = MixGradient.apply(logits, partial(self._regress, predictor), seen, *predictor)
        return logits

    def _regress(
        self, predictor: list[Tensor], gradient: Tensor, logits: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `ActionHead` does, for every run."""
        if self.head_rule.phase == "policy":
            return gradient, None, None
        routing = logits.softmax(-1)
        matrices, bias = predictor
        guesses = torch.einsum("sbh,sahk->sbak", h, matrices.detach()) + bias.detach().unsqueeze(1)
        residual = torch.einsum("sba,sbak->sbk", routing, guesses) - gradient
        self.of_head = {"predictor_loss": residual.square().flatten(1).mean(1)}
        regression = 2 * residual / residual[0].numel()
        routed = torch.einsum("sba,sbk->sbak", routing, regression)
        return gradient, torch.einsum("sbh,sbak->sahk", h, routed), routed.sum(1)

    def statistics(self) -> dict[str, Tensor]:
        measured = dict(self.measured)
        for name, value in self.of_head.items():
            measured[name] = measured[name] + value
        return measured

    def mixing_weights(self) -> list[Tensor]:
        if not self.policy.settings.mixes:
            return []
        layers = range(self.policy.settings.num_layers)
        return [self.buffers[f"core.layers.{layer}.mixing_weight"] for layer in layers]
