"""The bottleneck of VQ-VAE-2 (Razavi et al. 2019): codes on a coarse grid for global structure, and on finer ones for details.

B batch, F feature maps, C latent channels, h×w the finer grid.

                    features ─────────────────────────┬──▶ quantize ──▶ fine codes ──┐
                       │ halve the grid                │                              ├──▶ decoder
                       └──▶ coarser bottleneck ──▶ double the grid ───────────────────┘
                                     │
                                     ▼
                               coarse codes

The fine codes are chosen given the quantized coarse level. With three levels or more, the coarser bottleneck is itself such a
hierarchy. Where we deviate: one network doubles the coarse grid for both the fine codes and the decoder. The paper has two.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from stage1_vae.bottlenecks import Levels, Posterior, VectorQuantized, VectorQuantizedBottleneck
from stage1_vae.networks import ResidualBlock


@dataclass(frozen=True)
class Hierarchical:
    """Codes on several grids, each with half the resolution of the next (VQ-VAE-2)."""

    continuous = False
    codes: VectorQuantized = field(default_factory=VectorQuantized)
    """the codebook of every level"""
    levels: Annotated[int, Interval(ge=2, le=10)] = 2
    """number of grids; 2 or 3 in the paper"""
    blocks: Annotated[int, Interval(ge=0, le=1000)] = 2
    """residual blocks after each halving of the grid, and before each doubling"""
    coarser_rate: Annotated[float, Interval(ge=0, le=1_000_000)] = 1.0
    """`rate_weight` of a level over that of the next finer one. A coarse vector stands for four times as many pixels, so with 1/4
    a nat buys the same squared distance, summed over pixels, on every grid"""

    def build(self, features: int) -> "HierarchicalBottleneck":
        """features: F, on the finest grid. Raises ValueError for fewer than two levels."""
        if self.levels < 2:
            raise ValueError(f"a hierarchy has two levels or more, not {self.levels}: for one, use its VectorQuantized alone")
        return HierarchicalBottleneck(self, features, self.levels)


class HierarchicalBottleneck(nn.Module):
    """The finest level, and a bottleneck of the coarser ones: the figure above. See bottlenecks.py for the methods."""

    has_density = True
    latent_channels: int
    coarser: "HierarchicalBottleneck | VectorQuantizedBottleneck"

    def __init__(self, config: Hierarchical, features: int, levels: int):
        """levels: number of grids from this one down, which replaces that of the config."""
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(features, features, 4, stride=2, padding=1),
            *(ResidualBlock(features) for _ in range(config.blocks)),
            nn.SiLU(),
        )
        codes = replace(config.codes, rate_weight=config.coarser_rate * config.codes.rate_weight)
        if levels == 2:
            self.coarser = codes.build(features)
        else:
            self.coarser = HierarchicalBottleneck(replace(config, codes=codes), features, levels - 1)
        self.up = nn.Sequential(
            nn.Conv2d(self.coarser.latent_channels, features, 3, padding=1),
            *(ResidualBlock(features) for _ in range(config.blocks)),
            nn.SiLU(),
            nn.ConvTranspose2d(features, features, 4, stride=2, padding=1),
        )
        self.finest = config.codes.build(2 * features)
        self.latent_channels = features + self.finest.latent_channels

    def latents(self, grid: tuple[int, int]) -> Levels:
        """Raises ValueError where the grid cannot be halved."""
        if grid[0] % 2 or grid[1] % 2:
            raise ValueError(
                f"a {grid[0]}×{grid[1]} latent grid cannot be halved for a coarser level; use an image size or a downsample that"
                " leaves a finer grid divisible by two at every level"
            )
        return self.coarser.latents((grid[0] // 2, grid[1] // 2)) + self.finest.latents(grid)

    @property
    def vectors(self) -> Tensor:
        """The code vectors of the coarsest level, K D."""
        return self.coarser.vectors

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        coarse, coarse_penalty, coarse_terms = self.coarser(self.down(features), progress)
        context = self.up(coarse.squeeze(0))
        fine, penalty, terms = self.finest(torch.cat([features, context], 1), progress)
        embedded = torch.cat([context, fine.squeeze(0)], 1)
        return embedded[None], coarse_penalty + penalty, terms | {f"coarse_{name}": term for name, term in coarse_terms.items()}

    def posterior(self, features: Tensor) -> list[Posterior]:
        coarser = self.coarser.posterior(self.down(features))
        context = self.up(self.coarser.embed([level["codes"] for level in coarser]))
        return coarser + self.finest.posterior(torch.cat([features, context], 1))

    def embed(self, levels: list[Tensor]) -> Tensor:
        *coarser, finest = levels
        return torch.cat([self.up(self.coarser.embed(coarser)), self.finest.embed([finest])], 1)
