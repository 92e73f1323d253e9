"""python -m pipelines.compare RUN: compare all priors of a run through its frozen decoder."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import UserError, check_least, check_seed, run_command, say
from pipelines.runs.names import Device, ExtractorName


@dataclass(frozen=True)
class Judging:
    """How samples are judged, where not as the run's config says."""

    extractor: ExtractorName | None = None
    """the network whose features images are compared in: classifier, inception or dinov2"""
    weights: Path | None = None
    """file of inception's or dinov2's weights, where they cannot be downloaded"""
    images: int | None = None
    """number of images in every row"""


@dataclass(frozen=True)
class Arguments:
    """Compare all priors of a run through its frozen decoder. Several runs are also put on one page."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN …]")]]
    """each a name under checkpoints/, a trained model, a path, or hub:owner/name"""
    seed: int = 0
    """seed of the samples"""
    metrics: Judging = field(default_factory=Judging)
    out: Path = Path("comparison.html")
    """file for the page of several runs, with a .json and a .csv beside it; the page of each run is in its folder"""
    device: Device = "auto"


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "compare", arguments)
    if not asked.runs:
        raise UserError("name a run to compare: python -m pipelines.compare RUN [RUN …]")
    check_seed(asked.seed)
    check_least(asked.metrics, "metrics.", images=1)
    if asked.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out is the file of a page, such as comparison.html, not {asked.out}")
    compare_runs(asked)


def compare_runs(asked: Arguments) -> None:
    # Slow to import, and --help needs none of it.
    from pipelines.files import check_writable
    from pipelines.pages.report import check_finished, report_folder, write_report, write_together
    from pipelines.pages.tables import table
    from pipelines.runs.dataset import load_data
    from pipelines.runs.run import Run

    if len(asked.runs) > 1:
        check_writable("--out", asked.out)
    runs = [Run.open(name, asked.device) for name in asked.runs]
    names = [run.title for run in runs]
    if len({*names}) < len(names):
        raise UserError(f"runs on one page need different names, and these are {', '.join(names)}: rename one, or leave it out")
    for run in runs:
        check_finished(run)
    reports = {}
    for run in runs:
        judging = run.config.metrics
        for name, value in vars(asked.metrics).items():
            judging = judging if value is None else replace(judging, **{name: value})
        with run.locked():
            report = reports[run.title] = write_report(run, load_data(run), judging, asked.seed)
        say(run.title, *table(report.comparison))
        say(f"page, picture and figures: {report_folder(run, judging, asked.seed)}")
    if len(runs) > 1:
        write_together(asked.out, reports)


if __name__ == "__main__":
    run_command(main)
