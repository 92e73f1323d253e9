"""The comparison in words: titles, cells of the table, notes and verdicts."""

import math
from typing import Any

from pipelines.judging.tradeoffs import lowest_fd

ROWS = {
    "real": "real images",
    "reconstruction": "reconstructions",
    "standard": "N(0, I)",
    "gaussian": "fitted Gaussian",
    "mixture": "Gaussian mixture",
    "unigram": "unigram of codes",
    "learned": "learned prior",
    "guided": "learned, guided",
    "posterior": "posterior (not a generator)",
}


def figures(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of every row of the comparison, in the order shown."""
    everything = {"real": metrics["real"], "reconstruction": metrics["reconstruction"], **metrics["priors"]}
    return {name: everything[name] for name in ROWS if name in everything}


def title(name: str, metrics: dict[str, Any]) -> str:
    if name == "guided":
        return f"learned, guidance {metrics['priors']['guided']['guidance']:g}"
    return "uniform codes" if name == "standard" and "codes" in metrics else ROWS[name]


HEADINGS = {
    "fd": "fd",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "nearer": "nearer",
    "nll": "nll of z",
}
"""Of the columns, in the order shown"""


def cell(values: dict[str, Any], figure: str) -> str:
    """A figure of one row with half its 95 % interval; a dash where it is withheld, nothing where there is none."""
    if figure not in values:
        return "none" if figure == "fd" else ""
    value, half = values[figure], values.get("plus_minus", {}).get(figure)
    if value is None:
        return "–"
    if figure == "nll":
        return f"{value:.1f}"
    # As many decimals as show three digits of the figure or of its error, whichever is larger.
    size = max(abs(value), half or 0)
    shown = max(2, 2 - math.floor(math.log10(size))) if figure == "kid" and size else 2
    return f"{value:.{shown}f}" + ("" if half is None else f" ± {half:.{shown}f}")


def generator(metrics: dict[str, Any]) -> str:
    """The prior that a run is meant to be drawn from."""
    return "learned" if "fd" in metrics["priors"]["learned"] else "standard"


def drawn_from(metrics: dict[str, Any]) -> str:
    """The same in words."""
    return "the learned prior" if generator(metrics) == "learned" else title("standard", metrics)


def notes(metrics: dict[str, Any]) -> list[str]:
    """What the figures are, and those that are not of one prior."""
    features, count, reference = metrics["features"], metrics["images"], metrics["images_of"]["reference"]
    name = generator(metrics)
    values = metrics["priors"][name]
    accuracy = f", which reads {100 * features['accuracy']:.1f} % of test images right" if "accuracy" in features else ""
    lines = [
        f"fd: Fréchet distance to {reference} training images, from {count} images a row under seed {metrics['seed']}, in the"
        f" {features['dimensions']} features of the {features['extractor']} {features['digest']}{accuracy}; lower is better. KID:"
        f" kernel distance to {min(count, reference)} of them, lower is better. precision and density: how many samples lie among"
        " training images; recall and coverage: how much of the training images' variety the samples reach; higher is better.",
        f"±: half of the interval of {metrics['intervals']}; other samples of the same model would fall into it, another training"
        " run need not.",
        "nearer: of pairs of a sample and a held-out image, the share in which the sample lies nearer to its nearest training"
        " image. 0.5: as near as new images are; above: copied (Meehan et al. 2020). Drawn from"
        f" {drawn_from(metrics)}: z = {values['copying_z']:.1f}, where below -3 would mean copies.",
    ]
    lines += [f"{figure}: withheld, {reason}." for figure, reason in metrics["withheld"].items()]
    lines += [f"warning: {warning}." for warning in metrics["warnings"]]
    if "note" in metrics["priors"]["learned"]:
        lines.append(f"learned prior: {metrics['priors']['learned']['note']}.")
    if any("nll" in row for row in metrics["priors"].values()):
        told = f"; the learned prior alone is told the {metrics['told']}" if metrics.get("told") else ""
        lines.append(f"nll of z: nats an image of held-out latents under the prior; lower is better{told}.")
    lines.append(f"reconstructions: mean squared error {metrics['reconstruction']['mse']:.5f} a pixel, of values in [0, 1].")
    for level in metrics.get("codes", []):
        height, width = level["grid"]
        lines.append(
            f"codes on the {height}×{width} grid: {level['used']} of {level['codes']} used over the test images,"
            f" perplexity {level['perplexity']:.0f}."
        )
    if "label_read" in metrics["reconstruction"]:
        read = {row: f"{100 * values['label_read']:.1f} %" for row, values in figures(metrics).items() if "label_read" in values}
        guided = f", {read['guided']} under guidance" if "guided" in read else ""
        lines.append(
            f"labels: the classifier reads the one asked for off {read['learned']} of the learned prior's samples{guided}, and"
            f" the true one off {read['reconstruction']} of reconstructions and {read['real']} of real images."
        )
    if metrics.get("guidance"):
        tried = metrics["guidance"]
        strengths, count = ", ".join(f"{row['guidance']:g}" for row in tried), tried[0]["images"]
        if best := lowest_fd(tried):
            row = "it has a row of its own" if best["guidance"] else "the learned prior as fitted"
            lines.append(
                f"guidance: of {strengths}, the fd of {count} samples of another seed is lowest with {best['guidance']:g}; {row}."
            )
        else:
            lines.append(f"guidance: not chosen, {count} samples of each strength are too few for a Fréchet distance.")
    if metrics["gap_closed"] is not None:
        start = title("standard", metrics)
        guided = f", {metrics['gap_closed_guided']:.3f} under guidance" if "gap_closed_guided" in metrics else ""
        lines.append(
            f"gap closed: {metrics['gap_closed']:.3f} of the way from {start} to the decoder's own reconstructions{guided}."
        )
    elif name == "learned":
        lines.append(f"gap closed: none stated, {metrics['gap_closed_reason']}.")
    return lines


def between_runs(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What is to be said of several runs, from their metrics: which lies nearest to the data, and what does not compare."""
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for run, metrics in runs.items():
        features = metrics["features"]
        judged_by = features["digest"], features["reference"]["digest"], metrics["images"]
        groups.setdefault(judged_by, {})[run] = metrics
    lines = []
    for group in groups.values():
        found = {run: metrics["priors"][generator(metrics)] for run, metrics in group.items()}
        ranked = sorted((run for run in found if found[run]["fd"] is not None), key=lambda run: found[run]["fd"])
        parts: list[str] = []
        for run in ranked:
            drawn = drawn_from(group[run]) + ", as a plain autoencoder is" * (generator(group[run]) == "standard")
            times = found[run]["fd"] / found[ranked[0]]["fd"]
            parts.append(f"{run}, drawn from {drawn}, at {cell(found[run], 'fd')}" + f" ({times:.1f} times as far)" * bool(parts))
        if len(parts) > 1:
            lines.append(f"Fréchet distance from the same training images, in the same features: {'; '.join(parts)}.")
    if len(groups) > 1:
        listed = "; ".join(", ".join(group) for group in groups.values())
        lines.append(f"Not everything here compares: other images, other features or another number of images part {listed}.")
    return lines


def verdict_in_words(metrics: dict[str, Any]) -> str:
    priors, start = metrics["priors"], title("standard", metrics)
    standard, best = cell(priors["standard"], "fd"), cell(metrics["reconstruction"], "fd")
    if generator(metrics) == "standard":
        return (
            f"A plain autoencoder, without a learned prior. Drawn from {start}, its samples lie at a Fréchet distance of"
            f" {standard} from the training images, its reconstructions at {best}."
        )
    if metrics["gap_closed"] is None:
        return f"Nothing can be said of what the learned prior buys here: {metrics['gap_closed_reason']}."
    times, guided = priors["standard"]["fd"] / priors["learned"]["fd"], ""
    if "guided" in priors:
        closed, strength = 100 * metrics["gap_closed_guided"], priors["guided"]["guidance"]
        guided = f", and {closed:.1f} % under a guidance of {strength:g} toward the {metrics['told']} asked for"
    return (
        f"Drawn from {start}, samples lie at a Fréchet distance of {standard} from the training images; drawn from the learned"
        f" prior, at {cell(priors['learned'], 'fd')}: {times:.1f} times nearer. The decoder's own reconstructions lie at {best},"
        f" so the learned prior closes {100 * metrics['gap_closed']:.1f} % of the gap that {start} leaves{guided}."
    )
