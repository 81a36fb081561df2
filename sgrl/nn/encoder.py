"""What the labyrinths' policies share: the published encoder, and the dense actor of the baselines.

Sizes and initial values: the paper, Section H.4.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from sgrl.nn.kernels.plain import is_plain
from sgrl.nn.policy import Policy, PolicySettings, make_linear


@dataclass(frozen=True)
class EncoderSettings(PolicySettings):
    """Settings of the policies with the published encoder.

    Attributes:
        feature_size: length of the encoder's first layer.
        embedding_size: length of the encoder's output, the core's input.
    """

    feature_size: int = 128
    embedding_size: int = 128


class EncodedPolicy(Policy):
    """Base of the labyrinths' policies: the published encoder, and a dense actor.

    Attributes:
        actor_size: units of the actor's hidden layers.
    """

    actor_size: ClassVar[int] = 128
    settings: EncoderSettings

    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        features, embedding = self.settings.feature_size, self.settings.embedding_size
        return nn.Sequential(
            make_linear(self.observation_size, features, generator, dtype),
            nn.LayerNorm(features, eps=1e-5, elementwise_affine=False),
            make_linear(features, embedding, generator, dtype),
            nn.LeakyReLU(0.01),
        )

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        size = self.actor_size
        small = partial(nn.init.normal_, std=0.01)
        logits = make_linear(size, self.num_outputs, generator, dtype, small)
        return nn.Sequential(
            make_linear(core_size, size, generator, dtype),
            nn.LeakyReLU(0.01),
            make_linear(size, size, generator, dtype),
            nn.LeakyReLU(0.01),
            logits,
        )


def is_published_encoder(encoder: nn.Module, size_in: int, size_out: int) -> bool:
    """Whether a module is exactly the encoder that `EncodedPolicy` makes, of any width.

    Args:
        encoder: the module.
        size_in: length of the observations.
        size_out: length of the embedding.
    """
    if not is_plain(encoder, nn.Sequential) or len(encoder) != 4:
        return False
    first, norm, second, slope = encoder
    return (
        is_plain(first, nn.Linear)
        and is_plain(norm, nn.LayerNorm)
        and is_plain(second, nn.Linear)
        and is_plain(slope, nn.LeakyReLU)
        and first.in_features == size_in
        and first.weight.shape == (first.out_features, size_in)
        and norm.normalized_shape == (first.out_features,)
        and (norm.eps, norm.weight, norm.bias) == (1e-5, None, None)
        and second.weight.shape == (size_out, first.out_features)
        and all(layer.bias is not None for layer in (first, second))
        and slope.negative_slope == 0.01
    )


def is_published_actor(actor: nn.Module, size_in: int, size_out: int) -> bool:
    """Whether a module is exactly the actor that `EncodedPolicy` makes, of any width.

    Args:
        actor: the module.
        size_in: length of the core's output.
        size_out: number of logits.
    """
    if not is_plain(actor, nn.Sequential) or len(actor) != 5:
        return False
    first, slope, second, other_slope, last = actor
    return (
        is_plain(first, nn.Linear)
        and is_plain(slope, nn.LeakyReLU)
        and is_plain(second, nn.Linear)
        and is_plain(other_slope, nn.LeakyReLU)
        and is_plain(last, nn.Linear)
        and first.weight.shape == (first.out_features, size_in)
        and second.weight.shape == (first.out_features, first.out_features)
        and last.weight.shape == (size_out, first.out_features)
        and all(layer.bias is not None for layer in (first, second, last))
        and slope.negative_slope == other_slope.negative_slope == 0.01
    )


@dataclass(frozen=True)
class DenseCoreSettings(EncoderSettings):
    """Settings of the labyrinths' dense policies.

    Attributes:
        hidden_size: length of the core's output (and, with memory, of its state).
    """

    hidden_size: int = 256
