"""Diversity traded for fidelity, of a prior that is told labels or captions: by rejection, and by guidance.

Along each, every row is judged by the same number of images: figures of different numbers do not compare.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.judging.features import Classifier, FeatureSpace, kept_best
from pipelines.judging.quality import FEWEST, Cloud, likeness
from pipelines.runs.run import Run
from stage2_prior.sampling import AS_FITTED, Sampling

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)  # of samples kept by rejection
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of guidance


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Figures of samples at one point along a trade-off; fd is None where there are too few images."""

    guidance: float | None = None
    """strength of classifier-free guidance, where that is varied"""
    kept: float | None = None
    """share of samples kept, where that is varied"""
    fd: float | None
    kid: float
    precision: float
    recall: float
    density: float
    coverage: float
    images: int


def choose_sampling(space: FeatureSpace, count: int, drawn: Callable[[Sampling, int], Tensor]) -> tuple[Sampling, list[Tradeoff]]:
    """How the learned prior is drawn best, by the lowest Fréchet distance, and what was tried: guidance of different STRENGTHS.

    count: images that a row of the comparison is judged by; here a fifth as many are drawn, or as many as the features need.
    drawn: as many images, uint8 N C H W, drawn in a way; other ones than those that the comparison judges.
    As fitted, where nothing is better, or there are too few images to tell.
    """
    few = math.ceil(count / 5) if space.withheld(count) else max(math.ceil(count / 5), space.fewest)
    tried = guidance(space, lambda strength: drawn(Sampling(guidance=strength), few))
    best = lowest_fd(tried)
    return (AS_FITTED if best is None else Sampling(guidance=best.guidance or 0.0)), tried


def guidance(space: FeatureSpace, drawn: Callable[[float], Tensor]) -> list[Tradeoff]:
    """All of the samples, drawn with classifier-free guidance of different STRENGTHS (Ho and Salimans 2022).

    drawn: images uint8 N C H W of one strength. Empty where there are too few images.
    """
    some = {strength: space.features(drawn(strength), f"features under guidance {strength:g}") for strength in STRENGTHS}
    return [replace(point, guidance=strength) for strength, point in along(some, space).items()]


def rejection(
    run: Run, space: FeatureSpace, other: Classifier, images: Tensor, features: Tensor, labels: Tensor
) -> list[Tradeoff]:
    """Of the samples, the SHARES that a classifier other than the one that judges is surest of (Razavi et al. 2019, section 3.3).

    images uint8 N C H W, their features N F, labels N: what each was drawn as. Empty where there are too few images.
    """
    kept = {share: kept_best(run.fabric, other, images, labels, share) for share in SHARES}
    number = min(len(indices) for indices in kept.values())
    some = {
        share: features[indices[torch.randperm(len(indices), generator=seeded())[:number]]] for share, indices in kept.items()
    }
    return [replace(point, kept=share) for share, point in along(some, space).items()]


def along(features: dict[float, Tensor], space: FeatureSpace) -> dict[float, Tradeoff]:
    """The figures for each value of what is varied, from as many features N F each; none where there are too few images."""
    (number,) = {len(some) for some in features.values()}
    if min(number, len(space.reference)) < FEWEST:
        return {}
    reference = Cloud.of(space.reference[torch.randperm(len(space.reference), generator=seeded())[:number]])
    points = {}
    for value, some in features.items():
        figures = {figure: float(found) for figure, found in likeness(reference, some).items()}
        points[value] = Tradeoff(fd=space.distance_of(some), images=number, **figures)
    return points


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def lowest_fd(points: Sequence[Tradeoff]) -> Tradeoff | None:
    """The point of the lowest Fréchet distance; None where there are too few images for any."""
    judged = [(point.fd, index) for index, point in enumerate(points) if point.fd is not None]
    return points[min(judged)[1]] if judged else None
