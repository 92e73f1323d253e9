"""python -m pipelines.benchmark training | data | sampling | batches | metrics | device: speed, as ratios in one run; sameness.

Medians over repeats that alternate between what is compared: the ratios hold on a noisy machine where seconds do not.

    training   how near training, encoding and scoring come to a bare loop over one fixed batch; what a checkpoint costs
    data       training from a folder of many small files against training from memory; how soon the first batch comes
    sampling   how near drawing a grid comes to one teacher-forced forward pass over the same batch, which does all the
               arithmetic that sampling needs; and the loop that runs the whole network for every position, beside it
    batches    how many images are the same at two batch sizes
    metrics    seconds and memory of the figures of one row of a comparison
    device     what a GPU can do: training, sampling, the same images as a CPU's, sharded weights, torch.compile
"""

import sys
from collections.abc import Callable
from typing import Any

from pipelines.console import UserError, first_process, nearest, run_command, say


def training() -> Any:
    from pipelines.benchmarks.training import BenchmarkTraining

    return BenchmarkTraining


def data() -> Any:
    from pipelines.benchmarks.data import BenchmarkData

    return BenchmarkData


def sampling() -> Any:
    from pipelines.benchmarks.sampling import BenchmarkSampling

    return BenchmarkSampling


def batches() -> Any:
    from pipelines.benchmarks.batches import BenchmarkBatches

    return BenchmarkBatches


def metrics() -> Any:
    from pipelines.benchmarks.metrics import BenchmarkMetrics

    return BenchmarkMetrics


def device() -> Any:
    from pipelines.benchmarks.device import BenchmarkDevice

    return BenchmarkDevice


BENCHMARKS: dict[str, Callable[[], Any]] = {
    "training": training,
    "data": data,
    "sampling": sampling,
    "batches": batches,
    "metrics": metrics,
    "device": device,
}
"""By name; each is imported when it is asked for, since all of it together takes seconds."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h"):
        if first_process():
            print(f"{__doc__}\n{{{','.join(BENCHMARKS)}}} --help says the settings of one.")
        return
    name, *settings = arguments
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}{nearest(name, BENCHMARKS)}")
    import tyro

    from pipelines.files import check_writable, write_json

    asked = tyro.cli(
        BENCHMARKS[name](), prog=f"python -m pipelines.benchmark {name}", args=settings, console_outputs=first_process()
    )
    if asked.json is not None:
        check_writable("--json", asked.json)
    rows = asked.rows()
    say(*asked.table(rows).split("\n"))
    if asked.json is not None:
        write_json(asked.json, rows)


if __name__ == "__main__":
    run_command(main)
