"""The comparison, as a table for the terminal and as a picture."""

import io
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torchvision.utils import make_grid

from pipelines.checkpoint import write_file
from stage2_prior.latents import LatentSpec

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

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


def table(metrics: dict[str, Any]) -> str:
    """The comparison for the terminal."""
    rows = {"": list(HEADINGS.values())}
    rows |= {title(name, metrics): [cell(row, figure) for figure in HEADINGS] for name, row in figures(metrics).items()}
    first = max(map(len, rows))
    widths = [2 + max(map(len, column)) for column in zip(*rows.values())]
    lines = [name.ljust(first) + "".join(text.rjust(width) for text, width in zip(row, widths)) for name, row in rows.items()]
    return "\n".join(lines + notes(metrics))


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


def nearest_plot(distances: dict[str, Tensor]) -> Figure:
    """The cumulative distribution of distances to the nearest training image, one curve a row."""
    figure, axis = pyplot.subplots(figsize=(5.5, 3.2), layout="constrained")
    for (name, values), style in zip(distances.items(), ("--", "-", ":")):
        axis.ecdf(values, label=name, linestyle=style)
    axis.set(xlabel="distance to the nearest training image", ylabel="share of images", xlim=(0, None))
    axis.legend(fontsize=9)
    return figure


def histogram(levels: list[Tensor], specs: list[LatentSpec]) -> Figure:
    """How often each code is used, most used first, one panel a level."""
    figure, axes = pyplot.subplots(1, len(levels), figsize=(5 * len(levels), 3), squeeze=False, layout="constrained")
    for axis, codes, spec in zip(axes[0], levels, specs):
        counts = torch.bincount(codes.flatten(), minlength=spec.vocabulary or 0).sort(descending=True).values
        axis.fill_between(range(len(counts)), counts / codes.numel(), step="mid")
        axis.set(xlabel="codes, most used first", ylabel="share of positions", yscale="log")
        axis.set_title(f"{spec.grid[0]}×{spec.grid[1]} grid: {int((counts > 0).sum())} of {len(counts)} codes used", fontsize=10)
    return figure


def rate_plot(levels: list[dict[str, Tensor]], metrics: dict[str, Any]) -> Figure:
    """Where on the latent grid the rate lies: maps h w by name for each level, those of whole priors on one scale."""
    wide = max(len(maps) for maps in levels)
    figure, axes = pyplot.subplots(
        len(levels), wide, figsize=(2.2 * wide + 1, 2.4 * len(levels)), squeeze=False, layout="constrained"
    )
    for row, maps in zip(axes, levels):
        priors = [name for name in maps if name in ROWS]
        for names in (priors, [name for name in maps if name not in ROWS]):
            shown = [row[list(maps).index(name)] for name in names]
            top = max((float(maps[name].max()) for name in names), default=0.0)
            for axis, name in zip(shown, names):
                drawn = axis.imshow(maps[name].numpy(), vmin=0, vmax=top, cmap="viridis")
                heading = title(name, metrics) if name in ROWS else name
                axis.set_title(f"{heading}\n{float(maps[name].sum()):.1f} nats", fontsize=9)
            if shown:
                figure.colorbar(drawn, ax=shown, shrink=0.8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_visible(bool(axis.images))
    return figure


def lowest_fd(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the lowest Fréchet distance; None where there are too few images for any."""
    return min((row for row in rows if row["fd"] is not None), key=lambda row: row["fd"], default=None)


def tradeoff_plot(rows: list[dict[str, Any]], name: str, label: str) -> Figure:
    """Precision, recall and fd against what is varied, from the most diverse samples on, the lowest fd marked."""
    values = [row[name] for row in rows]
    figure, axis = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for figure_of, marker in (("precision", "o"), ("recall", "s")):
        axis.plot(values, [row[figure_of] for row in rows], marker=marker, label=figure_of)
    margin = 0.03 * (values[-1] - values[0])
    axis.set(xlabel=label, ylabel="precision, recall", xlim=(values[0] - margin, values[-1] + margin), ylim=(0, 1))
    axis.set_title(f"{rows[0]['images']} images a point", fontsize=10)
    if best := lowest_fd(rows):
        right = axis.twinx()
        right.plot(values, [row["fd"] for row in rows], color="tab:green", marker="^", label="fd")
        right.annotate(
            f"lowest fd {best['fd']:.2f}\nat {best[name]:.2f}", (best[name], best["fd"]), xytext=(0, 12),
            textcoords="offset points", ha="center", fontsize=9, color="tab:green",
        )  # fmt: skip
        right.set(ylabel="fd", ylim=(0, 1.3 * max(row["fd"] for row in rows)))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def picture(path: Path, rows: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    """One row of images (uint8 N C H W) for each name in ROWS, its fd beside it."""
    numbers = figures(metrics)
    shown = {name: rows[name] for name in ROWS if name in rows}
    columns = max(len(images) for images in shown.values())
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(2.6 + 0.55 * columns, 0.68 * len(shown)), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], shown.items()):
        grid = make_grid(images, nrow=columns, padding=1, pad_value=128)
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        fd = numbers[name].get("fd")
        axis.set_title(
            title(name, metrics) + ("" if fd is None else f"\nfd {fd:.1f}"), x=-0.01, y=0.5, ha="right", va="center", fontsize=10
        )
        axis.axis("off")
    figure.subplots_adjust(left=0.2, right=0.995, top=0.99, bottom=0.01, hspace=0.06)
    write_file(path, png(figure))


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
