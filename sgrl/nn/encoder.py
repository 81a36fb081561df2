"""What the labyrinths' policies share: the published encoder, and the dense actor of the baselines.

Images go through convolutions first.

Sizes and initial values: the paper, Section H.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgrl.nn.kernels.plain import is_plain
from sgrl.nn.policy import Policy, PolicySettings, make_linear


@dataclass(frozen=True)
class EncoderSettings(PolicySettings):
    """Settings of the policies with the published encoder.

    Attributes:
        feature_size: length of the encoder's first layer.
        embedding_size: length of the encoder's output, the core's input.
        encoder: whether it begins with convolutions: "conv", for images alone, or "dense"; "auto"
            convolves images.
        conv_layers: number of 3x3 convolutions; each halves height and width.
        conv_channels: channels of each convolution.
    """

    feature_size: int = 128
    embedding_size: int = 128
    encoder: Literal["auto", "dense", "conv"] = "auto"
    conv_layers: int = 3
    conv_channels: int = 32

    older: ClassVar[dict[str, Any]] = {**PolicySettings.older, "encoder": "dense"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("conv_layers", "conv_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check_observations(self, shape: tuple[int, ...]) -> None:
        if self.encoder == "conv" and len(shape) != 3:
            raise ValueError(
                "encoder must be 'auto' or 'dense', got 'conv': it is for images (uint8, "
                f"[height, width, channels]), and observations are {list(shape)}"
            )


class EncodedPolicy(Policy):
    """Base of the labyrinths' policies: the published encoder, and a dense actor.

    Attributes:
        actor_size: units of the actor's hidden layers.
    """

    actor_size: ClassVar[int] = 128
    settings: EncoderSettings

    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        features, embedding = self.settings.feature_size, self.settings.embedding_size
        size, first = self.observation_size, []
        if len(self.observation_shape) == 3 and self.settings.encoder != "dense":
            sizes = self.settings.conv_layers, self.settings.conv_channels
            first = [Convolutions(self.observation_shape, *sizes, generator, dtype)]
            size = first[0].num_features
        return nn.Sequential(
            *first,
            make_linear(size, features, generator, dtype),
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


class Convolutions(nn.Module):
    """Layers of 3x3 convolutions with stride 2, LeakyReLU behind each.

    Attributes:
        num_features: length of the output.

    Args:
        shape: height, width, channels.
        num_layers: how many.
        num_channels: of each one's output.
        generator: source of the initial weights, orthogonal; biases are zero.
        dtype: of the parameters.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_layers: int,
        num_channels: int,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        height, width, channels = self.shape = tuple(shape)
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            layer: nn.Conv2d = nn.utils.skip_init(
                nn.Conv2d, channels, num_channels, kernel_size=3, stride=2, padding=1, dtype=dtype
            )
            nn.init.orthogonal_(layer.weight, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            self.layers.append(layer)
            height, width, channels = (height + 1) // 2, (width + 1) // 2, num_channels
        self.num_features = height * width * channels

    def forward(self, images: Float[Tensor, "*B F"]) -> Float[Tensor, "*B features"]:
        """Flat images [..., height * width * channels] -> [..., num_features]."""
        planes = images.reshape(-1, *self.shape).permute(0, 3, 1, 2)
        for layer in self.layers:
            planes = nn.functional.leaky_relu(layer(planes), 0.01)
        return planes.reshape(*images.shape[:-1], self.num_features)


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
