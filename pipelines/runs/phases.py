"""The phases of a run, one after the other; each goes on where it was."""

from dataclasses import dataclass
from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pipelines.console import UserError, say
from pipelines.data import captions
from pipelines.data.images import Splits
from pipelines.runs.run import EARLY_PRIOR, Run
from pipelines.training.devices import devices
from pipelines.training.fit import OnNan, fit
from pipelines.training.refine import TwoStage
from pipelines.training.trackers import GRID_COLUMNS as SHOWN
from pipelines.training.trackers import TrackerKind, Tracking
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.conditions import Caption
from stage2_prior.latents import LatentDataset, LatentSpec


@dataclass(frozen=True)
class Options:
    """How to run: no part of the config, and free to change when a run goes on."""

    device: str = "auto"
    """auto, cpu, cuda or mps"""
    on_nan: OnNan = "stop"
    """when a loss or gradient is not a number: stop before it touches a weight, skip the step, or rewind to the last
    checkpoint and go on with another data order and other noise"""
    tracker: TrackerKind = "none"
    """where curves and pictures of the training go, under RUN/track: csv, tensorboard or wandb"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """under torchrun, what each process holds of the prior in training: ddp all of it, fsdp a share of its weights, gradients
    and optimizer (FSDP2), for a prior larger than one device trains"""


DEFAULTS = Options()


def train(run: Run, options: Options = DEFAULTS) -> Splits:
    """Every phase of a run that is not finished yet; returns the data. Raises UserError when another process works on the run."""
    tracking = Tracking(options.tracker, run.folder)
    sharded = options.strategy == "fsdp"
    prior_fabric = devices(options.device, run.config.precision, sharded) if sharded else run.fabric
    if isinstance(run.condition, Caption):  # what is missing is said before hours of training, not after
        captions.library()
    splits = run.data()
    autoencoder = run.new_autoencoder(splits.image_shape)
    prior = run.new_prior(run.specs(autoencoder), len(splits.label_names))
    if run.config.refine is not None:
        if not run.learned:
            raise UserError("refining is under a learned prior: it needs stage2.steps above 0")
        try:
            TwoStage(autoencoder, prior)
        except ValueError as error:
            raise UserError(str(error)) from error
    with run.locked():  # only now: a config that cannot be built leaves nothing behind
        finish(run, splits, autoencoder, prior, prior_fabric, options.on_nan, tracking)
    return splits


def finish(
    run: Run,
    splits: Splits,
    autoencoder: Autoencoder,
    prior: LearnedPrior,
    prior_fabric: Fabric,
    on_nan: OnNan,
    tracking: Tracking,
) -> None:
    config, fabric = run.config, run.fabric
    run.write_facts(splits)
    say(f"{run.folder}: {len(splits.train)} training, {len(splits.validation)} validation, {len(splits.test)} test images")
    images, folder = (run.examples(splits.train), splits.validation), run.folder
    (shown,) = fabric.to_device(splits.validation[slice(SHOWN)])

    def reconstructions(model: Autoencoder) -> dict[str, Tensor]:
        return {"reconstructions": torch.cat([shown, model.render(model.mean(model.encode(shown)))])}

    def samples(model: LearnedPrior, decoder: Autoencoder = autoencoder) -> dict[str, Tensor]:
        return {"samples": decoder.render(model.sample(torch.arange(SHOWN, device=fabric.device), seed=0))}

    def both(model: TwoStage) -> dict[str, Tensor]:
        return reconstructions(model.autoencoder) | samples(model.prior, model.autoencoder)

    tracker = tracking.stage("stage1", reconstructions)
    fit(fabric, autoencoder, *images, config.stage1, config.seed, folder / "stage1", "stage 1", on_nan, tracker)
    train = run.encode_training(autoencoder, splits.train, "stage1")
    validation = run.encode(autoencoder, splits.validation, "validation", "stage1")
    warn_of_unused_codes(train, run.specs(autoencoder))
    if run.learned:
        run.follow("stage2", "stage1")
        prior.estimate(train)
        # From a sharded prior, no process could sample alone.
        tracker = tracking.stage("stage2", samples if prior_fabric is fabric else lambda model: {})
        places = folder / "stage2", "stage 2", on_nan, tracker, folder / EARLY_PRIOR
        fit(prior_fabric, prior, train, validation, config.stage2, config.seed, *places)
    else:
        say("stage 2: none, stage2.steps is 0")
    if config.refine is not None:
        run.follow("refined", "stage2")
        model = TwoStage(autoencoder, prior)
        tracker = tracking.stage("refined", both)
        fit(fabric, model, *images, config.refine, config.seed, folder / "refined", "refining both", on_nan, tracker)
        run.encode_training(autoencoder, splits.train)


def warn_of_unused_codes(latents: LatentDataset, specs: list[LatentSpec]) -> None:
    """A codebook that the data cannot fill, or that has collapsed, wastes what the prior has to learn."""
    for spec, posterior in zip(specs, latents.sample()):
        if spec.vocabulary is not None:
            used = len(posterior["codes"].unique())
            if used < spec.vocabulary / 2:
                say(
                    f"warning: the training images use {used} of {spec.vocabulary} codes on the {spec.grid[0]}×{spec.grid[1]}"
                    " grid; a smaller codebook would do"
                )
