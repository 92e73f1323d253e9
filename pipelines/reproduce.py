"""python -m pipelines.reproduce [COMMAND …]: train presets on several seeds, and put their figures into docs/results.json.

The tables of README.md and docs/results.md are made of that file. The same command again goes on where it was.
"""

import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from pipelines.console import UserError, first_process, run_command, say

if TYPE_CHECKING:
    from pipelines.pages.results import Training

PUBLISHED = {
    "mnist5k": (0,),
    "mnist5k --prior.condition none": (0,),
    "fashion-mnist": (0,),
}
"""What README and docs report: by what stands after train_all, the seeds."""
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.json"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")


@dataclass(frozen=True)
class Arguments:
    """Train presets on several seeds, compare, and make the tables of README and docs of the figures."""

    commands: tyro.conf.Positional[tuple[str, ...]] = ()
    """presets, each with its overrides in one pair of quotes; all that README and docs report where none is named"""
    seeds: tuple[int, ...] | None = None
    """of each; those that README and docs report where none are given"""
    data: Path | None = None
    """where the images lie or are downloaded to: the --data.root of each training that has one"""
    tables: bool = False
    """train nothing: only make the tables anew from docs/results.json"""


def main(arguments: list[str] | None = None) -> None:
    asked = tyro.cli(Arguments, prog="python -m pipelines.reproduce", args=arguments, console_outputs=first_process())
    if not DOCUMENTS[0].is_file():
        raise UserError(
            "reproduce writes into README.md and docs/: run it in a clone of the repository, installed with pip install -e ."
        )
    if not asked.tables:
        for command in asked.commands or PUBLISHED:
            for seed in asked.seeds or PUBLISHED.get(command, (0,)):
                reproduce(command, seed, asked.data)
    write_tables()


def reproduce(command: str, seed: int, data: Path | None) -> None:
    """Train what is not trained yet, and put its figures into docs/results.json. Raises UserError where the training fails."""
    from pipelines.pages.results import read_results, with_training, write_results
    from pipelines.runs.recipes import preset

    words = shlex.split(command)
    if not words:
        raise UserError("an empty command names no preset")
    folder = Path("checkpoints") / "reproduce" / f"{re.sub('[^a-z0-9]+', '-', command.lower())}-seed-{seed}"
    has_folder = hasattr(preset(words[0]).data, "root")  # mnist5k's images come with a package
    where = ["--data.root", str(data)] if has_folder and data is not None else []
    train = [*words, "--seed", str(seed), "--run", str(folder), *where]
    say(f"python -m pipelines.train_all {shlex.join(train)}")
    code = subprocess.run([sys.executable, "-m", "pipelines.train_all", *train]).returncode
    if code:
        raise UserError(f"the training of {command!r} on seed {seed} ended with exit code {code}, for the reason above")
    write_results(RESULTS, with_training(read_results(RESULTS), training_of(folder, command, seed)))


def training_of(folder: Path, command: str, seed: int) -> "Training":
    """A finished run's figures, with what it was made by."""
    from pipelines.files import read_as
    from pipelines.judging.comparison import read_comparison
    from pipelines.pages.report import Timing
    from pipelines.pages.results import Training

    comparison = read_comparison(folder / "compare" / "metrics.json")
    timing = read_as(folder / "compare" / "timing.json", Timing)
    seconds = timing.seconds_of_training | {"comparison": timing.seconds}
    return Training.of(command, seed, comparison, seconds, commit(), hardware())


def commit() -> str:
    """Of the code, with a + where files were changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The model of the CPU, as the system names it."""
    try:
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def write_tables() -> None:
    """The tables of README and docs, made anew from docs/results.json."""
    from pipelines.files import write_file
    from pipelines.pages.results import read_results, written

    trainings = read_results(RESULTS)
    for document in DOCUMENTS:
        write_file(document, written(document.read_text(), trainings).encode())
        say(f"tables of {document}")


if __name__ == "__main__":
    run_command(main)
