"""The phases of a run's training, one after the other; each goes on where it was, and a finished one is skipped."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines import processes
from pipelines.console import UserError, say
from pipelines.data import captions
from pipelines.data.images import Mirrored, Splits
from pipelines.runs.conditions import check_captions
from pipelines.runs.dataset import load_data, refuse_other_images, write_facts
from pipelines.runs.latents import encode, encode_training
from pipelines.runs.longer import keep_shorter
from pipelines.runs.options import DEFAULTS, Options
from pipelines.runs.parts import EARLY_PRIOR, finished, follow, new_autoencoder, new_prior, specs_of, taken_over
from pipelines.runs.run import PHASES, Phase, Run, training_of
from pipelines.runs.sharing import check_source, share_stage1
from pipelines.training import checkpoints
from pipelines.training.config import OnNan
from pipelines.training.devices import open_fabric, resolved
from pipelines.training.fabric import Fabric
from pipelines.training.fit import evaluate, fit
from pipelines.training.order import Source
from pipelines.training.refine import BothStages
from pipelines.training.trackers import GRID_COLUMNS, Draw, Tracking
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.baselines import baselines
from stage2_prior.conditions import Caption, CaptionCondition
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.prior import Prior

BESIDE = {"standard": "N(0, I)", "gaussian": "Gaussian"}
BESIDE_CODES = {"standard": "uniform", "unigram": "unigram"}
"""Baselines whose loss stands beside that of stage 2, with what they are called there."""
CHECKPOINTED = 8  # copies of the weights: in two checkpoints the average, the weights and the optimizer's two


def train(run: Run, options: Options = DEFAULTS) -> Splits:
    """Every phase of a run that is not finished yet; returns the data. Raises UserError when another process works on the run."""
    tracking = Tracking(options.tracker, run.folder)
    sharded = options.strategy == "fsdp"
    prior_fabric = open_fabric(options.device, run.config.precision, sharded) if sharded else run.fabric
    if isinstance(run.condition, Caption):  # what is missing is said before hours of training, not after
        captions.library()
    source = None if options.stage1_from is None else Run.open(options.stage1_from, options.device)
    if source is not None:
        check_source(run, source)
    splits = load_data(run)
    if source is not None:
        refuse_other_images(source, splits)
    autoencoder = new_autoencoder(run, splits.image_shape)
    prior = new_prior(run, specs_of(autoencoder), len(splits.label_names))
    if run.config.refine is not None:
        check_refining(run, autoencoder, prior)
    check_room(run, autoencoder, prior, splits)
    with run.locked():  # only now: a config that cannot be built leaves nothing behind
        processes.on_first(lambda: keep_shorter(run))
        write_facts(run, splits)
        check_captions(run, splits.train)
        if source is not None:
            share_stage1(run, source)
        warn_of_slow_precision(run, options.device)
        parts = (
            f"{len(splits.train)} images for training, {len(splits.validation)} for validation, {len(splits.test)} for the test"
        )
        say(f"{run.folder}: {parts}")
        phases = Phases(run, splits, options.on_nan, tracking)
        phases.train_autoencoder(autoencoder)
        train_latents, validation_latents = phases.encode(autoencoder)
        if run.learned:
            phases.train_prior(prior, train_latents, validation_latents, autoencoder, prior_fabric)
        else:
            say("stage 2: not trained, since stage2.steps is 0")
        if run.config.refine is not None:
            phases.refine(autoencoder, prior)
    return splits


def check_room(run: Run, autoencoder: Autoencoder, prior: Prior, splits: Splits) -> None:
    """Raises UserError where the disk has no room for what a new run writes: checkpoints, and the latents of every image."""
    if (run.folder / "stage1").exists():  # what is there already cannot be told from what is missing
        return
    images = sum(splits.sizes.values()) + len(splits.train) * run.config.mirror
    latents = 8 * images * sum(spec.dimensions for spec in specs_of(autoencoder))  # mean and std, or a code of 64 bits
    weights = 4 * sum(parameter.numel() for model in (autoencoder, prior) for parameter in model.parameters())
    needed = latents + CHECKPOINTED * weights
    place = next(place for place in run.folder.absolute().parents if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        whole, of_latents, there = (f"{size / 2**30:.2g}" for size in (needed, latents, free))
        raise UserError(
            f"{run.folder} needs about {whole} GiB, {of_latents} of them for latents, and {there} are free on the disk of {place}"
            ": make room, or name another place with --run"
        )


def warn_of_slow_precision(run: Run, device: str) -> None:
    if run.config.precision == "bfloat16" and resolved("auto", device) != "bfloat16":
        say(
            f"warning: {run.folder} is trained in bfloat16, which this device does not support natively: it goes on in it, but"
            " slowly. Another run with --precision float32 is faster here."
        )


def check_refining(run: Run, autoencoder: Autoencoder, prior: Prior) -> None:
    """Raises UserError where the two cannot be trained on together."""
    if not run.learned:
        raise UserError("refining is under a learned prior: it needs stage2.steps above 0")
    if not isinstance(prior, LearnedPrior):
        raise UserError(
            "only an autoregressive prior is refined together with stage 1: leave out --prior, or use --refine.steps 0"
        )
    try:
        BothStages(autoencoder, prior)
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class Phases:
    """What the phases of one training share."""

    run: Run
    splits: Splits
    on_nan: OnNan
    tracking: Tracking

    def train_autoencoder(self, autoencoder: Autoencoder) -> None:
        run = self.run
        if taken_over(run, "stage1"):
            finished(run, "stage1").load_into(autoencoder)
            run.fabric.to_device(autoencoder).eval()
            say("stage 1: finished, skipped")
            return
        self.fit("stage1", autoencoder, self.splits.train, self.splits.validation, self.reconstructions)

    def fit(
        self,
        phase: Phase,
        model: nn.Module,
        train: Source,
        held_out: Source,
        shown: Draw,
        fabric: Fabric | None = None,
        early: Path | None = None,
        beside: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Train the model of a phase. shown: pictures for a tracker. fabric: the run's when None. early, beside: as in `fit`."""
        run, config = self.run, training_of(self.run.config, phase)
        assert config is not None
        fit(
            run.fabric if fabric is None else fabric,
            model,
            train,
            held_out,
            config,
            seed=run.config.seed,
            folder=run.folder / phase,
            label=PHASES[phase].title,
            on_nan=self.on_nan,
            tracker=self.tracking.stage(phase, shown),
            early=early,
            beside=beside,
        )

    def encode(self, autoencoder: Autoencoder) -> tuple[LatentDataset, LatentDataset]:
        """The latents of the training and the validation images, as stage 1 encodes them."""
        train = encode_training(self.run, autoencoder, self.splits.train, "stage1")
        validation = encode(self.run, autoencoder, self.splits.validation, "validation", "stage1")
        warn_of_unused_codes(train, specs_of(autoencoder))
        return train, validation

    def train_prior(
        self,
        prior: Prior,
        train: LatentDataset,
        validation: LatentDataset,
        autoencoder: Autoencoder,
        fabric: Fabric,
    ) -> None:
        """fabric: the run's, or one over which the prior's weights are sharded."""
        run = self.run
        follow(run, "stage2", "stage1")
        if not processes.on_first(lambda: checkpoints.folders(run.folder / "stage2")):  # which hold what is estimated, too
            prior.estimate(train)

        def samples(model: Prior) -> dict[str, Tensor]:
            # From a sharded prior, no process could sample alone.
            return self.samples(model, autoencoder) if fabric is run.fabric else {}

        # Autoguidance is for autoregressive priors; and refined, it would be away from a prior of other latents.
        guided = isinstance(prior, LearnedPrior) and run.config.refine is None
        early = run.folder / EARLY_PRIOR if guided else None

        def of_baselines() -> dict[str, float]:
            """Held-out losses of priors that need no training."""
            specs, found = specs_of(autoencoder), {}
            for name, title in BESIDE_CODES.items() if specs[0].vocabulary else BESIDE.items():
                baseline = baselines(specs)[name](specs)
                baseline.estimate(train)
                run.fabric.to_device(baseline)
                found[title] = evaluate(run.fabric, baseline, validation, run.config.stage2.batch_size, run.config.seed)["loss"]
            return found

        self.fit("stage2", prior, train, validation, samples, fabric=fabric, early=early, beside=of_baselines)

    def refine(self, autoencoder: Autoencoder, prior: Prior) -> None:
        """Train both on together, and encode the training images anew."""
        run = self.run
        assert run.config.refine is not None and isinstance(prior, LearnedPrior)
        follow(run, "refined", "stage2")

        def both(model: BothStages) -> dict[str, Tensor]:
            return self.reconstructions(model.autoencoder) | self.samples(model.prior, model.autoencoder)

        train = Mirrored(self.splits.train) if run.config.mirror else self.splits.train
        self.fit("refined", BothStages(autoencoder, prior), train, self.splits.validation, both)
        encode_training(run, autoencoder, self.splits.train)

    def reconstructions(self, autoencoder: Autoencoder) -> dict[str, Tensor]:
        """Validation images for a tracker, and what the autoencoder makes of them."""
        (shown,) = self.run.fabric.to_device(self.splits.validation[slice(GRID_COLUMNS)])
        return {"reconstructions": torch.cat([shown, autoencoder.render(autoencoder.mean(autoencoder.encode(shown)))])}

    def samples(self, prior: Prior, autoencoder: Autoencoder) -> dict[str, Tensor]:
        """Samples for a tracker, where the prior can be drawn from without a caption."""
        indices = torch.arange(GRID_COLUMNS, device=self.run.fabric.device)
        if isinstance(prior.given_condition, CaptionCondition) and prior.given_condition.dropout == 0:
            return {}
        return {"samples": autoencoder.render(prior.sample(indices, seed=0))}


def warn_of_unused_codes(latents: LatentDataset, specs: list[LatentSpec]) -> None:
    """A codebook that the data cannot fill, or that has collapsed, wastes what the prior has to learn."""
    for spec, posterior in zip(specs, latents.subsample()):
        if spec.vocabulary is not None:
            used = len(posterior["codes"].unique())
            if used < spec.vocabulary / 2:
                say(
                    f"warning: the training images use {used} of {spec.vocabulary} codes on the {spec.grid[0]}×{spec.grid[1]}"
                    " grid; a smaller codebook would do"
                )
