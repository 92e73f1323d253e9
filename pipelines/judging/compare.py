"""Makes the comparison: draws from every prior of a run through one frozen decoder, and judges what is drawn."""

import platform
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines import processes
from pipelines.data.images import Splits
from pipelines.judging.comparison import CodeUse, Comparison, ImagesOf, Row, title, verdict_of
from pipelines.judging.features import Judge, OfTraining, choosing_space, commonest_of
from pipelines.judging.health import health_of
from pipelines.judging.likelihood import likelihood, rate_maps
from pipelines.judging.quality import intervals, nearest_neighbours
from pipelines.judging.rows import BATCH, Rows, Subject
from pipelines.judging.tradeoffs import (
    Tradeoff,
    choose_sampling,
    described,
    has_weaker,
    rejection,
    takes_guidance,
    ways_to_sample,
)
from pipelines.runs.config import MetricsConfig, judged_by
from pipelines.runs.kinds import name_of_prior
from pipelines.runs.parts import weights_of
from pipelines.runs.run import PHASES, Run
from pipelines.runs.sampling import Samples
from pipelines.training import checkpoints
from pipelines.training.checkpoints import Moment
from stage1_vae.bottlenecks import perplexity
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.gaussians import GaussianMixturePrior
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import AS_FITTED, Sampling

SHOWN = 16  # images in a row of the picture
PERTURBED = 0.1  # of the positions of a reconstruction
FEW = 8  # draws of z an image for the likelihood; python -m pipelines.likelihood takes more
NOT_A_GENERATOR = "not a generator: reconstructs training images"
NO_LEARNED_PRIOR = "none: this run was trained without a second stage (stage2.steps 0)"


@dataclass(frozen=True)
class Exhibits:
    """What is shown beside the figures of a comparison. All tensors are on the CPU."""

    images: dict[str, Tensor]
    """the first GRID of each row, uint8 N C H W"""
    by_label: dict[str, Tensor]
    """for each label, the first A_LABEL samples of the tuned row, or of the learned one, that were drawn as it; uint8 N C H W"""
    nearest: Tensor
    """for the first SHOWN samples of the generator, the nearest training images, uint8 N C H W"""
    distances: dict[str, Tensor]
    """to the nearest training image, N each: of real images, of the generator's samples and of the posterior's"""
    projections: dict[str, Tensor]
    """each prior's draws on the first two principal components of q(z), POINTS 2; empty where latents have but one number"""
    code_counts: list[Tensor]
    """for each level, how often each code is used over the test split, K"""
    interpolations: Tensor | None
    """rows of SHOWN images on straight lines in z, uint8 N C H W; None for codes"""
    rate_maps: list[dict[str, Tensor]]
    """for each level, where on the latent grid the rate of held-out images lies, h w each, by name; empty without a density"""
    histories: dict[str, list[Moment]]
    """of each phase of the training, the terms at its checkpoints"""
    seconds: dict[str, float]
    """of sampling 1,000 images, for each row and each way to draw that was tried"""
    training_seconds: dict[str, float]
    """of each phase of the training, where its checkpoint tells"""
    nats: dict[str, Tensor]
    """of each prior, -log p(z) of one draw of each chosen image's latents, N each, float64; the same draws for all"""


@dataclass(frozen=True)
class Judged:
    """The figures of each row, and what they were made of."""

    rows: dict[str, Row]
    nearest: dict[str, tuple[Tensor, Tensor]]
    """for each image the distance to its nearest training image, and which it is, N each; mirror images come after all others"""
    fd: dict[str, Tensor]
    """Fréchet distances as drawn, then under each resample; empty where withheld"""
    withheld: dict[str, str]
    nats: dict[str, Tensor]
    """what `nats_of_latents` returns"""


def compare(run: Run, splits: Splits, judging: MetricsConfig, seed: int = 0) -> tuple[Comparison, Exhibits]:
    """Every prior of a run, judged by as many samples as there are held-out images, and what is shown beside the figures."""
    subject = Subject.of(run, splits, judging, seed)
    rows = draw_rows(subject)
    how, tried = tuned_sampling(subject, rows)
    if how != AS_FITTED:
        rows.add_samples("tuned", subject.priors["learned"], how)
    judged = judge(subject, rows, how)
    comparison = comparison_of(subject, rows, judged, tried)
    return comparison, exhibits_of(subject, rows, judged, comparison)


def draw_rows(subject: Subject) -> Rows:
    """Held-out images, their reconstructions, and samples of every prior."""
    rows = Rows(subject)
    rows.seen["real"] = rows.held_out()
    rows.seen["reconstruction"] = rows.reconstructions()
    for name, prior in subject.priors.items():
        rows.add_samples(name, prior)
    return rows


def tuned_sampling(subject: Subject, rows: Rows) -> tuple[Sampling, list[Tradeoff]]:
    """How the learned prior is drawn best, by other samples and another network than those that judge, and what was tried."""
    learned = subject.priors.get("learned")
    if learned is None:
        return AS_FITTED, []

    def drawn(how: Sampling, count: int) -> Tensor:
        def features(places: Tensor, samples: Samples) -> Tensor:
            return space.of_batch(samples.images)

        return space.scaled(torch.cat(rows.sampled(described(how), learned, features, how, count, seed=1)))

    run = subject.run
    space = choosing_space(run.fabric, subject.judging, subject.splits, run.classifiers)
    ways = ways_to_sample(takes_guidance(learned), has_weaker(learned))
    return choose_sampling(space, ways, len(subject.chosen), drawn, subject.labels)


def judge(subject: Subject, rows: Rows, how: Sampling) -> Judged:
    """The figures of every row. how: the settings of the tuned row."""
    space = subject.space
    learned_from = space.reference
    if subject.run.config.mirror:  # a copy may be of either
        learned_from = OfTraining([learned_from, space.of_training(mirror=True)], space.scale)
    nearest = {name: nearest_neighbours(space.scaled(seen.features), learned_from) for name, seen in rows.seen.items()}
    measure = Judge(space, nearest["real"][0], subject.seed)
    values = {
        name: measure.under_resamples(space.scaled(seen.features), nearest[name][0]) for name, seen in rows.seen.items()
    }  # features of one row at a time in float64
    figures = {name: Row(**measure.figures(found, nearest[name][0])) for name, found in values.items()}
    errors = rows.seen["reconstruction"].errors
    assert errors is not None
    perturbed = space.distance_of(space.scaled(rows.reconstructions(exchanged=PERTURBED).features))
    figures["reconstruction"] = replace(figures["reconstruction"], mse=float(errors.mean()), fd_perturbed=perturbed)
    figures["posterior"] = replace(figures["posterior"], note=NOT_A_GENERATOR)
    if isinstance(mixture := subject.priors.get("mixture"), GaussianMixturePrior):
        kind = "full" if mixture.full else "diagonal"
        note = f"{len(mixture.weights)} components with {kind} covariances, the best of {', '.join(map(str, mixture.tried))}"
        figures["mixture"] = replace(figures["mixture"], note=note)
    if "tuned" in figures:
        # Guided samples are typical images, which lie nearer to training images without being copies: the prior itself is tested.
        figures["tuned"] = replace(figures["tuned"], sampling=how, copying_p=figures["learned"].copying_p)
    distances = {name: found["fd"] for name, found in values.items() if "fd" in found}
    nats = nats_of_latents(subject)
    figures = with_labels_read(subject, rows, with_nats(subject, nats, figures))
    return Judged(figures, nearest, distances, measure.withheld, nats)


def with_nats(subject: Subject, nats: dict[str, Tensor], figures: dict[str, Row]) -> dict[str, Row]:
    """The figures, with the size of each prior, and how well it predicts the latents of the chosen images."""
    sized = {
        name: replace(figures[name], parameters=prior.fitted_numbers())
        for name, prior in subject.priors.items()
        if name != "posterior"
    }
    for name, values in nats.items():
        sized[name] = replace(sized[name], nll=float(values.mean()), nll_is_bound=subject.priors[name].bounded)
    return figures | sized


def with_labels_read(subject: Subject, rows: Rows, figures: dict[str, Row]) -> dict[str, Row]:
    """The figures, with how often the classifier predicts the requested label, where the learned prior is conditioned on one."""
    labels = subject.labels
    if labels is None:
        return figures
    read, of_label = {}, {name: labels == number for number, name in enumerate(subject.splits.label_names)}
    for name, seen in rows.seen.items():
        if seen.read is not None:
            right = (seen.read == labels).float()
            by_label = {label: float(right[own].mean()) for label, own in of_label.items() if own.any()}
            read[name] = replace(figures[name], label_read=float(right.mean()), labels_read=by_label)
    return figures | read


def comparison_of(subject: Subject, rows: Rows, judged: Judged, tried: list[Tradeoff]) -> Comparison:
    """All figures together."""
    run, splits, figures = subject.run, subject.splits, judged.rows
    priors = {name: row for name, row in figures.items() if name not in ("real", "reconstruction")}
    rejected = []
    if subject.labels is not None:
        learned = rows.seen["learned"]
        assert learned.confidence is not None
        rejected = rejection(subject.space, learned.confidence, subject.space.scaled(learned.features), subject.labels)
    withheld = None
    if not run.learned:
        withheld = NO_LEARNED_PRIOR
    elif "fd" in judged.withheld:
        withheld = "there is no Fréchet distance"
    verdict = verdict_of(judged.fd, withheld, title("standard", bool(subject.code_counts)))
    history = checkpoints.usable(run.folder / "stage2")[-1].record.history if run.learned else []
    labels = splits.test.labels
    bounds = None
    if subject.autoencoder.bottleneck.has_density:
        bounds = likelihood(run, splits, images=BATCH, samples=FEW, naive=0, seed=subject.seed)
    return Comparison(
        real=figures["real"],
        reconstruction=figures["reconstruction"],
        priors=priors,
        missing={} if run.learned else {"learned": NO_LEARNED_PRIOR},
        sampling=tried,
        rejection=rejected,
        health=health_of(judged.nats, history) if run.learned else None,
        commonest=commonest_of(labels) if labels is not None and len(labels) else None,
        codes=[code_use(counts, spec) for counts, spec in zip(subject.code_counts, subject.specs)],
        gap_closed=verdict.closed,
        gap_closed_plus_minus=verdict.plus_minus,
        gap_closed_reason=verdict.reason,
        gap_closed_tuned=verdict.tuned,
        gap_closed_tuned_plus_minus=verdict.tuned_plus_minus,
        prior=name_of_prior(run.config.prior) if run.learned else "learned prior",
        conditioned_on=run.conditioned_on,
        images=len(subject.chosen),
        images_of=ImagesOf(len(subject.space.reference)),
        seed=subject.seed,
        weights=weights_of(run),
        judged_by=judged_by(subject.judging),
        features=subject.space.description,
        intervals=intervals(subject.space.model.dimensions),
        withheld=judged.withheld,
        warnings=rows.warnings,
        versions={"python": platform.python_version(), "torch": torch.__version__},
        likelihood=bounds,
    )


def exhibits_of(subject: Subject, rows: Rows, judged: Judged, comparison: Comparison) -> Exhibits:
    generator, learned, run = comparison.generator, subject.priors.get("learned"), subject.run
    maps = []
    if subject.autoencoder.bottleneck.has_density and isinstance(learned, LearnedPrior):
        maps = rate_maps(run, subject.latents, learned, subject.chosen[:BATCH], subject.seed)
    lines = len(subject.specs) == 1 and not subject.code_counts and len(subject.chosen) > 1
    made = {phase: checkpoints.usable(run.folder / phase) for phase in PHASES}
    records = {phase: found[-1].record for phase, found in made.items() if found}  # an export has only what is used
    return Exhibits(
        images=rows.images,
        by_label=rows.by_label("tuned" if "tuned" in rows.seen else "learned") if subject.shown else {},
        nearest=nearest_training_images(subject.splits, subject.space.numbers(judged.nearest[generator][1][:SHOWN])),
        distances={name: judged.nearest[name][0] for name in ("real", generator, "posterior")},
        projections=projected(rows.points) if min(rows.points["posterior"].shape) > 1 else {},
        code_counts=subject.code_counts,
        interpolations=interpolations(subject) if lines else None,
        rate_maps=maps,
        histories={phase: record.history for phase, record in records.items()},
        seconds=rows.seconds,
        training_seconds={name: record.seconds for name, record in records.items() if record.seconds is not None},
        nats=judged.nats,
    )


def nearest_training_images(splits: Splits, indices: Tensor) -> Tensor:
    """Training images by number, uint8 N C H W; those numbered after the last are the mirror images."""
    mirrored, indices = indices >= len(splits.train), indices % len(splits.train)
    found = splits.train.images[indices]
    return torch.where(mirrored[:, None, None, None], found.flip(-1), found)


def projected(points: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latents N D on the first two principal components of q(z), which are those of `posterior`; N 2 each."""
    reference = points["posterior"]
    mean = reference.mean(0)
    torch.manual_seed(0)
    _, _, directions = torch.pca_lowrank(reference - mean, q=2)
    return {name: (values - mean) @ directions for name, values in points.items()}


@torch.inference_mode()
def interpolations(subject: Subject) -> Tensor:
    """Straight lines in z between the posteriors' means of pairs of held-out images, of which there are two or more."""
    autoencoder, pairs = subject.autoencoder, min(3, len(subject.chosen) // 2)
    posteriors = subject.run.fabric.to_device(subject.latents.posteriors(subject.chosen[: 2 * pairs]))
    (z,) = autoencoder.mean(posteriors)
    share = torch.linspace(0, 1, SHOWN, device=z.device)[None, :, None, None, None]
    between = torch.lerp(z[:pairs, None], z[pairs:, None], share).flatten(0, 1)
    return autoencoder.render([between]).cpu()


@torch.inference_mode()
def nats_of_latents(subject: Subject) -> dict[str, Tensor]:
    """Each prior's -log p(z) in nats of one z ~ q(z|x) of each chosen image, N, float64; the same draws for every prior.

    Empty for latents without a density.
    """

    def nats(batch: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(subject.seed + int(batch[0]))
        levels, contexts = subject.run.fabric.to_device(subject.latents[batch])
        return {name: -prior.log_prob(levels, contexts).cpu().double() for name, prior in priors.items()}

    if not subject.autoencoder.bottleneck.has_density:
        return {}
    priors = {name: prior for name, prior in subject.priors.items() if name != "posterior"}
    batches = processes.in_batches(nats, subject.chosen, BATCH, "likelihood of latents")
    return {name: torch.cat([batch[name] for batch in batches]) for name in priors}


def code_use(counts: Tensor, spec: LatentSpec) -> CodeUse:
    return CodeUse(spec.grid, len(counts), int((counts > 0).sum()), float(perplexity(counts.double())))
