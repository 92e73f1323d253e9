"""Bounds and estimates of log p(x) = log ∫ p(x|z) p(z) dz, under any prior.

B batch, L samples of z an image, K latents drawn from a prior.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributions

from stage1_vae.autoencoder import Autoencoder
from stage1_vae.bottlenecks import Posterior

LogPrior = Callable[[list[Tensor], Tensor | None], Tensor]
"""log p(z) in nats, N. Arguments: latents, N … for each level, and contexts N … (labels, captions) or None."""

DECODED_AT_ONCE = 128  # latents, to bound the memory of decoding


@dataclass(frozen=True)
class Draws:
    """Log densities of L draws z ~ q(z|x) for each of B images, in nats, L B each. For codes, q(z|x) has all its mass on one."""

    log_likelihood: Tensor
    """log p(x|z)"""
    log_posterior: Tensor
    """log q(z|x); 0 for codes"""
    log_prior: dict[str, Tensor]
    """log p(z) of the same z, by the prior's name"""

    def log_weights(self, prior: str) -> Tensor:
        """log p(x|z) + log p(z) - log q(z|x), L B."""
        return self.log_likelihood + self.log_prior[prior] - self.log_posterior

    def rate(self, prior: str) -> Tensor:
        """log q(z|x) - log p(z), L B. The average over L estimates KL(q(z|x) ‖ p(z))."""
        return self.log_posterior - self.log_prior[prior]


def draws(
    autoencoder: Autoencoder,
    images: Tensor,
    samples: int,
    log_priors: Mapping[str, LogPrior],
    contexts: Tensor | None = None,
    at_once: int | None = None,
) -> Draws:
    """Draw `samples` latents z ~ q(z|x) for each image, and compute log p(x|z), log q(z|x), and log p(z) under every prior.

    images: uint8 B C H W. contexts: B …, what the priors are conditioned on. at_once: latents decoded together; None chooses a
    number by image size. A learned σ of the likelihood is not updated, whatever the mode.
    Raises ValueError where q(z|x) has no density (a deterministic bottleneck), so that there is no bound.
    """
    if not autoencoder.bottleneck.has_density:
        raise ValueError("a deterministic encoder has no density q(z|x), so it has no ELBO and no likelihood")
    posteriors = autoencoder.encode(images)
    at_once = decoded_at_once(autoencoder) if at_once is None else at_once
    parts: dict[str, list[Tensor]] = {name: [] for name in ("log_likelihood", "log_posterior", *log_priors)}
    # One row for each pair of a sample and an image, the images fastest.
    for row in torch.arange(samples * len(images), device=images.device).split(at_once):
        image = row % len(images)
        chosen = [{name: tensor[image] for name, tensor in posterior.items()} for posterior in posteriors]
        levels = autoencoder.sample(chosen)
        context = None if contexts is None else contexts[image]
        targets = autoencoder.likelihood.scale(images[image])
        parts["log_likelihood"].append(autoencoder.decode(levels).log_prob(targets))
        parts["log_posterior"].append(log_posterior(levels, chosen))
        for name, log_prior in log_priors.items():
            parts[name].append(log_prior(levels, context))
    whole = {name: torch.cat(rows).view(samples, len(images)) for name, rows in parts.items()}
    return Draws(whole.pop("log_likelihood"), whole.pop("log_posterior"), whole)


def decoded_at_once(autoencoder: Autoencoder) -> int:
    """How many latents are decoded together: by image size, but no more than DECODED_AT_ONCE."""
    return min(DECODED_AT_ONCE, autoencoder.at_once)


def log_posterior(levels: list[Tensor], posteriors: list[Posterior]) -> Tensor:
    """log q(z|x) in nats, B: one latent and one posterior for each level. 0 for codes."""
    total = torch.zeros(len(levels[0]), device=levels[0].device)
    for level, posterior in zip(levels, posteriors, strict=True):
        if "codes" not in posterior:
            q = distributions.Normal(posterior["mean"], posterior["std"], validate_args=False)
            total = total + q.log_prob(level).flatten(1).sum(1)
    return total


def elbo(weights: Tensor) -> Tensor:
    """The evidence lower bound, B: the mean over L of `Draws.log_weights` (Kingma and Welling 2014)."""
    return weights.mean(0)


def importance_weighted_bound(weights: Tensor) -> Tensor:
    """The bound of Burda et al. 2016, B: the log of the mean weight, from `Draws.log_weights`. Tight as L grows."""
    return weights.logsumexp(0) - math.log(len(weights))


def grouped(weights: Tensor, samples: int) -> Tensor:
    """Weights L … in ⌊L / samples⌋ disjoint groups, samples groups …: the bounds above then give one value for each group."""
    groups = len(weights) // samples
    return weights[: groups * samples].unflatten(0, (groups, samples)).transpose(0, 1)


def log_likelihoods(autoencoder: Autoencoder, images: Tensor, levels: list[Tensor]) -> Tensor:
    """log p(x|z) of every image given each of K latents, K B, in nats. images: uint8 B C H W; levels: K … each.

    With z ~ p(z), `importance_weighted_bound` of the result is the naive Monte Carlo estimate log 1/K Σ p(x|z). Its expectation
    is below log p(x).
    """
    targets = autoencoder.likelihood.scale(images)
    rows = []
    for row in torch.arange(len(levels[0]), device=images.device).split(decoded_at_once(autoencoder)):
        distribution = autoencoder.decode([level[row] for level in levels])
        rows.append(torch.stack([distribution.log_prob(target) for target in targets], 1))
    return torch.cat(rows)


def effective_samples(weights: Tensor) -> Tensor:
    """Effective sample size of L weighted draws, (Σ w)² / Σ w², B, from 1 to L (Kong 1992)."""
    return (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp()
