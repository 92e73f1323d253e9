"""Gated PixelCNN (van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders", section 2).

B batch, D width, T prefix length, h×w grid, k kernel size, m = (k+1)/2 the kernel's causal half.

There are two stacks of gated convolutions. At (r, c), the *vertical* stack sees the rows above r. The *horizontal* stack sees the
columns left of c in row r, and reads the vertical stack at (r, c). Together they see what comes before (r, c) in raster order. A
single stack of masked convolutions has a blind spot above and to the right, at any depth.

                  v v v v v           o  the position that is predicted
                  v v v v v           v  what the vertical stack sees there
                  h h o               h  what the horizontal stack sees in addition

Inputs are embeddings of latents. The features go to a head (heads.py), which has the density: here are no pixels, and no order
of channels.

Causality needs no masks. Inputs are shifted once: down by a row for v, right by a column for h. This replaces the paper's mask A.
Then kernels are cropped, so that they reach to their own position and not beyond. This replaces mask B. So all layers are alike.

                           ┌───────────── residual ────────────┐
                 vertical  v ──▶ norm ──▶ crop k×k conv ──┬──▶ gate ──+──▶ v'
                                                          ▼ 1×1
               horizontal  h ──▶ norm ──▶ crop 1×k conv ──+──▶ gate ──▶ 1×1 ──+──▶ h'
                           └───────────────────── residual ──────────────────┘

Where we deviate:
- The vertical stack is residual too. Without that, its signal fades with depth.
- Features are normalized before every k×k and 1×k convolution and at the end, as in a transformer.
- Dropout follows the gates.
- Conditions are one map, added to the inputs of both stacks, not to every gate.

In sampling, `step` runs the vertical stack once for each row, for all its columns, and the horizontal stack once for each
position. A whole grid takes the arithmetic of one `forward`. Both are in steps.py, as matrix products on cached features.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.layers import ChannelNorm, Dropout, HorizontalConv, VerticalConv, gate, shift_down, shift_right
from stage2_prior.steps import Stacks, StepWeights


@dataclass(frozen=True)
class PixelCNNConfig:
    """Gated PixelCNN."""

    width: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """feature maps in each stack"""
    layers: Annotated[int, Interval(ge=1, le=1000)] = 8
    """gated layers"""
    kernel: Annotated[int, Interval(ge=3, le=99)] = 3
    """kernel size, odd"""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """share of the gated features dropped in training"""

    def build(self) -> "PixelCNN":
        """Raises ValueError for an even kernel."""
        return PixelCNN(self)


class GatedLayer(nn.Module):
    """A layer of both stacks, as in the paper's figure 2. Raises ValueError for an even kernel, or one smaller than 3."""

    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        if kernel % 2 == 0 or kernel < 3:
            raise ValueError(f"a PixelCNN kernel is odd and at least 3, not {kernel}")
        self.vertical_norm, self.horizontal_norm = ChannelNorm(width), ChannelNorm(width)
        self.vertical = VerticalConv(width, 2 * width, kernel)
        self.horizontal = HorizontalConv(width, 2 * width, kernel)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.output = nn.Conv2d(width, width, 1, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the vertical and the horizontal stack, B D h w each, before the layer to those after it."""
        above = self.vertical(self.vertical_norm(v))
        before = self.horizontal(self.horizontal_norm(h)) + self.vertical_to_horizontal(above)
        return v + self.dropout(gate(above)), h + self.output(self.dropout(gate(before)))

    def step_weights(self) -> StepWeights:
        """The weights as matrices, for the cached steps of steps.py. StepWeights explains the factors 2 and the sign."""
        vertical, across, horizontal = self.vertical.conv, self.vertical_to_horizontal, self.horizontal.conv
        ones = self.output.weight.new_ones(self.output.in_channels)
        twice = torch.cat([2 * ones, ones])  # for a and b of the gate; what is read from a vertical stack so scaled is halved
        return StepWeights(
            vertical_norm=self.vertical_norm.step_weights(),
            vertical=rearrange(vertical.weight, "o d m k -> m (k d) o") * twice,
            vertical_bias=vertical.bias * twice,  # type: ignore[operator]
            across=rearrange(across.weight, "o i 1 1 -> i o") * twice / twice[:, None],
            across_bias=(across.bias + horizontal.bias) * twice,  # type: ignore[operator]
            horizontal_norm=self.horizontal_norm.step_weights(),
            horizontal=rearrange(horizontal.weight, "o d 1 m -> (m d) o") * twice,
            output=-rearrange(self.output.weight, "o i 1 1 -> i o"),
        )


def pooled(map: Tensor | None, prefix: Tensor | None) -> Tensor | None:
    """The map plus the mean of the prefix at every position, for a backbone without attention."""
    if prefix is None:
        return map
    mean = rearrange(prefix.mean(1), "b d -> b d 1 1")
    return mean if map is None else map + mean


class PixelCNN(nn.Module):
    """The backbone: see Backbone in layers.py for its methods."""

    layers: list[GatedLayer]
    needs_positions = False

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        self.width = config.width
        layers = (GatedLayer(config.width, config.kernel, config.dropout) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = ChannelNorm(config.width)

    def forward(self, inputs: Tensor, map: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """inputs and the result B D h w, map B D h w or 1 D h w, prefix B T D; see Backbone."""
        map = pooled(map, prefix)
        v, h = shift_down(inputs), shift_right(inputs)
        if map is not None:
            v, h = v + map, h + map
        for layer in self.layers:
            v, h = layer(v, h)
        return self.norm(h)

    @torch.no_grad()
    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None, prefix: Tensor | None = None) -> Stacks:
        return Stacks([layer.step_weights() for layer in self.layers], batch, grid, pooled(map, prefix))

    @torch.no_grad()
    def step(self, previous: Tensor | None, position: int, state: Stacks) -> Tensor:
        """Position `position` of `forward`, B D."""
        column = state.enter(previous, position)
        if column == 0:
            state.features.copy_(state.row_map[0])
        else:
            # The horizontal stack sees the input to the left in this row.
            torch.add(state.row_inputs[column - 1], state.row_map[column], out=state.features)
        return self.norm.norm(state.step(column))
