"""What a study looks at, and what it finds."""

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.console import UserError
from pipelines.data.images import Splits
from pipelines.runs.dataset import load_data, read_facts
from pipelines.runs.parts import load_autoencoder, new_autoencoder, specs_of
from pipelines.runs.priors import WithoutContext, open_prior
from pipelines.runs.run import Run
from stage1_vae.autoencoder import Autoencoder
from stage1_vae.bottlenecks import gaussian_rate
from stage2_prior.prior import Prior

CHUNK = 500


@dataclass(frozen=True)
class Findings:
    sentences: list[str]
    numbers: dict[str, Any]
    figure: Figure


@dataclass(frozen=True)
class Trained:
    """What a study looks at."""

    run: Run
    splits: Splits
    autoencoder: Autoencoder
    standard: Prior

    @property
    def learned(self) -> Prior:
        """The learned prior without its label or caption. Raises UserError where there is none."""
        return WithoutContext(open_prior(self.run, "learned", specs_of(self.autoencoder)))

    @classmethod
    def of(cls, run: Run) -> "Trained":
        """Raises UserError where there is no q(z|x) over continuous latents."""
        built = new_autoencoder(run, read_facts(run).image_shape).bottleneck  # without weights
        if not (run.config.autoencoder.bottleneck.continuous and built.has_density):
            raise UserError(f"{run.folder} has no q(z|x) over continuous latents, which this study is about; use mnist5k")
        autoencoder = load_autoencoder(run)
        specs = specs_of(autoencoder)
        return cls(run, load_data(run), autoencoder, open_prior(run, "standard", specs))

    def on_device(self, tensor: Tensor) -> Tensor:
        return self.run.fabric.to_device(tensor)

    def held_out(self, count: int) -> Tensor:
        """Test images drawn at random (they may lie sorted by label), N C H W."""
        chosen = torch.randperm(len(self.splits.test), generator=torch.Generator().manual_seed(0))[:count]
        return self.splits.test.images[chosen]

    @torch.no_grad()
    def typical(self) -> Tensor:
        """The one of some test images whose rate is nearest their median, C H W."""
        images = self.held_out(500)
        (posterior,) = self.autoencoder.encode(self.on_device(images))
        rate = gaussian_rate(posterior["mean"], posterior["std"].log())
        return images[int((rate - rate.median()).abs().argmin())]
