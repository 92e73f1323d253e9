"""How near drawing a grid comes to one teacher-forced forward pass over the same batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.benchmarks.measuring import Rows, median_seconds, peak_bytes
from pipelines.console import UserError, check_least, nearest, say
from pipelines.runs.names import Device, Dtype
from stage2_prior.autoregressive import AutoregressiveConfig, AutoregressivePrior, BackboneConfig
from stage2_prior.heads import Categorical, GaussianMixture, HeadConfig
from stage2_prior.latents import LatentSpec
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.sampling import AS_FITTED, uniforms
from stage2_prior.transformer import TransformerConfig

BACKBONES: dict[str, BackboneConfig] = {
    "pixelcnn": PixelCNNConfig(),
    "pixelsnail": PixelSNAILConfig(),
    "transformer": TransformerConfig(),
}
"""Each of 0.5 to 1 M parameters."""
HEADS: dict[str, tuple[HeadConfig, Callable[[tuple[int, int]], LatentSpec]]] = {
    "mixture": (GaussianMixture(), lambda grid: LatentSpec((4, *grid))),
    "categorical": (Categorical(), lambda grid: LatentSpec(grid, vocabulary=512)),
    "wide": (Categorical(hidden=512), lambda grid: LatentSpec(grid, vocabulary=512)),
}
"""Each with the latents it is measured on."""


@dataclass(frozen=True)
class BenchmarkSampling:
    """Compare drawing latents with one teacher-forced forward pass of the same batch."""

    backbone: str = "pixelcnn"
    """the causal network of the prior"""
    head: str = "mixture"
    """mixture: four continuous channels at each position; categorical: one of 512 codes; wide: the same, from 512 features"""
    grid: tuple[str, ...] = ("7x7", "8x8", "16x16", "32x32")
    """latent grids, h×w"""
    batch: tuple[int, ...] = (256, 256, 64, 16)
    """batch size, one number for each grid"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of CPU threads to measure"""
    growth: tuple[int, ...] = (8, 16, 32, 64)
    """sides of the square grids on which the growth of time with the number of positions is fitted, at batch size 16; fewer than
    two leave it out"""
    dtype: Dtype = "float32"
    repeats: int = 5
    """measured repeats; the medians are printed"""
    json: Path | None = None
    """file to write the rows to"""
    device: Device = "auto"

    def prior(self, grid: tuple[int, int], device: torch.device) -> AutoregressivePrior:
        """A prior with random weights: speed does not depend on them."""
        torch.manual_seed(0)
        head, latents = HEADS[self.head]
        prior = AutoregressiveConfig(BACKBONES[self.backbone], head).build([latents(grid)]).to(device).eval()
        prior.backbone.to(getattr(torch, self.dtype))
        return prior

    def rows(self) -> Rows:
        """One row for each thread count and grid; then one row with the exponent of growth."""
        from pipelines.training.devices import open_fabric  # slow to import

        device = open_fabric(self.device).device
        for name, known in ((self.backbone, BACKBONES), (self.head, HEADS)):
            if name not in known:
                raise UserError(f"there is no {name!r}{nearest(name, known)}")
        grids = [grid_of(grid) for grid in self.grid]
        if len(grids) != len(self.batch) or min(self.batch, default=0) < 1:
            raise UserError(f"--batch needs one number from 1 up for each of the {len(grids)} grids")
        if not self.threads:
            raise UserError("--threads needs a number")
        check_least(self, threads=1, growth=1)
        rows = []
        for threads in self.threads:
            torch.set_num_threads(threads)
            for grid, batch in zip(grids, self.batch):
                rows.append({"backbone": self.backbone, "head": self.head} | self.row(grid, batch, device))
                say(sampling_line(rows[-1]))
        if len(self.growth) > 1:
            rows.append(self.growth_row(device))
            say(f"time grows with positions to the power {rows[-1]['exponent']:.2f}, from {rows[-1]['grids']}")
        return rows

    def growth_row(self, device: torch.device) -> dict[str, Any]:
        """The exponent of time ~ positions^exponent, by least squares on logarithms."""
        seconds = []
        for side in self.growth:
            prior = self.prior((side, side), device)
            indices = torch.arange(16, device=device)
            seconds.append(median_seconds({"sample": lambda p=prior, i=indices: p.sample(i, 0)}, 3)["sample"])  # type: ignore[misc]
        x, y = (torch.tensor([math.log(v) for v in values]) for values in ([side**2 for side in self.growth], seconds))
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return {"grids": [f"{side}x{side}" for side in self.growth], "seconds": seconds, "exponent": float(slope)}

    @torch.inference_mode()
    def row(self, grid: tuple[int, int], batch: int, device: torch.device) -> dict[str, Any]:
        prior = self.prior(grid, device)
        indices = torch.arange(batch, device=device)
        (latent,) = prior.sample(indices, 0)
        channels_last = self.prior(grid, device)
        channels_last.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        positions, tried = grid[0] * grid[1], 3

        dtype = getattr(torch, self.dtype)

        def features(prior: AutoregressivePrior) -> Tensor:
            inputs = prior.head.embed(prior.head.values(latent)).movedim(-1, 1).to(dtype)
            return prior.backbone(inputs, prior.position.to(dtype)).movedim(1, -1).to(prior.position.dtype)

        def few_full_passes() -> None:
            noise = uniforms(0, indices, torch.arange(tried, device=device), prior.head.uniforms_per_position(AS_FITTED))
            state: Any = prior.head.begin(noise, AS_FITTED)
            for position in range(tried):
                prior.head.draw(features(prior).flatten(1, 2)[:, position], position, state)

        parts: dict[str, Callable[[], object]] = {
            "forward": lambda: prior.head.log_prob(features(prior), prior.head.values(latent)),
            "forward, channels last": lambda: channels_last.head.log_prob(features(channels_last), prior.head.values(latent)),
            "sample": lambda: prior.sample(indices, 0),
            "full": few_full_passes,
        }
        seconds = median_seconds(parts, self.repeats)
        fastest = min(("forward", "forward, channels last"), key=lambda name: seconds[name])
        memory = {name: peak_bytes(parts[name], device) for name in (fastest, "sample")}
        return {
            "grid": f"{grid[0]}x{grid[1]}",
            "batch": batch,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "dtype": self.dtype,
            "parameters": sum(parameter.numel() for parameter in prior.parameters()),
            "forward_s": seconds[fastest],
            "sample_s": seconds["sample"],
            "ratio": seconds["sample"] / seconds[fastest],
            "full_loop_s": seconds["full"] / tried * positions,
            "full_loop_extrapolated": True,
            "images_per_s": batch / seconds["sample"],
            "forward_peak_bytes": memory[fastest],
            "sample_peak_bytes": memory["sample"],
        }

    def table(self, rows: Rows) -> str:
        return "ratio: sampling over one forward pass; full loop: the whole network for every position, extrapolated"


def grid_of(grid: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in grid.split("x"))
        assert height > 0 and width > 0
        return height, width
    except (ValueError, AssertionError) as error:
        raise UserError(f"a grid is HxW, for example 8x8, not {grid!r}") from error


def sampling_line(row: dict[str, Any]) -> str:
    return (
        f"{row['backbone']} {row['grid']:>6}, batch {row['batch']:4}, {row['device']}, {row['threads']} threads:"
        f" forward {1e3 * row['forward_s']:.1f} ms, sample {1e3 * row['sample_s']:.1f} ms, ratio {row['ratio']:.2f},"
        f" full loop {1e3 * row['full_loop_s']:.0f} ms, {row['images_per_s']:.0f} images/s,"
        f" memory ratio {row['sample_peak_bytes'] / row['forward_peak_bytes']:.2f}"
    )
