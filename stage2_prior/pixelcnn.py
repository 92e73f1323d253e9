"""Gated PixelCNN (van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders", section 2).

B batch, D width, h×w grid, k kernel size, p = (k-1)/2.

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
    """What one gated layer keeps between steps, all of it laid out once and written in place.

    The gate is tanh(a)·σ(b) = (2σ(2a) - 1)·σ(b). With 2 folded into the weights that make a, one sigmoid over both halves
    leaves s and t, and with -1 folded into the output weights, [s·t, t] times the matrix [2W; -W] is what is added to h.
    """

    rows: Tensor  # the vertical stack's cache: B D m w+2p
    gates: Tensor  # what the vertical stack adds to this row of the horizontal stack, then its gates: w B 2D
    halves: list[tuple[Tensor, Tensor, Tensor]]  # for each column, views of `gates`: B 2D, and its halves, B D each
    history: Tensor  # inputs of the horizontal stack in this row, m-1 zeros first: B (m-1+w)·D
    windows: list[Tensor]  # for each column, the view of `history` that its kernel reaches: B m·D
    inputs: list[Tensor]  # for each column, the view of `history` with its own input: B D
    horizontal: Tensor  # m·D 2D
    bias: Tensor  # 2D
    output: Tensor  # 2D D


class GatedLayer(nn.Module):
    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        self.width = width
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
        d, m = self.width, self.horizontal.columns
        horizontal = rearrange(self.horizontal.conv.weight.detach(), "o d 1 m -> (m d) o").contiguous()
        horizontal[:, :d] *= 2
        output = self.output.weight.detach().flatten(1).T
        history, gates = output.new_zeros(batch, (m - 1 + width) * d), output.new_empty(width, batch, 2 * d)
        return LayerState(
            rows=self.vertical.begin(batch, width),
            gates=gates,
            halves=[(column, column[:, :d], column[:, d:]) for column in gates],
            history=history,
            windows=[history[:, c * d : (c + m) * d] for c in range(width)],
            inputs=[history[:, (c + m - 1) * d : (c + m) * d] for c in range(width)],
            horizontal=horizontal,
            bias=self.horizontal.conv.bias.detach(),  # type: ignore[union-attr]
            output=torch.cat([2 * output, -output]),
        )

    def step_row(self, v: Tensor, state: LayerState) -> Tensor:
        """The vertical stack for the next row, B D w to B D w; puts down what it adds to the horizontal stack."""
        above = self.vertical.step(v, state.rows)
        state.gates.copy_(rearrange(self.vertical_to_horizontal(above[:, :, None]), "b d 1 w -> w b d"))
        state.gates += state.bias
        state.gates[..., : self.width] *= 2
        return v + gate(above)

    def step(self, column: int, state: LayerState, out: Tensor) -> None:
        """The horizontal stack at one position, from state.inputs[column] to `out`, B D."""
        gates, s, t = state.halves[column]
        gates.addmm_(state.windows[column], state.horizontal).sigmoid_()
        s.mul_(t)
        torch.addmm(state.inputs[column], gates, state.output, out=out)


@dataclass
class State:
    """Everything `step` keeps between positions."""

    map: Tensor | None  # B D h w
    row: Tensor  # the inputs of this row, filled from left to right: B D w
    layers: list[LayerState]
    features: Tensor  # the result of the last step: B D


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
        new = self.layers[0].output.weight.detach().new_zeros
        return State(
            map=map,
            row=new(batch, self.width, grid[1]),
            layers=[layer.begin(batch, grid[1]) for layer in self.layers],
            features=new(batch, self.width),
        )

    @torch.no_grad()
    def step(self, previous: Tensor | None, position: int, state: State) -> Tensor:
        """Position `position` of `forward`, B D, overwritten by the next step.

        previous: the input at position - 1, B D; None at the first.
        """
        width = state.row.shape[-1]
        r, c = divmod(position, width)
        if previous is not None:
            state.row[:, :, (position - 1) % width] = previous
        if c == 0:
            # The vertical stack runs once a row. state.row holds the row above: zeros before the first.
            v = state.row if state.map is None else state.row + state.map[:, :, r]
            for layer, layer_state in zip(self.layers, state.layers):
                v = layer.step_row(v, layer_state)
        # The horizontal stack sees the input to the left in this row.
        first = state.layers[0].inputs[c]
        first.zero_() if previous is None or c == 0 else first.copy_(previous)
        if state.map is not None:
            first.add_(state.map[:, :, r, c])
        outs = [*(layer_state.inputs[c] for layer_state in state.layers[1:]), state.features]
        for layer, layer_state, out in zip(self.layers, state.layers, outs):
            layer.step(c, layer_state, out)
        return state.features


BackboneConfig = PixelCNNConfig
