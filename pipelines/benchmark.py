"""python -m pipelines.benchmark training: how near the training loop comes to a bare loop over one fixed batch.

Speed is stated as ratios within one run, medians over interleaved repeats: they hold on a noisy machine where seconds
do not. More than one thing to measure will be more than one name in place of `training`.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from lightning_fabric import Fabric

from pipelines.checkpoint import write_file
from pipelines.config import preset
from pipelines.console import UserError, run_command, say
from pipelines.fit import Source, Training
from pipelines.run import Run, devices, encoded, latent_dataset


def median_rates(images: int, parts: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Images/s of each part: the median over repeats that alternate between the parts, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: images / statistics.median(values) for name, values in seconds.items()}


def training_row(fabric: Fabric, part: str, model: torch.nn.Module, source: Source, config, repeats: int) -> dict[str, Any]:
    """`fit`'s own steps against forward, backward and optimizer step on one fixed batch."""
    steps = 10
    with tempfile.TemporaryDirectory() as folder:
        training = Training(fabric, model, source, source, config, 0, Path(folder), part)
        model.train()
        fixed = fabric.to_device(source[training.order.indices(0)])
        done = 0

        def whole() -> None:
            nonlocal done
            for _ in range(steps):
                training.step(done)
                done += 1

        def bare() -> None:
            for _ in range(steps):
                loss = training.wrapped(*fixed)["loss"]
                training.optimizer.zero_grad()
                loss.backward()
                training.optimizer.step()

        rates = median_rates(steps * config.batch_size, {"whole": whole, "bare": bare}, repeats)
    return row(part, rates)


def row(part: str, rates: dict[str, float]) -> dict[str, Any]:
    whole, bare = rates["whole"], rates["bare"]
    return {"part": part, "images_per_s": whole, "bare_images_per_s": bare, "ratio": whole / bare}


def benchmark_training(name: str, fabric: Fabric, repeats: int) -> list[dict[str, Any]]:
    """One row a part, for the networks and batch sizes of a preset: stage 1, encoding, stage 2."""
    config = preset(name)
    splits = config.data.load()
    run = Run(Path(), config, fabric)
    autoencoder = run.new_autoencoder(splits.image_shape)
    fitting = replace(config.stage1, steps=10**6)
    rows = [training_row(fabric, "stage 1", autoencoder, splits.train, fitting, repeats)]

    autoencoder.eval()
    subset = splits.train.subset(torch.arange(min(3000, len(splits.train))))
    batches = subset.images.split(500)
    fixed = fabric.to_device(batches[0])

    @torch.inference_mode()
    def bare() -> None:
        for _ in batches:
            autoencoder.encode(fixed)

    latents: dict[str, Any] = {}

    def whole() -> None:
        latents.update(encoded(fabric, autoencoder, subset, "encoding"))

    rows.append(row("encoding", median_rates(len(subset), {"whole": whole, "bare": bare}, repeats)))

    dataset = latent_dataset(latents)
    prior = run.new_prior(run.specs(autoencoder))
    prior.estimate(dataset)
    rows.append(training_row(fabric, "stage 2", prior, dataset, replace(config.stage2, steps=10**6), repeats))
    return rows


@dataclass(frozen=True)
class Arguments:
    """Measure speed, as ratios."""

    what: tyro.conf.Positional[Literal["training"]]
    """training: the training loop against a bare loop over one fixed batch"""
    preset: str = "mnist5k"
    """whose networks and batch sizes"""
    repeats: int = 7
    """measured repeats of each part; medians are stated"""
    json: Path | None = None
    """file to write the rows to"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


def main(arguments: list[str] | None = None) -> None:
    asked = tyro.cli(Arguments, prog="python -m pipelines.benchmark", args=arguments)
    if asked.repeats < 1:
        raise UserError(f"--repeats is a number from 1 up, not {asked.repeats}")
    rows = benchmark_training(asked.preset, devices(asked.device, preset(asked.preset).precision), asked.repeats)
    say(f"{'part':10} {'images/s':>10} {'bare loop':>10} {'ratio':>7}   ({torch.get_num_threads()} threads)")
    for line in rows:
        say(f"{line['part']:10} {line['images_per_s']:10.0f} {line['bare_images_per_s']:10.0f} {line['ratio']:7.3f}")
    if asked.json is not None:
        write_file(asked.json, (json.dumps(rows, indent=2) + "\n").encode())


if __name__ == "__main__":
    run_command(main)
