"""Gated PixelCNN (van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders", section 2).

B batch, D width, h×w grid, k kernel size, p = (k-1)/2.

Two stacks of gated convolutions run side by side. The *vertical* stack at row r has seen every column of the rows
above r; the *horizontal* stack at (r, c) has seen the columns left of c in row r, and is fed the vertical stack at
(r, c). Together they see everything before (r, c) in raster order, with no blind spot.

                 vertical  v ──▶ crop k×k conv ──┬──▶ gate ──▶ v'
                                                 ▼ 1×1
               horizontal  h ──▶ crop 1×k conv ──+──▶ gate ──▶ 1×1 ──+──▶ h'
                           └───────────────── residual ──────────────┘

Where we deviate: the inputs are shifted once, before the first layer, so every layer is the same and none needs a
mask; dropout after the gate; conditions arrive as one map added to both stacks' inputs instead of in every gate.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stage2_prior.layers import HorizontalConv, VerticalConv, gate, shift_down, shift_right


class Backbone(Protocol):
    """What every causal backbone offers: position i of the output depends only on inputs before i, and on the map."""

    def __call__(self, inputs: Tensor, map: Tensor | None = None) -> Tensor: ...

    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None) -> Any: ...

    def step(self, previous: Tensor | None, position: int, state: Any) -> Tensor: ...


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


class GatedLayer(nn.Module):
    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        self.vertical = VerticalConv(width, 2 * width, kernel)
        self.horizontal = HorizontalConv(width, 2 * width, kernel)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.output = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        v = self.vertical(v)
        seen_above = self.vertical_to_horizontal(v)
        return gate(v), h + self.output(self.dropout(gate(self.horizontal(h) + seen_above)))

    def step_row(self, v: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical stack for one row, B D w; returns its output and what it adds to the horizontal stack."""
        v = self.vertical.step(v, cache)
        return gate(v), self.vertical_to_horizontal(v[:, :, None]).squeeze(2)

    def step(self, h: Tensor, seen_above: Tensor, cache: Tensor) -> Tensor:
        """The horizontal stack for one position: h B D, seen_above B 2D."""
        gated = gate(self.horizontal.step(h, cache) + seen_above)
        return h + nn.functional.linear(gated, self.output.weight.flatten(1), self.output.bias)


@dataclass
class State:
    """Everything `step` keeps: caches of what the kernels reach, and the current and the previous row."""

    map: Tensor | None  # B D h w
    row: Tensor  # B D w, the inputs of the current row, filled from left to right
    vertical: list[Tensor]  # a cache a layer
    horizontal: list[Tensor]
    seen_above: list[Tensor]  # B 2D w, what each vertical layer adds to the current row of the horizontal stack


class PixelCNN(nn.Module):
    layers: list[GatedLayer]

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        if config.kernel % 2 == 0 or config.kernel < 3:
            raise ValueError(f"a PixelCNN kernel is odd and at least 3, not {config.kernel}")
        self.width = config.width
        layers = (GatedLayer(config.width, config.kernel, config.dropout) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.reach = len(self.layers) * (config.kernel // 2)
        """What a position sees: reach+1 positions to its left, and reach+1 rows above, reach columns to either side."""

    def forward(self, inputs: Tensor, map: Tensor | None = None) -> Tensor:
        """inputs, map and the result B D h w; position i depends on inputs before i in raster order, and on the map."""
        v, h = shift_down(inputs), shift_right(inputs)
        if map is not None:
            v, h = v + map, h + map
        for layer in self.layers:
            v, h = layer(v, h)
        return h

    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None) -> State:
        """The state before position 0 of a grid of h rows and w columns."""
        width = grid[1]
        return State(
            map=map,
            row=self.layers[0].output.weight.new_zeros(batch, self.width, width),
            vertical=[layer.vertical.begin(batch, width) for layer in self.layers],
            horizontal=[layer.horizontal.begin(batch) for layer in self.layers],
            seen_above=[],
        )

    def step(self, previous: Tensor | None, position: int, state: State) -> Tensor:
        """Exactly position `position` of `forward`, B D; previous: the input at position - 1, B D (None at the first)."""
        width = state.row.shape[-1]
        r, c = divmod(position, width)
        if previous is not None:
            state.row[:, :, (position - 1) % width] = previous
        if c == 0:
            self.step_row(r, state)
        h = previous if previous is not None and c > 0 else torch.zeros_like(state.row[:, :, 0])
        if state.map is not None:
            h = h + state.map[:, :, r, c]
        for layer, cache, seen_above in zip(self.layers, state.horizontal, state.seen_above):
            h = layer.step(h, seen_above[:, :, c], cache)
        return h

    def step_row(self, r: int, state: State) -> None:
        """Run the vertical stack for row r, once a row; state.row holds row r-1 (zeros before the first)."""
        v = state.row if state.map is None else state.row + state.map[:, :, r]
        state.seen_above = []
        for layer, vertical, horizontal in zip(self.layers, state.vertical, state.horizontal):
            v, seen_above = layer.step_row(v, vertical)
            state.seen_above.append(seen_above)
            horizontal.zero_()


BackboneConfig = PixelCNNConfig
