"""Figures and pictures, by matplotlib."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torchvision.utils import make_grid

from pipelines.files import write_file
from pipelines.judging.tradeoffs import lowest_fd
from pipelines.pages.words import ROWS, figures, title
from stage2_prior.latents import LatentSpec

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


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
