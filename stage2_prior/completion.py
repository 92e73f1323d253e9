"""Draws from a prior given part of the latent: z ~ p(z_free | z_held).

B batch, M particles, P positions, C channels, h×w latent grid.

Where every held position comes before every free one, and the context is given, an autoregressive prior draws the rest exactly.
Elsewhere it cannot look ahead, so M particles are drawn and weighted by the density of what is held, given what they have drawn
so far (sequential importance resampling, Gordon et al. 1993): exact as M grows. A context that is not given is drawn with each
particle, so it is weighted with it: a label under which what is held is unlikely dies out.

All particles of a level are drawn in one pass of the cached steps, whatever is held.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.heads import Head
from stage2_prior.layers import Backbone
from stage2_prior.sampling import AS_FITTED, CHOICE_STREAM, CannotSample, choose_many, first_uniforms, uniforms

FEWEST = 0.5  # of the particles: an effective number below this share resamples them


@torch.no_grad()
def complete(
    prior: LearnedPrior,
    given: list[Tensor],
    held: list[Tensor],
    indices: Tensor,
    seed: int,
    *,
    particles: int = 16,
    contexts: Tensor | None = None,
    log_likelihood: Callable[[list[Tensor]], Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Levels, B … each, whose held positions are as given, and the effective sample size of each, B, from 1 to M.

    given: one latent a level, without a batch axis. held: h w a level, True is held. indices: B sample numbers. particles: M.
    contexts: one for each sample; when None, one for each particle, as frequent as in the training set.
    log_likelihood: of the levels of every particle, log p(y|z) of what else is observed, such as pixels, in nats, B·M.
    Raises CannotSample where a latent or a mask does not fit.
    """
    for own, latent, mask in zip(prior.levels, given, held, strict=True):
        if latent.shape != own.spec.shape or mask.shape != own.spec.grid or mask.dtype != torch.bool:
            raise CannotSample(f"a level needs a latent and a boolean mask of {own.spec.shape} and {own.spec.grid}")
    # Particle m of sample i is sample number i·M + m under the seed, so a completion too is the same in any batch.
    numbers = (indices[:, None] * particles + torch.arange(particles, device=indices.device)).flatten()
    contexts = prior.draw_contexts(numbers, seed) if contexts is None else contexts.repeat_interleave(particles, 0)
    levels: list[Tensor] = []
    dtype = torch.float32 if indices.device.type == "mps" else torch.float64  # MPS has no wider one
    logs = torch.zeros(len(indices), particles, dtype=dtype, device=indices.device)
    smallest = torch.full((len(indices),), float(particles), dtype=dtype, device=indices.device)
    weighed = False  # whether a held position has changed the weights since the last look at them
    for level, (own, latent, mask) in enumerate(zip(prior.levels, given, held, strict=True)):
        backbone: Backbone = own.backbone
        head: Head = own.head
        values = head.values(latent[None]).flatten(1, 2).repeat_interleave(len(numbers), 0)  # B·M P, or B·M P C
        positions = torch.arange(mask.numel(), device=indices.device)
        draws = head.begin(uniforms(seed, numbers, positions, head.uniforms(AS_FITTED), own.level), AS_FITTED)
        condition = own.conditioned(levels, contexts)
        state = backbone.begin(len(numbers), own.spec.grid, condition.map, condition.prefix)
        previous: Tensor | None = None
        for position, held_here in enumerate(mask.flatten().tolist()):
            features = backbone.step(previous, position, state).to(own.position.dtype)
            if weighed and not held_here:  # Before more is drawn, unlikely particles give way to copies of likely ones.
                weighed, size = False, effective(logs)
                smallest = torch.minimum(smallest, size)
                if (poor := size < FEWEST * particles).any():
                    ancestors = resampled(logs, poor, indices, seed, (level << 20) + position)
                    features, values, levels = features[ancestors], values[ancestors], [done[ancestors] for done in levels]
                    contexts = None if contexts is None else contexts[ancestors]
                    state.select(ancestors)
                    logs[poor] = 0.0
            if held_here:
                logs += head.log_prob(features, values[:, position]).view_as(logs)
                weighed = True
            else:
                values[:, position] = head.draw(features, position, draws)
            previous = head.embed(values[:, position])
        levels.append(head.latent(values.unflatten(1, own.spec.grid)))
    if log_likelihood is not None:
        logs += log_likelihood(levels).view_as(logs)
    smallest = torch.minimum(smallest, effective(logs))
    uniform = first_uniforms(seed, indices, CHOICE_STREAM)[:, None]
    chosen = choose_many(logs, uniform.to(logs.dtype)).squeeze(1) + particles * torch.arange(len(indices), device=indices.device)
    return [done[chosen] for done in levels], smallest


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
