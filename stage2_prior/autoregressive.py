"""The autoregressive prior: for each level, embedding → causal backbone → head.

B batch, C latent channels, D width, h×w latent grid.

    log p(z) = Σ_i log p(z_i | z_<i), positions i in raster order

The head gives each factor, a density that depends on the backbone's features at position i.

Several levels, coarse to fine, have such a prior each, conditioned on the coarser levels (VQ-VAE-2, Razavi et al. 2019):

    log p(z_1, …, z_n) = Σ_l log p(z_l | z_1, …, z_(l-1))
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from stage2_prior.ancestral import Conditioned, sample_grid
from stage2_prior.conditions import (
    CaptionCondition,
    ClusterCondition,
    CoarserLevel,
    ConditionConfig,
    LabelCondition,
    Unconditional,
)
from stage2_prior.heads import CategoricalHead, GaussianMixture, HeadConfig
from stage2_prior.latents import LatentDataset, LatentSpec, check_levels
from stage2_prior.pixelcnn import PixelCNNConfig
from stage2_prior.pixelsnail import PixelSNAILConfig
from stage2_prior.prior import Prior, only
from stage2_prior.sampling import AS_FITTED, Sampling
from stage2_prior.transformer import TransformerConfig

BackboneConfig = PixelCNNConfig | PixelSNAILConfig | TransformerConfig


@dataclass(frozen=True)
class AutoregressiveConfig:
    """The learned prior of one level."""

    backbone: BackboneConfig = field(default_factory=PixelCNNConfig)
    head: HeadConfig = field(default_factory=GaussianMixture)
    condition: ConditionConfig = field(default_factory=Unconditional)
    input_noise: Annotated[float, Interval(ge=0, le=100)] = 0.0
    """largest noise on the backbone's inputs in training, in standard deviations of a latent channel, or as a share of codes that
    are replaced at random. The targets have none, so the prior learns to continue after its own errors. Each image has its own
    strength, uniform from 0 to the largest, which falls linearly to 0 over three quarters of the training"""

    @property
    def top(self) -> "AutoregressiveConfig":
        """The config of the coarsest level: this one. A CascadeConfig has the same attribute."""
        return self

    def build(self, specs: list[LatentSpec], classes: int = 0) -> "AutoregressivePrior":
        """classes: number of labels, 0 for none. Raises ValueError for several levels, and for parts that do not fit."""
        if len(specs) > 1:
            raise ValueError(f"{len(specs)} levels of latents need a prior for each: a CascadeConfig")
        return AutoregressivePrior(specs, self, classes)


NOISE_ENDS = 0.75  # share of the training after which inputs have no noise


class AutoregressivePrior(Prior):
    """The prior of one level, the last of `specs`, conditioned on the coarser levels before it."""

    def __init__(self, specs: list[LatentSpec], config: AutoregressiveConfig, classes: int = 0):
        super().__init__()
        *coarser, self.spec = self.specs = specs
        self.level = len(coarser)
        self.backbone = config.backbone.build()
        self.head = config.head.build(self.spec, self.backbone.width)
        self.input_noise = config.input_noise
        self._weaker: list[AutoregressivePrior] = []
        self.condition = config.condition.build(self.backbone.width, specs, classes)
        self.bounded = isinstance(self.condition, ClusterCondition)  # p(z) is a mixture; log_prob keeps one component
        self.coarser = nn.ModuleList(CoarserLevel(spec, self.spec.grid, self.backbone.width) for spec in coarser)
        # The distribution of a latent depends on its place in the image; this learned map tells the backbone the position.
        self.position = nn.Parameter(0.02 * torch.randn(1, self.backbone.width, *self.spec.grid))
        if self.backbone.needs_positions:
            self.show_positions()

    @torch.no_grad()
    def show_positions(self) -> None:
        """Initialize positions about as large as embeddings, where they are the only information about the grid.

        Embeddings of codes get the standard deviation of GPT (Radford et al. 2018, section 4.1), which the positions have
        already. Embeddings of continuous latents have one of about 0.6, so there the positions are scaled up, to 0.3.
        """
        if isinstance(self.head, CategoricalHead):
            nn.init.normal_(self.head.embedding.weight, std=0.02)
        else:
            self.position.mul_(15)

    @property
    def levels(self) -> "list[AutoregressivePrior]":
        """The priors of all levels: this one. A Cascade has the same attribute."""
        return [self]

    @property
    def weaker(self) -> "AutoregressivePrior | None":
        """The weaker copy for autoguidance, or None."""
        return self._weaker[0] if self._weaker else None

    def guide_by(self, weaker: "LearnedPrior") -> None:
        """Keep a weaker copy of this prior for autoguidance. It is not saved with the weights, and not trained."""
        self._weaker = [only(weaker.levels)]  # in a list, a module is no submodule

    def estimate(self, dataset: LatentDataset) -> None:
        """Fit the head's scales, and frequencies of labels or clusters. Raises ValueError for missing contexts."""
        super().estimate(dataset)
        self.head.estimate(dataset.subsample()[self.level])

    def conditioned(self, coarser: list[Tensor], contexts: Tensor | None) -> Conditioned:
        """Backbone and head with their conditions: the position on the grid, the coarser levels, and the context.

        Raises CannotSample for a conditional prior without contexts.
        """
        map = self.position
        for embed, codes in zip(self.coarser, coarser, strict=True):
            map = map + embed(codes)
        context = self.embedded_contexts(contexts)
        return Conditioned(self.backbone, self.head, map if context.map is None else map + context.map, context.prefix)

    def forward(self, levels: list[Tensor], contexts: Tensor | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        """The loss, with what training adds: contexts are dropped (see conditions.py) and inputs get noise."""
        noise = self.input_noise * max(0.0, 1 - progress / NOISE_ENDS) if self.training else 0.0
        return {"loss": -self.log_prob_by_position(levels, self.with_dropout(contexts), noise).flatten(1).sum(1).mean()}

    def log_prob_by_position(self, levels: list[Tensor], contexts: Tensor | None = None, noise: float = 0.0) -> Tensor:
        """log p(z_i | z_<i, coarser levels, context) in nats of raw latents, B h w.

        contexts: as in `forward`. A prior with clusters ignores them, and takes the cluster of each latent; its coarsest level
        also has log p(cluster), divided equally among its positions.
        noise: largest strength of noise on the inputs, in place of z_<i: see AutoregressiveConfig.input_noise.
        Raises ValueError for latents that do not fit, and CannotSample for a conditional prior without contexts.
        """
        check_levels(levels, self.specs)
        *coarser, latent = levels
        log_cluster: Tensor | float = 0.0
        if isinstance(self.condition, ClusterCondition):
            contexts = self.condition.assign(levels[0])
            if not coarser:
                log_cluster = self.condition.log_prob(contexts)[:, None, None] / math.prod(self.spec.grid)
        values = self.head.values(latent)
        condition = self.conditioned(coarser, contexts)
        fed = values if noise == 0 else self.head.perturbed(values, noise * torch.rand(len(values), 1, 1, device=values.device))
        inputs = (self.head.embed(fed).movedim(-1, 1), condition.map, condition.prefix)
        dtype = next(self.backbone.parameters()).dtype  # as in a cached step, of which inputs may have any
        features = self.backbone(*(x if x is None else x.to(dtype) for x in inputs))
        # Mixed precision may round the backbone, but not a density. The exception is the logits of codes in training: in full
        # precision they would take a third of a step. Their softmax is in full precision all the same.
        rounded = self.training and self.spec.vocabulary is not None and torch.is_autocast_enabled(features.device.type)
        with torch.autocast(features.device.type, enabled=rounded):
            return self.head.log_prob(features.movedim(1, -1).to(self.position.dtype), values) + log_cluster

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        """Nats per image in raw latents, B. Raises CannotSample for a conditional prior without contexts."""
        return self.log_prob_by_position(levels, contexts).flatten(1).sum(1)

    @torch.no_grad()
    def sample(
        self,
        indices: Tensor,
        seed: int,
        how: Sampling = AS_FITTED,
        contexts: Tensor | None = None,
        coarser: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Latents for these sample numbers, [B C h w] or [B h w] codes.

        contexts: one for each sample. None draws them with the frequencies of the training set.
        coarser: the coarser levels of each sample, for a prior that is conditioned on them.
        Raises CannotSample for contexts that do not fit, and for settings in `how` that this prior does not have.
        """
        batch = len(indices)
        how.check(
            codes=self.spec.vocabulary is not None, contexts=self.given_condition is not None, weaker=self.weaker is not None
        )
        contexts = self.given_or_drawn(indices, seed, contexts)
        if not batch:  # the compiled steps need a row
            dtype = self.position.dtype if self.spec.vocabulary is None else torch.int64
            return [self.position.new_empty(0, *self.spec.shape, dtype=dtype)]
        coarser = [] if coarser is None else coarser
        weaker: list[tuple[float, Conditioned]] = []
        if how.guidance:
            weaker.append((how.guidance, self.conditioned(coarser, self.null_contexts(batch))))
        if how.autoguidance:
            assert self.weaker is not None
            weaker.append((how.autoguidance, self.weaker.conditioned(coarser, contexts)))
        prior = self.conditioned(coarser, contexts)
        # As densities, draws are not rounded by mixed precision.
        with torch.autocast(indices.device.type, enabled=False):
            values = sample_grid(prior, self.spec.grid, indices, seed, how, stream=self.level, weaker=weaker)
        return [self.head.latent(values)]


@dataclass(frozen=True)
class CascadeConfig:
    """One autoregressive prior for each level, coarse to fine."""

    top: AutoregressiveConfig = field(default_factory=AutoregressiveConfig)
    bottom: AutoregressiveConfig = field(default_factory=AutoregressiveConfig)
    """the prior of each finer level"""

    @property
    def condition(self) -> ConditionConfig:
        return self.top.condition

    def build(self, specs: list[LatentSpec], classes: int = 0) -> "Cascade":
        """classes: number of labels, 0 for none. Raises ValueError for one level, and for parts that do not fit."""
        if len(specs) == 1:
            raise ValueError(
                "a cascade is for several levels of latents, not for one: leave out --prior, or choose --prior autoregressive"
            )
        if self.top.condition != self.bottom.condition:
            raise ValueError(
                f"all levels need the same condition, not {self.top.condition} on top and {self.bottom.condition} below: choose"
                " it by --prior.condition, which is that of all"
            )
        return Cascade([self.top, *[self.bottom] * (len(specs) - 1)], specs, classes)


class Cascade(Prior):
    """Priors of several levels, coarse to fine, each conditioned on the coarser levels. All have the same contexts."""

    def __init__(self, configs: list[AutoregressiveConfig], specs: list[LatentSpec], classes: int):
        super().__init__()
        priors = [AutoregressivePrior(specs[: level + 1], config, classes) for level, config in enumerate(configs)]
        self.levels: list[AutoregressivePrior] = nn.ModuleList(priors)  # type: ignore[assignment]
        self.bounded = priors[0].bounded

    @property
    def given_condition(self) -> LabelCondition | CaptionCondition | None:
        return self.levels[0].given_condition

    def estimate(self, dataset: LatentDataset) -> None:
        for prior in self.levels:
            prior.estimate(dataset)

    def guide_by(self, weaker: "LearnedPrior") -> None:
        """Keep a weaker copy of this prior for autoguidance: see AutoregressivePrior.guide_by."""
        for own, other in zip(self.levels, weaker.levels, strict=True):
            own.guide_by(other)

    def forward(self, levels: list[Tensor], contexts: Tensor | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        losses = [prior(levels[: level + 1], contexts, progress)["loss"] for level, prior in enumerate(self.levels)]
        return {"loss": torch.stack(losses).sum()}

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        return torch.stack([prior.log_prob(levels[: level + 1], contexts) for level, prior in enumerate(self.levels)]).sum(0)

    def draw_contexts(self, indices: Tensor, seed: int) -> Tensor | None:
        return self.levels[0].draw_contexts(indices, seed)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        """Sample coarse to fine. Arguments as in AutoregressivePrior.sample."""
        contexts = self.draw_contexts(indices, seed) if contexts is None else contexts
        drawn: list[Tensor] = []
        for prior in self.levels:
            drawn += prior.sample(indices, seed, how, contexts, coarser=drawn)
        return drawn


LearnedPrior = AutoregressivePrior | Cascade
