"""Figures of sample quality, from features of generated and of real images, and how well the samples at hand determine them.

N generated images, M real ones, F features, R resamples.

Every figure is computed for R + 1 weightings of the generated images at once: first each counts once, then as often as one
bootstrap resample drew it. The first gives the figure, the spread of the others its error. What is real, the networks, and
the radii around generated images are held, so the error is that of drawing other samples, not of training again.

Distances are taken a chunk of rows at a time: memory does not grow with N · M.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stage2_prior.latents import Joined

RESAMPLES = 100
RESAMPLES_OF_WIDE = 10  # of the Fréchet distance, which takes seconds in more features than the next line says
WIDE = 512
DEVIATIONS = 1.96  # of a normal distribution on either side: 95 %
MANIFOLD_NEIGHBOUR = 3  # of precision and recall: k in Kynkäänniemi et al. 2019
DENSITY_NEIGHBOUR = 5  # of density and coverage: k in Naeem et al. 2020
NEAREST = 0.01  # of held-out images, which a sample is a suspected copy within
FEWEST = DENSITY_NEIGHBOUR + 1  # images among which each has that neighbour
ENOUGH = 10 * DENSITY_NEIGHBOUR  # images of which these neighbours are but a tenth; among fewer, nearly all lie near each other
CHUNK = 4_000_000  # distances at once, 8 bytes each


def resampled(count: int, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """How often each of N images counts, R + 1 × N: once each, then as in R bootstrap resamples."""
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    return torch.cat([torch.ones(1, count, dtype=torch.float64), counts])


def intervals(features: int) -> str:
    """What stands behind an error, in words."""
    wide = f" ({RESAMPLES_OF_WIDE} for fd)" if features > WIDE else ""
    return f"95 %, over {RESAMPLES} bootstrap resamples{wide} of the row's images"


def error(values: Tensor) -> float:
    """Half of the 95 % interval of a figure, from its values under the weightings of `resampled`."""
    return DEVIATIONS * float(values[1:].std())


def error_of_mean(values: Tensor) -> float:
    """Half of the 95 % interval of the mean of two or more values."""
    return DEVIATIONS * float(values.std()) / len(values) ** 0.5


def chunks(rows: int, columns: int) -> list[Tensor]:
    return list(torch.arange(rows).split(max(1, CHUNK // columns)))


def squared_distances(products: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Of points N F and M F from their inner products, N M."""
    return (one.square().sum(1)[:, None] + other.square().sum(1) - 2 * products).clamp(min=0)


def kernel(products: Tensor, features: int) -> Tensor:
    """(x·y / F + 1)³, the kernel of KID (Bińkowski et al. 2018, section 4)."""
    return (products / features + 1).pow(3)


@dataclass(frozen=True)
class Cloud:
    """Points N F with what they need of each other."""

    points: Tensor
    third: Tensor
    """N, squared distance to the point's MANIFOLD_NEIGHBOUR-th neighbour"""
    fifth: Tensor
    """N, squared distance to its DENSITY_NEIGHBOUR-th neighbour"""
    kernel: Tensor
    """the mean of KID's kernel over pairs of different points, for each weighting"""

    @classmethod
    def of(cls, points: Tensor, weights: Tensor | None = None) -> "Cloud":
        """weights: R + 1 × N; each point once when None. There are at least FEWEST points."""
        weights = torch.ones(1, len(points), dtype=points.dtype) if weights is None else weights
        nearest, total = [], torch.zeros(len(weights), dtype=points.dtype)
        for rows in chunks(len(points), len(points)):
            products = points[rows] @ points.T
            itself = (torch.arange(len(rows)), rows)
            distances = squared_distances(products, points[rows], points).index_put(itself, torch.tensor(math.inf).to(points))
            nearest.append(distances.topk(DENSITY_NEIGHBOUR, largest=False).values)
            others = kernel(products, points.shape[1]).index_put(itself, torch.zeros(()).to(points))
            total += ((weights @ others.T) * weights[:, rows]).sum(1)
        ordered = torch.cat(nearest)
        pairs = weights.sum(1).square() - weights.square().sum(1)
        return cls(points, ordered[:, MANIFOLD_NEIGHBOUR - 1], ordered[:, DENSITY_NEIGHBOUR - 1], total / pairs)


def likeness(real: Cloud, generated: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """How generated images N F lie among real ones, for each weighting of them.

    kid        the unbiased squared maximum mean discrepancy (Bińkowski et al. 2018), over all images as one subset
    precision  share of generated images nearer to some real one than that one's third neighbour is, and
    recall     share of real images likewise among generated ones (Kynkäänniemi et al. 2019)
    density    number of real images whose fifth neighbour is farther than the generated image, over 5, and
    coverage   share of real images with a generated one nearer than their fifth neighbour (Naeem et al. 2020)
    """
    weights = torch.ones(1, len(generated), dtype=generated.dtype) if weights is None else weights
    own = Cloud.of(generated, weights)
    precise = torch.zeros(len(generated), dtype=torch.bool)
    dense, cross = torch.zeros(2, len(generated), dtype=generated.dtype)
    recalled, covered = torch.zeros(2, len(weights), dtype=generated.dtype)
    counts = weights.float()
    for rows in chunks(len(real.points), len(generated)):
        products = real.points[rows] @ generated.T
        distances = squared_distances(products, real.points[rows], generated)
        near = distances < real.fifth[rows, None]
        precise |= (distances < real.third[rows, None]).any(0)
        dense += near.sum(0)
        covered += (counts @ near.T.float() > 0).sum(1)
        recalled += (counts @ (distances < own.third).T.float() > 0).sum(1)
        cross += kernel(products, generated.shape[1]).sum(0)
    numbers = weights.sum(1)
    return {
        "kid": real.kernel + own.kernel - 2 * (weights @ cross) / (numbers * len(real.points)),
        "precision": weights @ precise.to(weights) / numbers,
        "recall": recalled / len(real.points),
        "density": weights @ dense / (DENSITY_NEIGHBOUR * numbers),
        "coverage": covered / len(real.points),
    }


class FrechetDistance:
    """The Fréchet distance between Gaussians of two sets of features (Heusel et al. 2017), by torchmetrics."""

    def __init__(self, reference: Tensor | Joined):
        from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

        features = reference[:1].shape[1]
        self.metric = FrechetInceptionDistance(
            GivenFeatures(features), reset_real_features=False, sync_on_compute=False
        )  # of several processes each has all the features
        self.metric.set_dtype(torch.float64)
        for block in blocks(len(reference), features):
            self.metric.update(reference[block], real=True)

    def __call__(self, features: Tensor) -> float:
        """features N F, with N above F: fewer have no covariance of full rank."""
        self.metric.reset()
        self.metric.update(features, real=False)
        return float(self.metric.compute())

    def under(self, features: Tensor, weights: Tensor) -> Tensor:
        """For each weighting; of wide features only for the first few."""
        weights = weights[: 1 + RESAMPLES_OF_WIDE] if features.shape[1] > WIDE else weights
        return torch.tensor([self(features.repeat_interleave(counts.long(), 0)) for counts in weights], dtype=torch.float64)


class GivenFeatures(nn.Module):
    """Tells torchmetrics that features are given, not images."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def nearest_neighbours(points: Tensor, others: Tensor | Joined) -> tuple[Tensor, Tensor]:
    """For points N F the distance to the nearest of the others M F, and which it is; both N. Others on disk are read once."""
    # ‖x-y‖² = ‖x‖² + (‖y‖² - 2 x·y), of which the first does not decide which y is nearest.
    nearest = torch.full((len(points),), math.inf, dtype=points.dtype)
    which = torch.zeros(len(points), dtype=torch.long)
    for block in blocks(len(others), points.shape[1]):
        some = others[block]
        lengths = some.square().sum(1)
        for rows in chunks(len(points), len(some)):
            found = torch.addmm(lengths, points[rows], some.T, alpha=-2).min(1)
            closer = found.values < nearest[rows]
            nearest[rows] = torch.where(closer, found.values, nearest[rows])
            which[rows] = torch.where(closer, found.indices + block.start, which[rows])
    return (nearest + points.square().sum(1)).clamp(min=0).sqrt(), which


def blocks(rows: int, features: int) -> list[slice]:
    """Of as many features F as are held at once."""
    size = max(1, CHUNK // features)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def nearer(distances: Tensor, held_out: Tensor) -> Tensor:
    """For each sample the share of held-out images that lie farther from the training set than it does; ties count half.

    distances, held_out: to the nearest training image, N and M. The mean over samples is the statistic of the test for data
    copying of Meehan et al. 2020 (section 3): 1/2 where samples lie as near to the training set as new images do, above it
    where they are copied from it.
    """
    return 1 - share_below(distances, held_out)


def share_below(values: Tensor, others: Tensor) -> Tensor:
    """For each of N values the share of others, M, that are smaller; ties count half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return below.double() / (2 * len(others))


def nearest_of(images: int) -> int:
    """How many of so many held-out images are the nearest percent: one of 100 or fewer."""
    return math.ceil(NEAREST * images)


def nearest_share(images: int) -> float:
    """Which share of so many held-out images they are."""
    return nearest_of(images) / images


def copied(distances: Tensor, held_out: Tensor) -> Tensor:
    """Of each sample, whether it lies as near to the training set as the nearest percent of held-out images do.

    distances, held_out: to the nearest training image, N and M. The mean over samples is 0.01 for new images, and more where
    some samples are copies. The mean of `nearer` hides them where the other samples lie far from all images; this one does not.
    """
    return distances <= held_out.sort().values[nearest_of(len(held_out)) - 1]


def copying_p(distances: Tensor, held_out: Tensor) -> float:
    """The probability that so many of N new images lie so near to the training set; small where some are copies.

    Fisher's exact test of how many samples and how many held-out images lie within a distance. The distance is that of the
    nearest held-out image, of the second, of the fourth and so on, up to the nearest percent. The smallest probability counts,
    times their number (Bonferroni). The first distances find exact copies, the last ones copies that a decoder has blurred.
    """
    from scipy.stats import fisher_exact  # slow to import

    ordered, most = held_out.sort().values, nearest_of(len(held_out))
    ranks = {min(2**power, most) for power in range(most.bit_length() + 1)}
    found = []
    for rank in ranks:
        counts = [int((values <= ordered[rank - 1]).sum()) for values in (distances, held_out)]
        table = [counts, [len(distances) - counts[0], len(held_out) - counts[1]]]
        found.append(float(fisher_exact(table, alternative="greater").pvalue))
    return min(1.0, len(ranks) * min(found))
