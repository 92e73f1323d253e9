"""Priors that share one frozen decoder, of several runs, in one ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipelines.judging.compare import Exhibits
from pipelines.judging.comparison import Comparison, Row
from pipelines.judging.quality import error_of_mean
from pipelines.judging.tradeoffs import described
from stage2_prior.sampling import AS_FITTED

COMMON = ("real", "reconstruction", "posterior")
"""Rows that are no prior's to draw from: they stand on top."""
OWN = ("learned", "tuned")
"""Rows that each run has its own of; the others are the same in all that share a decoder."""


@dataclass(frozen=True)
class Entry:
    """One row of the ranking."""

    key: str
    """of the row in its own run"""
    run: str | None
    """whose prior it is; None of what all share"""
    title: str
    """the prior in words, the run where another has such a prior, too, and how it is drawn from, where not as it was fitted"""
    row: Row
    images: Tensor
    """uint8 N C H W"""
    seconds_to_draw: float | None
    """1,000 images"""
    seconds_to_train: float | None
    nats: Tensor | None
    """-log p(z) of the same draws of held-out latents under each prior, one an image; None where it has none of its own"""

    @property
    def generates(self) -> bool:
        """Whether its images are drawn from a prior."""
        return self.key not in COMMON


@dataclass(frozen=True)
class Standing:
    """One row of the ranking, as a file keeps it."""

    prior: str
    run: str | None
    fd: float | None
    fd_plus_minus: float | None
    precision: float | None
    recall: float | None
    coverage: float | None
    copied: float | None
    """share of samples that lie as near to a training image as the nearest 1 % of held-out images do"""
    nats_above_best: float | None
    nats_plus_minus: float | None
    parameters: int | None
    seconds_to_train: float | None
    seconds_to_draw: float | None
    """1,000 images"""


def sharing(comparisons: Mapping[str, Comparison]) -> list[list[str]]:
    """The runs, grouped by what is compared: one decoder, judged by the same images and features under one seed."""
    groups: dict[tuple, list[str]] = {}
    for run, found in comparisons.items():
        decoder = found.weights.get("refined") or found.weights.get("stage1") or run
        judged_by = found.features.digest, found.features.reference.digest, found.images, found.seed
        groups.setdefault((decoder, *judged_by), []).append(run)
    return [*groups.values()]


def names_of(comparisons: Mapping[str, Comparison]) -> dict[str, str]:
    """The name of each run's learned prior: its kind; where others are of it, also what it is conditioned on, or the run."""
    conditions: dict[str, set[str | None]] = {}  # by kind
    for comparison in comparisons.values():
        conditions.setdefault(comparison.prior, set()).add(comparison.conditioned_on)
    names = {
        run: found.prior + (f" with {found.conditioned_on}s" if found.conditioned_on and len(conditions[found.prior]) > 1 else "")
        for run, found in comparisons.items()
    }
    return {run: name if [*names.values()].count(name) == 1 else f"{name} ({run})" for run, name in names.items()}


def ranking(comparisons: Mapping[str, Comparison], exhibits: Mapping[str, Exhibits]) -> list[Entry]:
    """Real images and reconstructions, then every prior by its Fréchet distance; of several runs that share a decoder.

    What all runs have alike, such as N(0, I), stands there once.
    """
    names = names_of(comparisons)
    common: list[Entry] = []
    priors: list[Entry] = []
    for run, comparison in comparisons.items():
        for key, row in comparison.rows.items():
            own = key in OWN
            if not own and any(entry.key == key for entry in [*common, *priors]):
                continue
            found = exhibits[run]
            name = names[run] if own else comparison.title(key)
            entry = Entry(
                key,
                run if own else None,
                f"{name}, {described(row.sampling or AS_FITTED)}" if key == "tuned" else name,
                row,
                found.images[key],
                found.seconds.get(key),
                found.training_seconds.get("stage2") if own else None,
                found.nats.get(key),
            )
            (common if key in COMMON else priors).append(entry)
    return common + sorted(priors, key=lambda entry: float("inf") if entry.row.fd is None else entry.row.fd)


def candidates(entries: Sequence[Entry]) -> list[Entry]:
    """The priors of a ranking that can be named the best: those with a Fréchet distance, whose samples are no copies."""
    return [entry for entry in entries if entry.generates and entry.row.fd is not None and not entry.row.copies]


def above_best(entries: Sequence[Entry]) -> dict[int, tuple[float, float]]:
    """How many nats an image each prior needs more than the best one, by its place in the ranking, and half of the 95 % interval.

    Paired: every prior sees the same draws of the same held-out latents, so that what is hard for all falls out.
    """
    known = {place: entry.nats for place, entry in enumerate(entries) if entry.nats is not None}
    if not known:
        return {}
    best = min(known.values(), key=lambda nats: float(nats.mean()))
    gaps = {place: nats - best for place, nats in known.items()}
    return {place: (float(gap.mean()), error_of_mean(gap) if len(gap) > 1 else 0.0) for place, gap in gaps.items()}


def standings(entries: Sequence[Entry]) -> list[Standing]:
    """A ranking without its images."""
    gaps, found = above_best(entries), []
    for place, entry in enumerate(entries):
        nats, half = gaps.get(place, (None, None))
        found.append(
            Standing(
                prior=entry.title,
                run=entry.run,
                fd=entry.row.fd,
                fd_plus_minus=entry.row.plus_minus.get("fd"),
                precision=entry.row.precision,
                recall=entry.row.recall,
                coverage=entry.row.coverage,
                copied=entry.row.copied,
                nats_above_best=nats,
                nats_plus_minus=half,
                parameters=entry.row.parameters,
                seconds_to_train=entry.seconds_to_train,
                seconds_to_draw=entry.seconds_to_draw,
            )
        )
    return found
