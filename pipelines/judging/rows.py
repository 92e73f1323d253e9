"""The rows of a comparison: held-out images, their reconstructions, and samples of every prior.

Of the images of a row no more is kept than is judged and shown, so that memory does not grow with their size times their number.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipelines import processes
from pipelines.data.images import Splits
from pipelines.judging.comparison import ROWS, title
from pipelines.judging.features import (
    Classifier,
    FeatureSpace,
    feature_space,
    label_log_prob,
    logits_of,
    trained_classifier,
)
from pipelines.runs.config import MetricsConfig
from pipelines.runs.latents import encode
from pipelines.runs.parts import load_autoencoder, specs_of
from pipelines.runs.priors import open_prior, prior_names
from pipelines.runs.run import Run
from pipelines.runs.sampling import Samples, not_numbers, pixel_noise, sampler
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.prior import Prior
from stage2_prior.sampling import AS_FITTED, Sampling

T = TypeVar("T")

GRID = 64  # images kept of each row, to show them
A_LABEL, MOST_LABELS = 16, 12  # samples shown of a label, and labels
BY_LABEL = ("learned", "tuned")  # rows whose samples are shown by label
POINTS = 1000  # draws in a scatter plot
BATCH = 500
SAMPLED_AT_ONCE = 256


@dataclass(frozen=True)
class Subject:
    """What is compared: a frozen decoder and its priors, against held-out images, as many of which each prior draws."""

    run: Run
    splits: Splits
    judging: MetricsConfig
    seed: int
    autoencoder: Autoencoder
    specs: list[LatentSpec]
    space: FeatureSpace
    latents: LatentDataset
    """of the test split"""
    chosen: Tensor
    """which images of the test split, N"""
    contexts: Tensor | None
    """of each of them, for the learned prior"""
    priors: dict[str, Prior]

    @classmethod
    def of(cls, run: Run, splits: Splits, judging: MetricsConfig, seed: int) -> "Subject":
        autoencoder = load_autoencoder(run)
        specs = specs_of(autoencoder)
        space = feature_space(run.fabric, judging, splits, run.classifiers)
        count = min(judging.images, len(splits.test))
        chosen = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(seed))[:count]
        latents = encode(run, autoencoder, splits.test, "test")
        contexts = None if latents.contexts is None or run.conditioned_on is None else latents.contexts[chosen]
        priors = {name: open_prior(run, name, specs) for name in (*prior_names(run, specs), "posterior")}
        return cls(run, splits, judging, seed, autoencoder, specs, space, latents, chosen, contexts, priors)

    @cached_property
    def code_counts(self) -> list[Tensor]:
        """How often each code is used, K for each level, over the test split, or an even part of it where latents are many; empty
        for continuous latents."""
        levels = zip(self.latents.subsample(), self.specs)
        return [torch.bincount(level["codes"].flatten(), minlength=spec.vocabulary) for level, spec in levels if spec.vocabulary]

    @property
    def labels(self) -> Tensor | None:
        """The labels of the chosen images, where the learned prior is conditioned on labels or captions."""
        labels = self.splits.test.labels
        return None if labels is None or self.contexts is None else labels[self.chosen]

    @cached_property
    def shown(self) -> dict[str, Tensor]:
        """The places of the first samples drawn as each label, where there are as many as are shown."""
        if self.labels is None:
            return {}
        named = enumerate(self.splits.label_names[:MOST_LABELS])
        found = {name: torch.nonzero(self.labels == number).squeeze(1)[:A_LABEL] for number, name in named}
        return {name: places for name, places in found.items() if len(places) == A_LABEL}

    def kept(self, row: str) -> Tensor:
        """The places in a row of the images that are kept: the first GRID, and those of the learned prior shown by label."""
        by_label = self.shown.values() if row in BY_LABEL else ()
        return torch.cat([torch.arange(min(GRID, len(self.chosen))), *by_label]).unique()


def classifier(subject: Subject, seed: int) -> Classifier:
    return trained_classifier(subject.run.fabric, subject.judging, subject.splits, subject.run.classifiers, seed)[0]


@dataclass(frozen=True)
class Seen:
    """What is kept of the images of a row, N, or of a batch of them."""

    features: Tensor
    """as `FeatureSpace.unscaled` gives them, N F"""
    images: Tensor
    """those at the places that `Subject.kept` says, uint8 C H W each"""
    read: Tensor | None = None
    """the labels that the classifier predicts, N"""
    confidence: Tensor | None = None
    """log p of the requested labels under the other classifier, N"""
    errors: Tensor | None = None
    """squared error a pixel from the held-out images, N"""

    @classmethod
    def joined(cls, parts: list["Seen"]) -> "Seen":
        columns: dict[str, Any] = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        whole: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
        return cls(**whole)


class Rows:
    """What is kept of each row, by name, with what is known of how its images were made."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.seen: dict[str, Seen] = {}
        self.points: dict[str, Tensor] = {}
        """the first latents as the decoder reads them, POINTS D"""
        self.seconds: dict[str, float] = {}
        """for 1,000 images"""
        self.warnings: list[str] = []
        self.reader: Classifier | None = None
        """the classifier that predicts labels, where the prior is conditioned on them: the one that judges, where one does"""
        self.other_reader: Classifier | None = None
        """another classifier than any that judges"""
        if subject.labels is not None:
            model = subject.space.model
            self.reader = model if isinstance(model, Classifier) else classifier(subject, seed=0)
            self.other_reader = classifier(subject, seed=1)

    def doing(self, row: str) -> str:
        """What the progress line says while the images of a row are made, or those drawn in a way that is tried."""
        known, codes = ["real", "reconstruction", *self.subject.priors], self.subject.specs[0].vocabulary is not None
        if row in known:
            return f"comparison, row {known.index(row) + 1} of {len(known)}, {title(row, codes)}"
        return f"comparison, {ROWS[row] if row in ROWS else f'trying {row}'}"

    def look(self, row: str, places: Tensor, images: Tensor) -> Seen:
        """What is kept of a batch of a row: images uint8 B C H W, at these places in it."""
        fabric, labels, read, confidence = self.subject.run.fabric, self.subject.labels, None, None
        if self.reader is not None and row in ("real", "reconstruction", "learned", "tuned"):
            read = logits_of(fabric, self.reader, images).argmax(1)
        if self.other_reader is not None and labels is not None and row == "learned":
            confidence = label_log_prob(fabric, self.other_reader, images, labels[places])
        kept = images[torch.isin(places, self.subject.kept(row))]
        return Seen(self.subject.space.of_batch(images), kept, read, confidence)

    @property
    def images(self) -> dict[str, Tensor]:
        """The first GRID of each row, uint8 C H W each."""
        return {name: seen.images[self.subject.kept(name) < GRID] for name, seen in self.seen.items()}

    def by_label(self, row: str) -> dict[str, Tensor]:
        """The first A_LABEL samples of each label, where there are as many, uint8 A_LABEL C H W. row: of BY_LABEL."""
        images, kept = self.seen[row].images, self.subject.kept(row)
        return {name: images[torch.searchsorted(kept, places)] for name, places in self.subject.shown.items()}

    def held_out(self) -> Seen:
        def seen(places: Tensor) -> Seen:
            return self.look("real", places, subject.splits.test.images[subject.chosen[places]])

        subject = self.subject
        return Seen.joined(processes.in_batches(seen, torch.arange(len(subject.chosen)), BATCH, self.doing("real")))

    def reconstructions(self, exchanged: float = 0.0) -> Seen:
        """What the decoder makes of a sample z ~ q(z|x), as generation decodes samples.

        exchanged: share of the positions whose latent is that of another image at the same position, so drawn from its marginal.
        """

        def rendered(numbers: Tensor, levels: list[Tensor]) -> Tensor:
            noise = pixel_noise(subject.judging.pixels, 0, fabric.to_device(numbers), autoencoder.image_shape)
            return autoencoder.render(levels, noise).cpu()

        @torch.inference_mode()
        def seen(places: Tensor) -> Seen:
            batch = subject.chosen[places]
            posteriors = fabric.to_device(subject.latents.posteriors(batch))
            torch.manual_seed(int(batch[0]))
            levels = [exchange(level, exchanged).split(at_once) for level in autoencoder.sample(posteriors)]
            images = torch.cat([rendered(numbers, [*part]) for numbers, *part in zip(batch.split(at_once), *levels)])
            found = self.look("perturbed" if exchanged else "reconstruction", places, images)
            if exchanged:
                return found
            # In place: a list of small results between large temporaries would keep these from being used again, by glibc.
            errors = torch.empty(len(batch), dtype=torch.float64)
            for own, ours, real in zip(*(some.split(at_once) for some in (errors, images, subject.splits.test.images[batch]))):
                own.copy_((ours.double() - real.double()).div_(255).square_().flatten(1).mean(1))
            return Seen(found.features, found.images, found.read, errors=errors)

        subject = self.subject
        autoencoder, fabric, at_once = subject.autoencoder, subject.run.fabric, subject.autoencoder.at_once
        doing = "comparison, perturbed reconstructions" if exchanged else self.doing("reconstruction")
        return Seen.joined(processes.in_batches(seen, torch.arange(len(subject.chosen)), BATCH, doing))

    def add_samples(self, row: str, prior: Prior, how: Sampling = AS_FITTED) -> None:
        """Draw a row from a prior, of as many samples as there are held-out images."""

        def seen(places: Tensor, samples: Samples) -> tuple[Seen, Tensor]:
            first = [level[places < POINTS] for level in samples.levels]
            return self.look(row, places, samples.images), embedded(subject, first)

        subject = self.subject
        batches = self.sampled(row, prior, seen, how)
        self.seen[row] = Seen.joined([batch for batch, _ in batches])
        self.points[row] = torch.cat([points for _, points in batches])

    def sampled(
        self,
        row: str,
        prior: Prior,
        looked_at: Callable[[Tensor, Samples], T],
        how: Sampling = AS_FITTED,
        count: int | None = None,
        seed: int = 0,
    ) -> list[T]:
        """What `looked_at` makes of each batch of `count` samples, as many as there are chosen images when None.

        seed: added to the subject's own.
        """

        def drawn(places: Tensor) -> tuple[T, int, float]:
            started = time.perf_counter()
            samples = draw(places)
            seconds = time.perf_counter() - started
            return looked_at(places, samples), int((~samples.finite).sum()), seconds

        subject = self.subject
        count = len(subject.chosen) if count is None else count
        draw = sampler(
            subject.autoencoder,
            prior,
            seed=subject.seed + seed,
            device=subject.run.fabric.device,
            how=how,
            contexts=subject.contexts,
            pixels=subject.judging.pixels,
        )
        batches = processes.in_batches(drawn, torch.arange(count), SAMPLED_AT_ONCE, self.doing(row))
        self.seconds[row] = 1000 * sum(seconds for *_, seconds in batches) / processes.count() / count
        if wrong := sum(number for _, number, _ in batches):
            self.warnings.append(f"{row}: {not_numbers(wrong, count)}")
        return [made for made, *_ in batches]


@torch.inference_mode()
def embedded(subject: Subject, levels: list[Tensor]) -> Tensor:
    """Latents as the decoder reads them, flattened: N D, on the CPU."""
    return subject.autoencoder.bottleneck.embed([level.to(subject.run.fabric.device) for level in levels]).flatten(1).cpu()


def exchange(level: Tensor, share: float) -> Tensor:
    """Latents of one level, … h w, of which each position has with this probability the value of another image of the batch."""
    if share == 0 or len(level) < 2:
        return level
    batch, size = len(level), (len(level), *level.shape[-2:])
    others = (torch.arange(batch)[:, None, None] + torch.randint(1, batch, size)) % batch
    rows = torch.where(torch.rand(size) < share, others, torch.arange(batch)[:, None, None]).to(level.device)
    return level.gather(0, rows.view(batch, *(1,) * (level.ndim - 3), *level.shape[-2:]).expand_as(level))
