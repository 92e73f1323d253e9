"""Every backbone: causal, without a blind spot, and its step equal to its forward."""

import copy
import dataclasses
import math

import pytest
import torch

from stage2_prior import compiled, steps
from stage2_prior.layers import Dropout, attend, shift_raster, shift_right
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.transformer import TransformerConfig
from tests.parts import BACKBONES, in_receptive_field, jacobian, randomized

GRIDS = [(4, 4), (3, 5), (1, 6), (5, 2)]
RESIDUAL = [
    name for name, config in BACKBONES.items() if isinstance(config, PixelCNNConfig | PixelSNAILConfig | TransformerConfig)
]


def build(name: str):
    return randomized(BACKBONES[name].build().double().eval())


def raster(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return [(r, c) for r in range(grid[0]) for c in range(grid[1])]


def example(backbone, grid: tuple[int, int], batch: int = 3, tokens: int = 2, seed: int = 2) -> tuple[torch.Tensor, ...]:
    """Random inputs and map, B D h w, and prefix, B T D, in the dtype of the weights."""
    generator, dtype = torch.Generator().manual_seed(seed), next(backbone.parameters()).dtype
    shapes = (batch, backbone.width, *grid), (batch, backbone.width, *grid), (batch, tokens, backbone.width)
    inputs, map, prefix = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return inputs, map, prefix


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("grid", [(5, 7), (1, 6)])
@pytest.mark.parametrize("name", BACKBONES)
def test_depends_on_exactly_the_positions_before_it(name, grid, told):
    """With and without a map and a prefix."""
    backbone = build(name)
    inputs, *known = example(backbone, grid, batch=1)
    influence = jacobian(lambda inputs: backbone(inputs, *known if told else ()), inputs[0]).abs().amax((0, 3))  # h w × h w
    order = raster(grid)
    for i, output in enumerate(order):
        for j, earlier in enumerate(order):
            value = float(influence[(*output, *earlier)])
            if j >= i:
                assert value == 0, f"position {output} sees {earlier}"
            elif in_receptive_field(BACKBONES[name], output, earlier):
                assert value > 0, f"position {output} is blind to {earlier}"
            else:
                assert value == 0, f"position {output} sees {earlier}, outside the receptive field"


@pytest.mark.parametrize("name", BACKBONES)
def test_sees_the_map_at_its_own_position(name):
    backbone = build(name)
    inputs, map = torch.randn(2, 1, backbone.width, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    influence = jacobian(lambda map: backbone(inputs, map), map[0]).abs().amax((0, 3))
    for position in raster((3, 4)):
        assert influence[(*position, *position)] > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_every_position_sees_the_whole_prefix(name):
    backbone = build(name)
    inputs, map, prefix = example(backbone, (3, 4), batch=1, tokens=3)
    influence = jacobian(lambda prefix: backbone(inputs, map, prefix), prefix[0]).abs().amax((0, 4))  # h w × T
    assert (influence > 0).all()


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", BACKBONES)
def test_step_equals_forward(name, grid, with_map, with_prefix):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        backbone = build(name).to(dtype)
        inputs, map, prefix = example(backbone, grid)
        known = ({"map": map} if with_map else {}) | ({"prefix": prefix} if with_prefix else {})
        difference, largest = compared(backbone, inputs, **known)
        assert difference <= tolerance * largest


def compared(backbone, inputs, **known) -> tuple[float, float]:
    """The largest difference between forward and steps, and the largest output."""
    grid = inputs.shape[2:]
    with torch.no_grad():
        whole = backbone(inputs, **known).movedim(1, -1)
    state = backbone.begin(len(inputs), tuple(grid), **known)
    previous, rows = None, []
    for position, (r, c) in enumerate(raster(grid)):
        rows.append(backbone.step(previous, position, state).clone())
        previous = inputs[:, :, r, c]
    difference = torch.stack(rows, 1).unflatten(1, grid) - whole
    return float(difference.abs().max()), float(whole.abs().max())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 6, 37])
@pytest.mark.parametrize("grid", [(4, 5), (1, 6), (3, 1)])
@pytest.mark.parametrize(
    "config",
    [
        PixelCNNConfig(width=16, layers=3, kernel=5),
        PixelCNNConfig(width=48, layers=2, kernel=3),
        PixelSNAILConfig(width=32, blocks=2, layers=2, heads=2),
        TransformerConfig(width=48, layers=3, heads=3),
        TransformerConfig(width=80, layers=2, heads=1),
    ],
)
def test_compiled_steps_equal_forward_and_the_steps_without_them(config, grid, batch, threads, monkeypatch):
    """Widths that do and do not fill the tiles of steps.c, batches likewise, in float32."""
    backbone = randomized(config.build().eval(), scale=0.15)
    inputs, map, prefix = example(backbone, grid, batch)
    known = {"map": map, "prefix": prefix}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compiled.library() is None or None not in compiled_parts(backbone.begin(batch, grid, **known))
        difference, largest = compared(backbone, inputs, **known)
        assert difference <= 1e-5 * largest
        monkeypatch.setattr(compiled, "library", lambda: None)
        assert {*compiled_parts(backbone.begin(batch, grid, **known))} == {None}
        difference, largest = compared(backbone, inputs, **known)
        assert difference <= 1e-5 * largest
    finally:
        torch.set_num_threads(before)


def compiled_parts(state) -> list:
    """What of a backbone's steps is in C, None for a part that is not."""
    parts = [state, *vars(state).values()]
    return [part.compiled for part in parts if isinstance(part, (steps.Stacks, steps.Blocks))]


@pytest.mark.parametrize("config", [PixelCNNConfig(width=16, layers=2), TransformerConfig(width=32, layers=2, heads=2)])
def test_compiled_steps_are_exact_at_both_ends(config):
    """Inputs far beyond where tanh, the sigmoid and erf are flat, and where attention goes to one position, in every layer."""
    backbone = randomized(config.build().eval(), scale=5.0)
    inputs, map, _ = example(backbone, (3, 4))
    difference, largest = compared(backbone, 30 * inputs, map=map)
    assert difference <= 1e-5 * largest


@pytest.mark.parametrize("name", BACKBONES)
def test_one_map_serves_the_whole_batch(name):
    backbone = build(name)
    inputs, map, prefix = example(backbone, (3, 4))
    difference, largest = compared(backbone, inputs, map=map[:1], prefix=prefix)
    assert difference <= 1e-12 * largest


@pytest.mark.parametrize("maps", [1, 5])
@pytest.mark.parametrize("compilable", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_rows_that_are_selected_go_on_as_those_they_were(name, compilable, maps):
    """Selections in the middle of a row of the grid, at its end and at its start, with rows taken twice and not at all."""
    config = dataclasses.replace(BACKBONES[name], width=32) if compilable else BACKBONES[name]
    backbone = randomized(config.build().eval(), scale=0.15).to(torch.float32 if compilable else torch.float64)
    inputs, map, prefix = example(backbone, (3, 4), batch=5)
    map = map[:maps]
    state = backbone.begin(5, (3, 4), map, prefix)
    selections = {1: [4, 4, 0, 1, 2], 7: [1, 0, 3, 3, 2], 8: [0, 0, 0, 4, 1]}
    outputs = torch.zeros_like(inputs)
    previous = None
    for position, (r, c) in enumerate(raster((3, 4))):
        outputs[:, :, r, c] = backbone.step(previous, position, state)
        if position in selections:
            rows = torch.tensor(selections[position])
            state.select(rows)
            outputs = outputs[rows]
            inputs.flatten(2)[..., :position] = inputs.flatten(2)[rows, :, :position]
            map, prefix = map[rows] if maps > 1 else map, prefix[rows]
        previous = inputs[:, :, r, c]
    with torch.no_grad():
        whole = backbone(inputs, map, prefix)
    assert (outputs - whole).abs().max() <= (1e-5 if compilable else 1e-12) * whole.abs().max()


@pytest.mark.parametrize("name", BACKBONES)
def test_steps_in_bfloat16_take_what_is_known_in_float32(name):
    """Weights of bfloat16, inputs, map and prefix of float32: near the forward pass in float32 of the same weights."""
    backbone = randomized(BACKBONES[name].build().eval(), scale=0.2).to(torch.bfloat16)
    exact = copy.deepcopy(backbone).float()
    inputs, map, prefix = example(exact, (3, 4))
    state = backbone.begin(3, (3, 4), map, prefix)
    whole = exact(inputs, map, prefix)
    previous = None
    for position, (r, c) in enumerate(raster((3, 4))):
        row = backbone.step(previous, position, state)
        assert row.dtype == torch.bfloat16
        assert (row - whole[:, :, r, c]).abs().max() <= 0.05 * whole.abs().max()
        previous = inputs[:, :, r, c]


@pytest.mark.parametrize("name", BACKBONES)
def test_under_autocast(name):
    """Forward, backward and steps in mixed precision, near those in float32."""
    backbone = randomized(BACKBONES[name].build().eval(), scale=0.2)
    inputs, map, prefix = example(backbone, (3, 4))
    exact = backbone(inputs, map, prefix)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(inputs, map, prefix)
        difference, largest = compared(backbone, inputs, map=map, prefix=prefix)
    assert (rounded - exact).abs().max() <= 0.05 * exact.abs().max()
    assert difference <= 0.05 * largest
    rounded.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_receives_a_gradient(name):
    torch.manual_seed(0)
    backbone = BACKBONES[name].build()
    backbone(*example(backbone, (4, 4))).square().sum().backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("name", BACKBONES)
def test_a_share_is_dropped_at_random_in_training_only(name):
    whole, half = (randomized(dataclasses.replace(BACKBONES[name], dropout=share).build()) for share in (0.0, 0.5))
    given = example(whole, (3, 4))
    with torch.no_grad():
        assert torch.equal(whole(*given), half.eval()(*given))
        torch.manual_seed(0)
        first, second = (half.train()(*given) for _ in range(2))
    assert (first != second).any()


@pytest.mark.parametrize("name", RESIDUAL)
def test_dropout_is_of_all_that_layers_add(name):
    """With all of it dropped, of the inputs only the one before is left, and the map."""
    config = BACKBONES[name]
    whole, none = (randomized(dataclasses.replace(config, dropout=share).build()) for share in (0.0, 1.0))
    inputs, map, prefix = example(whole, (3, 4))
    known = map, None if name.startswith("pixelcnn") else prefix
    with torch.no_grad():
        left = none(inputs, *known)
        assert (left != whole(inputs, *known)).any()
    shift = shift_right if name.startswith("pixelcnn") else shift_raster
    residual = shift(inputs) + map
    norm = none.norm if isinstance(config, TransformerConfig) else none.norm.norm
    residual = norm(residual.movedim(1, -1)).movedim(-1, 1)
    assert torch.allclose(left, residual, atol=1e-6)


@pytest.mark.parametrize(("width", "dtype", "tolerance"), [(6, torch.float64, 1e-12), (32, torch.float32, 1e-5)])
def test_attention_reads_only_what_has_been_written(width, dtype, tolerance):
    """In torch's operations, and in C where it is compiled."""
    backbone = randomized(TransformerConfig(width=width, layers=2, heads=2).build(), scale=0.2).to(dtype)
    inputs, map, _ = example(backbone, (4, 5))
    state = backbone.begin(3, (4, 5), map)
    state.blocks.keys.fill_(torch.nan)
    state.blocks.values.fill_(torch.nan)
    with torch.no_grad():
        whole = backbone(inputs, map)
    previous = None
    for position, (r, c) in enumerate(raster((4, 5))):
        step = backbone.step(previous, position, state)
        assert torch.allclose(step, whole[:, :, r, c], rtol=tolerance, atol=tolerance * float(whole.abs().max()))
        previous = inputs[:, :, r, c]


@pytest.mark.parametrize("mixed", (False, True))
def test_attention_of_bfloat16_is_that_of_float32_rounded(mixed):
    """In values and gradients: on CPUs the kernel for bfloat16 is several times slower, under mixed precision too."""
    q, k, v, direction = torch.randn(4, 2, 3, 7, 8, generator=torch.Generator().manual_seed(0)).bfloat16()

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        attended = attend(*inputs)
        return [attended, *torch.autograd.grad(attended, inputs, direction.to(dtype))]

    exact = results(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        rounded = results(torch.bfloat16)
    assert all(torch.equal(found, expected.bfloat16()) for found, expected in zip(rounded, exact, strict=True))


def test_refuses_heads_that_do_not_divide_the_width():
    for name in ("pixelsnail", "transformer"):
        with pytest.raises(ValueError, match="does not divide into 4 heads"):
            dataclasses.replace(BACKBONES[name], heads=4).build()


def test_refuses_a_kernel_without_a_middle():
    for name in ("pixelcnn", "pixelsnail"):
        with pytest.raises(ValueError, match="odd"):
            dataclasses.replace(BACKBONES[name], kernel=4).build()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(30_001,), (50, 9, 64), (64, 10, 7, 7)])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dropout = Dropout(share).train()
    x = torch.ones(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    dropped = dropout(x)
    kept = dropped != 0
    assert dropped.stride() == x.stride()
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - share)), rtol=1e-3, atol=0)
    tolerance = 5 * math.sqrt(share * (1 - share) / x.numel())  # standard deviations
    assert abs(float(kept.double().mean()) - (1 - share)) < tolerance
    pairs = kept.flatten()[:-1] & kept.flatten()[1:]  # neighbours in memory come of one random number
    assert abs(float(pairs.double().mean()) - (1 - share) ** 2) < 3 * tolerance
    assert torch.equal(torch.autograd.grad(dropped.sum(), x)[0], dropped)
    assert not torch.equal(dropout(x), dropped)
    assert dropout.eval()(x) is x


@pytest.mark.parametrize("shape", [(50, 9, 64), (64, 10, 7, 7)])
def test_compiled_dropouts_drop_their_share_and_not_the_same(shape: tuple[int, ...]) -> None:
    """torch.compile may join what is computed twice, and may compute again for the gradient what was not kept."""
    dropout = Dropout(0.3).train()
    x = torch.ones(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    both = torch.compile(lambda x: (dropout(x), dropout(2 * x)))(x)
    tolerance = 5 * math.sqrt(0.3 * 0.7 / x.numel())  # standard deviations
    for dropped, scale in zip(both, (1, 2)):
        kept = dropped != 0
        assert abs(float(kept.double().mean()) - 0.7) < tolerance
        torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], scale / 0.7), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.autograd.grad(sum(both).sum(), x)[0], sum(both))
    agree = (both[0] != 0) & (both[1] != 0)
    assert abs(float(agree.double().mean()) - 0.49) < 3 * tolerance


def test_dropout_of_almost_all_is_finite() -> None:
    assert Dropout(1 - 1e-9).train()(torch.ones(10_000)).isfinite().all()
