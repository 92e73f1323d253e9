"""Every backbone: causal, without a blind spot, and its step equal to its forward."""

import pytest
import torch

from tests.parts import BACKBONES, jacobian, randomized

GRIDS = [(4, 4), (3, 5), (1, 6), (5, 2)]


def build(name: str):
    return randomized(BACKBONES[name].build().double().eval())


def raster(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return [(r, c) for r in range(grid[0]) for c in range(grid[1])]


def in_reach(reach: int, output: tuple[int, int], earlier: tuple[int, int]) -> bool:
    """The receptive field that PixelCNN.reach states."""
    rows_above, left = output[0] - earlier[0], output[1] - earlier[1]
    if rows_above == 0:
        return 1 <= left <= reach + 1
    return 1 <= rows_above <= reach + 1 and abs(left) <= reach


@pytest.mark.parametrize("grid", [(5, 7), (1, 6)])
@pytest.mark.parametrize("name", BACKBONES)
def test_depends_on_exactly_the_positions_before_it(name, grid):
    backbone = build(name)
    inputs = torch.randn(backbone.width, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    influence = jacobian(backbone, inputs).abs().amax((0, 3))  # h w of the output × h w of the input
    order = raster(grid)
    for i, output in enumerate(order):
        for j, earlier in enumerate(order):
            value = float(influence[(*output, *earlier)])
            if j >= i:
                assert value == 0, f"position {output} sees {earlier}"
            elif in_reach(backbone.reach, output, earlier):
                assert value > 0, f"position {output} is blind to {earlier}"
            else:
                assert value == 0, f"position {output} sees {earlier}, outside the stated receptive field"


@pytest.mark.parametrize("name", BACKBONES)
def test_sees_the_map_at_its_own_position(name):
    backbone = build(name)
    inputs, map = torch.randn(2, 1, backbone.width, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    influence = jacobian(lambda map: backbone(inputs, map), map[0]).abs().amax((0, 3))
    for position in raster((3, 4)):
        assert influence[(*position, *position)] > 0


@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", BACKBONES)
def test_step_equals_forward(name, grid, with_map):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        backbone = build(name).to(dtype)
        inputs, map = torch.randn(2, 3, backbone.width, *grid, generator=torch.Generator().manual_seed(2)).to(dtype)
        map = map if with_map else None
        whole = backbone(inputs, map)
        state = backbone.begin(3, grid, map)
        previous = None
        for position, (r, c) in enumerate(raster(grid)):
            row = backbone.step(previous, position, state)
            assert (row - whole[:, :, r, c]).abs().max() <= tolerance * whole.abs().max()
            previous = inputs[:, :, r, c]


def test_refuses_a_kernel_without_a_middle():
    with pytest.raises(ValueError, match="odd"):
        BACKBONES["pixelcnn"].__class__(kernel=4).build()
