"""python -m pipelines.generate RUN: draw latents from a prior by name, decode them, and write the images."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import UserError, check_least, counted, run_command, say
from pipelines.runs.names import Device, Dtype, Pixels, PriorName, RunName
from stage2_prior.sampling import AS_FITTED, CannotSample, Sampling

if TYPE_CHECKING:
    from pipelines.two_stage import TwoStage


@dataclass(frozen=True)
class Arguments:
    """Draw latents from a prior, decode them, and write the images."""

    run: tyro.conf.Positional[RunName]
    count: int | None = None
    """number of images; by default 64, or with --captions one for each caption"""
    prior: PriorName = "learned"
    """the prior that z is sampled from: standard is N(0, I), or uniform codes; posterior reconstructs training images"""
    label: str | None = None
    """class to draw, by name or number, for a prior conditioned on class labels; by default classes are drawn as often as in
    training"""
    keep_best: float = 1.0
    """rejection sampling (VQ-VAE-2): draw count / keep-best images, and keep those that a classifier assigns to their label most
    confidently"""
    complete: Path | None = None
    """file of a picture to complete, --count times: its hidden part is sampled anew"""
    keep: str = "top-half"
    """the part of the picture to complete that is kept: top-half, bottom-half, left-half, right-half, or the file of a mask that
    is white there"""
    particles: int = 64
    """particles for each completion, one of which is chosen by its importance weight; with more, completions fit better"""
    caption: str | None = None
    """caption of the images, for a prior conditioned on captions"""
    captions: Path | None = None
    """text file with one caption a line; the images take them in turn"""
    seed: int = 0
    """random seed; sample i of a seed is always the same image"""
    out: Path = Path("samples.png")
    """a .png with all images in one picture, a .npz with the array arr_0 (uint8, N H W C), or DIR/ with a .png for each"""
    scale: int | None = None
    """factor by which images are enlarged, without smoothing; by default, small images in one picture are made at least 64 pixels
    wide. A .npz is not enlarged"""
    texts: bool = True
    """write the label or caption of each image below it; for DIR/, into its captions.jsonl"""
    pixels: Pixels = "mean"
    """decode to the mean of p(x|z), or to a sample from it"""
    tuned: bool = False
    """draw from the learned prior with the settings that the comparison of the run chose, in place of those below"""
    how: Annotated[Sampling, tyro.conf.arg(name="")] = AS_FITTED
    batch_size: int = 256
    """images sampled at once"""
    dtype: Dtype = "float32"
    device: Device = "auto"

    def check(self) -> None:
        check_least(self, count=1, batch_size=1, particles=1, scale=1)
        if self.complete is not None and (self.tuned or self.how != AS_FITTED or self.keep_best < 1 or self.dtype != "float32"):
            raise UserError(
                "--complete draws from the density as fitted: without tuned, temperature, top-k, top-p, guidance, keep-best or"
                " dtype"
            )
        if self.tuned and self.how != AS_FITTED:
            raise UserError("give --tuned or settings of sampling, such as --guidance, not both")
        if self.tuned and self.prior != "learned":
            raise UserError(f"--tuned needs the learned prior, not {self.prior}")
        if self.complete is not None and self.prior != "learned":
            raise UserError(f"--complete needs the learned prior, not {self.prior}")
        if self.captions is not None and self.caption is not None:
            raise UserError("give --caption or --captions, not both")
        if self.out.suffix not in (".png", ".npz", ""):
            raise UserError(f"--out ends in .png or .npz, or is a folder, not {self.out.name!r}")
        from pipelines.files import check_writable  # slow to import, and --help needs none of it

        check_writable("--out", self.out, folder=not self.out.suffix)


def main(arguments: list[str] | None = None) -> None:
    try:
        asked = read_arguments(Arguments, "generate", arguments)
    except CannotSample as error:
        raise UserError(str(error)) from error
    asked.check()
    write_asked(asked)


def captions_in(path: Path) -> list[str]:
    """The lines of a text file that say something. Raises UserError where there are none, or it is no text."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"--captions is a text file with a caption on each line, which {path} is not") from error
    if not (captions := [line for line in lines if line]):
        raise UserError(f"{path} has no captions: write one on each line")
    return captions


def write_asked(asked: Arguments) -> None:
    # Slow to import, and --help needs none of it.
    import torch

    from pipelines.judging.tradeoffs import described
    from pipelines.runs.completion import SIDES, known_pixels, with_hidden_grey
    from pipelines.runs.pictures import check_own, write_images
    from pipelines.two_stage import TwoStage

    captions = [] if asked.captions is None else captions_in(asked.captions)
    count = asked.count or len(captions) or 64
    if not asked.out.suffix:
        check_own("--out", asked.out, count)
    caption = [captions[number % len(captions)] for number in range(count)] if captions else asked.caption
    model = TwoStage.open(asked.run, asked.device, asked.dtype)
    how = tuned(model, caption) if asked.tuned else asked.how
    if asked.complete is None:
        images = model.sample(
            count,
            prior=asked.prior,
            label=asked.label,
            caption=caption,
            **vars(how),
            seed=asked.seed,
            pixels=asked.pixels,
            keep_best=asked.keep_best,
            batch_size=asked.batch_size,
        )
        write_images(asked.out, images, asked.scale, texts_of(model, asked, count, caption))
        drawn = f", drawn with {described(how)}" if how != AS_FITTED else ""
        say(f"{counted(count, 'image')} from the {asked.prior} prior of {model.run.known_as}{drawn}: {asked.out}")
        if asked.prior == "learned" and caption is None and (examples := model.captions):
            say(f"they were drawn without a caption; with one they are better, such as --caption {shlex.quote(examples[0])}")
        elif asked.prior == "learned" and how == AS_FITTED and asked.keep_best == 1 and (settings := model.tuned):
            best = described(Sampling(**settings))
            say(f"they were drawn as fitted; by the comparison of this run, samples are better with --tuned: {best}")
        return
    picture, known = model.read(asked.complete), known_pixels(asked.keep, model.image_shape)
    images = model.complete(
        picture,
        known,
        count,
        label=asked.label,
        caption=caption,
        seed=asked.seed,
        particles=asked.particles,
        pixels=asked.pixels,
        batch_size=asked.batch_size,
    )
    given = with_hidden_grey(picture, known)[None]
    write_images(asked.out, torch.cat([given, images]) if asked.out.suffix == ".png" else images, asked.scale)
    kept = f"its {asked.keep}" if asked.keep in SIDES else f"what is white in {asked.keep}"
    say(f"{counted(count, 'completion')} of {asked.complete}, keeping {kept}: {asked.out}")


def tuned(model: "TwoStage", caption: str | list[str] | None) -> Sampling:
    """The settings that the comparison of a run chose.

    Raises UserError where the run was not compared, and for guidance toward a caption without one.
    """
    from pipelines.judging.comparison import comparison_file, read_comparison
    from pipelines.judging.tradeoffs import described

    name, path = model.run.known_as, comparison_file(model.run)
    if not path.is_file():
        raise UserError(f"--tuned: {name} was not compared; first run python -m pipelines.compare {shlex.quote(name)}")
    how, chosen = Sampling(**model.tuned), read_comparison(path).tuned(weaker=True)
    if how.guidance and caption is None and (examples := model.captions):
        raise UserError(f"--tuned guides this prior toward a caption: add --caption, such as {shlex.quote(examples[0])}")
    if how != chosen:
        say(f"--tuned: {name} lacks the weaker copy of the prior, which {described(chosen)} needs; drawing {described(how)}")
    elif how == AS_FITTED:
        say(f"--tuned: the comparison of {name} names no better settings than as fitted")
    return how


def texts_of(model: "TwoStage", asked: Arguments, count: int, caption: str | list[str] | None) -> list[str]:
    """The label or caption of each image; none where they are not wanted, or the prior is not conditioned on any.

    Nor are there any where each image was drawn with its own label and a classifier has kept some of them.
    """
    chosen = asked.keep_best < 1 and asked.label is None
    if not asked.texts or asked.out.suffix == ".npz" or asked.prior != "learned" or chosen:
        return []
    return model.conditions(count, label=asked.label, caption=caption, seed=asked.seed)


if __name__ == "__main__":
    run_command(main)
