"""The learned prior of one level: embed → causal backbone → head.

B batch, C latent channels, D width, h×w latent grid.

    log p(z) = Σ_i log p(z_i | z_<i), positions i in raster order, each factor a head's density at the backbone's features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stage2_prior.heads import GaussianMixture, HeadConfig
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.prior import Prior, only
from stage2_prior.sampling import AS_FITTED, CannotSample, Sampling, sample_grid
from stage2_prior.transformer import TransformerConfig

BackboneConfig = PixelCNNConfig | PixelSNAILConfig | TransformerConfig


@dataclass(frozen=True)
class AutoregressiveConfig:
    """The learned prior."""

    backbone: BackboneConfig = field(default_factory=PixelCNNConfig)
    head: HeadConfig = field(default_factory=GaussianMixture)

    def build(self, spec: LatentSpec) -> "AutoregressivePrior":
        return AutoregressivePrior(spec, self)


class AutoregressivePrior(Prior):
    def __init__(self, spec: LatentSpec, config: AutoregressiveConfig):
        super().__init__()
        self.spec = spec
        self.backbone = config.backbone.build()
        self.head = config.head.build(spec, self.backbone.width)
        # Latents of pictures are not stationary; a learned map tells the backbone where on the grid it is.
        self.position = nn.Parameter(0.02 * torch.randn(1, self.backbone.width, *spec.grid))

    def estimate(self, dataset: LatentDataset) -> None:
        self.head.estimate(only(dataset.posteriors(slice(None))))

    def log_prob_by_position(self, levels: list[Tensor]) -> Tensor:
        """log p(z_i | z_<i) in nats of raw latents, B h w."""
        values = self.head.values(only(levels))
        features = self.backbone(self.head.embed(values).movedim(-1, 1), self.position)
        # Under mixed precision the backbone may round; a density never does.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.movedim(1, -1).to(self.position.dtype), values)

    def log_prob(self, levels: list[Tensor]) -> Tensor:
        """Nats per image in raw latents, B."""
        return self.log_prob_by_position(levels).flatten(1).sum(1)

    def sample(
        self,
        indices: Tensor,
        seed: int,
        how: Sampling = AS_FITTED,
        given: list[Tensor] | None = None,
        mask: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Latents for these sample numbers, [B C h w] or [B h w] codes.

        given, mask: known latents, one for each sample, and where to hold them, h w (True is held).
        Raises CannotSample where they do not fit the grid, or `how` asks for what these latents do not have.
        """
        if (given is None) != (mask is None):
            raise CannotSample("known latents and their mask come together")
        if given is not None and mask is not None:
            latents, held, expected = tuple(only(given).shape), tuple(only(mask).shape), (len(indices), *self.spec.shape)
            if latents != expected:
                raise CannotSample(f"known latents of {len(indices)} samples are {expected}, not {latents}")
            if held != self.spec.grid or only(mask).dtype != torch.bool:
                raise CannotSample(f"a mask of known latents is boolean, {self.spec.grid}, not {only(mask).dtype}, {held}")
        values = sample_grid(
            self.backbone,
            self.head,
            self.spec.grid,
            indices,
            seed,
            how,
            map=self.position,
            given=None if given is None else self.head.values(only(given)),
            mask=None if mask is None else only(mask),
        )
        return [self.head.latent(values)]
