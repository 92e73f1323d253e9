"""p(x|z): from the decoder's output to a distribution over images.

B batch, C colour channels, H×W pixels.

    likelihood(outputs)         -> p(x|z), a distribution over scaled images; its log_prob broadcasts over images and outputs
    scale(images)               -> uint8 images in the scale of that distribution
    measure(images)             -> whether exp(log_prob) of these images is a probability, a density or neither
    sample(outputs, uniforms)   -> scaled images by inverse CDF, from a uniform number in (0, 1) for each value, B C H W;
                                   NaN outputs give NaN
    update(outputs, targets)    -> in training, after log_prob: re-estimates parameters that have no gradient
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from stage1_vae.statistics import all_reduce_sum, world_size

HALF_GREY_LEVEL = 0.5 / 255

Measure = Literal["probability", "density", "pseudo-likelihood"]
"""What exp(log_prob) is: a probability of the stored 8-bit images; a density over real-valued pixels, which can exceed 1 and is
comparable only in the same scale; or neither. Bits per dimension are defined for a probability only."""


class Likelihood(Protocol):
    name: str  # for use in sentences
    outputs_per_channel: int  # decoder outputs for each colour channel

    def scale(self, images: Tensor) -> Tensor: ...

    def __call__(self, outputs: Tensor) -> distributions.Distribution: ...

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor: ...

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def measure(self, images: Tensor) -> Measure: ...


def unit_interval(images: Tensor) -> Tensor:
    """uint8 0 … 255 to float 0 … 1. Raises ValueError for another type, which would have another scale."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are uint8 tensors of grey levels 0 … 255, not {images.dtype}")
    return images.to(torch.get_default_dtype()) / 255


@dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli pixels. For pixels that are not binary, log_prob is the cross-entropy, a pseudo-likelihood."""

    def build(self) -> "BernoulliLikelihood":
        return BernoulliLikelihood()


class BernoulliLikelihood(nn.Module):
    name = "Bernoulli"
    outputs_per_channel = 1

    def scale(self, images: Tensor) -> Tensor:
        """Grey levels in [0, 1]; log_prob is a probability only where every pixel is 0 or 255."""
        return unit_interval(images)

    def forward(self, outputs: Tensor) -> distributions.Distribution:
        # Without validation, which would refuse grey levels between 0 and 1: see Bernoulli.
        return distributions.Independent(distributions.Bernoulli(logits=outputs, validate_args=False), 3, validate_args=False)

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        return is_above(uniforms, torch.sigmoid(-outputs))

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing is estimated."""

    def measure(self, images: Tensor) -> Measure:
        return "probability" if ((images == 0) | (images == 255)).all() else "pseudo-likelihood"


OUTLIER = 100.0  # the largest error of a held-out image, a digit or a photograph, is some four times the mean


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian pixels with one standard deviation."""

    sigma: Annotated[float, Interval(ge=1e-4, le=100)] | None = None
    """standard deviation in units of the pixel range [0, 1]; None estimates it in training: the root mean squared error, which is
    optimal (Rybkin et al. 2021), but at least half a grey level"""

    def build(self) -> "GaussianLikelihood":
        return GaussianLikelihood(self.sigma)


class GaussianLikelihood(nn.Module):
    """N(x; mean, σ²) over pixels in [0, 1].

    A learned σ² is a running average of the mean squared error of training batches, the maximum-likelihood value. σ is at least
    half a grey level. It is stored with the weights, and log_prob uses the stored value, so that the likelihood of an image does
    not depend on the other images of its batch.
    """

    name = "Gaussian"
    outputs_per_channel = 1
    mean_squared_error: Tensor
    updates: Tensor

    def __init__(self, sigma: float | None):
        super().__init__()
        self.learned = sigma is None
        # Before the first batch, a learned σ² is the variance of uniform noise on [0, 1].
        self.register_buffer("mean_squared_error", torch.tensor(1 / 12 if sigma is None else sigma**2))
        self.register_buffer("updates", torch.tensor(0))

    @property
    def sigma(self) -> Tensor:
        return self.mean_squared_error.sqrt().clamp(min=HALF_GREY_LEVEL) if self.learned else self.mean_squared_error.sqrt()

    def scale(self, images: Tensor) -> Tensor:
        """Grey levels in [0, 1]; log_prob is a density in this scale."""
        return unit_interval(images)

    def forward(self, outputs: Tensor) -> distributions.Distribution:
        return distributions.Independent(distributions.Normal(outputs, self.sigma.to(outputs), validate_args=False), 3)

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        if outputs.device.type == "mps":  # MPS has no ndtri
            uniforms = uniforms.cpu()
        return outputs + self.sigma.to(outputs) * torch.special.ndtri(uniforms.to(outputs.dtype)).to(outputs)

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Update a learned σ² by this batch's error: a plain average over the first hundred updates, an exponential one after.

        The error of an image is clamped to OUTLIER times σ². Otherwise a single image with an absurd latent would change σ, and
        with it every loss, for hundreds of steps.
        """
        if not self.learned:
            return
        errors = (outputs - targets).square().flatten(1).mean(1).clamp(max=OUTLIER * self.sigma.square())
        error = all_reduce_sum(errors.mean()) / world_size()
        self.updates += 1
        self.mean_squared_error.lerp_(error.to(self.mean_squared_error), 1 / self.updates.clamp(max=100))

    def measure(self, images: Tensor) -> Measure:
        return "density"


@dataclass(frozen=True)
class DiscretizedLogistic:
    """A mixture of logistics for each value, integrated over each of the 256 grey levels (PixelCNN++, Salimans et al. 2017)."""

    components: Annotated[int, Interval(ge=1, le=1000)] = 10
    """logistics in the mixture of one channel of a pixel; 10 in the paper"""

    def build(self) -> "DiscretizedLogisticLikelihood":
        return DiscretizedLogisticLikelihood(self.components)


class DiscretizedLogisticLikelihood(nn.Module):
    """A probability of 8-bit images. Where we deviate from PixelCNN++: given z, colour channels are independent.

    The decoder outputs means and log-scales in the paper's units, where grey levels go from -1 to 1.
    """

    name = "discretized logistic"
    # The lower bound is the paper's. At the upper one, a logistic is hundreds of times as wide as the range of grey levels.
    # Beyond it, the mean in float32 is mostly rounding error, and at last gradients are NaN.
    LOG_SCALES = -7.0, 7.0

    def __init__(self, components: int):
        super().__init__()
        self.outputs_per_channel = 3 * components

    def scale(self, images: Tensor) -> Tensor:
        """Grey levels in [0, 1]; log_prob is a probability of the 256 levels."""
        return unit_interval(images)

    def forward(self, outputs: Tensor) -> distributions.Distribution:
        return distributions.Independent(self.pixels(outputs), 3, validate_args=False)

    def pixels(self, outputs: Tensor) -> distributions.MixtureSameFamily:
        logits, means, log_scales = rearrange(outputs, "b (p c k) h w -> p b c h w k", p=3, k=self.outputs_per_channel // 3)
        logistics = Discretized((means + 1) / 2, log_scales.clamp(*self.LOG_SCALES).exp() / 2)
        shares = distributions.Categorical(logits=logits, validate_args=False)
        return distributions.MixtureSameFamily(shares, logistics, validate_args=False)

    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """The lowest grey level whose CDF reaches the uniform number, by bisection."""
        pixels, level = self.pixels(outputs), torch.zeros_like(uniforms)
        for half in (128, 64, 32, 16, 8, 4, 2, 1):
            level = level + half * is_above(uniforms, pixels.cdf((level + half - 1) / 255))
        return level / 255

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing is estimated."""

    def measure(self, images: Tensor) -> Measure:
        return "probability"


class Discretized(distributions.Distribution):
    """A logistic rounded to the grey levels 0, 1/255, … 1. The tails beyond [0, 1] belong to the outermost two levels."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, loc: Tensor, scale: Tensor):
        """loc and scale in units of the pixel range [0, 1]."""
        self.loc, self.spread = loc, scale
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p, as σ(b) - σ(a) = σ(b) σ(-a) (1 - e^(a-b)): no digits cancel, however narrow or distant the logistic is."""
        upper = (value + HALF_GREY_LEVEL - self.loc) / self.spread
        lower = (value - HALF_GREY_LEVEL - self.loc) / self.spread
        first, last = value < HALF_GREY_LEVEL, value > 1 - HALF_GREY_LEVEL
        inside = torch.log(-torch.expm1(-2 * HALF_GREY_LEVEL / self.spread))
        return (
            torch.where(last, 0.0, F.logsigmoid(upper))
            + torch.where(first, 0.0, F.logsigmoid(-lower))
            + torch.where(first | last, 0.0, inside)
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples drawn from torch's random state. The likelihood's `sample` takes the random numbers as an argument."""
        values = self.loc + self.spread * torch.rand(*sample_shape, *self.loc.shape).to(self.loc).logit()
        return (255 * values.clamp(0, 1)).round() / 255

    @property
    def mean(self) -> Tensor:
        """The mean of the logistic clipped to [0, 1], which differs from that over grey levels by less than half a level."""
        return self.spread * (F.softplus(self.loc / self.spread) - F.softplus((self.loc - 1) / self.spread))

    def cdf(self, value: Tensor) -> Tensor:
        """The probability of a grey level and all below it."""
        return torch.where(value > 1 - HALF_GREY_LEVEL, 1.0, torch.sigmoid((value + HALF_GREY_LEVEL - self.loc) / self.spread))


def is_above(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first is above the second, else 0; both in [0, 1]. NaN stays NaN."""
    return (first - second).ceil().clamp(min=0)


LikelihoodConfig = Bernoulli | Gaussian | DiscretizedLogistic
