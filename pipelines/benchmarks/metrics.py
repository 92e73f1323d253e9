"""Seconds and memory of the figures of one row of a comparison."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.benchmarks.data import make_files
from pipelines.benchmarks.measuring import Rows, peak_bytes
from pipelines.console import UserError, check_least
from pipelines.judging.quality import FEWEST, RESAMPLES, Cloud, FrechetDistance, likeness, nearest_neighbours, resampled


@dataclass(frozen=True)
class BenchmarkMetrics:
    """Measure the cost of the figures of one row of a comparison, with their bootstrap intervals, from random features."""

    images: int = 10_000
    """number of generated images, and of real ones"""
    features: int = 64
    """dimension of the features of an image: 64 of the classifier, 2048 of inception, 1024 of dinov2"""
    training: int = 57_000
    """number of training images among which the nearest is looked for; by default that of MNIST"""
    size: int | None = None
    """measure also the peak memory of a whole comparison of an untrained run, on images of this height and width"""
    json: Path | None = None
    """file to write the rows to"""

    def rows(self) -> Rows:
        check_least(self, features=1)
        if self.size is not None and (self.size < 32 or self.size % 32):
            raise UserError(f"--size is a multiple of 32 from 32 up, not {self.size}")
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
        if self.size is not None:
            rows.append(comparison(self.size, self.images, self.training))
        return [{**row, **self.sizes()} for row in rows]

    def sizes(self) -> dict[str, int]:
        sizes = {"images": self.images, "features": self.features, "training": self.training, "resamples": RESAMPLES}
        return {**sizes, "threads": torch.get_num_threads()}

    def table(self, rows: Rows) -> str:
        lines = [f"{'':42} {'seconds':>8} {'of a CPU':>9} {'peak MiB':>9}"]
        for row in rows:
            lines.append(f"{row['part']:42} {row['seconds']:8.1f} {row['cpu_seconds']:9.1f} {row['peak_bytes'] / 2**20:9.0f}")
        return "\n".join([*lines, ", ".join(f"{value} {name}" for name, value in self.sizes().items())])


def comparison(size: int, images: int, training: int) -> dict[str, Any]:
    """The comparison of a run on so many held-out images: with half as many, memory that grows with them shows.

    The run is trained for one step a stage, on a latent grid of size/32: what is measured is memory of images and of features.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for part, count in (("train", training), ("test", images)):
            (folder / "images" / part).mkdir(parents=True)
            make_files(folder / "images" / part, count, size, shards=False)
        network = ["--autoencoder.network.downsample", "32", "--autoencoder.network.width", "32"]
        prior = ["--prior.backbone", "pixelcnn", "--prior.backbone.width", "16", "--prior.backbone.layers", "2"]
        steps = [f"--{part}.{name}" for part in ("stage1", "stage2") for name in ("steps", "batch-size")]
        settings = [word for name in steps for word in (name, "1" if name.endswith("steps") else "8")]
        data = ["--data.root", str(folder / "images"), "--data.size", str(size), "--data.in-memory", "0"]
        data += ["--metrics.classifier.steps", "1", "--metrics.classifier.batch-size", "8", "--device", "cpu"]
        command = ["train_all", "folder", *data, *network, *prior, *settings, "--run", str(folder / "run")]
        in_a_process([*command, "--metrics.images", "1"])
        seconds, peak = in_a_process(["compare", str(folder / "run"), "--metrics.images", str(images), "--device", "cpu"])
    name = f"a comparison of {images} images of {size}×{size}"
    return {"part": name, "seconds": seconds, "cpu_seconds": seconds, "peak_bytes": peak}


def in_a_process(command: list[str]) -> tuple[float, int]:
    """A command of pipelines in a process of its own: its processor seconds, and the most memory that it held, in bytes."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-m", f"pipelines.{command[0]}", *command[1:]], stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            ended = f"failed with exit code {process.returncode}"
            raise UserError(f"the command {shlex.join(command)} {ended}: {said.read().decode(errors='replace')[-2000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
