"""python -m pipelines.train_all [PRESET]: train stage 1, encode, fit stage 2, sample and compare.

The same command again goes on where it was: finished parts are skipped, an interrupted one resumes from its checkpoint.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from lightning_fabric import Fabric
from torch import Tensor

from pipelines import captions, ranks
from pipelines.checkpoint import read_json
from pipelines.compare import compare
from pipelines.config import PRESETS, RunConfig, preset
from pipelines.console import UserError, first_process, run_command, say
from pipelines.data import Splits
from pipelines.fit import OnNan, fit
from pipelines.metrics import inception
from pipelines.refine import TwoStage
from pipelines.report import generator, table
from pipelines.run import CHECKPOINTS, Run, devices
from pipelines.track import GRID_COLUMNS as SHOWN
from pipelines.track import TrackerKind, Tracking
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.conditions import Caption
from stage2_prior.latents import LatentDataset, LatentSpec

DEFAULT_PRESET = "mnist5k"


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


def train_all(run: Run, options: Options = Options()) -> None:
    """Every part of a run that is not finished yet. Raises UserError when another process works on it."""
    tracking = Tracking(options.tracker, run.folder)
    sharded = options.strategy == "fsdp"
    prior_fabric = devices(options.device, run.config.precision, sharded) if sharded else run.fabric
    started = time.monotonic()
    if isinstance(run.condition, Caption):  # what is missing is said before hours of training, not after
        captions.library()
    if run.config.metrics.extractor == "inception":
        with run.fabric.rank_zero_first(local=True):  # which may download it
            inception(run.config.metrics.weights)
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
    say(f"{time.monotonic() - started:.0f} seconds")


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
        fit(prior_fabric, prior, train, validation, config.stage2, config.seed, folder / "stage2", "stage 2", on_nan, tracker)
    else:
        say("stage 2: none, stage2.steps is 0")
    if config.refine is not None:
        run.follow("refined", "stage2")
        model = TwoStage(autoencoder, prior)
        tracker = tracking.stage("refined", both)
        fit(fabric, model, *images, config.refine, config.seed, folder / "refined", "refining both", on_nan, tracker)
        run.encode_training(autoencoder, splits.train)
    path = run.folder / "compare" / "metrics.json"
    metrics, weights = read_json(path) if ranks.on_first(path.exists) else {}, run.weights()
    if metrics and asked_for(metrics, config, weights):
        say("compare: finished, skipped")
    else:
        metrics, _ = compare(run, splits)
    say(table(metrics))
    guided = metrics["priors"].get("guided", {})
    how = f" --guidance {guided['guidance']:g}" if guided else ""
    say(
        f"everything lies in {run.folder}; look at {run.folder / 'compare' / 'page.html'};"
        f" more samples: python -m pipelines.generate {run.name} --prior {generator(metrics)}{how} --count 64 --out samples.png"
    )


def asked_for(metrics: dict[str, Any], config: RunConfig, weights: dict[str, str]) -> bool:
    """Whether a comparison is of these weights, and not one made with another --seed or --metrics.extractor."""
    by_inception = metrics["features"]["extractor"].startswith("inception")
    as_configured = metrics["seed"] == 0 and by_inception == (config.metrics.extractor == "inception")
    return as_configured and metrics.get("weights", weights) == weights  # of an earlier version there are none


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
        options: Annotated[Options, tyro.conf.arg(name="")] = Options()

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


def main(arguments: list[str] | None = None) -> None:
    name, config, options = parse(sys.argv[1:] if arguments is None else arguments)
    if Path(name).name in ("", ".."):
        raise UserError(f"--run names a folder for the run, which {name!r} does not")
    folder = Path(name) if "/" in name or os.sep in name else CHECKPOINTS / name
    train_all(Run.create(folder, config, options.device), options)


if __name__ == "__main__":
    run_command(main)
