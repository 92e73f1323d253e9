"""The parts that contract tests iterate over, and small stand-ins for data."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pipelines.data.images import ImageSet, Splits, with_validation
from pipelines.judging import features, tradeoffs
from pipelines.judging.comparison import Comparison
from pipelines.judging.quality import resampled
from pipelines.pages import plots
from pipelines.pages.report import write_report
from pipelines.runs.config import RunConfig
from pipelines.runs.kinds import name_of
from pipelines.runs.phases import train
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.training.config import FitConfig
from stage1_vae import bottlenecks, likelihoods
from stage1_vae.hierarchy import Hierarchical
from stage1_vae.networks import Convolutional, ConvolutionalFlat, FullyConnected
from stage2_prior import baselines
from stage2_prior.autoregressive import AutoregressiveConfig, AutoregressivePrior, BackboneConfig, CascadeConfig
from stage2_prior.flow import FlowConfig
from stage2_prior.heads import Categorical, GaussianMixture, GaussianMixtureHead
from stage2_prior.kinds import PriorConfig, RivalConfig
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.second_vae import SecondVaeConfig
from stage2_prior.transformer import TransformerConfig
from stage2_prior.vamp import VampConfig

BACKBONES = {
    "pixelcnn": PixelCNNConfig(width=6, layers=2, kernel=3),
    "pixelcnn-kernel5": PixelCNNConfig(width=6, layers=1, kernel=5),
    "pixelsnail": PixelSNAILConfig(width=6, blocks=2, layers=1, heads=2),
    "transformer": TransformerConfig(width=6, layers=2, heads=2),
}
CODE_HEADS = {"categorical": Categorical()}
HEADS = {"mixture": GaussianMixture(components=3), **CODE_HEADS}
RIVALS = {
    "flow": FlowConfig(transforms=2, hidden=8, bins=4),
    "vamp": VampConfig(components=5),
    "second-vae": SecondVaeConfig(hidden=8, layers=2, samples=5),
}
LEARNED = [(backbone, head) for backbone in BACKBONES for head in HEADS]
BOTTLENECKS = {
    "deterministic": bottlenecks.Deterministic(channels=3),
    "gaussian": bottlenecks.Gaussian(channels=3, samples=2),
    "vector-quantized": bottlenecks.VectorQuantized(codes=7, channels=3, rate_weight=2.0),
    "finite-scalar": bottlenecks.FiniteScalar(levels=(3, 4)),
    "gumbel-softmax": bottlenecks.GumbelSoftmax(codes=7, channels=3),
    "hierarchical": Hierarchical(bottlenecks.VectorQuantized(codes=5, channels=3, rate_weight=2.0), blocks=1),
    "hierarchical-3": Hierarchical(bottlenecks.VectorQuantized(codes=5, channels=3), levels=3, blocks=1),
}
LIKELIHOODS = {
    "bernoulli": likelihoods.Bernoulli(),
    "gaussian": likelihoods.Gaussian(sigma=0.1),
    "gaussian-learned": likelihoods.Gaussian(),
    "discretized-logistic": likelihoods.DiscretizedLogistic(components=3),
}
NETWORKS = {
    "convolutional": Convolutional(width=8, blocks=1, downsample=4),
    "convolutional-positions": Convolutional(width=8, blocks=1, downsample=4, positions=3, features=6),
    "fully-connected": FullyConnected(layers=1, width=16, positions=3, features=6),
    "convolutional-flat": ConvolutionalFlat(width=8, blocks=1, hidden=16, positions=3, features=6),
}


def randomized(module: nn.Module, scale: float = 0.4, seed: int = 0) -> nn.Module:
    """Every parameter random, so that none hides behind an initial zero; weights of a normalization around their 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for norm in (part for part in module.modules() if isinstance(part, nn.LayerNorm)):
            norm.weight.add_(1)
    return module


def in_receptive_field(config: BackboneConfig, output: tuple[int, int], earlier: tuple[int, int]) -> bool:
    """Whether a backbone sees an earlier position: the receptive field of a PixelCNN grows with its layers, others see all."""
    if not isinstance(config, PixelCNNConfig):
        return True
    reach = config.layers * (config.kernel // 2)
    rows_above, left = output[0] - earlier[0], output[1] - earlier[1]
    if rows_above == 0:
        return 1 <= left <= reach + 1
    return 1 <= rows_above <= reach + 1 and abs(left) <= reach


def random_prior(spec: LatentSpec, backbone: str, head: str, scale: float = 0.3) -> AutoregressivePrior:
    prior = AutoregressiveConfig(BACKBONES[backbone], HEADS[head]).build([spec]).double().eval()
    randomized(prior, scale)
    if isinstance(prior.head, GaussianMixtureHead):
        prior.head.shift.fill_(0.3)
        prior.head.scale.fill_(1.7)
    return prior


def spec_for(head: str, grid: tuple[int, int]) -> LatentSpec:
    return LatentSpec(grid, vocabulary=5) if head in CODE_HEADS else LatentSpec((2, *grid))


def random_latents(count: int, spec: LatentSpec, seed: int = 0) -> LatentDataset:
    generator = torch.Generator().manual_seed(seed)
    if spec.vocabulary is not None:
        return LatentDataset([{"codes": torch.randint(0, spec.vocabulary, (count, *spec.shape), generator=generator)}])
    mean = 2 * torch.randn(count, *spec.shape, generator=generator) + 1
    std = torch.rand(count, *spec.shape, generator=generator) * 0.5 + 0.1
    return LatentDataset([{"mean": mean, "std": std}])


def small_splits(shape: tuple[int, int, int], classes: int, count: int = 240) -> Splits:
    """Bright squares on a dark ground; the class is the square's place."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % max(classes, 1)
    step = shape[1] // max(classes, 2)
    for image, label in zip(images, labels.tolist()):
        image[:, label * step : label * step + 4, 8:20] = 220
    everything = ImageSet(images, labels if classes else None)
    half = count // 2
    train, test = everything.subset(torch.arange(half)), everything.subset(torch.arange(half, count))
    return with_validation(train, test, [str(label) for label in range(classes)])


def shrunk(config: RunConfig) -> RunConfig:
    """The same kinds of parts, seconds of work."""
    fit = FitConfig(steps=4, batch_size=16, checkpoint_steps=2, warmup_steps=1)
    network = config.autoencoder.network
    small = {"width": 16} if isinstance(network, FullyConnected) else {"width": 8, "blocks": 1}
    return dataclasses.replace(
        config,
        stage1=fit,
        stage2=fit if config.stage2.steps else dataclasses.replace(fit, steps=0),
        refine=None if config.refine is None else fit,
        autoencoder=dataclasses.replace(config.autoencoder, network=dataclasses.replace(network, **small)),
        prior=shrunk_prior(config.prior),
        metrics=dataclasses.replace(config.metrics, classifier=fit),
    )


def shrunk_prior(prior: PriorConfig) -> PriorConfig:
    if isinstance(prior, RivalConfig):
        return RIVALS[name_of(type(prior))]
    if isinstance(prior, CascadeConfig):
        return dataclasses.replace(prior, top=shrunk_prior(prior.top), bottom=shrunk_prior(prior.bottom))
    return dataclasses.replace(prior, backbone=dataclasses.replace(prior.backbone, width=8, layers=2))


SAVE_FIGURE = Figure.savefig
"""as it is outside of tests"""


def save_without_axes(figure: Figure, *where, **how) -> None:
    """Most of the time of a small plot goes into its ticks and the room that they need."""
    figure.set_layout_engine("none")
    for axis in figure.axes:
        axis.set_axis_off()
    SAVE_FIGURE(figure, *where, **how)


def cheaper_comparisons(patch: pytest.MonkeyPatch) -> None:
    """A comparison tries one temperature, one strength of each guidance and small mixtures, resamples few times, and draws small
    plots without axes.

    Commands that tests start as processes of their own compare as users' do.
    """
    for ways, one in (("TEMPERATURES", 0.8), ("GUIDANCE", 2.0), ("AUTOGUIDANCE", 0.5), ("BOTH", 0.5)):
        patch.setattr(tradeoffs, ways, (one,))
    patch.setattr(tradeoffs, "SHARES", (1.0, 0.5))
    patch.setattr(baselines, "MIXTURE_COMPONENTS", (2, 10))
    patch.setattr(features, "resampled", partial(resampled, resamples=5))
    patch.setattr(plots, "DPI", 30)
    patch.setattr(Figure, "savefig", save_without_axes)


def trained_run(folder: Path, name: str, **parts) -> Run:
    """A shrunk run of a preset with other parts of the autoencoder, without its comparison.

    Its stage 1 takes as many steps as give latents something to say of the images.
    """
    config = shrunk(preset(name))
    stage1 = dataclasses.replace(config.stage1, steps=40, checkpoint_steps=20)
    config = dataclasses.replace(config, stage1=stage1, autoencoder=dataclasses.replace(config.autoencoder, **parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config.data), "load", lambda self, report=None: small_splits((1, 28, 28), 4))
        run = Run.create(folder / name, config, "cpu")
        train(run)
    return run


def compared(run: Run, splits: Splits, seed: int = 0) -> Comparison:
    """The comparison that the run's config asks for, made anew."""
    return write_report(run, splits, run.config.metrics, seed).comparison


def jacobian(function, inputs: Tensor) -> Tensor:
    """d function(inputs) / d inputs for a single example without batch axis; outputs … × inputs …."""
    return torch.autograd.functional.jacobian(lambda x: function(x[None])[0], inputs)
