"""python -m pipelines.study NAME: questions that people ask about VAEs, answered with a trained run.

    samples-per-image    how many samples of z for each image? What is averaged?
    mean-or-sample       decode the posterior's mean, or a sample?
    evidence             how can one z explain an image, and what does p(x) = ∫ p(x|z) p(z) dz cost to estimate?
    aggregate-posterior  is q(z) really N(0, I)?
    unusual-images       does the likelihood detect unusual images?

Each takes minutes on 2 cores, and writes a plot, the numbers and their conclusions to the folder `studies` of the run.

x an image, z a latent, L draws of z; all likelihoods in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import UserError, nearest, run_command, say
from pipelines.runs.names import DEFAULT_PRESET, Device

STUDIES = ("samples-per-image", "mean-or-sample", "evidence", "aggregate-posterior", "unusual-images")


@dataclass(frozen=True)
class Arguments:
    """Answer a question about VAEs with a trained run."""

    study: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="{" + ",".join(STUDIES) + "}")]]
    """the question to answer"""
    run: str = DEFAULT_PRESET
    """a run's name under checkpoints/, its path, or a trained model that comes with the software, such as mnist5k"""
    device: Device = "auto"


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "study", arguments)
    if asked.study not in STUDIES:
        raise UserError(f"there is no study {asked.study!r}{nearest(asked.study, STUDIES)}")
    from pipelines.files import write_file, write_json
    from pipelines.pages.plots import png
    from pipelines.runs.run import Run
    from pipelines.studies.trained import Findings, Trained

    name = asked.study.replace("-", "_")
    answer: Callable[[Trained], Findings] = getattr(import_module(f"pipelines.studies.{name}"), name)
    run = Run.open(asked.run, asked.device)
    folder = run.work / "studies"
    with run.locked():
        found = answer(Trained.of(run))
        write_file(folder / f"{asked.study}.png", png(found.figure))
        write_json(folder / f"{asked.study}.json", {"findings": found.sentences, **found.numbers})
    for sentence in found.sentences:
        say("", sentence)
    say("", f"plot: {folder / asked.study}.png; numbers: {folder / asked.study}.json")


if __name__ == "__main__":
    run_command(main)
