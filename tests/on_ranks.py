"""What the tests of several processes run, in one process and, by torchrun, in two: `torchrun … -m tests.on_ranks FOLDER`.

The processes leave what they found in FOLDER/found-RANK.pt.
"""

import dataclasses
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, distributed, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _set_pg_timeout
from webdataset import TarWriter

from pipelines import files, processes
from pipelines.console import Stopped, UserError
from pipelines.data import shard_index
from pipelines.data.images import ImageSet, Splits
from pipelines.data.sets import TorchvisionSet
from pipelines.data.shards import Shards
from pipelines.runs import latents
from pipelines.runs.dataset import load_data, write_facts
from pipelines.runs.latents import encoded
from pipelines.runs.parts import new_autoencoder
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.runs.sampling import generate
from pipelines.train_all import train_all
from pipelines.training.config import FitConfig
from pipelines.training.devices import open_fabric
from pipelines.training.fit import Training, evaluate, fit
from stage1_vae import bottlenecks, likelihoods
from stage1_vae.autoencoder import Autoencoder, AutoencoderConfig
from stage1_vae.bottlenecks import VectorQuantizedBottleneck
from stage1_vae.hierarchy import Hierarchical
from stage1_vae.networks import Convolutional
from stage2_prior.autoregressive import AutoregressiveConfig, AutoregressivePrior
from stage2_prior.heads import Categorical
from stage2_prior.latents import LatentSpec
from tests.parts import BACKBONES, cheaper_comparisons, random_latents, shrunk, small_splits

STEPS = 50
SHARDS = 5
CONFIG = FitConfig(steps=STEPS, batch_size=8, learning_rate=3e-3, warmup_steps=5, checkpoint_steps=10, gradient_clip=10.0)
OPTIMIZERS = {"adamw": CONFIG, "muon": dataclasses.replace(CONFIG, optimizer="muon")}
FIXED = bottlenecks.VectorQuantized(codes=6, channels=3, revival=0.0, rate_weight=2.0)
WITHOUT_DRAWS = {
    "deterministic": bottlenecks.Deterministic(channels=2),
    "finite-scalar": bottlenecks.FiniteScalar(levels=(3, 4)),
    "vector-quantized": FIXED,
    "hierarchical": Hierarchical(FIXED, blocks=1),
}
WITH_DRAWS = {
    "gaussian": bottlenecks.Gaussian(channels=2),
    "vector-quantized, revived": bottlenecks.VectorQuantized(codes=12, channels=3, revival=0.5, rate_weight=2.0),
    "gumbel-softmax": bottlenecks.GumbelSoftmax(codes=7, channels=3),
}
CODES = LatentSpec((2, 2), vocabulary=5)


def images(count: int = 60) -> ImageSet:
    return ImageSet(torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))


def autoencoder(bottleneck, likelihood=likelihoods.Gaussian()) -> Autoencoder:  # noqa: B008
    torch.manual_seed(0)
    network = Convolutional(width=4, blocks=1, downsample=2)
    made = AutoencoderConfig(network, bottleneck, likelihood).build((1, 8, 8))
    for part in made.modules():
        if isinstance(part, VectorQuantizedBottleneck) and not part.config.revival:
            part.codebook.normal_()
            part.counts.fill_(10.0)
            part.sums.copy_(10 * part.codebook)
    return made


def prior(backbone: str = "transformer") -> AutoregressivePrior:
    torch.manual_seed(0)
    return AutoregressiveConfig(BACKBONES[backbone], Categorical()).build([CODES])


def training(fabric: Fabric, model: nn.Module, train, config: FitConfig = CONFIG, **options) -> Training:
    model.train()
    return Training(fabric, model, train, train, config, 0, Path("unused"), "test", **options)


def losses(fabric: Fabric, model: nn.Module, train, config: FitConfig = CONFIG) -> list[float]:
    made = training(fabric, model, train, config)
    return [float(made.step(step)["loss"]) for step in range(config.steps)]


def losses_without_draws(fabric: Fabric) -> dict[str, list[float]]:
    found = {name: losses(fabric, autoencoder(kind), images()) for name, kind in WITHOUT_DRAWS.items()}
    return found | {f"categorical prior, {name}": losses_of_prior(fabric, config) for name, config in OPTIMIZERS.items()}


def losses_of_prior(fabric: Fabric, config: FitConfig) -> list[float]:
    return losses(fabric, prior(), random_latents(60, CODES), config)


def losses_in_microbatches(fabric: Fabric, microbatches: int) -> dict[str, list[float]]:
    """Of models without statistics of the batch, which take in one microbatch at a time."""
    config = dataclasses.replace(CONFIG, steps=20, microbatches=microbatches)
    models = {name: autoencoder(WITHOUT_DRAWS[name], likelihoods.Gaussian(0.1)) for name in ("deterministic", "finite-scalar")}
    found = {name: losses(fabric, model, images(), config) for name, model in models.items()}
    return found | {"categorical prior": losses(fabric, prior(), random_latents(60, CODES), config)}


def buffers_differ(fabric: Fabric, kind, steps: int = 10) -> list[str]:
    """Buffers that are not the same bits on all processes after some step."""
    model = autoencoder(kind)
    made = training(fabric, model, images())
    differ = set()
    for step in range(steps):
        made.step(step)
        for name, buffer in model.named_buffers():
            if not all(torch.equal(buffer, other) for other in processes.gathered(buffer)):
                differ.add(name)
    return sorted(differ)


def sampled(fabric: Fabric) -> dict[str, Tensor]:
    """What encoding, sampling and evaluation make of models of fixed weights."""
    model, learned = autoencoder(bottlenecks.Gaussian(channels=2)), prior("pixelcnn")
    quantized = autoencoder(FIXED)
    quantized.latents, quantized.image_shape = [(CODES.shape, CODES.vocabulary)], (1, 4, 4)
    fabric.to_device(model).eval(), fabric.to_device(learned).eval(), fabric.to_device(quantized).eval()
    found = encoded(fabric, model, images(1100), "encoding")
    found["images"] = generate(quantized, learned, 50, seed=3, device=fabric.device, batch_size=7, pixels="sample").images
    found["held-out loss"] = torch.tensor(evaluate(fabric, model, images(), 7, 0)["loss"])
    return found


class Breaks(nn.Module):
    """Not a number at step 3, for the second half of the batch: of two processes, on the second."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *batch, progress=0.0):
        terms = self.model(*batch, progress=progress)
        broken = self.training and round(progress * STEPS) == 3 and processes.rank() == processes.count() - 1
        return terms | {"loss": terms["loss"] * float("nan")} if broken else terms


def broken(fabric: Fabric, on_nan: str) -> dict[str, Tensor] | str:
    """The weights after a step that one process alone would leave out, or what is said of it."""
    model = Breaks(prior())
    made = training(fabric, model, random_latents(60, CODES), on_nan=on_nan)
    try:
        for step in range(6):
            made.step(step)
    except UserError as error:
        return str(error)
    return model.state_dict()


def stopped_by_a_signal_to_one(fabric: Fabric, folder: Path) -> str:
    """Train until step 12, where the last process alone is told to end."""

    class Signalled(AutoregressivePrior):
        def forward(self, *arguments, progress=0.0):
            if self.training and round(progress * 20) == 12 and processes.rank() == processes.count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(*arguments, progress=progress)

    model = prior()
    model.__class__ = Signalled
    try:
        trained(fabric, model, folder)
    except Stopped as stopped:
        return str(stopped)
    raise AssertionError("the signal was lost")


def trained(fabric: Fabric, model: nn.Module, folder: Path) -> nn.Module:
    config = dataclasses.replace(OPTIMIZERS["muon"], steps=20)
    fit(fabric, model, random_latents(60, CODES), random_latents(20, CODES, seed=1), config, 0, folder, "test")
    return model


def made(config: TorchvisionSet, report: Path | None = None) -> Splits:
    return small_splits((1, 28, 28), 4)


def run_of_codes(folder: Path) -> Run:
    """Both stages, a comparison, everything; where `TorchvisionSet.load` is `made`."""
    run = Run.create(folder, shrunk(preset("mnist-vqvae")), "cpu")
    train_all(run)
    return run


def writers_of_latents(folder: Path) -> dict[str, list[str]]:
    """Latents of 11 images in files of two, and which files this process wrote, first and when one of them is gone."""
    splits = small_splits((1, 28, 28), 4)
    run = Run.create(folder, shrunk(preset("mnist5k")), "cpu")
    write_facts(run, splits)
    autoencoder = new_autoencoder(run, splits.image_shape)
    fit(run.fabric, autoencoder, splits.train, splits.validation, run.config.stage1, 0, run.folder / "stage1", "stage 1")
    latents.ENCODING_BATCH, latents.SHARD_BYTES = 1, 2 * 8 * autoencoder.latents[0][0][0] * 49
    wrote: list[str] = []
    replace_file = files.replace_file
    files.replace_file = lambda path, content: (wrote.append(path.name), replace_file(path, content))[1]
    found = {}
    for when in ("first", "again", "one gone"):
        wrote.clear()
        latents.encode(run, autoencoder, splits.train.subset(torch.arange(11)), "train")
        found[when] = [*wrote]
        distributed.barrier()
        if when == "again" and processes.rank() == 0:
            files.shards(run.folder / "latents" / "stage1-train.safetensors", 6)[3].unlink()
        distributed.barrier()
    files.replace_file = replace_file
    latents.ENCODING_BATCH, latents.SHARD_BYTES = 500, 2**28
    return found


def write_shards(folder: Path) -> None:
    """SHARDS tar files of 12 small pictures each."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        pixels = np.random.default_rng(shard).integers(0, 256, (12, 8, 8, 3), np.uint8)
        with TarWriter(str(folder / f"{shard}.tar")) as tar:
            for index, image in enumerate(pixels):
                file = io.BytesIO()
                Image.fromarray(image).save(file, "png")
                tar.write({"__key__": f"{shard}-{index}", "png": file.getvalue(), "cls": str(index % 3)})


def shards_in(folder: Path) -> Shards:
    return Shards(f"{folder}/{{0..{SHARDS - 1}}}.tar", size=8, cache=folder / "cache")


def indexed(folder: Path) -> dict[str, dict[str, Any]]:
    """What this process is given of shards, and which of them it reads to index them; or what is said of one that is no good."""
    read: list[str] = []
    entries_of, seconds = shard_index.entries_of, 0.0

    def entries(path: str, *given: Any) -> Any:
        read.append(Path(path).name)
        time.sleep(seconds)
        return entries_of(path, *given)

    def changed(change: Callable[[], object]) -> None:
        if processes.rank() == 0:
            change()
        distributed.barrier()

    def loaded(shards: Path) -> dict[str, Any]:
        run = Run.create(folder / "run", dataclasses.replace(preset("webdataset"), data=shards_in(shards)), "cpu")
        read.clear()
        distributed.barrier()
        _set_pg_timeout(timedelta(seconds=1))  # of what training does together; indexing may take longer
        try:
            train = load_data(run).train
        except UserError as error:
            return {"read": read[:], "said": f"{type(error).__name__}: {error}"}
        finally:
            _set_pg_timeout(default_pg_timeout)
        return {"read": read[:], "images": train.images, "labels": train.labels}

    shards, own = folder / "on a shared disk", folder / f"of machine {processes.rank()}"
    patch = pytest.MonkeyPatch()
    patch.setattr(shard_index, "entries_of", entries)
    changed(lambda: write_shards(shards))
    seconds = 1.0 * processes.rank()
    found = {"first": loaded(shards)}
    seconds = 0.0
    found["again"] = loaded(shards)
    changed(lambda: (os.utime(shards / "3.tar", (0, 0)), (shards / "0.tar.index").write_bytes(b"damaged")))
    found["changed"] = loaded(shards)
    changed(lambda: (shards / "1.tar").write_bytes((shards / "1.tar").read_bytes()[:1000]))
    found["cut off"] = loaded(shards)
    changed(lambda: (shards / "1.tar").unlink())
    found["gone"] = loaded(shards)
    write_shards(own)
    patch.setenv("LOCAL_RANK", "0")
    patch.setenv("LOCAL_WORLD_SIZE", "1")
    found["two machines"] = loaded(own)
    patch.undo()
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    cheaper_comparisons(pytest.MonkeyPatch())
    fabric = open_fabric("cpu", "float32")
    found = {
        "processes": processes.count(),
        "losses": losses_without_draws(fabric),
        "microbatches": losses_in_microbatches(fabric, 2),
        "differ": {name: buffers_differ(fabric, kind) for name, kind in {**WITHOUT_DRAWS, **WITH_DRAWS}.items()},
        "sampled": sampled(fabric),
        "skip": broken(fabric, "skip"),
        "stop": broken(fabric, "stop"),
        "stopped": stopped_by_a_signal_to_one(fabric, folder / "stopped"),
        "whole": trained(fabric, prior(), folder / "whole").state_dict(),
    }
    sharded = open_fabric("cpu", "float32", sharded=True)
    found["sharded losses"] = {name: losses_of_prior(sharded, config) for name, config in OPTIMIZERS.items()}
    found["sharded"] = trained(sharded, prior(), folder / "sharded").state_dict()
    torch.set_default_dtype(torch.float32)
    TorchvisionSet.load = made  # type: ignore[method-assign]
    found["wrote"] = writers_of_latents(folder / "latents")
    found["indexed"] = indexed(folder / "shards")
    run_of_codes(folder / "run")
    torch.save(found, folder / f"found-{processes.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
