"""Bottlenecks: what the encoder's features become on their way to the decoder.

B batch, F feature maps, C latent channels, h×w latent grid, L samples of z an image.

    forward(features, step) -> embedded, penalty, terms
        embedded  L B C h w, what the decoder reads: L samples of z an image
        penalty   B, what the bottleneck adds to the loss, in nats an image (β·KL, a commitment loss, …)
        terms     named values to report, B each or scalar; `rate` is KL(q(z|x) ‖ N(0, I)) where there is one
    posterior(features)  -> what is stored: mean and std, B C h w each
    sample(posterior)    -> latent, B C h w
    mean(posterior)      -> latent, B C h w
    embed(latent)        -> B C h w for the decoder

Adding one is a class, its config with a `build`, and its name in the union at the end of the file.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Posterior = dict[str, Tensor]


class Bottleneck(Protocol):
    latent_channels: int
    vocabulary: int | None
    has_density: bool  # whether q(z|x) has a density, so that there is a rate, an ELBO, a likelihood

    def __call__(self, features: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...

    def posterior(self, features: Tensor) -> Posterior: ...

    def sample(self, posterior: Posterior) -> Tensor: ...

    def mean(self, posterior: Posterior) -> Tensor: ...

    def embed(self, latent: Tensor) -> Tensor: ...


def full_precision(x: Tensor) -> Tensor:
    """float32 at least: under mixed precision a density is never computed from rounded numbers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Deterministic:
    """A plain autoencoder: q(z|x) is a point, so there is no rate and no ELBO."""

    channels: int = 4
    """latent channels at each position of the grid"""

    def build(self, features: int) -> "DeterministicBottleneck":
        return DeterministicBottleneck(self, features)


class DeterministicBottleneck(nn.Module):
    vocabulary = None
    has_density = False

    def __init__(self, config: Deterministic, features: int):
        super().__init__()
        self.latent_channels = config.channels
        self.project = nn.Conv2d(features, config.channels, 1)

    def forward(self, features: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        latent = full_precision(self.project(features))
        return latent[None], latent.new_zeros(len(latent)), {}

    def posterior(self, features: Tensor) -> Posterior:
        mean = full_precision(self.project(features))
        return {"mean": mean, "std": torch.zeros_like(mean)}

    def sample(self, posterior: Posterior) -> Tensor:
        return posterior["mean"]

    def mean(self, posterior: Posterior) -> Tensor:
        return posterior["mean"]

    def embed(self, latent: Tensor) -> Tensor:
        return latent


@dataclass(frozen=True)
class Gaussian:
    """q(z|x) = N(mean, diag(std²)), reparametrized (Kingma and Welling 2014)."""

    channels: int = 4
    """latent channels at each position of the grid"""
    beta: float = 1.0
    """weight of the rate in the loss; 1 is the ELBO (Higgins et al. 2017)"""
    samples: int = 1
    """samples of z for each image in the ELBO; averaged are the log-likelihoods, never the reconstructions"""

    def build(self, features: int) -> "GaussianBottleneck":
        return GaussianBottleneck(self, features)


class GaussianBottleneck(nn.Module):
    vocabulary = None
    has_density = True

    def __init__(self, config: Gaussian, features: int):
        super().__init__()
        if config.samples < 1:
            raise ValueError(f"the ELBO needs at least 1 sample of z for each image, not {config.samples}")
        self.latent_channels = config.channels
        self.beta, self.samples = config.beta, config.samples
        self.project = nn.Conv2d(features, 2 * config.channels, 1)

    def forward(self, features: Tensor, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mean, log_std = full_precision(self.project(features)).chunk(2, dim=1)
        rate = gaussian_rate(mean, log_std)
        noise = torch.randn(self.samples, *mean.shape, dtype=mean.dtype, device=mean.device)
        return mean + log_std.exp() * noise, self.beta * rate, {"rate": rate}

    def posterior(self, features: Tensor) -> Posterior:
        mean, log_std = full_precision(self.project(features)).chunk(2, dim=1)
        return {"mean": mean, "std": log_std.exp()}

    def sample(self, posterior: Posterior) -> Tensor:
        return torch.normal(posterior["mean"], posterior["std"])

    def mean(self, posterior: Posterior) -> Tensor:
        return posterior["mean"]

    def embed(self, latent: Tensor) -> Tensor:
        return latent


def gaussian_rate(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(0, I)) in nats an image, B (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).sum(1)


BottleneckConfig = Deterministic | Gaussian
