"""python -m pipelines.benchmark training | data | sampling | batches | metrics: speed, as ratios within one run; sameness.

Medians over repeats that alternate between what is compared: the ratios hold on a noisy machine where seconds do not.

    training   how near the training loop comes to a bare loop over one fixed batch; what a checkpoint costs
    data       training from a folder of many small files against training from memory; how soon the first batch comes
    sampling   how near drawing a grid comes to one teacher-forced forward pass over the same batch, which does all the
               arithmetic that sampling needs; and the loop that runs the whole network for every position, beside it
    batches    how many images are the same at two batch sizes
    metrics    seconds and memory of the figures of one row of a comparison
"""

import tyro

from pipelines.benchmarks.batches import BenchmarkBatches
from pipelines.benchmarks.data import BenchmarkData
from pipelines.benchmarks.metrics import BenchmarkMetrics
from pipelines.benchmarks.sampling import BenchmarkSampling
from pipelines.benchmarks.training import BenchmarkTraining
from pipelines.console import run_command, say
from pipelines.files import write_json


def main(arguments: list[str] | None = None) -> None:
    asked = tyro.extras.subcommand_cli_from_dict(
        {
            "training": BenchmarkTraining,
            "data": BenchmarkData,
            "sampling": BenchmarkSampling,
            "batches": BenchmarkBatches,
            "metrics": BenchmarkMetrics,
        },
        prog="python -m pipelines.benchmark",
        args=arguments,
    )
    rows = asked.rows()
    say(asked.table(rows))
    if asked.json is not None:
        write_json(asked.json, rows)


if __name__ == "__main__":
    run_command(main)
