"""What every policy is: an encoder, a core over time, an actor, and optionally a value head.

    output = policy(observations)                     # logits [T, B, A]
    output = policy.step(observations[0], state)      # logits [B, A], for acting

A policy is added by subclassing `Policy` and giving it a `Settings` dataclass. Its name is then
`module:Class`, or one of its own by a line in `registry.POLICIES`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sgrl.annotations import accepts, in_words
from sgrl.nn.actions import ActionSpace, Discrete
from sgrl.nn.observations import RunningNormalizer

State = dict[str, Tensor]
#: True at valid steps.
Mask = Bool[Tensor, "T B"]
#: Of noisy neurons, standard normal; `Policy.noise_size` numbers a step.
Noise = Float[Tensor, "T B noise"]


def given(noise: Tensor | None) -> dict[str, Tensor]:
    """The argument `noise` where there is any; policies without noisy neurons need not know it."""
    return {} if noise is None else {"noise": noise}


class PolicyOutput(NamedTuple):
    """logits [T, B, A], values [T, B] (None without a value head), state after the last step.

    Of actions that are not Discrete, "logits" are the outputs that `Policy.action_space` reads.
    """

    logits: Float[Tensor, "*T_B A"]
    values: Float[Tensor, " *T_B"] | None
    state: State


@dataclass(frozen=True)
class PolicySettings:
    """Settings every policy has.

    Attributes:
        value_head: whether the policy also estimates the value of its state.
        normalize_observations: whether each feature is brought to mean 0 and variance 1 over the
            steps trained on so far, and clipped to +-10.
        scale_images: whether images are brought from 0..255 to [0, 1]; nothing to flat
            observations.
    """

    value_head: bool = False
    normalize_observations: bool = False
    scale_images: bool = True

    #: What a policy was computed with of whose settings a record lacks one, if not its default.
    older: ClassVar[dict[str, Any]] = {"scale_images": False}

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name in (field.name for field in fields(self)):
            kind, value = kinds[name], getattr(self, name)
            if not accepts(kind, value):
                raise ValueError(f"{name} must be {in_words(kind)}, got {value!r}")
            if kind is float and type(value) is int:
                object.__setattr__(self, name, float(value))
            if name.endswith("_size") and type(value) is int and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check_observations(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where observations of this shape, as a policy's, cannot be read."""


class Policy(nn.Module):
    """Base of all policies: encoder, core and actor (the subclass's), optional value head.

    Args:
        observation_size: F, length of a flat observation; or the shape of images, whose numbers
            are 0..255: [height, width, channels]. Policies are given these flat, too.
        num_actions: A, of Discrete actions; other kinds as `sgrl.nn.actions` has them, and A is
            then their number of outputs.
        settings: an instance of the class's `Settings`.
        generator: source of all initial weights, a CPU generator.
        dtype: floating-point type of the parameters.

    Attributes:
        observation_shape: (F,), or (height, width, channels) of images.
        observation_size: F, how many numbers an observation has.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[PolicySettings]]
    #: Whether the backward pass can be run twice, for the two-phase update.
    two_phase: ClassVar[bool] = True

    def __init__(
        self,
        observation_size: int | Sequence[int],
        num_actions: int | ActionSpace,
        settings: PolicySettings,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        sizes = [observation_size] if isinstance(observation_size, int) else observation_size
        shape = tuple(int(size) for size in sizes)
        if min(shape) < 1 or (not isinstance(num_actions, ActionSpace) and num_actions < 1):
            raise ValueError(
                "observation_size and num_actions must be at least 1, "
                f"got {observation_size} and {num_actions}"
            )
        if len(shape) not in (1, 3):
            raise ValueError(
                "observation_size must be a number, or [height, width, channels] of images, "
                f"got {list(shape)}"
            )
        settings.check_observations(shape)
        self.observation_shape = shape
        self.observation_size = math.prod(shape)
        if not isinstance(num_actions, ActionSpace):
            num_actions = Discrete(int(num_actions))
        self.action_space = num_actions
        self.num_outputs = self.action_space.num_outputs
        self.settings = settings
        self.normalizer = (
            RunningNormalizer(self.observation_size) if settings.normalize_observations else None
        )
        self.encoder = self._build_encoder(generator, dtype)
        core_size = self._build_core(generator, dtype)
        self.actor = self._build_actor(core_size, generator, dtype)
        self.value_head = (
            make_linear(core_size, 1, generator, dtype) if settings.value_head else None
        )

    @property
    def num_actions(self) -> int:
        """A, of Discrete actions."""
        if not isinstance(self.action_space, Discrete):
            raise TypeError(f"{self.action_space} cannot be counted: see num_outputs")
        return self.action_space.size

    @property
    def noise_size(self) -> int:
        """Random numbers that the neurons take at each step; 0 of those without noise."""
        return 0

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
        self, embeddings: Float[Tensor, "T B E"], state: State, mask: Mask | None
    ) -> tuple[Float[Tensor, "T B features"], State]:
        """Embeddings [T, B, E], state and mask [T, B] -> features [T, B, core size], new state.

        Unless overridden, the core has no memory. Where `noise_size` is not 0 it takes noise too.
        """
        core: Any = self.core
        return core(embeddings), {}

    def acting(
        self, length: int, batch_size: int, keep: bool = False, noise: Noise | None = None
    ) -> "Acting":
        """For acting through whole episodes of T steps, from the initial state on.

        With `keep` it may hold, where the policy can, what lets `Acting.replay` skip those steps
        of its core.
        """
        return Acting(self, batch_size, noise)

    def forward(
        self,
        observations: Float[Tensor, "T B F"],
        state: State | None = None,
        mask: Mask | None = None,
        noise: Noise | None = None,
    ) -> PolicyOutput:
        """Run over whole sequences.

        Args:
            observations: [T, B, F].
            state: before the first step; `initial_state` if None.
            mask: bool [T, B], True at valid steps; all if None.
            noise: standard normal [T, B, noise_size], where that is not 0.
        """
        if state is None:
            state = self.initial_state(observations.shape[1])
        embeddings = self.encode(observations)
        return self.read_out(*self.run_core(embeddings, state, mask, **given(noise)))

    def prepare(self, observations: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
        """Bring observations [..., F] into the form that the encoder reads."""
        observations = self._scale(observations)
        return observations if self.normalizer is None else self.normalizer(observations)

    def _scale(self, observations: Tensor) -> Tensor:
        are_scaled = len(self.observation_shape) == 3 and self.settings.scale_images
        return observations / 255 if are_scaled else observations

    def encode(self, observations: Float[Tensor, "*B F"]) -> Float[Tensor, "*B E"]:
        """Observations [..., F] -> embeddings [..., E], which the core reads."""
        return self.encoder(self.prepare(observations))

    def observe(
        self, observations: Float[Tensor, "*B F"], mask: Bool[Tensor, "*B"] | None = None
    ) -> None:
        """Take a batch that was trained on into the statistics of observations, if there are any.

        To be called once a batch, after its last update, so that a batch is sampled and learned
        from with the same statistics.

        Args:
            observations: [..., F].
            mask: bool [...], True at valid steps; all if None.

        Raises:
            FloatingPointError: one of them is NaN or infinite.
        """
        if self.normalizer is not None:
            self.normalizer.observe(self._scale(observations), mask)

    def read_out(self, features: Float[Tensor, "T B features"], state: State) -> PolicyOutput:
        """Actor and value head on the core's output [T, B, core size]."""
        return PolicyOutput(self.actor(features), self.read_values(features), state)

    def read_values(
        self, features: Float[Tensor, "*T_B features"]
    ) -> Float[Tensor, " *T_B"] | None:
        """The value head on the core's output, where there is one."""
        return None if self.value_head is None else self.value_head(features).squeeze(-1)

    def step(
        self,
        observations: Float[Tensor, "B F"],
        state: State,
        noise: Float[Tensor, "B noise"] | None = None,
    ) -> PolicyOutput:
        """One step: observations [B, F] -> logits [B, A], values [B], state."""
        now = None if noise is None else noise.unsqueeze(0)
        output = self(observations.unsqueeze(0), state, **given(now))
        values = None if output.values is None else output.values[0]
        return PolicyOutput(output.logits[0], values, output.state)


class Acting:
    """A policy taking one step of B episodes after the other, from their beginning.

    It also owns the use of that forward pass in the update (`replay`). This one merely carries the
    state along, and keeps nothing.
    """

    def __init__(self, policy: Policy, batch_size: int, noise: Noise | None = None) -> None:
        self.policy = policy
        self.state = policy.initial_state(batch_size)
        self.noise = noise
        self.steps = 0

    def step(self, observations: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """Observations [B, F] -> logits [B, A]."""
        noise = None if self.noise is None else self.noise[self.steps]
        output = self.policy.step(observations, self.state, **given(noise))
        self.state, self.steps = output.state, self.steps + 1
        return output.logits

    def replay(
        self,
        policy: Policy,
        observations: Float[Tensor, "T B F"],
        mask: Mask | None,
        noise: Noise | None = None,
    ) -> PolicyOutput:
        """`policy(observations, mask=mask)`, without the steps already taken where they are kept.

        Args:
            policy: may be another one, or have changed meanwhile.
            observations: [T, B, F].
            mask: bool [T, B], True at valid steps; all if None.
            noise: as of `Policy.forward`.
        """
        prepared = policy.prepare(observations)
        if not self.is_of(policy, prepared, noise):
            return policy(observations, mask=mask, **given(noise))
        return self.finish(prepared, mask)

    def is_of(self, policy: Policy, prepared: Tensor, noise: Tensor | None = None) -> bool:
        """Whether `finish` gives what this policy makes of observations [T, B, F], prepared."""
        return False

    def finish(self, prepared: Float[Tensor, "T B F"], mask: Mask | None) -> PolicyOutput:
        """As `Policy.forward` from the initial state, without the steps already taken.

        Args:
            prepared: observations [T, B, F] as `Policy.prepare` returns them.
            mask: bool [T, B], True at valid steps; all if None.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps nothing to continue from")


class RecordingActing(Acting):
    """Base of those that keep what `finish` goes on from, for the policy as it is now."""

    def __init__(self, policy: Policy, noise: Noise | None) -> None:
        self.policy = policy
        self.noise = noise
        self.versions = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        """Changes with every change of what a forward pass reads."""
        tensors = dict(self.policy.named_parameters()) | dict(self.policy.named_buffers())
        return [
            (tensor.data_ptr(), tensor._version)
            for name, tensor in tensors.items()
            # These act in backward passes only.
            if not name.rpartition(".")[2].startswith("mixing_")
        ]

    def seen(self) -> Float[Tensor, "t B F"] | None:
        """The observations so far [t, B, F], prepared; None if nothing is kept."""
        raise NotImplementedError(f"{type(self).__name__} must say what it has seen")

    def is_of(self, policy: Policy, prepared: Tensor, noise: Tensor | None = None) -> bool:
        seen, before = self.seen(), self.noise
        return (
            seen is not None
            and policy is self.policy
            and self._versions() == self.versions
            and torch.equal(prepared[: len(seen)], seen)
            and (before is None or (noise is not None and torch.equal(noise.to(before), before)))
        )


def make_linear(
    size_in: int,
    size_out: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    initialise: Callable[..., object] = nn.init.orthogonal_,
) -> nn.Linear:
    """Linear layer with zero biases, its weights orthogonal or as `initialise` makes them."""
    layer = nn.utils.skip_init(nn.Linear, size_in, size_out, dtype=dtype)
    initialise(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
