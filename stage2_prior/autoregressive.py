"""The learned prior of one level: embed → causal backbone → head.

B batch, C latent channels, D width, h×w latent grid.

    log p(z) = Σ_i log p(z_i | z_<i), positions i in raster order, each factor a head's density at the backbone's features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stage2_prior.heads import GaussianMixture, HeadConfig
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.pixelcnn import BackboneConfig, PixelCNNConfig
from stage2_prior.prior import Prior, only
from stage2_prior.sampling import sample_grid


@dataclass(frozen=True)
class AutoregressiveConfig:
    """The learned prior."""

    backbone: BackboneConfig = field(default_factory=PixelCNNConfig)
    head: HeadConfig = field(default_factory=GaussianMixture)

    def build(self, spec: LatentSpec) -> "AutoregressivePrior":
        return AutoregressivePrior(spec, self)


class AutoregressivePrior(Prior):
    shift: Tensor
    scale: Tensor

    def __init__(self, spec: LatentSpec, config: AutoregressiveConfig):
        super().__init__()
        self.spec = spec
        # Latents are modelled standardized; shift and scale, C 1 1, are fitted once by `estimate`.
        self.register_buffer("shift", torch.zeros(spec.channels, 1, 1))
        self.register_buffer("scale", torch.ones(spec.channels, 1, 1))
        self.backbone = config.backbone.build()
        self.embedding = nn.Linear(spec.channels, self.backbone.width)
        self.head = config.head.build(spec, self.backbone.width)
        # Latents of pictures are not stationary; a learned map tells the backbone where on the grid it is.
        self.position = nn.Parameter(0.02 * torch.randn(self.backbone.width, *spec.grid))

    def estimate(self, dataset: LatentDataset) -> None:
        """Fit shift and scale to the aggregate posterior's mean and standard deviation per channel, exactly."""
        posterior = only(dataset.posteriors(slice(None)))
        mean, std = posterior["mean"].double(), posterior["std"].double()
        self.shift.copy_(mean.mean((0, 2, 3))[:, None, None])
        variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
        self.scale.copy_(variance.sqrt().clamp(min=1e-6)[:, None, None])  # a channel that never varies keeps a density

    def log_prob_by_position(self, levels: list[Tensor]) -> Tensor:
        """log p(z_i | z_<i) in nats of raw latents, B h w: the change of scale is included."""
        standardized = (only(levels) - self.shift) / self.scale
        inputs = self.embedding(standardized.movedim(1, -1)).movedim(-1, 1)
        features = self.backbone(inputs, self.position.expand_as(inputs))
        # Under mixed precision the backbone may round; a density never does.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(standardized.dtype), standardized) - self.scale.log().sum()

    def log_prob(self, levels: list[Tensor]) -> Tensor:
        """Nats per image in raw latents, B."""
        return self.log_prob_by_position(levels).flatten(1).sum(1)

    def sample(
        self,
        indices: Tensor,
        seed: int,
        temperature: float = 1.0,
        given: list[Tensor] | None = None,
        mask: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Latents for these sample numbers, [B C h w]. given and mask (h w, True is held) keep known latents fixed."""
        standardized = sample_grid(
            self.backbone,
            self.embedding,
            self.head,
            self.spec.grid,
            indices,
            seed,
            map=self.position.expand(len(indices), -1, -1, -1),
            given=None if given is None else (only(given) - self.shift) / self.scale,
            mask=None if mask is None else only(mask),
            temperature=temperature,
        )
        return [standardized * self.scale + self.shift]
