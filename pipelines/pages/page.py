"""The comparison as one self-contained HTML page, with the same numbers as CSV."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from pipelines.files import write_file
from pipelines.pages.plots import Figure, png
from pipelines.pages.tables import Row, Table
from pipelines.pages.words import HEADINGS, cell, figures, notes, title, verdict_in_words
from pipelines.runs.pictures import tiled

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
