"""A second VAE over the latents of the first (Dai and Wipf 2019, "Diagnosing and enhancing VAE models").

B batch, D numbers of one latent, and of the second latent u, S draws of u.

    p(z) = ∫ N(u; 0, I) N(z; decoder(u), γ² I) du

The posterior noise makes z fill all its D dimensions. So the aggregate posterior q(u) of a second VAE with as many latents can
match N(0, I): the paper's argument for a second stage. Training maximizes the ELBO of z, with one learned γ. `log_prob` is the
importance-weighted bound (Burda et al. 2016). With labels, encoder and decoder also see an embedding of the label.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from stage2_prior.flattened import LABEL_WIDTH, FlattenedConfig, FlattenedPrior
from stage2_prior.heads import floored, gaussian_log_prob
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import AS_FITTED, Sampling, normals

LATENT_STREAM = 1  # of the noise of u in `sample`; the noise of z given u is stream 0
MAXIMUM_LOG_STD = 10.0  # of q(u|z)
AT_ONCE = 4096  # rows that `bound` passes through the networks together


@dataclass(frozen=True)
class SecondVaeConfig(FlattenedConfig):
    """A second VAE over the flattened latent (Dai and Wipf 2019)."""

    hidden: Annotated[int, Interval(ge=1, le=65_536)] = 512
    """width of the hidden layers"""
    layers: Annotated[int, Interval(ge=1, le=1000)] = 3
    """hidden layers of the encoder and of the decoder"""
    samples: Annotated[int, Interval(ge=1, le=100_000)] = 50
    """draws of u for the bound on log p(z)"""

    def build(self, specs: list[LatentSpec], classes: int = 0) -> "SecondVAE":
        """classes: number of labels, 0 for none. Raises ValueError where parts do not fit."""
        return SecondVAE(specs, self, classes)


class Network(nn.Module):
    """Hidden layers, then a linear layer that also sees the inputs, as in the authors' code. Without them, u is not used."""

    def __init__(self, inputs: int, outputs: int, config: SecondVaeConfig):
        super().__init__()
        parts: list[nn.Module] = []
        for width in [inputs] + [config.hidden] * (config.layers - 1):
            parts += [nn.Linear(width, config.hidden), nn.SiLU()]
        self.hidden = nn.Sequential(*parts)
        self.last = nn.Linear(inputs + config.hidden, outputs)

    def forward(self, values: Tensor) -> Tensor:
        return self.last(torch.cat([values, self.hidden(values)], -1))


class SecondVAE(FlattenedPrior):
    """The second VAE on standardized values."""

    bounded = True

    def __init__(self, specs: list[LatentSpec], config: SecondVaeConfig, classes: int = 0):
        super().__init__(specs, "second VAE", config, classes)
        size, label_width = self.flattened.size, 0 if self.condition is None else LABEL_WIDTH
        self.samples = config.samples
        self.encoder = Network(size + label_width, 2 * size, config)
        self.decoder = Network(size + label_width, size, config)
        self.log_gamma = nn.Parameter(torch.zeros(()))

    def decoded(self, u: Tensor, label: Tensor | None) -> Tensor:
        """The mean of p(z|u), B D. label: embedded, B E."""
        return self.decoder(u if label is None else torch.cat([u, label], 1))

    def log_weights(self, values: Tensor, noise: Tensor, label: Tensor | None) -> Tensor:
        """log p(u) p(z|u) / q(u|z) in nats of values, B, at the u ~ q(u|z) that the noise gives.

        values and noise: B D. label: embedded, B E.
        """
        with torch.autocast(values.device.type, enabled=False):  # mixed precision must not round a density
            seen = values if label is None else torch.cat([values, label], 1)
            mean, log_std = self.encoder(seen).chunk(2, -1)
            log_std = floored(log_std)
            # Clamped as in stage 1: an outlier cannot make the loss infinite, and the gradient passes the clamp.
            log_std = log_std.detach().clamp(max=MAXIMUM_LOG_STD) + (log_std - log_std.detach())
            u, zero = mean + log_std.exp() * noise, torch.zeros((), device=values.device)
            prior, posterior = gaussian_log_prob(u, zero, zero), gaussian_log_prob(u, mean, log_std)
            likelihood = gaussian_log_prob(values, self.decoded(u, label), floored(self.log_gamma))
            return (prior - posterior + likelihood).sum(1)

    def forward(self, levels: list[Tensor], contexts: Tensor | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        """The negative ELBO, with one draw of u."""
        values, label = self.flattened.values(levels), self.embedded(self.with_dropout(contexts))
        return {"loss": self.flattened.log_volume() - self.log_weights(values, torch.randn_like(values), label).mean()}

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        """The importance-weighted bound, whose expectation is at most log p(z). Every z gets the same noise."""
        indices = torch.arange(self.samples, device=self.flattened.scale.device)
        return self.bound(levels, normals(0, indices, (self.flattened.size,)).to(self.flattened.scale), contexts)

    def bound(self, levels: list[Tensor], noise: Tensor, contexts: Tensor | None = None) -> Tensor:
        """log 1/S Σ p(u) p(z|u) / q(u|z), nats per image in raw latents, B. noise: standard normal, S D."""
        values, label, draws = self.flattened.values(levels), self.embedded(contexts), len(noise)
        parts = []
        for numbers in torch.arange(len(values), device=values.device).split(max(1, AT_ONCE // draws)):
            rows = numbers.repeat_interleave(draws)
            weights = self.log_weights(values[rows], noise.repeat(len(numbers), 1), None if label is None else label[rows])
            parts.append(weights.view(-1, draws).logsumexp(1) - math.log(draws))
        return torch.cat(parts) - self.flattened.log_volume()

    @torch.no_grad()
    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        """u ~ N(0, I), then z given u. The temperature scales both variances; the density is not p^(1/T)."""
        label = self.embedded(self.contexts_to_sample(indices, seed, how, contexts))
        size, spread = self.flattened.size, math.sqrt(how.temperature)
        u = spread * normals(seed, indices, (size,), LATENT_STREAM).to(self.flattened.scale)
        noise = spread * normals(seed, indices, (size,)).to(u)
        return self.flattened.latent(self.decoded(u, label) + floored(self.log_gamma).exp() * noise)
