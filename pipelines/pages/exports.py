"""A run as a folder to hand on: what drawing needs, its figures and a card, and nothing more."""

import hashlib
import re
import shlex
import shutil
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from pipelines.console import UserError
from pipelines.files import as_json, aside, check_writable, found_shards, read_tensors, write_flushed
from pipelines.judging.comparison import Comparison, comparison_file, read_comparison
from pipelines.judging.tradeoffs import described
from pipelines.pages.tables import markdown
from pipelines.runs.conditions import contexts_asked
from pipelines.runs.config import to_dict
from pipelines.runs.dataset import FACTS, read_facts
from pipelines.runs.exported import CARD, FORMAT, LIBRARY, LIST, files_of, metadata_of
from pipelines.runs.parts import (
    EARLY_PRIOR,
    Part,
    early_prior,
    finished,
    last_phase,
    load_autoencoder,
    new_autoencoder,
    specs_of,
    weights_of,
)
from pipelines.runs.pictures import tiled
from pipelines.runs.priors import open_prior
from pipelines.runs.recipes import DATA_SETS
from pipelines.runs.run import PHASES, Phase, Run
from pipelines.runs.sampling import generate
from pipelines.runs.whereabouts import without_places
from pipelines.training.checkpoints import CHECKSUMS, checksum
from stage1_vae.autoencoder import Autoencoder
from stage2_prior.prior import Prior
from stage2_prior.sampling import AS_FITTED

FOLDERS = (*PHASES, "latents", "compare")
"""all that an export may have; the next version of a model on the hub replaces them"""
SAMPLES = "samples.png"
SHOWN = 16  # samples on the card
ROUNDING = {torch.float16: 2.0**-11, torch.float8_e4m3fn: 2.0**-4}
"""The largest relative error of each type: of numbers from 6e-5 to 65,504, and from 0.016 to 448."""
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")  # an identifier on the hub


def export(
    run: Run,
    folder: Path,
    half: bool = False,
    latents: bool = False,
    name: str | None = None,
    license: str | None = None,
) -> None:
    """Write an export of a finished run to a new folder; it is there whole or not at all.

    half: weights in float16, the matrices of the earlier state of the prior in 8 bits, but statistics and codebooks as they are;
    then samples differ a little. latents: also those of the training images, which the baselines are fitted to. name: to open
    it by, the folder's when None. license: its identifier on the hub; that of the run's card when None. Raises UserError where
    the run is not finished, or the folder is there.
    """
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(f"--license is an identifier such as mit or cc-by-4.0, not {license!r}")
    if folder.exists():
        raise UserError(f"{folder} is there already: give another folder with --out, or delete it")
    check_writable("--out", folder, folder=True)
    kept = {"config.json": as_json(to_dict(without_places(run.config)))}
    # Of images in files, the stamp says when those of this machine were written.
    kept[FACTS] = as_json(vars(replace(read_facts(run), stamp=None)))
    phases: set[Phase] = {last_phase(run, "autoencoder")} | ({last_phase(run, "prior")} if run.learned else set())
    autoencoder, prior = networks_of(run)
    trained = parameters_of(run, autoencoder, prior) if half else set()
    weights: dict[str, str] = {}
    for phase in phases:
        best = finished(run, phase).folder
        place = f"{phase}/{best.name}"
        model, halves = stored(best / "model.safetensors", trained)
        half = half or halves
        kept |= {f"{place}/model.safetensors": model, f"{place}/config.json": (best / "config.json").read_bytes()}
        weights[phase] = hashlib.sha256(model).hexdigest()
    if (early := early_prior(run)) is not None:
        kept[EARLY_PRIOR], _ = stored(early, trained, matrices=torch.float8_e4m3fn)  # it is meant to be weak
    if run.conditioned_on == "caption":
        kept["tokenizer.json"] = (run.folder / "tokenizer.json").read_bytes()
    comparison = None
    if (metrics := comparison_file(run)).is_file():
        comparison, kept["compare/metrics.json"] = read_comparison(metrics), metrics.read_bytes()
    if trained:  # samples of the weights that are handed on
        with torch.no_grad():
            for parameter in (*autoencoder.parameters(), *prior.parameters()):
                parameter.copy_(rounded(parameter, torch.float16))
    kept[SAMPLES] = tiled(first_samples(run, autoencoder, prior), 4)
    license = license or license_of(run.folder / CARD)
    kept[CARD] = card(run, comparison, name or folder.name, half, license, EARLY_PRIOR in kept, weights).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with aside(folder, folder=True) as made:
        for file, content in kept.items():
            (made / file).parent.mkdir(parents=True, exist_ok=True)
            write_flushed(made / file, content)
        for phase in phases:
            (checkpoint,) = (made / phase).glob("step-*")
            sums = {path.name: checksum(path) for path in checkpoint.iterdir()}
            write_flushed(checkpoint / CHECKSUMS, as_json(sums))
        if latents:
            (made / "latents").mkdir()
            for part in ("train", "mirrored"):
                for shard in found_shards(run.work / "latents" / f"{last_phase(run, 'autoencoder')}-{part}.safetensors"):
                    shutil.copy(shard, made / "latents")
        sums = {file: checksum(made / file) for file in files_of(made)}
        write_flushed(made / LIST, as_json({"format": FORMAT, "files": sums}))


def networks_of(run: Run) -> tuple[Autoencoder, Prior]:
    """The autoencoder, and the prior that the run is meant to be drawn from."""
    autoencoder = load_autoencoder(run)
    return autoencoder, open_prior(run, "learned" if run.learned else "standard", specs_of(autoencoder))


def parameters_of(run: Run, autoencoder: Autoencoder, prior: Prior) -> set[str]:
    """The names of all that gradients train, as files of weights have them. The rest are statistics, scales and codebooks."""
    parts: dict[Part, nn.Module] = {"autoencoder": autoencoder}
    if run.learned:
        parts["prior"] = prior
    named = [(part, name) for part, module in parts.items() for name, _ in module.named_parameters()]
    return {f"{part}.{name}" if run.config.refine else name for part, name in named}


def stored(path: Path, trained: set[str], matrices: torch.dtype = torch.float16) -> tuple[bytes, bool]:
    """A file of weights, those by these names in half precision, and whether any are.

    matrices: the type of those among them that have more than one dimension, which nearly all numbers are in.
    """
    tensors = read_tensors(path)
    if not trained:
        return path.read_bytes(), in_half(tensors)
    for name in trained & tensors.keys():
        half = rounded(tensors[name], torch.float16)
        tensors[name] = rounded(half, matrices) if half.ndim > 1 else half
    return safetensors.torch.save(tensors), in_half(tensors)


def in_half(tensors: dict[str, Tensor]) -> bool:
    return any(tensor.dtype == torch.float16 for tensor in tensors.values())


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a type of ROUNDING; as it is where it has numbers out of that type's range, or no more bits than it.

    float16 has as many bits as bfloat16 and is eight times as exact.
    """
    if tensor.dtype.itemsize <= dtype.itemsize:
        return tensor
    small = tensor.to(dtype)
    error = (small.double() - tensor.double()).norm()
    return small if error <= ROUNDING[dtype] * tensor.double().norm() else tensor


def first_samples(run: Run, autoencoder: Autoencoder, prior: Prior) -> Tensor:
    """The first samples of what `networks_of` returns, uint8 N C H W; with captions, those of the facts."""
    captions = read_facts(run).caption_examples if run.conditioned_on == "caption" else []
    contexts = contexts_asked(run, SHOWN, caption=[*islice(cycle(captions), SHOWN)]) if captions else None
    return generate(autoencoder, prior, SHOWN, seed=0, device=run.fabric.device, contexts=contexts).images


def license_of(path: Path) -> str | None:
    """What the metadata of a card say; None where there is no card, or it says nothing that is an identifier."""
    found = re.search(rf"^license: ({LICENSE.pattern})$", metadata_of(path), re.MULTILINE)
    return found[1] if found else None


def card(
    run: Run,
    comparison: Comparison | None,
    name: str,
    half: bool,
    license: str | None,
    weaker: bool = False,
    weights: dict[str, str] | None = None,
) -> str:
    """README.md, as the Hugging Face hub has it: metadata, what the model is, its figures with how they were measured.

    weaker: whether the earlier state of the prior is there, so that autoguidance can be drawn with. weights: digests of those
    that are handed on, by phase; the run's own when None.
    """
    facts = read_facts(run)
    channels, height, width = facts.image_shape
    colour = "grey" if channels == 1 else "colour"
    kinds = (name for name, own in DATA_SETS.items() if type(own.config) is type(run.config.data))
    data = vars(run.config.data).get("name") or next(kinds, "a torch Dataset")
    context = run.conditioned_on
    captions = facts.caption_examples if context == "caption" else []
    with_captions = ", with captions of training images" if captions else ""
    example = next(iter(captions or facts.label_names), "…")
    lines = [
        "---",
        "pipeline_tag: unconditional-image-generation",
        LIBRARY,
        *([f"license: {license}"] if license else []),
        "tags:",
        "- two-stage-latent-prior",
        f"- {kind_of_latents(run)}",
        "---",
        "",
        f"# {name.rpartition('/')[2]}",
        "",
        f"A two-stage image generator: an autoencoder, and a prior that was fitted to its latents. It draws {colour} images of"
        f" {height}×{width} pixels, and was trained on {facts.images['train']:,} images ({data}).",
        "",
        f"![samples]({SAMPLES})",
        "",
        f"The first samples under seed 0{with_captions}. {'Weights are in half precision. ' if half else ''}To draw others:",
        "",
        "```python",
        "from pipelines import TwoStage",
        "",
        f'model = TwoStage.open("{name}")',
        f"images = model.sample(64, seed=0)  # uint8, 64 {channels} {height} {width}",
        "```",
        "",
        f"Or from the command line: `python -m pipelines.generate {name} --count 64 --out samples.png`.",
        "",
        *([f'The prior is conditioned on the {context}: `model.sample(64, {context}="{example}")`.', ""] if context else []),
        *([labels_table(facts.label_names), ""] if context == "label" else []),
    ]
    how = AS_FITTED if comparison is None else comparison.tuned(weaker)
    if how != AS_FITTED:
        caption = f'caption="{example}", ' if how.guidance and context == "caption" else ""  # there is no guidance without one
        option = f" --caption {shlex.quote(example)}" if caption else ""
        chose = "The comparison chose" if weaker else "Without autoguidance, the comparison chose"
        lines += [
            f"{chose} {described(how)}. To draw so, call `model.sample(64, {caption}**model.tuned)`, or add"
            f" `--tuned{option}` to the command.",
            "",
        ]
    if comparison is not None:
        rounded_since = half and comparison.weights != (weights_of(run) if weights is None else weights)
        lines += figures(comparison, rounded_since, weaker)
    return "\n".join(lines) + "\n"


def kind_of_latents(run: Run) -> str:
    """The kind of latents, as a tag on the hub."""
    bottleneck = run.config.autoencoder.bottleneck
    if not bottleneck.continuous:
        return "discrete-latents"
    return "vae" if new_autoencoder(run, read_facts(run).image_shape).bottleneck.has_density else "autoencoder"


def labels_table(names: list[str]) -> str:
    return markdown([["number", "label"], *([str(number), name] for number, name in enumerate(names))])


def figures(comparison: Comparison, rounded_since: bool, weaker: bool) -> list[str]:
    """What the comparison says of what can be drawn, and how it was measured."""
    shown = {name: row for name, row in comparison.rows.items() if weaker or not (row.sampling or AS_FITTED).autoguidance}
    rows = [[comparison.title(name), "" if row.fd is None else f"{row.fd:.2f}"] for name, row in shown.items()]
    reference = comparison.images_of.reference
    return [
        markdown([["images", "Fréchet distance"], *rows]),
        "",
        f"Fréchet distance between {comparison.images:,} images in each row and {reference:,} training images; lower is"
        f" better. Features: {comparison.features.extractor}."
        + (" Measured before the weights were rounded to half precision." if rounded_since else ""),
    ]
