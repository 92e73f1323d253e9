"""The comparison as one self-contained HTML page, with the same numbers as CSV."""

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from pipelines.checkpoint import write_file
from pipelines.generate import tiled
from pipelines.metrics import FIGURES
from pipelines.report import HEADINGS, Figure, cell, figures, generator, notes, png, pyplot, title

GRID_COLUMNS = 16


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str
    source: str
    """a data URI"""
    pixels: bool
    """images, to be shown with sharp pixels; else a chart"""


@dataclass(frozen=True)
class Row:
    key: str
    title: str
    cells: list[str]


@dataclass(frozen=True)
class Table:
    """A further table, under a heading of its own."""

    heading: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    name: str
    verdict: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]
    pictures: list[Picture]
    config: str
    tables: list[Table]


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def images_picture(heading: str, caption: str, images: Tensor, columns: int = GRID_COLUMNS) -> Picture:
    """uint8 N C H W as a grid."""
    return Picture(heading, caption, data_uri(tiled(images, columns)), pixels=True)


def chart_picture(heading: str, caption: str, figure: Figure) -> Picture:
    return Picture(heading, caption, data_uri(png(figure)), pixels=False)


def training_curves(histories: dict[str, list[dict[str, Any]]]) -> Figure:
    """Held-out loss against the step, one panel a stage."""
    figure, axes = pyplot.subplots(1, len(histories), figsize=(4.2 * len(histories), 3), squeeze=False, layout="constrained")
    for axis, (stage, history) in zip(axes[0], histories.items()):
        for part, values in (("held out", [entry["held_out"] for entry in history]), ("training", [e["train"] for e in history])):
            axis.plot([entry["step"] for entry in history], [value["loss"] for value in values], marker=".", label=part)
        axis.set(title=stage, xlabel="step", ylabel="loss, nats an image")
        axis.legend(fontsize=8)
    return figure


def projections(latents: dict[str, Tensor], titles: dict[str, str]) -> Figure:
    """Each prior's draws on the first two principal components of q(z). Latents N D each, those of q(z) as `posterior`."""
    reference = latents["posterior"]
    mean = reference.mean(0)
    torch.manual_seed(0)
    _, _, directions = torch.pca_lowrank(reference - mean, q=2)
    points = {name: (values - mean) @ directions for name, values in latents.items()}
    others = [name for name in latents if name != "posterior"]
    figure, axes = pyplot.subplots(
        1, len(others), figsize=(2.7 * len(others), 2.9), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], others):
        for which, colour in (("posterior", "0.75"), (name, "tab:blue")):
            axis.scatter(*points[which].T, s=3, color=colour, linewidths=0)
        axis.set_title(titles[name], fontsize=10)
        axis.set(xticks=[], yticks=[])
    return figure


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


def section(
    name: str,
    metrics: dict[str, Any],
    seconds: dict[str, float],
    pictures: list[Picture],
    config: dict[str, Any],
    tables: list[Table],
) -> Section:
    """The figures of one run, as the page shows them. seconds: per 1,000 images, for each prior."""
    columns = [*HEADINGS.values(), "s per 1,000"]
    rows = []
    for key, values in figures(metrics).items():
        cells = [cell(values, figure) for figure in HEADINGS] + [f"{seconds[key]:.2f}" if key in seconds else ""]
        rows.append(Row(key, title(key, metrics), cells))
    return Section(name, verdict_in_words(metrics), columns, rows, notes(metrics), pictures, json.dumps(config, indent=2), tables)


def write_page(path: Path, sections: Sequence[Section], versions: dict[str, str], findings: Sequence[str] = ()) -> None:
    """findings: what is to be said of all runs together."""
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    write_file(path, template.render(sections=sections, findings=findings, versions=made_with).encode())


def write_csv(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """One row a prior of each run, from their metrics; the same numbers as metrics.json."""
    buffer = io.StringIO()
    errors = {f"{figure}_plus_minus": figure for figure in FIGURES}
    bounds = ["rate", "negative_elbo", "importance_weighted"]
    columns = ["run", "z", *(column for pair in zip(FIGURES, errors) for column in pair)]
    columns += ["copying_z", "distance_to_training", "nll", *bounds, "images", "reference_images", "seed", "extractor"]
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore")
    writer.writeheader()
    for run, metrics in runs.items():
        known = {"images": metrics["images"], "seed": metrics["seed"], "extractor": metrics["features"]["digest"]}
        known["reference_images"] = metrics["images_of"]["reference"]
        likelihood = metrics.get("likelihood", {"priors": {}})["priors"]
        for key, values in figures(metrics).items():
            half = {column: values.get("plus_minus", {}).get(figure) for column, figure in errors.items()}
            nats = {bound: likelihood[key][bound]["nats"] for bound in bounds if bound in likelihood.get(key, {})}
            writer.writerow({"run": run, "z": key, **known, **half, **values, **nats})
    write_file(path, buffer.getvalue().encode())
