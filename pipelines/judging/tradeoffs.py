"""Diversity traded for fidelity, of the learned prior: by temperature, by guidance, and by rejection.

Along each, every row is judged by the same number of images: figures of different numbers do not compare.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from pipelines.judging.features import FeatureSpace, rejection_sampled
from pipelines.judging.quality import ENOUGH, Cloud, likeness
from stage2_prior.autoregressive import LearnedPrior
from stage2_prior.prior import Prior
from stage2_prior.sampling import AS_FITTED, Sampling

T = TypeVar("T")

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)  # of samples kept by rejection
TEMPERATURES = (0.9, 0.8)
GUIDANCE = (0.25, 0.5, 1.0, 2.0)
AUTOGUIDANCE = (0.25, 0.5, 1.0, 1.5)
BOTH = (0.25, 0.5)  # of guidance, with the best strength of autoguidance and with the next weaker one
FEW_PER_FEATURE = 5  # samples for each feature; with fewer, nearly all ways are within the error of the lowest fd
DRAWN = 1000  # samples that a way to draw is judged by, where a row of the comparison has as many


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """Figures of samples at one point along a trade-off; fd is None where there are too few images."""

    sampling: Sampling | None = None
    """how the samples were drawn, where that is varied"""
    kept: float | None = None
    """share of samples kept, where that is varied"""
    fd: float | None
    fd_plus_minus: float | None = None
    """half of the 95 % interval of fd, where a choice depends on it"""
    kid: float
    precision: float
    recall: float
    density: float
    coverage: float
    label_read: float | None = None
    """label accuracy, where samples are drawn by label or caption"""
    images: int


def ways_to_sample(guided: bool, weaker: bool) -> list[Sampling]:
    """The ways to draw from a learned prior that are tried first, as it was fitted the first of them.

    guided: whether it can be guided toward a label or a caption; weaker: whether it has a weaker copy.
    """
    ways = [AS_FITTED, *(Sampling(temperature) for temperature in TEMPERATURES)]
    ways += [Sampling(guidance=strength) for strength in GUIDANCE if guided]
    return ways + [Sampling(autoguidance=strength) for strength in AUTOGUIDANCE if weaker]


def ways_with_both(best: float) -> list[Sampling]:
    """Both kinds of guidance at once. best: the strength of autoguidance that alone has the lowest fd."""
    strengths = [strength for strength in AUTOGUIDANCE if strength <= best][-2:]
    return [Sampling(guidance=toward, autoguidance=away) for toward in BOTH for away in strengths]


def takes_guidance(prior: Prior | None) -> bool:
    """Whether a prior can be guided toward a label or a caption: autoregressive ones that were trained with and without one."""
    condition = prior.given_condition if isinstance(prior, LearnedPrior) else None
    return condition is not None and condition.dropout > 0


def has_weaker(prior: Prior | None) -> bool:
    """Whether a prior has a weaker copy, which autoguidance leads away from."""
    return isinstance(prior, LearnedPrior) and prior.levels[0].weaker is not None


def described(how: Sampling) -> str:
    """A way to draw, in words."""
    return ", ".join(f"{name} {value:g}" for name, value in departures(how).items()) or "as fitted"


def departures(how: Sampling) -> dict[str, float]:
    """The settings by which a way to draw departs from the density as fitted."""
    return {field.name: getattr(how, field.name) for field in fields(how) if getattr(how, field.name) != field.default}


def choose_sampling(
    space: FeatureSpace, ways: list[Sampling], count: int, drawn: Callable[[Sampling, int], Tensor], labels: Tensor | None = None
) -> tuple[Sampling, list[Tradeoff]]:
    """How the learned prior is drawn best, as `best_of` says, and what was tried: `ways`, then BOTH guidances where it has both.

    space: of another network than the one that judges the comparison, so that what is chosen does not flatter the figures.
    count: images that a row of the comparison is judged by; here DRAWN of them are drawn, or a fifth as many if that is more.
    drawn: the features of as many images, N F, drawn in a way; other ones than those that the comparison judges. labels: that
    all the images of a row are drawn as, or None.
    As fitted, where nothing is better, or there are too few images to tell.
    """
    few = max(math.ceil(count / 5), min(count, DRAWN))
    if not enough(few, space):
        return AS_FITTED, []

    features = {how: drawn(how, few) for how in ways}
    led_away = [(space.distance_of(features[how]), how.autoguidance) for how in ways if how.autoguidance]
    known = [(distance, strength) for distance, strength in led_away if distance is not None]
    if known and any(how.guidance for how in ways):
        _, strength = min(known)
        features |= {how: drawn(how, few) for how in ways_with_both(strength)}
    tried = [
        replace(point, sampling=how, label_read=None if labels is None else space.share_read(features[how], labels[:few]))
        for how, point in along(features, space).items()
    ]
    lowest = lowest_fd(tried)
    if few >= FEW_PER_FEATURE * space.model.dimensions and lowest is not None and lowest.sampling is not None:
        tried[tried.index(lowest)] = replace(lowest, fd_plus_minus=space.error_of(features[lowest.sampling]))
    best = best_of(tried)
    return (best.sampling if best and best.sampling else AS_FITTED), tried


def rejection(space: FeatureSpace, confidence: Tensor, features: Tensor, labels: Tensor) -> list[Tradeoff]:
    """Figures of the SHARES of the samples that another classifier than the one that judges assigns to their labels most
    confidently (Razavi et al. 2019, section 3.3).

    confidence: what `label_log_prob` gives, N; the images' features N F; labels N, which each was drawn as. Empty where there
    are too few images.
    """
    kept = {share: rejection_sampled(confidence, labels, share) for share in SHARES}
    number = min(len(indices) for indices in kept.values())
    some = {
        share: features[indices[torch.randperm(len(indices), generator=seeded())[:number]]] for share, indices in kept.items()
    }
    return [replace(point, kept=share) for share, point in along(some, space).items()]


def along(features: dict[T, Tensor], space: FeatureSpace) -> dict[T, Tradeoff]:
    """The figures for each value of what is varied, from as many features N F each.

    None where there are fewer than ENOUGH images, as the table withholds its figures then, or where those for training have
    all the same features.
    """
    (number,) = {len(some) for some in features.values()}
    if not enough(number, space):
        return {}
    reference = Cloud.of(space.reference[torch.randperm(len(space.reference), generator=seeded())[:number]])
    points = {}
    for value, some in features.items():
        found = {name: float(figure) for name, figure in likeness(reference, some).items()}
        points[value] = Tradeoff(
            fd=space.distance_of(some),
            kid=found["kid"],
            precision=found["precision"],
            recall=found["recall"],
            density=found["density"],
            coverage=found["coverage"],
            images=number,
        )
    return points


def enough(number: int, space: FeatureSpace) -> bool:
    """Whether as many images can be judged."""
    return min(number, len(space.reference)) >= ENOUGH and space.varies


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def lowest_fd(points: Sequence[Tradeoff]) -> Tradeoff | None:
    """The point of the lowest Fréchet distance; None where there are too few images for any."""
    judged = [(point.fd, index) for index, point in enumerate(points) if point.fd is not None]
    return points[min(judged)[1]] if judged else None


def best_of(points: Sequence[Tradeoff]) -> Tradeoff | None:
    """The point of the highest label accuracy, among those whose fd is within the error of the lowest; where accuracy is not
    known, the point of the lowest fd. None where no point has an fd.

    The Fréchet distance does not tell those points apart, and hardly sees a few malformed images among many good ones.
    """
    lowest = lowest_fd(points)
    if lowest is None or lowest.fd is None:
        return None
    near = [point for point in points if point.fd is not None and point.fd <= lowest.fd + (lowest.fd_plus_minus or 0.0)]
    return lowest if lowest.label_read is None else max(near, key=lambda point: (point.label_read or 0.0, point.precision))
