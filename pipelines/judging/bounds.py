"""Bounds on log p(x) of held-out images, as data: what `likelihood` returns, and JSON holds."""

from dataclasses import dataclass
from typing import Literal

from stage1_vae.likelihoods import Measure


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over images, in nats an image."""

    nats: float
    error: float | None
    """its standard error; None of a single image"""
    bits_per_dimension: float | None = None
    """of a bound on -log p(x); None where pixels have no probability"""


@dataclass(frozen=True, kw_only=True)
class Bound(Estimate):
    """An upper bound on -log p(x)."""

    below_standard: Estimate | None = None
    """how far it lies below that of the standard prior on the same draws; None of that prior itself, or without it"""


@dataclass(frozen=True, kw_only=True)
class Naive(Estimate):
    """Minus the logarithm of the average of p(x|z) over draws of z from the prior.

    The draws are the same for all images, so the standard error over images is too small.
    """

    effective_samples: float
    """near 1, a single draw dominates the average"""


@dataclass(frozen=True, kw_only=True)
class BoundsOfPrior:
    """What one prior makes of the images."""

    rate: Estimate
    """E_q[log q(z|x) - log p(z)]"""
    negative_elbo: Bound
    importance_weighted: Bound
    """of all draws of z together (Burda et al. 2016)"""
    by_samples: dict[str, float]
    """by the number of draws, the importance-weighted bound in nats"""
    effective_samples: float
    """median over images"""
    naive: Naive | None = None
    """None of a conditional prior, and where none was asked for"""


@dataclass(frozen=True, kw_only=True)
class LatentNumbers:
    """What the encoder's continuous latents hold."""

    images: int
    dimensions: int
    active_units: int
    mutual_information: Estimate
    """the empirical I(x; z), at most `log_n`"""
    log_n: float


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The bounds of every prior, from the same images and draws."""

    images: int
    images_of: str
    samples: int
    """draws of z for each image"""
    naive_samples: int
    """draws from each prior for the naive estimate"""
    seed: int
    likelihood: str
    """p(x|z)"""
    measure: Measure
    """what p(x) is of the images as they are stored"""
    dimensions: int | None
    """numbers in an image, where they have a probability"""
    conditioned_on: Literal["label", "caption"] | None
    """what the learned prior is conditioned on"""
    distortion: Estimate
    """-E_q[log p(x|z)]"""
    priors: dict[str, BoundsOfPrior]
    codes: int | None = None
    """levels of codes; None of continuous latents"""
    latents: LatentNumbers | None = None
    """None of codes"""
