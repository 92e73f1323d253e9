"""Encoder → bottleneck → decoder → likelihood, as one module.

B batch, C colour channels, H×W pixels, L samples of z an image.

    loss = E_q[-log p(x|z)] + β · KL(q(z|x) ‖ p(z)),   in nats an image: summed over pixels and latents, never averaged.

Public methods take and return images as uint8, B C H W. The likelihood defines the scale of its log_prob.
"""

import math
from dataclasses import dataclass, field
from itertools import repeat

import torch
from einops import rearrange
from torch import Tensor, distributions, nn

from stage1_vae import bottlenecks, likelihoods
from stage1_vae.bottlenecks import (
    Bottleneck,
    Deterministic,
    FiniteScalar,
    Gaussian,
    GumbelSoftmax,
    Posterior,
    VectorQuantized,
    full_precision,
)
from stage1_vae.hierarchy import Hierarchical
from stage1_vae.likelihoods import Likelihood, LikelihoodConfig
from stage1_vae.networks import Convolutional, Network, NetworkConfig

PIXELS_AT_ONCE = 2**19  # of images that are encoded or decoded together outside training, to bound memory

BottleneckConfig = Deterministic | Gaussian | VectorQuantized | FiniteScalar | GumbelSoftmax | Hierarchical


@dataclass(frozen=True)
class AutoencoderConfig:
    """Stage 1."""

    network: NetworkConfig = field(default_factory=Convolutional)
    bottleneck: BottleneckConfig = field(default_factory=bottlenecks.Gaussian)
    likelihood: LikelihoodConfig = field(default_factory=likelihoods.Gaussian)

    def build(self, image_shape: tuple[int, int, int]) -> "Autoencoder":
        """image_shape: C H W. Raises ValueError where the network cannot take it, or the parts do not fit."""
        return Autoencoder(image_shape, self)


class Autoencoder(nn.Module):
    """Encoder, bottleneck, decoder and likelihood, built from a config for images of one shape.

    `forward` is the training loss. `encode`, `sample` and `decode` are q(z|x), z ~ q(z|x) and p(x|z). `render` makes images.
    """

    def __init__(self, image_shape: tuple[int, int, int], config: AutoencoderConfig):
        super().__init__()
        self.image_shape = image_shape
        network: Network = config.network
        grid = network.grid(image_shape)
        self.encoder, features = network.encoder(image_shape)
        self.bottleneck: Bottleneck = config.bottleneck.build(features)
        self.likelihood: Likelihood = config.likelihood.build()
        self.decoder = network.decoder(
            self.bottleneck.latent_channels, image_shape, image_shape[0] * self.likelihood.outputs_per_channel
        )
        self.latents = self.bottleneck.latents(grid)
        """Shape and vocabulary of each level of latents, coarse to fine: all that stage 2 knows of stage 1."""

    @property
    def vectors(self) -> Tensor | None:
        """Code vectors of the coarsest level, K D, on the CPU; None for continuous latents."""
        vectors = self.bottleneck.vectors
        return None if vectors is None else vectors.detach().cpu()

    @property
    def at_once(self) -> int:
        """How many images are encoded or decoded together outside training."""
        return max(1, PIXELS_AT_ONCE // math.prod(self.image_shape[1:]))

    def features(self, images: Tensor) -> Tensor:
        """images uint8 B C H W to the encoder's features, B F h w. Raises ValueError for images of another type or shape."""
        if tuple(images.shape[1:]) != tuple(self.image_shape):
            shape = "×".join(map(str, self.image_shape))
            raise ValueError(f"this autoencoder takes images of shape B×{shape}, not {'×'.join(map(str, images.shape))}")
        return self.encoder(2 * likelihoods.unit_interval(images) - 1)

    def forward(self, images: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """images uint8 B C H W; returns loss, distortion and the bottleneck's terms (rate), mean nats an image.

        progress: share of the training that is done, from 0 to 1. Left out, schedules stay at their beginning. They act in
        training mode only. There, a learned σ of the likelihood is updated, too.
        Raises ValueError for images of another type or shape.
        """
        embedded, penalty, terms = self.bottleneck(self.features(images), progress)
        samples = len(embedded)
        outputs = full_precision(self.decoder(rearrange(embedded, "l b ... -> (l b) ...")))
        targets = self.likelihood.scale(images).repeat(samples, 1, 1, 1)
        log_prob = self.likelihood(outputs).log_prob(targets)
        if self.training:  # after the density, so that this loss is computed with the σ of earlier batches
            self.likelihood.update(outputs, targets)
        # Log-likelihoods are averaged over z, never reconstructions (Kingma and Welling 2014, equation 7).
        distortion = -rearrange(log_prob, "(l b) -> l b", l=samples).mean(0)
        means = {name: value.mean() for name, value in {"distortion": distortion, **terms}.items()}
        return {"loss": (distortion + penalty).mean(), **means}

    def encode(self, images: Tensor) -> list[Posterior]:
        """images uint8 B C H W to the posterior q(z|x) of each level, coarse to fine.

        For use in eval mode: in training mode, a VQ-VAE normalizes by the batch, and updates its running means.
        Raises ValueError for images of another type or shape.
        """
        parts = [self.bottleneck.posterior(self.features(part)) for part in images.split(self.at_once)]
        if len(parts) == 1:
            return parts[0]
        return [{name: torch.cat([part[name] for part in level]) for name in level[0]} for level in zip(*parts)]

    def sample(self, posteriors: list[Posterior]) -> list[Tensor]:
        """z ~ q(z|x), one latent for each level. Reparametrized (Kingma and Welling 2014): gradients reach mean and std."""
        return [
            mean if "codes" in posterior else torch.addcmul(mean, posterior["std"], torch.randn_like(mean))
            for mean, posterior in zip(self.mean(posteriors), posteriors)
        ]

    def mean(self, posteriors: list[Posterior]) -> list[Tensor]:
        """One latent for each level: the posterior's mean, or its code."""
        return [posterior["codes"] if "codes" in posterior else posterior["mean"] for posterior in posteriors]

    def decode(self, levels: list[Tensor]) -> distributions.Distribution:
        """Latents, one for each level, to p(x|z), a distribution over images in the likelihood's scale."""
        return self.likelihood(self.outputs(levels))

    def outputs(self, levels: list[Tensor]) -> Tensor:
        """Latents to the decoder's outputs, the parameters of p(x|z): B P·C H W, P parameters for each channel of a pixel.

        Raises ValueError for anything but a list with one latent for each level, of its shape.
        """
        shapes = [tuple(shape) for shape, _ in self.latents]
        if [tuple(level.shape[1:]) for level in levels] != shapes:
            raise ValueError(f"latents are a list with one tensor for each level, a batch of the shapes {shapes}")
        return full_precision(self.decoder(self.bottleneck.embed(levels)))

    def render(self, levels: list[Tensor], uniforms: Tensor | None = None) -> Tensor:
        """Latents to uint8 images B C H W: the mean of p(x|z), or a sample from it by inverse CDF. NaN becomes black.

        uniforms: numbers in (0, 1), B C H W, for a sample; None for the mean.
        """
        parts = zip(*(level.split(self.at_once) for level in levels))
        noise = repeat(None) if uniforms is None else uniforms.split(self.at_once)
        return torch.cat([to_uint8(self.values([*part], some)) for part, some in zip(parts, noise)])

    def values(self, levels: list[Tensor], uniforms: Tensor | None = None) -> Tensor:
        """The images of `render` before rounding: B C H W, grey levels in [0, 1] or slightly outside."""
        return self.decode(levels).mean if uniforms is None else self.likelihood.sample(self.outputs(levels), uniforms)


def to_uint8(values: Tensor) -> Tensor:
    """Grey levels from [0, 1] to uint8. NaN becomes black."""
    return (values.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8)
