"""PixelSNAIL (Chen et al. 2018, "PixelSNAIL: An Improved Autoregressive Generative Model", section 2).

B batch, D width, h×w grid, N = hw positions, T prefix length.

Convolutions see what is near with a bandwidth of their own; attention reaches every earlier position at once. A block is a
few gated layers of both kinds of context, then attention over the horizontal stack:

              vertical  v ──▶ ┌────────────────┐ ──────────────────────────────────────────▶ v'
                              │  gated layers  │     ┌───────────── residual ─────────────┐
            horizontal  h ──▶ └────────────────┘ ──▶ h ──▶ norm ──▶ causal attention ──────+──▶ h'

Where we deviate: the residual blocks are the two stacks of a gated PixelCNN (see pixelcnn.py), for the paper's one stack with
ELUs. The paper's keys hold the input at their own position beside the features, and a query sees strictly earlier ones;
ours hold features that start from the input at the position before (`shift_raster`, across the ends of rows), and a query
sees its own too: the same inputs, with no special case at the first position. Attention is normalized before and added
after, as in a transformer, for the paper's merging gated block; keys and values are as wide as the features. A prefix is
extra keys and values in every block. Dropout after the gates and after attention.
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
    """blocks of gated layers with attention after them"""
    layers: Annotated[int, Interval(ge=1, le=1000)] = 4
    """gated layers in a block"""
    kernel: Annotated[int, Interval(ge=3, le=99)] = 3
    """kernel size, odd"""
    heads: Annotated[int, Interval(ge=1, le=65_536)] = 4
    """attention heads; they divide the width"""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """share of the gated and of the attended features dropped in training"""

    def build(self) -> "PixelSNAIL":
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
    blocks: list[Block]
    reach: int | None = None

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        self.width = config.width
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))  # type: ignore[assignment]
        self.norm = ChannelNorm(config.width)

    @property
    def layers(self) -> list[GatedLayer]:
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
            for block in range(len(self.blocks)):  # every block sees the prefix itself: of what comes out, nothing is used
                attention.step(token.to(stacks.row.dtype, copy=True), place, block, block + 1)
        return State(stacks, len(tokens), attention)

    @torch.no_grad()
    def step(self, previous: Tensor | None, position: int, state: State) -> Tensor:
        """Position `position` of `forward`, B D."""
        stacks = state.stacks
        column = stacks.enter(previous, position)
        torch.add(stacks.row_inputs[column - 1], stacks.row_map[column], out=stacks.features)
        layer = 0
        for number, block in enumerate(self.blocks):
            features = stacks.step(column, layer, layer := layer + len(block.layers))
            state.attention.step(features, state.prefix_length + position, number, number + 1)
        return self.norm.norm(stacks.features)
