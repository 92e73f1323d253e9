"""python -m pipelines.reproduce [COMMAND …]: train presets on several seeds, and put their figures into docs/results.json.

Other priors on the decoder of some of them, too. The tables of README.md and docs are made of that file. The same command again
goes on where it was.
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

from pipelines.command_line import read_arguments
from pipelines.console import UserError, run_command, say

if TYPE_CHECKING:
    from pipelines.pages.results import Training

PUBLISHED = {
    "mnist5k": (0, 1, 2),
    "mnist5k --prior.condition cluster": (0, 1, 2),
    "mnist5k --prior.condition none": (0, 1, 2),
    "mnist5k-plain": (0,),
    "mnist5k-givt": (0,),
    "fashion-mnist": (0, 1),
    "mnist": (0, 1),
    "mnist5k-vqvae": (0,),
    "mnist5k-vqvae2": (0,),
    "mnist-vqvae2": (0,),
    "fashion-vqvae2": (0,),
    "mnist5k-dalle": (0,),
    "folder --data.size 32 --prior.condition class-label": (0,),
    "folder-vqvae2 --data.size 32 --prior.condition class-label --mirror": (0,),
}
"""What README and docs report: by what stands after train_all, the seeds."""
RIVALS = {
    ("mnist5k --prior.condition none", 0): (
        "--prior.backbone pixelcnn",
        "--prior.backbone transformer",
        "--prior flow",
        "--prior vamp --stage2.steps 6000",
        "--prior second-vae --stage2.steps 6000",
    ),
    ("mnist", 1): (
        "--prior.backbone pixelcnn",
        "--prior.backbone transformer --stage2.learning-rate 1e-3",
        "--prior vamp --stage2.steps 24000",
        "--prior second-vae --stage2.steps 24000",
        "--prior flow",
    ),
    ("fashion-mnist", 1): (
        "--prior.backbone pixelcnn",
        "--prior.backbone transformer --stage2.learning-rate 1e-3",
        "--prior vamp --stage2.steps 24000",
        "--prior second-vae --stage2.steps 24000",
        "--prior flow --stage2.steps 3000",
    ),
}
"""Priors that are trained on the decoder of a command and seed, too: by what stands after train_all --stage1-from."""
JPEG = "cifar10-jpg"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.json"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "priors.md")


@dataclass(frozen=True)
class Arguments:
    """Train presets with several seeds, compare them, and write the tables of README and docs from the figures."""

    commands: tyro.conf.Positional[tuple[str, ...]] = ()
    """presets, each with its overrides in quotes; by default all that README and docs report"""
    seeds: tuple[int, ...] | None = None
    """random seeds of each preset, such as --seeds 0 1; by default those that README and docs report"""
    data: Path | None = None
    """folder with the images, or to download them to: the --data.root of each training that has one; for `folder` its subfolder
    cifar10-jpg, with CIFAR-10 as JPEG files in train/LABEL/ and test/LABEL/"""
    tables: bool = False
    """train nothing: only write the tables again from docs/results.json"""


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "reproduce", arguments)
    if not DOCUMENTS[0].is_file():
        raise UserError(
            "reproduce writes into README.md and docs/: run it in a clone of the repository, installed with pip install -e ."
        )
    if not asked.tables:
        for command in asked.commands or PUBLISHED:
            seeds = asked.seeds or PUBLISHED.get(command, (0,))
            for seed in seeds:
                reproduce(command, seed, asked.data)
                if (command, seed) in RIVALS:
                    rank(command, seed, RIVALS[command, seed])
    write_tables()


def reproduce(command: str, seed: int, data: Path | None) -> None:
    """Train what is not trained yet, and put its figures into docs/results.json. Raises UserError where the training fails."""
    from pipelines.data.sets import Folder
    from pipelines.pages.results import read_results, write_results
    from pipelines.runs.recipes import preset

    words = shlex.split(command)
    if not words:
        raise UserError("an empty command names no preset")
    folder = folder_of(command, seed)
    source = preset(words[0]).data
    where = []
    if data is not None and hasattr(source, "root"):  # mnist5k's images come with a package
        where = ["--data.root", str(data / JPEG if isinstance(source, Folder) else data)]
    called("train_all", [*words, "--seed", str(seed), "--run", str(folder), *where])
    write_results(RESULTS, read_results(RESULTS).with_training(training_of(folder, command, seed)))


def folder_of(command: str, seed: int) -> Path:
    """The folder of a run."""
    return Path("checkpoints") / "reproduce" / f"{re.sub('[^a-z0-9]+', '-', command.lower())}-seed-{seed}"


def called(module: str, arguments: list[str]) -> None:
    """Another command of this package, to its end. Raises UserError where it fails."""
    say(f"python -m pipelines.{module} {shlex.join(arguments)}")
    code = subprocess.run([sys.executable, "-m", f"pipelines.{module}", *arguments]).returncode
    if code:
        raise UserError(f"pipelines.{module} {shlex.join(arguments)} ended with exit code {code}, for the reason above")


def rank(command: str, seed: int, rivals: tuple[str, ...]) -> None:
    """Train other priors on the decoder of a finished training, compare all, and put the ranking into docs/results.json."""
    from pipelines.files import read_as, structured
    from pipelines.judging.together import Standing
    from pipelines.pages.results import Ranking, read_results, write_results

    first = folder_of(command, seed)
    folders = [folder_of(f"{command} {rival}", seed) for rival in rivals]
    for rival, folder in zip(rivals, folders):
        how = ["--stage1-from", str(first), *shlex.split(rival), "--seed", str(seed)]
        called("train_all", [*how, "--run", str(folder), "--no-compare"])
    page = first.with_name(f"{first.name}-priors.html")
    called("compare", [str(first), *map(str, folders), "--out", str(page)])
    (found,) = read_as(page.with_suffix(".json"), lambda found: found["rankings"])
    ranking = Ranking(command, seed, [structured(standing, Standing) for standing in found], commit(), hardware())
    write_results(RESULTS, read_results(RESULTS).with_ranking(ranking))


def training_of(folder: Path, command: str, seed: int) -> "Training":
    """A finished run's figures, with what it was made by."""
    from pipelines.files import read_as, structured
    from pipelines.judging.comparison import read_comparison
    from pipelines.pages.report import Timing
    from pipelines.pages.results import Training

    comparison = read_comparison(folder / "compare" / "metrics.json")
    timing = read_as(folder / "compare" / "timing.json", lambda values: structured(values, Timing))
    seconds = timing.seconds_of_training | {"comparison": timing.seconds}
    return Training.of(command, seed, comparison, seconds, commit(), hardware())


def commit() -> str:
    """The commit of the code, with a + where files were changed since; the figures and their tables do not count."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs", ":!README.md")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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

    results = read_results(RESULTS)
    for document in DOCUMENTS:
        write_file(document, written(document.read_text(), results).encode())
        say(f"tables of {document}")


if __name__ == "__main__":
    run_command(main)
