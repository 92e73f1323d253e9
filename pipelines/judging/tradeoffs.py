"""Diversity traded for fidelity, of a prior that is told labels or captions: by rejection, and by guidance.

Along each, every row is judged by the same number of images: figures of different numbers do not compare.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipelines.judging.features import Classifier, FeatureSpace, kept_best
from pipelines.judging.quality import FEWEST, Cloud, likeness
from pipelines.runs.run import Run

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)  # of samples kept by rejection
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)  # of guidance


def rejection(run: Run, space: FeatureSpace, other: Classifier, images: Tensor, features: Tensor, labels: Tensor) -> list[dict]:
    """Of the samples, the SHARES that a classifier other than the one that judges is surest of (Razavi et al. 2019, section 3.3).

    images uint8 N C H W, their features N F, labels N: what each was drawn as. Empty where there are too few images.
    """
    kept = {share: kept_best(run.fabric, other, images, labels, share) for share in SHARES}
    number = min(len(indices) for indices in kept.values())
    some = {
        share: features[indices[torch.randperm(len(indices), generator=seeded())[:number]]] for share, indices in kept.items()
    }
    return along("kept", some, space)


def guidance(space: FeatureSpace, drawn: Callable[[float], Tensor]) -> list[dict]:
    """All of the samples, drawn with classifier-free guidance of different STRENGTHS (Ho and Salimans 2022).

    drawn: images uint8 N C H W of one strength. Empty where there are too few images.
    """
    some = {strength: space.features(drawn(strength), f"features under guidance {strength:g}") for strength in STRENGTHS}
    return along("guidance", some, space)


def along(name: str, features: dict[float, Tensor], space: FeatureSpace) -> list[dict[str, Any]]:
    """A row for each value of what is varied, from as many features N F each."""
    (number,) = {len(some) for some in features.values()}
    if min(number, len(space.reference)) < FEWEST:
        return []
    reference = Cloud.of(space.reference[torch.randperm(len(space.reference), generator=seeded())[:number]])
    rows = []
    for value, some in features.items():
        figures = {figure: float(found) for figure, found in likeness(reference, some).items()}
        rows.append({name: value, "fd": space.distance_of(some), **figures, "images": number})
    return rows


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def lowest_fd(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the lowest Fréchet distance; None where there are too few images for any."""
    return min((row for row in rows if row["fd"] is not None), key=lambda row: row["fd"], default=None)
