"""python -m pipelines.likelihood RUN: bounds on log p(x) of held-out images, under every prior."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import check_least, check_seed, counted, run_command, say
from pipelines.runs.names import PRIORS, Device, RunName


@dataclass(frozen=True)
class Arguments:
    """Bound log p(x) of held-out images under each prior, and say what the rate consists of."""

    run: tyro.conf.Positional[RunName]
    samples: int = 64
    """draws of z for each image, for the importance-weighted bound; codes have a single z"""
    images: int = 1000
    """number of images of the test split, at most"""
    prior: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[{" + ",".join(PRIORS) + "} …]")] = ()
    """priors to use; by default all but posterior"""
    naive: int = 1000
    """draws from each prior for the naive estimate; 0 leaves it out"""
    seed: int = 0
    """random seed of the choice of images and of every draw"""
    json: Path | None = None
    """file to write the figures to"""
    device: Device = "auto"

    def check(self) -> None:
        check_least(self, samples=1, images=1, naive=0)
        check_seed(self.seed)


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "likelihood", arguments)
    asked.check()
    # Slow to import, and --help needs none of it.
    from pipelines.files import check_writable, write_json
    from pipelines.judging.comparison import converter
    from pipelines.judging.likelihood import likelihood
    from pipelines.pages.likelihood import as_table
    from pipelines.pages.tables import aligned
    from pipelines.runs.dataset import load_data
    from pipelines.runs.run import Run

    started = time.monotonic()
    if asked.json is not None:
        check_writable("--json", asked.json)
    run = Run.open(asked.run, asked.device)
    with run.locked():
        splits = load_data(run)
        result = likelihood(
            run, splits, images=asked.images, samples=asked.samples, naive=asked.naive, priors=asked.prior, seed=asked.seed
        )
    table = as_table(result)
    say(run.title, *aligned(table.columns, table.rows), *table.notes)
    if asked.json is not None:
        write_json(asked.json, {"run": run.title, **converter().unstructure(result)})
        say(f"figures: {asked.json}")
    say(f"finished in {counted(round(time.monotonic() - started), 'second')}")


if __name__ == "__main__":
    run_command(main)
