"""Stacked policies without memory: see `stacking.py`."""

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.nn.feedforward_policies import DensePolicy, SparseMLPPolicy, regress_on_logits
from sgrl.nn.kernels import torch_stack
from sgrl.nn.mixing import MixingRule
from sgrl.nn.neuron import Stack
from sgrl.nn.policy import Policy
from sgrl.nn.sgprop import MixGradient, Mixing
from sgrl.nn.stacked import Core, Stacked, StackedNeurons


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
        names = [f"core.layers.{layer}" for layer in range(first.settings.num_layers)]
        self.layers = [StackedNeurons(self, name) for name in names]
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
        first, *others = self.layers
        # Pixels need no gradient.
        first.connect(self.buffers["core.pixels"], self.policy.observation_size, with_edges=False)
        for layer, parents in zip(others, self.buffers["core.parents"].unbind(1), strict=True):
            layer.connect(parents, self.policy.settings.num_neurons)

    def stack(self) -> Stack:
        """All runs' layers, as the kernels take them."""
        plain = self.policy.core.stack()
        layers = zip(self.layers, plain.layers, strict=True)
        return Stack([stacked.layer(layer) for stacked, layer in layers], plain.residual)

    def features(self, embeddings: Tensor) -> Tensor:
        mixing = Mixing(self.policy.settings, self.rule, None, self.measured)
        return torch_stack.stack(self.stack(), mixing, embeddings).flatten(2)

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
    ) -> tuple[Tensor | None, ...]:
        """As `ActionHead` does, for every run."""
        if self.head_rule.phase == "policy":
            return gradient, None, None
        given = (gradient, logits, h, *(parameter.detach() for parameter in predictor))
        residual, *grads = regress_on_logits(*given)
        self.of_head = {"predictor_loss": residual.square().flatten(1).mean(1)}
        return gradient, *grads

    def statistics(self) -> dict[str, Tensor]:
        measured = dict(self.measured)
        for name, value in self.of_head.items():
            measured[name] = measured[name] + value
        return measured

    def mixing_weights(self) -> list[Tensor]:
        mixes = self.policy.settings.mixes
        return [layer.mixing_weight for layer in self.layers] if mixes else []
