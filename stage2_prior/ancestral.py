"""Ancestral sampling: the one cached loop that draws a grid, position by position, from any backbone and head.

B batch, P positions, U uniform numbers a position, C latent channels, D width, T prefix length, h×w latent grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.heads import Head
from stage2_prior.layers import Backbone
from stage2_prior.replay import MOST_POSITIONS, GraphedFunction, replayed
from stage2_prior.sampling import AS_FITTED, Sampling, uniforms

NOISE_AT_ONCE = 2**22  # uniform numbers; making them takes some 30 bytes each


class Conditioned(NamedTuple):
    """A backbone and its head, and what they are conditioned on."""

    backbone: Backbone
    head: Head
    map: Tensor | None  # B D h w or 1 D h w, of every position
    prefix: Tensor | None  # B T D, tokens before the first position


def sample_grid(
    prior: Conditioned,
    grid: tuple[int, int],
    indices: Tensor,
    seed: int,
    how: Sampling = AS_FITTED,
    *,
    stream: int = 0,
    weaker: Conditioned | None = None,
) -> Tensor:
    """Draw one level position by position, each from the cached step of the backbone; values B h w C, or codes B h w.

    indices: B sample numbers. stream: of the noise, another one for each level.
    weaker: what guidance leads away from: the same prior without its context, or a weaker one. None where `how` has no guidance.
    """

    def noise(positions: slice) -> Tensor:
        numbers = torch.arange(positions.start, positions.stop, device=indices.device)
        return uniforms(seed, indices, numbers, prior.head.uniforms_per_position(how), stream)

    positions = grid[0] * grid[1]
    priors = [prior] if weaker is None else [prior, weaker]
    if indices.device.type != "cuda" or positions > MOST_POSITIONS:
        return draw_grid(priors, grid, how, len(indices), noise)

    def draw(uniform: Tensor, *conditions: Tensor | None) -> Tensor:
        given = zip(priors, conditions[::2], conditions[1::2])
        conditioned = [one._replace(map=map, prefix=prefix) for one, map, prefix in given]
        return draw_grid(conditioned, grid, how, len(uniform), lambda positions: uniform[:, positions])

    modules = [module for one in priors for module in (one.backbone, one.head)]
    inputs = [noise(slice(0, positions)), *(tensor for one in priors for tensor in (one.map, one.prefix))]
    return replayed.setdefault(prior.backbone, GraphedFunction())((grid, how), modules, draw, inputs)


@torch.no_grad()
def draw_grid(
    priors: list[Conditioned], grid: tuple[int, int], how: Sampling, batch: int, noise: Callable[[slice], Tensor]
) -> Tensor:
    """The loop of `sample_grid`. Nothing in it waits for a value, so that a GPU can replay it.

    priors: the one that is drawn from, and under guidance the one that it leads away from.
    noise: the uniform numbers of some positions, B P U, of which few are asked for at once.
    """
    head, positions = priors[0].head, grid[0] * grid[1]
    states = [prior.backbone.begin(batch, grid, prior.map, prior.prefix) for prior in priors]
    dtype = next(head.parameters()).dtype  # the backbone may be rounder; a density never is
    at_once = max(1, NOISE_AT_ONCE // max(1, batch * head.uniforms_per_position(how)))
    previous: list[Tensor] | list[None] = [None] * len(priors)
    drawn: list[Tensor] = []
    for position in range(positions):
        place = position % at_once
        if place == 0:
            draws = head.begin(noise(slice(position, min(position + at_once, positions))), how)
        steps = zip(priors, previous, states)
        features = [prior.backbone.step(before, position, state).to(dtype) for prior, before, state in steps]
        weaker = (priors[1].head, features[1]) if len(priors) > 1 else None
        value = head.draw(features[0], place, draws, weaker)
        drawn.append(value)
        previous = [prior.head.embed(value) for prior in priors]
    return torch.stack(drawn, dim=1).unflatten(1, grid)
