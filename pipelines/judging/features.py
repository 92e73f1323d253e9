"""Sample quality: the networks whose features images are compared in, and the figures of samples in them.

N images, F features, C colour channels, H×W pixels.

Extractors by name: `classifier`, a small one of the data set's own labels, its features scaled so that the trace of the
training images' covariance is 100 and a Fréchet distance reads like a percentage of the data's own spread; `inception` and
`dinov2`, the networks of published figures (published.py). The reference is the training split.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines import files, processes
from pipelines.console import counted, say
from pipelines.data.images import ImageSet, Labelled, Splits
from pipelines.data.reading import Stored, content_of
from pipelines.judging.published import PUBLISHED, DinoV2, Inception, published
from pipelines.judging.quality import (
    ENOUGH,
    Cloud,
    FrechetDistance,
    blocks,
    copied,
    copying_p,
    error,
    error_of_share,
    likeness,
    nearer,
    resampled,
)
from pipelines.runs.config import MetricsConfig
from pipelines.training.config import FitConfig
from pipelines.training.fabric import Fabric
from pipelines.training.fit import evaluate, fit
from pipelines.training.order import evenly, in_order
from stage1_vae.statistics import BatchNorm
from stage2_prior.latents import Joined

BATCH = 500
SMALLEST = 4  # pixels, that can be halved twice
LARGEST = 64  # pixels of the longer side that the classifier looks at
FEW = 50  # images that a network of a fixed, larger size looks at together
MOST_TRAINING = 1_000_000  # images that samples are compared with
PIXELS_TRAINED = 2**20  # of the images of a microbatch of the classifier's training
ALIKE = "the training images have all the same features"  # why figures are withheld
SAME = 1e-10  # of features' mean square: a variance from rounding alone
LEAST_LEARNED = 2 / 3  # of the errors of always guessing the commonest label, those a classifier avoids; below, it is weak
FIGURES = ("fd", "kid", "precision", "recall", "density", "coverage", "nearer", "copied")
SHARES = ("precision", "nearer", "copied")  # of these, a mean of a value from 0 to 1 of each image


def commonest_of(labels: Tensor) -> float:
    """The share of the commonest label."""
    return float(labels.bincount().max() / len(labels))


def is_weak(accuracy: float, commonest: float) -> bool:
    """Whether a classifier is little better than always guessing the commonest label, of this share."""
    return commonest < 1 and (accuracy - commonest) / (1 - commonest) < LEAST_LEARNED


def convolution(channels: int, features: int) -> list[nn.Module]:
    # Normalized, it reads 92 % of Fashion-MNIST right after the same time, 86 % without.
    return [nn.Conv2d(channels, features, 3, padding=1, bias=False), BatchNorm(features), nn.ReLU()]


class Classifier(nn.Module):
    """A small convolutional classifier, whose last hidden layer is what images are compared in.

    Larger images than LARGEST are reduced to it. An image of 256×256 has 16 times as many pixels, and three convolutions would
    see no more than details of it.
    """

    dimensions, pixels, trace = 64, 2**19, 100.0  # pixels: of the images that are looked at together
    reduced: Tensor | None

    def __init__(self, channels: int, classes: int, size: tuple[int, int]):
        """size: H W of the images."""
        super().__init__()
        self.layers = nn.Sequential(
            *convolution(channels, 32), nn.MaxPool2d(2),
            *convolution(32, 64), nn.MaxPool2d(2),
            *convolution(64, 128), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(128 * 16, self.dimensions), nn.ReLU(),
        )  # fmt: skip
        self.output = nn.Linear(self.dimensions, classes)
        height, width = (max(SMALLEST, round(side * min(1, LARGEST / max(size)))) for side in size)
        self.size = height, width
        # In its state, because figures are told apart by it.
        self.register_buffer("reduced", torch.tensor(self.size) if max(size) > LARGEST else None)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # on CPUs, three tenths less time in training

    def extra_repr(self) -> str:
        return "" if self.reduced is None else f"reduced={self.size}"

    def features(self, images: Tensor) -> Tensor:
        """images uint8 N C H W, enlarged where they are too small to be halved twice; returns N F."""
        if min(images.shape[2:]) < SMALLEST:
            images = F.interpolate(images, SMALLEST)
        images = images.float() / 255
        return self.layers(images if self.reduced is None else F.adaptive_avg_pool2d(images, self.size))

    def forward(self, images: Tensor, labels: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        logits = self.output(self.features(images))
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


def at_once(model: Classifier | Inception | DinoV2, images: Tensor | Stored) -> int:
    """How many images, N C H W, a network looks at together; the memory of that does not grow with their size."""
    return FEW if model.pixels is None else max(1, min(BATCH, model.pixels // math.prod(images.shape[2:])))


@torch.inference_mode()
def logits_of(fabric: Fabric, classifier: Classifier, images: Tensor) -> Tensor:
    """images uint8 N C H W; returns N classes, on the CPU."""
    parts = images.split(at_once(classifier, images))
    return torch.cat([classifier.output(classifier.features(fabric.to_device(part))).cpu() for part in parts])


@dataclass(frozen=True)
class Reference:
    """The training images that others are compared with: how many, and a checksum."""

    images: int
    digest: str


@dataclass(frozen=True)
class Features:
    """What images are compared in."""

    extractor: str
    dimensions: int
    digest: str
    """of the network's weights"""
    reference: Reference
    accuracy: float | None = None
    """share of test images that the classifier reads right, where it is one"""


class OfTraining(Joined):
    """Features of training images by number, … F in float64: on disk, and scaled where they are read."""

    def __init__(self, parts: list[Tensor | Joined], scale: float = 1.0):
        super().__init__(parts)
        self.scale = scale

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        return super().__getitem__(indices).double() * self.scale


class FeatureSpace:
    """The features that images are compared in, and those of the training split.

    Of more than MOST_TRAINING images these are of some, evenly spaced.
    """

    def __init__(
        self,
        model: Classifier | Inception | DinoV2,
        extractor: str,
        train: ImageSet,
        fabric: Fabric,
        cache: Path,
        accuracy: float | None = None,
    ):
        """extractor, accuracy: as of `Features`."""
        self.model, self.fabric, self.scale, self.cache = model.eval(), fabric, 1.0, cache
        self.compared = evenly(len(train), MOST_TRAINING)
        """the numbers of the training images that are compared with, M"""
        self.images = len(train)
        self.train = train if len(self.compared) == len(train) else train.subset(self.compared)
        self.description = Features(
            extractor=extractor,
            dimensions=model.dimensions,
            digest=digest_of_state(model.state_dict()),
            reference=Reference(len(self.train), files.digest_of([content_of(self.train.images)])),
            accuracy=accuracy,
        )
        self.reference = self.of_training()
        spread, square = moments(self.reference)
        self.varies = spread > SAME * square
        if model.trace is not None and self.varies:
            self.scale = self.reference.scale = (model.trace / spread) ** 0.5
        self.distance = FrechetDistance(self.reference)

    def of_training(self, mirror: bool = False) -> OfTraining:
        """Features of the training images, M F, or of their mirror images; made once, and kept on disk."""
        key = f"{self.description.digest}-{self.description.reference.digest}" + ("-mirrored" if mirror else "")
        label = f"features of the {'mirror' if mirror else 'training'} images"
        path = self.cache / f"features-{key}.safetensors"
        made = files.cached(path, key, lambda: {"features": self.unscaled(self.train.images, label, mirror)})
        return OfTraining([made["features"]], self.scale)

    @property
    def fewest(self) -> int:
        """Images that a Fréchet distance needs."""
        return self.model.dimensions + 1

    def features(self, images: Tensor | Stored, label: str) -> Tensor:
        """images uint8 N C H W; returns N F in float64, on the CPU."""
        return self.scaled(self.unscaled(images, label))

    def unscaled(self, images: Tensor | Stored, label: str, mirror: bool = False) -> Tensor:
        """The same in float32, as the network gives them. mirror: of the mirror images, left to right."""
        size = at_once(self.model, images)
        rows = torch.arange(len(images))
        return torch.cat(
            processes.in_batches(lambda some: self.of_batch(in_order(images, some, size), mirror), rows, size, label)
        )

    @torch.inference_mode()
    def of_batch(self, images: Tensor, mirror: bool = False) -> Tensor:
        """The features of uint8 images B C H W, as `unscaled` gives them; B F."""
        parts = [self.fabric.to_device(part) for part in images.split(at_once(self.model, images))]
        return torch.cat([self.model.features(part.flip(-1) if mirror else part).float().cpu() for part in parts])

    def numbers(self, found: Tensor) -> Tensor:
        """The numbers of training images, from their places in `reference`. Mirror images come after, in both."""
        return self.compared[found % len(self.compared)] + self.images * (found // len(self.compared))

    def scaled(self, features: Tensor) -> Tensor:
        return features.double() * self.scale

    def frechet_distance(self, images: Tensor, label: str) -> float | None:
        """The distance from the training images; None when there are too few images for a covariance."""
        return self.distance_of(self.features(images, label))

    def distance_of(self, features: Tensor) -> float | None:
        """The same, of features N F."""
        return None if self.withheld(len(features)) else self.distance(features)

    def error_of(self, features: Tensor) -> float | None:
        """Half of the 95 % interval of `distance_of`, over bootstrap resamples of the images."""
        return None if self.withheld(len(features)) else error(self.distance.under(features, resampled(len(features))))

    @torch.inference_mode()
    def share_read(self, features: Tensor, labels: Tensor) -> float | None:
        """How often the classifier predicts the labels, N, from features N F; None of a weak one, or of another network."""
        if self.description.accuracy is None or is_weak(self.description.accuracy, commonest_of(labels)):
            return None
        assert isinstance(self.model, Classifier)
        logits = self.model.output(self.fabric.to_device((features / self.scale).float()))
        return float((logits.argmax(1).cpu() == labels).float().mean())

    def withheld(self, images: int) -> str | None:
        """Why there is no Fréchet distance of so many images, where there is none."""
        if not self.varies:
            return ALIKE
        images = min(images, len(self.reference))
        if images >= self.fewest:
            return None
        return f"{counted(images, 'image')} for {self.model.dimensions} features: a covariance needs more images than features"


def moments(points: Joined) -> tuple[float, float]:
    """The sum of the variances of all F features of points N F, and the mean of the squared lengths."""
    count, mean, around, square = 0, torch.zeros(()), torch.zeros(()), 0.0
    for block in blocks(len(points), points[:1].shape[1]):
        some = points[block]
        here, new = some.mean(0), len(some)
        # Chan et al. 1983, of two parts of a set
        around = around + (some - here).square().sum(0) + (here - mean).square() * (count * new / (count + new))
        mean, count, square = mean + (here - mean) * (new / (count + new)), count + new, square + float(some.square().sum())
    return float(around.sum()) / max(1, count - 1), square / count


def digest_of_state(tensors: dict[str, Tensor]) -> str:
    """Names tensors by what is in them."""

    def parts() -> Iterator[bytes]:
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            yield tensor.detach().cpu().contiguous().numpy().tobytes()

    return files.digest_of(parts())


class Judge:
    """Figures of samples, as many as there are held-out images, against these and the training images."""

    def __init__(self, space: FeatureSpace, held_out: Tensor, seed: int):
        """held_out: distances of N held-out images to their nearest training images.

        All but the Fréchet distance and these distances are judged by N training images drawn at random: figures of
        neighbours depend on the number of images.
        """
        count = min(len(held_out), len(space.reference))
        drawn = torch.randperm(len(space.reference), generator=torch.Generator().manual_seed(seed))[:count]
        self.space, self.held_out, self.reference = space, held_out, space.reference[drawn]
        self.weights = resampled(len(held_out))
        self.cloud = Cloud.of(self.reference) if count >= ENOUGH and space.varies else None
        self.withheld: dict[str, str] = {}
        if reason := space.withheld(len(held_out)):
            self.withheld["fd"] = reason
        if len(held_out) < 2:
            self.withheld["copied"] = "a single held-out image does not say how near new images lie to the training set"
        if self.cloud is None:
            why = f"{counted(count, 'image')}, of at least {ENOUGH} needed" if space.varies else space.withheld(count)
            self.withheld["kid, precision, recall, density, coverage"] = str(why)

    def under_resamples(self, features: Tensor, distances: Tensor) -> dict[str, Tensor]:
        """The FIGURES that are not withheld, for each weighting of `resampled`, R + 1 each.

        features N F, whose nearest training images are at these distances, N.
        """
        near = {"nearer": nearer(distances, self.held_out)}
        if "copied" not in self.withheld:
            near["copied"] = copied(distances, self.held_out).double()
        values = {name: self.weights @ of_each / len(features) for name, of_each in near.items()}
        if "fd" not in self.withheld:
            values["fd"] = self.space.distance.under(features, self.weights)
        if self.cloud is not None:
            values |= likeness(self.cloud, features, self.weights)
        return values

    def figures(self, values: dict[str, Tensor], distances: Tensor) -> dict[str, Any]:
        """The FIGURES of what `under_resamples` returned for these distances; None where withheld.

        `plus_minus` holds half the 95 % interval of each.
        """
        return {
            **{name: float(values[name][0]) if name in values else None for name in FIGURES},
            "plus_minus": {
                name: error_of_share(values[name], len(distances)) if name in SHARES else error(values[name])
                for name in FIGURES
                if name in values
            },
            "copying_p": copying_p(distances, self.held_out),
            "distance_to_training": float(distances.median()),
        }


def in_parts(config: FitConfig, pixels: int) -> FitConfig:
    """The training of a classifier, in as many microbatches as images of so many pixels ask for."""
    share = config.batch_size // processes.count()
    fitting = [parts for parts in range(1, share + 1) if share % parts == 0 and share // parts * pixels <= PIXELS_TRAINED]
    return replace(config, microbatches=max(config.microbatches, min(fitting, default=share)))


def trained_classifier(fabric: Fabric, config: MetricsConfig, splits: Splits, cache: Path, seed: int) -> tuple[Classifier, float]:
    """A classifier of the data set's labels, trained or loaded from `cache`, and the share of test images that it reads right.

    Of several runs on one data set, the first to need it trains it; the others wait. Its accuracy is said once.
    """
    torch.manual_seed(seed)
    model = Classifier(splits.image_shape[0], len(splits.label_names), splits.image_shape[1:])
    assert splits.train.labels is not None and splits.test.labels is not None
    parts = (splits.train.images, splits.train.labels, splits.validation.images)
    folder = cache / files.digest_of([repr((model, config.classifier, seed)).encode(), *map(content_of, parts)])
    last, label = folder / f"step-{config.classifier.steps:07d}", "second classifier" if seed else "classifier"
    with files.alone(folder, last.is_dir):
        training = in_parts(config.classifier, math.prod(model.size))
        train, held_out = Labelled(splits.train), Labelled(splits.validation)
        fit(fabric, model, train, held_out, training, seed, folder, label, says_skipped=False)

    def on_test_images() -> dict[str, Tensor]:
        found = evaluate(fabric, model, Labelled(splits.test), at_once(model, splits.test.images), 0)["accuracy"]
        say(f"{label}: accuracy {100 * found:.1f} % on {counted(len(splits.test), 'test image')}")
        return {"accuracy": torch.tensor(found, dtype=torch.float64)}

    test = files.digest_of([content_of(splits.test.images), content_of(splits.test.labels)])
    accuracy = files.cached(folder / "accuracy.safetensors", test, on_test_images)["accuracy"]
    return model.eval(), float(accuracy)


def feature_space(fabric: Fabric, config: MetricsConfig, splits: Splits, cache: Path, seed: int = 0) -> FeatureSpace:
    """The features that the config names; those of a network of random weights where there are no labels to classify.

    seed: of a classifier's training, or of random weights. Raises UserError where published weights are not to be had.
    """
    model: Classifier | Inception | DinoV2
    extractor, accuracy = "classifier", None
    if config.extractor in PUBLISHED:
        with fabric.rank_zero_first(local=True):  # which may download them
            model, extractor = published(config.extractor, config.weights)
    elif splits.label_names:
        model, accuracy = trained_classifier(fabric, config, splits, cache, seed)
    else:
        torch.manual_seed(seed)
        model = Classifier(splits.image_shape[0], 2, splits.image_shape[1:])
        extractor = f"random network, seed {seed} (no labels)"
    fabric.to_device(model)
    return FeatureSpace(model, extractor, splits.train, fabric, cache, accuracy)


def choosing_space(fabric: Fabric, config: MetricsConfig, splits: Splits, cache: Path) -> FeatureSpace:
    """The features that settings are chosen by: of another network than the one that reports."""
    return feature_space(fabric, replace(config, extractor="classifier"), splits, cache, seed=1)


def label_log_prob(fabric: Fabric, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """log p(label|image) of a classifier, for the label of each image, N. images uint8 N C H W, labels N."""
    return logits_of(fabric, classifier, images).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def rejection_sampled(confidence: Tensor, labels: Tensor, share: float) -> Tensor:
    """Which images to keep, in order: of each label, the share, rounded up, that a classifier assigns to it most confidently.

    Rejection sampling as in VQ-VAE-2 (Razavi et al. 2019, section 3.3). confidence: what `label_log_prob` gives, N; labels N;
    returns indices.
    """
    kept = []
    for label in labels.unique():
        members = torch.nonzero(labels == label).squeeze(1)
        kept.append(members[confidence[members].topk(math.ceil(share * len(members) - 1e-9)).indices])
    return torch.cat(kept).sort().values
