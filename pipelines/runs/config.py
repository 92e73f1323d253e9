"""RunConfig, and its reading and writing. The union types of the configs are the registry."""

import json
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import cattrs
from cattrs.strategies import configure_tagged_union

from pipelines.console import UserError
from pipelines.data.sets import DataConfig
from pipelines.runs.names import ExtractorName, Pixels
from pipelines.training.config import FitConfig, Precision
from stage1_vae.autoencoder import AutoencoderConfig, BottleneckConfig
from stage1_vae.likelihoods import LikelihoodConfig
from stage1_vae.networks import NetworkConfig
from stage2_prior.autoregressive import AutoregressiveConfig, BackboneConfig
from stage2_prior.conditions import ConditionConfig
from stage2_prior.heads import HeadConfig
from stage2_prior.kinds import PriorConfig

CLASSIFIER = FitConfig(steps=1500, learning_rate=3e-3, checkpoint_steps=500, gradient_clip=10.0)


@dataclass(frozen=True)
class MetricsConfig:
    """How samples are judged."""

    images: int = 10_000
    """images in every row of the comparison; fewer where the test set has fewer"""
    pixels: Pixels = "mean"
    """what of p(x|z) is judged: its mean, or a draw from it, where images are black and white"""
    extractor: ExtractorName = "classifier"
    """what images are compared in the features of: a small classifier trained on the data set's labels, or inception, the
    network of published FIDs"""
    weights: Path | None = None
    """file of inception's weights, where they cannot be downloaded"""
    classifier: FitConfig = CLASSIFIER
    """training of the classifier"""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's weights and figures depend on."""

    data: DataConfig
    stage1: FitConfig
    stage2: FitConfig
    mirror: bool = False
    """train both stages on every image and its mirror image, left to right: for scenes and objects, not for writing. Where
    captions say left and right, they are of the image alone"""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    prior: PriorConfig = field(default_factory=AutoregressiveConfig)
    refine: FitConfig | None = None
    """a third phase, which trains both stages on together toward the ELBO under the learned prior; None, or 0 steps, for two"""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    seed: int = 0
    """seed of the weights, the data order and every draw in training"""
    precision: Precision = "auto"
    """of the convolutions in training: bfloat16, float32, or auto: bfloat16 where the device multiplies in it. Densities,
    weights and everything after training are float32 always"""


SIZES = {"width", "channels", "codes", "hidden", "positions", "features", "layers", "heads", "components", "vocabulary", "length"}
SIZES |= {"transforms", "bins", "samples"}


def check_sizes(config: Any, name: str = "") -> None:
    """Raises UserError where a number of feature maps, layers and the like is below 1, which only some parts check themselves."""
    for entry in fields(config):
        value, here = getattr(config, entry.name), f"{name}.{entry.name.replace('_', '-')}".removeprefix(".")
        if is_dataclass(value):
            check_sizes(value, here)
        elif entry.name in SIZES and value is not None and value < 1:
            raise UserError(f"--{here} is a number from 1 up, not {value}")


def converter() -> cattrs.Converter:
    made = cattrs.Converter(forbid_extra_keys=True)
    made.register_unstructure_hook(Path, str)
    stage1 = (NetworkConfig, BottleneckConfig, LikelihoodConfig)
    stage2 = (BackboneConfig, HeadConfig, ConditionConfig, PriorConfig)
    for union in (DataConfig, *stage1, *stage2):
        configure_tagged_union(union, made, tag_name="kind")
    return made


def to_dict(config: RunConfig) -> dict[str, Any]:
    """As JSON holds it; a union's member is named by `kind`."""
    return converter().unstructure(config, unstructure_as=RunConfig)


def judged_by(metrics: MetricsConfig) -> dict[str, Any]:
    """What the figures of a comparison depend on beside its seed, its extractor and the number of images, as JSON holds it."""
    values = converter().unstructure(metrics)
    return {name: values[name] for name in ("pixels", "weights", "classifier")}


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Raises ValueError where the values are not a RunConfig's."""
    if not isinstance(values, dict):
        raise ValueError("it holds no config")
    try:
        return converter().structure(values, RunConfig)
    except cattrs.BaseValidationError as error:
        raise ValueError("; ".join(cattrs.transform_error(error))) from error


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The fields in which two configs as dicts differ, by dotted name with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new}]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    return [] if old == new else [f"{name}: {old} in the run, {new} asked for"]


def read_config(path: Path) -> RunConfig:
    """What is not in the file, because a later version added it, has its default. Raises UserError for another file."""
    try:
        return from_dict(json.loads(path.read_text()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as the config.json of a run ({error}); mend the file, or name another") from error


def replaced(config: Any, path: str, value: Any) -> Any:
    """A config in which the part or setting at a dotted path is another."""
    name, _, rest = path.partition(".")
    return replace(config, **{name: replaced(vars(config)[name], rest, value) if rest else value})
