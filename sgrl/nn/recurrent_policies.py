"""The labyrinths' policies with memory: GRU, LSTM and recurrent SparseNet, behind one encoder.

Sizes and initial values: the paper, Section H.4.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgrl.nn.encoder import (
    DenseCoreSettings,
    EncodedPolicy,
    EncoderSettings,
    is_published_actor,
    is_published_encoder,
)
from sgrl.nn.kernels import native_rnn
from sgrl.nn.kernels.backends import check_backend, choose_backend, resolve_backend
from sgrl.nn.kernels.native import StepRecorder
from sgrl.nn.kernels.native_rnn import Cells, DenseRecorder
from sgrl.nn.kernels.native_unroll import Recorder, unroll
from sgrl.nn.kernels.plain import is_autocast_on, is_plain, is_unchanged
from sgrl.nn.neuron import SlotNeurons
from sgrl.nn.policy import (
    Acting,
    Noise,
    Policy,
    PolicyOutput,
    RecordingActing,
    State,
    given,
)
from sgrl.nn.recurrent import SIZES, SparseRNN
from sgrl.nn.sgprop import Mixing, SGPropSettings


@dataclass(frozen=True)
class DenseRecurrentSettings(DenseCoreSettings):
    """Settings of the labyrinths' dense policies with memory.

    Attributes:
        backend: "auto", "torch" (or "eager", the same here: torch's own module) or "native".
    """

    backend: str = "auto"

    older: ClassVar[dict[str, Any]] = {**DenseCoreSettings.older, "backend": "torch"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)


class DenseRecurrentPolicy(EncodedPolicy):
    """Base of the dense baselines with memory: one layer of recurrent units.

    Attributes:
        kind: the layer's class.
        states: names of the parts of its state.
    """

    Settings = DenseRecurrentSettings
    settings: DenseRecurrentSettings
    kind: ClassVar[type[nn.GRU] | type[nn.LSTM]]
    states: ClassVar[tuple[str, ...]]

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        """Each whole stacked weight matrix orthogonal, biases zero."""
        resolve_backend(self.settings.backend, dtype)
        size = self.settings.hidden_size
        # Made without values first: torch's own would be drawn from the process-wide generator.
        core = self.kind(self.settings.embedding_size, size, dtype=dtype, device="meta")
        self.core = core.to_empty(device="cpu")
        for name, parameter in self.core.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        return size

    def initial_state(self, batch_size: int) -> State:
        shape, weight = (batch_size, self.settings.hidden_size), next(self.core.parameters())
        return {name: weight.new_zeros(shape) for name in self.states}

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        before = tuple(state[name] for name in self.states)
        if self.runs_on(embeddings) == "native":
            features, after = native_rnn.unroll(Cells.of(self.core), embeddings, before)
            return features, dict(zip(self.states, after, strict=True))
        before = tuple(part.unsqueeze(0).contiguous() for part in before)
        features, last = self.core(embeddings, before if len(before) > 1 else before[0])
        after = last if isinstance(last, tuple) else (last,)
        return features, {name: part[0] for name, part in zip(self.states, after, strict=True)}

    def runs_on(self, x: Tensor) -> str:
        """The backend that runs the core over x.

        Raises:
            ValueError: the one that was asked for by name cannot.
        """
        return choose_backend(
            self.settings.backend,
            lambda name: None if name == "torch" else native_rnn.obstacle(self.core, self.kind, x),
        )

    def step_is_published(self) -> bool:
        """Whether a step is just what `DenseRecorder` computes, with nothing of a subclass's."""
        methods = ("forward", "step", "encode", "run_core", "read_out", "read_values")
        if not is_unchanged(self, DenseRecurrentPolicy, *methods, "initial_state"):
            return False
        settings, weight = self.settings, self.core.weight_hh_l0
        parts = (*self.encoder.parameters(), *self.actor.parameters())
        return (
            is_published_encoder(self.encoder, self.observation_size, settings.embedding_size)
            and is_published_actor(self.actor, settings.hidden_size, self.num_outputs)
            and (self.core.input_size, self.core.hidden_size)
            == (settings.embedding_size, settings.hidden_size)
            and all(p.dtype == weight.dtype and p.device == weight.device for p in parts)
        )

    def acting(
        self, length: int, batch_size: int, keep: bool = False, noise: Noise | None = None
    ) -> Acting:
        weight = next(self.core.parameters(), None)
        if weight is not None and self.runs_on(weight) == "native" and self.step_is_published():
            return _DenseActing(self, length, batch_size, keep)
        return super().acting(length, batch_size, keep, noise)


class GRUPolicy(DenseRecurrentPolicy):
    """Dense recurrent baseline: one layer of gated recurrent units."""

    name = "gru"
    kind = nn.GRU
    states = ("h",)


class LSTMPolicy(DenseRecurrentPolicy):
    """Dense recurrent baseline: one layer of long short-term memory."""

    name = "lstm"
    kind = nn.LSTM
    states = ("h", "c")


@dataclass(frozen=True)
class SparseNetSettings(SGPropSettings, EncoderSettings):
    """Settings of the recurrent sparse policy; see `SparseRNN` for what they do.

    Attributes:
        num_neurons: W, neurons of the layer.
        neuron_size: N, dimension of a neuron's state.
        num_parents: P, neurons that each neuron reads, drawn at random once.
        num_slots: M, slots of a neuron.
        num_input_neurons: how many neurons read the embedding.
        actor_slots: slots per action of the actor.
        backend: "auto", "eager", "torch" or "native".
    """

    num_neurons: int = 128
    neuron_size: int = 6
    num_parents: int = 6
    num_slots: int = 6
    num_input_neurons: int = 16
    actor_slots: int = 6
    backend: str = "auto"

    def __post_init__(self) -> None:
        EncoderSettings.__post_init__(self)
        if self.actor_slots < 1:
            raise ValueError(f"actor_slots must be at least 1, got {self.actor_slots}")
        SparseRNN.check_settings(
            **self.core_settings(), shuffle_predictions=self.shuffle_predictions
        )
        SGPropSettings.__post_init__(self)

    def core_settings(self) -> dict[str, Any]:
        """The sizes and the backend that `SparseRNN` takes, with its names."""
        settings = {name: getattr(self, name) for name in (*SIZES, "backend")}
        return {"input_size": self.embedding_size, **settings}


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

    def stack(self) -> Float[Tensor, "rows H"]:
        """Keys, scaled, and below them A: [2 * num_actions * S, H], for one product."""
        return torch.cat([self.keys.flatten(0, 1) * self.scale, self.A.flatten(0, 1)])

    def forward(
        self, h: Float[Tensor, "*B H"], stacked: Float[Tensor, "rows H"] | None = None
    ) -> Float[Tensor, "*B A"]:
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
    actor: SlotActor

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        self.core = SparseRNN(
            **self.settings.core_settings(),
            sgprop=self.settings,
            flatten=True,
            generator=generator,
            dtype=dtype,
        )
        return self.settings.num_neurons * self.settings.neuron_size

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        return SlotActor(core_size, self.num_outputs, self.settings.actor_slots, generator, dtype)

    def initial_state(self, batch_size: int) -> State:
        return {"h": self.core.initial_state(batch_size)}

    @property
    def noise_size(self) -> int:
        settings = self.settings
        return settings.num_neurons * settings.neuron_size if settings.neuron_noise else 0

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None, noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        features, h = self.core(embeddings, state["h"], mask, **given(noise))
        return features, {"h": h}

    def core_is_plain(self) -> bool:
        """Whether a forward pass has a plain `SparseRNN` between encoder and actor.

        Not so in a subclass that runs its core in another way, nor where modules were replaced,
        changed or given hooks (see `sgrl.nn.kernels.plain`).
        """
        core = self.core
        methods = ("forward", "step", "run_core", "initial_state")
        return (
            is_unchanged(self, SparseNetPolicy, *methods)
            and is_plain(core, SparseRNN)
            and is_plain(core.neurons, SlotNeurons)
            and core.flatten
        )

    def step_is_published(self) -> bool:
        """Whether a step is just what `Recorder` computes, with nothing of a subclass's."""
        encoder, core, actor = self.encoder, self.core, self.actor
        if not (self.core_is_plain() and is_plain(actor, SlotActor)):
            return False
        weight = core.neurons.weight_h
        shape = (*actor.b.shape, core.num_neurons * core.neuron_size)
        parts = (*encoder.parameters(), *actor.parameters())
        return (
            is_published_encoder(encoder, self.observation_size, core.input_size)
            and actor.keys.shape == actor.A.shape == shape
            and all(p.dtype == weight.dtype and p.device == weight.device for p in parts)
            and is_unchanged(self, SparseNetPolicy, "encode", "read_out")
            and not is_autocast_on(weight.device)
        )

    def acting(
        self, length: int, batch_size: int, keep: bool = False, noise: Noise | None = None
    ) -> Acting:
        if self.step_is_published() and self.core.runs_on(self.core.neurons.weight_h) == "native":
            return _SparseNetActing(self, length, batch_size, keep, noise)
        return super().acting(length, batch_size, keep, noise)


class _StepsActing(RecordingActing):
    """Whole steps in compiled code, which leave a record for the core's backward pass."""

    policy: DenseRecurrentPolicy | SparseNetPolicy
    recorder: StepRecorder

    def step(self, observations: Tensor) -> Tensor:
        return self.recorder.act(self.policy.prepare(observations))

    def seen(self) -> Tensor | None:
        recorder = self.recorder
        return recorder.observations[: recorder.steps] if recorder.keep else None

    def is_of(self, policy: Policy, prepared: Tensor, noise: Tensor | None = None) -> bool:
        return (
            len(prepared) == self.recorder.length
            and super().is_of(policy, prepared, noise)
            and self.policy.step_is_published()
        )


class _SparseNetActing(_StepsActing):
    policy: SparseNetPolicy
    recorder: Recorder

    def __init__(
        self,
        policy: SparseNetPolicy,
        length: int,
        batch_size: int,
        keep: bool,
        noise: Noise | None,
    ) -> None:
        shape, weight = (length, batch_size, policy.noise_size), policy.core.neurons.weight_h
        super().__init__(policy, policy.settings.check_noise(noise, shape, weight))
        self.recorder = Recorder(
            policy.core.layer(),
            list(policy.encoder.parameters()),
            (policy.actor.stack(), policy.actor.b),
            length,
            batch_size,
            keep,
            self.noise,
        )

    def finish(self, prepared: Tensor, mask: Tensor | None) -> PolicyOutput:
        policy, core = self.policy, self.policy.core
        embeddings = policy.encoder(prepared)
        h_0 = core.initial_state(embeddings.shape[1])
        h_0 = h_0.view(-1, core.num_neurons, core.neuron_size)
        layer, mixing = core.layer(), Mixing.of(core)
        states = unroll(layer, mixing, embeddings, h_0, mask, recorder=self.recorder).flatten(2)
        return policy.read_out(states, {"h": states[-1]})


class _DenseActing(_StepsActing):
    policy: DenseRecurrentPolicy
    recorder: DenseRecorder

    def __init__(
        self, policy: DenseRecurrentPolicy, length: int, batch_size: int, keep: bool
    ) -> None:
        super().__init__(policy, None)
        cells = Cells.of(policy.core)
        self.recorder = DenseRecorder(cells, self._around(), length, batch_size, keep)

    def finish(self, prepared: Tensor, mask: Tensor | None) -> PolicyOutput:
        policy = self.policy
        parameters = (*Cells.of(policy.core).parameters, *self._around())
        logits, features, after = self.recorder.replay(prepared, parameters)
        state = dict(zip(policy.states, after, strict=True))
        return PolicyOutput(logits, policy.read_values(features), state)

    def _around(self) -> list[Tensor]:
        return [*self.policy.encoder.parameters(), *self.policy.actor.parameters()]
