"""Scores of images as a table and a page, the most unusual first."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from pipelines.console import counted
from pipelines.data.images import ImageSet
from pipelines.files import write_file
from pipelines.judging.scores import Scorer, Scores, Usual
from pipelines.pages.page import data_uri, rendered
from pipelines.runs.pictures import tiled

BRIGHTEST = 6.0  # standard deviations above held-out images'


@dataclass(frozen=True)
class Card:
    name: str
    pictures: list[str]
    """data URIs: the image, its reconstruction, and where its bits lie on each level, finest last"""
    figures: str


def write_scores(
    path: Path,
    run: str,
    scorer: Scorer,
    images: ImageSet,
    names: list[str],
    scores: Scores,
    distances: Tensor,
    usual: Usual,
    shown: int,
) -> None:
    """A row for each image in `path`, a CSV file, and the first `shown` on a page beside it; the most unusual first."""
    order = distances.argsort(descending=True, stable=True)
    more_usual = usual.more_usual(distances)
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["image", "bits", "bits_of_z", "bits_of_x_given_z", "bits_of_png", "held_out_more_usual"])
    for number in order.tolist():
        figures = (scores.bits[number], scores.bits_of_z[number], scores.bits_of_x[number], scores.bits_of_png[number])
        writer.writerow([names[number], *(f"{float(figure):.2f}" for figure in figures), f"{float(more_usual[number]):.4f}"])
    write_file(path, buffer.getvalue().encode())
    first = order[:shown]
    cards = cards_of(scorer, images, [names[number] for number in first.tolist()], scores, usual, more_usual, first)
    page = rendered(
        "scores.html", run=run, cards=cards, images=counted(len(scores), "image"), brightest=BRIGHTEST, table=path.name
    )
    write_file(path.with_suffix(".html"), page)


@torch.inference_mode()
def cards_of(
    scorer: Scorer, images: ImageSet, names: list[str], scores: Scores, usual: Usual, more_usual: Tensor, numbers: Tensor
) -> list[Card]:
    (some,) = images[numbers]
    posteriors = scorer.autoencoder.encode(scorer.run.fabric.to_device(some))
    again = scorer.autoencoder.render(scorer.autoencoder.mean(posteriors)).cpu()
    size = (some.shape[-2], some.shape[-1])
    maps = [heat(level[numbers], size) for level in usual.excess(scores)]
    cards = []
    for place, number in enumerate(numbers.tolist()):
        share = f"more unusual than {float(100 * more_usual[number]):.0f} % of the held-out images"
        pictures = [uri(some[place]), uri(again[place]), *(uri(level[place]) for level in maps)]
        cards.append(Card(names[place], pictures, f"{share}; {scores.in_words(number)}"))
    return cards


def heat(excess: Tensor, size: tuple[int, int]) -> Tensor:
    """Standard deviations N h w as colours, uint8 N 3 H W: dark at 0 and below, bright from BRIGHTEST up."""
    large = torch.nn.functional.interpolate(excess[:, None].float(), size, mode="nearest").squeeze(1)
    colours = matplotlib.colormaps["magma"]((large / BRIGHTEST).clamp(0, 1).numpy(), bytes=True)
    return torch.from_numpy(colours[..., :3].copy()).movedim(-1, 1)


def uri(image: Tensor) -> str:
    """uint8 C H W as a PNG."""
    return data_uri(tiled(image[None], 1))
