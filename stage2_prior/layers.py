"""Causal layers, and the contract of a causal backbone.

B batch, D width, h×w grid, k kernel size, m = (k+1)/2 the kernel's causal half, N positions, T prefix length.

Convolutions are causal by padding and cropped kernels, not by masks: there are no weights for later positions. Attention is
causal because a position reads only its own key and earlier ones.
"""

import math
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class State(Protocol):
    """What a backbone keeps between the steps of sampling, for a batch of B rows."""

    def select(self, rows: Tensor) -> None:
        """Replace row b of the batch by row rows[b], in place. rows: B row numbers."""


class Backbone(Protocol):
    """A causal backbone: position i of the result depends only on inputs before i, and on the conditions.

    Inputs and the result are B D h w. The conditions are `map`, B D h w or 1 D h w, which is added to the features of its own
    position, and `prefix`, B T D, a sequence that every position sees as a whole.
    """

    width: int
    """D"""
    needs_positions: bool
    """whether only `map` tells the backbone which inputs are near, as for attention without convolutions"""

    def __call__(self, inputs: Tensor, map: Tensor | None = None, prefix: Tensor | None = None) -> Tensor: ...

    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None, prefix: Tensor | None = None) -> State:
        """The state before position 0. grid: h w. The dtype is that of the weights."""

    def step(self, previous: Tensor | None, position: int, state: Any) -> Tensor:
        """The result at one position, B D, equal to that of a call on the whole grid. Positions must come in raster order.

        previous: the input at position - 1, B D, of any dtype; None at position 0. The next step may overwrite the result.
        """


def gate(features: Tensor) -> Tensor:
    """tanh(a) · σ(b) over the two halves a, b of the channels (van den Oord et al. 2016b, equation 2).

    tanh(a) is written as 2σ(2a) - 1: on CPUs the sigmoid is several times as fast as tanh.
    """
    a, b = features.chunk(2, dim=1)
    return (2 * torch.sigmoid(2 * a) - 1) * torch.sigmoid(b)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): in training, a share of the numbers becomes 0, and the others grow by 1 / (1 - share).

    On CPUs, torch draws a random number for each of them on a single thread, which takes an eighth of a training step, and a
    quarter of a compiled one. Here a random number of 64 bits decides on four of them. So the share is rounded to a multiple of
    2^-16.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if not self.training or self.share == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.share)
        dropped = min(round(self.share * 2**16), 2**16 - 1)
        draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()] >= dropped - 2**15
        return x * in_layout_of(x, kept).to(x.dtype) * (2**16 / (2**16 - dropped))

    def extra_repr(self) -> str:
        return f"share={self.share}"


def in_layout_of(x: Tensor, values: Tensor) -> Tensor:
    """As many values as x has, in the order of its memory, as a tensor of its shape.

    For convolutions by views: torch.compile joins these with what follows, but not as_strided.
    """
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return values.unflatten(0, (len(x), *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return values.as_strided(x.shape, torch.empty_like(x, device="meta").stride())


def shift_down(x: Tensor) -> Tensor:
    """Row r becomes row r-1; the first row becomes zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    """Column c becomes column c-1; the first column becomes zero."""
    return F.pad(x, (1, 0))[..., :-1]


def shift_raster(x: Tensor) -> Tensor:
    """Position i in raster order becomes position i-1; the first becomes zero."""
    before = F.pad(x.movedim(1, -1).flatten(1, 2), (0, 0, 1, -1))  # channels last in memory, where convolutions are fastest
    return before.unflatten(1, x.shape[2:]).movedim(-1, 1)


class ChannelNorm(nn.Module):
    """Layer normalization over the features of each position by itself, which is causal (Ba et al. 2016)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """B D h w to B D h w."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)

    def step_weights(self) -> Tensor:
        """Scale and shift, 2 D."""
        return torch.stack([self.norm.weight, self.norm.bias])


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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal scaled dot-product attention; queries, keys, values and the result … N d each."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On CPUs the fused kernel is slower in bfloat16 than in float32: on one core, forward and backward take 7 times as long at 49
    # positions, and 1.6 times at 256. Without autocast off, mixed precision would round the arguments again.
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(q.dtype)


class CausalAttention(nn.Module):
    """Multi-head attention of a position to itself and to all before it (Vaswani et al. 2017, section 3.2).

    It has no biases, because the normalization before it has one. Raises ValueError where the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """B N D to B N D; position i depends on positions 0 … i."""
        qkv = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        return self.output(rearrange(attend(*qkv), "b heads n d -> b n (heads d)"))

    def step_weights(self) -> tuple[Tensor, Tensor]:
        """`qkv` and `output` of BlockWeights."""
        new, width = self.output.weight.new_full, self.output.in_features
        scale = torch.cat([new((width,), (width // self.heads) ** -0.5), new((2 * width,), 1)])
        return self.qkv.weight.T * scale, self.output.weight.T
