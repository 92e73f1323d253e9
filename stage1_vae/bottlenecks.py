"""Bottlenecks: from the encoder's features to the latents that the decoder reads.

B batch, F feature maps, C latent channels, K codes, h×w latent grid, L samples of z an image.

    forward(features, progress) -> embedded, penalty, terms
        progress  share of the training that is done, from 0 to 1
        embedded  the decoder's input, L B C h w: L samples of z an image
        penalty   what the bottleneck adds to the loss (β·KL, a commitment loss, …), in nats an image, B
        terms     named values to report, B each or scalar. `rate` is KL(q(z|x) ‖ p(z)) in nats, where p(z) is N(0, I) or
                  uniform over codes. It is left out where encoding is deterministic
    posterior(features)  -> the stored posterior of each level: mean and std, B C h w each, or codes, B h w
    embed(levels)        -> the decoder's input for one latent of each level, B C h w
    latents(grid)        -> shape and vocabulary of each level

Levels are always a list, coarse to fine. The bottlenecks in this file have one level. To add a bottleneck, write its class and
a config with a `build`, and add the config to the union `BottleneckConfig` of autoencoder.py. Its `continuous` is False where
latents are codes: the head of the prior follows.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn

from stage1_vae.statistics import BatchNorm, all_gather_rows, all_reduce_sum, world_size

Posterior = dict[str, Tensor]
Levels = list[tuple[tuple[int, ...], int | None]]


class Bottleneck(Protocol):
    latent_channels: int  # channels of the decoder's input
    has_density: bool  # whether log q(z|x) is finite, which bounds on log p(x) need: not for a single point in R^D

    def __call__(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...

    def posterior(self, features: Tensor) -> list[Posterior]: ...

    def embed(self, levels: list[Tensor]) -> Tensor: ...

    def latents(self, grid: tuple[int, int]) -> Levels: ...

    @property
    def vectors(self) -> Tensor | None: ...  # code vectors of the coarsest level, K D; None for continuous latents


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32 at least, so that mixed precision rounds no density."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Continuous(nn.Module):
    """Base of the bottlenecks with one level of continuous latents."""

    latent_channels: int
    vectors = None

    def embed(self, levels: list[Tensor]) -> Tensor:
        (latent,) = levels
        return latent

    def latents(self, grid: tuple[int, int]) -> Levels:
        return [((self.latent_channels, *grid), None)]


class Codes(nn.Module):
    """Base of the bottlenecks with one level of codes."""

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


def check_features(features: int, channels: int, each: int) -> None:
    """Raises ValueError for fewer features than a projection to `each` numbers a channel needs.

    The projection is linear, so its outputs would lie in a subspace: latents would have fewer dimensions than they say.
    """
    if features < each * channels:
        raise ValueError(
            f"latents of {channels} channels need {each * channels} features at each position, {each} a channel, but the network"
            f" has {features}: set --autoencoder.network.features (for latents on a grid, --autoencoder.network.width) to"
            f" {each * channels} or more, or choose fewer --autoencoder.bottleneck.channels"
        )


@dataclass(frozen=True)
class Deterministic:
    """A plain autoencoder. q(z|x) is a single point, so there is no rate and no ELBO."""

    continuous = True
    channels: Annotated[int, Interval(ge=1, le=65_536)] = 4
    """latent channels at each position of the grid"""

    def build(self, features: int) -> "DeterministicBottleneck":
        """features: F. Raises ValueError where they are fewer than the channels."""
        return DeterministicBottleneck(self, features)


class DeterministicBottleneck(Continuous):
    has_density = False

    def __init__(self, config: Deterministic, features: int):
        """Raises ValueError where the features are fewer than the channels."""
        super().__init__()
        check_features(features, config.channels, each=1)
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

    continuous = True
    channels: Annotated[int, Interval(ge=1, le=65_536)] = 4
    """latent channels at each position of the grid"""
    beta: Annotated[float, Interval(ge=0, le=1_000_000)] = 1.0
    """weight of the rate in the loss; 1 is the ELBO (Higgins et al. 2017)"""
    samples: Annotated[int, Interval(ge=1, le=1000)] = 1
    """samples of z per image; the ELBO averages their log-likelihoods"""

    def build(self, features: int) -> "GaussianBottleneck":
        """features: F. Raises ValueError where they are fewer than twice the channels."""
        return GaussianBottleneck(self, features)


LOG_STDS = -15.0, 2.0


class GaussianBottleneck(Continuous):
    has_density = True

    def __init__(self, config: Gaussian, features: int):
        """Raises ValueError where the features are fewer than the channels' means and standard deviations."""
        super().__init__()
        check_features(features, config.channels, each=2)  # a mean and a standard deviation
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

        log σ is clamped to LOG_STDS, so that one outlier cannot make the loss infinite. Latent diffusion clamps it to (-15, 10)
        (Rombach et al. 2022). Our upper bound is lower: a posterior wider than the prior carries no information, and one as wide
        as e^10 spoils the moments of q(z). The clamp passes gradients, so that log σ can return from beyond the bounds.
        """
        mean, log_std = full_precision(self.project(features)).chunk(2, dim=1)
        return mean, log_std.detach().clamp(*LOG_STDS) + (log_std - log_std.detach())


def gaussian_rate(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(0, I)) in nats an image, B (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).sum(1)


DISTANCES_AT_ONCE = 2**24  # between vectors and codes, 4 bytes each
REVIVAL_ENDS = 0.8  # share of the training after which no code is replaced


@dataclass(frozen=True)
class VectorQuantized:
    """The nearest of K code vectors (VQ-VAE, van den Oord et al. 2017). Moving averages train the codebook."""

    continuous = False
    codes: Annotated[int, Interval(ge=2, le=1_000_000)] = 512
    """K, the size of the codebook; 512 in the paper"""
    channels: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """numbers in a code vector; 64 in the paper"""
    commitment: Annotated[float, Interval(ge=0, le=1_000_000)] = 0.25
    """weight of the commitment loss, a sum over positions and channels; β in the paper's equation 3"""
    rate_weight: Annotated[float, Interval(ge=0, le=1_000_000)] = 0.0
    """λ of entropy-constrained vector quantization (Chou et al. 1989): a code minimizes squared distance + λ · (−log frequency in
    nats), so similar vectors share one; 0 is the nearest code, as in the paper"""
    rate_share: Annotated[float, Interval(ge=0, le=1)] = 0.125
    """share of the training over which rate_weight rises linearly from 0, so that the codebook spreads out first"""
    decay: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    """decay per step of the codebook's moving averages; γ in the paper's appendix A.1"""
    revival: Annotated[float, Interval(ge=0, le=1)] = 0.05
    """a code that is used less than this share of uniform use is replaced by a random encoder output; 0 replaces none. The last
    fifth of the training replaces none either, so that every code in use is a trained one"""

    def build(self, features: int) -> "VectorQuantizedBottleneck":
        """features: F."""
        return VectorQuantizedBottleneck(self, features)


class VectorQuantizedBottleneck(Codes):
    """Nearest code vector, straight-through gradient, codebook by moving averages.

    Own code, because vector-quantize-pytorch took several times as long per step.
    """

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
        self.register_buffer("counts", torch.zeros(config.codes))  # average number of uses of each code in a batch
        self.register_buffer("sums", torch.zeros(config.codes, config.channels))  # average sum of the outputs that chose it
        self.use = CodeUse(config.codes)  # unlike `counts`, revival does not change it
        self.hide_from_compiler()

    def hide_from_compiler(self) -> None:
        """Control flow in these two depends on values, so torch.compile must skip them. A decorator would import it at once."""
        self.initialize_eagerly, self.update_eagerly = map(torch.compiler.disable, (self.initialize, self.update))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: without the two hidden methods, which would change the codebook of this module."""
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_eagerly")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.hide_from_compiler()

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
        """The code with the least squared distance + rate_weight · min(-log frequency, log K); … C to …. Never mixed precision.

        risen: factor on rate_weight, from 0 to 1.
        """
        # ‖v-e‖² = ‖v‖² - 2 v·e + ‖e‖², where ‖v‖² is the same for every code.
        cost = self.codebook.square().sum(1)
        # The rate is at most that of uniform use, log K. Otherwise rare codes would die out.
        frequencies = (self.counts / self.counts.sum().clamp(min=1e-9)).clamp(min=1 / self.vocabulary)
        cost = cost - risen * self.config.rate_weight * frequencies.log()
        parts = vectors.flatten(0, -2).split(max(1, DISTANCES_AT_ONCE // self.vocabulary))
        with torch.autocast(vectors.device.type, enabled=False):
            nearest = [torch.addmm(cost, part, self.codebook.T, alpha=-2).argmin(1) for part in parts]
        return torch.cat(nearest).view(vectors.shape[:-1])

    def initialize(self, vectors: Tensor) -> None:
        """Set the codebook to random vectors of the first batch; vectors N C."""
        if not self.counts.any():
            self.replace(torch.ones_like(self.counts, dtype=torch.bool), vectors)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, revive: bool) -> None:
        """Update the averages and the codebook (van den Oord et al. 2017, equations 6 to 8); vectors N C, codes N.

        revive: whether to replace codes that are hardly used.
        """
        counts = all_reduce_sum(torch.bincount(codes, minlength=self.vocabulary).to(self.counts))
        sums = all_reduce_sum(torch.zeros_like(self.sums).index_add_(0, codes, vectors))
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        chosen_lately = self.counts > 1e-20  # otherwise both averages have decayed to zero, and the code keeps its vector
        self.codebook[chosen_lately] = self.sums[chosen_lately] / self.counts[chosen_lately, None]
        dead = self.counts < self.config.revival * self.even_use(vectors)
        if revive and dead.any():
            self.replace(dead, vectors)

    @torch.no_grad()
    def replace(self, which: Tensor, vectors: Tensor) -> None:
        """Replace codes by random encoder outputs, and set their averages to uniform use; which K, boolean, vectors N C.

        Every process contributes equally many vectors, and all processes get the same codebook.
        """
        number = int(which.sum())
        offered = torch.randint(len(vectors), (-(-number // world_size()),), device=vectors.device)
        self.codebook[which] = all_gather_rows(vectors[offered])[:number]
        self.counts[which] = self.even_use(vectors)
        self.sums[which] = self.codebook[which] * self.counts[which, None]

    def even_use(self, vectors: Tensor) -> float:
        """Uses of each code in a batch when all codes are used equally; vectors: this process's share of the batch, N C."""
        return world_size() * len(vectors) / self.vocabulary

    def posterior(self, features: Tensor) -> list[Posterior]:
        encoded = full_precision(self.project(features))
        return [{"codes": self.choose(encoded.movedim(1, -1))}]


def perplexity(counts: Tensor) -> Tensor:
    """e^entropy of code usage: the number of equally used codes that has the same entropy. counts: K."""
    return torch.special.entr(counts / counts.sum().clamp(min=1e-12)).sum().exp()


class CodeUse(nn.Module):
    """Moving average of code usage."""

    counts: Tensor

    def __init__(self, codes: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(codes))

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes of a batch, of any shape, to the terms that training reports. There are none in eval mode.

        perplexity: of the average usage. usage: share of the codes that are used more than a hundredth of uniform use.
        """
        if not self.training:
            return {}
        now = all_reduce_sum(torch.bincount(codes.flatten(), minlength=len(self.counts)).to(self.counts))
        self.counts += 0.01 * (now - self.counts)  # not lerp_, which torch.compile does not trace with a number
        often = self.counts > 0.01 * self.counts.sum() / len(self.counts)
        return {"perplexity": perplexity(self.counts), "usage": often.to(self.counts.dtype).mean()}


@dataclass(frozen=True)
class FiniteScalar:
    """Each channel rounded to a few levels (FSQ, Mentzer et al. 2023). The codebook is fixed, so it cannot collapse."""

    continuous = False
    levels: tuple[Annotated[int, Interval(ge=2, le=1000)], ...] = (8, 8, 8)
    """number of levels of each channel; their product is the number of codes, here 8·8·8 = 512"""

    def build(self, features: int) -> "FiniteScalarBottleneck":
        """features: F. Raises ValueError for no channel, a channel of fewer than two levels, or too many codes."""
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
        """Levels 0 … L-1 of each channel with a straight-through gradient, and the codes (Mentzer et al. 2023, appendix A.1).

        Where we deviate: 1 + 1e-3 and atanh instead of 1 - 1e-3 and tan, so that a feature of 0 is exactly at level L // 2. With
        two levels, a feature of 0 is at the boundary between them, where the gradient is largest; at the centre of either level
        the gradient would be almost 0.
        """
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(torch.where(self.levels == 2, 0.0, offset / half))
        bounded = torch.tanh(full_precision(self.project(features)) + shift) * half - offset
        level = bounded + (bounded.round() - bounded).detach() + self.levels // 2
        # NaN becomes a valid code here. `level` keeps it, so that the loss of training is NaN.
        return level, (level.detach().nan_to_num().round().long() * self.strides).sum(1)

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        level, codes = self.rounded(features)
        return self.centred(level)[None], level.new_zeros(len(level)), self.use(codes)

    def centred(self, level: Tensor) -> Tensor:
        """Levels 0 … L-1 to numbers from -1 to 1, the decoder's input."""
        return level / (self.levels // 2) - 1

    def posterior(self, features: Tensor) -> list[Posterior]:
        return [{"codes": self.rounded(features)[1]}]

    def embed(self, levels: list[Tensor]) -> Tensor:
        (codes,) = levels
        return self.centred((codes[:, None] // self.strides % self.levels).to(self.project.weight.dtype))


@dataclass(frozen=True)
class GumbelSoftmax:
    """The discrete VAE of DALL-E (Ramesh et al. 2021, section 2.1): one of K codes, relaxed in training.

    Temperature and rate weight change over the training, as in the paper's appendix A.2. Where we deviate: both end at the same
    time, `anneal_share`. In the paper the temperature falls over 150,000 steps, and the weight rises over 5,000.
    """

    continuous = False
    codes: Annotated[int, Interval(ge=2, le=1_000_000)] = 512
    """K, the size of the codebook; 8192 in the paper, for 256×256 images"""
    channels: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """numbers in a code vector"""
    beta: Annotated[float, Interval(ge=0, le=1_000_000)] = 1.0
    """final weight of the rate, KL(q(z|x) ‖ uniform); 1 is the ELBO, 6.6 in the paper"""
    final_temperature: Annotated[float, Interval(gt=0, le=1)] = 0.0625
    """final temperature of the relaxation, which starts at 1; 1/16 in the paper"""
    anneal_share: Annotated[float, Interval(ge=0, le=1)] = 0.75
    """share of the training over which the temperature falls and the rate weight rises, both along a cosine"""

    def build(self, features: int) -> "GumbelSoftmaxBottleneck":
        """features: F."""
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
        """Temperature and rate weight."""
        share = min(1.0, progress / self.config.anneal_share) if self.config.anneal_share else 1.0
        risen = 0.5 * (1 - math.cos(math.pi * share))
        return 1 + risen * (self.config.final_temperature - 1), risen * self.config.beta

    def forward(self, features: Tensor, progress: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = full_precision(self.project(features)).movedim(1, -1)
        temperature, weight = self.schedule(progress) if self.training else (1.0, self.config.beta)
        log_q = logits.log_softmax(-1)
        rate = (log_q.exp() * (log_q + math.log(self.vocabulary))).flatten(1).sum(1)
        # Outside training, exact codes are drawn from q(z|x). With β = 1 the loss is then a bound; that of relaxed codes is not.
        drawn = nn.functional.gumbel_softmax(logits, temperature, hard=not self.training)
        embedded = (drawn @ self.codebook).movedim(-1, 1)
        return embedded[None], weight * rate, {"rate": rate, **self.use(logits.argmax(-1))}

    def posterior(self, features: Tensor) -> list[Posterior]:
        """The likeliest code of q(z|x) at each position, not a draw, as the paper encodes images for its prior."""
        return [{"codes": self.project(features).argmax(1)}]
