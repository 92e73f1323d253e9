"""How many images are the same at two batch sizes."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor

from pipelines.benchmarks.measuring import Rows
from pipelines.console import UserError, counted
from pipelines.runs.names import Device, RunName


@dataclass(frozen=True)
class BenchmarkBatches:
    """How many images of a trained run are the same at two batch sizes.

    The noise of an image is its own, but matrix products round differently at different batch sizes, and a draw that lies
    on the edge between two outcomes can fall to the other side.
    """

    run: tyro.conf.Positional[RunName]
    count: int = 512
    """number of images"""
    batch: tuple[int, int] = (1, 256)
    """the two batch sizes"""
    json: Path | None = None
    """file to write the row to"""
    device: Device = "auto"

    def rows(self) -> Rows:
        if min(self.count, *self.batch) < 1:
            raise UserError("--count and both of --batch are numbers from 1 up")
        # Slow to import, and --help needs none of it.
        from pipelines.runs.parts import load_autoencoder, specs_of
        from pipelines.runs.priors import open_prior
        from pipelines.runs.run import Run
        from pipelines.runs.sampling import generate

        run = Run.open(self.run, self.device)
        autoencoder = load_autoencoder(run)
        prior = open_prior(run, "learned", specs_of(autoencoder))
        images = [
            generate(autoencoder, prior, self.count, seed=0, device=run.fabric.device, batch_size=size).images
            for size in self.batch
        ]
        return [{"run": self.run, "images": self.count, "batches": self.batch, **apart(*images)}]

    def table(self, rows: Rows) -> str:
        (row,) = rows
        return (
            f"{100 * row['same']:.1f} % of {counted(row['images'], 'image')} are equal to 1/255 at batch {row['batches'][0]} and"
            f" {row['batches'][1]}; the largest difference of a pixel is {row['largest']}/255"
        )


def apart(images: Tensor, others: Tensor) -> dict[str, float]:
    """The share of images, uint8 N C H W, that are the same to 1/255 in both, and the largest difference of a pixel in 1/255."""
    largest = (images.int() - others.int()).abs().flatten(1).amax(1)
    return {"same": float((largest <= 1).float().mean()), "largest": int(largest.max())}
