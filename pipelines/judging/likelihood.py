"""What the whole model, with each prior, makes of held-out images, in nats.

    distortion           -E_q[log p(x|z)]
    rate                 E_q[log q(z|x) - log p(z)]; for codes -log p(codes)
    -ELBO                distortion + rate, a bound on -log p(x) (Kingma and Welling 2014)
    importance-weighted  a tighter bound, from the average of K weights (Burda et al. 2016)
    naive                -log 1/K Σ p(x|z) with z ~ p(z)

All are bounds on, or estimates of, -log p(x): lower is better, and of a density they may be negative. Under a conditional prior
they are of -log p(x|context), such as a label.

N images, L draws of z an image, C latent channels, h×w latent grid. Errors are standard errors over images.
"""

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pipelines import files, processes
from pipelines.console import (
    Progress,
    Signals,
    Stopped,
    UserError,
    nearest,
)
from pipelines.data.images import Splits
from pipelines.data.reading import Stored, content_of
from pipelines.judging.bounds import Bound, Bounds, BoundsOfPrior, Estimate, LatentNumbers, Naive
from pipelines.runs.latents import encode
from pipelines.runs.parts import check_density, load_autoencoder, specs_of
from pipelines.runs.priors import open_prior, prior_names
from pipelines.runs.run import Run
from pipelines.training.order import seed_of
from stage1_vae.autoencoder import Autoencoder
from stage1_vae.bounds import (
    draws,
    effective_samples,
    grouped,
    importance_weighted_bound,
    log_likelihoods,
)
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.gaussians import AggregatePosterior
from stage2_prior.heads import gaussian_log_prob
from stage2_prior.latents import LatentDataset
from stage2_prior.prior import Prior

ACTIVE = 0.01  # variance over images of a posterior's mean, from which on its latent number is in use (Burda et al. 2016)
DRAWS_AT_ONCE = 4096  # between two looks at the clock and at signals
SAVE_SECONDS = 20.0
BATCH = 500
SHOWN_CHANNELS = 6


@torch.inference_mode()
def likelihood(
    run: Run,
    splits: Splits,
    *,
    images: int,
    samples: int = 64,
    naive: int = 1000,
    priors: Sequence[str] = (),
    seed: int = 0,
) -> Bounds:
    """The bounds and the accounting of the rate, on `images` images of the test split, drawn by the seed.

    samples: L; of codes there is one. naive: draws from each unconditional prior for the naive estimate, 0 for none.
    priors: by name; all but `posterior` when empty. All priors see the same draws of z.
    The figures of each image are kept under RUN/likelihood/, so that the same call goes on where a killed one was.
    Raises UserError where there is no likelihood, and Stopped when a signal asked to end.
    """
    autoencoder = load_autoencoder(run)
    check_density(run, autoencoder)
    specs = specs_of(autoencoder)
    discrete = specs[0].vocabulary is not None
    known = prior_names(run, specs) + ([] if discrete else ["posterior"])
    for name in priors:
        if name not in known:
            raise UserError(f"there is no prior {name!r} with a density over these latents{nearest(name, known)}")
    fitted = {name: open_prior(run, name, specs) for name in (priors or [name for name in known if name != "posterior"])}
    latents = encode(run, autoencoder, splits.test, "test")
    images = min(images, len(splits.test))
    order = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(seed))
    chosen = order[:images]
    samples = 1 if discrete else samples
    measurement = Measurement(run, autoencoder, fitted, splits.test.images, latents.contexts, order, samples, naive, seed)
    columns = measurement.columns(images)
    measure = autoencoder.likelihood.measure(splits.test.images[chosen])
    dimensions = math.prod(splits.image_shape) if measure == "probability" else None
    latent_numbers = None
    if not discrete:
        latent_numbers = LatentNumbers(
            images=len(latents),
            dimensions=specs[0].dimensions,
            active_units=active_units(latents),
            mutual_information=estimate(mutual_information(latents, chosen, seed)),
            log_n=math.log(len(latents)),
        )
    return Bounds(
        images=images,
        images_of=f"test split of {len(splits.test)}",
        samples=samples,
        naive_samples=naive,
        seed=seed,
        likelihood=autoencoder.likelihood.name,
        measure=measure,
        dimensions=dimensions,
        conditioned_on=run.conditioned_on if "learned" in fitted else None,
        distortion=estimate(-columns["log_likelihood"]),
        priors={name: bounds_of_prior(columns, name, samples, dimensions) for name in fitted},
        codes=len(specs) if discrete else None,
        latents=latent_numbers,
    )


def estimate(values: Tensor, dimensions: int | None = None) -> Estimate:
    """The mean of one value an image, in nats. dimensions: of an image, where bits per dimension have a meaning."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    nats = float(values.mean())
    return Estimate(nats=nats, error=error, bits_per_dimension=None if dimensions is None else nats / (dimensions * math.log(2)))


def bounds_of_prior(columns: dict[str, Tensor], prior: str, samples: int, dimensions: int | None) -> BoundsOfPrior:
    """What the columns say of one prior."""

    def bound(count: int) -> Bound:
        values, standard = (columns.get(f"{name}/bound/{count}") for name in (prior, "standard"))
        assert values is not None
        below = None if standard is None or prior == "standard" else estimate(values - standard)
        return Bound(**vars(estimate(-values, dimensions)), below_standard=below)

    naive = None
    if f"{prior}/naive" in columns:
        effective = float(columns[f"{prior}/naive_effective"].median())
        naive = Naive(**vars(estimate(-columns[f"{prior}/naive"], dimensions)), effective_samples=effective)
    counts = sorted(int(name.split("/")[2]) for name in columns if name.startswith(f"{prior}/bound/"))
    return BoundsOfPrior(
        rate=estimate(columns[f"{prior}/rate"]),
        negative_elbo=bound(1),
        importance_weighted=bound(samples),
        by_samples={str(count): -float(columns[f"{prior}/bound/{count}"].mean()) for count in counts},
        effective_samples=float(columns[f"{prior}/effective"].median()),
        naive=naive,
    )


@dataclass(frozen=True)
class Measurement:
    """One measurement: everything that its figures depend on."""

    run: Run
    autoencoder: Autoencoder
    priors: dict[str, Prior]
    images: Tensor | Stored
    contexts: Tensor | None
    order: Tensor
    """the numbers of all images, in the order in which they are measured"""
    samples: int
    naive: int
    seed: int

    def key(self) -> str:
        """Names the weights, the images and what is asked of them, but not how many images."""
        asked = repr(("whole batches", self.samples, self.naive, self.seed, list(self.priors))).encode()
        tensors = (tensor for model in (self.autoencoder, *self.priors.values()) for tensor in model.state_dict().values())
        weights = (tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)
        return files.digest_of(chain([asked, content_of(self.images)], weights))

    def columns(self, count: int) -> dict[str, Tensor]:
        """Columns by name, one value for each of the first images, in nats: from disk as far as they are there, else measured.

        Batches begin and end at the same images whatever the count and what was measured before. So do the draws, and the
        figure of an image depends on neither. Of the last batch more images are measured than asked for.
        """
        path = self.run.work / "likelihood" / f"{self.key()}.safetensors"
        columns = files.read_tensors(path) if path.is_file() else {}
        at_once = max(1, min(BATCH, DRAWS_AT_ONCE // self.samples))
        total = min(len(self.order), at_once * math.ceil(count / at_once))
        done = len(next(iter(columns.values()))) if columns else 0
        if done >= total:
            return {name: values[:count] for name, values in columns.items()}
        prior_draws = self.drawn_from_priors()
        saved = time.monotonic()

        def measured(rows: Tensor) -> dict[str, Tensor]:
            torch.manual_seed(seed_of(self.seed, int(rows[0])))
            return self.of_images(self.order[rows], prior_draws)

        with Progress("likelihood", total, "images", done) as progress, Signals() as signals:
            while done < total:
                rows = torch.arange(done, min(done + at_once * processes.count(), total))
                for new in processes.in_batches(measured, rows, at_once):
                    columns = {name: torch.cat([columns.get(name, values[:0]), values]) for name, values in new.items()}
                done += len(rows)
                progress.update(len(rows))
                received = processes.largest(signals.received or 0, self.run.fabric.device)
                if done == total or received or time.monotonic() - saved > SAVE_SECONDS:
                    files.write_tensors(path, columns)
                    saved = time.monotonic()
                if received:
                    name = signal.Signals(received).name
                    message = f"{name}: saved after {done} of {total} images; the same command goes on from there"
                    raise Stopped(message, received)
        return {name: values[:count] for name, values in columns.items()}

    def drawn_from_priors(self) -> dict[str, list[Tensor]]:
        """Latents for the naive estimate, from every unconditional prior."""
        conditional = self.run.conditioned_on is not None
        names = [name for name in self.priors if self.naive and not (name == "learned" and conditional)]
        drawn = {}
        device = self.run.fabric.device
        for name in names:

            def latents(indices: Tensor, prior: Prior = self.priors[name]) -> list[Tensor]:
                return [level.cpu() for level in prior.sample(indices.to(device), self.seed)]

            label = f"sampling the {name} prior"
            batches = processes.in_batches(latents, torch.arange(self.naive), BATCH, label, unit="draws")
            drawn[name] = [torch.cat(level).to(device) for level in zip(*batches)]
        return drawn

    def of_images(self, batch: Tensor, prior_draws: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """The columns of a batch of images."""
        images = self.run.fabric.to_device(self.images[batch])
        contexts = None if self.contexts is None else self.run.fabric.to_device(self.contexts[batch])
        log_priors = {name: prior.log_prob for name, prior in self.priors.items()}
        made = draws(self.autoencoder, images, self.samples, log_priors, contexts)
        columns = {"log_likelihood": made.log_likelihood.cpu().double().mean(0)}
        counts = {1, self.samples} | {10**power for power in range(1, 10) if 10**power < self.samples}
        for name in self.priors:
            weights = made.log_weights(name).cpu().double()
            columns[f"{name}/rate"] = made.rate(name).cpu().double().mean(0)
            columns[f"{name}/effective"] = effective_samples(weights)
            for count in sorted(counts):
                columns[f"{name}/bound/{count}"] = importance_weighted_bound(grouped(weights, count)).mean(0)
        for name, levels in prior_draws.items():
            weights = log_likelihoods(self.autoencoder, images, levels).cpu().double()
            columns[f"{name}/naive"] = importance_weighted_bound(weights)
            columns[f"{name}/naive_effective"] = effective_samples(weights)
        return columns


def active_units(latents: LatentDataset) -> int:
    """Latent numbers whose posterior mean varies over images by more than ACTIVE."""
    (posterior,) = latents.subsample()
    return int((posterior["mean"].var(0, correction=0) > ACTIVE).sum())


def mutual_information(latents: LatentDataset, chosen: Tensor, seed: int) -> Tensor:
    """log q(z|x) - log q(z) at one draw z ~ q(z|x) of each chosen image, q(z) the average of all these posteriors; N nats.

    Its mean is the empirical I(x; z), which cannot exceed log n for n posteriors, however large the true one is.
    """
    torch.manual_seed(seed)
    drawn, log_q = [], []
    for batch in chosen.split(BATCH):
        (posterior,), ((z,), _) = latents.posteriors(batch), latents[batch]
        log_q.append(gaussian_log_prob(z, posterior["mean"], posterior["std"].log()).flatten(1).sum(1))
        drawn.append(z)
    return (torch.cat(log_q) - AggregatePosterior(latents).log_prob([torch.cat(drawn)])).double()


@torch.inference_mode()
def rate_maps(run: Run, latents: LatentDataset, prior: LearnedPrior, chosen: Tensor, seed: int) -> list[dict[str, Tensor]]:
    """Where the rate of held-out images lies on the latent grid: for each level, maps by name, h w in nats an image.

    Continuous latents: under N(0, I), of all channels and of each of the costliest, and under the learned prior. Codes: under
    the learned prior.
    """
    torch.manual_seed(seed)
    levels, contexts = run.fabric.to_device(latents[chosen])
    maps = []
    for index, (own, posterior) in enumerate(zip(prior.levels, run.fabric.to_device(latents.posteriors(chosen)))):
        parts = [
            own.log_prob_by_position([level[rows] for level in levels[: index + 1]], None if contexts is None else contexts[rows])
            for rows in torch.arange(len(chosen), device=run.fabric.device).split(BATCH)
        ]
        cost = -torch.cat(parts)
        if "codes" in posterior:
            maps.append({"learned": cost.mean(0).cpu()})
            continue
        log_q = gaussian_log_prob(levels[index], posterior["mean"], posterior["std"].log())
        standard = (log_q - gaussian_log_prob(levels[index], torch.zeros(()), torch.zeros(()))).mean(0).cpu()
        costliest = standard.flatten(1).sum(1).argsort(descending=True)[:SHOWN_CHANNELS].sort().values.tolist()
        channels = {f"N(0, I), channel {channel + 1}": standard[channel] for channel in costliest}
        maps.append({"standard": standard.sum(0), "learned": (log_q.sum(1) + cost).mean(0).cpu(), **channels})
    return maps
