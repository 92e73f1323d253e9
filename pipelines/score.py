"""python -m pipelines.score RUN IMAGES …: how unusual images are under a trained model, and where in them."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import UserError, check_least, counted, run_command, say
from pipelines.runs.names import Device, RunName

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Arguments:
    """Score how unusual images are under a trained model. Writes a table, and a page with the most unusual images first."""

    run: tyro.conf.Positional[RunName]
    images: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGE|FOLDER …")]] = ()
    """files with one image each, as `generate --out DIR/` draws them, and folders of them; by default images of the run's data"""
    split: Split = "test"
    """the split of the run's own data that is scored by default"""
    shown: int = 32
    """number of images on the page"""
    out: Path = Path("scores.csv")
    """file for the table; the page is the .html beside it"""
    device: Device = "auto"


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "score", arguments)
    check_least(asked, shown=1)
    if asked.out.suffix != ".csv":
        raise UserError(f"--out is the file of a table, such as scores.csv, not {asked.out}")
    score(asked)


def score(asked: Arguments) -> None:
    # Slow to import, and --help needs none of it.
    from pipelines.data.folder import images_at
    from pipelines.files import check_writable
    from pipelines.judging.scores import Scorer, Usual, auroc, check_held_out, every
    from pipelines.pages.scores import write_scores
    from pipelines.runs.dataset import background_of, drawn_alike, load_data
    from pipelines.runs.run import Run

    started = time.monotonic()
    for path in (asked.out, asked.out.with_suffix(".html")):
        check_writable("--out", path)
    run = Run.open(asked.run, asked.device)
    scorer = Scorer.of(run)
    splits = load_data(run)
    check_held_out(len(splits.test))
    if asked.images:
        names, images = images_at(asked.images, splits.image_shape, background_of(run))
        images = drawn_alike(run, images)
    else:
        images = getattr(splits, asked.split)
        names = [f"{asked.split} {number}" for number in range(len(images))]
    held_out = scorer.held_out(splits.test)
    usual = Usual.of(held_out)
    if images is splits.test:
        scores, distances = held_out, usual.distances
    else:
        scores = scorer(images)
        distances = usual.distance(scores)
    write_scores(asked.out, run.name, scorer, images, names, scores, distances, usual, asked.shown)
    unusual = int((usual.more_usual(distances) > 0.99).sum())
    of_all = f"{unusual} of {counted(len(scores), 'image is', 'images are')}"
    say(f"{of_all} more unusual than 99 % of the held-out images")
    if asked.images and len(names) > 1:
        first, *others = [
            f"{auroc(usually, values):.2f} by {name}"
            for (name, usually), values in zip(every(held_out, usual.distances).items(), every(scores, distances).values())
        ]
        say(f"AUROC against held-out images: {first}, which orders the table; {', '.join(others)}. 0.5 is chance.")
    say(f"table: {asked.out}; look at {asked.out.with_suffix('.html')}; {counted(round(time.monotonic() - started), 'second')}")


if __name__ == "__main__":
    run_command(main)
