"""Causal layers, and what every causal backbone offers.

B batch, D width, h×w grid, k kernel size, m = (k+1)/2 the kernel's causal half, N positions, T prefix length.

Convolutions are causal by padding and cropping, never by masking weights: no weight exists that could see the future,
so none is computed, stored or zeroed again. Attention is causal by what it is given: a position's own and earlier keys.
"""

import math
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class State(Protocol):
    """What a backbone keeps between steps, for a batch of rows."""

    def select(self, rows: Tensor) -> None:
        """Row b of the batch goes on as row rows[b] did until now, in place. rows: B numbers of rows."""


class Backbone(Protocol):
    """What every causal backbone offers: position i of the output depends only on inputs before i and on what is known.

    inputs and the result are B D h w. Known are `map`, B D h w or 1 D h w, added at every position and not shifted, and
    `prefix`, B T D, a sequence that every position sees as a whole.
    """

    width: int
    """D"""
    reach: int | None
    """how far a position sees: see PixelCNN.reach; None where it sees every earlier position"""

    def __call__(self, inputs: Tensor, map: Tensor | None = None, prefix: Tensor | None = None) -> Tensor: ...

    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None, prefix: Tensor | None = None) -> State:
        """The state before position 0 of a grid of h rows and w columns, in the dtype of the weights."""

    def step(self, previous: Tensor | None, position: int, state: Any) -> Tensor:
        """Position `position` of the whole-grid result, B D; positions come in raster order.

        previous: the input at position - 1, B D, of any dtype; None at the first. The result may be overwritten by the next step.
        """


def gate(features: Tensor) -> Tensor:
    """tanh(a) · σ(b) over the two halves a, b of the channels (van den Oord et al. 2016b, equation 2).

    tanh(a) is written as 2σ(2a) - 1: on CPUs the sigmoid is several times as fast as tanh.
    """
    a, b = features.chunk(2, dim=1)
    return (2 * torch.sigmoid(2 * a) - 1) * torch.sigmoid(b)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): in training, a share of the numbers becomes 0, and the others grow by 1 / (1 - share).

    On CPUs, torch draws one random number for each of them on one thread: an eighth of the time of a step in training. Here one
    random number of 64 bits decides on four. So the share is rounded to a multiple of 2^-16.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if not self.training or self.share == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.share)
        dropped = min(round(self.share * 2**16), 2**16 - 1)
        draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()] >= dropped - 2**15
        laid_out = kept.to(x.dtype).as_strided(x.shape, torch.empty_like(x, device="meta").stride())  # as x lies in memory
        return x * laid_out * (2**16 / (2**16 - dropped))

    def extra_repr(self) -> str:
        return f"share={self.share}"


def shift_down(x: Tensor) -> Tensor:
    """Row r becomes row r-1; the first row becomes zero."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    """Column c becomes column c-1; the first column becomes zero."""
    return F.pad(x, (1, 0))[..., :-1]


def shift_raster(x: Tensor) -> Tensor:
    """Every position becomes the one before it in raster order; the first becomes zero."""
    before = F.pad(x.movedim(1, -1).flatten(1, 2), (0, 0, 1, -1))  # channels stay last in memory, as convolutions are fastest
    return before.unflatten(1, x.shape[2:]).movedim(-1, 1)


class ChannelNorm(nn.Module):
    """Layer normalization of the features of every position by itself, so that it is causal (Ba et al. 2016)."""

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
    """Causal attention of queries to keys, and what it reads from values; … N d each."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On CPUs the fused kernel is slower in bfloat16 than in float32: forward and backward, on one core, 7 times at 49 positions
    # and 1.6 times at 256. Mixed precision would round the arguments again.
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(q.dtype)


class CausalAttention(nn.Module):
    """Multi-head attention in which a position attends to itself and to what comes before (Vaswani et al. 2017, section 3.2).

    Without biases: the normalization before it has one.
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
