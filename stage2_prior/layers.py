"""Causal layers, and what every causal backbone offers.

B batch, D width, h×w grid, k kernel size, m = (k+1)/2 the kernel's causal half.

Causality is built by padding and cropping, never by masking weights: no weight exists that could see the future, so
none is computed, stored or zeroed again.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Backbone(Protocol):
    """What every causal backbone offers: position i of the output depends only on inputs before i, and on the map."""

    def __call__(self, inputs: Tensor, map: Tensor | None = None, prefix: Tensor | None = None) -> Tensor: ...

    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None, prefix: Tensor | None = None) -> Any: ...

    def step(self, previous: Tensor | None, position: int, state: Any) -> Tensor: ...


def gate(features: Tensor, dim: int = 1) -> Tensor:
    """tanh(a) · σ(b) over the two halves a, b of the channels (van den Oord et al. 2016b, equation 2).

    tanh(a) is written as 2σ(2a) - 1: on CPUs the sigmoid is several times as fast as tanh.
    """
    a, b = features.chunk(2, dim=dim)
    return (2 * torch.sigmoid(2 * a) - 1) * torch.sigmoid(b)


def shift_down(x: Tensor) -> Tensor:
    """Row r becomes row r-1; the first row becomes zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    """Column c becomes column c-1; the first column becomes zero."""
    return F.pad(x, (1, 0))[..., :-1]


class VerticalConv(nn.Module):
    """A k×k convolution cropped to the m rows at and above its output."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.rows, self.margin = (kernel + 1) // 2, kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, (self.rows, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """B D h w to B D' h w; row r depends on rows r-m+1 … r."""
        return self.conv(F.pad(x, (self.margin, self.margin, self.rows - 1, 0)))


class HorizontalConv(nn.Module):
    """A 1×k convolution cropped to the m columns at and left of its output."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.columns = (kernel + 1) // 2
        self.conv = nn.Conv2d(inputs, outputs, (1, self.columns))

    def forward(self, x: Tensor) -> Tensor:
        """B D h w to B D' h w; column c depends on columns c-m+1 … c."""
        return self.conv(F.pad(x, (self.columns - 1, 0)))
