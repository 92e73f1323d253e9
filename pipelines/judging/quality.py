"""Figures of sample quality, from features of generated and of real images, and how well the samples at hand determine them.

N generated images, M real ones, F features, R resamples.

Every figure is computed for R + 1 weightings of the generated images at once. In the first, each image counts once. In the
others it counts as often as a bootstrap resample drew it. The first gives the figure, the spread of the others its error. Real
images and networks are the same in all, so the error is that of drawing other samples, not of training again.

Recall and coverage ask whether any generated image lies near. A second copy of an image adds nothing to them, so their spread
over bootstrap resamples is not that over new samples: in 60 trials with a recall of 0.3, only 43 such intervals held it. Their
resamples are random parts of the images, without copies (the delete-d jackknife, Shao and Wu 1989): halves for recall, whose
radii are then wider, and nine tenths for coverage, which may grow in proportion to the number of images.

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
HALF, MOST = 0.5, 0.9  # of the images, in a resample for recall and for coverage
NEIGHBOURS = 20  # of generated images, that are known: fewer than three of them lie in a random half with a probability of 2e-4
CHUNK = 1_000_000  # distances at once, 8 bytes each: with more, they leave the cache of a processor and take longer


def resampled(count: int, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """How often each of N images counts, R + 1 × N: once each, then as in R bootstrap resamples."""
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    return torch.cat([torch.ones(1, count, dtype=torch.float64), counts])


def subsampled(count: int, resamples: int, share: float) -> Tensor:
    """Which of N images count, R + 1 × N, boolean: all of them, then R random parts of this share of them."""
    numbers = torch.rand(resamples, count, generator=torch.Generator().manual_seed(0))
    chosen = numbers.argsort(1)[:, : int(share * count)]
    return torch.cat([torch.ones(1, count), torch.zeros(resamples, count).scatter_(1, chosen, 1.0)]).bool()


def widened(values: Tensor, share: float) -> Tensor:
    """The values under `subsampled` of this share, R + 1, the last R spread as those of independent sets of all N images are."""
    return torch.cat([values[:1], values[:1] + (share / (1 - share)) ** 0.5 * (values[1:] - values[1:].mean())])


def intervals(features: int) -> str:
    """What stands behind an error, in words."""
    wide = f" ({RESAMPLES_OF_WIDE} for fd)" if features > WIDE else ""
    return f"95 %, over {RESAMPLES} bootstrap resamples{wide} of the row's images, or random parts for recall and coverage"


def error(values: Tensor) -> float:
    """Half of the 95 % interval of a figure, from its values under the weightings of `resampled`."""
    return DEVIATIONS * float(values[1:].std())


def error_of_share(values: Tensor, images: int) -> float:
    """The same, of a mean of values from 0 to 1 over so many images.

    Where the values are all 0, or all 1, no resample differs. Then it is the bound 1 - 0.05^(1/N), about 3/N: were the mean
    farther away, such images would have a probability below 5 % (Hanley and Lippman-Hand 1983).
    """
    return 1 - 0.05 ** (1 / images) if float(values[0]) in (0.0, 1.0) else error(values)


def error_of_mean(values: Tensor) -> float:
    """Half of the 95 % interval of the mean of two or more values."""
    return DEVIATIONS * float(values.std()) / len(values) ** 0.5


def chunks(rows: int, columns: int) -> list[Tensor]:
    return list(torch.arange(rows).split(max(1, CHUNK // columns)))


def squared_distances(products: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Squared distances between points N F and M F from their inner products, N M."""
    return (one.square().sum(1)[:, None] + other.square().sum(1) - 2 * products).clamp(min=0)


def kernel(products: Tensor, features: int) -> Tensor:
    """(x·y / F + 1)³, the kernel of KID (Bińkowski et al. 2018, section 4)."""
    return (products / features + 1).pow(3)


@dataclass(frozen=True)
class Cloud:
    """Points N F with what they need of each other."""

    points: Tensor
    near: Tensor
    """squared distances to the point's NEIGHBOURS nearest others, ascending, N K; there may be fewer"""
    which: Tensor
    """the numbers of these, N K"""
    kernel: Tensor
    """the mean of KID's kernel over pairs of different points, for each weighting"""

    @property
    def third(self) -> Tensor:
        """N, squared distance to the point's MANIFOLD_NEIGHBOUR-th neighbour"""
        return self.near[:, MANIFOLD_NEIGHBOUR - 1]

    @property
    def fifth(self) -> Tensor:
        """N, squared distance to its DENSITY_NEIGHBOUR-th neighbour"""
        return self.near[:, DENSITY_NEIGHBOUR - 1]

    def third_among(self, chosen: Tensor) -> Tensor:
        """The squared distance of each point to its third neighbour among those chosen; 0 of a point that is not. chosen: N."""
        before = (chosen[self.which].cumsum(1) < MANIFOLD_NEIGHBOUR).sum(1, keepdim=True)
        return self.near.gather(1, before.clamp(max=self.near.shape[1] - 1)).squeeze(1) * chosen

    @classmethod
    def of(cls, points: Tensor, weights: Tensor | None = None) -> "Cloud":
        """weights: R + 1 × N; each point once when None. There are at least FEWEST points."""
        weights = torch.ones(1, len(points), dtype=points.dtype) if weights is None else weights
        total, most = torch.zeros(len(weights), dtype=points.dtype), min(NEIGHBOURS, len(points) - 1)
        # Filled in place: a list of small results between large temporaries would keep these from being used again, by glibc.
        near, which = points.new_empty(len(points), most), torch.empty(len(points), most, dtype=torch.int64)
        for rows in chunks(len(points), len(points)):
            products = points[rows] @ points.T
            itself = (torch.arange(len(rows)), rows)
            distances = squared_distances(products, points[rows], points).index_put(itself, torch.tensor(math.inf).to(points))
            near[rows], which[rows] = distances.topk(most, largest=False)
            others = kernel(products, points.shape[1]).index_put(itself, torch.zeros(()).to(points))
            total += ((weights @ others.T) * weights[:, rows]).sum(1)
        pairs = weights.sum(1).square() - weights.square().sum(1)
        return cls(points, near, which, total / pairs)


def likeness(real: Cloud, generated: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """How generated images N F lie among real ones, for each weighting of them; recall and coverage for as many `subsampled`.

    kid        the unbiased squared maximum mean discrepancy (Bińkowski et al. 2018), over all images as one subset
    precision  share of generated images nearer to some real one than that one's third neighbour is, and
    recall     share of real images likewise among generated ones (Kynkäänniemi et al. 2019)
    density    number of real images whose fifth neighbour is farther than the generated image, over 5, and
    coverage   share of real images with a generated one nearer than their fifth neighbour (Naeem et al. 2020)
    """
    weights = torch.ones(1, len(generated), dtype=generated.dtype) if weights is None else weights
    own = Cloud.of(generated, weights)
    chosen, counts = (subsampled(len(generated), len(weights) - 1, share) for share in (HALF, MOST))
    radii = torch.stack([own.third_among(some) for some in chosen])
    precise = torch.zeros(len(generated), dtype=torch.bool)
    dense, cross = torch.zeros(2, len(generated), dtype=generated.dtype)
    recalled, covered = torch.zeros(2, len(weights), dtype=generated.dtype)
    for rows in chunks(len(real.points), len(generated)):
        products = real.points[rows] @ generated.T
        distances = squared_distances(products, real.points[rows], generated)
        near = distances < real.fifth[rows, None]
        precise |= (distances < real.third[rows, None]).any(0)
        dense += near.sum(0)
        covered += (counts.float() @ near.T.float() > 0).sum(1)
        recalled += reached(distances, own, chosen, radii)
        cross += kernel(products, generated.shape[1]).sum(0)
    numbers = weights.sum(1)
    return {
        "kid": real.kernel + own.kernel - 2 * (weights @ cross) / (numbers * len(real.points)),
        "precision": weights @ precise.to(weights) / numbers,
        "recall": widened(recalled / len(real.points), HALF),
        "density": weights @ dense / (DENSITY_NEIGHBOUR * numbers),
        "coverage": widened(covered / len(real.points), MOST),
    }


def reached(distances: Tensor, own: Cloud, chosen: Tensor, radii: Tensor) -> Tensor:
    """How many of M real images lie nearer to some chosen generated one than its third neighbour among those chosen.

    distances: squared, M N. chosen: R + 1 × N, boolean. radii: `own.third_among` of each. Returns R + 1.
    """
    within = distances < own.third  # of all, and so in any half, where neighbours are farther
    near = chosen.float() @ within.T.float() > 0  # R + 1 × M
    real, generated = ((distances < radii.amax(0)) & ~within).nonzero().unbind(1)  # these only in some halves
    at = distances[real, generated]
    for row, of_set in zip(near, radii):
        row[real[at < of_set[generated]]] = True
    return near.sum(1)


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
        """The distance under each weighting; of wide features only under the first few."""
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
    """The distance from each point N F to the nearest of others M F, and which it is; both N. Others on disk are read once."""
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
    """Slices of the rows, each of as many as are held at once. features: F."""
    size = max(1, CHUNK // features)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def nearer(distances: Tensor, held_out: Tensor) -> Tensor:
    """The share of held-out images that lie farther from the training set than each sample does; ties count half.

    distances, held_out: to the nearest training image, N and M. The mean over samples is the statistic of the test for data
    copying of Meehan et al. 2020 (section 3): 1/2 where samples lie as near to the training set as new images do, above it
    where they are copied from it, or more typical than new images.
    """
    return 1 - share_below(distances, held_out)


def share_below(values: Tensor, others: Tensor) -> Tensor:
    """The share of M others that are smaller than each of N values; ties count half."""
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
    """Whether each sample lies as near to the training set as the nearest percent of held-out images do.

    distances, held_out: to the nearest training image, N and M. The mean over samples is 0.01 for new images, and more where
    some samples are copies. The mean of `nearer` hides them where the other samples lie far from all images; this one does not.
    """
    return distances <= held_out.sort().values[nearest_of(len(held_out)) - 1]


def copying_p(distances: Tensor, held_out: Tensor) -> float:
    """The probability that so many of N new images lie so near to the training set.

    It is small where some are copies, and also where samples are more typical than new images, as guided ones are.

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
