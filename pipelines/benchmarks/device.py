"""What a device can do: training, sampling, the same images as a CPU's, sharded weights, torch.compile."""

import itertools
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.benchmarks.batches import apart
from pipelines.benchmarks.measuring import Rows, median_seconds, peak_bytes
from pipelines.benchmarks.sampling import BenchmarkSampling, grid_of
from pipelines.console import UserError, first_line, nearest, say
from pipelines.files import read_as, write_json
from pipelines.runs.names import Device
from stage2_prior.replay import GraphedFunction, replayed

if TYPE_CHECKING:  # slow to import, and --help needs none of it
    from pipelines.training.fabric import Fabric

PRESETS = ("cifar10", "cifar10-vqvae", "cifar10-vqvae2", "cifar10-givt")
CLASSES = 10
BACKBONES = ("pixelsnail", "transformer")
COUNT = 128  # images that are compared with a CPU's: four batches, the last two of which replay a CUDA graph
LEGEND = "ratio: over one teacher-forced forward pass; peak: memory of two steps, weights and optimizer included"

Measured = tuple[dict[str, Any], Callable[[], dict[str, Any]]]  # what is measured, and what measures it


@dataclass(frozen=True)
class BenchmarkDevice:
    """Measure a device part by part, on made-up images; each part runs in a process of its own.

    A measurement that fails is one line, with its traceback in the file, and the others go on.
    """

    part: tuple[str, ...] = ()
    """training, sampling, sameness, sharded or compiled; by default all. A single part runs in this process"""
    small: bool = False
    """use networks so small that a CPU takes minutes, most of them for compiling"""
    minutes: float = 8
    """time limit; what is not measured by then is left out"""
    run: tuple[str, ...] = ("mnist5k", "fashion-vqvae2")
    """trained runs whose images are compared with those that a CPU draws"""
    json: Path | None = None
    """file to write the rows to, again after each"""
    device: Device = "auto"

    @property
    def repeats(self) -> int:
        return 1 if self.small else 3

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes of training: as the presets have it, and large."""
        return (4,) if self.small else (64, 1024)

    def rows(self) -> Rows:
        for part in self.part:
            if part not in PARTS:
                raise UserError(f"there is no part {part!r}{nearest(part, PARTS)}")
        rows: Rows = []
        for row in self.measured(self.part[0]) if len(self.part) == 1 else self.in_processes():
            rows.append(row)
            if self.json is not None:
                write_json(self.json, rows)
        return rows

    def measured(self, part: str) -> Iterator[dict[str, Any]]:
        for known, measure in PARTS[part](self):
            row = {"part": part, **known}
            try:
                row |= measure()
            except Exception as error:  # whatever a device cannot do
                row |= {"error": first_line(error), "traceback": traceback.format_exc()}
            say(line(row))
            yield row

    def in_processes(self) -> Iterator[dict[str, Any]]:
        """A process that crashes, hangs or is killed leaves the rows that it had written."""
        yield about(self.device)
        ends = time.monotonic() + 60 * self.minutes
        for part in self.part or PARTS:
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
                file = Path(folder) / "rows.json"
                settings = ["--part", part, "--run", *self.run, "--device", self.device, "--json", str(file)]
                command = [sys.executable, "-m", "pipelines.benchmark", "device", *settings, *["--small"] * self.small]
                error = None
                try:
                    code = subprocess.run(command, stderr=errors, timeout=max(0, ends - time.monotonic())).returncode
                except subprocess.TimeoutExpired:
                    error, code = f"not finished after the {self.minutes:g} minutes of --minutes", 0
                yield from read_as(file, list) if file.exists() else []
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip() or "it said nothing"
                if code:
                    error = f"exit code {code}: {said.splitlines()[-1]}"
                if error:
                    yield {"part": part, "error": error, "traceback": said[-5000:]}

    def table(self, rows: Rows) -> str:
        """One part alone has said its rows as they came."""
        return "\n".join([*([] if len(self.part) == 1 else map(line, rows)), LEGEND])


def about(device: str) -> dict[str, Any]:
    from pipelines.training.devices import open_fabric, resolved

    chosen = open_fabric(device).device
    name = torch.cuda.get_device_name() if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return {"part": "device", "device": str(chosen), "name": name, **versions, "precision": resolved("auto", device)}


def training(asked: BenchmarkDevice) -> Iterator[Measured]:
    return trainings(asked, asked.batches, compiled=False)


def compiled(asked: BenchmarkDevice) -> Iterator[Measured]:
    return trainings(asked, asked.batches[:1], compiled=True)


def trainings(asked: BenchmarkDevice, batches: tuple[int, ...], compiled: bool) -> Iterator[Measured]:
    """Both stages of each preset, in bfloat16."""
    from pipelines.training.devices import open_fabric

    fabric = open_fabric(asked.device, "bfloat16")
    for preset, batch, stage in itertools.product(PRESETS, batches, (1, 2)):
        known = {"preset": preset, "stage": stage, "batch": batch, "compiled": compiled}
        yield known, lambda p=preset, b=batch, s=stage: trained(asked, fabric, p, s, b, compiled)  # type: ignore[misc]


def trained(
    asked: BenchmarkDevice, fabric: "Fabric", name: str, stage: int, batch: int, compiled: bool = False
) -> dict[str, Any]:
    """Steps of `fit` on images of noise: speed does not depend on them. Stage 2 has the latents of an untrained encoder."""
    from pipelines.data.images import ImageSet
    from pipelines.runs.latents import encoded, latent_dataset
    from pipelines.runs.recipes import preset
    from pipelines.training.fit import Training
    from stage2_prior.latents import LatentSpec

    torch.compiler.reset()
    torch.manual_seed(0)
    config, side, steps = preset(name), 8 if asked.small else 32, itertools.count()
    images = ImageSet(torch.randint(256, (2 * batch, 3, side, side), dtype=torch.uint8), torch.arange(2 * batch) % CLASSES)
    model: Any = config.autoencoder.build((3, side, side))
    source: Any = images
    if stage == 2:
        specs = [LatentSpec(*level) for level in model.latents]
        latents = encoded(fabric, fabric.to_device(model).eval(), images, "")
        source, model = latent_dataset([latents], images.labels), config.prior.build(specs, CLASSES)
        model.estimate(source)
    settings = replace(config.stage1 if stage == 1 else config.stage2, batch_size=batch, steps=10**6, compile=compiled)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        training: Any = None

        def begin() -> None:
            nonlocal training
            training = Training(fabric, model, source, source, settings, 0, Path(folder), f"{name}, stage {stage}")
            model.train()
            several(2)

        def several(count: int) -> None:
            losses.extend(float(training.step(step)["loss"]) for step in itertools.islice(steps, count))

        started = time.perf_counter()
        memory = peak_bytes(begin, fabric.device)
        first, count = time.perf_counter() - started, 1 if asked.small else 10
        seconds = median_seconds({"steps": lambda: several(count)}, asked.repeats)["steps"] / count
    return {"images_per_s": batch / seconds, "peak_bytes": memory, "first_steps_s": first, "losses": losses[:5]}


def sampling(asked: BenchmarkDevice) -> Iterator[Measured]:
    """Time sampling; on a GPU with the CUDA graph that it captures, and without."""
    from pipelines.training.devices import open_fabric

    device = open_fabric(asked.device).device
    graphs = (True, False) if device.type == "cuda" else (False,)
    grids, batches = (("2x2", "3x3"), (2, 4)) if asked.small else (("8x8", "16x16", "32x32"), (64, 1024, 4096))
    for backbone, grid, batch, graph in itertools.product(BACKBONES, grids, batches, graphs):
        known = {"backbone": backbone, "grid": grid, "batch": batch, "graph": graph}
        yield known, lambda b=backbone, g=grid, n=batch, w=graph: drawn(asked, b, g, n, w, device)  # type: ignore[misc]


@torch.inference_mode()
def drawn(asked: BenchmarkDevice, backbone: str, grid: str, batch: int, graph: bool, device: torch.device) -> dict[str, float]:
    """Sampling in float32, and one teacher-forced forward pass over the same batch."""
    prior = BenchmarkSampling(backbone).prior(grid_of(grid), device)
    replayed.setdefault(prior.backbone, GraphedFunction()).refused = not graph
    indices = torch.arange(batch, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that no graph could be captured
        latents = prior.sample(indices, 0)
        parts = {"forward": lambda: prior.log_prob(latents), "sample": lambda: prior.sample(indices, 0)[0]}
        seconds = median_seconds(parts, asked.repeats)
    ratio = seconds["sample"] / seconds["forward"]
    return {
        "forward_s": seconds["forward"],
        "sample_s": seconds["sample"],
        "ratio": ratio,
        "grids_per_s": batch / seconds["sample"],
    }


def sameness(asked: BenchmarkDevice) -> Iterator[Measured]:
    for run in asked.run:
        yield {"run": run}, lambda r=run: same_as_cpu(asked, r)  # type: ignore[misc]


def same_as_cpu(asked: BenchmarkDevice, name: str) -> dict[str, Any]:
    from pipelines.runs.parts import load_autoencoder, specs_of
    from pipelines.runs.priors import open_prior
    from pipelines.runs.run import Run
    from pipelines.runs.sampling import generate

    count, images = 4 if asked.small else COUNT, []
    for device in (asked.device, "cpu"):
        run = Run.open(name, device)
        autoencoder = load_autoencoder(run)
        prior = open_prior(run, "learned", specs_of(autoencoder))
        samples = generate(autoencoder, prior, count, seed=0, device=run.fabric.device, batch_size=count // 4)
        images.append(samples.images)
    return {"images": count, **apart(*images)}


def sharded(asked: BenchmarkDevice) -> Iterator[Measured]:
    """FSDP of a transformer over one process, beside the same steps without."""
    from pipelines.training.devices import open_fabric

    for name, make in (("without", open_fabric), ("FSDP", sharded_fabric)):
        known = {"preset": "cifar10-givt", "stage": 2, "batch": asked.batches[-1], "strategy": name}
        yield known, lambda m=make: trained(asked, m(asked.device), "cifar10-givt", 2, asked.batches[-1])  # type: ignore[misc]


def sharded_fabric(device: str) -> "Fabric":
    """Connects this process with itself, as torchrun does two or more."""
    from pipelines.training.devices import shard
    from pipelines.training.fabric import Fabric, ModelParallelStrategy

    strategy = ModelParallelStrategy(shard, 1, tensor_parallel_size=1)
    fabric = Fabric(accelerator=device, devices=1, strategy=strategy, precision="32-true")
    fabric.launch()
    return fabric


PARTS: dict[str, Callable[[BenchmarkDevice], Iterator[Measured]]] = {
    "training": training,
    "sampling": sampling,
    "sameness": sameness,
    "sharded": sharded,
    "compiled": compiled,
}
"""The parts, in the order in which they run: compiling takes longest, and comes last."""


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    part = row["part"]
    if part == "device":
        return f"{row['device']}, {row['name']}; torch {row['torch']}, CUDA {row['cuda']}; precision auto is {row['precision']}"
    if "error" in row:
        known = [f"{name} {value}" for name, value in row.items() if name not in ("part", "error", "traceback")]
        return f"{part:9} {', '.join([*known, 'failed'])}: {row['error']}"
    if part == "sampling":
        return (
            f"{part:9} {row['backbone']:14} {row['grid']:>7}, batch {row['batch']:4}{', graph' if row['graph'] else ''}: forward"
            f" {1e3 * row['forward_s']:.1f} ms, sample {1e3 * row['sample_s']:.1f} ms, ratio {row['ratio']:.2f},"
            f" {row['grids_per_s']:.0f} grids/s"
        )
    if part == "sameness":
        return (
            f"{part:9} {row['run']}: {100 * row['same']:.1f} % of {row['images']} images are equal to a CPU's to 1/255;"
            f" the largest difference of a pixel is {row['largest']}/255"
        )
    strategy = f", {row['strategy']}" if "strategy" in row else ""
    return (
        f"{part:9} {row['preset']:14} stage {row['stage']}, batch {row['batch']:4}{strategy}: {row['images_per_s']:.0f} images/s,"
        f" peak {row['peak_bytes'] / 2**20:.0f} MiB, first steps {row['first_steps_s']:.1f} s, fifth loss {row['losses'][-1]:.6g}"
    )
