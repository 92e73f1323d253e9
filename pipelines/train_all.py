"""python -m pipelines.train_all [PRESET]: train stage 1, encode, fit stage 2, sample and compare.

The same command again continues: finished parts are skipped, an interrupted one resumes from its checkpoint.
"""

import difflib
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import UserError, counted, first_process, run_command, say
from pipelines.runs.names import DATA, DEFAULT_PRESET, RECIPES, preset_name

if TYPE_CHECKING:  # --help without a preset needs none of it
    from pipelines.judging.comparison import Comparison
    from pipelines.runs.config import RunConfig
    from pipelines.runs.options import Options
    from pipelines.runs.run import Run

OF_NAMES = ("--run", "--config", "--stage1-from")  # options after which a name is no preset's
HELP = f"""usage: python -m pipelines.train_all [PRESET] [--run NAME] [--config FILE] [overrides]

Train both stages, sample and compare. PRESET is DATA or DATA-RECIPE, {DEFAULT_PRESET} where none is given.

DATA
{{data}}

RECIPE
{{recipes}}

--run NAME       name of the run's folder under checkpoints/, or a path; by default the preset's name. Without a PRESET,
                 an existing run is continued, and a new one begins with the preset of that name, or {DEFAULT_PRESET}
--config FILE    use the config.json of any run in place of a preset
--stage1-from RUN  reuse the stage 1 of another run and train only the prior; without a PRESET, with RUN's settings
--no-compare     train only; python -m pipelines.compare RUN compares later, also several runs
--device {{{{auto,cpu,cuda,mps}}}}   --tracker {{{{none,csv,tensorboard,wandb}}}}   --on-nan {{{{stop,skip,rewind}}}}
--seed, --mirror, --stage1.steps, --stage2.steps, --autoencoder.bottleneck KIND, --prior.backbone KIND, and so on:
python -m pipelines.train_all PRESET --help   lists every setting with its meaning, unit and default, and all kinds of parts"""


def parse(arguments: list[str]) -> "tuple[str, RunConfig, Options]":
    """The run's name, its config, and the options, from the command line."""
    from pipelines.runs.config import RunConfig
    from pipelines.runs.kinds import choices, choose_kinds
    from pipelines.runs.options import DEFAULTS, Options
    from pipelines.runs.run import folder_of
    from pipelines.runs.whereabouts import check, options_in

    preset = arguments[0] if arguments and not arguments[0].startswith("-") else None
    name, default, left = beginning(preset, arguments if preset is None else arguments[1:])
    default, left = choose_kinds(default, left)

    @dataclass(frozen=True)
    class Arguments:
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = default
        run: str = name
        """name of the run's folder under checkpoints/, or a path; by default the preset's name"""
        options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS

    kinds = "\n".join(f"  --{path.replace('_', '-')} {{{','.join(kinds)}}}" for path, kinds in choices(default).items())
    asked = read_arguments(
        Arguments,
        f"train_all {preset or ''}".rstrip(),
        left,
        description=f"Train both stages, sample and compare. Kinds of parts, each with settings of its own:\n\n{kinds}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    check(asked.config, folder_of(asked.run), given=options_in(arguments))
    return asked.run, asked.config, asked.options


def beginning(preset_asked: str | None, arguments: list[str]) -> "tuple[str, RunConfig, list[str]]":
    """What the overrides are applied to: the run's name, the config of a preset, a file or a run, and the arguments left.

    Raises UserError where both a preset and a file are named, or a run that shares a stage 1 is not.
    """
    from pipelines.runs.config import read_config
    from pipelines.runs.recipes import parts_of, preset
    from pipelines.runs.run import Run, folder_of

    file, left = taken("--config", arguments)
    if file is not None and preset_asked is not None:
        raise UserError(f"name a preset or --config FILE, not both: {preset_asked} and {file}")
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"there is no file {path}: --config takes the config.json of a run")
        return path.resolve().parent.name, read_config(path), left
    if preset_asked is None:
        name, _ = taken("--run", arguments)
        begun = folder_of(name) / "config.json" if name else None
        if name and begun is not None and begun.is_file():
            return name, read_config(begun), left
        if (source := taken("--stage1-from", arguments)[0]) is not None:
            if name is None:
                raise UserError("--stage1-from begins a new run: name it with --run NAME")
            return name, Run.open(source, "cpu").config, left
        check_first_preset(name, arguments)
        preset_asked = named_as(name)
    asked = preset_asked or DEFAULT_PRESET
    return preset_name(*parts_of(asked)), preset(asked), left


def check_first_preset(name: str | None, arguments: list[str]) -> None:
    """Raises UserError where no preset is named first, but one is named later, or a run that is not there, but one like it."""
    from pipelines.runs.run import folder_of

    for index, argument in enumerate(arguments):
        if is_preset(argument) and (index == 0 or arguments[index - 1] not in OF_NAMES):
            others = arguments[:index] + arguments[index + 1 :]
            raise UserError(f"the preset comes first: python -m pipelines.train_all {argument} {shlex.join(others)}")
    if name is None:
        return
    begun_with = named_as(name)
    known = [path.parent.name for path in folder_of(name).parent.glob("*/config.json")]
    close = difflib.get_close_matches(Path(name).name, known, n=1, cutoff=0.7)
    if close and begun_with is None:
        raise UserError(
            f"there is no run {name!r} - did you mean {close[0]!r}? A new run of that name begins when a preset is named too:"
            f" python -m pipelines.train_all {DEFAULT_PRESET} {shlex.join(arguments)}"
        )
    say(f"there is no run {name!r} yet: it is begun with the preset {begun_with or DEFAULT_PRESET}")


def named_as(run: str | None) -> str | None:
    """The preset whose name a run has; None where there is none."""
    name = Path(run or "").name
    return name if is_preset(name) else None


def is_preset(name: str) -> bool:
    from pipelines.runs.recipes import parts_of

    try:
        return not name.startswith("-") and bool(parts_of(name))
    except UserError:
        return False


def taken(option: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option, None where it is not given, and the other arguments."""
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2], arguments[:index] + arguments[index + 1 :]
        if argument == option and index + 1 == len(arguments):
            raise UserError(f"{option} needs a value after it")
        if argument == option:
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


def short_help() -> str:
    def listed(names: dict[str, str]) -> str:
        return "\n".join(f"  {name:14} {says}" for name, says in names.items())

    return HELP.format(data=listed(DATA), recipes=listed(RECIPES))


def train_all(run: "Run", options: "Options | None" = None) -> None:
    """Every part of a run that is not finished yet, its comparison included.

    Raises UserError when another process works on it.
    """
    from pipelines.judging.published import PUBLISHED, published
    from pipelines.pages.diagnosis import diagnosis
    from pipelines.pages.report import finished_comparison
    from pipelines.pages.tables import table
    from pipelines.runs.options import DEFAULTS
    from pipelines.runs.phases import train

    started, options = time.monotonic(), options or DEFAULTS
    if run.config.metrics.extractor in PUBLISHED:  # what is missing is said before hours of training, not after
        with run.fabric.rank_zero_first(local=True):  # which may download it
            published(run.config.metrics.extractor, run.config.metrics.weights)
    splits = train(run, options)
    if not options.compare:
        say(f"trained; compare its priors: python -m pipelines.compare {shlex.quote(run.name)}")
        return
    with run.locked():
        comparison = finished_comparison(run, splits)
    say(*table(comparison))
    say(*diagnosis(run, comparison))
    say(
        f"page to look at: {run.folder / 'compare' / 'page.html'}",
        f"more samples: {command_to_draw(run, comparison)}",
        f"finished in {counted(round(time.monotonic() - started), 'second')}",
    )


def command_to_draw(run: "Run", comparison: "Comparison") -> str:
    """The command that draws from a run in the best way that its comparison has found."""
    from pipelines.runs.dataset import read_facts
    from stage2_prior.sampling import AS_FITTED

    best = comparison.recommended or comparison.generator
    how = comparison.priors[best].sampling or AS_FITTED
    words = ["python", "-m", "pipelines.generate", run.name, *(["--tuned"] if best == "tuned" else ["--prior", best])]
    if how.guidance and run.conditioned_on == "caption":  # there is no guidance without one
        words += ["--caption", next(iter(read_facts(run).caption_examples), "…")]
    return shlex.join([*words, "--count", "64", "--out", "samples.png"])


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and {*arguments} <= {"--help", "-h"}:
        if first_process():
            print(short_help())
        return
    name, config, options = parse(arguments)
    if Path(name).name in ("", ".."):
        raise UserError(f"--run names a folder for the run, which {name!r} does not")
    from pipelines.runs.run import Run, folder_of

    train_all(Run.create(folder_of(name), config, options.device), options)


if __name__ == "__main__":
    run_command(main)
