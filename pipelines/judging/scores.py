"""How unusual an image is under a model: its bits under both stages, and where on the latent grid they lie.

N images, h×w latent grid.

    bits of z           log₂ q(z|x) - log₂ p(z), one draw z ~ q(z|x); for codes -log₂ p(codes)
    bits of x given z   -log₂ p(x|z)

    bits of PNG         of the image as a PNG file: how complex it is for a program that has seen no other

The first two add up to a bound on -log₂ p(x). Alone it misleads: simple images have few bits under a model of others (Nalisnick
et al. 2019a). So an image is unusual where the three numbers lie far from those of held-out images, in either direction: by
their Mahalanobis distance. That is a test of typicality (after Nalisnick et al. 2019b, "Detecting Out-of-Distribution Inputs to
Deep Generative Models Using Typicality"), which sees when bits are few only because an image is simple (after Serrà et al. 2020,
"Input complexity and out-of-distribution detection with likelihood-based generative models").
"""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pipelines import files, processes
from pipelines.console import UserError
from pipelines.data.images import ImageSet
from pipelines.data.reading import READERS
from pipelines.judging.quality import share_below
from pipelines.runs.dataset import read_facts
from pipelines.runs.parts import check_density, load_autoencoder, load_prior, specs_of, weights_of
from pipelines.runs.priors import check_without_context
from pipelines.runs.run import Run
from pipelines.training.order import in_order, seed_of
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.heads import gaussian_log_prob

BATCH = 250
BIT = math.log(2)  # nats
FEWEST_HELD_OUT = 10


@dataclass(frozen=True)
class Scores:
    bits_of_z: Tensor
    """N"""
    bits_of_x: Tensor
    """given z, N"""
    bits_of_png: Tensor
    """N"""
    maps: list[Tensor] = field(repr=False)
    """for each level, the bits of z at each position, N h w"""

    @property
    def bits(self) -> Tensor:
        """The bound on -log₂ p(x), N."""
        return self.bits_of_z + self.bits_of_x

    @property
    def numbers(self) -> Tensor:
        """All three, float64 N 3."""
        return torch.stack([self.bits_of_z, self.bits_of_x, self.bits_of_png], 1).double()

    def in_words(self, number: int) -> str:
        """The bits of one image under both stages."""
        return f"{float(self.bits_of_z[number]):.0f} bits of z, {float(self.bits_of_x[number]):.0f} of x given z"

    def __len__(self) -> int:
        return len(self.bits_of_z)


@dataclass(frozen=True)
class Scorer:
    """A trained model that images are scored under."""

    run: Run
    autoencoder: Autoencoder
    prior: LearnedPrior

    @classmethod
    def of(cls, run: Run) -> "Scorer":
        """Raises UserError where a run has no density over images, or no autoregressive prior."""
        autoencoder = load_autoencoder(run)
        if not run.learned:
            raise UserError(f"{run.folder} has no learned prior (stage2.steps 0), by which images are scored")
        check_density(run, autoencoder)
        prior = load_prior(run, specs_of(autoencoder))
        if not isinstance(prior, LearnedPrior):
            raise UserError(
                f"the prior of {run.folder} is not autoregressive: it has no bits at each position, which a map shows"
            )
        check_without_context(prior)
        return cls(run, autoencoder, prior)

    @torch.inference_mode()
    def __call__(self, images: ImageSet, label: str = "scoring") -> Scores:
        """The scores of images as the model takes them. A conditional prior is used under its null context."""

        def scored(rows: Tensor) -> Scores:
            torch.manual_seed(seed_of(0, int(rows[0])))
            (batch,) = in_order(images, rows, BATCH)
            return self.of_batch(self.run.fabric.to_device(batch))

        parts = processes.in_batches(scored, torch.arange(len(images)), BATCH, label)
        return Scores(
            torch.cat([part.bits_of_z for part in parts]),
            torch.cat([part.bits_of_x for part in parts]),
            torch.cat([part.bits_of_png for part in parts]),
            [torch.cat(maps) for maps in zip(*(part.maps for part in parts))],
        )

    def held_out(self, images: ImageSet) -> Scores:
        """The scores of the test split, from disk when they were made by these very weights of these images."""
        key = " ".join([*weights_of(self.run).values(), str(len(images)), read_facts(self.run).content])

        def made() -> dict[str, Tensor]:
            scores = self(images, "scoring held-out images")
            return {name: values for name, values in vars(scores).items() if name != "maps"} | {
                f"map.{level}": bits for level, bits in enumerate(scores.maps)
            }

        found = files.cached(self.run.work / "scores" / "held-out.safetensors", key, made)
        maps = [found.pop(f"map.{level}") for level in range(len(self.prior.levels))]
        return Scores(**found, maps=maps)

    def of_batch(self, images: Tensor) -> Scores:
        """images uint8 B C H W, on the model's device; the scores are on the CPU."""
        with ThreadPoolExecutor(READERS, "png") as pool:  # beside the networks
            sizes = pool.map(png_bits, images.cpu())
            of_z, of_x, maps = self.of_networks(images)
        return Scores(of_z, of_x, torch.tensor([*sizes]), maps)

    def of_networks(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The bits of z and of x given z, B each, and for each level the bits of z at each position, B h w."""
        posteriors = self.autoencoder.encode(images)
        levels = self.autoencoder.sample(posteriors)
        maps = []
        for index, (own, posterior) in enumerate(zip(self.prior.levels, posteriors, strict=True)):
            nats = -own.log_prob_by_position(levels[: index + 1], own.null_contexts(len(images)))
            if "mean" in posterior:
                nats = nats + gaussian_log_prob(levels[index], posterior["mean"], posterior["std"].log()).sum(1)
            maps.append((nats / BIT).cpu())
        scale, at_once = self.autoencoder.likelihood.scale, self.autoencoder.at_once
        parts = zip(*(some.split(at_once) for some in (images, *levels)))
        of_x = torch.cat([-self.autoencoder.decode(part).log_prob(scale(some)) / BIT for some, *part in parts])
        of_z = torch.stack([bits.flatten(1).sum(1) for bits in maps]).sum(0)
        return of_z, of_x.cpu(), maps


def png_bits(image: Tensor) -> float:
    """The bits of an image, uint8 C H W, as a PNG file. The highest compression saves a hundredth of them, and takes up to three
    times as long."""
    file, pixels = io.BytesIO(), rearrange(image, "c h w -> h w c").numpy()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return 8.0 * file.tell()


def check_held_out(images: int) -> None:
    """Raises UserError where there are too few held-out images to tell what is usual."""
    if images < FEWEST_HELD_OUT:
        raise UserError(
            f"held-out images: {images}, too few to say what is usual; at least {FEWEST_HELD_OUT} are needed: train a new run on"
            " more images, or on own ones with a higher --data.test-share"
        )


@dataclass(frozen=True)
class Usual:
    """What scores of held-out images are like."""

    mean: Tensor
    """of the three numbers of bits, 3"""
    precision: Tensor
    """the inverse of their covariance, 3 3"""
    distances: Tensor
    """of each held-out image, from the others, N: it draws mean and covariance toward itself, and from all of them it would be
    nearer than new images are"""
    maps: list[tuple[Tensor, Tensor]]
    """for each level, mean and standard deviation of the bits at each position, h w each"""

    @classmethod
    def of(cls, held_out: Scores) -> "Usual":
        """Raises UserError where there are too few held-out images to tell."""
        check_held_out(len(held_out))
        mean, precision = held_out.numbers.mean(0), torch.linalg.pinv(held_out.numbers.T.cov(), hermitian=True)
        maps = [(bits.mean(0), bits.std(0).clamp(min=1e-3)) for bits in held_out.maps]
        usual = cls(mean, precision, torch.zeros(0), maps)
        return replace(usual, distances=from_others(usual.distance(held_out)))

    def distance(self, scores: Scores) -> Tensor:
        """The squared Mahalanobis distance of new images' three numbers of bits from those of held-out images, N."""
        away = scores.numbers - self.mean
        return ((away @ self.precision) * away).sum(1)

    def excess(self, scores: Scores) -> list[Tensor]:
        """How many standard deviations the bits of z at each position lie above held-out images', N h w for each level."""
        return [(bits - mean) / std for bits, (mean, std) in zip(scores.maps, self.maps, strict=True)]

    def more_usual(self, distances: Tensor) -> Tensor:
        """The share of held-out images that are more usual than each image at these distances, N; 1 where all are."""
        return torch.searchsorted(self.distances.sort().values, distances).double() / len(self.distances)


def every(scores: Scores, distances: Tensor) -> dict[str, Tensor]:
    """Each way to order images by how unusual they are, the higher the more, N each; the first is the one that works."""
    return {
        "all three": distances,
        "bits": scores.bits,
        "bits of z": scores.bits_of_z,
        "bits of x given z": scores.bits_of_x,
        "bits of PNG": scores.bits_of_png,
    }


def from_others(distances: Tensor) -> Tensor:
    """Squared Mahalanobis distances of N points from all of them, to those from the N - 1 others each, N.

    By the formula of Sherman and Morrison for the inverse of a covariance without one point.
    """
    count = len(distances)
    left = (1 - distances * count / (count - 1) ** 2).clamp(min=1e-12)  # 0 for a point that alone spans a direction
    return distances / left * (count - 2) * count**2 / (count - 1) ** 3


def auroc(usual: Tensor, unusual: Tensor) -> float:
    """The share of pairs in which the unusual one has the higher score, ties counting half; N and M scores."""
    return float(share_below(unusual, usual).mean())
