"""python -m pipelines.compare RUN: one frozen decoder, every prior side by side."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from pipelines.console import UserError, check_seed, first_process, run_command, say
from pipelines.files import write_json
from pipelines.judging.comparison import Comparison, to_dict
from pipelines.pages.page import Section, write_page
from pipelines.pages.report import report_folder, write_report
from pipelines.pages.tables import table, write_csv
from pipelines.pages.words import between_runs
from pipelines.runs.config import ExtractorName, MetricsConfig
from pipelines.runs.dataset import load_data
from pipelines.runs.latents import training_latents
from pipelines.runs.parts import load_autoencoder, specs_of
from pipelines.runs.priors import open_prior
from pipelines.runs.run import Run


@dataclass(frozen=True)
class Judging:
    """What images are compared in, where it is not as the run's config says."""

    extractor: ExtractorName | None = None
    """classifier or inception"""
    weights: Path | None = None
    """file of inception's weights, where they cannot be downloaded"""
    images: int | None = None
    """images in every row"""

    def instead_of(self, configured: MetricsConfig) -> MetricsConfig:
        """What is configured, but for what is asked for here."""
        asked = {name: value for name, value in vars(self).items() if value is not None}
        return replace(configured, **asked)


@dataclass(frozen=True)
class Arguments:
    """Compare every prior of a run, through one frozen decoder; of several runs, on one page."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """runs, by their names under checkpoints/ or their paths"""
    seed: int = 0
    """seed of the samples"""
    metrics: Judging = field(default_factory=Judging)
    out: Path = Path("comparison.html")
    """the page of several runs, with .json and .csv beside it; that of each lies in its folder"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


def main(arguments: list[str] | None = None) -> None:
    asked = tyro.cli(Arguments, prog="python -m pipelines.compare", args=arguments, console_outputs=first_process())
    if not asked.runs:
        raise UserError("name a run to compare: python -m pipelines.compare RUN [RUN …]")
    check_seed(asked.seed)
    if asked.metrics.images is not None and asked.metrics.images < 1:
        raise UserError(f"--metrics.images is a number from 1 up, not {asked.metrics.images}")
    if asked.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out is the file of a page, such as comparison.html, not {asked.out}")
    runs = [Run.open(name, asked.device) for name in asked.runs]
    names = [run.folder.name for run in runs]
    if len({*names}) < len(names):
        raise UserError(f"runs on one page have names of their own, not {', '.join(names)}: rename a folder, or leave one out")
    for run in runs:
        training_latents(run)  # fails early when something is unfinished
        specs = specs_of(load_autoencoder(run))
        open_prior(run, "standard", specs)
        if run.learned:
            open_prior(run, "learned", specs)
    sections, comparisons = [], {}
    for run in runs:
        judging = asked.metrics.instead_of(run.config.metrics)
        with run.locked():
            comparison, section = write_report(run, load_data(run), judging, asked.seed)
        sections.append(section)
        comparisons[run.folder.name] = comparison
        say(f"{run.folder.name}\n{table(comparison)}")
        say(f"page, picture and figures: {report_folder(run, judging, asked.seed)}")
    if len(runs) > 1:
        write_together(asked.out, sections, comparisons)


def write_together(path: Path, sections: list[Section], comparisons: dict[str, Comparison]) -> None:
    """The page of several runs, and the same figures beside it."""
    findings = between_runs(comparisons)
    versions = [*comparisons.values()][-1].versions
    write_page(path, sections, versions, findings)
    write_json(path.with_suffix(".json"), {name: to_dict(comparison) for name, comparison in comparisons.items()})
    write_csv(path.with_suffix(".csv"), comparisons)
    say("\n".join(findings))
    say(f"all runs on one page: {path}")


if __name__ == "__main__":
    run_command(main)
