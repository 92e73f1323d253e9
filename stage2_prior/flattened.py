"""The flattened latent, standardized: what priors without a grid work on.

B batch, D all numbers of one latent.
"""

import torch
from torch import Tensor, nn

from stage2_prior.conditions import ConditionConfig, Unconditional
from stage2_prior.latents import LatentDataset, LatentSpec, moments
from stage2_prior.prior import only


class FlattenedConfig:
    """What the configs of these priors have in common: they are unconditional."""

    @property
    def condition(self) -> ConditionConfig:
        return Unconditional()


class Flattened(nn.Module):
    """z ↔ (z - shift) / scale, number by number; both are estimated from data and kept with the weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, specs: list[LatentSpec], name: str):
        """name: what the prior is, for the message. Raises ValueError for codes, and for several levels."""
        super().__init__()
        if specs[0].vocabulary is not None:
            raise ValueError(
                f"a {name} models continuous latents, not codes: leave out --prior, or choose --prior autoregressive"
            )
        self.shape = only(specs).shape
        self.size = only(specs).dimensions
        self.register_buffer("shift", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))

    def estimate(self, dataset: LatentDataset) -> None:
        mean, variance = moments(only(dataset.sample()))
        self.shift.copy_(mean.flatten())
        self.scale.copy_(variance.flatten().sqrt().clamp_min(1e-3))  # a number that never varies has a scale of its own, not 0

    def values(self, levels: list[Tensor]) -> Tensor:
        """Standardized, B D."""
        return (only(levels).flatten(1) - self.shift) / self.scale

    def latent(self, values: Tensor) -> list[Tensor]:
        """The inverse of `values`."""
        return [(values * self.scale + self.shift).view(-1, *self.shape)]

    def log_volume(self) -> Tensor:
        """By how much the log density of values exceeds that of latents."""
        return self.scale.log().sum()
