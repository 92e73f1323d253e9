"""Seconds and memory of the figures of one row of a comparison."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.benchmarks.measuring import Rows, peak_bytes
from pipelines.console import UserError, check_least
from pipelines.judging.quality import FEWEST, RESAMPLES, Cloud, FrechetDistance, likeness, nearest_neighbours, resampled


@dataclass(frozen=True)
class BenchmarkMetrics:
    """What judging one row of a comparison costs, from random features, the errors from resampling included."""

    images: int = 10_000
    """generated images, and as many real ones"""
    features: int = 64
    """numbers that the extractor gives for an image: 64 of the classifier, 2048 of inception"""
    training: int = 57_000
    """training images, of which the nearest is looked for; as many as MNIST's"""
    json: Path | None = None
    """file to write the rows to"""

    def rows(self) -> Rows:
        check_least(self, features=1)
        if self.images <= max(self.features, FEWEST) or self.training <= self.features:
            raise UserError("--images and --training are above --features: a covariance needs more images than features")
        torch.manual_seed(0)
        real, generated = torch.randn(2, self.images, self.features, dtype=torch.float64)
        training = torch.randn(self.training, self.features, dtype=torch.float64)
        weights = resampled(self.images)
        parts: dict[str, Callable[[], object]] = {
            "fd": lambda: FrechetDistance(real).under(generated, weights),
            "kid, precision, recall, density, coverage": lambda: likeness(Cloud.of(real), generated, weights),
            "nearest training image": lambda: nearest_neighbours(generated, training),
        }
        rows = []
        for name, part in parts.items():
            started, worked = time.perf_counter(), time.process_time()
            part()
            seconds, of_cpu = time.perf_counter() - started, time.process_time() - worked
            memory = peak_bytes(part, torch.device("cpu"))
            rows.append({"part": name, "seconds": seconds, "cpu_seconds": of_cpu, "peak_bytes": memory})
        return [{**row, **self.sizes()} for row in rows]

    def sizes(self) -> dict[str, int]:
        sizes = {"images": self.images, "features": self.features, "training": self.training, "resamples": RESAMPLES}
        return {**sizes, "threads": torch.get_num_threads()}

    def table(self, rows: Rows) -> str:
        lines = [f"{'':42} {'seconds':>8} {'of a CPU':>9} {'peak MiB':>9}"]
        for row in rows:
            lines.append(f"{row['part']:42} {row['seconds']:8.1f} {row['cpu_seconds']:9.1f} {row['peak_bytes'] / 2**20:9.0f}")
        return "\n".join([*lines, ", ".join(f"{value} {name}" for name, value in self.sizes().items())])
