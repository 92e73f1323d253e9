"""Samples from a prior given part of the latent: z ~ p(z_free | z_observed).

B batch, M particles, P positions, C channels, h×w latent grid.

If all observed positions come before all free ones, and the context is given, ancestral sampling is exact. Otherwise an
autoregressive prior cannot look ahead to the observed positions. Then each sample has M particles, by sequential importance
resampling (Gordon et al. 1993): a particle's weight is the density of the observed values given the values it has drawn so far.
The result is exact as M grows.

If no context is given, each particle draws its own. Its weight then depends on that context too, so that labels under which the
observed values are unlikely die out.

Every position takes one cached step of the backbone, for all particles at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.heads import Head
from stage2_prior.layers import Backbone
from stage2_prior.sampling import AS_FITTED, CHOICE_STREAM, RESAMPLING_STREAM, CannotSample, choose_many, first_uniforms, uniforms

RESAMPLE_BELOW = 0.5  # particles are resampled when their effective sample size is below this share of their number


@torch.no_grad()
def complete(
    prior: LearnedPrior,
    given: list[Tensor],
    observed: list[Tensor],
    indices: Tensor,
    seed: int,
    *,
    particles: int = 16,
    contexts: Tensor | None = None,
    log_likelihood: Callable[[list[Tensor]], Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Complete a latent. Returns levels, B … each, and the smallest effective sample size of each sample's particles, B, 1 to M.

    given: one latent for each level, without a batch axis.
    observed: for each level a mask, h w: True where `given` holds, False where values are drawn.
    indices: B sample numbers. particles: M.
    contexts: one for each sample, or one for all. None draws one for each particle, with the frequencies of the training set.
    log_likelihood: a further weight. From the levels of all particles, B·M … each, to log p(y|z) of other observations y, such
    as pixels, in nats, B·M.
    Raises CannotSample for a latent or a mask of the wrong shape, and for contexts that the prior does not have.
    """
    specs = [own.spec for own in prior.levels]
    fits = len(given) == len(observed) == len(specs) and all(
        latent.shape == spec.shape and mask.shape == spec.grid and mask.dtype == torch.bool
        for latent, mask, spec in zip(given, observed, specs)
    )
    if not fits:
        shapes = ", ".join(f"{spec.shape} and {spec.grid}" for spec in specs)
        raise CannotSample(f"each level needs a latent, without a batch axis, and a boolean mask of {shapes}")
    # Particle m of sample i is sample number i·M + m under the seed, so a completion too is the same in any batch.
    numbers = (indices[:, None] * particles + torch.arange(particles, device=indices.device)).flatten()
    coarsest = prior.levels[0]
    if contexts is None:
        contexts = coarsest.draw_contexts(numbers, seed)
    else:
        contexts = coarsest.for_each(indices, contexts).repeat_interleave(particles, 0)
    levels: list[Tensor] = []
    dtype = torch.float32 if indices.device.type == "mps" else torch.float64  # MPS has no wider one
    logs = torch.zeros(len(indices), particles, dtype=dtype, device=indices.device)
    smallest_sample_size = torch.full((len(indices),), float(particles), dtype=dtype, device=indices.device)
    unchecked = False  # whether the weights have changed since the effective sample size was last computed
    # As densities, draws and weights are not rounded by mixed precision.
    with torch.autocast(indices.device.type, enabled=False):
        for level, (own, latent, mask) in enumerate(zip(prior.levels, given, observed, strict=True)):
            backbone: Backbone = own.backbone
            head: Head = own.head
            values = head.values(latent[None]).flatten(1, 2).repeat_interleave(len(numbers), 0)  # B·M P, or B·M P C
            positions = torch.arange(mask.numel(), device=indices.device)
            draws = head.begin(uniforms(seed, numbers, positions, head.uniforms_per_position(AS_FITTED), own.level), AS_FITTED)
            condition = own.conditioned(levels, contexts)
            state = backbone.begin(len(numbers), own.spec.grid, condition.map, condition.prefix)
            previous: Tensor | None = None
            for position, observed_here in enumerate(mask.flatten().tolist()):
                features = backbone.step(previous, position, state).to(own.position.dtype)
                if unchecked and not observed_here:  # before the next draw, copies of likely particles replace unlikely ones
                    unchecked, size = False, effective(logs)
                    smallest_sample_size = torch.minimum(smallest_sample_size, size)
                    if (poor := size < RESAMPLE_BELOW * particles).any():
                        ancestors = resampled(logs, poor, indices, seed, (level << 20) + position)
                        features, values, levels = features[ancestors], values[ancestors], [done[ancestors] for done in levels]
                        contexts = None if contexts is None else contexts[ancestors]
                        state.select(ancestors)
                        logs[poor] = 0.0
                if observed_here:
                    logs += head.log_prob(features, values[:, position]).view_as(logs)
                    unchecked = True
                else:
                    values[:, position] = head.draw(features, position, draws)
                previous = head.embed(values[:, position])
            levels.append(head.latent(values.unflatten(1, own.spec.grid)))
    if log_likelihood is not None:
        logs += log_likelihood(levels).view_as(logs)
    smallest_sample_size = torch.minimum(smallest_sample_size, effective(logs))
    uniform = first_uniforms(seed, indices, CHOICE_STREAM)[:, None]
    chosen = choose_many(logs, uniform.to(logs.dtype)).squeeze(1) + particles * torch.arange(len(indices), device=indices.device)
    return [done[chosen] for done in levels], smallest_sample_size


def effective(logs: Tensor) -> Tensor:
    """Effective sample size, B, of log weights, B M: the number of equally weighted particles of the same worth (Kong 1992)."""
    return logs.softmax(1).square().sum(1).reciprocal()


def resampled(logs: Tensor, which: Tensor, indices: Tensor, seed: int, counter: int) -> Tensor:
    """The ancestor of every particle, as B·M row numbers: by systematic resampling for the samples in `which`, a boolean mask, B.

    Particles of the other samples keep themselves. logs: log weights, B M. counter: another number for each call.
    """
    batch, particles = logs.shape
    start = first_uniforms(seed, indices + (counter << 32), RESAMPLING_STREAM)[:, None].to(logs.dtype)
    places = (start + torch.arange(particles, device=logs.device)) / particles
    own = torch.arange(particles, device=logs.device).expand(batch, -1)
    ancestors = torch.where(which[:, None], choose_many(logs, places.contiguous()), own)
    return (ancestors + particles * torch.arange(batch, device=logs.device)[:, None]).flatten()
