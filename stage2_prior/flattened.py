"""The flattened, standardized latent, for priors that ignore the grid.

B batch, D all numbers of one latent.
"""

import torch
from torch import Tensor, nn

from stage2_prior.conditions import ConditionConfig, Unconditional
from stage2_prior.latents import LatentDataset, LatentSpec, moments
from stage2_prior.prior import only


class FlattenedConfig:
    """Base of the configs of these priors, which are unconditional."""

    @property
    def condition(self) -> ConditionConfig:
        return Unconditional()


class Flattened(nn.Module):
    """z ↔ (z - shift) / scale for each number. Both are estimated from data and saved with the weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, specs: list[LatentSpec], name: str):
        """name: of the prior, for error messages. Raises ValueError for codes, and for several levels."""
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
        """Shift and scale become the mean and standard deviation of the aggregate posterior, for each number."""
        mean, variance = moments(only(dataset.sample()))
        self.shift.copy_(mean.flatten())
        self.scale.copy_(variance.flatten().sqrt().clamp_min(1e-3))  # not 0 where a number never varies

    def values(self, levels: list[Tensor]) -> Tensor:
        """Standardized, B D."""
        return (only(levels).flatten(1) - self.shift) / self.scale

    def latent(self, values: Tensor) -> list[Tensor]:
        """The inverse of `values`."""
        return [(values * self.scale + self.shift).view(-1, *self.shape)]

    def log_volume(self) -> Tensor:
        """log p(values) - log p(latent): the log of the product of all scales."""
        return self.scale.log().sum()
