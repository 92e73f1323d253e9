"""Gated PixelCNN (van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders", section 2).

B batch, D width, h×w grid, k kernel size, m = (k+1)/2 the kernel's causal half, p = (k-1)/2 its margin.

Two stacks of gated convolutions run side by side. The *vertical* stack at row r has seen every column of the rows
above r; the *horizontal* stack at (r, c) has seen the columns left of c in row r, and is fed the vertical stack at
(r, c). Together they see everything before (r, c) in raster order, with no blind spot.

                           ┌───────── residual ────────┐
                 vertical  v ──▶ crop k×k conv ──┬──▶ gate ──+──▶ v'
                                                 ▼ 1×1
               horizontal  h ──▶ crop 1×k conv ──+──▶ gate ──▶ 1×1 ──+──▶ h'
                           └───────────────── residual ──────────────┘

Where we deviate: the vertical stack is residual too, without which its signal fades with depth; the inputs are shifted
once, before the first layer, so every layer is the same and none needs a mask; dropout after the gate; conditions arrive
as one map added to both stacks' inputs instead of in every gate.

To sample, `step` runs the vertical stack once a row, for all its columns, and the horizontal stack once a position:
the arithmetic of one `forward`. What it keeps lies position by position, w B D, so that everything is a matrix product.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.fused import fused_steps
from stage2_prior.layers import HorizontalConv, VerticalConv, gate, shift_down, shift_right


@dataclass(frozen=True)
class PixelCNNConfig:
    """Gated PixelCNN."""

    width: int = 64
    """feature maps in each stack"""
    layers: int = 8
    """gated layers"""
    kernel: int = 3
    """kernel size, odd"""
    dropout: float = 0.0
    """share of the gated features dropped in training"""

    def build(self) -> "PixelCNN":
        return PixelCNN(self)


class StepWeights(NamedTuple):
    """The weights of a gated layer as matrices, of all layers with an axis before.

    The gate is tanh(a)·σ(b) = 2st - t with s = σ(2a) and t = σ(b): here the 2 is folded into the weights that make a, and the
    sign into the output weights.
    """

    vertical: Tensor  # the kernel's m rows, the last of which is this one, of k columns: m k·D 2D
    vertical_bias: Tensor  # 2D
    across: Tensor  # from the vertical stack to the horizontal: 2D 2D
    across_bias: Tensor  # 2D
    horizontal: Tensor  # the kernel's m columns, the last of which is this one: m·D 2D
    output: Tensor  # D D


class GatedLayer(nn.Module):
    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        if kernel % 2 == 0 or kernel < 3:
            raise ValueError(f"a PixelCNN kernel is odd and at least 3, not {kernel}")
        self.kernel = (kernel + 1) // 2, kernel
        self.vertical = VerticalConv(width, 2 * width, kernel)
        self.horizontal = HorizontalConv(width, 2 * width, kernel)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.output = nn.Conv2d(width, width, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(v)
        seen_above = self.vertical_to_horizontal(above)
        return v + gate(above), h + self.output(self.dropout(gate(self.horizontal(h) + seen_above)))

    def step_weights(self) -> StepWeights:
        vertical, across, horizontal = self.vertical.conv, self.vertical_to_horizontal, self.horizontal.conv
        ones = self.output.weight.new_ones(self.output.in_channels)
        twice = torch.cat([2 * ones, ones])
        return StepWeights(
            vertical=rearrange(vertical.weight, "o d m k -> m (k d) o") * twice,
            vertical_bias=vertical.bias * twice,  # type: ignore[operator]
            across=rearrange(across.weight, "o i 1 1 -> i o") * twice / twice[:, None],
            across_bias=(across.bias + horizontal.bias) * twice,  # type: ignore[operator]
            horizontal=rearrange(horizontal.weight, "o d 1 m -> (m d) o") * twice,
            output=-rearrange(self.output.weight, "o i 1 1 -> i o"),
        )


class Stacks:
    """A sequence of L gated layers, position by position: everything that they keep between steps.

    map: B D h w or 1 D h w, or with axes of 1.
    """

    def __init__(self, layers: list[GatedLayer], batch: int, grid: tuple[int, int], map: Tensor | None):
        new, (m, k), d, (_, width) = layers[0].output.weight.new_zeros, layers[0].kernel, layers[0].output.in_channels, grid
        self.weights = StepWeights(*(torch.stack(kind) for kind in zip(*(layer.step_weights() for layer in layers))))
        self.row = new(width, batch, d)  # the inputs of this row, filled from left to right
        map = new(1, d, *grid) if map is None else map.to(self.row.dtype).expand(-1, -1, *grid)
        self.map = list(rearrange(map, "b d h w -> h w b d").contiguous())  # for each row, w B D or w 1 D
        self.here: list[Tensor] = []  # the map at the columns of this row: B D or 1 D each
        # Inputs of the vertical stack's layers in this row and the m-1 above, a ring, with zeros left and right of the grid.
        self.rows = new(len(layers), m, width + k - 1, batch, d)
        # What the vertical stack gives this row, and inputs of the horizontal stack's layers in this row, with zeros left of the
        # grid; a layer's outputs are the next one's inputs, so there is one more of these.
        self.seen = new(len(layers), width, batch, 2 * d)
        self.inputs = new(len(layers) + 1, batch, m - 1 + width, d)
        # Views, made once: of each column, and of the columns that its kernel reaches.
        self.columns, self.places = list(self.row), list(self.inputs[:, :, m - 1 :].unbind(2))
        self.reached = self.inputs.flatten(2).unfold(2, m * d, d).unbind(2)
        self.margin = k // 2
        self.fused = fused_steps(self)
        if self.fused is None:
            self.above, self.gated = new(width * batch, 2 * d), new(batch, d)
            # The kernel's rows in the order of the ring, for each place of this row in it.
            self.vertical = [self.weights.vertical.roll(place + 1, 1).flatten(1, 2) for place in range(m)]

    def enter(self, previous: Tensor | None, position: int) -> int:
        """Takes the input at position - 1 in; at the start of a row, runs the vertical stack for it. Returns the column."""
        r, c = divmod(position, len(self.columns))
        if previous is not None:
            self.columns[c - 1].copy_(previous)
        if c == 0:
            place = r % self.rows.shape[1]
            # self.row holds the row above: zeros before the first.
            torch.add(self.row, self.map[r], out=self.within(self.rows[0, place]))
            (self.step_row if self.fused is None else self.fused.row)(place)
            self.here = list(self.map[r])
        return c

    def within(self, row: Tensor) -> Tensor:
        """A row of the ring without its zeros, w B D."""
        return row[self.margin : self.margin + len(self.row)]

    def step_row(self, place: int) -> None:
        """The vertical stack for a row, whose input is at its place in the ring."""
        (width, batch, _), k = self.row.shape, 2 * self.margin + 1
        for layer, rows in enumerate(self.rows):
            patches = rearrange(rows.unfold(1, k, 1), "m w b d k -> (w b) (m k d)")
            above = torch.addmm(self.weights.vertical_bias[layer], patches, self.vertical[place][layer], out=self.above)
            seen = self.seen[layer].flatten(0, 1)
            torch.addmm(self.weights.across_bias[layer], above, self.weights.across[layer], out=seen)
            if layer + 1 < len(self.rows):
                s, t = above.sigmoid_().view(width, batch, -1).chunk(2, dim=-1)
                next_row = self.within(self.rows[layer + 1, place])
                torch.addcmul(self.within(rows[place]), s, t, value=2, out=next_row).sub_(t)

    def step(self, column: int, first: int = 0, last: int | None = None) -> Tensor:
        """The horizontal stack at one position, from the inputs of layer `first` to those of layer `last`, the result: B D."""
        last = len(self.rows) if last is None else last
        places = self.places[column]
        if self.fused is not None:
            self.fused.step(column, first, last)
            return places[last]
        for layer in range(first, last):
            both = self.seen[layer, column]
            s, t = both.addmm_(self.reached[column][layer], self.weights.horizontal[layer]).sigmoid_().chunk(2, dim=1)
            torch.addcmul(t, s, t, value=-2, out=self.gated)
            torch.addmm(places[layer], self.gated, self.weights.output[layer], out=places[layer + 1])
        return places[last]


def pooled(map: Tensor | None, prefix: Tensor | None) -> Tensor | None:
    """The map with the mean of the prefix added everywhere, for a backbone without attention."""
    if prefix is None:
        return map
    mean = rearrange(prefix.mean(1), "b d -> b d 1 1")
    return mean if map is None else map + mean


class PixelCNN(nn.Module):
    layers: list[GatedLayer]

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        self.width = config.width
        layers = (GatedLayer(config.width, config.kernel, config.dropout) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.reach: int | None = len(self.layers) * (config.kernel // 2)
        """What a position sees: reach+1 positions to its left, and reach+1 rows above, reach columns to either side."""

    def forward(self, inputs: Tensor, map: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """inputs and the result B D h w, map B D h w or 1 D h w, prefix B T D; see Backbone."""
        map = pooled(map, prefix)
        v, h = shift_down(inputs), shift_right(inputs)
        if map is not None:
            v, h = v + map, h + map
        for layer in self.layers:
            v, h = layer(v, h)
        return h

    @torch.no_grad()
    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None, prefix: Tensor | None = None) -> Stacks:
        return Stacks(self.layers, batch, grid, pooled(map, prefix))

    @torch.no_grad()
    def step(self, previous: Tensor | None, position: int, state: Stacks) -> Tensor:
        """Position `position` of `forward`, B D, overwritten by the next step."""
        column = state.enter(previous, position)
        if column == 0:
            state.places[0][0].copy_(state.here[0])
        else:
            # The horizontal stack sees the input to the left in this row.
            torch.add(state.columns[column - 1], state.here[column], out=state.places[column][0])
        return state.step(column)
