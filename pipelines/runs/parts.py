"""The networks of a run: built from its config, and loaded from its checkpoints."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pipelines import files, processes
from pipelines.console import UserError, say
from pipelines.runs.dataset import read_facts
from pipelines.runs.run import PHASES, Phase, Run, training_of
from pipelines.training import checkpoints
from pipelines.training.fit import early_step
from pipelines.training.order import seed_of
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.baselines import baselines
from stage2_prior.latents import LatentSpec
from stage2_prior.prior import Prior

Part = Literal["autoencoder", "prior"]
EARLY_PRIOR = "stage2/early.safetensors"  # what autoguidance leads away from
TAKEN_OVER = "taken-over.json"
"""in the folder of a stage 1 that came from an export"""


@dataclass(frozen=True)
class TakenOver:
    """What is known of a stage 1 that came from an export, which holds the best checkpoint alone."""

    steps: int
    """after which its training had ended"""


def specs_of(autoencoder: Autoencoder) -> list[LatentSpec]:
    return [LatentSpec(shape, vocabulary) for shape, vocabulary in autoencoder.latents]


def new_autoencoder(run: Run, image_shape: tuple[int, int, int]) -> Autoencoder:
    """Raises UserError when the network cannot take such images."""
    torch.manual_seed(seed_of(run.config.seed, 1))
    try:
        autoencoder = run.config.autoencoder.build(image_shape)
        specs_of(autoencoder)
    except ValueError as error:
        raise UserError(str(error)) from error
    return autoencoder


def new_prior(run: Run, specs: list[LatentSpec], classes: int) -> Prior:
    """classes: number of labels. Raises UserError when its parts do not fit the latents or the data set."""
    torch.manual_seed(seed_of(run.config.seed, 2))
    try:
        return run.config.prior.build(specs, classes)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_autoencoder(run: Run) -> Autoencoder:
    """Raises UserError when stage 1 is not finished, nor refined where the config asks for it."""
    autoencoder = new_autoencoder(run, read_facts(run).image_shape)
    load(run, autoencoder, "autoencoder")
    return autoencoder


def check_density(run: Run, autoencoder: Autoencoder) -> None:
    """Raises UserError where the encoder has no density q(z|x)."""
    if not autoencoder.bottleneck.has_density:
        raise UserError(
            f"{run.folder} has a deterministic encoder: there is no density q(z|x), so no bound on log p(x) and no score"
        )


def load_prior(run: Run, specs: list[LatentSpec]) -> Prior:
    """Raises UserError when stage 2 is not finished, nor refined where the config asks for it, or there is none."""
    if not run.learned:
        raise UserError(
            f"{run.folder} has no learned prior: it was trained without a second stage (stage2.steps 0). Draw with"
            f" --prior standard, or another of {', '.join(baselines(specs))}."
        )
    classes = len(read_facts(run).label_names)
    learned = new_prior(run, specs, classes)
    load(run, learned, "prior")
    if isinstance(learned, LearnedPrior) and (early := early_prior(run)) is not None:
        guide(run, learned, early)
    return learned


def early_prior(run: Run) -> Path | None:
    """The weights that autoguidance leads away from, where there are any.

    Refined, the prior is one of other latents than early on; and the best checkpoint may be no later than the early one.
    """
    path = run.folder / EARLY_PRIOR
    usable = path.is_file() and run.config.refine is None
    return path if usable and finished(run, "stage2").step > early_step(run.config.stage2) else None


def guide(run: Run, learned: LearnedPrior, early: Path) -> None:
    """Keep the prior as it was early in its training beside it, for autoguidance. A damaged file is left out, with a warning."""
    weaker = copy.deepcopy(learned)
    try:
        checkpoints.fill(weaker, files.read_tensors(early), early)
    except UserError:
        say(f"warning: {early} is damaged, so there is no autoguidance; delete it to go on without this warning")
        return
    learned.guide_by(weaker.eval())


def load(run: Run, model: nn.Module, part: Part) -> None:
    """The weights to use. Raises UserError when they are not trained to the end, or do not fit."""
    phase = last_phase(run, part)
    found = finished(run, phase)
    tensors = found.model()
    if phase == "refined":
        tensors = {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(f"{part}.")}
    checkpoints.fill(model, tensors, found.folder)
    run.fabric.to_device(model).eval()


def last_phase(run: Run, part: Part) -> Phase:
    """The last phase that trains a part."""
    if run.config.refine is not None:
        return "refined"
    return "stage1" if part == "autoencoder" else "stage2"


def finished(run: Run, phase: Phase) -> checkpoints.Checkpoint:
    """The best checkpoint of a phase. Raises UserError when it is not trained to the end."""
    config = training_of(run.config, phase)
    assert config is not None
    found = checkpoints.usable(run.folder / phase)
    whole = run.exported or taken_over(run, phase)  # an export has the best checkpoint alone
    if not found or (found[-1].step < config.steps and not whole):
        done = f"is at step {found[-1].step} of {config.steps}" if found else "has not been trained"
        raise run.unfinished(f"{PHASES[phase].title} {done}")
    return checkpoints.best(found)


def taken_over(run: Run, phase: Phase) -> bool:
    """Whether a phase came finished from an export, and is to take no more steps."""
    path = run.folder / phase / TAKEN_OVER
    if phase != "stage1" or not path.is_file():
        return False
    return run.config.stage1.steps <= files.read_as(path, lambda values: files.structured(values, TakenOver)).steps


def weights_of(run: Run) -> dict[str, str]:
    """The digests of the weights to use, by the phase that trained them."""
    parts: tuple[Part, ...] = ("autoencoder", "prior") if run.learned else ("autoencoder",)
    phases = {last_phase(run, part) for part in parts}
    return {phase: finished(run, phase).digest() for phase in sorted(phases)}


def follow(run: Run, phase: Phase, before: Phase) -> None:
    """Put down after which weights of an earlier phase a phase is trained. Raises UserError where it was after others."""
    path, now = run.folder / phase / "after.json", {before: finished(run, before).digest()}

    def check() -> None:
        if not (path.is_file() and checkpoints.folders(path.parent)):
            files.write_json(path, now)
        elif files.read_as(path, dict) != now:
            raise UserError(
                f"{path.parent} was trained after another {PHASES[before].title} than the one that is there now: delete"
                f" {path.parent} too, to train it again"
            )

    processes.on_first(check)
