"""The bottleneck of VQ-VAE-2 (Razavi et al. 2019): codes on a coarse grid for the whole, on a finer one for the detail.

B batch, F feature maps, C latent channels, h×w the finer grid.

                    features ─────────────────────────┬──▶ quantize ──▶ fine codes ──┐
                       │ halve the grid                │                              ├──▶ decoder
                       └──▶ coarser bottleneck ──▶ double the grid ───────────────────┘
                                     │
                                     ▼
                               coarse codes

The finer encoder sees the quantized coarser level. The coarser bottleneck may itself be such a hierarchy. Where we deviate:
the doubled coarse level that the finer encoder sees is also what the decoder sees; the paper has a network for each.
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
    """Codes on several grids, each half as fine as the next (VQ-VAE-2)."""

    codes: VectorQuantized = field(default_factory=VectorQuantized)
    """the codebook of every level"""
    levels: Annotated[int, Interval(ge=2, le=10)] = 2
    """number of grids; 2 or 3 in the paper"""
    blocks: Annotated[int, Interval(ge=0, le=1000)] = 2
    """residual blocks on the way to the coarser grid, and on the way back"""
    coarser_rate: Annotated[float, Interval(ge=0, le=1_000_000)] = 1.0
    """rate weight of each level, as a share of the next finer one's. A coarser vector stands for four times as many pixels, so at
    1/4 a nat is worth as much squared distance a pixel on every grid"""

    def build(self, features: int) -> "HierarchicalBottleneck":
        return HierarchicalBottleneck(self, features, self.levels)


class HierarchicalBottleneck(nn.Module):
    has_density = True
    latent_channels: int
    coarser: "HierarchicalBottleneck | VectorQuantizedBottleneck"

    def __init__(self, config: Hierarchical, features: int, levels: int):
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
        """Of the coarsest level."""
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
