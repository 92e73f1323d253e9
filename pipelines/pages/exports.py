"""A run as a folder to hand on: what drawing needs, its figures and a card, and nothing more."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pipelines.console import UserError
from pipelines.files import aside, flush, found_shards, read_tensors, write_flushed
from pipelines.judging.comparison import Comparison, read_comparison
from pipelines.pages.report import report_folder
from pipelines.pages.tables import markdown
from pipelines.runs.config import to_dict
from pipelines.runs.dataset import FACTS, read_facts
from pipelines.runs.exported import CARD, FORMAT, LIST, files_of
from pipelines.runs.parts import EARLY_PRIOR, Phase, early_prior, finished, last_phase, load_autoencoder, specs_of
from pipelines.runs.pictures import tiled
from pipelines.runs.priors import open_prior
from pipelines.runs.run import Run
from pipelines.runs.sampling import generate
from pipelines.runs.whereabouts import without_places
from pipelines.training.checkpoints import CHECKSUMS, checksum

SAMPLES = "samples.png"
SHOWN = 16  # samples on the card


def export(run: Run, folder: Path, half: bool = False, latents: bool = False) -> None:
    """Write an export of a finished run to a new folder; it is there whole or not at all.

    half: weights in half precision; then samples differ a little. latents: also those of the training images, which the
    baselines are fitted to. Raises UserError where the run is not finished, or the folder is there.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: give another folder with --out, or delete it")
    kept = {"config.json": as_json(to_dict(without_places(run.config)))}
    # Of images in files, the stamp says when those of this machine were written.
    kept[FACTS] = as_json(vars(replace(read_facts(run), stamp=None)))
    phases: set[Phase] = {last_phase(run, "autoencoder")} | ({last_phase(run, "prior")} if run.learned else set())
    for phase in phases:
        best = finished(run, phase).folder
        weights = read_tensors(best / "model.safetensors")
        name = f"{phase}/{best.name}"
        model = stored(weights, half) if half else (best / "model.safetensors").read_bytes()
        kept |= {f"{name}/model.safetensors": model, f"{name}/config.json": (best / "config.json").read_bytes()}
    if (early := early_prior(run)) is not None:
        kept[EARLY_PRIOR] = stored(read_tensors(early), half) if half else early.read_bytes()
    if run.told == "caption":
        kept["tokenizer.json"] = (run.folder / "tokenizer.json").read_bytes()
    comparison = None
    if (metrics := report_folder(run, run.config.metrics) / "metrics.json").is_file():
        comparison, kept["compare/metrics.json"] = read_comparison(metrics), metrics.read_bytes()
    kept[SAMPLES] = tiled(first_samples(run), 4)
    kept[CARD] = card(run, comparison, folder.name, half).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder, folder=True) as made:
        for name, content in kept.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            write_flushed(made / name, content)
        for phase in phases:
            (checkpoint,) = (made / phase).glob("step-*")
            sums = {path.name: checksum(path) for path in checkpoint.iterdir()}
            write_flushed(checkpoint / CHECKSUMS, as_json(sums))
        if latents:
            (made / "latents").mkdir()
            for part in ("train", "mirrored"):
                for shard in found_shards(run.work / "latents" / f"{last_phase(run, 'autoencoder')}-{part}.safetensors"):
                    shutil.copy(shard, made / "latents")
        sums = {name: checksum(made / name) for name in files_of(made)}
        write_flushed(made / LIST, as_json({"format": FORMAT, "files": sums}))
        flush(made)
        os.rename(made, folder)
        flush(folder.parent)


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def stored(tensors: dict[str, Tensor], half: bool) -> bytes:
    """As a safetensors file; in half precision, as far as the numbers have a place in it."""
    return safetensors.torch.save({name: halved(tensor) if half else tensor for name, tensor in tensors.items()})


def halved(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor.clone()
    small = tensor.half()
    return small if bool(small.isfinite().all()) else tensor.clone()


def first_samples(run: Run) -> Tensor:
    """The first samples of the prior that the run is meant to be drawn from, uint8 N C H W."""
    autoencoder = load_autoencoder(run)
    prior = open_prior(run, "learned" if run.learned else "standard", specs_of(autoencoder))
    return generate(autoencoder, prior, SHOWN, seed=0, device=run.fabric.device).images


def card(run: Run, comparison: Comparison | None, name: str, half: bool) -> str:
    """README.md, as the Hugging Face hub has it: metadata, what the model is, its figures with how they were measured."""
    facts = read_facts(run)
    channels, height, width = facts.image_shape
    data = vars(run.config.data).get("name", type(run.config.data).__name__)
    lines = [
        "---",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        "- two-stage-latent-prior",
        "- vae" if run.config.autoencoder.bottleneck.__class__.__name__ == "Gaussian" else "- discrete-latents",
        "---",
        "",
        f"# {name}",
        "",
        f"A two-stage image generator: an autoencoder, and a prior that was fitted to its latents. It draws images of"
        f" {channels}×{height}×{width} numbers, and was trained on {facts.images['train']} images ({data}).",
        "",
        f"![samples]({SAMPLES})",
        "",
        f"The first samples under seed 0. {'Weights are in half precision. ' if half else ''}To draw others:",
        "",
        "```python",
        "from pipelines import TwoStage",
        "",
        f'images = TwoStage.open("{name}").sample(64, seed=0)  # uint8, 64 {channels} {height} {width}',
        "```",
        "",
        *([f'The prior is told the {run.told}: `sample(64, {run.told}="…")`.', ""] if run.told else []),
        *([f"Labels: {', '.join(facts.label_names)}.", ""] if run.told == "label" else []),
    ]
    if comparison is not None:
        lines += figures(comparison, half)
    return "\n".join(lines) + "\n"


def figures(comparison: Comparison, half: bool) -> list[str]:
    """What the comparison says, and how it was measured."""
    rows = [[comparison.title(name), "" if row.fd is None else f"{row.fd:.2f}"] for name, row in comparison.rows.items()]
    reference = comparison.images_of.reference
    return [
        markdown([["images", "Fréchet distance"], *rows]),
        "",
        f"Fréchet distance in the features of {comparison.features.extractor}, between {comparison.images} images in each row and"
        f" {reference} training images; lower is better."
        + (" Measured before the weights were rounded to half precision." if half else ""),
    ]
