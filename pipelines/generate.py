"""python -m pipelines.generate RUN: draw latents from a prior by name, decode them, and write the images."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from pipelines import processes
from pipelines.console import UserError, first_process, nearest, run_command, say
from pipelines.judging.features import kept_best, trained_classifier
from pipelines.runs.completion import held_latents, known_pixels, picture_to_complete
from pipelines.runs.conditions import context_of_label, context_of_text
from pipelines.runs.config import Pixels
from pipelines.runs.dataset import load_data, read_facts
from pipelines.runs.parts import load_autoencoder, specs_of
from pipelines.runs.pictures import write_images
from pipelines.runs.priors import PRIORS, open_prior
from pipelines.runs.run import Run
from pipelines.runs.sampling import generate, pixel_noise
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.completion import complete
from stage2_prior.conditions import ClassLabel
from stage2_prior.prior import Prior
from stage2_prior.sampling import AS_FITTED, CannotSample, Sampling


@dataclass(frozen=True)
class Arguments:
    """Draw latents from a prior, decode them, and write the images."""

    run: tyro.conf.Positional[str]
    """a run's name under checkpoints/, or its path"""
    count: int = 64
    """number of images"""
    prior: str = "learned"
    """learned, standard (N(0, I), or uniform codes), gaussian, mixture, unigram, or posterior (not a generator: reconstructs
    training images)"""
    label: str | None = None
    """class to draw, by its name, from a prior that was trained with class labels; all classes when not given"""
    keep_best: float = 1.0
    """of what is drawn, keep the share that a classifier is surest to read the asked label off (VQ-VAE-2); --count is kept"""
    complete: Path | None = None
    """picture whose hidden part is to be drawn anew, --count times"""
    keep: str = "top-half"
    """which part of the picture to complete is kept: top-half, bottom-half, left-half, right-half, or a mask picture's file"""
    particles: int = 64
    """drawn for each completion, to choose one by the density of the latents and pixels that are kept"""
    text: str | None = None
    """caption of what to draw, for a prior that was trained with captions"""
    seed: int = 0
    """sample i under one seed is always the same image"""
    out: Path = Path("samples.png")
    """.png for one picture of all images; .npz for one array arr_0, uint8, N H W C"""
    pixels: Pixels = "mean"
    """the mean of p(x|z), or a draw from it"""
    how: Annotated[Sampling, tyro.conf.arg(name="")] = AS_FITTED
    batch_size: int = 256
    """images sampled at once"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the learned prior's backbone; its densities and the decoder stay float32"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def check(self) -> None:
        if self.count < 1:
            raise UserError(f"--count is a number of images from 1 up, not {self.count}")
        if self.batch_size < 1:
            raise UserError(f"--batch-size is a number of images from 1 up, not {self.batch_size}")
        if self.particles < 1:
            raise UserError(f"--particles is a number from 1 up, not {self.particles}")
        if self.complete is not None and (self.how != AS_FITTED or self.keep_best < 1 or self.dtype != "float32"):
            raise UserError(
                "--complete draws from the density as fitted: without temperature, top-k, top-p, guidance, keep-best or dtype"
            )
        if not 0 < self.keep_best <= 1:
            raise UserError(f"--keep-best is a share above 0 and at most 1, not {self.keep_best}")
        if self.out.suffix not in (".png", ".npz"):
            raise UserError(f"--out ends in .png or .npz, not {self.out.name!r}")
        if self.prior not in PRIORS:
            raise UserError(f"there is no prior {self.prior!r}{nearest(self.prior, PRIORS)}")


@torch.inference_mode()
def completions(run: Run, autoencoder: Autoencoder, prior: Prior, asked: Arguments, context: Tensor | None) -> Tensor:
    """Pictures uint8 N C H W; in a .png, the picture with its hidden part in grey comes first."""
    assert asked.complete is not None
    if not isinstance(prior, LearnedPrior):
        raise UserError(f"--complete needs the learned prior, not {asked.prior}")
    shape, device = read_facts(run).image_shape, run.fabric.device
    image, known = picture_to_complete(asked.complete, shape), known_pixels(asked.keep, shape)
    given, held = held_latents(autoencoder, image, known, device)
    for mask in held:
        say(f"held: {int(mask.sum())} of {mask.numel()} latents on the {mask.shape[0]}×{mask.shape[1]} grid")
    target, seen = autoencoder.likelihood.scale(image[None].to(device)), known.to(device)

    def of_known_pixels(levels: list[Tensor]) -> Tensor:
        pixels = autoencoder.decode(levels)
        assert isinstance(pixels, torch.distributions.Independent)
        return (pixels.base_dist.log_prob(target) * seen).flatten(1).sum(1)

    def completed(indices: Tensor) -> tuple[Tensor, Tensor]:
        told = None if context is None else context.to(device).expand(len(indices), *context.shape)
        levels, size = complete(prior, given, held, indices.to(device), asked.seed, asked.particles, told, of_known_pixels)
        noise = pixel_noise(asked.pixels, asked.seed, indices.to(device), shape)
        return autoencoder.render(levels, noise).cpu(), size.cpu()

    size = max(1, asked.batch_size // asked.particles)
    images, sizes = zip(*processes.in_batches(completed, torch.arange(asked.count), size, "completing"))
    say(f"effective sample size: median {float(torch.cat(sizes).median()):.1f} of {asked.particles} particles")
    shown = torch.where(known, image, torch.full_like(image, 128))[None]
    return torch.cat([*([shown] if asked.out.suffix == ".png" else []), *images])


def main(arguments: list[str] | None = None) -> None:
    try:
        asked = tyro.cli(Arguments, prog="python -m pipelines.generate", args=arguments, console_outputs=first_process())
    except CannotSample as error:
        raise UserError(str(error)) from error
    asked.check()
    run = Run.open(asked.run, asked.device)
    autoencoder = load_autoencoder(run)
    prior = open_prior(run, asked.prior, specs_of(autoencoder))
    if isinstance(prior, LearnedPrior):
        for level in prior.levels:
            level.backbone.to(getattr(torch, asked.dtype))
    context = context_of_label(run, asked.label) if asked.label is not None else None
    context = context_of_text(run, asked.text) if asked.text is not None else context
    if asked.how.guidance and asked.prior == "learned" and run.told == "caption" and not asked.text:
        raise UserError("--guidance goes toward a caption: say which with --text")
    if context is not None and not isinstance(prior, LearnedPrior):
        raise UserError(f"the {asked.prior} prior takes neither label nor text; the learned prior may")
    if asked.complete is not None:
        write_images(asked.out, completions(run, autoencoder, prior, asked, context))
        say(f"{asked.count} completions of {asked.complete}, which keep its {asked.keep}: {asked.out}")
        return
    drawn = math.ceil(asked.count / asked.keep_best)
    contexts = None if context is None else context.expand(drawn, *context.shape)
    if asked.keep_best < 1:
        if not isinstance(prior, LearnedPrior) or not isinstance(run.condition, ClassLabel):
            raise UserError("--keep-best needs a learned prior that is told labels, to know what the classifier should read")
        if contexts is None:
            contexts = prior.draw_contexts(torch.arange(drawn, device=run.fabric.device), asked.seed)
    samples = generate(
        autoencoder,
        prior,
        drawn,
        seed=asked.seed,
        device=run.fabric.device,
        batch_size=asked.batch_size,
        how=asked.how,
        contexts=contexts,
        pixels=asked.pixels,
    )
    if warning := samples.warning():
        say(f"warning: {warning}")
    images = samples.images
    if asked.keep_best < 1:
        assert contexts is not None
        classifier, _ = trained_classifier(run.fabric, run.config.metrics, load_data(run), run.classifiers, seed=1)
        images = images[kept_best(run.fabric, classifier, images, contexts.cpu(), asked.keep_best)][: asked.count]
    write_images(asked.out, images)
    say(f"{asked.count} images from the {asked.prior} prior of {run.folder}: {asked.out}")


if __name__ == "__main__":
    run_command(main)
