"""The Prior contract, and the baselines that the learned prior is compared with.

B batch, C latent channels, h×w latent grid, N encoded images, K mixture components, D all dimensions of one level.

A prior takes all levels as a list, always, so that nothing that uses one loops over levels:

    forward(levels, step)          -> {"loss": …}, mean nats per image: what training calls
    log_prob(levels)               -> B, nats per image in raw latents
    sample(indices, seed, …)       -> levels; sample i under one seed is the same in any batch, up to rounding
    estimate(dataset)              -> fits what is not trained by gradient, into buffers
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from stage2_prior.heads import LOG_SQRT_2PI
from stage2_prior.latents import LatentDataset, LatentSpec, draw
from stage2_prior.sampling import AS_FITTED, Sampling, choose, normals, uniforms

LARGEST_FULL_COVARIANCE = 1024  # dimensions; beyond it the Gaussian and the mixture are diagonal
COMPONENT_STREAM = 1  # of the noise; the values of the latents use stream 0


T = TypeVar("T")


class Prior(nn.Module, ABC):
    def forward(self, levels: list[Tensor], step: int = 0) -> dict[str, Tensor]:
        return {"loss": -self.log_prob(levels).mean()}

    @abstractmethod
    def log_prob(self, levels: list[Tensor]) -> Tensor: ...

    @abstractmethod
    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED) -> list[Tensor]: ...

    def estimate(self, dataset: LatentDataset) -> None:
        """Fit what is not trained by gradient. N(0, I) has nothing to fit."""


def only(levels: list[T]) -> T:
    """The single level of a one-level prior."""
    if len(levels) != 1:
        raise ValueError(f"this prior models one level of latents, not {len(levels)}")
    return levels[0]


class StandardNormal(Prior):
    """N(0, I): what the VAE's training assumed."""

    def __init__(self, spec: LatentSpec):
        super().__init__()
        self.shape = spec.shape

    def log_prob(self, levels: list[Tensor]) -> Tensor:
        return (-0.5 * only(levels).square() - LOG_SQRT_2PI).flatten(1).sum(1)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED) -> list[Tensor]:
        return [how.temperature**0.5 * normals(seed, indices, self.shape)]


class GaussianMixturePrior(Prior):
    """A mixture of K Gaussians over the flattened latent; with one component, the Gaussian of q(z)'s own moments.

    Full covariances up to LARGEST_FULL_COVARIANCE dimensions, diagonal beyond. The mixture is fitted by scikit-learn's
    expectation-maximization to one draw of z for each image; the single Gaussian from the posteriors' exact moments.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, spec: LatentSpec, components: int):
        super().__init__()
        self.shape = spec.shape
        self.components = components
        self.full = spec.dimensions <= LARGEST_FULL_COVARIANCE
        size = spec.dimensions
        self.register_buffer("weights", torch.full((components,), 1 / components))
        self.register_buffer("means", torch.zeros(components, size))
        # Lower Cholesky factors, K D D, or standard deviations, K D.
        self.register_buffer("factors", torch.eye(size).repeat(components, 1, 1) if self.full else torch.ones(components, size))

    def estimate(self, dataset: LatentDataset) -> None:
        if self.components == 1:
            posterior = only(dataset.posteriors(slice(None)))
            mean, std = (posterior[name].flatten(1).double() for name in ("mean", "std"))
            # Law of total variance: Cov[z] = Cov[E[z|x]] + E[Var[z|x]].
            noise = std.square().mean(0)
            noise = noise + 1e-6 * (noise + mean.var(0, correction=0)).mean()  # a point posterior can leave directions empty
            self.means.copy_(mean.mean(0, keepdim=True))
            if self.full:
                covariance = torch.cov(mean.T, correction=0).reshape(len(noise), -1) + torch.diag(noise)
                self.factors.copy_(torch.linalg.cholesky(covariance)[None])
            else:
                self.factors.copy_((mean.var(0, correction=0) + noise).sqrt()[None])
            return
        from sklearn.mixture import GaussianMixture

        (levels,) = dataset[torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:20000]]
        points = only(levels).flatten(1).double().cpu().numpy()
        components = min(self.components, len(points))
        mixture = GaussianMixture(
            components, covariance_type="full" if self.full else "diag", reg_covar=1e-4, max_iter=30, tol=1e-2, random_state=0
        ).fit(points)
        self.weights.zero_()
        self.weights[:components] = torch.from_numpy(mixture.weights_)
        self.means[:components] = torch.from_numpy(mixture.means_)
        covariances = torch.from_numpy(mixture.covariances_)
        self.factors[:components] = (torch.linalg.cholesky(covariances) if self.full else covariances.sqrt()).to(self.factors)

    def log_prob(self, levels: list[Tensor]) -> Tensor:
        value = only(levels).flatten(1)
        per_component = []
        for weight, mean, factor in zip(self.weights, self.means, self.factors):
            centred = (value - mean).T
            scale = factor.diagonal() if self.full else factor
            whitened = torch.linalg.solve_triangular(factor, centred, upper=False) if self.full else centred / scale[:, None]
            density = (-0.5 * whitened.square() - LOG_SQRT_2PI).sum(0) - scale.log().sum()
            per_component.append(weight.log() + density)
        return torch.stack(per_component, -1).logsumexp(-1)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED) -> list[Tensor]:
        first = torch.zeros(1, dtype=torch.int64, device=indices.device)
        component = choose(
            self.weights.log().expand(len(indices), -1), uniforms(seed, indices, first, 1, COMPONENT_STREAM)[:, 0, 0]
        )
        noise = how.temperature**0.5 * normals(seed, indices, (self.means.shape[1],)).to(self.means)
        value = self.means[component]
        for k in component.unique():  # one factor at a time: a gathered B D D would not fit
            rows = component == k
            value[rows] += noise[rows] @ self.factors[k].T if self.full else noise[rows] * self.factors[k]
        return [value.view(-1, *self.shape)]


class AggregatePosterior(Prior):
    """q(z) = 1/N Σ q(z|x_i) itself: a z from the posterior of a random training image. Not a generator, a yardstick.

    Its samples decode to reconstructions of training images. Its density is exact, at the cost of N Gaussians a latent.
    """

    def __init__(self, dataset: LatentDataset):
        super().__init__()
        self.dataset = dataset

    def log_prob(self, levels: list[Tensor]) -> Tensor:
        value = only(levels).flatten(1)
        posterior = only(self.dataset.posteriors(slice(None)))
        mean, std = (posterior[name].flatten(1).to(value) for name in ("mean", "std"))
        # Σ (z-m)²/s² = Σ z²/s² - 2 z·m/s² + m²/s², three matrix products; in float64, because the terms nearly cancel.
        value, mean, precision = value.double(), mean.double(), std.double().square().reciprocal()
        distance = value.square() @ precision.T - 2 * value @ (mean * precision).T + (mean.square() * precision).sum(1)
        log_scale = 0.5 * precision.log().sum(1) - value.shape[1] * LOG_SQRT_2PI
        return (log_scale - 0.5 * distance).logsumexp(1).to(only(levels)) - torch.tensor(float(len(self.dataset))).log()

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED) -> list[Tensor]:
        first = torch.zeros(1, dtype=torch.int64, device=indices.device)
        uniform = uniforms(seed, indices, first, 1, COMPONENT_STREAM)[:, 0, 0].double()
        chosen = (uniform * len(self.dataset)).long()
        posterior = only(self.dataset.posteriors(chosen))
        shape = tuple(posterior["mean"].shape[1:])
        return [draw(posterior, how.temperature**0.5 * normals(seed, indices, shape))]


MIXTURE_COMPONENTS = 10
"""One Gaussian for each of ten classes would be the labelled version of this mixture."""

BASELINES: dict[str, Callable[[LatentSpec], Prior]] = {
    "standard": StandardNormal,
    "gaussian": lambda spec: GaussianMixturePrior(spec, components=1),
    "mixture": lambda spec: GaussianMixturePrior(spec, components=MIXTURE_COMPONENTS),
}
