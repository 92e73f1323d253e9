"""python -m pipelines.compare RUN: one frozen decoder, every prior side by side."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from pipelines.console import UserError, check_seed, first_process, run_command, say
from pipelines.files import write_json
from pipelines.pages.comparison import compare
from pipelines.pages.page import write_page
from pipelines.pages.tables import table, write_csv
from pipelines.pages.words import between_runs
from pipelines.runs.config import ExtractorName
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
    if asked.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out is the file of a page, such as comparison.html, not {asked.out}")
    runs = [Run.open(name, asked.device) for name in asked.runs]
    names = [run.folder.name for run in runs]
    if len({*names}) < len(names):
        raise UserError(f"runs on one page have names of their own, not {', '.join(names)}: rename a folder, or leave one out")
    changed = {name: value for name, value in vars(asked.metrics).items() if value is not None}
    runs = [replace(run, config=replace(run.config, metrics=replace(run.config.metrics, **changed))) for run in runs]
    for run in runs:
        training_latents(run)  # fails early when something is unfinished
        specs = specs_of(load_autoencoder(run))
        open_prior(run, "standard", specs)
        if run.learned:
            open_prior(run, "learned", specs)
    sections, everything = [], {}
    for run in runs:
        with run.locked():
            metrics, described = compare(run, load_data(run), asked.seed)
        sections.append(described)
        everything[run.folder.name] = metrics
        say(f"{run.folder.name}\n{table(metrics)}")
        say(f"page, picture and figures: {run.folder / 'compare'}")
    if len(runs) > 1:
        findings = between_runs(everything)
        write_page(asked.out, sections, metrics["versions"], findings)
        write_json(asked.out.with_suffix(".json"), everything)
        write_csv(asked.out.with_suffix(".csv"), everything)
        say("\n".join(findings))
        say(f"all runs on one page: {asked.out}")


if __name__ == "__main__":
    run_command(main)
