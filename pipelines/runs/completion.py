"""Completion of a picture: which pixels are kept, and so which latents are held.

The hidden pixels are blanked before encoding. Several fillings of them are tried. A latent is held if none of them changes it.
All other latents are drawn again.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipelines import processes
from pipelines.console import UserError, counted, nearest, say
from pipelines.data.decoding import Unreadable, changes_to_fit, read_image
from pipelines.runs.names import Pixels
from pipelines.runs.sampling import pixel_noise
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.completion import complete
from stage2_prior.sampling import CannotSample

SIDES = {"top-half": (0, True), "bottom-half": (0, False), "left-half": (1, True), "right-half": (1, False)}
FILLINGS = 24  # of the hidden pixels, to see which latents they can change
# Of a channel's spread over the grid, or of the posterior's standard deviation where that is larger, as in channels that say
# nothing: no more than this leaves a continuous latent as it was.
SMALL_CHANGE = 0.1
FEW = 2  # particles that a completion is chosen among in effect: with fewer, there was no choice


def picture_to_complete(path: Path, image_shape: tuple[int, int, int], background: str = "white") -> Tensor:
    """uint8 C H W, resized to what the model takes, in front of a background where it is transparent, and said so.

    Raises UserError when it cannot be read.
    """
    channels, height, width = image_shape
    if not path.is_file():
        raise UserError(f"there is no picture {path}")
    try:
        done = changes_to_fit(path, image_shape)
        pixels, remarks = read_image(str(path), image_shape, background=background)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from error
    if done:
        say(f"{path}: {', '.join(done)}, to fit the model's {channels}×{height}×{width}")
    if "transparent" in remarks:
        say(f"{path} is transparent in parts; {background} shows there")
    return torch.tensor(pixels)


def known_pixels(keep: str, image_shape: tuple[int, int, int]) -> Tensor:
    """H W, True where the picture is kept: a half by its name, or a mask picture, white where it is kept.

    What is transparent in a mask is not kept.
    """
    _, height, width = image_shape
    if keep in SIDES:
        axis, first = SIDES[keep]
        half = torch.arange((height, width)[axis]) < (height, width)[axis] // 2
        half = half if first else ~half
        return (half[:, None] if axis == 0 else half[None]).expand(height, width)
    if not Path(keep).is_file():
        raise UserError(f"--keep is a half or the file of a mask picture; there is no {keep!r}{nearest(keep, SIDES)}")
    try:
        # As the picture is, so that a mask of the picture's own size lies where it was drawn.
        grey, _ = read_image(keep, (1, height, width), Image.Resampling.NEAREST, background="black")
    except Unreadable as error:
        raise UserError(f"the mask {keep} cannot be read as a picture ({error})") from error
    known = torch.from_numpy(grey > 127)[0]
    if not known.any():
        raise UserError(f"the mask {keep} is white nowhere, so nothing of the picture would be kept")
    return known


@torch.inference_mode()
def held_latents(
    autoencoder: Autoencoder, image: Tensor, known: Tensor, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """The latent of the picture with hidden pixels blanked, and where it is held, h w, for each level."""
    noise = torch.Generator().manual_seed(0)
    grey = torch.linspace(0, 255, 8).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *image.shape)
    blanked = torch.where(known, image, 0)
    others = torch.stack([blanked.roll((r, c), (1, 2)) for r in (-8, 0, 8) for c in (-8, 0, 8)])
    random = torch.randint(0, 256, (FILLINGS - len(grey) - len(others), *image.shape), dtype=torch.uint8, generator=noise)
    fillings = torch.cat([grey, others, random])  # the first is black: the blanked picture
    posteriors = autoencoder.encode(torch.where(known, image, fillings).to(device))
    latents, held = [], []
    for posterior, level in zip(posteriors, autoencoder.mean(posteriors), strict=True):
        if "codes" in posterior:
            same = (level == level[:1]).all(0)
        else:
            spread = torch.maximum(level[0].flatten(1).std(1, correction=0)[:, None, None], posterior["std"][0])
            same = ((level - level[:1]).abs() <= SMALL_CHANGE * spread).all(0).all(0)
        latents.append(level[0])
        held.append(same)
    return latents, held


@torch.inference_mode()
def completions(
    autoencoder: Autoencoder,
    prior: LearnedPrior,
    image: Tensor,
    known: Tensor,
    count: int,
    *,
    seed: int,
    device: torch.device,
    batch_size: int,
    particles: int,
    contexts: Tensor | None,
    pixels: Pixels,
    tell: Callable[[str], None] = say,
) -> Tensor:
    """Pictures uint8 N C H W whose hidden part is drawn anew.

    image: uint8 C H W; known: boolean H W, which part of it is kept; particles: drawn for each completion, to choose one by the
    density of the latents and pixels that are kept; contexts: of the prior, one for each picture; tell: takes a sentence on how
    many latents of each level are held, and last one on the effective sample size.
    """
    given, held = held_latents(autoencoder, image, known, device)
    for mask in held:
        held_here, grid = f"{int(mask.sum())} of {mask.numel()}", f"{mask.shape[0]}×{mask.shape[1]} grid"
        tell(f"held: {held_here} latents on the {grid}, which depend on kept pixels alone; the others are drawn anew")
    target, seen = autoencoder.likelihood.scale(image[None].to(device)), known.to(device)

    def of_known_pixels(levels: list[Tensor]) -> Tensor:
        found = []
        for part in zip(*(level.split(autoencoder.at_once) for level in levels)):
            likelihood = autoencoder.decode([*part])
            assert isinstance(likelihood, torch.distributions.Independent)
            found.append((likelihood.base_dist.log_prob(target) * seen).flatten(1).sum(1))
        return torch.cat(found)

    def completed(indices: Tensor) -> tuple[Tensor, Tensor]:
        try:
            levels, size = complete(
                prior,
                given,
                held,
                indices.to(device),
                seed,
                particles=particles,
                contexts=None if contexts is None else contexts[indices].to(device),
                log_likelihood=of_known_pixels,
            )
        except CannotSample as error:
            raise UserError(str(error)) from error
        noise = pixel_noise(pixels, seed, indices.to(device), autoencoder.image_shape)
        drawn = autoencoder.render(levels, noise).cpu()
        return torch.where(known, image, drawn), size.cpu()  # a decoder would blur what is kept

    size = max(1, batch_size // particles)
    images, sizes = zip(*processes.in_batches(completed, torch.arange(count), size, "completing"))
    median = float(torch.cat(sizes).median())
    few = f": the completions may not fit what is kept; {4 * particles} particles choose among more" if median < FEW else ""
    tell(f"effective sample size: median {median:.1f} of {counted(particles, 'particle')}{few}")
    return torch.cat(images)


def with_hidden_grey(image: Tensor, known: Tensor) -> Tensor:
    """What a completion was given, to show it: the picture, C H W, with its hidden part in grey."""
    return torch.where(known, image, 128)
