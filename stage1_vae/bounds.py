"""Bounds on log p(x) = log ∫ p(x|z) p(z) dz, and estimates of it, under any prior.

B batch, L samples of z an image, K latents drawn from a prior.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributions

from stage1_vae.autoencoder import Autoencoder

LogPrior = Callable[[list[Tensor], Tensor | None], Tensor]
"""Latents, one for each level, N …, and what is known of each (a label, a caption) or None, to log p(z), N nats."""

DECODED_AT_ONCE = 128  # latents; the memory of decoding is bounded by them, however many samples there are


@dataclass(frozen=True)
class Draws:
    """Of L draws z ~ q(z|x) of each of B images, in nats, L B each. For codes, q(z|x) is all on one code."""

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
        """log q(z|x) - log p(z), L B: its average over L estimates KL(q(z|x) ‖ p(z))."""
        return self.log_posterior - self.log_prior[prior]


def draws(
    autoencoder: Autoencoder,
    images: Tensor,
    samples: int,
    log_priors: Mapping[str, LogPrior],
    contexts: Tensor | None = None,
    at_once: int | None = None,
) -> Draws:
    """`samples` draws of z for each image, and their densities under q(z|x), under every prior, and of the image.

    images: uint8 B C H W. contexts: B …, what the priors are conditioned on. at_once: latents decoded together;
    as many as memory is meant to hold when None.
    Raises ValueError when q(z|x) has no density (a deterministic bottleneck): there is no bound to compute.
    """
    if not autoencoder.bottleneck.has_density:
        raise ValueError("a deterministic encoder has no density q(z|x), so it has no ELBO and no likelihood")
    posteriors = autoencoder.encode(images)
    at_once = min(DECODED_AT_ONCE, autoencoder.at_once) if at_once is None else at_once
    parts: dict[str, list[Tensor]] = {name: [] for name in ("log_likelihood", "log_posterior", *log_priors)}
    # One row for each pair of a sample and an image, the images fastest.
    for row in torch.arange(samples * len(images), device=images.device).split(at_once):
        image = row % len(images)
        chosen = [{name: tensor[image] for name, tensor in posterior.items()} for posterior in posteriors]
        levels = autoencoder.sample(chosen)
        log_q = torch.zeros(len(row), device=images.device)
        for level, posterior in zip(levels, chosen):
            if "codes" not in posterior:
                q = distributions.Normal(posterior["mean"], posterior["std"], validate_args=False)
                log_q = log_q + q.log_prob(level).flatten(1).sum(1)
        context = None if contexts is None else contexts[image]
        targets = autoencoder.likelihood.scale(images[image])
        parts["log_likelihood"].append(autoencoder.log_likelihood(autoencoder.outputs(levels), targets))
        parts["log_posterior"].append(log_q)
        for name, log_prior in log_priors.items():
            parts[name].append(log_prior(levels, context))
    whole = {name: torch.cat(rows).view(samples, len(images)) for name, rows in parts.items()}
    return Draws(whole.pop("log_likelihood"), whole.pop("log_posterior"), whole)


def elbo(weights: Tensor) -> Tensor:
    """The evidence lower bound from `Draws.log_weights`: the average of the logarithms, B (Kingma and Welling 2014)."""
    return weights.mean(0)


def importance_weighted_bound(weights: Tensor) -> Tensor:
    """The bound of Burda et al. 2016 from `Draws.log_weights`: the logarithm of the average, B. Tight as L grows."""
    return weights.logsumexp(0) - math.log(len(weights))


def grouped(weights: Tensor, samples: int) -> Tensor:
    """L … as ⌊L / samples⌋ disjoint groups of fewer samples, for the bounds above: samples groups …."""
    groups = len(weights) // samples
    return weights[: groups * samples].unflatten(0, (groups, samples)).transpose(0, 1)


def log_likelihoods(autoencoder: Autoencoder, images: Tensor, levels: list[Tensor]) -> Tensor:
    """log p(x|z) of every image under every one of K latents; K B, in nats. images: uint8 B C H W; levels: K … each.

    Where z ~ p(z), `importance_weighted_bound` of it is the naive Monte Carlo estimate log 1/K Σ p(x|z), which on average
    lies below log p(x).
    """
    targets = autoencoder.likelihood.scale(images)
    rows = []
    for row in torch.arange(len(levels[0]), device=images.device).split(DECODED_AT_ONCE):
        distribution = autoencoder.decode([level[row] for level in levels])
        rows.append(torch.stack([distribution.log_prob(target) for target in targets], 1))
    return torch.cat(rows)


def effective_samples(weights: Tensor) -> Tensor:
    """How many of the L draws an average of weights rests on, (Σ w)² / Σ w², B, from 1 to L (Kong 1992)."""
    return (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp()
