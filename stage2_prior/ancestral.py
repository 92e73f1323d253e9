"""Ancestral sampling of a grid, position by position, with any backbone and head.

B batch, P positions, U uniform numbers a position, C latent channels, D width, T prefix length, h×w latent grid.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.heads import Head, Weaker
from stage2_prior.layers import Backbone
from stage2_prior.replay import GraphedFunction, can_replay, replayed
from stage2_prior.sampling import AS_FITTED, Sampling, uniforms

NOISE_AT_ONCE = 2**22  # uniform numbers that are made together, at some 30 bytes each


class Conditioned(NamedTuple):
    """A backbone with its head, and their conditions."""

    backbone: Backbone
    head: Head
    map: Tensor | None  # B D h w or 1 D h w, added at every position
    prefix: Tensor | None  # B T D, tokens before the first position


def sample_grid(
    prior: Conditioned,
    grid: tuple[int, int],
    indices: Tensor,
    seed: int,
    how: Sampling = AS_FITTED,
    *,
    stream: int = 0,
    weaker: Sequence[tuple[float, Conditioned]] = (),
) -> Tensor:
    """Sample one level by cached steps of the backbone. Returns values B h w C, or codes B h w.

    indices: B sample numbers. stream: of the noise, a different one for each level.
    weaker: the priors that guidance leads away from, each with its strength: the same one without its context, a weaker copy.
    """

    def noise(positions: slice) -> Tensor:
        numbers = torch.arange(positions.start, positions.stop, device=indices.device)
        return uniforms(seed, indices, numbers, prior.head.uniforms_per_position(how), stream)

    positions = grid[0] * grid[1]
    if not can_replay(indices.device, positions):
        return draw_grid(prior, weaker, grid, how, len(indices), noise)
    priors = [prior, *(one for _, one in weaker)]

    def draw(uniform: Tensor, *conditions: Tensor | None) -> Tensor:
        given = zip(priors, conditions[::2], conditions[1::2])
        first, *others = (one._replace(map=map, prefix=prefix) for one, map, prefix in given)
        led = [(strength, one) for (strength, _), one in zip(weaker, others)]
        return draw_grid(first, led, grid, how, len(uniform), lambda positions: uniform[:, positions])

    modules = [module for one in priors for module in (one.backbone, one.head)]
    numbers = noise_of_grid(noise, positions, positions_at_once(prior.head, how, len(indices)))
    inputs = [numbers, *(tensor for one in priors for tensor in (one.map, one.prefix))]
    return replayed.setdefault(prior.backbone, GraphedFunction())((grid, how), modules, draw, inputs)


def positions_at_once(head: Head, how: Sampling, batch: int) -> int:
    """The number of positions whose noise is made together."""
    return max(1, NOISE_AT_ONCE // max(1, batch * head.uniforms_per_position(how)))


def noise_of_grid(noise: Callable[[slice], Tensor], positions: int, at_once: int) -> Tensor:
    """The uniform numbers of all positions, B P U, made `at_once` positions at a time."""
    first = noise(slice(0, min(at_once, positions)))
    whole = first.new_empty(len(first), positions, first.shape[2])
    whole[:, :at_once] = first
    for start in range(at_once, positions, at_once):
        part = slice(start, min(start + at_once, positions))
        whole[:, part] = noise(part)
    return whole


@torch.no_grad()
def draw_grid(
    prior: Conditioned,
    weaker: Sequence[tuple[float, Conditioned]],
    grid: tuple[int, int],
    how: Sampling,
    batch: int,
    noise: Callable[[slice], Tensor],
) -> Tensor:
    """The loop of `sample_grid`. It never waits for a value on the GPU, so that a CUDA graph can capture it.

    noise: from a slice of positions to their uniform numbers, B P U. It is called for at most `positions_at_once` of them.
    """
    head, positions, priors = prior.head, grid[0] * grid[1], [prior, *(one for _, one in weaker)]
    states = [one.backbone.begin(batch, grid, one.map, one.prefix) for one in priors]
    dtype = next(head.parameters()).dtype  # mixed precision may round the backbone, but never a density
    at_once = positions_at_once(head, how, batch)
    previous: list[Tensor] | list[None] = [None] * len(priors)
    drawn: list[Tensor] = []
    for position in range(positions):
        place = position % at_once
        if place == 0:
            draws = head.begin(noise(slice(position, min(position + at_once, positions))), how)
        steps = zip(priors, previous, states)
        own, *others = [one.backbone.step(before, position, state).to(dtype) for one, before, state in steps]
        led = [Weaker(strength, one.head, features) for (strength, one), features in zip(weaker, others)]
        value = head.draw(own, place, draws, led)
        drawn.append(value)
        previous = [one.head.embed(value) for one in priors]
    return torch.stack(drawn, dim=1).unflatten(1, grid)
