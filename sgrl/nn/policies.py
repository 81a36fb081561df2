"""Policies by name: an encoder, a core over time, an actor, and optionally a value head.

    policy = make_policy("sparsenet", observation_size=56, num_actions=4, propagation="sgprop")
    output = policy(observations)                     # logits [T, B, A]
    output = policy.step(observations[0], state)      # logits [B, A], for acting

A policy is added by subclassing `Policy`, giving it a `Settings` dataclass, and one line in
`POLICIES`. Sizes and initial values: the paper, Section H.4.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.kernels import native
from sgrl.nn.mixing import MixingRule, mixing_summary, split_parameters
from sgrl.nn.neuron import predictor_generator
from sgrl.nn.recurrent import SparseRNN

State = dict[str, Tensor]

FORMAT_VERSION = 1


class PolicyOutput(NamedTuple):
    """logits [T, B, A], values [T, B] (None without a value head), state after the last step."""

    logits: Tensor
    values: Tensor | None
    state: State


@dataclass(frozen=True)
class PolicySettings:
    """Settings every policy has.

    Attributes:
        value_head: whether the policy also estimates the value of its state.
    """

    value_head: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    choices = " or ".join(repr(choice) for choice in get_args(kind))
                    raise ValueError(f"{name} must be {choices}, got {value!r}")
            elif kind is float and type(value) is int:
                object.__setattr__(self, name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"{name} must be {_article(kind)}, got {value!r}")
            if name.endswith("_size") and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check_observations(self, observation_size: int) -> None:
        """Raise ValueError where observations of this length cannot be read."""


def _article(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return names[kind]


@dataclass(frozen=True)
class EncoderSettings(PolicySettings):
    """Settings of the policies with the published encoder.

    Attributes:
        feature_size: length of the encoder's first layer.
        embedding_size: length of the encoder's output, the core's input.
    """

    feature_size: int = 128
    embedding_size: int = 128


class Policy(nn.Module):
    """Base of all policies: encoder, core and actor (the subclass's), optional value head.

    Args:
        observation_size: F, length of a flat observation.
        num_actions: A.
        settings: an instance of the class's `Settings`.
        generator: source of all initial weights, a CPU generator.
        dtype: floating-point type of the parameters.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[PolicySettings]]
    #: Whether the backward pass can be run twice, for the two-phase update.
    two_phase: ClassVar[bool] = True

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        settings: PolicySettings,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if observation_size < 1 or num_actions < 1:
            raise ValueError(
                "observation_size and num_actions must be at least 1, "
                f"got {observation_size} and {num_actions}"
            )
        self.observation_size = observation_size
        self.num_actions = num_actions
        self.settings = settings
        self.encoder = self._build_encoder(generator, dtype)
        core_size = self._build_core(generator, dtype)
        self.actor = self._build_actor(core_size, generator, dtype)
        self.value_head = _linear(core_size, 1, generator, dtype) if settings.value_head else None

    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        """Make the module between observations [..., F] and the core; none unless overridden."""
        return nn.Identity()

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        """Make the core's modules and return the length of its output."""
        raise NotImplementedError(f"{type(self).__name__} must build its core")

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        """Make the module between the core's output [..., core size] and logits [..., A]."""
        raise NotImplementedError(f"{type(self).__name__} must build its actor")

    def initial_state(self, batch_size: int) -> State:
        """State before the first step: tensors [B, ...] by name, zeros; empty if no memory."""
        return {}

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        """Embeddings [T, B, E], state and mask [T, B] -> features [T, B, core size], new state."""
        raise NotImplementedError(f"{type(self).__name__} must run its core")

    def acting(self, length: int, batch_size: int, keep: bool = False) -> "Acting":
        """For acting through whole episodes of T steps, from the initial state on.

        With `keep` it may hold, where the policy can, what lets `forward` on the same observations
        skip those steps of its core.
        """
        return Acting(self, batch_size)

    def forward(
        self,
        observations: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        acted: "Acting | None" = None,
    ) -> PolicyOutput:
        """Run over whole sequences.

        Args:
            observations: [T, B, F].
            state: before the first step; `initial_state` if None.
            mask: bool [T, B], True at valid steps; all if None.
            acted: has perhaps seen these observations; used if so, and if nothing changed since.
        """
        embeddings = self.encoder(observations)
        if acted is not None and state is None and acted.is_of(self, observations):
            features, state = acted.continue_core(embeddings, mask)
        else:
            if state is None:
                state = self.initial_state(observations.shape[1])
            features, state = self.run_core(embeddings, state, mask)
        values = None if self.value_head is None else self.value_head(features).squeeze(-1)
        return PolicyOutput(self.actor(features), values, state)

    def step(self, observations: Tensor, state: State) -> PolicyOutput:
        """One step: observations [B, F] -> logits [B, A], values [B], state."""
        output = self(observations.unsqueeze(0), state)
        values = None if output.values is None else output.values[0]
        return PolicyOutput(output.logits[0], values, output.state)


class Acting:
    """A policy taking one step of B episodes after the other, from their beginning.

    This one merely carries the state along.
    """

    def __init__(self, policy: Policy, batch_size: int) -> None:
        self.policy = policy
        self.state = policy.initial_state(batch_size)

    def step(self, observations: Tensor) -> Tensor:
        """Observations [B, F] -> logits [B, A]."""
        output = self.policy.step(observations, self.state)
        self.state = output.state
        return output.logits

    def is_of(self, policy: Policy, observations: Tensor) -> bool:
        """Whether `continue_core` gives this policy's features of observations [T, B, F]."""
        return False

    def continue_core(self, embeddings: Tensor, mask: Tensor | None) -> tuple[Tensor, State]:
        """As `Policy.run_core` from the initial state, without the steps already taken."""
        raise NotImplementedError(f"{type(self).__name__} keeps nothing to continue from")


class RecordingActing(Acting):
    """Base of those that keep what `continue_core` goes on from, for the policy as it is now."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.versions = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        """Changes with every change of a parameter."""
        return [(p.data_ptr(), p._version) for p in self.policy.parameters()]

    def seen(self) -> Tensor | None:
        """The observations so far [t, B, F]; None if nothing is kept."""
        raise NotImplementedError(f"{type(self).__name__} must say what it has seen")

    def is_of(self, policy: Policy, observations: Tensor) -> bool:
        seen = self.seen()
        return (
            seen is not None
            and policy is self.policy
            and self._versions() == self.versions
            and torch.equal(observations[: len(seen)], seen)
        )


def _linear(
    size_in: int, size_out: int, generator: torch.Generator, dtype: torch.dtype
) -> nn.Linear:
    """Linear layer with orthogonal weights and zero biases."""
    layer = nn.utils.skip_init(nn.Linear, size_in, size_out, dtype=dtype)
    nn.init.orthogonal_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class EncodedPolicy(Policy):
    """Base of the labyrinths' policies: the published encoder, and a dense actor."""

    settings: EncoderSettings

    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        features, embedding = self.settings.feature_size, self.settings.embedding_size
        return nn.Sequential(
            _linear(self.observation_size, features, generator, dtype),
            nn.LayerNorm(features, eps=1e-5, elementwise_affine=False),
            _linear(features, embedding, generator, dtype),
            nn.LeakyReLU(0.01),
        )

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        logits = nn.utils.skip_init(nn.Linear, 128, self.num_actions, dtype=dtype)
        nn.init.normal_(logits.weight, std=0.01, generator=generator)
        nn.init.zeros_(logits.bias)
        return nn.Sequential(
            _linear(core_size, 128, generator, dtype),
            nn.LeakyReLU(0.01),
            _linear(128, 128, generator, dtype),
            nn.LeakyReLU(0.01),
            logits,
        )


@dataclass(frozen=True)
class RecurrentSettings(EncoderSettings):
    """Settings of the labyrinths' dense policies.

    Attributes:
        hidden_size: length of the core's output (and, with memory, of its state).
    """

    hidden_size: int = 256


DenseRNN = TypeVar("DenseRNN", nn.GRU, nn.LSTM)


def _dense_rnn(
    kind: type[DenseRNN],
    size_in: int,
    size_out: int,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> DenseRNN:
    """One layer, each whole stacked weight matrix orthogonal, biases zero."""
    # Made without values first: torch's own would be drawn from the process-wide generator.
    rnn = kind(size_in, size_out, dtype=dtype, device="meta").to_empty(device="cpu")
    for name, parameter in rnn.named_parameters():
        if name.startswith("weight"):
            nn.init.orthogonal_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)
    return rnn


class GRUPolicy(EncodedPolicy):
    """Dense recurrent baseline: one layer of gated recurrent units."""

    name = "gru"
    Settings = RecurrentSettings
    settings: RecurrentSettings

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size = self.settings.hidden_size
        self.core = _dense_rnn(nn.GRU, self.settings.embedding_size, size, generator, dtype)
        return size

    def initial_state(self, batch_size: int) -> State:
        return {"h": self.core.weight_hh_l0.new_zeros(batch_size, self.settings.hidden_size)}

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        features, h = self.core(embeddings, state["h"].unsqueeze(0).contiguous())
        return features, {"h": h[0]}


class LSTMPolicy(EncodedPolicy):
    """Dense recurrent baseline: one layer of long short-term memory."""

    name = "lstm"
    Settings = RecurrentSettings
    settings: RecurrentSettings

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size = self.settings.hidden_size
        self.core = _dense_rnn(nn.LSTM, self.settings.embedding_size, size, generator, dtype)
        return size

    def initial_state(self, batch_size: int) -> State:
        zeros = self.core.weight_hh_l0.new_zeros(batch_size, self.settings.hidden_size)
        return {"h": zeros, "c": zeros.clone()}

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        before = tuple(state[name].unsqueeze(0).contiguous() for name in ("h", "c"))
        features, (h, c) = self.core(embeddings, before)
        return features, {"h": h[0], "c": c[0]}


class MLPPolicy(EncodedPolicy):
    """Baseline without memory: the core is a linear layer and tanh.

    POPGym's mazes can be solved without memory, so a comparison without it misleads.
    """

    name = "mlp"
    Settings = RecurrentSettings
    settings: RecurrentSettings

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size = self.settings.hidden_size
        self.core = nn.Sequential(
            _linear(self.settings.embedding_size, size, generator, dtype), nn.Tanh()
        )
        return size

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return self.core(embeddings), {}


@dataclass(frozen=True)
class SparseNetSettings(EncoderSettings):
    """Settings of the recurrent sparse policy; see `SparseRNN` for what they do.

    Attributes:
        actor_slots: slots per action of the actor.
    """

    num_neurons: int = 128
    neuron_size: int = 6
    num_parents: int = 6
    num_slots: int = 6
    num_input_neurons: int = 16
    actor_slots: int = 6
    propagation: Literal["sgprop", "backprop"] = "sgprop"
    mixing_weight: float = 1.0
    adaptive: bool = True
    mixing_momentum: float = 0.9
    schedule_beta: float = 0.1
    positive_projection: bool = False
    predictor_target: Literal["mixed", "received"] = "mixed"
    mask_predictions: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actor_slots < 1:
            raise ValueError(f"actor_slots must be at least 1, got {self.actor_slots}")
        SparseRNN.check_settings(**self.core_settings())

    def core_settings(self) -> dict[str, Any]:
        """The settings that `SparseRNN` takes, with its names."""
        settings = dataclasses.asdict(self)
        for name in ("feature_size", "value_head", "actor_slots"):
            del settings[name]
        settings["input_size"] = settings.pop("embedding_size")
        return settings


class SlotActor(nn.Module):
    """Each action's logit from S slots of its own over the flat state.

    weights = softmax_m(<h, k_m> / sqrt(H)), logit = sum_m weights_m (<h, A_m> + b_m).
    Shapes: keys and A [num_actions, S, H], b [num_actions, S]; [..., H] -> [..., num_actions].
    Source: the paper, Section H.4.
    """

    def __init__(
        self,
        input_size: int,
        num_actions: int,
        num_slots: int,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(input_size)
        shape = (num_actions, num_slots, input_size)
        self.keys = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.A = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(shape[:2], dtype=dtype))
        for parameter in (self.keys, self.A):
            nn.init.normal_(parameter, std=self.scale, generator=generator)

    def stack(self) -> Tensor:
        """Keys, scaled, and below them A: [2 * num_actions * S, H], for one product."""
        return torch.cat([self.keys.flatten(0, 1) * self.scale, self.A.flatten(0, 1)])

    def forward(self, h: Tensor, stacked: Tensor | None = None) -> Tensor:
        """States [..., H] -> logits [..., num_actions]; `stacked` is what `stack` returned."""
        products = nn.functional.linear(h, self.stack() if stacked is None else stacked)
        scores, values = products.unflatten(-1, (2, *self.b.shape)).unbind(-3)
        return (scores.softmax(dim=-1) * (values + self.b)).sum(-1)


class SparseNetPolicy(EncodedPolicy):
    """Recurrent SparseNet, trained by backpropagation or synthetic-gradient propagation."""

    name = "sparsenet"
    two_phase = False
    Settings = SparseNetSettings
    settings: SparseNetSettings

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        self.core = SparseRNN(
            **self.settings.core_settings(), flatten=True, generator=generator, dtype=dtype
        )
        return self.settings.num_neurons * self.settings.neuron_size

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        return SlotActor(core_size, self.num_actions, self.settings.actor_slots, generator, dtype)

    def initial_state(self, batch_size: int) -> State:
        return {"h": self.core.initial_state(batch_size)}

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        features, h = self.core(embeddings, state["h"], mask)
        return features, {"h": h}

    def acting(self, length: int, batch_size: int, keep: bool = False) -> Acting:
        if self.core.runs_native(self.core.neurons.weight_h):
            return _SparseNetActing(self, length, batch_size, keep)
        return super().acting(length, batch_size, keep)


class _SparseNetActing(RecordingActing):
    """Whole steps in compiled code, which leave a record for the core's backward pass."""

    policy: SparseNetPolicy

    def __init__(self, policy: SparseNetPolicy, length: int, batch_size: int, keep: bool) -> None:
        super().__init__(policy)
        encoder, actor = policy.encoder, policy.actor
        self.recorder = native.Recorder(
            policy.core,
            (encoder[0], encoder[2]),
            (actor.stack(), actor.b),
            length,
            batch_size,
            keep,
        )

    def step(self, observations: Tensor) -> Tensor:
        return self.recorder.act(observations)

    def seen(self) -> Tensor | None:
        recorder = self.recorder
        return recorder.observations[: recorder.steps] if recorder.keep else None

    def is_of(self, policy: Policy, observations: Tensor) -> bool:
        return len(observations) == self.recorder.length and super().is_of(policy, observations)

    def continue_core(self, embeddings: Tensor, mask: Tensor | None) -> tuple[Tensor, State]:
        features, h = self.policy.core(embeddings, mask=mask, recorder=self.recorder)
        return features, {"h": h}


@dataclass(frozen=True)
class DenseSettings(PolicySettings):
    """Settings of the dense feed-forward policy.

    Attributes:
        num_layers: hidden layers.
        hidden_size: units of each.
    """

    num_layers: int = 5
    hidden_size: int = 745

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")


class DensePolicy(Policy):
    """Dense feed-forward baseline of the bandit: tanh layers (paper, Section H.3)."""

    name = "dense"
    Settings = DenseSettings
    settings: DenseSettings

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size, layers = self.observation_size, []
        for _ in range(self.settings.num_layers):
            layers += [_xavier(size, self.settings.hidden_size, generator, dtype), nn.Tanh()]
            size = self.settings.hidden_size
        self.core = nn.Sequential(*layers)
        return size

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        return _xavier(core_size, self.num_actions, generator, dtype)

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return self.core(embeddings), {}


def _xavier(
    size_in: int, size_out: int, generator: torch.Generator, dtype: torch.dtype
) -> nn.Linear:
    """Linear layer with Xavier-normal weights and zero biases."""
    layer = nn.utils.skip_init(nn.Linear, size_in, size_out, dtype=dtype)
    nn.init.xavier_normal_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True)
class SparseMLPSettings(PolicySettings):
    """Settings of the feed-forward sparse policy; see `SparseMLP` for what they do."""

    num_layers: int = 5
    num_neurons: int = 200
    neuron_size: int = 10
    num_parents: int = 5
    num_slots: int = 5
    residual: bool = True
    propagation: Literal["sgprop", "backprop"] = "sgprop"
    mixing_weight: float = 0.9
    adaptive: bool = True
    mixing_momentum: float = 0.9
    predictor_target: Literal["received", "mixed"] = "received"
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        # Any input will do here: `check_observations` knows the real one.
        read = self.num_parents * self.neuron_size
        SparseMLP.check_settings(input_size=max(read, 1), **self.core_settings())

    def check_observations(self, observation_size: int) -> None:
        SparseMLP.check_settings(input_size=observation_size, **self.core_settings())

    def core_settings(self) -> dict[str, Any]:
        """The settings that `SparseMLP` takes, with its names."""
        settings = dataclasses.asdict(self)
        del settings["value_head"]
        return settings


class ActionHead(nn.Module):
    """Each action's logit from one key over the flat state, and a predictor of their gradient.

    logits_a = <h, key_a> / sqrt(H). The prediction of d loss / d logits is
    sum_a softmax(logits)_a (predictor_A[a]^T h + predictor_bias[a]); it is trained, on the
    received gradient, and not mixed.

    Shapes: keys [A, H], predictor_A [A, H, A], predictor_bias [A, A]; h [..., H] -> [..., A].
    Source: the paper, Section H.3.
    """

    def __init__(
        self,
        input_size: int,
        num_actions: int,
        key_std: float,
        predictor: bool,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(input_size)
        self.keys = nn.Parameter(torch.empty(num_actions, input_size, dtype=dtype))
        nn.init.normal_(self.keys, std=key_std, generator=generator)
        self.has_predictor = predictor
        if predictor:
            source = predictor_generator(generator, part=1)
            shape = (num_actions, input_size, num_actions)
            self.predictor_A = nn.Parameter(torch.empty(shape, dtype=dtype))
            self.predictor_bias = nn.Parameter(torch.empty(shape[::2], dtype=dtype))
            for parameter in (self.predictor_A, self.predictor_bias):
                nn.init.normal_(parameter, std=self.scale, generator=source)
        self.rule = MixingRule(adaptive=False, predictor_target="received")
        #: predictor_loss of the last backward pass, mean over samples and actions.
        self.statistics: dict[str, Tensor] = {}

    def forward(self, h: Tensor) -> Tensor:
        logits = nn.functional.linear(h, self.keys) * self.scale
        if self.has_predictor and torch.is_grad_enabled():
            logits = _PredictGradient.apply(
                logits, h.detach(), self, self.predictor_A, self.predictor_bias
            )
        return logits


class _PredictGradient(torch.autograd.Function):
    """Identity; the gradient it returns for the predictor is that of the predictor's loss."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, h: Tensor, head: ActionHead, *predictor: Tensor
    ) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(logits.flatten(0, -2), h.flatten(0, -2))
        return logits.view_as(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        head: ActionHead = ctx.head
        if head.rule.phase == "policy":
            return gradient, None, None, None, None
        logits, h = ctx.saved_tensors
        routing = logits.softmax(-1)
        guesses = torch.einsum("bh,ahk->bak", h, head.predictor_A) + head.predictor_bias
        prediction = torch.einsum("ba,bak->bk", routing, guesses)
        residual = prediction - gradient.flatten(0, -2)
        head.statistics = {"predictor_loss": residual.square().mean()}
        regression = 2 * residual / residual.numel()
        routed = torch.einsum("ba,bk->bak", routing, regression)
        return gradient, None, None, torch.einsum("bh,bak->ahk", h, routed), routed.sum(0)


class SparseMLPPolicy(Policy):
    """Feed-forward SparseNet, trained by backpropagation or synthetic-gradient propagation."""

    name = "sparse_mlp"
    Settings = SparseMLPSettings
    settings: SparseMLPSettings

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        self.core = SparseMLP(
            self.observation_size,
            **self.settings.core_settings(),
            flatten=True,
            generator=generator,
            dtype=dtype,
        )
        return self.settings.num_neurons * self.settings.neuron_size

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        key_std = (self.settings.num_parents * self.settings.neuron_size) ** -0.5
        predictor = self.settings.propagation == "sgprop"
        return ActionHead(core_size, self.num_actions, key_std, predictor, generator, dtype)

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return self.core(embeddings), {}

    def acting(self, length: int, batch_size: int, keep: bool = False) -> Acting:
        # The record is of one forward pass, and so of one step.
        if keep and length == 1 and self.core.runs_native(self.actor.keys):
            return _SparseMLPActing(self)
        return super().acting(length, batch_size, keep)

    def forward(
        self,
        observations: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        acted: Acting | None = None,
    ) -> PolicyOutput:
        if mask is None or bool(mask.all()):
            return super().forward(observations, acted=acted)
        # Masked steps are passed over: their logits and values are zeros.
        valid = super().forward(observations[mask].unsqueeze(0))
        logits = valid.logits.new_zeros(*mask.shape, self.num_actions)
        logits[mask] = valid.logits[0]
        values = valid.values
        if values is not None:
            values = values.new_zeros(mask.shape).masked_scatter(mask, values)
        return PolicyOutput(logits, values, {})


class _SparseMLPActing(RecordingActing):
    """The only step of its episodes, kept for the backward pass."""

    policy: SparseMLPPolicy
    done: native.StackForward | None = None

    def step(self, observations: Tensor) -> Tensor:
        self.done = native.StackForward(self.policy.core, observations)
        return self.policy.actor(self.done.output.flatten(1))

    def seen(self) -> Tensor | None:
        return None if self.done is None else self.done.x.unsqueeze(0)

    def continue_core(self, embeddings: Tensor, mask: Tensor | None) -> tuple[Tensor, State]:
        return self.policy.core(embeddings, self.done), {}


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        GRUPolicy,
        LSTMPolicy,
        MLPPolicy,
        SparseNetPolicy,
        DensePolicy,
        SparseMLPPolicy,
    )
}


def nearest_name(name: str, known: Any) -> str:
    """Hint naming the nearest of the known names, to end an error message with."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def policy_settings(name: str, settings: Mapping[str, Any]) -> PolicySettings:
    """Validated settings of the policy `name`, defaults filled in.

    Raises:
        ValueError: unknown policy, unknown setting, wrong type or impossible size.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; {nearest_name(name, POLICIES)}")
    kind = POLICIES[name].Settings
    known = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            raise ValueError(f"policy {name!r} has no setting {key!r}; {nearest_name(key, known)}")
    return kind(**settings)


def make_policy(
    name: str,
    observation_size: int,
    num_actions: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Policy:
    """Build the policy `name`; the same seed gives the same connectivity and weights.

    Args:
        name: a key of `POLICIES`.
        observation_size: F.
        num_actions: A.
        seed: of connectivity and initial weights.
        dtype: of the parameters.
        settings: fields of the policy's `Settings`.

    Raises:
        ValueError: unknown policy or setting, wrong type, impossible size.
    """
    checked = policy_settings(name, settings)
    generator = torch.Generator().manual_seed(seed)
    return POLICIES[name](observation_size, num_actions, checked, generator, dtype)


def policy_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """All parameters but the predictors'."""
    return split_parameters(policy)[0]


def predictor_parameters(policy: nn.Module) -> list[nn.Parameter]:
    """The predictors' parameters; empty unless the policy uses sgprop."""
    return split_parameters(policy)[1]


def mixing_statistics(policy: nn.Module) -> dict[str, float]:
    """What sgprop measured in the last backward pass, and the spread of the mixing weights.

    Keys: predictor_loss, true_grad_norm, mixed_grad_norm, prediction_norm, mixing_weight_mean,
    _min, _p25, _median, _p75, _max; of a feed-forward network also each layer's spread, under
    `layer{l}_mixing_weight_*`. Empty where nothing uses sgprop.
    """
    core: Any = getattr(policy, "core", None)
    if getattr(core, "propagation", None) != "sgprop":
        return {}
    measured = {name: float(value) for name, value in core.statistics.items()}
    if isinstance(core, SparseRNN):
        return {**measured, **mixing_summary(core.neurons.mixing_weight)}
    head = policy.actor.statistics.get("predictor_loss", 0.0)
    measured["predictor_loss"] = measured.get("predictor_loss", 0.0) + float(head)
    weights = [neurons.mixing_weight for neurons in core.layers]
    measured |= mixing_summary(torch.cat(weights))
    for layer, values in enumerate(weights):
        summary = mixing_summary(values)
        measured |= {f"layer{layer}_{name}": value for name, value in summary.items()}
    return measured


def save_policy(policy: Policy, directory: str | Path, **extra: Any) -> None:
    """Write `policy.safetensors` and `policy.json` into an existing folder.

    Args:
        policy: to save.
        directory: where to.
        extra: further JSON values for policy.json (the environment, for instance).
    """
    directory = Path(directory)
    state = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    description = {
        "format": FORMAT_VERSION,
        "policy": policy.name,
        "observation_size": policy.observation_size,
        "num_actions": policy.num_actions,
        "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
        "settings": dataclasses.asdict(policy.settings),
        **extra,
    }
    save_file(state, directory / "policy.safetensors")
    (directory / "policy.json").write_text(json.dumps(description, indent=2) + "\n")


def load_policy(path: str | Path) -> Policy:
    """Load a policy from a checkpoint, or any folder that `save_policy` wrote; without Ray.

    Args:
        path: the folder that holds `policy.safetensors` and `policy.json`.

    Raises:
        FileNotFoundError: the folder does not hold them.
        ValueError: they cannot be read, or do not belong together.
    """
    directory = Path(path)
    description_file, weights_file = directory / "policy.json", directory / "policy.safetensors"
    for file in (description_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(f"{directory} holds no {file.name}; give a checkpoint's folder")
    try:
        description = json.loads(description_file.read_text())
        if description["format"] != FORMAT_VERSION:
            raise ValueError(f"{description_file} has the unknown format {description['format']}")
        policy = make_policy(
            description["policy"],
            description["observation_size"],
            description["num_actions"],
            dtype=getattr(torch, description["dtype"]),
            **description["settings"],
        )
        policy.load_state_dict(load_file(weights_file))
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{directory} holds no readable policy: {line}") from error
    return policy
