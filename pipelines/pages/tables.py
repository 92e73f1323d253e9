"""The comparison as tables: for the terminal, for the page, as CSV."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.files import write_file
from pipelines.judging.features import FIGURES
from pipelines.pages.words import HEADINGS, cell, figures, notes, title


def table(metrics: dict[str, Any]) -> str:
    """The comparison for the terminal."""
    rows = {"": list(HEADINGS.values())}
    rows |= {title(name, metrics): [cell(row, figure) for figure in HEADINGS] for name, row in figures(metrics).items()}
    first = max(map(len, rows))
    widths = [2 + max(map(len, column)) for column in zip(*rows.values())]
    lines = [name.ljust(first) + "".join(text.rjust(width) for text, width in zip(row, widths)) for name, row in rows.items()]
    return "\n".join(lines + notes(metrics))


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
