"""Images from a run: latents drawn from a prior, and decoded."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from pipelines import processes
from pipelines.console import UserError, say
from pipelines.runs.names import Pixels
from stage1_vae.autoencoder import Autoencoder, to_uint8
from stage2_prior.prior import Prior
from stage2_prior.sampling import AS_FITTED, PIXEL_STREAM, CannotSample, Sampling, uniforms


@dataclass(frozen=True)
class Samples:
    images: Tensor
    """uint8 N C H W on the CPU"""
    levels: list[Tensor]
    """their latents, one for each level, on the CPU"""
    finite: Tensor
    """N, whether every pixel was a number; what was not is black"""

    def warning(self) -> str | None:
        """What to say of samples that are not numbers, where there are some."""
        wrong = int((~self.finite).sum())
        return not_numbers(wrong, len(self.finite)) if wrong else None


def not_numbers(wrong: int, count: int) -> str:
    return f"not numbers, and so black: {wrong} of {count} samples"


def generate(
    autoencoder: Autoencoder,
    prior: Prior,
    count: int,
    *,
    seed: int,
    device: torch.device,
    batch_size: int = 256,
    how: Sampling = AS_FITTED,
    contexts: Tensor | None = None,
    pixels: Pixels = "mean",
) -> Samples:
    """`count` images: z from the prior, then the mean of p(x|z) or a draw from it.

    contexts: of the learned prior, such as labels, one for each image; drawn as in the training set when None.
    Image i under one seed is the same whatever the count and the batch size. A batch that does not fit into memory is
    halved. Raises UserError when one image does not fit, or when `how` makes no sense for this prior.
    """
    draw = sampler(autoencoder, prior, seed=seed, device=device, how=how, contexts=contexts, pixels=pixels)
    return joined(processes.in_batches(draw, torch.arange(count), batch_size, "sampling"))


def sampler(
    autoencoder: Autoencoder,
    prior: Prior,
    *,
    seed: int,
    device: torch.device,
    how: Sampling,
    contexts: Tensor | None,
    pixels: Pixels,
) -> Callable[[Tensor], Samples]:
    """What draws the samples of a batch of numbers, as `generate` draws all of them."""
    limit = math.inf

    @torch.inference_mode()
    def drawn(batch: Tensor) -> Samples:
        nonlocal limit
        parts: list[Samples] = []
        while len(batch):
            size = min(len(batch), limit)
            indices = batch[:size].to(device)
            given = None if contexts is None else contexts[batch[:size]].to(device)
            try:
                parts.append(decoded(prior.sample(indices, seed, how, given), indices))
            except CannotSample as error:
                raise UserError(str(error)) from error
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise UserError(f"out of memory: not even one image fits on {device}") from error
                limit = len(indices) // 2
                say(f"out of memory: going on with batches of {limit}")
                continue
            batch = batch[len(indices) :]
        return joined(parts)

    def decoded(levels: list[Tensor], indices: Tensor) -> Samples:
        parts = []
        for rows in torch.arange(len(indices), device=device).split(autoencoder.at_once):
            some = [level[rows] for level in levels]
            values = autoencoder.values(some, pixel_noise(pixels, seed, indices[rows], autoencoder.image_shape))
            finite = values.isfinite().flatten(1).all(1)
            parts.append(Samples(to_uint8(values).cpu(), [level.cpu() for level in some], finite.cpu()))
        return joined(parts)

    return drawn


def pixel_noise(pixels: Pixels, seed: int, indices: Tensor, image_shape: tuple[int, int, int]) -> Tensor | None:
    """Uniform numbers for a draw from p(x|z), B C H W: of each sample its own; None for the mean. indices: B sample numbers."""
    if pixels == "mean":
        return None
    channels, height, width = image_shape
    rows = torch.arange(height, device=indices.device)
    return rearrange(uniforms(seed, indices, rows, channels * width, PIXEL_STREAM), "b h (c w) -> b c h w", c=channels)


def joined(parts: list[Samples]) -> Samples:
    levels = [torch.cat(level) for level in zip(*(part.levels for part in parts))]
    return Samples(torch.cat([part.images for part in parts]), levels, torch.cat([part.finite for part in parts]))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; on the CPU torch raises no error of its own kind for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
