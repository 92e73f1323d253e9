"""p(x|z): from the decoder's output to a distribution over images.

B batch, C colour channels, H×W pixels.

Each likelihood says in which scale its log_prob is: `scale(images)` maps uint8 images to the values it is a density of.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, distributions, nn

HALF_GREY_LEVEL = 0.5 / 255


class Likelihood(Protocol):
    outputs_per_channel: int  # decoder feature maps for each colour channel

    def scale(self, images: Tensor) -> Tensor: ...

    def __call__(self, outputs: Tensor) -> distributions.Distribution: ...

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def is_density_of(self, images: Tensor) -> bool: ...


def unit_interval(images: Tensor) -> Tensor:
    """uint8 0 … 255 to float 0 … 1."""
    return images.to(torch.get_default_dtype()) / 255


@dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli pixels. On pixels that are not binary, the cross-entropy is a named pseudo-likelihood."""

    def build(self) -> "BernoulliLikelihood":
        return BernoulliLikelihood()


class BernoulliLikelihood(nn.Module):
    name = "Bernoulli"
    outputs_per_channel = 1

    def scale(self, images: Tensor) -> Tensor:
        """Grey levels as probabilities, [0, 1]; a density only where every pixel is 0 or 255."""
        return unit_interval(images)

    def forward(self, outputs: Tensor) -> distributions.Distribution:
        # validate_args off: grey levels between 0 and 1 are outside the support, on purpose.
        return distributions.Independent(distributions.Bernoulli(logits=outputs, validate_args=False), 3, validate_args=False)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing is estimated."""

    def is_density_of(self, images: Tensor) -> bool:
        return bool(((images == 0) | (images == 255)).all())


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian pixels with one standard deviation."""

    sigma: float | None = None
    """standard deviation in units of the pixel range [0, 1]; None learns it, as state of the model, from half a grey level
    up (the optimal σ is the root mean squared error: Rybkin et al. 2021)"""

    def build(self) -> "GaussianLikelihood":
        return GaussianLikelihood(self.sigma)


class GaussianLikelihood(nn.Module):
    """N(x; mean, σ²) over pixels in [0, 1].

    A learned σ² is a running estimate of the training batches' mean squared error, its maximum-likelihood value, floored
    at half a grey level. It is model state and used as stored: an image's likelihood never depends on its batch-mates.
    """

    name = "Gaussian"
    outputs_per_channel = 1
    mean_squared_error: Tensor
    updates: Tensor

    def __init__(self, sigma: float | None):
        super().__init__()
        if sigma is not None and sigma <= 0:
            raise ValueError(f"sigma is a standard deviation above 0 (or None to learn it), not {sigma}")
        self.learned = sigma is None
        # Before the first batch, a learned σ is that of uniform grey noise.
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

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Move a learned σ² toward this batch's error: a plain average over the first hundred updates, exponential after."""
        if not self.learned:
            return
        error = (outputs - targets).square().mean()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(error)
            error /= torch.distributed.get_world_size()
        self.updates += 1
        self.mean_squared_error.lerp_(error.to(self.mean_squared_error), 1 / self.updates.clamp(max=100))

    def is_density_of(self, images: Tensor) -> bool:
        return True


LikelihoodConfig = Bernoulli | Gaussian
