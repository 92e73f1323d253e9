"""python -m pipelines.publish RUN owner/name: a run as a model on the Hugging Face hub, which hub:owner/name then names."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from pipelines.console import UserError, first_process, run_command, say
from pipelines.runs.names import Device


@dataclass(frozen=True)
class Arguments:
    """Put what drawing from a run needs, its figures and a card on the Hugging Face hub, where you are logged in."""

    run: tyro.conf.Positional[str]
    """a run's name under checkpoints/, or its path"""
    repository: tyro.conf.Positional[str]
    """owner/name on the hub; made where it is not there, else its next version"""
    private: bool = False
    """only for you and your organization, where it is made now"""
    license: str | None = None
    """licence of the weights, by its identifier on the hub, such as mit or cc-by-4.0"""
    half: bool = False
    """weights in float16: half the size, and samples that differ a little; statistics and codebooks stay float32"""
    device: Device = "auto"
    """the device to draw the samples of the card on"""


def main(arguments: list[str] | None = None) -> None:
    asked = tyro.cli(Arguments, prog="python -m pipelines.publish", args=arguments, console_outputs=first_process())
    # Slow to import, and --help needs none of it.
    from pipelines.pages.exports import export
    from pipelines.runs import hub
    from pipelines.runs.run import Run

    repository, revision = hub.repository_of(asked.repository)
    if revision is not None:
        raise UserError(f"a model is published as owner/name, without a revision: {repository}")
    hub.library()
    name = f"{hub.PREFIX}{repository}"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "export"
        export(Run.open(asked.run, asked.device), made, asked.half, name=name, license=asked.license)
        commit = hub.publish(made, repository, asked.private)
    say(f"https://huggingface.co/{repository}; to draw from it: python -m pipelines.generate {name}@{commit}")


if __name__ == "__main__":
    run_command(main)
