"""The comparison of a run's priors, as data: every figure of it, written to and read from metrics.json.

fd          Fréchet distance; kid, precision, recall, density, coverage: see quality.py
nearer      share of held-out images that lie farther from the training set than a sample does: 1/2 of new images
copied      share of samples that lie as near to the training set as the nearest percent of held-out images do: about 0.01
            of new images. Both are higher of typical images, as guidance draws them, without a copy among them
nll         -E_q[log p(z)] of held-out images' latents under a prior, in nats an image
gap_closed  (fd(standard) - fd(learned)) / (fd(standard) - fd(reconstruction)): 0 where the learned prior gains nothing,
            1 where its samples are as near to the data as the decoder's own reconstructions; gap_closed_tuned is of
            samples that are drawn in the best way that was tried; plus_minus is half of the 95 % interval, over resamples
            of the images of all rows at once
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cattrs
from cattrs.gen import make_dict_unstructure_fn, override
from torch import Tensor

from pipelines.files import read_as, strict, structured, write_json
from pipelines.judging.bounds import Bound, Bounds, BoundsOfPrior, Estimate, Naive
from pipelines.judging.features import Features
from pipelines.judging.health import Health
from pipelines.judging.quality import error
from pipelines.judging.tradeoffs import Tradeoff, best_of, described
from pipelines.runs.run import Run
from stage2_prior.sampling import AS_FITTED, Sampling

SCHEMA = 1
SURELY = 0.01
"""The largest probability of `copying_p` at which the page tells to look for copies."""
ROWS = {
    "real": "real images",
    "reconstruction": "reconstructions",
    "standard": "N(0, I)",
    "gaussian": "fitted Gaussian",
    "mixture": "Gaussian mixture",
    "unigram": "unigram of codes",
    "order2": "order-2 context model",
    "learned": "learned prior",
    "tuned": "learned, tuned",
    "posterior": "posterior (not a generator)",
}
"""The titles of the rows, in the order shown."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one row; None where a figure is withheld, or has no meaning for it."""

    fd: float | None
    kid: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    nearer: float | None
    copied: float | None = None
    plus_minus: dict[str, float]
    """of each figure above, half of its 95 % interval"""
    copying_p: float | None = None
    """the probability of so many near samples if they lay as held-out images do; of the tuned row that of the prior as fitted"""
    distance_to_training: float
    """median distance to the nearest training image"""
    mse: float | None = None
    """of reconstructions: mean squared error a pixel, of values in [0, 1]"""
    fd_perturbed: float | None = None
    """of reconstructions: fd after a tenth of the positions of each latent was exchanged with those of other images"""
    nll: float | None = None
    nll_is_bound: bool = False
    """whether the true figure may be lower"""
    parameters: int | None = None
    """of a prior: numbers that were trained or fitted"""
    label_read: float | None = None
    """label accuracy: share of images for which the classifier predicts the requested label"""
    labels_read: dict[str, float] = field(default_factory=dict)
    """the same of the images of each label"""
    sampling: Sampling | None = None
    """how the row was drawn, where not as the prior was fitted"""
    note: str | None = None

    @property
    def copies(self) -> bool:
        """Whether surely more of its images lie near training images than new images would."""
        return self.copying_p is not None and self.copying_p < SURELY


@dataclass(frozen=True)
class CodeUse:
    """How the codes of one level are used over the whole test split."""

    grid: tuple[int, int]
    codes: int
    used: int
    perplexity: float


@dataclass(frozen=True)
class ImagesOf:
    """Where the images of the rows come from."""

    reference: int
    """training images that all rows are compared with"""
    real: str = "test split"
    reconstruction: str = "test split"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every prior of a run through one frozen decoder, each row from the same number of images."""

    real: Row
    reconstruction: Row
    priors: dict[str, Row]
    missing: dict[str, str] = field(default_factory=dict)
    """of priors that there are none of, why"""
    sampling: list[Tradeoff] = field(default_factory=list)
    """the ways to draw from the learned prior that were tried, to find the best"""
    rejection: list[Tradeoff] = field(default_factory=list)
    health: Health | None = None
    """of stage 2; None without a learned prior, or a density"""
    commonest: float | None = None
    """share of the commonest label among the test images"""
    codes: list[CodeUse] = field(default_factory=list)
    """one for each level; none of continuous latents"""
    gap_closed: float | None
    gap_closed_plus_minus: float | None = None
    """half of its 95 % interval"""
    gap_closed_reason: str | None = None
    """why there is none"""
    gap_closed_tuned: float | None = None
    gap_closed_tuned_plus_minus: float | None = None
    prior: str = "learned prior"
    """what the learned prior is, such as PixelSNAIL"""
    conditioned_on: Literal["label", "caption"] | None
    """what the learned prior is conditioned on"""
    images: int
    """in every row"""
    images_of: ImagesOf
    seed: int
    weights: dict[str, str]
    """digests of the weights that are compared, by the phase that trained them"""
    judged_by: dict[str, Any]
    """how samples were judged, as `judged_by` of the run's config says"""
    features: Features
    intervals: str
    """what stands behind an error, in words"""
    withheld: dict[str, str]
    """of figures that are withheld, why"""
    warnings: list[str]
    versions: dict[str, str]
    likelihood: Bounds | None = None
    """bounds on log p(x); None where the encoder has no density"""
    schema: int = SCHEMA

    @property
    def rows(self) -> dict[str, Row]:
        """Every row by its name, in the order shown."""
        everything = {"real": self.real, "reconstruction": self.reconstruction, **self.priors}
        return {name: everything[name] for name in ROWS if name in everything}

    @property
    def generator(self) -> str:
        """The prior that the run is meant to be drawn from."""
        return "learned" if "learned" in self.priors else "standard"

    @property
    def recommended(self) -> str | None:
        """The row that is best drawn from: the lowest Fréchet distance; but the tuned row, or else the learned prior as fitted,
        where another is not better beyond the error. None where there are no such figures."""
        known = {name: row for name, row in self.priors.items() if name != "posterior" and row.fd is not None}
        distances = {name: row.fd or 0.0 for name, row in known.items()}
        if not distances:
            return None
        best = min(distances, key=distances.__getitem__)
        for own in ("tuned", "learned"):
            if own in distances:
                errors = [known[name].plus_minus.get("fd", 0.0) for name in (best, own)]
                if distances[own] - distances[best] <= sum(error**2 for error in errors) ** 0.5:
                    return own
        return best

    def tuned(self, weaker: bool) -> Sampling:
        """How the learned prior is drawn best, of the ways that were tried; as fitted where that, or another prior, is better.

        weaker: whether the prior still has its weaker copy. Without, it is the best of the ways that need none.
        """
        how = self.priors["tuned"].sampling if self.recommended == "tuned" else None
        if how is None:
            return AS_FITTED
        if weaker or not how.autoguidance:
            return how
        best = best_of([point for point in self.sampling if point.sampling is None or not point.sampling.autoguidance])
        return best.sampling if best is not None and best.sampling is not None else AS_FITTED

    def title(self, name: str) -> str:
        """The title of a row, with how it was drawn."""
        how = self.rows[name].sampling if name in self.rows else None
        if how is not None:
            return f"learned, {described(how)}"
        return title(name, bool(self.codes))


def title(name: str, codes: bool) -> str:
    """The title of a row, by its name. codes: whether the latents are codes."""
    return "uniform codes" if name == "standard" and codes else ROWS[name]


@functools.cache  # it makes code for each class that it reads
def converter() -> cattrs.Converter:
    made = strict(cattrs.Converter())
    for kind in (Sampling, Row, Features, Tradeoff, Estimate, Bound, Naive, BoundsOfPrior, Bounds):
        made.register_unstructure_hook(kind, make_dict_unstructure_fn(kind, made, _cattrs_omit_if_default=True))
    # The schema is written though it is what is expected; what is missing stands among the priors.
    comparison = make_dict_unstructure_fn(
        Comparison, made, _cattrs_omit_if_default=True, schema=override(omit_if_default=False), missing=override(omit=True)
    )
    made.register_unstructure_hook(Comparison, comparison)
    return made


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """JSON-ready values."""
    values = converter().unstructure(comparison)
    return values | {"priors": values["priors"] | {name: {"note": why} for name, why in comparison.missing.items()}}


def from_dict(values: Any) -> Comparison:
    """Raises ValueError where the values are not a comparison's, or of a later version."""
    if not isinstance(values, dict) or not isinstance(values.get("priors"), dict):
        raise ValueError("it holds no comparison")
    if values.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"it is of version {values['schema']}, and this one reads version {SCHEMA}")
    missing = {name: row["note"] for name, row in values["priors"].items() if isinstance(row, dict) and row.keys() == {"note"}}
    priors = {name: row for name, row in values["priors"].items() if name not in missing}
    if unknown := priors.keys() - ROWS.keys():
        raise ValueError(f"there is no row {min(unknown)!r}")
    return structured(values | {"priors": priors, "missing": missing}, Comparison, converter())


def write_comparison(path: Path, comparison: Comparison) -> None:
    write_json(path, to_dict(comparison))


def read_comparison(path: Path) -> Comparison:
    """Raises UserError where the file holds none."""
    return read_as(path, from_dict, "delete it, to have it made again")


def comparison_file(run: Run) -> Path:
    """Where the comparison of a run is: made here, or as it came with an export."""
    made_here = run.work / "compare" / "metrics.json"
    return made_here if made_here.is_file() else run.folder / "compare" / "metrics.json"


@dataclass(frozen=True)
class Verdict:
    """How much of the gap between N(0, I) and the decoder's reconstructions the learned prior closes."""

    closed: float | None
    plus_minus: float | None = None
    reason: str | None = None
    tuned: float | None = None
    tuned_plus_minus: float | None = None


def verdict_of(fd: dict[str, Tensor], withheld: str | None, start: str) -> Verdict:
    """fd: the Fréchet distances of each row, first as drawn, then under each resample; the same resamples for all rows.

    withheld: why there is no Fréchet distance, or no learned prior; start: what the standard prior is called.
    """
    if withheld is not None:
        return Verdict(None, reason=withheld)
    gap = fd["standard"] - fd["reconstruction"]
    # The distance of real held-out images is what sampling error alone costs: a gap below it, or below its own error, cannot be
    # told from noise.
    if float(gap[0]) <= max(float(fd["real"][0]), error(gap), 0.0):
        return Verdict(None, reason=f"{start} is no worse than the reconstructions, beyond sampling error")
    closed = {name: (fd["standard"] - fd[name]) / gap for name in ("learned", "tuned") if name in fd}
    figures = {name: (float(shares[0]), error(shares)) for name, shares in closed.items()}
    tuned, tuned_plus_minus = figures.get("tuned", (None, None))
    return Verdict(*figures["learned"], tuned=tuned, tuned_plus_minus=tuned_plus_minus)
