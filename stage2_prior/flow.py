"""A normalizing flow over the flattened latent: neural spline coupling layers (Durkan et al. 2019), from the library zuko.

B batch, D all numbers of one latent.

    log p(z) = log N(f(z); 0, I) + log |det ∂f/∂z|, exact;   z = f⁻¹(noise)

Coupling layers invert in two passes; an autoregressive flow would take D. With labels, every layer's network also sees an
embedding of the label.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from stage2_prior.flattened import LABEL_WIDTH, FlattenedConfig, FlattenedPrior
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import AS_FITTED, Sampling, normals


@dataclass(frozen=True)
class FlowConfig(FlattenedConfig):
    """A normalizing flow: neural spline coupling layers over the flattened latent."""

    transforms: Annotated[int, Interval(ge=1, le=1000)] = 6
    """coupling layers"""
    hidden: Annotated[int, Interval(ge=1, le=65_536)] = 256
    """width of the two hidden layers in each"""
    bins: Annotated[int, Interval(ge=2, le=1000)] = 8
    """pieces of each spline, between -5 and 5 standard deviations"""

    def build(self, specs: list[LatentSpec], classes: int = 0) -> "FlowPrior":
        """classes: number of labels, 0 for none. Raises ValueError where parts do not fit, and where zuko is missing."""
        return FlowPrior(specs, self, classes)


class FlowPrior(FlattenedPrior):
    """The flow on standardized values."""

    def __init__(self, specs: list[LatentSpec], config: FlowConfig, classes: int = 0):
        super().__init__(specs, "flow", config, classes)
        try:
            from zuko.flows import NSF
        except ImportError as error:
            raise ValueError("a flow needs the library zuko: pip install -e '.[flow]'") from error
        self.flow = NSF(
            self.flattened.size,
            context=0 if self.condition is None else LABEL_WIDTH,
            transforms=config.transforms,
            bins=config.bins,
            passes=2,
            randperm=True,
            hidden_features=(config.hidden, config.hidden),
        )

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        values = self.flattened.values(levels)
        with torch.autocast(values.device.type, enabled=False):  # mixed precision must not round a density
            return self.flow(self.embedded(contexts)).log_prob(values) - self.flattened.log_volume()

    @torch.no_grad()
    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        """The temperature scales the variance of the noise, as in Glow; the density is not p^(1/T)."""
        contexts = self.contexts_to_sample(indices, seed, how, contexts)
        noise = math.sqrt(how.temperature) * normals(seed, indices, (self.flattened.size,)).to(self.flattened.scale)
        return self.flattened.latent(self.flow(self.embedded(contexts)).transform.inv(noise))
