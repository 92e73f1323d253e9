"""The latents of a run's images: the posteriors of its autoencoder, encoded once and kept on disk."""

import math
from pathlib import Path

import torch
from torch import Tensor

from pipelines import files, processes
from pipelines.console import UserError
from pipelines.data.images import ImageSet, Mirrored
from pipelines.runs.conditions import contexts_of
from pipelines.runs.dataset import load_data, read_facts
from pipelines.runs.parts import finished, last_phase, load_autoencoder, specs_of
from pipelines.runs.run import Phase, Run
from pipelines.training.fabric import Fabric
from pipelines.training.order import in_order
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.latents import Joined, LatentDataset, LatentSpec

ENCODING_BATCH = 500
SHARD_BYTES = 2**28  # of latents in one file


def encode(run: Run, autoencoder: Autoencoder, images: ImageSet, part: str, phase: Phase | None = None) -> LatentDataset:
    """The posteriors of a split, from disk when they were made by these very weights of these images; with their contexts.

    phase: whose weights these are; the last one when None.
    """
    phase = last_phase(run, "autoencoder") if phase is None else phase
    key = f"{finished(run, phase).digest()} {len(images)} {read_facts(run).content}"
    path = run.work / "latents" / f"{phase}-{part}.safetensors"
    # Mean and std, or a code of 64 bits: 8 bytes a position either way.
    batches = max(1, SHARD_BYTES // (ENCODING_BATCH * 8 * sum(spec.dimensions for spec in specs_of(autoencoder))))
    starts = range(0, len(images), batches * ENCODING_BATCH)
    paths = files.shards(path, len(starts))

    def clear() -> None:
        for other in set(files.found_shards(path)) - set(paths):
            other.unlink()

    processes.on_first(clear)
    parts = [range(start, min(start + starts.step, len(images))) for start in starts]

    def made(number: int, alone: bool = False) -> dict[str, Tensor]:
        rows = parts[number]
        label = f"encoding {part}" + (f", {rows.start} to {rows.stop} of {len(images)}" if len(parts) > 1 else "")
        return encoded(run.fabric, autoencoder, images, label, rows, alone)

    # Of several processes each makes and writes files by itself, in as many batches as the others; the last files, which may be
    # smaller or fewer than processes, are made by all together. So memory holds one file, and a killed process loses one.
    alone = (len(parts) - 1) // processes.count() * processes.count() if processes.count() > 1 else 0
    for first in range(0, alone, processes.count()):
        own = first + processes.rank()
        if not all(processes.gathered(files.key_of(paths[own]) == key)):
            tensors = made(own, alone=True)
            processes.on_each(lambda: files.replace_tensors(paths[own], tensors, {"key": key}))  # noqa: B023
    for number in range(alone, len(parts)):
        files.cached(paths[number], key, lambda: made(number))  # noqa: B023
    shards = [read_latents(shard, specs_of(autoencoder)) for shard in paths]
    if sum(len(next(iter(shard.values()))) for shard in shards) != len(images):
        raise other_latents(path, f"they are not of {len(images)} images")
    return latent_dataset(shards, contexts_of(run, images, part), autoencoder.vectors)


def encode_training(run: Run, autoencoder: Autoencoder, images: ImageSet, phase: Phase | None = None) -> LatentDataset:
    """q(z), which priors are fitted to: the posteriors of the training images, and where the config asks for it of their
    mirror images."""
    latents = encode(run, autoencoder, images, "train", phase)
    if run.config.mirror:
        latents += encode(run, autoencoder, Mirrored(images, share=1.0), "mirrored", phase)
    return latents


def training_latents(run: Run, specs: list[LatentSpec]) -> LatentDataset:
    """What `encode_training` put down, without contexts; of an export without latents it is called first."""
    folder = run.folder / "latents"
    if run.exported and not folder.is_dir():
        encode_training(run, load_autoencoder(run), load_data(run).train)
        folder = run.work / "latents"
    shards = []
    for part in ("train", "mirrored") if run.config.mirror else ("train",):
        path = folder / f"{last_phase(run, 'autoencoder')}-{part}.safetensors"
        paths = files.found_shards(path)
        if not paths or paths != files.shards(path, len(paths)):
            raise UserError(
                f"there is no {path}, or not all of it, which tells how images are encoded. Run the train_all command of"
                f" {run.folder} again."
            )
        shards += [read_latents(shard, specs) for shard in paths]
    return latent_dataset(shards)


@torch.inference_mode()
def encoded(
    fabric: Fabric, autoencoder: Autoencoder, images: ImageSet, label: str, rows: range | None = None, alone: bool = False
) -> dict[str, Tensor]:
    """The posteriors of images, as tensors named LEVEL.NAME, on the CPU. rows: which; all when None.

    alone: each process makes those of its own rows, in as many batches as the others.
    """

    def posteriors(rows: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(int(rows[0]))  # some data sets draw their examples
        (batch,) = in_order(images, rows, ENCODING_BATCH, alone)
        levels = enumerate(autoencoder.encode(fabric.to_device(batch)))
        return {f"{level}.{name}": tensor.cpu() for level, posterior in levels for name, tensor in posterior.items()}

    rows = range(len(images)) if rows is None else rows
    batches = processes.in_batches(posteriors, torch.arange(rows.start, rows.stop), ENCODING_BATCH, label, alone)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def read_latents(path: Path, specs: list[LatentSpec]) -> dict[str, Tensor]:
    """Posteriors as `encoded` names them. Raises UserError where a file, which may come from anyone, holds something else."""
    found = files.read_tensors(path)
    expected: dict[str, tuple[torch.dtype, LatentSpec]] = {}
    for level, spec in enumerate(specs):
        of_level = {"mean": torch.float32, "std": torch.float32} if spec.vocabulary is None else {"codes": torch.int64}
        expected |= {f"{level}.{name}": (dtype, spec) for name, dtype in of_level.items()}
    if found.keys() != expected.keys():
        raise other_latents(path, f"it holds {', '.join(sorted(found)) or 'nothing'}, not {', '.join(expected)}")
    images = {len(tensor) if tensor.ndim else 0 for tensor in found.values()}
    for name, (dtype, spec) in expected.items():
        tensor = found[name]
        if tensor.dtype != dtype or tensor.shape[1:] != spec.shape or len(images) != 1 or 0 in images:
            raise other_latents(path, f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not N × {spec.shape} {dtype}")
        lowest, highest = map(float, tensor.aminmax())
        least, most = (-math.inf, math.inf) if spec.vocabulary is None else (-1, spec.vocabulary)
        if not least < lowest <= highest < most:
            raise other_latents(path, f"{name} has values from {lowest:g} to {highest:g}")
    return found


def other_latents(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not of the latents of this run: {why}; delete {path.parent} to have it made again")


def latent_dataset(
    shards: list[dict[str, Tensor]], contexts: Tensor | None = None, vectors: Tensor | None = None
) -> LatentDataset:
    """A data set of posteriors as `encoded` names them, in one or several parts."""
    levels: dict[int, dict[str, Tensor | Joined]] = {}
    for key in shards[0]:
        level, name = key.split(".")
        levels.setdefault(int(level), {})[name] = shards[0][key] if len(shards) == 1 else Joined([shard[key] for shard in shards])
    return LatentDataset([levels[level] for level in sorted(levels)], contexts, vectors)
