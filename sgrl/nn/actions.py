"""Kinds of actions, and what a policy's outputs say about them: a distribution of each kind.

    policy = make_policy("gru", observation_size=2, num_actions=MultiDiscrete((8, 8)))
    actions = policy.action_space.greedy(policy(observations).logits)       # int64 [T, B, 2]

Outputs are laid out as RLlib's own distributions read them (TorchCategorical,
TorchMultiCategorical, TorchDiagGaussian, and TorchMultiDistribution of these last two), so that
every algorithm can train the same policy.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import Normal

Outputs = Float[Tensor, "*B O"]
Noise = Float[Tensor, "*B D"]
Actions = Shaped[Tensor, "..."]  # [*B, *shape]
Each = Float[Tensor, " *B"]


class ActionSpace(ABC):
    """One kind of action. In what follows O is the number of outputs.

    Attributes:
        num_outputs: O, numbers a policy puts out for one action.
        shape: of one action: () or (number of parts,).
        dtype: of actions.
    """

    kind: ClassVar[str]
    num_outputs: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64

    @abstractmethod
    def noise(self, *batch: int, generator: torch.Generator) -> Noise:
        """What `sample` needs for a batch of that shape, float32 on the CPU."""

    @abstractmethod
    def sample(self, outputs: Outputs, noise: Noise) -> Actions:
        """Outputs [..., O], noise of one draw -> actions [..., *shape]."""

    @abstractmethod
    def greedy(self, outputs: Outputs) -> Actions:
        """Outputs [..., O] -> the likeliest actions [..., *shape]."""

    @abstractmethod
    def log_prob_and_entropy(self, outputs: Outputs, actions: Actions) -> tuple[Each, Each]:
        """Outputs [..., O], actions [..., *shape] -> log probability or density, entropy [...]."""

    def description(self) -> dict[str, Any]:
        """JSON that `action_space_from` reads back."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind, **fields}


@dataclass(frozen=True)
class Discrete(ActionSpace):
    """One of `size` actions, from 0. Outputs: a logit each."""

    kind: ClassVar[str] = "discrete"
    size: int

    def __post_init__(self) -> None:
        _check_sizes([self.size])
        object.__setattr__(self, "num_outputs", self.size)
        object.__setattr__(self, "shape", ())

    def noise(self, *batch: int, generator: torch.Generator) -> Noise:
        return torch.empty(*batch, self.size).exponential_(generator=generator).log_()

    def sample(self, outputs: Outputs, noise: Noise) -> Actions:
        # argmax(logits - log(exponential noise)) is a sample of the policy (the Gumbel trick).
        return (outputs - noise).argmax(-1)

    def greedy(self, outputs: Outputs) -> Actions:
        return outputs.argmax(-1)

    def log_prob_and_entropy(self, outputs: Outputs, actions: Actions) -> tuple[Each, Each]:
        log_probs = outputs.log_softmax(dim=-1)
        chosen = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_probs.exp() * log_probs).sum(-1)


@dataclass(frozen=True)
class MultiDiscrete(ActionSpace):
    """Several independent choices at once. Outputs: the logits of one after the other."""

    kind: ClassVar[str] = "multi_discrete"
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "num_outputs", sum(self.sizes))
        object.__setattr__(self, "shape", (len(self.sizes),))

    def noise(self, *batch: int, generator: torch.Generator) -> Noise:
        return torch.empty(*batch, self.num_outputs).exponential_(generator=generator).log_()

    def sample(self, outputs: Outputs, noise: Noise) -> Actions:
        return self.greedy(outputs - noise)

    def greedy(self, outputs: Outputs) -> Actions:
        return torch.stack([part.argmax(-1) for part in outputs.split(self.sizes, -1)], -1)

    def log_prob_and_entropy(self, outputs: Outputs, actions: Actions) -> tuple[Each, Each]:
        parts = [
            Discrete(size).log_prob_and_entropy(logits, chosen)
            for size, logits, chosen in zip(
                self.sizes, outputs.split(self.sizes, -1), actions.unbind(-1), strict=True
            )
        ]
        log_probs, entropies = zip(*parts, strict=True)
        return torch.stack(log_probs).sum(0), torch.stack(entropies).sum(0)


@dataclass(frozen=True)
class Box(ActionSpace):
    """`size` real numbers. Outputs: their means, then the logarithms of their standard deviations.

    Normally distributed, each by itself, and without bounds: an environment clips what it is given,
    and the probability stays that of the number sampled.
    """

    kind: ClassVar[str] = "box"
    dtype = torch.float32
    size: int

    def __post_init__(self) -> None:
        _check_sizes([self.size])
        object.__setattr__(self, "num_outputs", 2 * self.size)
        object.__setattr__(self, "shape", (self.size,))

    def noise(self, *batch: int, generator: torch.Generator) -> Noise:
        return torch.empty(*batch, self.size).normal_(generator=generator)

    def sample(self, outputs: Outputs, noise: Noise) -> Actions:
        mean, log_std = outputs.chunk(2, -1)
        return mean + log_std.exp() * noise

    def greedy(self, outputs: Outputs) -> Actions:
        return outputs.chunk(2, -1)[0]

    def log_prob_and_entropy(self, outputs: Outputs, actions: Actions) -> tuple[Each, Each]:
        mean, log_std = outputs.chunk(2, -1)
        normal = Normal(mean, log_std.exp(), validate_args=False)
        return normal.log_prob(actions).sum(-1), normal.entropy().sum(-1)


@dataclass(frozen=True)
class Mixed(ActionSpace):
    """Choices as of MultiDiscrete, and `size` numbers as of Box, one after the other in a row.

    Outputs: those of the choices, then those of the numbers; all are independent.
    """

    kind: ClassVar[str] = "mixed"
    dtype = torch.float32
    sizes: tuple[int, ...]
    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "num_outputs", sum(part.num_outputs for part in self.parts))
        object.__setattr__(self, "shape", (len(self.sizes) + self.size,))

    @cached_property
    def parts(self) -> tuple[MultiDiscrete, Box]:
        """The choices and the numbers."""
        return MultiDiscrete(self.sizes), Box(self.size)

    def noise(self, *batch: int, generator: torch.Generator) -> Noise:
        return torch.cat([part.noise(*batch, generator=generator) for part in self.parts], -1)

    def sample(self, outputs: Outputs, noise: Noise) -> Actions:
        drawn = zip(
            self.parts,
            self._outputs(outputs),
            noise.split([self.parts[0].num_outputs, self.size], -1),
            strict=True,
        )
        return torch.cat([part.sample(*given).to(outputs) for part, *given in drawn], -1)

    def greedy(self, outputs: Outputs) -> Actions:
        pairs = zip(self.parts, self._outputs(outputs), strict=True)
        return torch.cat([part.greedy(of_part).to(outputs) for part, of_part in pairs], -1)

    def log_prob_and_entropy(self, outputs: Outputs, actions: Actions) -> tuple[Each, Each]:
        choices, numbers = actions.split([len(self.sizes), self.size], -1)
        of_choices, of_numbers = (
            part.log_prob_and_entropy(of_part, taken)
            for part, of_part, taken in zip(
                self.parts, self._outputs(outputs), (choices.long(), numbers), strict=True
            )
        )
        return of_choices[0] + of_numbers[0], of_choices[1] + of_numbers[1]

    def _outputs(self, outputs: Outputs) -> tuple[Tensor, ...]:
        return outputs.split([part.num_outputs for part in self.parts], -1)


KINDS: dict[str, type[ActionSpace]] = {
    kind.kind: kind for kind in (Discrete, MultiDiscrete, Box, Mixed)
}


def action_space_from(description: Mapping[str, Any]) -> ActionSpace:
    """The actions that `ActionSpace.description` describes.

    Raises:
        KeyError, TypeError, ValueError: it describes none.
    """
    fields = {name: value for name, value in description.items() if name != "kind"}
    return KINDS[description["kind"]](**fields)


def _check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"actions must be at least 1, got {', '.join(map(str, sizes)) or 'none'}")
