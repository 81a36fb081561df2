"""Running normalisation of what a policy observes."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

#: Greatest absolute value of a normalised feature.
CLIP = 10.0
EPSILON = 1e-8


class RunningNormalizer(nn.Module):
    """Features with mean 0 and variance 1 over all steps that were trained on, clipped to +-10.

    The statistics are buffers, so they are saved and copied with the parameters. `forward` leaves
    them as they are; before the first `observe` they are 0 and 1.

    Attributes:
        count: int64, steps observed so far.
        mean: float64 [F].
        variance: float64 [F], of the population.

    Args:
        size: F.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))

    def forward(self, observations: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
        """Normalise observations [..., F]; the result is of their dtype."""
        deviation = (self.variance + EPSILON).sqrt()
        normalized = (observations - self.mean.to(observations)) / deviation.to(observations)
        return normalized.clamp(-CLIP, CLIP)

    @torch.no_grad()
    def observe(
        self, observations: Float[Tensor, "*B F"], mask: Bool[Tensor, "*B"] | None = None
    ) -> None:
        """Merge the statistics with those of a batch.

        Args:
            observations: [..., F].
            mask: bool [...], True at the steps that count; all if None.

        Raises:
            FloatingPointError: one that counts is NaN or infinite; nothing has changed.

        Source: Chan et al., "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
        """
        counted = observations.flatten(0, -2) if mask is None else observations[mask]
        if not len(counted):
            return
        counted = counted.to(self.mean)
        variance, mean = torch.var_mean(counted, dim=0, correction=0)
        if not torch.isfinite(variance).all():
            raise FloatingPointError(
                "an observation is NaN or infinite: normalize_observations takes finite ones only"
            )
        total = int(self.count) + len(counted)
        share, difference = len(counted) / total, mean - self.mean
        spread = (1 - share) * self.variance + share * variance
        self.variance.copy_(spread + share * (1 - share) * difference.square())
        self.mean.add_(share * difference)
        self.count.fill_(total)
