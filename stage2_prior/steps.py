"""The cached steps of sampling: layers evaluated position by position, with all that they keep between positions.

Gated layers run the vertical stack one row at a time and the horizontal stack one position at a time. Blocks of attention read
the keys and values of the positions so far.

B batch, D width, L layers, h×w grid, k kernel size, m = (k+1)/2 the kernel's causal half, d features of an attention head.

The cache is laid out so that every operation is a matrix product. These are so small that on CPUs the overhead of calling torch
is larger than the computation. So where the installation found a C compiler, one call into compiled.py takes a row or a
position through all layers.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from stage2_prior.compiled import CompiledBlocks, CompiledSteps, library_for

WHOLE = 16  # the room for positions of keys and values is a multiple of this: whole vectors in steps.c


class StepWeights(NamedTuple):
    """The weights of a gated layer as matrices; those of all layers are stacked along a first axis.

    The gate is tanh(a)·σ(b) = 2st - t with s = σ(2a) and t = σ(b). The factor 2 of σ(2a) is folded into the weights that
    produce a. The output weights are negated, because the step multiplies them by t - 2st.
    """

    vertical_norm: Tensor  # scale and shift: 2 D
    vertical: Tensor  # the kernel's m rows, the last of which is this one, of k columns: m k·D 2D
    vertical_bias: Tensor  # 2D
    across: Tensor  # from the vertical stack to the horizontal: 2D 2D
    across_bias: Tensor  # 2D
    horizontal_norm: Tensor  # scale and shift: 2 D
    horizontal: Tensor  # the kernel's m columns, the last of which is this one: m·D 2D
    output: Tensor  # D D


class Stacks:
    """The two stacks of L gated layers, position by position.

    weights: of each layer. map: B D h w, or 1 for B, or 1 for both h and w.
    """

    def __init__(self, weights: list[StepWeights], batch: int, grid: tuple[int, int], map: Tensor | None):
        # Contiguous, because steps.c reads their memory.
        self.weights = StepWeights(*(torch.stack(kind).contiguous() for kind in zip(*weights)))
        (layers, m, _, _), d, width = self.weights.vertical.shape, self.weights.output.shape[-1], grid[1]
        new, self.kernel = self.weights.output.new_zeros, 2 * m - 1
        map = new(1, d, *grid) if map is None else map.to(self.weights.output.dtype).expand(-1, -1, *grid)
        self.map = list(rearrange(map, "b d h w -> h w b d").contiguous())  # of each row, w B D or w 1 D
        # Of this row of the grid, for each column: the inputs known so far (after them those of the row above), and the map.
        self.row = new(width, batch, d)
        self.row_inputs, self.row_map = list(self.row), [*self.map[0]]  # B D each
        # Normalized inputs of the vertical convolutions: a ring buffer of this row and the m-1 above, with zeros left and right.
        self.rows = new(layers, m, width + self.kernel - 1, batch, d)
        # The inputs of the horizontal stack from the vertical one in this row.
        self.seen = new(layers, width, batch, 2 * d)
        # Normalized inputs of the horizontal convolutions in this row, with zeros left of the grid. Views, made once: of each
        # column, L B D, and of the columns that the kernel reaches from it, L B m·D.
        self.inputs = new(layers, batch, m - 1 + width, d)
        self.places = list(self.inputs[:, :, m - 1 :].unbind(2))
        self.reached = self.inputs.flatten(2).unfold(2, m * d, d).unbind(2)
        # Features that all layers update in place: of a row in the vertical stack, of a position in the horizontal stack.
        self.row_features, self.features = new(width, batch, d), new(batch, d)
        self.compiled: CompiledSteps | None = None
        if (library := library_for(self.features, d)) is not None:
            self.compiled = CompiledSteps(
                library,
                self.weights,
                row_features=self.row_features,
                rows=self.rows,
                seen=self.seen,
                features=self.features,
                inputs=self.inputs,
            )
        else:
            self.above, self.gated = new(width * batch, 2 * d), new(batch, d)
            # The kernel's rows in the order of the ring buffer, for each place that this row can have in it.
            self.vertical = [self.weights.vertical.roll(place + 1, 1).flatten(1, 2) for place in range(m)]

    def enter(self, previous: Tensor | None, position: int) -> int:
        """Store the input at position - 1, and at the start of a row run the vertical stack. Returns the column."""
        row, column = divmod(position, len(self.row_inputs))
        if previous is not None:
            self.row_inputs[column - 1].copy_(previous)
        if column == 0:
            # self.row holds the row above: zeros before the first.
            torch.add(self.row, self.map[row], out=self.row_features)
            (self.step_row if self.compiled is None else self.compiled.row)(row % self.rows.shape[1])
            self.row_map = list(self.map[row])
        return column

    def step_row(self, place: int) -> None:
        """Run the vertical stack on self.row_features, w B D, in place. place: of this row in the ring buffer."""
        width, batch, d = self.row.shape
        margin = self.kernel // 2
        for layer, rows in enumerate(self.rows):
            rows[place, margin : margin + width] = F.layer_norm(self.row_features, (d,), *self.weights.vertical_norm[layer])
            patches = rearrange(rows.unfold(1, self.kernel, 1), "m w b d k -> (w b) (m k d)")
            above = torch.addmm(self.weights.vertical_bias[layer], patches, self.vertical[place][layer], out=self.above)
            seen = self.seen[layer].flatten(0, 1)
            torch.addmm(self.weights.across_bias[layer], above, self.weights.across[layer], out=seen)
            s, t = above.sigmoid_().view(width, batch, -1).chunk(2, dim=-1)
            self.row_features.addcmul_(s, t, value=2).sub_(t)

    def step(self, column: int, first: int = 0, last: int | None = None) -> Tensor:
        """Run layers first … last-1 of the horizontal stack at one position, on self.features, B D, in place."""
        last = len(self.rows) if last is None else last
        if self.compiled is not None:
            self.compiled.step(column, first, last)
            return self.features
        for layer in range(first, last):
            norm = self.weights.horizontal_norm[layer]
            self.places[column][layer] = F.layer_norm(self.features, self.features.shape[1:], *norm)
            both = self.seen[layer, column]
            s, t = both.addmm_(self.reached[column][layer], self.weights.horizontal[layer]).sigmoid_().chunk(2, dim=1)
            self.features.addmm_(torch.addcmul(t, s, t, value=-2, out=self.gated), self.weights.output[layer])
        return self.features

    def select(self, rows: Tensor) -> None:
        """See State in layers.py."""
        maps = [(row, 1) for row in self.map if row.shape[1] > 1]
        for kept, axis in [(self.row, 1), (self.rows, 3), (self.seen, 2), (self.inputs, 1), *maps]:
            kept.copy_(kept.index_select(axis, rows))


class BlockWeights(NamedTuple):
    """The weights of a block of attention as matrices; those of all blocks are stacked along a first axis.

    First x + output(attention(norm(x))), then x + contract(GELU(expand(norm(x)))) with E hidden features. E is 0 for a block
    without the second part. The scale of the queries is folded into their weights.
    """

    norm: Tensor  # scale and shift: 2 D
    qkv: Tensor  # D 3D
    output: Tensor  # D D
    inner_norm: Tensor  # 2 D
    expand: Tensor  # D E
    contract: Tensor  # E D


class Blocks:
    """L blocks of attention, position by position, with the keys and values of up to N positions."""

    def __init__(self, weights: list[BlockWeights], heads: int, batch: int, positions: int):
        self.weights, self.heads = BlockWeights(*(torch.stack(kind).contiguous() for kind in zip(*weights))), heads
        layers, _, width = self.weights.norm.shape
        d, room, new = width // heads, positions + -positions % WHOLE, self.weights.norm.new_zeros
        self.keys, self.values = new(layers, batch * heads, d, room), new(layers, batch * heads, room, d)
        self.layers = list(zip(*self.weights, self.keys, self.values))
        library = library_for(self.keys, d)
        self.compiled = None if library is None else CompiledBlocks(library, self.weights, heads, self.keys, self.values)

    def step(self, x: Tensor, position: int, first: int = 0, last: int | None = None) -> Tensor:
        """Run blocks first … last-1 at one position on x, B D, in place. Its keys and values are stored."""
        last = len(self.layers) if last is None else last
        if self.compiled is not None:
            self.compiled.step(x, position, first, last)
            return x
        width = x.shape[1]
        for norm, qkv, output, inner_norm, expand, contract, keys, values in self.layers[first:last]:
            projected = F.layer_norm(x, (width,), *norm) @ qkv
            query, key, value = rearrange(projected, "b (three heads d) -> three (b heads) d", three=3, heads=self.heads)
            keys[:, :, position], values[:, position] = key, value
            # Two products and a softmax: for a single query, faster on CPUs than the fused kernel.
            scores = torch.bmm(query[:, None], keys[:, :, : position + 1]).softmax(-1)
            x += torch.bmm(scores, values[:, : position + 1]).view(-1, width) @ output
            if len(contract):
                x += F.gelu(F.layer_norm(x, (width,), *inner_norm) @ expand) @ contract
        return x

    def select(self, rows: Tensor) -> None:
        """See State in layers.py."""
        for kept in (self.keys, self.values):
            by_row = kept.unflatten(1, (-1, self.heads))
            by_row.copy_(by_row.index_select(1, rows))
