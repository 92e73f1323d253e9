"""A mixture of learned posteriors, after the VampPrior (Tomczak and Welling 2018).

B batch, K components, D all numbers of one latent.

    p(z) = 1/K Σ_k N(z; m_k, diag s_k²);   with labels, p(z|y) = Σ_k w_k(y) N(z; m_k, diag s_k²)

The components of a VampPrior are the encoder's posteriors of K learned images. Here stage 1 is frozen, and stage 2 never sees an
image, so m_k and s_k are the parameters. Components start at the posterior means of K random training images, and as wide as all
of q(z). If they started as narrow as posteriors, only the nearest one would get a gradient, and training would take far longer.
All labels share the components, and learn weights of their own. At the start, a component weighs most for its image's label.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from stage2_prior.flattened import FlattenedConfig, FlattenedPrior
from stage2_prior.gaussians import gaussian_log_probs
from stage2_prior.heads import floored, tempered
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.prior import only
from stage2_prior.sampling import AS_FITTED, COMPONENT_STREAM, Sampling, choose, first_uniforms, normals

OWN_LABEL = 4.0  # log of how much more a component weighs for its own label, at the start


@dataclass(frozen=True)
class VampConfig(FlattenedConfig):
    """A mixture of learned posteriors, which start at those of random training images."""

    components: Annotated[int, Interval(ge=1, le=1_000_000)] = 500
    """number K of mixture components"""

    def build(self, specs: list[LatentSpec], classes: int = 0) -> "VampPrior":
        """classes: number of labels, 0 for none. Raises ValueError where parts do not fit."""
        return VampPrior(specs, self, classes)


class VampPrior(FlattenedPrior):
    """The mixture of standardized values, so that one learning rate suits all numbers of a latent."""

    def __init__(self, specs: list[LatentSpec], config: VampConfig, classes: int = 0):
        super().__init__(specs, "mixture of learned posteriors", config, classes, label_width=config.components)
        self.means = nn.Parameter(torch.zeros(config.components, self.flattened.size))
        self.log_stds = nn.Parameter(torch.zeros(config.components, self.flattened.size))

    @torch.no_grad()
    def estimate(self, dataset: LatentDataset) -> None:
        """Standardize, and set the components to their start."""
        super().estimate(dataset)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        chosen = order[torch.arange(len(self.means)) % len(order)]
        means = only(dataset.posteriors(chosen))["mean"]
        self.means.copy_(self.flattened.values([means.to(self.means)]))
        if self.condition is not None and self.condition.weights is None:  # labels that share no maps
            assert dataset.contexts is not None
            own = dataset.contexts[chosen].to(self.means.device)
            self.condition.maps.zero_()
            self.condition.maps[own, torch.arange(len(own))] = OWN_LABEL

    def stds(self) -> Tensor:
        """s_k of standardized values, K D."""
        return floored(self.log_stds).exp()

    def log_weights(self, contexts: Tensor | None) -> Tensor:
        """log w_k, B K or 1 K. Raises CannotSample for a conditional prior without contexts."""
        logits = self.embedded(contexts)
        return (self.means.new_zeros(1, len(self.means)) if logits is None else logits).log_softmax(1)

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        values = self.flattened.values(levels)
        densities = gaussian_log_probs(values, self.means, self.stds())  # of MPS, on the CPU
        return (densities + self.log_weights(contexts).to(densities.device)).logsumexp(1).to(values) - self.flattened.log_volume()

    @torch.no_grad()
    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        """Sample as `Prior.sample` says. The temperature is that of `tempered`."""
        contexts = self.contexts_to_sample(indices, seed, how, contexts)
        stds = self.stds()
        logits = tempered(self.log_weights(contexts), stds.log(), how.temperature)
        component = choose(logits.expand(len(indices), -1), first_uniforms(seed, indices, COMPONENT_STREAM))
        noise = math.sqrt(how.temperature) * normals(seed, indices, (self.flattened.size,)).to(stds)
        return self.flattened.latent(self.means[component] + noise * stds[component])
