"""A run that is trained longer than before.

A copy of the shorter run stays beside it. What depends on the longer phase is deleted.

The longer phase continues from its last checkpoint. Schedules are functions of the share of the steps that is done. So from there
on they are those of the longer training: the learning rate rises to what that has at this step, and decays again.
"""

import shutil
from pathlib import Path

from pipelines import files
from pipelines.console import UserError, say
from pipelines.runs.config import read_config
from pipelines.runs.run import PHASES, Run, longer, training_of
from pipelines.runs.sharing import link
from pipelines.training import checkpoints

AFTER = ("baselines", "compare", "likelihood", "studies")  # what is made of the weights of any phase


def keep_shorter(run: Run) -> None:
    """Where a run is trained longer than its config.json says: keep it as it was, and drop what depends on the longer phase.

    A phase that had not ended only goes on. Raises UserError where something else has the name of what is kept.
    """
    path = run.folder / "config.json"
    if not path.is_file():
        return
    before = read_config(path)
    for phase in longer(before, run.config):
        earlier, now = training_of(before, phase), training_of(run.config, phase)
        assert earlier is not None and now is not None
        steps, made = earlier.steps, checkpoints.usable(run.folder / phase)
        if steps and not (made and made[-1].step >= steps):
            continue
        aside = run.folder.with_name(f"{run.folder.name}-{PHASES[phase].config}-{steps}")
        if aside.exists() and not same(aside, run.folder):
            raise UserError(f"{run.folder} as it was would be kept as {aside}, which is there already: rename or delete that")
        if not aside.exists():
            keep(run.folder, aside)
        later = [*PHASES][[*PHASES].index(phase) + 1 :]
        gone = [name for name in (*later, *AFTER) if (run.folder / name).is_dir()]
        for name in gone:
            shutil.rmtree(run.folder / name)
        say(
            f"{run.folder}: {PHASES[phase].title} is trained on from {steps} to {now.steps} steps. The run as it was is kept as"
            f" {aside}; to be made again: {', '.join(gone) or 'nothing'}"
        )
        return


def keep(folder: Path, aside: Path) -> None:
    """A copy of a run, but for its curves; in no more room where the disk has hard links: no other file is changed in place."""
    ignored = shutil.ignore_patterns("track", ".*")
    with files.aside(aside, folder=True) as made:
        shutil.copytree(folder, made, copy_function=link, ignore=ignored, dirs_exist_ok=True)


def same(aside: Path, folder: Path) -> bool:
    """Whether a killed process has put this run there."""
    names = sorted(path.relative_to(folder) for path in (folder / "stage1").glob("step-*/checksums.json"))
    pairs = [(folder / name, aside / name) for name in (Path("config.json"), *names)]
    return all(there.is_file() and there.read_bytes() == here.read_bytes() for here, there in pairs)
