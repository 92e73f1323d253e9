"""A second VAE over the latents of the first (Dai and Wipf 2019, "Diagnosing and enhancing VAE models").

B batch, D all numbers of one latent, as many of the second latent u, S draws of u.

    p(z) = ∫ N(u; 0, I) N(z; decoder(u), γ² I) du

Trained by the ELBO of z, with one learned γ. Where its u lies on no manifold within D numbers, N(0, I) fits it: that is the
paper's argument for a second stage. `log_prob` is a bound, the importance-weighted one (Burda et al. 2016).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from stage2_prior.flattened import Flattened, FlattenedConfig
from stage2_prior.heads import floored, gaussian_log_prob
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.prior import Prior
from stage2_prior.sampling import AS_FITTED, Sampling, normals

LATENT_STREAM = 1  # of the noise of u, in samples; that of z given u has stream 0
MAXIMUM_LOG_STD = 10.0  # of q(u|z)
AT_ONCE = 4096  # rows of the networks in `bound`


@dataclass(frozen=True)
class SecondVaeConfig(FlattenedConfig):
    """A second VAE over the flattened latent (Dai and Wipf 2019)."""

    hidden: Annotated[int, Interval(ge=1, le=65_536)] = 512
    """width of the hidden layers"""
    layers: Annotated[int, Interval(ge=1, le=1000)] = 3
    """hidden layers of encoder and decoder"""
    samples: Annotated[int, Interval(ge=1, le=100_000)] = 50
    """draws of u behind the bound on log p(z)"""

    def build(self, specs: list[LatentSpec], classes: int = 0) -> "SecondVAE":
        """Raises ValueError for codes."""
        return SecondVAE(specs, self)


class Network(nn.Module):
    """Hidden layers, and the inputs again at the last one, as in the authors' code: without them, u is not used."""

    def __init__(self, inputs: int, outputs: int, config: SecondVaeConfig):
        super().__init__()
        parts: list[nn.Module] = []
        for width in [inputs] + [config.hidden] * (config.layers - 1):
            parts += [nn.Linear(width, config.hidden), nn.SiLU()]
        self.hidden = nn.Sequential(*parts)
        self.last = nn.Linear(inputs + config.hidden, outputs)

    def forward(self, values: Tensor) -> Tensor:
        return self.last(torch.cat([values, self.hidden(values)], -1))


class SecondVAE(Prior):
    bounded = True

    def __init__(self, specs: list[LatentSpec], config: SecondVaeConfig):
        super().__init__()
        self.flattened = Flattened(specs, "second VAE")
        size = self.flattened.size
        self.samples = config.samples
        self.encoder = Network(size, 2 * size, config)
        self.decoder = Network(size, size, config)
        self.log_gamma = nn.Parameter(torch.zeros(()))

    def estimate(self, dataset: LatentDataset) -> None:
        self.flattened.estimate(dataset)

    def log_weights(self, values: Tensor, noise: Tensor) -> Tensor:
        """log p(u) p(z|u) / q(u|z) of u drawn with this noise, in nats of values; both B D, returns B."""
        with torch.autocast(values.device.type, enabled=False):  # a density is never rounded
            mean, log_std = self.encoder(values).chunk(2, -1)
            log_std = floored(log_std)
            # As stage 1's: one spike makes no infinite loss, and the gradient that leads back passes through.
            log_std = log_std.detach().clamp(max=MAXIMUM_LOG_STD) + (log_std - log_std.detach())
            u, zero = mean + log_std.exp() * noise, torch.zeros((), device=values.device)
            prior, posterior = gaussian_log_prob(u, zero, zero), gaussian_log_prob(u, mean, log_std)
            likelihood = gaussian_log_prob(values, self.decoder(u), floored(self.log_gamma))
            return (prior - posterior + likelihood).sum(1)

    def forward(self, levels: list[Tensor], contexts: Tensor | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        """The ELBO of one draw of u."""
        values = self.flattened.values(levels)
        return {"loss": self.flattened.log_volume() - self.log_weights(values, torch.randn_like(values)).mean()}

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        """The importance-weighted bound: in expectation not above log p(z). Its noise is the same for every z."""
        indices = torch.arange(self.samples, device=self.flattened.scale.device)
        return self.bound(levels, normals(0, indices, (self.flattened.size,)).to(self.flattened.scale))

    def bound(self, levels: list[Tensor], noise: Tensor) -> Tensor:
        """log 1/S Σ p(u) p(z|u) / q(u|z), nats per image in raw latents, B. noise: standard normal, S D."""
        values, draws = self.flattened.values(levels), len(noise)
        parts = []
        for rows in values.split(max(1, AT_ONCE // draws)):
            weights = self.log_weights(rows.repeat_interleave(draws, 0), noise.repeat(len(rows), 1))
            parts.append(weights.view(-1, draws).logsumexp(1) - math.log(draws))
        return torch.cat(parts) - self.flattened.log_volume() if parts else values.sum(1)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        """u ~ N(0, I), then z given u. A temperature scales both variances: it is not p^(1/T)."""
        how.check(codes=False, contexts=False)
        size, spread = self.flattened.size, math.sqrt(how.temperature)
        u = spread * normals(seed, indices, (size,), LATENT_STREAM).to(self.flattened.scale)
        noise = spread * normals(seed, indices, (size,)).to(u)
        return self.flattened.latent(self.decoder(u) + floored(self.log_gamma).exp() * noise)
