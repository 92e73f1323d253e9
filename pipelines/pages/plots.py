"""Figures and pictures, by matplotlib; without pyplot, which is the user's in a notebook."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.console import escaped
from pipelines.files import write_file
from pipelines.grids import grid
from pipelines.judging.compare import SHOWN, Exhibits
from pipelines.judging.comparison import ROWS, Comparison
from pipelines.judging.tradeoffs import Tradeoff, lowest_fd
from pipelines.training.checkpoints import Moment

DPI = 110
WIDTH = 5.5  # inches, of a plot in one of the page's two columns
COLOURS = {
    "real": "black",
    "standard": "tab:red",
    "gaussian": "tab:brown",
    "mixture": "tab:orange",
    "unigram": "tab:brown",
    "order2": "tab:orange",
    "learned": "tab:blue",
    "tuned": "tab:cyan",
    "posterior": "0.65",
}
"""The colours of the rows, the same in every plot; what is no row's has another colour. No run has both Gaussians and codes."""


def nearest_plot(distances: dict[str, Tensor], comparison: Comparison) -> Figure:
    """The cumulative distribution of distances to the nearest training image, one curve a row."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axis = figure.subplots()
    for (name, values), style in zip(distances.items(), ("--", "-", ":")):
        axis.ecdf(values, label=comparison.title(name), linestyle=style, color=COLOURS[name])
    axis.set(xlabel="distance to the nearest training image", ylabel="share of images", xlim=(0, None))
    axis.legend(fontsize=9)
    return figure


def histogram(levels: list[Tensor], comparison: Comparison) -> Figure:
    """How often each code is used, most used first, one panel a level. levels: counts, K each."""
    figure, axes = panels(len(levels), 2.5, abreast=1)
    for axis, counts, use in zip(axes, levels, comparison.codes):
        ordered = counts.sort(descending=True).values
        axis.fill_between(range(len(ordered)), ordered / ordered.sum(), step="mid", color=COLOURS["posterior"])
        axis.set(xlabel="codes, most used first", ylabel="share of positions", yscale="log")
        axis.set_title(f"{use.grid[0]}×{use.grid[1]} grid: {use.used} of {use.codes} codes used", fontsize=10)
    return figure


def rate_plot(levels: list[dict[str, Tensor]], comparison: Comparison) -> Figure:
    """Where on the latent grid the rate lies: maps h w by name for each level, those of whole priors on one scale."""
    lines = []
    for maps in levels:
        of_priors = {name: rate for name, rate in maps.items() if name in ROWS}
        of_channels = {name: rate for name, rate in maps.items() if name not in ROWS}
        lines += [line for line in (of_priors, of_channels) if line]
    wide = max(map(len, lines))
    figure = Figure(figsize=(WIDTH, 2.1 * len(lines)), layout="constrained")
    for row, line in zip(figure.subplots(len(lines), wide, squeeze=False), lines):
        top = max(float(rate.max()) for rate in line.values())
        for axis, (name, rate) in zip(row, line.items()):
            drawn = axis.imshow(rate.numpy(), vmin=0, vmax=top, cmap="viridis")
            heading = comparison.title(name) if name in ROWS else "\n".join(name.rsplit(", ", 1))
            axis.set_title(f"{heading}\n{float(rate.sum()):.1f} nats", fontsize=9)
        figure.colorbar(drawn, ax=[*row], shrink=0.8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_visible(bool(axis.images))
    return figure


def tradeoff_plot(points: dict[float, Tradeoff], label: str) -> Figure:
    """Precision, recall, label accuracy and fd against what is varied, from the most diverse samples on, the lowest fd marked."""
    values, tried = list(points), list(points.values())
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(values, [point.precision for point in tried], color="tab:purple", marker="o", label="precision")
    axis.plot(values, [point.recall for point in tried], color="tab:olive", marker="s", label="recall")
    read = [point.label_read for point in tried if point.label_read is not None]
    if len(read) == len(tried):
        axis.plot(values, read, color="tab:pink", marker="d", label="label accuracy")
    margin = 0.03 * (values[-1] - values[0])
    axis.set(xlabel=label, xticks=values, ylabel="share", xlim=(values[0] - margin, values[-1] + margin), ylim=(0, 1))
    axis.set_title(f"{tried[0].images} images a point", fontsize=10)
    if best := lowest_fd(tried):
        distances, at = [point.fd or 0.0 for point in tried], values[tried.index(best)]
        right = axis.twinx()
        right.plot(values, distances, color="tab:green", marker="^", label="fd")
        inward = {values[0]: "left", values[-1]: "right"}.get(at, "center")  # so that the text stays inside
        right.annotate(
            f"lowest fd {best.fd:.2f}\nat {at:.2f}", (at, best.fd), xytext=(0, 12),
            textcoords="offset points", ha=inward, fontsize=9, color="tab:green",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},  # it may lie on another line
        )  # fmt: skip
        right.set(ylabel="fd", ylim=(0, 1.3 * max(distances)))
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def write_picture(path: Path, comparison: Comparison, exhibits: Exhibits) -> None:
    write_file(path, png(lines_of(comparison, exhibits)))


def lines_of(comparison: Comparison, exhibits: Exhibits) -> Figure:
    """One line of images for each row, its fd beside it."""
    return lines([(comparison.title(name), row.fd, exhibits.images[name]) for name, row in comparison.rows.items()])


def lines(rows: Sequence[tuple[str, float | None, Tensor]]) -> Figure:
    """One line of images for each row: its title, its fd, and its images, uint8 N C H W, of which the first SHOWN are shown."""
    shown = [(title, fd, images[:SHOWN]) for title, fd, images in rows]
    columns = max(len(images) for _, _, images in shown)
    beside = max(2.3, 0.078 * max(len(title) for title, _, _ in shown))  # inches, for the titles
    width = beside + 0.57 * columns
    figure = Figure(figsize=(width, 0.68 * len(shown)))
    axes = figure.subplots(len(shown), 1, squeeze=False)
    for axis, (title, fd, images) in zip(axes[:, 0], shown):
        axis.imshow(grid(images, columns).numpy(), interpolation="nearest")
        axis.set_title(
            plain(title) + ("" if fd is None else f"\nfd {fd:.1f}"),
            x=-0.01,
            y=0.5,
            ha="right",
            va="center",
            fontsize=10,
        )
        axis.axis("off")
    figure.subplots_adjust(left=beside / width, right=0.995, top=0.99, bottom=0.01, hspace=0.06)
    return figure


def plain(name: str) -> str:
    """A name of the user's as matplotlib shows it letter by letter: between dollars it would read a formula."""
    return escaped(name).replace("$", r"\$")


def panels(count: int, height: float, abreast: int, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `height` inches high, at most `abreast` side by side. shared: they have one scale."""
    columns = min(count, abreast)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, [*axes.flat[:count]]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    return buffer.getvalue()


def training_curves(histories: dict[str, list[Moment]]) -> Figure:
    """Held-out loss against the step, one panel a stage."""
    figure, axes = panels(len(histories), 2.5, abreast=2)
    for axis, (stage, history) in zip(axes, histories.items()):
        steps = [moment.step for moment in history]
        held_out, training = [moment.held_out["loss"] for moment in history], [moment.train["loss"] for moment in history]
        axis.plot(steps, held_out, marker=".", label="held out", color=COLOURS["real"])
        axis.plot(steps, training, marker=".", label="training", color=COLOURS["posterior"])
        axis.set(title=plain(stage), xlabel="step", ylabel="loss, nats an image")
        axis.legend(fontsize=8)
    return figure


def projections(points: dict[str, Tensor], comparison: Comparison) -> Figure:
    """Each prior's draws, N 2, over those of q(z), which are `posterior`'s."""
    others = [name for name in points if name != "posterior"]
    figure, axes = panels(len(others), 2.0, abreast=3, shared=True)
    for axis, name in zip(axes, others):
        for which in ("posterior", name):
            across, up = points[which].T
            axis.scatter(across, up, s=3, color=COLOURS[which], linewidths=0)
        heading = comparison.title(name)
        axis.set_title(heading.replace(", ", "\n") if name == "tuned" else heading, fontsize=10)
        axis.set(xticks=[], yticks=[])
    return figure
