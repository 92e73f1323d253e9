"""RunConfig, the presets, and their reading and writing.

A preset fixes the kinds of parts; the command line overrides values. The union types of the configs are the registry.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cattrs
from cattrs.strategies import configure_tagged_union

from pipelines.console import UserError, nearest
from pipelines.data import DataConfig, EmbeddedDigits, Folder, TorchvisionSet
from pipelines.fit import FitConfig
from stage1_vae import bottlenecks, likelihoods
from stage1_vae.autoencoder import AutoencoderConfig
from stage1_vae.bottlenecks import BottleneckConfig
from stage1_vae.likelihoods import LikelihoodConfig
from stage1_vae.networks import Convolutional, FullyConnected, NetworkConfig
from stage2_prior.autoregressive import AutoregressiveConfig
from stage2_prior.heads import HeadConfig
from stage2_prior.pixelcnn import PixelCNNConfig


@dataclass(frozen=True)
class MetricsConfig:
    """How samples are judged."""

    images: int = 10_000
    """images in every row of the comparison; fewer where the test set has fewer"""
    classifier: FitConfig = field(default_factory=lambda: FitConfig(steps=2000, checkpoint_steps=500, gradient_clip=10.0))
    """training of the classifier whose features the Fréchet distance is measured in"""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's weights and figures depend on."""

    data: DataConfig
    stage1: FitConfig
    stage2: FitConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    prior: AutoregressiveConfig = field(default_factory=AutoregressiveConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    seed: int = 0
    """seed of the weights, the data order and every draw in training"""


MNIST5K = RunConfig(
    data=EmbeddedDigits(),
    stage1=FitConfig(steps=1500, average_decay=0.995),
    stage2=FitConfig(steps=1500, average_decay=0.995, checkpoint_steps=250),
    prior=AutoregressiveConfig(PixelCNNConfig(width=64, layers=6, dropout=0.1)),
    metrics=MetricsConfig(classifier=FitConfig(steps=400, checkpoint_steps=200, gradient_clip=10.0, average_decay=0.99)),
)

MNIST = RunConfig(
    data=TorchvisionSet("MNIST"),
    stage1=FitConfig(steps=5000),
    stage2=FitConfig(steps=5000),
    prior=AutoregressiveConfig(PixelCNNConfig(width=64, layers=8)),
)

CIFAR10 = RunConfig(
    data=TorchvisionSet("CIFAR10"),
    stage1=FitConfig(steps=10000),
    stage2=FitConfig(steps=10000),
    autoencoder=AutoencoderConfig(Convolutional(width=128)),
    prior=AutoregressiveConfig(PixelCNNConfig(width=96, layers=8)),
)

PRESETS: dict[str, tuple[str, RunConfig]] = {
    "mnist5k": ("5,000 real digits that need no download; minutes on 2 cores", MNIST5K),
    "mnist": ("MNIST, 60,000 digits", MNIST),
    "fashion-mnist": ("Fashion-MNIST, 60,000 pieces of clothing", replace(MNIST, data=TorchvisionSet("FashionMNIST"))),
    "cifar10": ("CIFAR-10, 50,000 colour pictures", CIFAR10),
    "mnist-2d": (
        "the classic plane of digits: fully connected, two latent numbers",
        replace(
            MNIST,
            autoencoder=AutoencoderConfig(FullyConnected(), bottlenecks.Gaussian(channels=1), likelihoods.Bernoulli()),
            prior=AutoregressiveConfig(PixelCNNConfig(width=64, layers=2)),
        ),
    ),
    "folder": ("your own images: --data.root PATH", replace(CIFAR10, data=Folder())),
}


def preset(name: str) -> RunConfig:
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name][1]


def converter() -> cattrs.Converter:
    made = cattrs.Converter(forbid_extra_keys=True)
    made.register_unstructure_hook(Path, str)
    for union in (DataConfig, NetworkConfig, BottleneckConfig, LikelihoodConfig, HeadConfig):
        configure_tagged_union(union, made, tag_name="kind")
    return made


def to_dict(config: RunConfig) -> dict[str, Any]:
    """As JSON holds it; a union's member is named by `kind`."""
    return converter().unstructure(config, unstructure_as=RunConfig)


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Raises ValueError where the values are not a RunConfig's."""
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
