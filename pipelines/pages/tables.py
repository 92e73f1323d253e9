"""The comparison as tables: for the terminal, for the page, as CSV."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.files import write_file
from pipelines.judging.comparison import Comparison
from pipelines.judging.features import FIGURES
from pipelines.pages.words import HEADINGS, SHORT, cells, short_notes


def table(comparison: Comparison) -> list[str]:
    """The lines of the comparison for the terminal: fewer columns and words than on the page."""
    rows = [Row(name, comparison.title(name), shown) for name, shown in cells(comparison, SHORT).items()]
    return aligned([HEADINGS[figure] for figure in SHORT], rows) + short_notes(comparison)


def aligned(columns: list[str], rows: "list[Row]") -> list[str]:
    """The lines of a table for the terminal."""
    all_cells = [["", *columns], *([row.title, *row.cells] for row in rows)]
    first, *widths = (max(map(len, column)) for column in zip(*all_cells))
    return [title.ljust(first) + "".join(c.rjust(2 + width) for c, width in zip(rest, widths)) for title, *rest in all_cells]


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


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the heading first. A bar in a cell is escaped, as it would end the cell."""
    heading, *others = ([cell.replace("|", r"\|") for cell in cells] for cells in rows)
    lines = [heading, ["---"] * len(heading), *others]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_csv(path: Path, runs: Mapping[str, Comparison]) -> None:
    """One row a prior of each run; the same numbers as metrics.json."""
    buffer = io.StringIO()
    errors = {f"{figure}_plus_minus": figure for figure in FIGURES}
    bounds = ["rate", "negative_elbo", "importance_weighted"]
    columns = ["run", "z", *(column for pair in zip(FIGURES, errors) for column in pair)]
    columns += [
        "copying_p",
        "distance_to_training",
        "nll",
        "fd_perturbed",
        "parameters",
        *bounds,
        "images",
        "reference_images",
        "seed",
        "extractor",
    ]
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore")
    writer.writeheader()
    for run, comparison in runs.items():
        known = {"images": comparison.images, "seed": comparison.seed, "extractor": comparison.features.digest}
        known["reference_images"] = comparison.images_of.reference
        likelihood = comparison.likelihood.priors if comparison.likelihood else {}
        for name, row in comparison.rows.items():
            half = {column: row.plus_minus.get(figure) for column, figure in errors.items()}
            nats = {bound: getattr(likelihood[name], bound).nats for bound in bounds if name in likelihood}
            writer.writerow({"run": run, "z": name, **known, **half, **vars(row), **nats})
        for name in comparison.missing:
            writer.writerow({"run": run, "z": name, **known})
    write_file(path, buffer.getvalue().encode())
