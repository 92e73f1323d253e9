"""python -m pipelines.generate RUN: draw latents from a prior by name, decode them, and write the images."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from pipelines.console import UserError, first_process, nearest, run_command, say
from pipelines.runs.names import PRIORS, Device, Pixels, PriorName
from stage2_prior.sampling import AS_FITTED, CannotSample, Sampling

if TYPE_CHECKING:  # slow to import, and --help needs none of it
    from torch import Tensor

    from pipelines.runs.run import Run
    from stage1_vae.autoencoder import Autoencoder
    from stage2_prior.prior import Prior


@dataclass(frozen=True)
class Arguments:
    """Draw latents from a prior, decode them, and write the images."""

    run: tyro.conf.Positional[str]
    """a run's name under checkpoints/, or its path"""
    count: int = 64
    """number of images"""
    prior: PriorName = "learned"
    """what to draw z from: standard is N(0, I), or uniform codes; posterior is no generator: it reconstructs training images"""
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
    device: Device = "auto"
    """the device to run on; auto takes the fastest that is there"""

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


def main(arguments: list[str] | None = None) -> None:
    try:
        asked = tyro.cli(Arguments, prog="python -m pipelines.generate", args=arguments, console_outputs=first_process())
    except CannotSample as error:
        raise UserError(str(error)) from error
    asked.check()
    write_asked(asked)


def write_asked(asked: Arguments) -> None:
    from pipelines.runs.completion import completions
    from pipelines.runs.parts import load_autoencoder, specs_of
    from pipelines.runs.pictures import write_images
    from pipelines.runs.priors import open_prior
    from pipelines.runs.run import Run
    from stage2_prior.autoregressive import LearnedPrior

    run = Run.open(asked.run, asked.device)
    autoencoder = load_autoencoder(run)
    prior = open_prior(run, asked.prior, specs_of(autoencoder))
    context = context_asked(run, asked)
    if isinstance(prior, LearnedPrior):
        for level in prior.levels:
            for one in (level, level.weaker):
                if one is not None:
                    one.backbone.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[asked.dtype])
    elif context is not None:
        raise UserError(f"the {asked.prior} prior takes neither label nor text; the learned prior may")
    if asked.complete is None:
        write_images(asked.out, drawn(run, autoencoder, prior, asked, context))
        say(f"{asked.count} images from the {asked.prior} prior of {run.folder}: {asked.out}")
        return
    if not isinstance(prior, LearnedPrior):
        raise UserError(f"--complete needs a learned prior that is autoregressive, which this {asked.prior} prior is not")
    images, given = completions(
        autoencoder,
        prior,
        asked.complete,
        asked.keep,
        asked.count,
        seed=asked.seed,
        device=run.fabric.device,
        batch_size=asked.batch_size,
        particles=asked.particles,
        context=context,
        pixels=asked.pixels,
        background=getattr(run.config.data, "background", "white"),
    )
    write_images(asked.out, torch.cat([given[None], images]) if asked.out.suffix == ".png" else images)
    say(f"{asked.count} completions of {asked.complete}, which keep its {asked.keep}: {asked.out}")


def context_asked(run: "Run", asked: Arguments) -> "Tensor | None":
    """What the prior is to be told. Raises UserError where it takes no such thing, or guidance has nothing to go toward."""
    from pipelines.runs.conditions import context_of_label, context_of_text

    context = context_of_label(run, asked.label) if asked.label is not None else None
    context = context_of_text(run, asked.text) if asked.text is not None else context
    if asked.how.guidance and asked.prior == "learned" and run.told == "caption" and not asked.text:
        raise UserError("--guidance goes toward a caption: say which with --text")
    return context


def drawn(run: "Run", autoencoder: "Autoencoder", prior: "Prior", asked: Arguments, context: "Tensor | None") -> "Tensor":
    """Images uint8 N C H W, of which a classifier has kept the best where that is asked for."""
    from pipelines.runs.sampling import generate
    from stage2_prior.autoregressive import LearnedPrior
    from stage2_prior.conditions import ClassLabel

    count = math.ceil(asked.count / asked.keep_best)
    contexts = None if context is None else context.expand(count, *context.shape)
    if asked.keep_best < 1:
        if not isinstance(prior, LearnedPrior) or not isinstance(run.condition, ClassLabel):
            raise UserError("--keep-best needs a learned prior that is told labels, to know what the classifier should read")
        if contexts is None:
            contexts = prior.draw_contexts(torch.arange(count, device=run.fabric.device), asked.seed)
    samples = generate(
        autoencoder,
        prior,
        count,
        seed=asked.seed,
        device=run.fabric.device,
        batch_size=asked.batch_size,
        how=asked.how,
        contexts=contexts,
        pixels=asked.pixels,
    )
    if warning := samples.warning():
        say(f"warning: {warning}")
    if asked.keep_best == 1:
        return samples.images
    from pipelines.judging.features import kept_best, trained_classifier  # slow to import, and seldom needed
    from pipelines.runs.dataset import load_data

    assert contexts is not None
    classifier, _ = trained_classifier(run.fabric, run.config.metrics, load_data(run), run.classifiers, seed=1)
    kept = kept_best(run.fabric, classifier, samples.images, contexts.cpu(), asked.keep_best)
    return samples.images[kept][: asked.count]


if __name__ == "__main__":
    run_command(main)
