"""The comparison of a run on disk: its figures, its table, its picture and its page."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipelines import files, processes
from pipelines.console import say
from pipelines.data.images import Splits
from pipelines.judging.compare import Exhibits, compare
from pipelines.judging.comparison import Comparison, read_comparison, to_dict, write_comparison
from pipelines.judging.published import PUBLISHED
from pipelines.judging.together import ranking, sharing, standings
from pipelines.pages.diagnosis import diagnosis
from pipelines.pages.page import Section, section_of, section_of_several, write_page
from pipelines.pages.plots import write_picture
from pipelines.pages.tables import aligned, write_csv
from pipelines.pages.words import between_runs
from pipelines.runs.config import MetricsConfig, RunConfig, judged_by
from pipelines.runs.latents import training_latents
from pipelines.runs.parts import load_autoencoder, specs_of, weights_of
from pipelines.runs.priors import open_prior
from pipelines.runs.run import Run


def report_folder(run: Run, judging: MetricsConfig, seed: int = 0) -> Path:
    """RUN/compare for the comparison that the run's config asks for; for another seed, extractor or number of images a folder
    in it, so that none replaces another."""
    asked = run.config.metrics
    parts = [f"seed-{seed}"] if seed else []
    parts += [judging.extractor] if judging.extractor != asked.extractor else []
    parts += [f"{judging.images}-images"] if judging.images != asked.images else []
    return run.work / "compare" / "-".join(parts)


@dataclass(frozen=True)
class Report:
    """A comparison that was written, and what its page is made of."""

    run: Run
    comparison: Comparison
    exhibits: Exhibits
    config: RunConfig

    def section(self, name: str) -> Section:
        return section_of(name, self.comparison, self.exhibits, self.config, diagnosis(self.run, self.comparison))


@dataclass(frozen=True)
class Timing:
    """What timing.json says of a comparison."""

    seconds_per_1000_images: dict[str, float]
    seconds_of_training: dict[str, float]
    seconds: float


def write_report(run: Run, splits: Splits, judging: MetricsConfig, seed: int = 0) -> Report:
    """Compare, and write metrics.json, metrics.csv, timing.json, samples.png and page.html, all by the first process."""
    beginning = time.perf_counter()
    folder, name = report_folder(run, judging, seed), run.title
    comparison, exhibits = compare(run, splits, judging, seed)
    report = Report(run, comparison, exhibits, replace(run.config, metrics=judging))

    def write() -> None:
        metrics = folder / "metrics.json"
        metrics.unlink(missing_ok=True)  # with it, a comparison is finished
        write_picture(folder / "samples.png", comparison, exhibits)
        write_csv(folder / "metrics.csv", {name: comparison})
        timing = Timing(exhibits.seconds, exhibits.training_seconds, time.perf_counter() - beginning)
        files.write_json(folder / "timing.json", vars(timing))
        write_page(folder / "page.html", [report.section(name)], comparison.versions)
        write_comparison(metrics, comparison)

    processes.on_first(write)
    return report


def finished_comparison(run: Run, splits: Splits) -> Comparison:
    """The comparison that the run's config asks for, made unless it is there already."""
    path = report_folder(run, run.config.metrics) / "metrics.json"
    if processes.on_first(path.is_file):
        found = read_comparison(path)
        if is_of(found, run, splits):
            say("compare: finished, skipped")
            return found
    return write_report(run, splits, run.config.metrics).comparison


def is_of(comparison: Comparison, run: Run, splits: Splits) -> bool:
    """Whether a comparison is of these weights, and judged as the run's config says."""
    asked = run.config.metrics
    extractor = next((name for name in PUBLISHED if comparison.features.extractor.startswith(name)), "classifier")
    as_configured = comparison.seed == 0 and extractor == asked.extractor
    as_many = comparison.images == min(asked.images, len(splits.test))
    same = comparison.judged_by == judged_by(asked) and comparison.weights == weights_of(run)
    whole = {"standard", *(["learned"] if run.learned else [])} <= comparison.priors.keys()
    return as_configured and as_many and same and whole


def check_finished(run: Run) -> None:
    """Raises UserError early where a part that is compared is not finished."""
    specs = specs_of(load_autoencoder(run))
    training_latents(run, specs)
    open_prior(run, "standard", specs)
    if run.learned:
        open_prior(run, "learned", specs)


def write_together(path: Path, reports: dict[str, Report]) -> None:
    """The page of several runs, by their names, and the same figures beside it. Runs that share a decoder share a table."""
    comparisons = {run: report.comparison for run, report in reports.items()}
    groups = sharing(comparisons)
    findings = between_runs(comparisons) if len(groups) > 1 else []  # of one group, its own verdict says it
    sections, rankings = [], []
    for runs in groups:
        if len(runs) == 1:
            sections.append(reports[runs[0]].section(runs[0]))
            continue
        group = {run: comparisons[run] for run in runs}, {run: reports[run].exhibits for run in runs}
        entries = ranking(*group)
        sections.append(section_of_several(entries, *group, {run: reports[run].config for run in runs}))
        say(sections[-1].name, *aligned(sections[-1].columns, sections[-1].rows), sections[-1].verdict)
        rankings.append([asdict(standing) for standing in standings(entries)])
    write_page(path, sections, next(iter(comparisons.values())).versions, findings)
    figures = {run: to_dict(comparison) for run, comparison in comparisons.items()}
    files.write_json(path.with_suffix(".json"), {"runs": figures, "rankings": rankings})
    write_csv(path.with_suffix(".csv"), comparisons)
    say(*findings, f"all runs on one page: {path}")
