"""python -m pipelines.export RUN --out FOLDER: a trained model as a folder to share."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import run_command, say
from pipelines.runs.names import CardDevice, Half, RunName


@dataclass(frozen=True)
class Arguments:
    """Export a trained model: a folder with its weights, its figures and a model card. Every command takes it as a run."""

    run: tyro.conf.Positional[RunName]
    out: Path
    """a new folder"""
    half: Half = False
    latents: bool = False
    """include the latents of the training images, which baselines are fitted to; without, they are encoded again where needed"""
    license: str | None = None
    """licence of the weights, by its identifier on the Hugging Face hub, such as mit or cc-by-4.0; an export keeps its own"""
    device: CardDevice = "auto"


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "export", arguments)
    # Slow to import, and --help needs none of it.
    from pipelines.pages.exports import export
    from pipelines.runs.exported import files_of
    from pipelines.runs.run import Run

    export(Run.open(asked.run, asked.device), asked.out, asked.half, asked.latents, license=asked.license)
    size = sum((asked.out / name).stat().st_size for name in files_of(asked.out))
    say(f"{asked.out}: {size / 1e6:.1f} MB; to draw from it: python -m pipelines.generate {asked.out}")


if __name__ == "__main__":
    run_command(main)
