"""One stage 1 for several runs: another prior is trained on the very same encoder and decoder.

The files of stage 1, its latents and the fitted baselines are linked (hard links), not copied. So they take no more disk, either
run may be deleted, and nothing else needs to know where they came from. No file of a run is ever changed in place. Baselines
that were fitted without mirror images are not those of a run with them, and are fitted anew.
"""

import os
import shutil
from pathlib import Path

from pipelines import processes
from pipelines.console import UserError, say
from pipelines.files import aside, write_json
from pipelines.runs.config import to_dict
from pipelines.runs.parts import TAKEN_OVER, TakenOver, finished, taken_over
from pipelines.runs.run import Run, changes
from pipelines.training import checkpoints

STAGE1_SETTINGS = ("data", "precision", "stage1", "autoencoder")
"""What the encoder and the decoder depend on. The seed may differ: then it is that of stage 2 alone."""


def check_source(run: Run, source: Run) -> None:
    """Raises UserError where a run cannot take over the stage 1 of another, which its config or that stage 1 tells."""
    if source.folder.resolve() == run.folder.resolve():
        raise UserError(f"--stage1-from names the run itself, {run.folder}: give the new run another name with --run")
    theirs, ours = ({name: to_dict(each.config)[name] for name in STAGE1_SETTINGS} for each in (source, run))
    if changed := changes(theirs, ours):
        raise UserError(
            f"the stage 1 of {source.folder} does not fit ({changed}): leave these settings as they are there, or"
            " train a stage 1 of its own, without --stage1-from"
        )
    if own_stage1(run) not in (None, finished(source, "stage1").digest()):
        raise UserError(f"{run.folder} has a stage 1 already, which is not that of {source.folder}: give another name with --run")


def own_stage1(run: Run) -> str | None:
    """The digest of the stage 1 that a run has, None where it has none."""
    found = checkpoints.usable(run.folder / "stage1")
    return checkpoints.best(found).digest() if found else None


def share_stage1(run: Run, source: Run) -> None:
    """Give a run the stage 1, the latents and the fitted baselines of another. Done already, this changes nothing."""

    def share() -> None:
        fitted = ["baselines/*.safetensors"] if run.config.mirror == source.config.mirror else []
        for pattern in ("latents/stage1-*.safetensors", *fitted):
            for path in source.folder.glob(pattern):
                link(path, run.folder / path.relative_to(source.folder))
        found = checkpoints.usable(source.folder / "stage1")
        # The best one first: by it `check_source` knows what was taken over, should this be interrupted.
        for checkpoint in [checkpoints.best(found), *found]:
            target = run.folder / "stage1" / checkpoint.folder.name
            if not target.exists():  # whole or not at all, as a checkpoint is written
                target.parent.mkdir(parents=True, exist_ok=True)
                with aside(target, folder=True) as made:
                    for path in checkpoint.folder.iterdir():
                        link(path, made / path.name)
        if source.exported or taken_over(source, "stage1"):  # where the best checkpoint need not be the last
            write_json(run.folder / "stage1" / TAKEN_OVER, vars(TakenOver(source.config.stage1.steps)))
        say(f"stage 1: that of {source.folder}")

    processes.on_first(share)


def link(path: str | Path, target: str | Path) -> None:
    """A hard link; a copy where the file system has none, or the target lies on another."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
