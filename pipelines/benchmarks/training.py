"""How near training, encoding and scoring come to a bare loop over one fixed batch; what a checkpoint costs."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.benchmarks.measuring import Rows, median_seconds
from pipelines.runs.names import Device
from pipelines.training.config import FitConfig

if TYPE_CHECKING:  # slow to import, and --help needs none of it
    from pipelines.data.images import ImageSet
    from pipelines.judging.scores import Scorer
    from pipelines.runs.run import Run
    from pipelines.training.order import Source


@dataclass(frozen=True)
class BenchmarkTraining:
    """Compare the training loop with a bare loop over one fixed batch."""

    preset: str = "mnist5k"
    """the preset whose networks and batch sizes are used"""
    repeats: int = 30
    """measured steps of each stage; the medians are printed"""
    json: Path | None = None
    """file to write the rows to"""
    device: Device = "auto"

    def rows(self) -> Rows:
        """One row a part, for the networks and batch sizes of the preset: stage 1, encoding, stage 2, scoring."""
        with tempfile.TemporaryDirectory() as folder:
            return self.rows_in(Path(folder))

    def rows_in(self, folder: Path) -> Rows:
        from pipelines.judging.scores import Scorer
        from pipelines.runs.conditions import contexts_of
        from pipelines.runs.dataset import write_facts
        from pipelines.runs.latents import encoded, latent_dataset
        from pipelines.runs.parts import new_autoencoder, new_prior, specs_of
        from pipelines.runs.recipes import preset
        from pipelines.runs.run import Run
        from pipelines.training.devices import open_fabric
        from stage2_prior.autoregressive import LearnedPrior

        config = preset(self.preset)
        fabric = open_fabric(self.device, config.precision)
        splits = config.data.load()
        run = Run(folder, config, fabric)
        write_facts(run, splits)
        autoencoder = new_autoencoder(run, splits.image_shape)
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

        dataset = latent_dataset([latents], contexts_of(run, subset), autoencoder.vectors)
        prior = new_prior(run, specs_of(autoencoder), len(splits.label_names))
        prior.estimate(dataset)
        rows.append(training_row(run, "stage 2", prior, dataset, config.stage2, self.repeats))
        if isinstance(prior, LearnedPrior) and autoencoder.bottleneck.has_density:
            rows.append(scoring_row(Scorer(run, autoencoder, prior.eval()), subset, self.repeats))
        return rows

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


def training_row(
    run: "Run", part: str, model: torch.nn.Module, source: "Source", config: FitConfig, repeats: int
) -> dict[str, Any]:
    """`fit`'s own steps against forward, backward and optimizer step on one fixed batch; and its checkpoints."""
    from pipelines.training.fit import Training

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


def scoring_row(scorer: "Scorer", images: "ImageSet", repeats: int) -> dict[str, Any]:
    """Scores of a batch against one pass of encoder, prior and decoder each; and against encoder and prior alone."""
    from pipelines.judging import scores

    some = images.subset(torch.arange(min(scores.BATCH, len(images))))
    fixed = scorer.run.fabric.to_device(some.images[:])

    @torch.inference_mode()
    def encoder_and_prior() -> list[Tensor]:
        levels = scorer.autoencoder.sample(scorer.autoencoder.encode(fixed))
        for level, own in enumerate(scorer.prior.levels):
            own.log_prob(levels[: level + 1], own.null_contexts(len(fixed)))
        return levels

    @torch.inference_mode()
    def bare() -> None:
        scorer.autoencoder.outputs(encoder_and_prior())

    parts = {"whole": lambda: scorer(some), "bare": bare, "without decoder": encoder_and_prior}
    seconds = median_seconds(parts, repeats)
    row = training_summary("scoring", len(some), seconds)
    return row | {"ratio_without_decoder": seconds["without decoder"] / seconds["whole"]}


def training_summary(part: str, images: int, seconds: dict[str, float]) -> dict[str, Any]:
    whole, bare = seconds["whole"], seconds["bare"]
    return {"part": part, "images_per_s": images / whole, "bare_images_per_s": images / bare, "ratio": bare / whole}
