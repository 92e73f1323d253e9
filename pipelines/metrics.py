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


class FeatureSpace:
    """The features that images are compared in, and the training split's statistics in them."""

    def __init__(self, model: Classifier, description: dict[str, Any], train: ImageSet, fabric: Fabric):
        self.model, self.description, self.fabric = model.eval(), description, fabric
        self.scale = 1.0
        features = self.features(train.images, "features of the training images")
        self.scale = float((TRACE / features.var(0).sum()).sqrt())
        self.reference = features * self.scale

    @torch.inference_mode()
    def features(self, images: Tensor, label: str) -> Tensor:
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
        batches = (self.model.features(self.fabric.to_device(batch)) for batch in images.split(BATCH))
        return torch.cat([self.model.output(features).argmax(1).cpu() for features in batches])

    def frechet_distance(self, images: Tensor, label: str) -> float | None:
        """The distance from the training images; None when there are too few images for a covariance."""
        if min(len(images), len(self.reference)) <= FEATURES:
            return None
        metric = FrechetInceptionDistance(feature=GivenFeatures()).set_dtype(torch.float64)
        metric.update(self.reference, real=True)
        metric.update(self.features(images, label), real=False)
        return float(metric.compute())


class GivenFeatures(nn.Module):
    """Tells torchmetrics that features are given, not images."""

    num_features = FEATURES

    def forward(self, features: Tensor) -> Tensor:
        return features


def feature_space(fabric: Fabric, config: MetricsConfig, splits: Splits, cache: Path) -> FeatureSpace:
    """Train the classifier, or load it from `cache`; without labels, a network of random weights with a fixed seed."""
    torch.manual_seed(0)
    channels = splits.image_shape[0]
    if not splits.label_names:
        model = Classifier(channels, 2)
        fabric.to_device(model)
        return FeatureSpace(model, {"extractor": "random network, seed 0 (no labels)"}, splits.train, fabric)
    model = Classifier(channels, len(splits.label_names))
    key = hashlib.sha256(repr(config.classifier).encode())
    for part in (splits.train.images, splits.train.labels, splits.validation.images):
        assert part is not None
        key.update(part.numpy().tobytes())
    folder = cache / key.hexdigest()[:16]
    chosen = fit(fabric, model, Labelled(splits.train), Labelled(splits.validation), config.classifier, 0, folder, "classifier")
    accuracy = evaluate(fabric, model, Labelled(splits.test), BATCH, 0)["accuracy"]
    say(f"classifier: accuracy {100 * accuracy:.1f} % on {len(splits.test)} test images")
    description = {"extractor": "classifier", "accuracy": accuracy, "digest": chosen.digest()[:16]}
    return FeatureSpace(model, description, splits.train, fabric)
