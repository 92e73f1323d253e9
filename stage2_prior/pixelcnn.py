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

import torch
from einops import rearrange
from torch import Tensor, nn

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


@dataclass
class LayerState:
    """What one gated layer keeps between steps, laid out once and written in place, and its weights as matrices.

    The gate is tanh(a)·σ(b) = 2st - t with s = σ(2a) and t = σ(b): with the 2 folded into the weights that make a, one
    sigmoid over both halves gives s and t; the sign is folded into the output weights.
    """

    rows: list[Tensor]  # inputs of the vertical stack in this row and the m-1 above, a ring with zeros around: w+2p B D each
    shifted: list[list[Tensor]]  # views of `rows` as its kernel's k columns see them: w·B D each
    above: Tensor  # the vertical convolution of this row: w·B 2D
    seen: Tensor  # what the vertical stack gives this row of the horizontal stack: w·B 2D
    gates: list[tuple[Tensor, Tensor, Tensor]]  # views of `seen` a column: B 2D, and its halves s and t, B D each
    gated: Tensor  # B D
    recent: Tensor  # inputs of the horizontal stack at this column and the m-1 left of it, a ring: B m·D
    inputs: list[Tensor]  # views of `recent`: B D each
    vertical: list[list[Tensor]]  # m rows, this one first, of k columns: D 2D each
    vertical_bias: Tensor  # 2D
    across: Tensor  # 2D 2D
    across_bias: Tensor  # 2D
    horizontal: list[Tensor]  # for each place of this column in the ring: m·D 2D
    output: Tensor  # D D


class GatedLayer(nn.Module):
    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        if kernel % 2 == 0 or kernel < 3:
            raise ValueError(f"a PixelCNN kernel is odd and at least 3, not {kernel}")
        self.vertical = VerticalConv(width, 2 * width, kernel)
        self.horizontal = HorizontalConv(width, 2 * width, kernel)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.output = nn.Conv2d(width, width, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        above = self.vertical(v)
        seen_above = self.vertical_to_horizontal(above)
        return v + gate(above), h + self.output(self.dropout(gate(self.horizontal(h) + seen_above)))

    def begin(self, batch: int, width: int) -> LayerState:
        """The state before the first row of a grid of `width` columns."""
        vertical, across, horizontal = self.vertical.conv, self.vertical_to_horizontal, self.horizontal.conv
        d, m, k = horizontal.in_channels, *vertical.kernel_size
        new = self.output.weight.new_zeros
        rows = [new(width + k - 1, batch, d) for _ in range(m)]
        seen, recent = new(width * batch, 2 * d), new(batch, m * d)
        twice = torch.cat([new(d) + 2, new(d) + 1])
        # Contiguous, or every product would first copy its weights.
        vertical_weights = (rearrange(vertical.weight, "o d m k -> m k d o") * twice).flip(0).contiguous()
        return LayerState(
            rows=rows,
            shifted=[[row[j : j + width].flatten(0, 1) for j in range(k)] for row in rows],
            above=new(width * batch, 2 * d),
            seen=seen,
            gates=[(column, column[:, :d], column[:, d:]) for column in seen.split(batch)],
            gated=new(batch, d),
            recent=recent,
            inputs=list(recent.split(d, dim=1)),
            vertical=[list(row) for row in vertical_weights],
            vertical_bias=vertical.bias * twice,  # type: ignore[operator]
            across=rearrange(across.weight, "o i 1 1 -> i o") * twice / twice[:, None],
            across_bias=(across.bias + horizontal.bias) * twice,  # type: ignore[operator]
            horizontal=[
                (rearrange(horizontal.weight, "o d 1 m -> m d o") * twice).roll(place + 1, 0).flatten(0, 1) for place in range(m)
            ],
            output=-rearrange(self.output.weight, "o i 1 1 -> i o"),
        )

    def step_row(self, v: Tensor, row: int, state: LayerState) -> Tensor:
        """The vertical stack for the next row, w B D to w B D; puts down what it gives to the horizontal stack."""
        m, margin = len(state.rows), (len(state.vertical[0]) - 1) // 2
        state.recent.zero_()
        state.rows[row % m][margin : margin + len(v)] = v
        above = state.above.copy_(state.vertical_bias)
        for up, weights in enumerate(state.vertical):
            for inputs, weight in zip(state.shifted[(row - up) % m], weights):
                above.addmm_(inputs, weight)
        torch.addmm(state.across_bias, above, state.across, out=state.seen)
        s, t = above.sigmoid_().unflatten(0, v.shape[:2]).chunk(2, dim=-1)
        return torch.addcmul(v, s, t, value=2).sub_(t)

    def step(self, column: int, state: LayerState, out: Tensor) -> None:
        """The horizontal stack at one position, from its place in the ring to `out`, B D."""
        both, s, t = state.gates[column]
        place = column % len(state.inputs)
        both.addmm_(state.recent, state.horizontal[place]).sigmoid_()
        torch.addcmul(t, s, t, value=-2, out=state.gated)
        torch.addmm(state.inputs[place], state.gated, state.output, out=out)


@dataclass
class Stacks:
    """Everything that a sequence of gated layers keeps between steps."""

    map: list[Tensor]  # for each row, w B D or w 1 D
    row: Tensor  # the inputs of this row, filled from left to right: w B D
    columns: list[Tensor]  # views of `row`: B D each
    here: list[Tensor]  # the map at the columns of this row: B D or 1 D each
    layers: list[LayerState]
    features: Tensor  # the result of the last step: B D

    def places(self, column: int) -> list[Tensor]:
        """Where the horizontal stack's input to each layer belongs at a column, and where its result: B D each."""
        place = column % len(self.layers[0].inputs)
        return [*(layer.inputs[place] for layer in self.layers), self.features]


def begin_stacks(layers: list[GatedLayer], batch: int, grid: tuple[int, int], map: Tensor | None) -> Stacks:
    """The state before position 0 of a grid of h rows and w columns; map B D h w or 1 D h w, or with axes of 1."""
    new, d = layers[0].output.weight.new_zeros, layers[0].output.in_channels
    row = new(grid[1], batch, d)
    map = new(1, d, *grid) if map is None else map.to(row.dtype).expand(-1, -1, *grid)
    return Stacks(
        map=list(rearrange(map, "b d h w -> h w b d").contiguous()),
        row=row,
        columns=list(row),
        here=[],
        layers=[layer.begin(batch, grid[1]) for layer in layers],
        features=new(batch, d),
    )


def enter(layers: list[GatedLayer], previous: Tensor | None, position: int, state: Stacks) -> int:
    """Takes the input at position - 1 in; at the start of a row, runs the vertical stack for it. Returns the column."""
    r, c = divmod(position, len(state.columns))
    if previous is not None:
        state.columns[c - 1].copy_(previous)
    if c == 0:
        # state.row holds the row above: zeros before the first.
        v = state.row + state.map[r]
        for layer, layer_state in zip(layers, state.layers):
            v = layer.step_row(v, r, layer_state)
        state.here = list(state.map[r])
    return c


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
        return begin_stacks(self.layers, batch, grid, pooled(map, prefix))

    @torch.no_grad()
    def step(self, previous: Tensor | None, position: int, state: Stacks) -> Tensor:
        """Position `position` of `forward`, B D, overwritten by the next step."""
        column = enter(self.layers, previous, position, state)
        first, *outs = state.places(column)
        if column == 0:
            first.copy_(state.here[0])
        else:
            # The horizontal stack sees the input to the left in this row.
            torch.add(state.columns[column - 1], state.here[column], out=first)
        for layer, layer_state, out in zip(self.layers, state.layers, outs):
            layer.step(column, layer_state, out)
        return state.features
