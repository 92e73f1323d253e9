"""Priors of the whole flattened latent, which ignore the grid: what they have in common.

B batch, D all numbers of one latent, E width of the label's embedding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stage2_prior.conditions import LabelCondition, RivalCondition, Unconditional
from stage2_prior.latents import LatentDataset, LatentSpec, check_levels, moments
from stage2_prior.prior import Prior, only
from stage2_prior.sampling import CannotSample, Sampling

LABEL_WIDTH = 64  # of the label's embedding, in the priors whose networks also see the label


@dataclass(frozen=True)
class FlattenedConfig:
    """Base of the configs of these priors."""

    condition: RivalCondition = field(default_factory=Unconditional)


class Flattened(nn.Module):
    """z ↔ (z - shift) / scale for each number. Both are estimated from data and saved with the weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, specs: list[LatentSpec], name: str):
        """name: of the prior, for error messages. Raises ValueError for codes, and for several levels."""
        super().__init__()
        if specs[0].vocabulary is not None:
            raise ValueError(
                f"a {name} models continuous latents, not codes: leave out --prior, or choose --prior autoregressive"
            )
        self.spec = only(specs)
        self.size = self.spec.dimensions
        self.register_buffer("shift", torch.zeros(self.size))
        self.register_buffer("scale", torch.ones(self.size))

    def estimate(self, dataset: LatentDataset) -> None:
        """Shift and scale become the mean and standard deviation of the aggregate posterior, for each number."""
        mean, variance = moments(only(dataset.subsample()))
        self.shift.copy_(mean.flatten())
        self.scale.copy_(variance.flatten().sqrt().clamp_min(1e-3))  # not 0 where a number never varies

    def values(self, levels: list[Tensor]) -> Tensor:
        """Standardized, B D. Raises ValueError for latents of another shape."""
        check_levels(levels, [self.spec])
        return (only(levels).flatten(1) - self.shift) / self.scale

    def latent(self, values: Tensor) -> list[Tensor]:
        """The inverse of `values`."""
        return [(values * self.scale + self.shift).view(-1, *self.spec.shape)]

    def log_volume(self) -> Tensor:
        """log p(values) - log p(latent): the log of the product of all scales."""
        return self.scale.log().sum()


class FlattenedPrior(Prior):
    """A prior of the standardized values, given the label if its config says so."""

    condition: LabelCondition | None

    def __init__(self, specs: list[LatentSpec], name: str, config: FlattenedConfig, classes: int, label_width: int = LABEL_WIDTH):
        """name: of the prior, for error messages. label_width: E.

        Raises ValueError for codes, for several levels, and for labels of a data set that has none.
        """
        super().__init__()
        self.flattened = Flattened(specs, name)
        one_position = LatentSpec((1, 1, 1))  # so that the label has one embedding, not a map
        self.condition = config.condition.build(label_width, [one_position], classes)

    def estimate(self, dataset: LatentDataset) -> None:
        """Standardize, and count the labels. Raises ValueError for missing contexts."""
        super().estimate(dataset)
        self.flattened.estimate(dataset)

    def forward(self, levels: list[Tensor], contexts: Tensor | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        return super().forward(levels, self.with_dropout(contexts), progress)

    def embedded(self, contexts: Tensor | None) -> Tensor | None:
        """B E; None for an unconditional prior. Raises CannotSample for a conditional prior without contexts."""
        map = self.embedded_contexts(contexts).map
        return None if map is None else map.flatten(1)

    def contexts_to_sample(self, indices: Tensor, seed: int, how: Sampling, contexts: Tensor | None) -> Tensor | None:
        """Contexts for these sample numbers, B: those given, or drawn ones.

        Raises CannotSample for contexts and settings in `how` that the prior does not have.
        """
        if how.guidance and self.condition is not None:
            raise CannotSample("only an autoregressive prior is guided toward a label: set a temperature instead")
        how.check(codes=False, contexts=False)
        return self.given_or_drawn(indices, seed, contexts)
