"""The comparison in words: titles, cells of the table, notes and verdicts."""

import math
from collections.abc import Iterable, Mapping, Sequence

from pipelines.console import counted
from pipelines.judging.comparison import ROWS, Comparison, Row
from pipelines.judging.quality import ENOUGH, nearest_share
from pipelines.judging.together import Entry, candidates, names_of
from pipelines.judging.tradeoffs import best_of, described, lowest_fd

SHORT = ("fd", "precision", "recall", "coverage", "copied", "nll")
"""Columns that the terminal shows, too"""

HEADINGS = {
    "fd": "fd",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "nearer": "nearer",
    "copied": "copied, %",
    "nll": "nll of z",
}
"""The headings of the columns, in the order shown."""


def cell(row: Row | None, figure: str) -> str:
    """A figure of one row with half its 95 % interval; a dash where it is withheld, nothing where there is none.

    row: None where there is no such prior.
    """
    if row is None:
        return "none" if figure == "fd" else ""
    value, half = vars(row)[figure], row.plus_minus.get(figure)
    if value is None:
        return "" if figure == "nll" else "–"
    if figure == "nll":
        return ("≤ " if row.nll_is_bound else "") + f"{value:.1f}"
    if figure == "copied":
        return percent(value, half)
    # As many decimals as show three digits of the figure or of its error, whichever is larger.
    size = max(abs(value), half or 0)
    shown = max(2, 2 - math.floor(math.log10(size))) if figure == "kid" and size else 2
    return f"{value:.{shown}f}" + ("" if half is None else f" ± {half:.{shown}f}")


def figure_of(value: float, half: float | None) -> str:
    return f"{value:.3f}" + ("" if half is None else f" ± {half:.3f}")


def percent(share: float, half: float | None) -> str:
    """A share as a percentage, with half its 95 % interval where that is known."""
    return f"{100 * share:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def cells(comparison: Comparison, figures: Iterable[str] = HEADINGS) -> dict[str, list[str]]:
    """The cells of each row of the table, in the order shown."""
    rows: dict[str, Row | None] = {**comparison.rows, **dict.fromkeys(comparison.missing)}
    return {name: [cell(rows[name], figure) for figure in figures] for name in ROWS if name in rows}


def drawn_from(comparison: Comparison) -> str:
    """The prior that the run is meant to be drawn from, in words."""
    return "the learned prior" if comparison.generator == "learned" else comparison.title("standard")


def notes(comparison: Comparison) -> list[str]:
    """What the figures are, and those that are not of one prior."""
    everything = (about_measures, about_copies, about_trouble, about_priors, about_codes, about_labels, about_sampling, about_gap)
    return [line for about in everything for line in about(comparison)]


def short_notes(comparison: Comparison) -> list[str]:
    """What the terminal says below the table; the page explains every column."""
    everything = (about_distance, about_trouble, about_codebooks, about_labels, about_gap, about_condition)
    return [line for about in everything for line in about(comparison)]


def about_distance(comparison: Comparison) -> list[str]:
    features = comparison.features
    read = "" if features.accuracy is None else f", which is right on {100 * features.accuracy:.1f} % of test images"
    return [
        f"fd: Fréchet distance to {comparison.images_of.reference} training images in {features.dimensions} features; lower is"
        f" better. {counted(comparison.images, 'image')} a row, seed {comparison.seed}. Features: {features.extractor}{read}."
    ]


def about_measures(comparison: Comparison) -> list[str]:
    """What the figures are, and their errors."""
    compared = min(comparison.images, comparison.images_of.reference)
    nearest = f"{100 * nearest_share(comparison.images):.3g} %"
    return [
        *about_distance(comparison),
        f"KID: kernel distance to {counted(compared, 'training image')}; lower is better.",
        "precision, density: how many samples lie among training images; higher is better.",
        "recall, coverage: how much of the training images' variety the samples reach; higher is better.",
        "nearer: how often a sample lies nearer to its nearest training image than a held-out image lies to its own. New images"
        " give 0.5 (Meehan et al. 2020).",
        f"copied: share of samples that lie as near to a training image as the nearest {nearest} of held-out images do."
        f" New images give {nearest}.",
        "Guidance draws typical images. They lie nearer to training images than new ones, without being copies.",
        f"±: half of the interval of {comparison.intervals}. It is for the mean over many sets of so many samples of this model:"
        " two such sets differ by up to 1.4 times as much, those of another training by more. If precision, nearer or"
        " copied is exactly 0 or 1, ± is an upper bound, about 3 / number of images.",
    ]


def about_copies(comparison: Comparison) -> list[str]:
    """Whether samples of the prior that the run is meant to be drawn from, as fitted, may be copies of training images."""
    row = comparison.priors[comparison.generator]
    if row.copied is None or row.copying_p is None:
        return []
    share, chance = percent(row.copied, row.plus_minus.get("copied")), f"p = {row.copying_p:.2g}"
    says = "More than by chance: look at the nearest training images" if row.copies else "No more than by chance"
    drawn = f"of the samples drawn from {drawn_from(comparison)}"
    return [f"copies: {share} % {drawn} lie that near to a training image. {says} ({chance})."]


def about_trouble(comparison: Comparison) -> list[str]:
    withheld = [f"{figure}: withheld, {reason}." for figure, reason in comparison.withheld.items()]
    missing = [f"{ROWS[name]}: {why}." for name, why in comparison.missing.items()]
    return withheld + missing + [f"warning: {warning}." for warning in comparison.warnings]


def about_priors(comparison: Comparison) -> list[str]:
    lines = [f"{ROWS[name]}: {row.note}." for name, row in comparison.priors.items() if row.note and name != "posterior"]
    if any(row.nll is not None for row in comparison.priors.values()):
        lines.append("nll of z: -log p(z) of held-out latents in nats an image; lower is better.")
    if any(row.nll_is_bound for row in comparison.priors.values()):
        lines.append("≤: an upper bound.")
    return lines + about_condition(comparison)


def about_condition(comparison: Comparison) -> list[str]:
    return [f"Only the learned prior is conditioned on the {comparison.conditioned_on}."] if comparison.conditioned_on else []


def about_codes(comparison: Comparison) -> list[str]:
    lines = [f"reconstructions: mean squared error {comparison.reconstruction.mse:.5f} a pixel, for values in [0, 1]."]
    if (perturbed := comparison.reconstruction.fd_perturbed) is not None:
        lines.append(
            f"perturbed reconstructions: fd {perturbed:.2f}, and {cell(comparison.reconstruction, 'fd')} unperturbed. A tenth of"
            " the latent positions come from another image. It shows how much the decoder forgives a prior's errors."
        )
    return lines + about_codebooks(comparison)


def about_codebooks(comparison: Comparison) -> list[str]:
    lines = []
    for level in comparison.codes:
        height, width = level.grid
        lines.append(
            f"codebook of the {height}×{width} grid: {level.used} of {level.codes} codes used over the test images, perplexity"
            f" {level.perplexity:.0f}."
        )
    return lines


def about_labels(comparison: Comparison) -> list[str]:
    shares = {name: row.label_read for name, row in comparison.rows.items() if row.label_read is not None}
    if not shares:
        return []
    read = {name: f"{100 * share:.1f} %" for name, share in shares.items()}
    tuned = f", {read['tuned']} with {described_tuned(comparison)}" if "tuned" in read else ""
    return [
        f"label accuracy: the classifier predicts the requested label for {read['learned']} of the learned prior's"
        f" samples{tuned}, for {read['reconstruction']} of reconstructions and {read['real']} of real images."
    ]


def described_tuned(comparison: Comparison) -> str:
    """How the tuned row was drawn."""
    how = comparison.priors["tuned"].sampling
    assert how is not None
    return described(how)


def about_sampling(comparison: Comparison) -> list[str]:
    tried = [point for point in comparison.sampling if point.sampling is not None]
    judged = min(comparison.images, comparison.images_of.reference)
    if "learned" in comparison.priors and not tried and judged < ENOUGH:
        return [
            f"tuned: not used; {counted(judged, 'image')} are too few to choose a way to sample: at least {ENOUGH} are needed."
        ]
    if not tried:
        return []
    ways, count = "; ".join(described(point.sampling) for point in tried if point.sampling), tried[0].images
    best = best_of(tried)
    if best is None or best.sampling is None:
        return [f"tuned: not used; {counted(count, 'sample')} for each way to sample are too few for a Fréchet distance."]
    chosen = f"tuned: {described(best.sampling)}"
    if "tuned" not in comparison.priors:
        chosen = f"tuned: not used; sampling {described(best.sampling)}"
    number, reason = f"the {len(tried)} ways tried", "the lowest fd of"
    if best is not lowest_fd(tried):
        number, reason = f"{number} whose fd is within the 95 % interval of the lowest", "the highest label accuracy of those of"
    return [f"{chosen} has {reason} {number}, on {count} samples of another seed, judged by another network. Tried: {ways}."]


def about_gap(comparison: Comparison) -> list[str]:
    if comparison.gap_closed is not None:
        closed, tuned = figure_of(comparison.gap_closed, comparison.gap_closed_plus_minus), ""
        if comparison.gap_closed_tuned is not None:
            share = figure_of(comparison.gap_closed_tuned, comparison.gap_closed_tuned_plus_minus)
            tuned = f" as fitted, {share} with {described_tuned(comparison)}"
        start = comparison.title("standard")
        return [f"gap closed: {closed}{tuned}. 0 is as far from the data as {start}, 1 as near as reconstructions."]
    learned = comparison.generator == "learned"
    return [f"gap closed: withheld, {comparison.gap_closed_reason}."] if learned else []


def between_runs(runs: Mapping[str, Comparison]) -> list[str]:
    """What is to be said of several runs: which lies nearest to the data, and what does not compare."""
    groups: dict[tuple, dict[str, Comparison]] = {}
    for run, comparison in runs.items():
        judged_by = comparison.features.digest, comparison.features.reference.digest, comparison.images
        groups.setdefault(judged_by, {})[run] = comparison
    lines = []
    for group in groups.values():
        rows = {run: comparison.priors[comparison.generator] for run, comparison in group.items()}
        ranked = sorted((row.fd, run) for run, row in rows.items() if row.fd is not None)
        parts = []
        for _, run in ranked:
            drawn = drawn_from(group[run]) + ", as a plain autoencoder is" * (group[run].generator == "standard")
            parts.append(f"{run}, drawn from {drawn}, at {cell(rows[run], 'fd')}")
        if len(parts) > 1:
            lines.append(f"Fréchet distance from the same training images, in the same features: {'; '.join(parts)}.")
    if len(groups) > 1:
        listed = "; ".join(", ".join(group) for group in groups.values())
        lines.append(f"Not everything here compares: other images, other features or another number of images part {listed}.")
    return lines


def about_several(comparisons: Mapping[str, Comparison]) -> list[str]:
    """What stands below the table of several runs that share a decoder."""
    lines = [
        f"runs: {'; '.join(f'{name} of {run}' for run, name in names_of(comparisons).items())}.",
        "nats above the best: what a prior needs more for the latents of an image than the best one; ±: half of its 95 %"
        " interval, over the same draws of the same held-out images.",
        "s to train: of stage 2 alone. parameters: numbers trained or fitted.",
        "KID, density and nearer are in the CSV beside this page, and on the page of each run.",
    ]
    conditions = [f"{run} on the {found.conditioned_on}" for run, found in comparisons.items() if found.conditioned_on]
    return lines + ([f"Some priors are conditioned: {', '.join(conditions)}."] if conditions else [])


def verdict_of_several(entries: Sequence[Entry]) -> str:
    """entries: as `ranking` gives them."""
    every = [entry for entry in entries if entry.generates and entry.row.fd is not None]
    priors = candidates(entries)
    if not priors:
        why = "samples of every prior lie too near to training images" if every else "too few images for a Fréchet distance"
        return f"No prior can be named the best: {why}."
    best = priors[0]
    reconstruction = next(entry for entry in entries if entry.key == "reconstruction")
    ahead = f"; next is {priors[1].title}, at {cell(priors[1].row, 'fd')}" if len(priors) > 1 else ""
    return (
        f"Of {len(every)} ways to draw z for one decoder, {best.title} lies nearest to the training images, at a Fréchet"
        f" distance of {cell(best.row, 'fd')}{ahead}. The decoder's own reconstructions lie at {cell(reconstruction.row, 'fd')}."
        + "".join(
            f" {entry.title} is left out: {100 * (entry.row.copied or 0):.1f} % of its samples lie as near to a training image as"
            " the nearest held-out images do, which is more than by chance."
            for entry in every
            if entry.row.copies
        )
    )


def verdict_in_words(comparison: Comparison) -> str:
    """How near samples lie to the data, and that some may be copies of training images where that is so."""
    row = comparison.priors[comparison.generator]
    if not row.copies:
        return about_nearness(comparison)
    return (
        f"{about_nearness(comparison)} But some samples may be copies: {100 * (row.copied or 0):.1f} % lie as near to a training"
        " image as the nearest held-out images do, which is more than by chance."
    )


def about_nearness(comparison: Comparison) -> str:
    priors, start = comparison.priors, comparison.title("standard")
    standard, best = cell(priors["standard"], "fd"), cell(comparison.reconstruction, "fd")
    if comparison.generator == "standard":
        return (
            f"A plain autoencoder, without a learned prior. Drawn from {start}, its samples lie at a Fréchet distance of"
            f" {standard} from the training images, its reconstructions at {best}."
        )
    if comparison.gap_closed is None:
        return f"What the learned prior gains cannot be measured here: {comparison.gap_closed_reason}."
    tuned = ""
    if comparison.gap_closed_tuned is not None:
        share = part_of_gap(comparison.gap_closed_tuned, comparison.gap_closed_tuned_plus_minus)
        tuned = f", and {share} of it when drawn with {described_tuned(comparison)}"
    return (
        f"Drawn from {start}, samples lie at a Fréchet distance of {standard} from the training images; drawn from the learned"
        f" prior, at {cell(priors['learned'], 'fd')}. The decoder's own reconstructions lie at {best}, so the learned"
        f" prior closes {part_of_gap(comparison.gap_closed, comparison.gap_closed_plus_minus)} of the gap that {start}"
        f" leaves{tuned}."
    )


def part_of_gap(share: float, half: float | None) -> str:
    """How much of a gap is closed; of a share above 1, which is chance or a reward for typical images, that it is all."""
    return "all" if share >= 1 else "none" if share <= 0 else f"{percent(share, half)} %"
