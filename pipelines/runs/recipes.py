"""Presets: a recipe, which fixes the kinds of parts, on a data set; the command line overrides values.

A preset's name is DATA[-RECIPE]. Defaults come from the size of images and data set; what was tuned for a pair stands in TUNED.
What was tried, and how it went, is in docs/trials.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipelines.console import UserError, nearest
from pipelines.data.sets import DataConfig, EmbeddedDigits, Folder, Parquet, Shards, TorchvisionByName, TorchvisionSet
from pipelines.runs.config import CLASSIFIER, MetricsConfig, RunConfig, replaced
from pipelines.runs.names import DATA, DEFAULT_RECIPE, RECIPES, SHORT, preset_name
from pipelines.training.config import FitConfig
from stage1_vae import bottlenecks, likelihoods
from stage1_vae.autoencoder import AutoencoderConfig
from stage1_vae.hierarchy import Hierarchical
from stage1_vae.networks import Convolutional, ConvolutionalFlat, FullyConnected
from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.conditions import Caption, ClassLabel, Cluster, ConditionConfig
from stage2_prior.heads import Categorical, GaussianMixture
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.transformer import TransformerConfig


@dataclass(frozen=True)
class DataSet:
    """A data set, and the trainings and sizes that suit it."""

    config: DataConfig
    stage1: FitConfig = FitConfig(steps=4000, batch_size=64, learning_rate=3e-3)
    stage2: FitConfig = FitConfig(steps=8000, batch_size=64, learning_rate=2e-3, checkpoint_steps=1000)
    network: Convolutional = Convolutional()
    classifier: FitConfig = CLASSIFIER
    few: bool = False
    """a few thousand images: priors need dropout, codebooks are smaller, and compiling takes longer than it saves"""
    labelled: bool = True
    """images have labels, which priors are conditioned on; without, it is clusters"""
    tuned_as: str | None = None
    """the data set whose tuned values are taken, where none were tuned for this one"""

    @property
    def dropout(self) -> float:
        return 0.1 if self.few else 0.0

    @property
    def condition(self) -> ConditionConfig:
        return ClassLabel() if self.labelled else Cluster()

    @property
    def codes(self) -> int:
        return 256 if self.few else 512


MNIST = DataSet(TorchvisionSet("MNIST"))
COLOUR = DataSet(
    TorchvisionSet("CIFAR10"),
    stage1=replace(MNIST.stage1, steps=6000, learning_rate=2e-3),
    stage2=replace(MNIST.stage2, steps=10_000),
    network=Convolutional(width=96),
    classifier=replace(CLASSIFIER, steps=2000),
)
DATA_SETS = {
    "mnist5k": DataSet(
        EmbeddedDigits(),
        stage1=FitConfig(steps=3000, batch_size=16, learning_rate=2e-3, average_decay=0.995, checkpoint_steps=1000),
        stage2=replace(MNIST.stage2, steps=2000, batch_size=32, average_decay=0.995, checkpoint_steps=200),
        classifier=replace(CLASSIFIER, steps=400, checkpoint_steps=200, average_decay=0.99),
        few=True,
    ),
    "mnist": MNIST,
    "fashion-mnist": replace(
        MNIST,
        config=TorchvisionSet("FashionMNIST"),
        stage2=replace(MNIST.stage2, steps=5000),
    ),
    "cifar10": COLOUR,
    "folder": replace(COLOUR, config=Folder(), labelled=False, tuned_as="cifar10"),
    "webdataset": replace(COLOUR, config=Shards(), labelled=False, tuned_as="cifar10"),
    "torchvision": replace(COLOUR, config=TorchvisionByName(), tuned_as="cifar10"),
    "parquet": replace(COLOUR, config=Parquet(), labelled=False, tuned_as="cifar10"),
}

WIDE = Categorical(hidden=512)
"""Logits of 512 codes that depend linearly on 64 or 96 features cannot be just any: a few hundred say more."""
TUNED: dict[str, dict[str, Any]] = {
    "mnist5k-plain": {"stage1.steps": 3500, "stage1.batch_size": 128, "stage1.learning_rate": 3e-3},
    "mnist5k-dalle": {
        "stage1.steps": 1500,
        "stage1.batch_size": 128,
        "stage1.learning_rate": 3e-3,
        "stage2.steps": 1200,
        "stage2.batch_size": 64,
    },
    "mnist-plain": {"stage1.steps": 26_000},
    "mnist-vqvae": {"stage1.steps": 8000, "stage2.steps": 10_000},
    "fashion-mnist": {"stage1.steps": 8000},
    "fashion-vqvae": {"stage1.steps": 6000},
    "fashion-dalle": {"stage1.steps": 6000, "stage2.steps": 8000},
    "cifar10": {
        "stage1.optimizer": "muon",
        "stage2.optimizer": "muon",
        "stage2.steps": 8000,
    },
    "cifar10-vqvae2": {
        "stage1.steps": 12_000,
        "stage1.batch_size": 16,
        "stage2.optimizer": "muon",
        "stage2.learning_rate": 6e-3,
        "stage2.steps": 6000,
        "stage2.batch_size": 32,
        "prior.top.input_noise": 0.0,
        "prior.bottom.input_noise": 0.0,
    },
}
"""What is otherwise than a preset's recipe makes of its data set, by preset."""


def vae(data: DataSet) -> RunConfig:
    return RunConfig(
        data=data.config,
        stage1=data.stage1,
        stage2=data.stage2,
        autoencoder=AutoencoderConfig(data.network),
        prior=AutoregressiveConfig(PixelSNAILConfig(dropout=data.dropout), condition=data.condition, input_noise=0.5),
        metrics=MetricsConfig(classifier=data.classifier),
    )


def givt(data: DataSet) -> RunConfig:
    prior = AutoregressiveConfig(TransformerConfig(dropout=data.dropout), condition=data.condition)
    return replace(vae(data), stage2=replace(data.stage2, learning_rate=1e-3), prior=prior)


def vqvae(data: DataSet) -> RunConfig:
    bottleneck = bottlenecks.VectorQuantized(codes=data.codes, rate_weight=6.0)
    prior = AutoregressiveConfig(PixelSNAILConfig(width=96, dropout=0.1), WIDE, data.condition)
    if data.few:
        prior = AutoregressiveConfig(PixelSNAILConfig(dropout=data.dropout), Categorical(), data.condition, input_noise=0.3)
    return compiled(data, replace(vae(data), autoencoder=AutoencoderConfig(data.network, bottleneck), prior=prior))


def vqvae2(data: DataSet) -> RunConfig:
    """Attention in the top prior, as in the paper, and in the bottom prior where there are many images."""
    config = vae(data)
    codebook, snail = bottlenecks.VectorQuantized(codes=data.codes, rate_weight=6.0), PixelSNAILConfig(dropout=data.dropout)
    if data.few:
        codebooks, steps = Hierarchical(codebook), 3 * data.stage2.steps // 4
        top = AutoregressiveConfig(snail, Categorical(), data.condition)
        bottom = AutoregressiveConfig(PixelCNNConfig(dropout=data.dropout), Categorical(), data.condition)
    else:
        codebooks, steps = Hierarchical(codebook, coarser_rate=0.25), 4000
        top = bottom = AutoregressiveConfig(snail, WIDE, data.condition, input_noise=0.3)
    config = replace(
        config,
        stage1=replace(data.stage1, steps=3 * data.stage1.steps // 4),
        stage2=replace(data.stage2, steps=steps, checkpoint_steps=min(500, data.stage2.checkpoint_steps)),
        autoencoder=AutoencoderConfig(replace(data.network, downsample=2), codebooks),
        prior=CascadeConfig(top, bottom),
    )
    return compiled(data, config)


def dalle(data: DataSet) -> RunConfig:
    bottleneck = bottlenecks.GumbelSoftmax(codes=data.codes)
    transformer = TransformerConfig(dropout=0.1) if data.few else TransformerConfig(width=192, layers=6, dropout=0.1)
    config = replace(
        vae(data),
        stage2=replace(data.stage2, learning_rate=1e-3),
        autoencoder=AutoencoderConfig(data.network, bottleneck),
        prior=AutoregressiveConfig(transformer, Categorical(), Caption()),
    )
    return compiled(data, config)


def plain(data: DataSet) -> RunConfig:
    """The fair opponent of a learned prior: the same networks with settings that make samples from N(0, I) best.

    Few latent numbers in no grid, each of which says something of the whole image, and a likelihood that forgives blur. Stage 1
    gets the time of both stages of the other; there is no second.
    """
    network, bottleneck = replace(data.network, positions=16), bottlenecks.Gaussian(channels=1)
    return replace(
        vae(data),
        stage1=replace(data.stage1, steps=2 * (data.stage1.steps + data.stage2.steps)),
        stage2=replace(data.stage2, steps=0),
        autoencoder=AutoencoderConfig(network, bottleneck, likelihoods.Bernoulli()),
    )


def plane(data: DataSet) -> RunConfig:
    return replace(
        vae(data),
        stage1=replace(data.stage1, learning_rate=1e-3),
        stage2=replace(data.stage2, steps=min(2000, data.stage2.steps)),
        autoencoder=AutoencoderConfig(FullyConnected(), bottlenecks.Gaussian(channels=1), likelihoods.Bernoulli()),
        prior=AutoregressiveConfig(PixelCNNConfig(layers=2, dropout=data.dropout)),
    )


def binary(data: DataSet) -> RunConfig:
    """Raises UserError for images that are not known to be grey."""
    steps, average = 1500 if data.few else data.stage1.steps, data.stage1.average_decay  # of 128 images
    return replace(
        vae(data),
        data=binarized(data.config),
        stage1=FitConfig(4 * steps, learning_rate=2e-3, average_decay=average, checkpoint_steps=steps // 2),
        stage2=replace(data.stage2, steps=3 * data.stage2.steps // 4, learning_rate=2e-3),
        refine=FitConfig(10 * steps, average_decay=average, checkpoint_steps=steps // 2),
        autoencoder=AutoencoderConfig(ConvolutionalFlat(), bottlenecks.Gaussian(), likelihoods.Bernoulli()),
        prior=AutoregressiveConfig(TransformerConfig(width=64, dropout=data.dropout), GaussianMixture(components=32)),
        metrics=MetricsConfig(classifier=data.classifier, pixels="sample"),
    )


def binarized(config: DataConfig) -> DataConfig:
    """Raises UserError for images that are not known to be grey."""
    if isinstance(config, EmbeddedDigits):
        return replace(config, binarize=True)
    if isinstance(config, TorchvisionSet) and config.name != "CIFAR10":
        return replace(config, binarize=True)
    raise UserError("the recipe binary draws grey pixels black or white: it is for mnist5k, mnist and fashion-mnist alone")


def eight_bit(data: DataSet) -> RunConfig:
    return replace(vae(data), autoencoder=AutoencoderConfig(data.network, likelihood=likelihoods.DiscretizedLogistic()))


def compiled(data: DataSet, config: RunConfig) -> RunConfig:
    """The config with both stages compiled, unless that takes longer than it saves."""
    if data.few:
        return config
    return replace(config, stage1=replace(config.stage1, compile=True), stage2=replace(config.stage2, compile=True))


MADE_BY: dict[str, Callable[[DataSet], RunConfig]] = {
    "vae": vae,
    "givt": givt,
    "vqvae": vqvae,
    "vqvae2": vqvae2,
    "dalle": dalle,
    "plain": plain,
    "2d": plane,
    "binary": binary,
    "8bit": eight_bit,
}


def parts_of(name: str) -> tuple[str, str]:
    """The data set and the recipe that a preset's name means. Raises UserError where it is none's."""
    for known, data in {**{data: data for data in DATA}, **SHORT}.items():
        for recipe in (*RECIPES, ""):
            if name == f"{known}-{recipe}".removesuffix("-"):
                return data, recipe or DEFAULT_RECIPE
    presets = [preset_name(data, recipe) for data in DATA for recipe in RECIPES]
    hint = nearest(name, presets).partition(" There are")[0]
    raise UserError(
        f"there is no preset {name!r}{hint} A preset is DATA or DATA-RECIPE, of the data {', '.join(DATA)} and the recipes"
        f" {', '.join(RECIPES)}"
    )


def preset(name: str) -> RunConfig:
    """Raises UserError for an unknown name, or a recipe that makes no sense on the data set."""
    data, recipe = parts_of(name)
    own = DATA_SETS[data]
    config = MADE_BY[recipe](own)
    tuned = TUNED.get(preset_name(data, recipe)) or TUNED.get(preset_name(own.tuned_as or data, recipe), {})
    for path, value in tuned.items():
        config = replaced(config, path, value)
    return config
