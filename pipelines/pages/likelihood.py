"""The likelihood of held-out images under every prior, as a table with its notes."""

from pipelines.console import counted
from pipelines.judging.bounds import Bounds, Estimate
from pipelines.judging.comparison import ROWS, title
from pipelines.judging.quality import DEVIATIONS
from pipelines.pages.tables import Row, Table


def columns_of(result: Bounds) -> list[str]:
    """The headings of the table: of bounds on -log p(x), in nats an image."""
    samples = [] if result.samples == 1 else [f"K = {result.samples}"]
    naive = ["naive"] if any(values.naive for values in result.priors.values()) else []
    bits = ["bits/dim"] if result.measure == "probability" else []
    return ["rate", "-ELBO", *samples, *bits, *naive]


def cells_of(result: Bounds, prior: str) -> list[str]:
    values = result.priors[prior]
    best = values.importance_weighted
    cells = {
        "rate": f"{values.rate.nats:.2f}",
        "-ELBO": in_nats(values.negative_elbo),
        f"K = {result.samples}": in_nats(best),
        "naive": "" if values.naive is None else f"{values.naive.nats:.2f}",
        "bits/dim": "" if best.bits_per_dimension is None else f"{best.bits_per_dimension:.4f}",
    }
    return [cells[column] for column in columns_of(result)]


def in_nats(value: Estimate) -> str:
    """A figure with half of its 95 % interval."""
    return f"{value.nats:.2f}" + ("" if value.error is None else f" ± {DEVIATIONS * value.error:.2f}")


MEASURES = {
    "probability": "a probability of the images as they are stored",
    "density": "a density of pixels in [0, 1], not a probability of 8-bit images, so bits per dimension have no meaning:"
    " compare these figures only with others of this likelihood",
    "pseudo-likelihood": "a pseudo-likelihood: pixels of these images take values that this distribution gives no probability,"
    " so the figures are no log-likelihoods, and bits per dimension have no meaning",
}


def notes_of(result: Bounds) -> list[str]:
    """What the figures are, and what the rate consists of."""
    priors, codes = result.priors, result.codes is not None
    draws = f"{result.samples} draws of z for each image" if result.samples > 1 else "One z for each image"
    lines = [
        f"nats an image, of -log p(x): bounds from above; ±: half of the 95 % interval over {counted(result.images, 'image')} of"
        f" the {result.images_of}. {draws}, the same for every prior. -ELBO = distortion + rate; the distortion, -log p(x|z), is"
        f" {in_nats(result.distortion)}. p(x|z): {result.likelihood}, {MEASURES[result.measure]}."
    ]
    if context := result.conditioned_on:
        lines.append(
            f"The learned prior is conditioned on an image's {context}, and the others are not: what it bounds is"
            f" -log p(x | {context}), and part of the difference is what the {context} says."
        )
    if effective := [values.naive.effective_samples for values in priors.values() if values.naive]:
        lines.append(
            f"naive: minus the logarithm of the average of p(x|z) over {counted(result.naive_samples, 'draw')} from the prior."
            f" Effective sample size: {max(effective):.1f} at best. Near 1, a single draw dominates the average, which then is no"
            " estimate."
        )
    standard = priors["standard"].rate.nats if "standard" in priors else None
    if standard is not None and "learned" in priors and (gain := priors["learned"].negative_elbo.below_standard):
        lines.append(
            f"rate: {standard:.2f} under {title('standard', codes)}, {priors['learned'].rate.nats:.2f} under the learned prior."
            f" The difference, {in_nats(gain)} nats, is what stage 2 gains in the ELBO."
        )
    if (latents := result.latents) is not None and standard is not None:
        information, count = latents.mutual_information.nats, latents.images
        lines.append(
            f"rate under N(0, I) = I(x; z) + KL(q(z) ‖ N(0, I)) = {information:.2f} + {standard - information:.2f},"
            f" with the q(z) of {counted(count, 'image')} alone: an empirical I(x; z) cannot exceed log {count} ="
            f" {latents.log_n:.2f}, so where it comes near that, the true one may be larger and the true KL smaller."
            f" Active units: {latents.active_units} of {latents.dimensions}."
        )
    return lines


def as_table(result: Bounds) -> Table:
    codes = result.codes is not None
    rows = [Row(name, title(name, codes), cells_of(result, name)) for name in ROWS if name in result.priors]
    return Table(f"Likelihood of {counted(result.images, 'held-out image')}", columns_of(result), rows, notes_of(result))
