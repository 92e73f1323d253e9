"""Decoder-only transformer over the grid in raster order, after GPT-2.

(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. With continuous latents it is GIVT,
Tschannen et al. 2023.)

B batch, D width, h×w grid, N = hw positions, T prefix length.

                 ┌────────── residual ─────────┐ ┌──────── residual ───────┐
       tokens  x ──▶ norm ──▶ causal attention ──+──▶ norm ──▶ D→4D→D MLP ──+──▶ x'

The token at position i is the input at position i-1 (zero at the first) plus the map at position i. The map contains position
embeddings, so the transformer has none of its own. The prefix comes first in the sequence, and outputs at its tokens are not
used.

Where we deviate from GPT-2: linear layers have no biases, and dropout acts only on what is added to the residual stream.

In sampling, `begin` passes the prefix through the blocks, and `step` one position at a time, with cached keys and values
(steps.py).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_prior.layers import CausalAttention, Dropout, shift_raster
from stage2_prior.steps import Blocks, BlockWeights


@dataclass(frozen=True)
class TransformerConfig:
    """Decoder-only transformer."""

    width: Annotated[int, Interval(ge=1, le=65_536)] = 128
    """features of a position"""
    layers: Annotated[int, Interval(ge=1, le=1000)] = 4
    """blocks of attention and MLP"""
    heads: Annotated[int, Interval(ge=1, le=65_536)] = 4
    """attention heads; their number must divide the width"""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """dropout in training on what a layer adds to the residual stream"""

    def build(self) -> "Transformer":
        """Raises ValueError where the heads do not divide the width."""
        return Transformer(self)


class Block(nn.Module):
    """Attention, then a multilayer perceptron. Each reads normalized features and adds to the residual stream."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """B N D to B N D."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.mlp_norm(x)))))

    def step_weights(self) -> BlockWeights:
        """The weights as matrices, for the cached steps of steps.py."""
        norm, inner_norm = (torch.stack([norm.weight, norm.bias]) for norm in (self.attention_norm, self.mlp_norm))
        return BlockWeights(norm, *self.attention.step_weights(), inner_norm, self.expand.weight.T, self.contract.weight.T)


@dataclass
class State:
    """Everything `step` keeps between positions."""

    start: Tensor  # the input before the first: zeros, B D
    map: list[Tensor]  # for each position, B D or 1 D
    prefix_length: int
    blocks: Blocks

    def select(self, rows: Tensor) -> None:
        """See State in layers.py."""
        self.map = [place if len(place) == 1 else place[rows] for place in self.map]
        self.blocks.select(rows)


class Transformer(nn.Module):
    """The backbone: see Backbone in layers.py for its methods."""

    blocks: list[Block]
    needs_positions = True

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.width = config.width
        blocks = (Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.LayerNorm(config.width)
        # So that the residual stream does not grow with depth at initialization (Radford et al. 2019, section 2.3).
        with torch.no_grad():
            for block in self.blocks:
                for last in (block.attention.output, block.contract):
                    last.weight.mul_((2 * config.layers) ** -0.5)

    def forward(self, inputs: Tensor, map: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """inputs and the result B D h w, map B D h w or 1 D h w, prefix B T D; see Backbone."""
        height, width = inputs.shape[2:]
        x = shift_raster(inputs)
        if map is not None:
            x = x + map
        x = rearrange(x, "b d h w -> b (h w) d")
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return rearrange(self.norm(x[:, -height * width :]), "b (h w) d -> b d h w", h=height)

    @torch.no_grad()
    def begin(self, batch: int, grid: tuple[int, int], map: Tensor | None = None, prefix: Tensor | None = None) -> State:
        start = self.norm.weight.new_zeros(batch, self.width)
        map = start.new_zeros(1, self.width, *grid) if map is None else map.to(start.dtype)
        tokens = () if prefix is None else prefix.unbind(1)
        weights = [block.step_weights() for block in self.blocks]
        blocks = Blocks(weights, self.blocks[0].attention.heads, batch, len(tokens) + grid[0] * grid[1])
        for place, token in enumerate(tokens):
            blocks.step(token.to(start.dtype, copy=True), place)
        return State(start, list(rearrange(map, "b d h w -> (h w) b d").contiguous()), len(tokens), blocks)

    @torch.no_grad()
    def step(self, previous: Tensor | None, position: int, state: State) -> Tensor:
        """Position `position` of `forward`, B D."""
        before = state.start if previous is None else previous.to(state.start.dtype)
        return self.norm(state.blocks.step(before + state.map[position], state.prefix_length + position))
