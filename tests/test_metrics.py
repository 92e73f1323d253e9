"""Precision and recall against cases that are known, and rejection."""

import pytest
import torch
from torch import nn

from pipelines.fit import fabric_for
from pipelines.metrics import kept_best, precision_recall


def points(count: int, at: float, seed: int) -> torch.Tensor:
    return at + torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_precision_and_recall_of_known_cases():
    real = points(500, 0.0, 0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, points(500, 100.0, 1)) == (0.0, 0.0)
    # Half of the samples far away: half the precision, and the rest still covers about as much.
    precision, recall = precision_recall(real, torch.cat([points(250, 0.0, 2), points(250, 100.0, 3)]))
    assert precision == pytest.approx(0.5, abs=0.06) and recall > 0.6
    # One mode of two: all samples are real-like, half of what is real is missed.
    two_modes = torch.cat([real, points(500, 100.0, 4)])
    precision, recall = precision_recall(two_modes, points(1000, 0.0, 5))
    assert precision > 0.8 and recall == pytest.approx(0.5, abs=0.06)


def test_precision_by_hand():
    """Real points 0 … 4 on a line, whose third neighbours are at distance 3, 2, 2, 2, 3."""
    real = torch.arange(5.0, dtype=torch.float64)[:, None]
    generated = torch.tensor([[-2.9], [7.1], [6.9], [2.0], [50.0]], dtype=torch.float64)
    assert precision_recall(real, generated)[0] == pytest.approx(3 / 5)


class Reader(nn.Module):
    """Is sure of label 1 in bright images, of label 0 in dark ones."""

    def features(self, images):
        return images.float().mean((1, 2, 3))[:, None] / 255

    def output(self, features):
        return torch.cat([-features, features], 1)


def test_the_share_kept_is_the_surest_of_each_label():
    brightness = torch.tensor([10, 200, 30, 100, 50, 250, 90, 0])
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    images = brightness.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    fabric = fabric_for("cpu", "float32")
    assert kept_best(fabric, Reader(), images, labels, 0.5).tolist() == [0, 1, 2, 5]
    assert kept_best(fabric, Reader(), images, labels, 1.0).tolist() == list(range(8))
    assert kept_best(fabric, Reader(), images, labels, 0.1).tolist() == [0, 5]
