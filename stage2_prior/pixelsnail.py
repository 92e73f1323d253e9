"""PixelSNAIL (Chen et al. 2018, "PixelSNAIL: An Improved Autoregressive Generative Model", section 2).

B batch, D width, h×w grid, N = hw positions, T prefix length.

Convolutions see near positions in detail; attention reaches every earlier position at once. A block is a few gated layers of the
two stacks of a PixelCNN, then attention over the horizontal stack:

              vertical  v ──▶ ┌────────────────┐ ──────────────────────────────────────────▶ v'
                              │  gated layers  │     ┌───────────── residual ─────────────┐
            horizontal  h ──▶ └────────────────┘ ──▶ h ──▶ norm ──▶ causal attention ──────+──▶ h'

Where we deviate:
- The residual blocks are the two stacks of a gated PixelCNN (see pixelcnn.py). The paper has one stack with ELUs.
- The horizontal stack starts from the input before in raster order (`shift_raster`): at column 0 the last one of the row above,
  where pixelcnn.py has zero. So the key of every position knows the newest input, and a query sees its own position's key too.
  In the paper a key sees the input at its own position, and a query only earlier keys. The inputs that a query depends on are
  the same, but here the first position is no special case.
- Attention has a normalization before and a residual connection, as in a transformer. The paper merges it by a gated block.
- Keys and values are as wide as the features.
- A prefix is additional keys and values in every block.
- Dropout follows the gates and the attention.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.layers import CausalAttention, ChannelNorm, Dropout, shift_down, shift_raster
from stage2_prior.pixelcnn import GatedLayer
from stage2_prior.steps import Blocks, BlockWeights, Stacks


@dataclass(frozen=True)
class PixelSNAILConfig:
    """PixelSNAIL: gated convolutions and attention in turn."""

    width: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """feature maps in each stack"""
    blocks: Annotated[int, Interval(ge=1, le=1000)] = 2
    """blocks, each of gated layers and then attention"""
    layers: Annotated[int, Interval(ge=1, le=1000)] = 4
    """gated layers in a block"""
    kernel: Annotated[int, Interval(ge=3, le=99)] = 3
    """kernel size, odd"""
    heads: Annotated[int, Interval(ge=1, le=65_536)] = 4
    """attention heads; their number must divide the width"""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """share of the gated features, and of the attention's output, dropped in training"""

    def build(self) -> "PixelSNAIL":
        """Raises ValueError for an even kernel, and where the heads do not divide the width."""
        return PixelSNAIL(self)


class Block(nn.Module):
    """Gated layers, then attention over the horizontal stack: the figure above."""

    layers: list[GatedLayer]

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        layers = (GatedLayer(config.width, config.kernel, config.dropout) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(config.width)
        self.attention = CausalAttention(config.width, config.heads)
        self.dropout = Dropout(config.dropout)

    def forward(self, v: Tensor, h: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        """v and h, B D h w each, to the same; prefix B T D."""
        for layer in self.layers:
            v, h = layer(v, h)
        height, width = h.shape[2:]
        tokens = rearrange(h, "b d h w -> b (h w) d")
        if prefix is not None:
            tokens = torch.cat([prefix, tokens], dim=1)
        attended = self.dropout(self.attention(self.norm(tokens)))[:, -height * width :]
        return v, h + rearrange(attended, "b (h w) d -> b d h w", h=height)

    def step_weights(self) -> BlockWeights:
        """The weights of the attention as matrices, for the cached steps of steps.py."""
        norm, width = torch.stack([self.norm.weight, self.norm.bias]), self.norm.weight.numel()
        nothing = norm.new_zeros(width, 0)
        return BlockWeights(norm, *self.attention.step_weights(), norm, nothing, nothing.T)


@dataclass
class State:
    """Everything `step` keeps between positions."""

    stacks: Stacks
    prefix_length: int
    attention: Blocks

    def select(self, rows: Tensor) -> None:
        """See State in layers.py."""
        self.stacks.select(rows)
        self.attention.select(rows)


class PixelSNAIL(nn.Module):
    """The backbone: see Backbone in layers.py for its methods."""

    blocks: list[Block]
    needs_positions = False

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        self.width = config.width
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))  # type: ignore[assignment]
        self.norm = ChannelNorm(config.width)

    @property
    def layers(self) -> list[GatedLayer]:
        """The gated layers of all blocks."""
        return [layer for block in self.blocks for layer in block.layers]

    def forward(self, inputs: Tensor, map: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """inputs and the result B D h w, map B D h w or 1 D h w, prefix B T D; see Backbone."""
        v, h = shift_down(inputs), shift_raster(inputs)
        if map is not None:
            v, h = v + map, h + map
        for block in self.blocks:
            v, h = block(v, h, prefix)
        return self.norm(h)

    @torch.no_grad()
    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None, prefix: Tensor | None = None) -> State:
        stacks = Stacks([layer.step_weights() for layer in self.layers], batch, grid, map)
        tokens = () if prefix is None else prefix.unbind(1)
        weights, heads = [block.step_weights() for block in self.blocks], self.blocks[0].attention.heads
        attention = Blocks(weights, heads, batch, len(tokens) + grid[0] * grid[1])
        for place, token in enumerate(tokens):
            for block in range(len(self.blocks)):  # every block sees the prefix itself, so results at its tokens are not used
                attention.step(token.to(stacks.row.dtype, copy=True), place, block, block + 1)
        return State(stacks, len(tokens), attention)

    @torch.no_grad()
    def step(self, previous: Tensor | None, position: int, state: State) -> Tensor:
        """Position `position` of `forward`, B D."""
        stacks = state.stacks
        column = stacks.enter(previous, position)
        # The input at the position before; at column 0 the last of the row above.
        torch.add(stacks.row_inputs[column - 1], stacks.row_map[column], out=stacks.features)
        start = 0
        for number, block in enumerate(self.blocks):
            end = start + len(block.layers)
            features = stacks.step(column, start, end)
            state.attention.step(features, state.prefix_length + position, number, number + 1)
            start = end
        return self.norm.norm(stacks.features)
