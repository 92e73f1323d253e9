"""python -m pipelines.publish RUN owner/name: a trained model on the Hugging Face hub, whose name as a run is hub:owner/name."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import UserError, run_command, say
from pipelines.runs.names import CardDevice, Half, RunName


@dataclass(frozen=True)
class Arguments:
    """Publish a trained model on the Hugging Face hub: its weights, its figures and a model card. Log in to the hub first."""

    run: tyro.conf.Positional[RunName]
    repository: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")]]
    """owner/name on the hub: a new repository, or a new version of it"""
    private: bool = False
    """make a new repository private: visible to you and your organization only"""
    license: str | None = None
    """licence of the weights, by its identifier on the hub, such as mit or cc-by-4.0"""
    half: Half = False
    device: CardDevice = "auto"


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "publish", arguments)
    # Slow to import, and --help needs none of it.
    from pipelines.pages.exports import FOLDERS, export
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
        commit = hub.publish(made, repository, FOLDERS, asked.private)
    say(f"https://huggingface.co/{repository}; to draw from it: python -m pipelines.generate {name}@{commit}")


if __name__ == "__main__":
    run_command(main)
