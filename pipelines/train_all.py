"""python -m pipelines.train_all [PRESET]: train stage 1, encode, fit stage 2, sample and compare.

The same command again goes on where it was: finished parts are skipped, an interrupted one resumes from its checkpoint.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.console import UserError, first_process, run_command, say
from pipelines.judging.features import inception
from pipelines.pages.report import finished_comparison
from pipelines.pages.tables import table
from pipelines.runs.config import RunConfig
from pipelines.runs.phases import DEFAULTS, Options, train
from pipelines.runs.recipes import DEFAULT_PRESET, PRESETS, preset
from pipelines.runs.run import CHECKPOINTS, Run


def parse(arguments: list[str]) -> tuple[str, RunConfig, Options]:
    """The run's name, its config, and the options, from the command line."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else DEFAULT_PRESET
    default = preset(name)

    @dataclass(frozen=True)
    class Arguments:
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = default
        run: str = name
        """name of the run, a folder under checkpoints/, or a path; the preset's name when not given"""
        options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS

    presets = "\n".join(f"  {key:15} {description}" for key, (description, _) in PRESETS.items())
    asked = tyro.cli(
        Arguments,
        prog=f"python -m pipelines.train_all {name}",
        description=f"Train both stages, sample and compare. Presets:\n\n{presets}",
        args=arguments[1:] if named else arguments,
        config=(tyro.conf.AvoidSubcommands,),
        console_outputs=first_process(),
    )
    config = asked.config
    if config.refine is not None and config.refine.steps == 0:
        config = replace(config, refine=None)
    return asked.run, config, asked.options


def train_all(run: Run, options: Options = DEFAULTS) -> None:
    """Every part of a run that is not finished yet. Raises UserError when another process works on it."""
    started = time.monotonic()
    if run.config.metrics.extractor == "inception":  # what is missing is said before hours of training, not after
        with run.fabric.rank_zero_first(local=True):  # which may download it
            inception(run.config.metrics.weights)
    splits = train(run, options)
    with run.locked():
        comparison = finished_comparison(run, splits)
    say(table(comparison))
    guided = comparison.priors.get("guided")
    how = "" if guided is None else f" --guidance {guided.guidance:g}"
    say(
        f"everything lies in {run.folder}; look at {run.folder / 'compare' / 'page.html'};"
        f" more samples: python -m pipelines.generate {run.name} --prior {comparison.generator}{how} --count 64 --out samples.png"
    )
    say(f"{time.monotonic() - started:.0f} seconds")


def main(arguments: list[str] | None = None) -> None:
    name, config, options = parse(sys.argv[1:] if arguments is None else arguments)
    if Path(name).name in ("", ".."):
        raise UserError(f"--run names a folder for the run, which {name!r} does not")
    folder = Path(name) if "/" in name or os.sep in name else CHECKPOINTS / name
    train_all(Run.create(folder, config, options.device), options)


if __name__ == "__main__":
    run_command(main)
