"""The comparison as one self-contained HTML page, with the same numbers as CSV."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.console import counted
from pipelines.files import write_file
from pipelines.judging.compare import SHOWN, Exhibits
from pipelines.judging.comparison import Comparison
from pipelines.judging.rows import A_LABEL, BATCH, MOST_LABELS
from pipelines.judging.together import Entry, above_best, candidates
from pipelines.judging.tradeoffs import departures
from pipelines.pages.likelihood import as_table
from pipelines.pages.plots import (
    histogram,
    lines,
    lines_of,
    nearest_plot,
    png,
    projections,
    rate_plot,
    tradeoff_plot,
    training_curves,
)
from pipelines.pages.tables import Row, Table
from pipelines.pages.words import (
    HEADINGS,
    SHORT,
    about_measures,
    about_several,
    cell,
    cells,
    drawn_from,
    notes,
    verdict_in_words,
    verdict_of_several,
)
from pipelines.runs.config import RunConfig, to_dict
from pipelines.runs.pictures import tiled

GRID_COLUMNS = 16
WAYS = {
    "temperature": "Below 1 it sharpens every conditional of the prior.",
    "guidance": "Classifier-free guidance: toward the context, away from the same prior without it.",
    "autoguidance": "Autoguidance: away from the same prior after an eighth of its training.",
}
"""to draw from the learned prior, and what each does"""


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
    """What the page says of one run, or of several that share a decoder."""

    name: str
    runs: list[str]
    verdict: str
    overview: Picture
    """the first images of every row"""
    diagnosis: list[str]
    """what limits, what to do next, and which figures do not count"""
    columns: list[str]
    rows: list[Row]
    notes: list[str]
    pictures: list[Picture]
    config: str
    tables: list[Table]
    labels: Table | None = None
    """how often each label is read, where labels are read"""


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def images_picture(heading: str, caption: str, images: Tensor) -> Picture:
    """uint8 N C H W as a grid."""
    return Picture(heading, caption, data_uri(tiled(images, GRID_COLUMNS)), pixels=True)


def chart_picture(heading: str, caption: str, figure: Figure) -> Picture:
    return Picture(heading, caption, data_uri(png(figure)), pixels=False)


def section_of(name: str, comparison: Comparison, exhibits: Exhibits, config: RunConfig, diagnosis: list[str]) -> Section:
    """What the page says of one run, made of its comparison and of what is shown beside it alone."""
    seconds, rows = exhibits.seconds, []
    for key, shown in cells(comparison).items():
        shown = [*shown, f"{seconds[key]:.2f}" if key in seconds else ""]
        rows.append(Row("best" if key == comparison.recommended else key, comparison.title(key), shown))
    return Section(
        name=name,
        runs=[name],
        verdict=verdict_in_words(comparison),
        overview=overview(lines_of(comparison, exhibits)),
        diagnosis=diagnosis,
        columns=[*HEADINGS.values(), "s per 1,000"],
        rows=rows,
        notes=notes(comparison),
        pictures=pictures_of(comparison, exhibits),
        config=json.dumps(to_dict(config), indent=2),
        tables=[as_table(comparison.likelihood)] if comparison.likelihood else [],
        labels=labels_read(comparison),
    )


def labels_read(comparison: Comparison) -> Table | None:
    """Label accuracy for each label, in percent: for real images this is the accuracy of the classifier."""
    read = {name: row.labels_read for name, row in comparison.rows.items() if row.labels_read}
    if not read:
        return None
    rows = [
        Row("label", label, [f"{100 * shares[label]:.1f}" for shares in read.values()]) for label in next(iter(read.values()))
    ]
    note = "Of the images of each label, the percentage for which the classifier predicts it."
    if comparison.commonest is not None:
        note += f" Always guessing the commonest label would be right for {100 * comparison.commonest:.1f} % of test images."
    return Table("Label accuracy by label", [comparison.title(name) for name in read], rows, [note])


def section_of_several(
    entries: Sequence[Entry],
    comparisons: Mapping[str, Comparison],
    exhibits: Mapping[str, Exhibits],
    configs: Mapping[str, RunConfig],
) -> Section:
    """What a page says of several runs that share a decoder: every prior in one table and one picture, as `ranking` has them."""
    best = next(iter(candidates(entries)), None)
    gaps, rows = above_best(entries), []
    for place, entry in enumerate(entries):
        shown = [cell(entry.row, figure) for figure in SHORT]
        above = "" if place not in gaps else "best" if gaps[place][0] == 0 else "+{:.1f} ± {:.1f}".format(*gaps[place])
        size = "" if entry.row.parameters is None else f"{entry.row.parameters:,}"
        times = ["" if time is None else f"{time:.3g}" for time in (entry.seconds_to_train, entry.seconds_to_draw)]
        rows.append(Row("best" if entry is best else entry.key, entry.title, [*shown, above, size, *times]))
    curves = {run: found.histories["stage2"] for run, found in exhibits.items() if "stage2" in found.histories}
    picture = lines([(entry.title, entry.row.fd, entry.images) for entry in entries])
    return Section(
        name=f"One decoder, {len(comparisons)} learned priors",
        runs=[*comparisons],
        verdict=verdict_of_several(entries),
        overview=overview(picture),
        diagnosis=[],
        columns=[*(HEADINGS[figure] for figure in SHORT), "nats above the best", "parameters", "s to train", "s per 1,000"],
        rows=rows,
        notes=[*about_measures(next(iter(comparisons.values()))), *about_several(comparisons)],
        pictures=[
            chart_picture("Training of the priors", "Loss in nats an image, over steps.", training_curves(curves)),
        ],
        config=json.dumps({run: to_dict(config) for run, config in configs.items()}, indent=2),
        tables=[],
    )


def overview(figure: Figure) -> Picture:
    return chart_picture("Samples of every prior", "The first of each, not chosen.", figure)


def pictures_of(comparison: Comparison, exhibits: Exhibits) -> list[Picture]:
    """The pictures of a comparison, in the order shown."""
    return [
        *samples(comparison, exhibits),
        *reconstructions(exhibits),
        *copies(comparison, exhibits),
        *latents(comparison, exhibits),
        *tradeoffs(comparison),
        chart_picture("Training", "Loss in nats an image, over steps.", training_curves(exhibits.histories)),
        *rates(comparison, exhibits),
    ]


def samples(comparison: Comparison, exhibits: Exhibits) -> list[Picture]:
    made = []
    for name, images in exhibits.images.items():
        if name in ("standard", "learned", "tuned"):
            caption = f"The first {len(images)} drawn under seed {comparison.seed}, not chosen."
            made.append(images_picture(f"Samples: {comparison.title(name)}", caption, images))
    if exhibits.by_label:
        best = comparison.title("tuned" if "tuned" in comparison.priors else "learned")
        shown = f"A row for each {comparison.conditioned_on} with {A_LABEL} samples or more, at most {MOST_LABELS}"
        caption = f"{shown}: {', '.join(exhibits.by_label)}. Drawn from: {best}."
        made.append(images_picture("Samples by label", caption, torch.cat([*exhibits.by_label.values()])))
    return made


def reconstructions(exhibits: Exhibits) -> list[Picture]:
    """The pictures of reconstructions, and of interpolations where there are any."""
    pairs = torch.stack([exhibits.images[name][:SHOWN] for name in ("real", "reconstruction")]).flatten(0, 1)
    made = [images_picture("Reconstructions", "Held-out images above, their reconstructions below.", pairs)]
    if exhibits.interpolations is not None:
        caption = "From one held-out image to another along a straight line in z: what lies between is not always an image."
        made.append(images_picture("Interpolations", caption, exhibits.interpolations))
    return made


def copies(comparison: Comparison, exhibits: Exhibits) -> list[Picture]:
    """Whether samples are copies of training images."""
    caption = (
        f"Samples drawn from {drawn_from(comparison)} above, below them the training images nearest in the features that images"
        " are compared in: copies would be the same image twice."
    )
    both = torch.cat([exhibits.images[comparison.generator][:SHOWN], exhibits.nearest])
    share = (
        "How far images lie from the training set: the share that is nearer than a distance. Copies lie left of held-out images,"
        " as reconstructions of training images do; what resembles no image lies right of them."
    )
    return [
        images_picture("Nearest training images", caption, both),
        chart_picture("Memorization", share, nearest_plot(exhibits.distances, comparison)),
    ]


def latents(comparison: Comparison, exhibits: Exhibits) -> list[Picture]:
    made = []
    if exhibits.projections:
        caption = "Grey: latents of real images, q(z), on its first two principal components. In colour: draws from the prior."
        made.append(chart_picture("Where each prior puts z", caption, projections(exhibits.projections, comparison)))
    if exhibits.code_counts:
        figure = histogram(exhibits.code_counts, comparison)
        made.append(chart_picture("Use of the codes", "Over the whole test split.", figure))
    return made


def tradeoffs(comparison: Comparison) -> list[Picture]:
    made = []
    ways = {how: point for point in comparison.sampling if (how := point.sampling) is not None}
    charts = [
        (kind, explained, {getattr(how, kind): point for how, point in ways.items() if departures(how).keys() <= {kind}})
        for kind, explained in WAYS.items()
    ]
    for strength in sorted({how.autoguidance for how in ways if how.guidance and how.autoguidance}):
        of_both = sorted((how for how in ways if how.autoguidance == strength), key=lambda how: how.guidance)
        points = {how.guidance: ways[how] for how in of_both}
        charts.append((f"guidance, with autoguidance {strength:g}", "Both kinds of guidance at once.", points))
    for kind, explained, points in charts:
        if len(points) > 1:
            caption = f"Samples of the learned prior. {explained} Judged in the features of another network than the table's."
            made.append(chart_picture(f"Diversity traded for fidelity: {kind}", caption, tradeoff_plot(points, kind)))
    if comparison.rejection:
        caption = "The share of the learned prior's samples that a second classifier is most confident of; judged by the first."
        points = {point.kept: point for point in comparison.rejection if point.kept is not None}
        made.append(
            chart_picture("Diversity traded for fidelity: rejection", caption, tradeoff_plot(points, "share of samples kept"))
        )
    return made


def rates(comparison: Comparison, exhibits: Exhibits) -> list[Picture]:
    if not exhibits.rate_maps:
        return []
    count = min(comparison.images, BATCH)
    caption = f"Nats of the rate of {counted(count, 'held-out image')} at each position of the latent grid, on average."
    return [chart_picture("Where the rate lies", caption, rate_plot(exhibits.rate_maps, comparison))]


def write_page(path: Path, sections: Sequence[Section], versions: dict[str, str], findings: Sequence[str] = ()) -> None:
    """findings: what is to be said of all runs together."""
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    write_file(path, rendered("page.html", sections=sections, findings=findings, versions=made_with))


def rendered(template: str, **values: object) -> bytes:
    """A page from a template beside this file, by its name."""
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True)
    environment.filters["unbroken"] = unbroken
    return environment.from_string(text).render(values).encode()


def unbroken(line: str) -> Markup:
    """Text as HTML, without line breaks inside of options such as --stage1.steps, which browsers break after their hyphens."""
    return Markup(re.sub(r"(?<!\S)(--[a-z][\w.-]*\w)", r'<span class="option">\1</span>', str(escape(line))))
