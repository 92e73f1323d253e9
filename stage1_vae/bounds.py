"""Bounds on log p(x) = log ∫ p(x|z) p(z) dz, under any prior.

B batch, L samples of z an image.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, distributions

from stage1_vae.autoencoder import Autoencoder


def log_weights(autoencoder: Autoencoder, images: Tensor, samples: int, log_prior: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """log p(x|z) + log p(z) - log q(z|x) for `samples` draws of z ~ q(z|x) an image; L B, in nats.

    log_prior: latents, one for each level, to log p(z), B nats.
    Raises ValueError when q(z|x) has no density (a deterministic bottleneck): there is no bound to compute.
    """
    if not autoencoder.bottleneck.has_density:
        raise ValueError("a deterministic encoder has no density q(z|x), so it has no ELBO and no likelihood")
    posteriors = autoencoder.encode(images)
    targets = autoencoder.likelihood.scale(images)
    rows = []
    for _ in range(samples):
        levels = autoencoder.sample(posteriors)
        log_q = torch.zeros(len(images), device=images.device, dtype=targets.dtype)
        for level, posterior in zip(levels, posteriors):
            if "codes" in posterior:
                continue  # q(z|x) is all on one code: log p(x|z) + log p(z) is a bound by itself
            log_q = log_q + distributions.Normal(posterior["mean"], posterior["std"]).log_prob(level).flatten(1).sum(1)
        rows.append(autoencoder.decode(levels).log_prob(targets) + log_prior(levels) - log_q)
    return torch.stack(rows)


def elbo(weights: Tensor) -> Tensor:
    """The evidence lower bound from `log_weights`: the average of the logarithms, B (Kingma and Welling 2014)."""
    return weights.mean(0)


def importance_weighted_bound(weights: Tensor) -> Tensor:
    """The bound of Burda et al. 2016 from `log_weights`: the logarithm of the average, B. Tight as L grows."""
    return weights.logsumexp(0) - math.log(len(weights))
