"""The likelihood of held-out images under every prior, as a table with its notes."""

from typing import Any

from pipelines.console import counted
from pipelines.judging.comparison import ROWS, title
from pipelines.judging.quality import DEVIATIONS
from pipelines.pages.tables import Row, Table


def columns_of(result: dict[str, Any]) -> list[str]:
    """The headings of the table: of bounds on -log p(x), in nats an image."""
    samples = [] if result["samples"] == 1 else [f"K = {result['samples']}"]
    naive = ["naive"] if any("naive" in values for values in result["priors"].values()) else []
    bits = ["bits/dim"] if result["measure"] == "probability" else []
    return ["rate", "-ELBO", *samples, *bits, *naive]


def cells_of(result: dict[str, Any], prior: str) -> list[str]:
    values = result["priors"][prior]
    best = values["importance_weighted"]
    cells = {
        "rate": f"{values['rate']['nats']:.2f}",
        "-ELBO": in_nats(values["negative_elbo"]),
        f"K = {result['samples']}": in_nats(best),
        "naive": in_nats(values["naive"]) if "naive" in values else "",
    }
    if "bits_per_dimension" in best:
        cells["bits/dim"] = f"{best['bits_per_dimension']:.4f}"
    return [cells[column] for column in columns_of(result)]


def in_nats(value: dict[str, Any]) -> str:
    """A figure with half of its 95 % interval."""
    return f"{value['nats']:.2f}" + ("" if value["error"] is None else f" ± {DEVIATIONS * value['error']:.2f}")


MEASURES = {
    "probability": "a probability of the images as they are stored",
    "density": "a density of pixels in [0, 1], not a probability of 8-bit images, so bits per dimension have no meaning:"
    " compare these figures only with others of this likelihood",
    "pseudo-likelihood": "a pseudo-likelihood: pixels of these images take values that this distribution gives no probability,"
    " so the figures are no log-likelihoods, and bits per dimension have no meaning",
}


def notes_of(result: dict[str, Any]) -> list[str]:
    """What the figures are, and what the rate consists of."""
    images, samples, priors = result["images"], result["samples"], result["priors"]
    draws = f"{samples} draws of z for each image" if samples > 1 else "One z for each image"
    lines = [
        f"nats an image, of -log p(x): bounds from above; ±: half of the 95 % interval over {counted(images, 'image')} of the"
        f" {result['images_of']}. {draws}, the same for every prior. -ELBO = distortion + rate; the distortion, -log p(x|z), is"
        f" {in_nats(result['distortion'])}. p(x|z): {result['likelihood']}, {MEASURES[result['measure']]}."
    ]
    if context := result["told"]:
        lines.append(
            f"The learned prior is conditioned on an image's {context}, and the others are not: what it bounds is"
            f" -log p(x | {context}), and part of the difference is what the {context} says."
        )
    if any("naive" in values for values in priors.values()):
        most = max(values["naive"]["effective_samples"] for values in priors.values() if "naive" in values)
        lines.append(
            f"naive: minus the logarithm of the average of p(x|z) over {counted(result['naive_samples'], 'draw')} from the prior."
            f" Effective sample size: {most:.1f} at best. Near 1, a single draw dominates the average, which then is no estimate."
        )
    if {"standard", "learned"} <= priors.keys():
        standard, learned = priors["standard"]["rate"], priors["learned"]["rate"]
        lines.append(
            f"rate: {standard['nats']:.2f} under {title('standard', 'codes' in result)},"
            f" {learned['nats']:.2f} under the learned prior. The difference,"
            f" {in_nats(priors['learned']['negative_elbo']['below_standard'])} nats, is what stage 2 gains in the ELBO."
        )
    if "latents" in result and "standard" in priors:
        latents = result["latents"]
        information, count = latents["mutual_information"]["nats"], latents["images"]
        lines.append(
            f"rate under N(0, I) = I(x; z) + KL(q(z) ‖ N(0, I)) = {information:.2f} +"
            f" {priors['standard']['rate']['nats'] - information:.2f}, with the q(z) of {counted(count, 'image')} alone:"
            f" an empirical I(x; z) cannot exceed log {count} = {latents['log_n']:.2f}, so where it comes near that, the true one"
            f" may be larger and the true KL smaller. Active units: {latents['active_units']} of {latents['dimensions']}."
        )
    return lines


def as_table(result: dict[str, Any]) -> Table:
    rows = [Row(name, title(name, "codes" in result), cells_of(result, name)) for name in ROWS if name in result["priors"]]
    return Table(f"Likelihood of {counted(result['images'], 'held-out image')}", columns_of(result), rows, notes_of(result))
