"""Policies without memory: the labyrinths' MLP, and for the bandit a dense network and SparseNet.

Sizes and initial values of the bandit's: the paper, Section H.3.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgrl.nn.encoder import DenseCoreSettings, EncodedPolicy
from sgrl.nn.feedforward import SIZES, SparseMLP
from sgrl.nn.kernels.native_stack import StackForward, stack
from sgrl.nn.kernels.plain import is_autocast_on, is_plain, is_unchanged
from sgrl.nn.mixing import MixingRule
from sgrl.nn.neuron import SlotNeurons, predictor_generator
from sgrl.nn.policy import (
    Acting,
    Noise,
    Policy,
    PolicyOutput,
    PolicySettings,
    RecordingActing,
    State,
    given,
    make_linear,
)
from sgrl.nn.sgprop import MixGradient, Mixing, SGPropSettings


class MLPPolicy(EncodedPolicy):
    """Baseline without memory: the core is a linear layer and tanh.

    POPGym's mazes can be solved without memory, so a comparison without it misleads.
    """

    name = "mlp"
    Settings = DenseCoreSettings
    settings: DenseCoreSettings

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size = self.settings.hidden_size
        self.core = nn.Sequential(
            make_linear(self.settings.embedding_size, size, generator, dtype), nn.Tanh()
        )
        return size


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
        size, hidden, layers = self.observation_size, self.settings.hidden_size, []
        xavier = nn.init.xavier_normal_
        for _ in range(self.settings.num_layers):
            layers += [make_linear(size, hidden, generator, dtype, xavier), nn.Tanh()]
            size = hidden
        self.core = nn.Sequential(*layers)
        return size

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        return make_linear(core_size, self.num_outputs, generator, dtype, nn.init.xavier_normal_)


@dataclass(frozen=True)
class SparseMLPSettings(SGPropSettings, PolicySettings):
    """Settings of the feed-forward sparse policy; see `SparseMLP` for what they do.

    Attributes:
        num_layers: L, hidden layers.
        num_neurons: W, neurons of a layer.
        neuron_size: N, dimension of a neuron's state.
        num_parents: P, neurons that each neuron reads; in the first layer P * N pixels.
        num_slots: M, slots of a neuron.
        residual: whether all layers but the first are residual.
        backend: "auto", "eager", "torch" or "native".
    """

    num_layers: int = 5
    num_neurons: int = 200
    neuron_size: int = 10
    num_parents: int = 5
    num_slots: int = 5
    residual: bool = True
    mixing_weight: float = 0.9
    predictor_target: Literal["mixed", "received"] = "received"
    backend: str = "auto"
    # No settings here: constants, since they are for recurrent networks.
    schedule_beta: ClassVar[float] = SGPropSettings.schedule_beta  # type: ignore[misc]
    positive_projection: ClassVar[bool] = False  # type: ignore[misc]
    mask_predictions: ClassVar[bool] = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        PolicySettings.__post_init__(self)
        # Any input will do here: `check_observations` knows the real one.
        self.check_observations((max(self.num_parents * self.neuron_size, 1),))
        SGPropSettings.__post_init__(self)

    def check_observations(self, shape: tuple[int, ...]) -> None:
        SparseMLP.check_settings(
            input_size=math.prod(shape),
            **self.core_settings(),
            shuffle_predictions=self.shuffle_predictions,
        )

    def core_settings(self) -> dict[str, Any]:
        """The sizes and the backend that `SparseMLP` takes, with its names."""
        return {name: getattr(self, name) for name in (*SIZES, "residual", "backend")}


class ActionHead(nn.Module):
    """Each action's logit from one key over the flat state, and a predictor of their gradient.

    logits_a = <h, key_a> / sqrt(H). The prediction of d loss / d logits is
    sum_a softmax(logits)_a (predictor_A[a]^T h + predictor_bias[a]); it is trained, on the
    received gradient, and not mixed. Of actions that are not Discrete, all outputs take the
    logits' place.

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
        self.rule = MixingRule(adaptive=False)
        #: None: what the head predicts is not mixed in.
        self.mixing_weights: list[Tensor] = []
        #: predictor_loss of the last backward pass, mean over samples and actions.
        self.statistics: dict[str, Tensor] = {}

    def forward(self, h: Float[Tensor, "*B H"]) -> Float[Tensor, "*B A"]:
        """Compute the logits [..., A] of states h [..., H]."""
        if is_autocast_on(h.device):
            # As the layers do: their predictors and this one go back over what they computed.
            with torch.autocast(h.device.type, enabled=False):
                return ActionHead.forward(self, h.to(self.keys.dtype))
        logits = nn.functional.linear(h, self.keys) * self.scale
        if self.has_predictor and torch.is_grad_enabled():
            seen = [value.detach().flatten(0, -2) for value in (logits, h)]
            predictor = self.predictor_A, self.predictor_bias
            logits = MixGradient.apply(logits, self._regress, seen, *predictor)
        return logits

    def _regress(self, gradient: Tensor, logits: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        """The received gradient as it is, and those of the predictor's loss."""
        if self.rule.phase == "policy":
            return gradient, None, None
        given = (gradient.flatten(0, -2), logits, h)
        residual, *grads = regress_on_logits(*given, self.predictor_A, self.predictor_bias)
        self.statistics = {"predictor_loss": residual.square().mean()}
        return gradient, *grads


def regress_on_logits(
    gradient: Float[Tensor, "*S B A"],
    logits: Float[Tensor, "*S B A"],
    h: Float[Tensor, "*S B H"],
    matrices: Float[Tensor, "*S A H A"],
    bias: Float[Tensor, "*S A A"],
) -> tuple[Float[Tensor, "*S B A"], Float[Tensor, "*S A H A"], Float[Tensor, "*S A A"]]:
    """Regress predictions of the logits' gradient on it, by mean squared error.

    Returns:
        The residuals, and the gradients of the matrices and the biases.
    """
    routing = logits.softmax(-1)
    guesses = torch.einsum("...bh,...ahk->...bak", h, matrices) + bias.unsqueeze(-3)
    residual = torch.einsum("...ba,...bak->...bk", routing, guesses) - gradient
    regression = 2 * residual / residual.shape[-2:].numel()
    routed = torch.einsum("...ba,...bk->...bak", routing, regression)
    return residual, torch.einsum("...bh,...bak->...ahk", h, routed), routed.sum(-3)


class SparseMLPPolicy(Policy):
    """Feed-forward SparseNet, trained by backpropagation or synthetic-gradient propagation."""

    name = "sparse_mlp"
    Settings = SparseMLPSettings
    settings: SparseMLPSettings
    actor: ActionHead

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        self.core = SparseMLP(
            self.observation_size,
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
        key_std = (self.settings.num_parents * self.settings.neuron_size) ** -0.5
        predictor = self.settings.propagation == "sgprop"
        return ActionHead(core_size, self.num_outputs, key_std, predictor, generator, dtype)

    @property
    def noise_size(self) -> int:
        settings = self.settings
        size = settings.num_layers * settings.num_neurons * settings.neuron_size
        return size if settings.neuron_noise else 0

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None, noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self.core(embeddings, **given(noise)), {}

    def acting(
        self, length: int, batch_size: int, keep: bool = False, noise: Noise | None = None
    ) -> Acting:
        # The record is of one forward pass, and so of one step.
        if keep and length == 1 and self.core_is_plain():
            weight = self.core.layers[0].weight_h
            if not is_autocast_on(weight.device) and self.core.runs_on(weight) == "native":
                return _SparseMLPActing(self, noise)
        return super().acting(length, batch_size, keep, noise)

    def core_is_plain(self) -> bool:
        """Whether a forward pass has a plain `SparseMLP` between observations and actor.

        Not so in a subclass that encodes them or runs its core in another way, nor where modules
        were replaced, changed or given hooks (see `sgrl.nn.kernels.plain`).
        """
        core = self.core
        methods = ("forward", "step", "encode", "run_core", "initial_state")
        return (
            is_unchanged(self, SparseMLPPolicy, *methods)
            and is_plain(self.encoder, nn.Identity)
            and is_plain(core, SparseMLP)
            and all(is_plain(neurons, SlotNeurons) for neurons in core.layers)
            and core.flatten
        )

    def forward(
        self,
        observations: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PolicyOutput:
        if mask is None or bool(mask.all()) or self.initial_state(1):  # a subclass with memory
            return super().forward(observations, state, mask, noise)
        # Masked steps are passed over: their logits and values are zeros.
        of_valid = None if noise is None else noise[mask].unsqueeze(0)
        valid = super().forward(observations[mask].unsqueeze(0), noise=of_valid)
        logits = valid.logits.new_zeros(*mask.shape, self.num_outputs)
        logits[mask] = valid.logits[0]
        values = valid.values
        if values is not None:
            values = values.new_zeros(mask.shape).masked_scatter(mask, values)
        return PolicyOutput(logits, values, {})


class _SparseMLPActing(RecordingActing):
    """The only step of its episodes, kept for the backward pass."""

    policy: SparseMLPPolicy
    done: StackForward | None = None

    def step(self, observations: Tensor) -> Tensor:
        core, observations = self.policy.core, self.policy.prepare(observations)
        if observations.shape[1:] != (core.input_size,) or core.runs_on(observations) != "native":
            raise ValueError(
                f"{list(observations.shape)} {observations.dtype} is no input of this SparseMLP"
            )
        shape = (len(observations), len(core.layers), core.num_neurons, core.neuron_size)
        noise = core.sgprop.check_noise(self.noise, shape, observations)
        self.done = StackForward(core.stack(), observations, noise)
        return self.policy.actor(self.done.output.flatten(1))

    def replay(
        self,
        policy: Policy,
        observations: Tensor,
        mask: Tensor | None,
        noise: Tensor | None = None,
    ) -> PolicyOutput:
        if mask is not None and not bool(mask.all()):  # masked samples are passed over
            return policy(observations, mask=mask, **given(noise))
        return super().replay(policy, observations, mask, noise)

    def is_of(self, policy: Policy, prepared: Tensor, noise: Tensor | None = None) -> bool:
        return super().is_of(policy, prepared, noise) and self.policy.core_is_plain()

    def seen(self) -> Tensor | None:
        return None if self.done is None else self.done.x.unsqueeze(0)

    def finish(self, prepared: Tensor, mask: Tensor | None) -> PolicyOutput:
        core, embeddings = self.policy.core, self.policy.encoder(prepared)
        output = stack(core.stack(), Mixing.of(core), embeddings.flatten(0, -2), done=self.done)
        features = output.flatten(1).unflatten(0, embeddings.shape[:-1])
        return self.policy.read_out(features, {})
