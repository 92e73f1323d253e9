"""Bottlenecks: what the encoder's features become on their way to the decoder.

B batch, F feature maps, C latent channels, K codes, h×w latent grid, L samples of z an image.

    forward(features, progress) -> embedded, penalty, terms
        progress  share of the training that is done, from 0 to 1
        embedded  L B C h w, what the decoder reads: L samples of z an image
        penalty   B, what the bottleneck adds to the loss, in nats an image (β·KL, a commitment loss, …)
        terms     named values to report, B each or scalar; `rate` is KL(q(z|x) ‖ p(z)) where q is not a point, in nats: p(z) is
                  N(0, I), or uniform over codes
    posterior(features)  -> what is stored, for each level: mean and std, B C h w each, or codes, B h w
    embed(levels)        -> B C h w for the decoder
    latents(grid)        -> shape and vocabulary of each level

Levels are a list, coarse to fine, always; those in this file have one. Adding one is a class, its config with a `build`, and
its name in the union `BottleneckConfig` of autoencoder.py.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn

from stage1_vae.statistics import BatchNorm, processes, together, total

Posterior = dict[str, Tensor]
Levels = list[tuple[tuple[int, ...], int | None]]


class Bottleneck(Protocol):
    latent_channels: int  # of what the decoder reads
    has_density: bool  # whether log q(z|x) is finite, so that there is a bound on log p(x): not for a point in a continuum

    def __call__(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...

    def posterior(self, features: Tensor) -> list[Posterior]: ...

    def embed(self, levels: list[Tensor]) -> Tensor: ...

    def latents(self, grid: tuple[int, int]) -> Levels: ...

    @property
    def vectors(self) -> Tensor | None: ...  # code vectors of the coarsest level, K D; None for continuous latents


def full_precision(x: Tensor) -> Tensor:
    """float32 at least: under mixed precision a density is never computed from rounded numbers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Continuous(nn.Module):
    """What bottlenecks of one continuous level share."""

    latent_channels: int
    vectors = None

    def embed(self, levels: list[Tensor]) -> Tensor:
        (latent,) = levels
        return latent

    def latents(self, grid: tuple[int, int]) -> Levels:
        return [((self.latent_channels, *grid), None)]


class Codes(nn.Module):
    """What bottlenecks of one level of codes share."""

    vocabulary: int
    codebook: Tensor

    def latents(self, grid: tuple[int, int]) -> Levels:
        return [(grid, self.vocabulary)]

    def embed(self, levels: list[Tensor]) -> Tensor:
        (codes,) = levels
        return self.codebook[codes].movedim(-1, 1)

    @property
    def vectors(self) -> Tensor:
        """The code vectors, K D."""
        return self.embed([torch.arange(self.vocabulary, device=next(self.parameters()).device)[:, None, None]]).flatten(1)


@dataclass(frozen=True)
class Deterministic:
    """A plain autoencoder: q(z|x) is a point, so there is no rate and no ELBO."""

    channels: Annotated[int, Interval(ge=1, le=65_536)] = 4
    """latent channels at each position of the grid"""

    def build(self, features: int) -> "DeterministicBottleneck":
        return DeterministicBottleneck(self, features)


class DeterministicBottleneck(Continuous):
    has_density = False

    def __init__(self, config: Deterministic, features: int):
        super().__init__()
        self.latent_channels = config.channels
        self.project = nn.Conv2d(features, config.channels, 1)

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        latent = full_precision(self.project(features))
        return latent[None], latent.new_zeros(len(latent)), {}

    def posterior(self, features: Tensor) -> list[Posterior]:
        mean = full_precision(self.project(features))
        return [{"mean": mean, "std": torch.zeros_like(mean)}]


@dataclass(frozen=True)
class Gaussian:
    """q(z|x) = N(mean, diag(std²)), reparametrized (Kingma and Welling 2014)."""

    channels: Annotated[int, Interval(ge=1, le=65_536)] = 4
    """latent channels at each position of the grid"""
    beta: Annotated[float, Interval(ge=0, le=1_000_000)] = 1.0
    """weight of the rate in the loss; 1 is the ELBO (Higgins et al. 2017)"""
    samples: Annotated[int, Interval(ge=1, le=1000)] = 1
    """samples of z for each image in the ELBO; averaged are the log-likelihoods, never the reconstructions"""

    def build(self, features: int) -> "GaussianBottleneck":
        return GaussianBottleneck(self, features)


LOG_STDS = -15.0, 2.0


class GaussianBottleneck(Continuous):
    has_density = True

    def __init__(self, config: Gaussian, features: int):
        super().__init__()
        self.latent_channels = config.channels
        self.beta, self.samples = config.beta, config.samples
        self.project = nn.Conv2d(features, 2 * config.channels, 1)

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mean, log_std = self.moments(features)
        rate = gaussian_rate(mean, log_std)
        noise = torch.randn(self.samples, *mean.shape, dtype=mean.dtype, device=mean.device)
        return mean + log_std.exp() * noise, self.beta * rate, {"rate": rate}

    def posterior(self, features: Tensor) -> list[Posterior]:
        mean, log_std = self.moments(features)
        return [{"mean": mean, "std": log_std.exp()}]

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, B C h w each.

        log σ stays between LOG_STDS, so that a spike of one image makes no loss infinite. Latent diffusion has the same lower
        bound (Rombach et al. 2022), but 10 for the upper one. A posterior wider than the prior says nothing, and one as wide as
        e^10 spoils the moments of q(z). The gradient passes the bounds, so that log σ comes back.
        """
        mean, log_std = full_precision(self.project(features)).chunk(2, dim=1)
        return mean, log_std.detach().clamp(*LOG_STDS) + (log_std - log_std.detach())


def gaussian_rate(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(0, I)) in nats an image, B (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).sum(1)


DISTANCES_AT_ONCE = 2**24  # between vectors and codes, 4 bytes each
REVIVAL_ENDS = 0.8  # share of the training


@dataclass(frozen=True)
class VectorQuantized:
    """One of K code vectors (VQ-VAE, van den Oord et al. 2017), the codebook kept by exponential moving averages."""

    codes: Annotated[int, Interval(ge=2, le=1_000_000)] = 512
    """K, the size of the codebook; 512 in the paper"""
    channels: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """numbers in a code vector; 64 in the paper"""
    commitment: Annotated[float, Interval(ge=0, le=1_000_000)] = 0.25
    """weight of the commitment loss, a sum over positions and channels; β in the paper's equation 3"""
    rate_weight: Annotated[float, Interval(ge=0, le=1_000_000)] = 0.0
    """squared distance that a nat of a code's -log frequency is worth where a code is chosen (entropy-constrained vector
    quantization, Chou et al. 1989), so that what looks alike gets one code; 0, the nearest code, is the paper's"""
    rate_share: Annotated[float, Interval(ge=0, le=1)] = 0.125
    """share of the training in which that price rises from 0, so that the codebook spreads out first"""
    decay: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """decay a step of the codebook's moving averages; γ in the paper's appendix A.1"""
    revival: Annotated[float, Interval(ge=0, le=1)] = 0.05
    """a code whose average use falls below this share of an even use is replaced by an encoder output; 0 never does, nor the
    last fifth of the training, so that the codes that are used at its end are used for what they say"""

    def build(self, features: int) -> "VectorQuantizedBottleneck":
        return VectorQuantizedBottleneck(self, features)


class VectorQuantizedBottleneck(Codes):
    """Own code: the library vector-quantize-pytorch took several times as long for the same step."""

    has_density = True
    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, config: VectorQuantized, features: int):
        super().__init__()
        self.config = config
        self.vocabulary, self.latent_channels = config.codes, config.channels
        # The normalization keeps the encoder from shrinking its outputs until all fall to a few codes (Łańcucki et al. 2020).
        self.project = nn.Sequential(nn.Conv2d(features, config.channels, 1, bias=False), BatchNorm(config.channels))
        self.register_buffer("codebook", torch.zeros(config.codes, config.channels))
        self.register_buffer("counts", torch.zeros(config.codes))  # how often each code is chosen in a batch, on average
        self.register_buffer("sums", torch.zeros(config.codes, config.channels))  # of the encoder outputs that chose it
        self.use = CodeUse(config.codes)  # unlike `counts`, not touched by revival
        # Their control flow depends on values, so torch.compile leaves them out. Not by decorators: they import its compiler.
        self.initialize_eagerly, self.update_eagerly = map(torch.compiler.disable, (self.initialize, self.update))

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        encoded = full_precision(self.project(features))
        vectors = rearrange(encoded.detach(), "b c h w -> (b h w) c")
        if self.training:
            self.initialize_eagerly(vectors)
        risen = min(1.0, progress / self.config.rate_share) if self.training and self.config.rate_share else 1.0
        codes = self.choose(vectors, risen)
        quantized = rearrange(self.codebook[codes], "(b h w) c -> b c h w", b=len(encoded), h=encoded.shape[2])
        if self.training:
            self.update_eagerly(vectors, codes, revive=progress < REVIVAL_ENDS)
        commitment = (encoded - quantized).square().flatten(1).sum(1)
        # Straight through: the decoder's gradient passes to the encoder as if there were no quantization.
        embedded = encoded + (quantized - encoded).detach()
        return embedded[None], self.config.commitment * commitment, self.use(codes)

    def choose(self, vectors: Tensor, risen: float = 1.0) -> Tensor:
        """The code of least squared distance plus rate_weight · min(-log frequency, log K), never in mixed precision; … C to ….

        risen: share of the weight that counts.
        """
        # ‖v-e‖² = ‖v‖² - 2 v·e + ‖e‖², of which the first does not matter.
        cost = self.codebook.square().sum(1)
        # A code used less than evenly costs no more than an even one, or what is rare would die out.
        frequencies = (self.counts / self.counts.sum().clamp(min=1e-9)).clamp(min=1 / self.vocabulary)
        cost = cost - risen * self.config.rate_weight * frequencies.log()
        parts = vectors.flatten(0, -2).split(max(1, DISTANCES_AT_ONCE // self.vocabulary))
        with torch.autocast(vectors.device.type, enabled=False):
            nearest = [torch.addmm(cost, part, self.codebook.T, alpha=-2).argmin(1) for part in parts]
        return torch.cat(nearest).view(vectors.shape[:-1])

    def initialize(self, vectors: Tensor) -> None:
        """Take the codebook from the first batch; vectors N C."""
        if not self.counts.any():
            self.replace(torch.ones_like(self.counts, dtype=torch.bool), vectors)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, revive: bool) -> None:
        """Update the averages and the codebook (van den Oord et al. 2017, equations 6 to 8); vectors N C, codes N.

        revive: replace codes that are hardly used.
        """
        counts = total(torch.bincount(codes, minlength=self.vocabulary).to(self.counts))
        sums = total(torch.zeros_like(self.sums).index_add_(0, codes, vectors))
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        chosen_lately = self.counts > 1e-20  # else both averages have decayed to nothing, and the code stays where it was
        self.codebook[chosen_lately] = self.sums[chosen_lately] / self.counts[chosen_lately, None]
        dead = self.counts < self.config.revival * self.even_use(vectors)
        if revive and dead.any():
            self.replace(dead, vectors)

    @torch.no_grad()
    def replace(self, which: Tensor, vectors: Tensor) -> None:
        """Replace codes by random encoder outputs, as if these had had an even use; which K, boolean, vectors N C.

        Every process offers as many of its own, so that the codebook stays the same on all.
        """
        number = int(which.sum())
        offered = torch.randint(len(vectors), (-(-number // processes()),), device=vectors.device)
        self.codebook[which] = together(vectors[offered])[:number]
        self.counts[which] = self.even_use(vectors)
        self.sums[which] = self.codebook[which] * self.counts[which, None]

    def even_use(self, vectors: Tensor) -> float:
        """How often each code is chosen in a batch when all are chosen alike; vectors: a process's share of the batch, N C."""
        return processes() * len(vectors) / self.vocabulary

    def posterior(self, features: Tensor) -> list[Posterior]:
        encoded = full_precision(self.project(features))
        return [{"codes": self.choose(encoded.movedim(1, -1))}]


def perplexity(counts: Tensor) -> Tensor:
    """e^entropy of the usage of codes: the number of evenly used codes with the same entropy. counts: K."""
    return torch.special.entr(counts / counts.sum().clamp(min=1e-12)).sum().exp()


class CodeUse(nn.Module):
    """The moving average of code usage, of which training reports perplexity and usage."""

    counts: Tensor

    def __init__(self, codes: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(codes))

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """codes of a batch, of any shape; returns perplexity, and usage: the share of codes above a hundredth of an even use."""
        if self.training:
            now = total(torch.bincount(codes.flatten(), minlength=len(self.counts)).to(self.counts))
            self.counts += 0.01 * (now - self.counts)  # torch.compile does not trace lerp_ by a number
        often = self.counts > 0.01 * self.counts.sum() / len(self.counts)
        return {"perplexity": perplexity(self.counts), "usage": often.to(self.counts.dtype).mean()}


@dataclass(frozen=True)
class FiniteScalar:
    """Every channel rounded to a few levels (FSQ, Mentzer et al. 2023): a fixed codebook, which cannot collapse."""

    levels: tuple[Annotated[int, Interval(ge=2, le=1000)], ...] = (8, 8, 8)
    """levels of each channel; their product is the number of codes. 8·8·8 = 512"""

    def build(self, features: int) -> "FiniteScalarBottleneck":
        return FiniteScalarBottleneck(self, features)


MOST_CODES = 1_000_000


class FiniteScalarBottleneck(Codes):
    has_density = True
    levels: Tensor
    strides: Tensor

    def __init__(self, config: FiniteScalar, features: int):
        super().__init__()
        if not config.levels or min(config.levels) < 2:
            raise ValueError(f"every channel needs at least 2 levels, not {config.levels}")
        if (codes := math.prod(config.levels)) > MOST_CODES:
            raise ValueError(
                f"the levels {', '.join(map(str, config.levels))} make {codes:,} codes, and at most {MOST_CODES:,} can be"
                " modelled: use fewer levels or channels"
            )
        self.latent_channels, self.vocabulary = len(config.levels), math.prod(config.levels)
        self.project = nn.Conv2d(features, self.latent_channels, 1)
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels[:, None, None], persistent=False)
        self.register_buffer("strides", (levels.cumprod(0) // levels)[:, None, None], persistent=False)
        self.use = CodeUse(self.vocabulary)

    def rounded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Levels 0 … L-1 of every channel, straight through, and the codes (Mentzer et al. 2023, appendix A.1, but with 1 + 1e-3
        and atanh, which put a feature of 0 exactly on level L // 2, where the authors have 1 - 1e-3 and tan).

        With two levels there is no such level between others: a feature of 0 lies on the edge between both, where the gradient is
        largest. In the middle of one of them it would be next to nothing.
        """
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(torch.where(self.levels == 2, 0.0, offset / half))
        bounded = torch.tanh(full_precision(self.project(features)) + shift) * half - offset
        level = bounded + (bounded.round() - bounded).detach() + self.levels // 2
        # What is not a number is no integer, but has a code, so that training meets it as a loss.
        return level, (level.detach().nan_to_num().round().long() * self.strides).sum(1)

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        level, codes = self.rounded(features)
        return self.centred(level)[None], level.new_zeros(len(level)), self.use(codes)

    def centred(self, level: Tensor) -> Tensor:
        """Levels to numbers around 0 in [-1, 1], for the decoder."""
        return level / (self.levels // 2) - 1

    def posterior(self, features: Tensor) -> list[Posterior]:
        return [{"codes": self.rounded(features)[1]}]

    def embed(self, levels: list[Tensor]) -> Tensor:
        (codes,) = levels
        return self.centred((codes[:, None] // self.strides % self.levels).to(self.project.weight.dtype))


@dataclass(frozen=True)
class GumbelSoftmax:
    """The discrete VAE of DALL-E (Ramesh et al. 2021, section 2.1): one of K codes, relaxed in training.

    Temperature and weight of the rate are functions of the progress of training, as in the paper's appendix A.2. Where we
    deviate: `anneal_share` is that of both; in the paper the temperature falls in 150,000 steps and the weight rises in 5,000.
    """

    codes: Annotated[int, Interval(ge=2, le=1_000_000)] = 512
    """K, the size of the codebook; 8192 in the paper, for 256×256 images"""
    channels: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """numbers in a code vector"""
    beta: Annotated[float, Interval(ge=0, le=1_000_000)] = 1.0
    """final weight of the rate, KL(q(z|x) ‖ uniform); 1 is the ELBO, 6.6 in the paper"""
    final_temperature: Annotated[float, Interval(gt=0, le=1)] = 0.0625
    """of the relaxation, which starts at 1; 1/16 in the paper"""
    anneal_share: Annotated[float, Interval(ge=0, le=1)] = 0.75
    """share of the training in which the temperature falls along a cosine and the weight of the rate rises likewise"""

    def build(self, features: int) -> "GumbelSoftmaxBottleneck":
        return GumbelSoftmaxBottleneck(self, features)


class GumbelSoftmaxBottleneck(Codes):
    has_density = True

    def __init__(self, config: GumbelSoftmax, features: int):
        super().__init__()
        self.config = config
        self.vocabulary, self.latent_channels = config.codes, config.channels
        self.project = nn.Conv2d(features, config.codes, 1)
        self.codebook = nn.Parameter(torch.randn(config.codes, config.channels))
        self.use = CodeUse(config.codes)

    def schedule(self, progress: float) -> tuple[float, float]:
        """Temperature and weight of the rate."""
        share = min(1.0, progress / self.config.anneal_share) if self.config.anneal_share else 1.0
        risen = 0.5 * (1 - math.cos(math.pi * share))
        return 1 + risen * (self.config.final_temperature - 1), risen * self.config.beta

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = full_precision(self.project(features)).movedim(1, -1)
        temperature, weight = self.schedule(progress) if self.training else (1.0, self.config.beta)
        log_q = logits.log_softmax(-1)
        rate = (log_q.exp() * (log_q + math.log(self.vocabulary))).flatten(1).sum(1)
        # Held out, whole codes drawn from q: with β = 1 the loss is then a bound, which the relaxation's is not.
        drawn = nn.functional.gumbel_softmax(logits, temperature, hard=not self.training)
        embedded = (drawn @ self.codebook).movedim(-1, 1)
        return embedded[None], weight * rate, {"rate": rate, **self.use(logits.argmax(-1))}

    def posterior(self, features: Tensor) -> list[Posterior]:
        return [{"codes": self.project(features).argmax(1)}]
