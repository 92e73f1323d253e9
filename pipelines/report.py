"""The comparison, as a table for the terminal and as a picture."""

import io
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor
from torchvision.utils import make_grid

from pipelines.checkpoint import write_file

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

ROWS = {
    "real": "real images",
    "reconstruction": "reconstructions",
    "standard": "N(0, I)",
    "gaussian": "fitted Gaussian",
    "mixture": "Gaussian mixture",
    "learned": "learned prior",
    "posterior": "posterior (not a generator)",
}


def figures(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of every row of the comparison, in the order shown."""
    everything = {"real": metrics["real"], "reconstruction": metrics["reconstruction"], **metrics["priors"]}
    return {name: everything[name] for name in ROWS if name in everything}


def table(metrics: dict[str, Any]) -> str:
    """The comparison for the terminal."""
    lines = [f"{'':28} {'fd':>8} {'nll of z':>10}"]
    for name, row in figures(metrics).items():
        fd = "-" if row["fd"] is None else f"{row['fd']:.2f}"
        nll = f"{row['nll']:.1f}" if "nll" in row else ""
        lines.append(f"{ROWS[name]:28} {fd:>8} {nll:>10}")
    lines.append(
        f"fd: Fréchet distance to {metrics['images_of']['reference']} training images, from {metrics['images']} images a row,"
        f" features of the {metrics['features']['extractor']}; lower is better."
    )
    if any("nll" in row for row in metrics["priors"].values()):
        lines.append("nll of z: nats an image of held-out latents under the prior; lower is better.")
    if metrics["gap_closed"] is None:
        lines.append(f"gap closed: none stated, {metrics['gap_closed_reason']}.")
    else:
        lines.append(f"gap closed: {metrics['gap_closed']:.3f} of the way from N(0, I) to the decoder's own reconstructions.")
    return "\n".join(lines)


def picture(path: Path, rows: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    """One row of images (uint8 N C H W) for each name in ROWS, its fd beside it."""
    numbers = figures(metrics)
    shown = {name: rows[name] for name in ROWS if name in rows}
    columns = max(len(images) for images in shown.values())
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(2.6 + 0.55 * columns, 0.68 * len(shown)), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], shown.items()):
        grid = make_grid(images, nrow=columns, padding=1, pad_value=128)
        axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        fd = numbers[name]["fd"]
        axis.set_title(
            ROWS[name] + ("" if fd is None else f"\nfd {fd:.1f}"), x=-0.01, y=0.5, ha="right", va="center", fontsize=10
        )
        axis.axis("off")
    figure.subplots_adjust(left=0.2, right=0.995, top=0.99, bottom=0.01, hspace=0.06)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    write_file(path, buffer.getvalue())
