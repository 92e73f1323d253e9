"""Sample quality: the Fréchet distance in the features of a small classifier of the data set's own labels.

N images, F features, C colour channels, H×W pixels.

Features are scaled so that the trace of the training images' covariance is 100: a figure reads like a percentage of the
data's own spread. The reference is the training split.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from pipelines.config import MetricsConfig
from pipelines.console import Progress, say
from pipelines.data import ImageSet, Labelled, Splits
from pipelines.fit import evaluate, fit
from pipelines.stored import Stored, content_of

FEATURES = 64
TRACE = 100.0
BATCH = 500


class Classifier(nn.Module):
    """A small convolutional classifier, whose last hidden layer is what the Fréchet distance is measured in."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Dropout(0.3), nn.Linear(128 * 16, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.output = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """images uint8 N C H W; returns N F."""
        return self.layers(images.float() / 255)

    def forward(self, images: Tensor, labels: Tensor, step: int = 0) -> dict[str, Tensor]:
        logits = self.output(self.features(images))
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


def logits_of(fabric: Fabric, classifier: Classifier, images: Tensor) -> Tensor:
    """images uint8 N C H W; returns N classes, on the CPU."""
    return torch.cat([classifier.output(classifier.features(fabric.to_device(b))).cpu() for b in images.split(BATCH)])


class FeatureSpace:
    """The features that images are compared in, and the training split's statistics in them."""

    def __init__(self, model: Classifier, description: dict[str, Any], train: ImageSet, fabric: Fabric):
        self.model, self.description, self.fabric = model.eval(), description, fabric
        self.scale = 1.0
        features = self.features(train.images, "features of the training images")
        self.scale = float((TRACE / features.var(0).sum()).sqrt())
        self.reference = features * self.scale

    @torch.inference_mode()
    def features(self, images: Tensor | Stored, label: str) -> Tensor:
        """images uint8 N C H W; returns N F in float64, on the CPU."""
        rows = []
        with Progress(label, len(images), "images") as progress:
            for batch in images.split(BATCH):
                rows.append(self.model.features(self.fabric.to_device(batch)).double().cpu())
                progress.update(len(batch))
        return torch.cat(rows) * self.scale

    @torch.inference_mode()
    def read_labels(self, images: Tensor) -> Tensor:
        """The classifier's label of each image, N on the CPU."""
        return logits_of(self.fabric, self.model, images).argmax(1)

    def frechet_distance(self, images: Tensor, label: str) -> float | None:
        """The distance from the training images; None when there are too few images for a covariance."""
        return self.distance_of(self.features(images, label))

    def distance_of(self, features: Tensor) -> float | None:
        """The same, of features N F."""
        if min(len(features), len(self.reference)) <= FEATURES:
            return None
        metric = FrechetInceptionDistance(feature=GivenFeatures()).set_dtype(torch.float64)
        metric.update(self.reference, real=True)
        metric.update(features, real=False)
        return float(metric.compute())


class GivenFeatures(nn.Module):
    """Tells torchmetrics that features are given, not images."""

    num_features = FEATURES

    def forward(self, features: Tensor) -> Tensor:
        return features


def trained_classifier(
    fabric: Fabric, config: MetricsConfig, splits: Splits, cache: Path, seed: int
) -> tuple[Classifier, dict[str, Any]]:
    """A classifier of the data set's labels, trained or loaded from `cache`, and its description."""
    torch.manual_seed(seed)
    model = Classifier(splits.image_shape[0], len(splits.label_names))
    key = hashlib.sha256(repr((config.classifier, seed)).encode())
    for part in (splits.train.images, splits.train.labels, splits.validation.images):
        assert part is not None
        key.update(content_of(part))
    folder = cache / key.hexdigest()[:16]
    chosen = fit(
        fabric, model, Labelled(splits.train), Labelled(splits.validation), config.classifier, seed, folder, "classifier"
    )
    accuracy = evaluate(fabric, model, Labelled(splits.test), BATCH, 0)["accuracy"]
    say(f"classifier: accuracy {100 * accuracy:.1f} % on {len(splits.test)} test images")
    return model.eval(), {"extractor": "classifier", "accuracy": accuracy, "digest": chosen.digest()[:16]}


def feature_space(fabric: Fabric, config: MetricsConfig, splits: Splits, cache: Path) -> FeatureSpace:
    """The features of a classifier; without labels, those of a network of random weights with a fixed seed."""
    if splits.label_names:
        model, description = trained_classifier(fabric, config, splits, cache, seed=0)
    else:
        torch.manual_seed(0)
        model, description = Classifier(splits.image_shape[0], 2), {"extractor": "random network, seed 0 (no labels)"}
        fabric.to_device(model)
    return FeatureSpace(model, description, splits.train, fabric)


@torch.inference_mode()
def kept_best(fabric: Fabric, classifier: Classifier, images: Tensor, labels: Tensor, share: float) -> Tensor:
    """Which images to keep, in order: of each label, the share in which the classifier is surest to read that label.

    Rejection sampling as in VQ-VAE-2 (Razavi et al. 2019, section 3.4). images uint8 N C H W, labels N; returns indices.
    """
    surety = logits_of(fabric, classifier, images).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    kept = []
    for label in labels.unique():
        members = torch.nonzero(labels == label).squeeze(1)
        kept.append(members[surety[members].topk(max(1, round(share * len(members)))).indices])
    return torch.cat(kept).sort().values


NEIGHBOURS = 3


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """The share of generated images among the real ones, and of real among generated ones (Kynkäänniemi et al. 2019).

    An image is among others when it is nearer to one of them than that one's third neighbour is. Features, N F each.
    """

    def share_among(images: Tensor, others: Tensor) -> float:
        # The first of a point's distances to its own set is 0, to itself.
        radius = torch.cdist(others, others).kthvalue(NEIGHBOURS + 1, dim=1).values
        return float((torch.cdist(images, others) <= radius).any(1).double().mean())

    return share_among(generated, real), share_among(real, generated)
