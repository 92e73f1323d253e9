"""python -m pipelines.benchmark training | data | sampling | batches | metrics | device: ratios of speeds, and reproducibility.

Figures are medians over repeats that alternate between the things compared. So ratios are reliable on a noisy machine, where
seconds are not.

    training   time of training, encoding and scoring relative to a bare loop over one fixed batch; cost of a checkpoint
    data       training from a folder of many small files relative to training from memory; time to the first batch
    sampling   time of drawing a grid relative to one teacher-forced forward pass over the same batch, which does all the
               arithmetic that sampling needs; and of a loop that runs the whole network for every position
    batches    number of images that are the same at two batch sizes
    metrics    seconds and memory of the figures of one row of a comparison
    device     a GPU: training, sampling, whether its images are those of a CPU, sharded weights, torch.compile
"""

import sys
from importlib import import_module

from pipelines.console import UserError, first_process, nearest, run_command, say

BENCHMARKS = ("training", "data", "sampling", "batches", "metrics", "device")
"""Each is imported when it is asked for, since all of it together takes seconds."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("--help", "-h"):
        if first_process():
            print(f"{__doc__}\n{{{','.join(BENCHMARKS)}}} --help says the settings of one.")
        return
    name, *settings = arguments
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}{nearest(name, BENCHMARKS)}")
    from pipelines.command_line import read_arguments
    from pipelines.files import check_writable, write_json

    kind = getattr(import_module(f"pipelines.benchmarks.{name}"), f"Benchmark{name.title()}")
    asked = read_arguments(kind, f"benchmark {name}", settings)
    if asked.json is not None:
        check_writable("--json", asked.json)
    rows = asked.rows()
    say(*asked.table(rows).split("\n"))
    if asked.json is not None:
        write_json(asked.json, rows)


if __name__ == "__main__":
    run_command(main)
