"""Draws from a prior given part of the latent: z ~ p(z_free | z_held).

B batch, M particles, N positions, h×w latent grid.

Where every held position comes before every free one, and the context is given, an autoregressive prior draws the rest exactly.
Elsewhere it cannot look ahead, so M particles are drawn row by row and weighted by the density of what is held, given what they
have drawn so far (sequential importance resampling, Gordon et al. 1993): exact as M grows. A context that is not given is drawn
with each particle, so it is weighted with it: a label under which what is held is unlikely dies out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.sampling import AS_FITTED, CHOICE_STREAM, choose_many, first_uniforms

FEWEST = 0.5  # of the particles: an effective number below this share resamples them


@torch.no_grad()
def complete(
    prior: LearnedPrior,
    given: list[Tensor],
    held: list[Tensor],
    indices: Tensor,
    seed: int,
    particles: int = 16,
    contexts: Tensor | None = None,
    log_likelihood: Callable[[list[Tensor]], Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Levels whose held positions are as given, and the effective sample size of each, B, from 1 to the number of particles.

    given: one latent a level, without a batch axis; held: h w a level, True is held; indices: B sample numbers.
    contexts: one for each sample; when None, one for each particle, as frequent as in the training set.
    log_likelihood: what else is known of the whole latent, such as log p(of the pixels that are seen | z): levels to nats, B·M.
    """
    # Particle m of sample i is sample number i·M + m under the seed, so a completion too is the same in any batch.
    numbers = (indices[:, None] * particles + torch.arange(particles, device=indices.device)).flatten()
    told = prior.draw_contexts(numbers, seed) if contexts is None else contexts.repeat_interleave(particles, 0)
    levels: list[Tensor] = []
    logs = torch.zeros(len(indices), particles, dtype=torch.float64, device=indices.device)
    smallest = torch.full((len(indices),), float(particles), dtype=torch.float64, device=indices.device)
    for level, (own, latent, mask) in enumerate(zip(prior.levels, given, held, strict=True)):
        latent = latent.expand(len(numbers), *latent.shape)
        drawn, height = latent, mask.shape[0]
        last_held = int(mask.any(1).nonzero().max()) if mask.any() else -1
        for row in range(height):
            # From a row on without anything held further down, the rest is drawn at once.
            until = height if row > last_held else row + 1
            if mask[row:until].all():
                done = drawn
            else:
                fixed = mask.clone()
                fixed[:row] = True
                (done,) = own.sample(numbers, seed, AS_FITTED, told, [drawn], [fixed], coarser=levels)
            drawn = torch.cat([done[..., :until, :], latent[..., until:, :]], -2)
            seen = mask.clone()
            seen[:row], seen[until:] = False, False
            if seen.any():
                weights = own.log_prob_by_position([*levels, drawn], told)[:, seen].sum(1)
                logs += weights.view(len(indices), particles).double()
                size = effective(logs)
                smallest = torch.minimum(smallest, size)
                poor = size < FEWEST * particles
                if poor.any() and particles > 1:
                    ancestors = resampled(logs, poor, indices, seed, level * 10_000 + row)
                    drawn, levels = drawn[ancestors], [coarse[ancestors] for coarse in levels]
                    told = None if told is None else told[ancestors]
                    logs[poor] = 0.0
            if until == height:
                break
        levels.append(drawn)
    if log_likelihood is not None:
        logs += log_likelihood(levels).view(len(indices), particles).double()
        smallest = torch.minimum(smallest, effective(logs))
    uniform = first_uniforms(seed, indices, CHOICE_STREAM)[:, None]
    chosen = choose_many(logs, uniform.to(logs.dtype)).squeeze(1) + particles * torch.arange(len(indices), device=indices.device)
    return [level[chosen] for level in levels], smallest


def effective(logs: Tensor) -> Tensor:
    """The effective sample size of log weights, B M: how many equally weighted particles they are worth (Kong 1992); B."""
    return logs.softmax(1).square().sum(1).reciprocal()


def resampled(logs: Tensor, which: Tensor, indices: Tensor, seed: int, counter: int) -> Tensor:
    """Ancestors of the particles of those samples, by systematic resampling; of the others, themselves. B·M row numbers."""
    batch, particles = logs.shape
    start = first_uniforms(seed, indices + (counter << 32), CHOICE_STREAM + 1)[:, None].to(logs.dtype)
    places = (start + torch.arange(particles, device=logs.device)) / particles
    own = torch.arange(particles, device=logs.device).expand(batch, -1)
    ancestors = torch.where(which[:, None], choose_many(logs, places.contiguous()), own)
    return (ancestors + particles * torch.arange(batch, device=logs.device)[:, None]).flatten()
