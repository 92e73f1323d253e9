"""Gaussian priors of continuous latents without gradient training: N(0, I), a mixture of Gaussians, and q(z) itself.

B batch, N encoded images, K mixture components, D all dimensions of the latent.
"""

import math

import torch
from torch import Tensor

from stage2_prior.heads import LOG_SQRT_2PI, tempered
from stage2_prior.latents import LatentDataset, LatentSpec, Posterior, draw, moments, parts_of
from stage2_prior.prior import Prior, ResizableBuffers, choosing_images, only
from stage2_prior.sampling import AS_FITTED, COMPONENT_STREAM, CannotSample, Sampling, choose, first_uniforms, normals

MIXTURE_DRAWS, MIXTURE_POINTS = 5, 20_000  # draws of z to fit a mixture to, per image and in all: see docs/trials.md
MIXTURE_BYTES = 2**28  # of these draws in float64; fitting takes several times as much
LARGEST_FULL_COVARIANCE = 1024  # dimensions; beyond it the Gaussian and the mixture are diagonal
GAUSSIANS_AT_ONCE, BYTES_AT_ONCE = 2048, 2**25  # in the density of the aggregate posterior
MOST_FULL = 10  # components with full covariances: fitting 50 takes minutes, with diagonal ones seconds


class StandardNormal(Prior):
    """N(0, I), the prior of the VAE's training."""

    def __init__(self, specs: list[LatentSpec]):
        super().__init__()
        self.shape = only(specs).shape

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        return (-0.5 * only(levels).square() - LOG_SQRT_2PI).flatten(1).sum(1)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        how.check(codes=False, contexts=False)
        return [how.temperature**0.5 * normals(seed, indices, self.shape)]


class GaussianMixturePrior(ResizableBuffers, Prior):
    """A mixture of K Gaussians over the flattened latent; with one component, the Gaussian with the moments of q(z).

    components: numbers K to try. `estimate` keeps the one with the lowest loss on images that it is not fitted to.

    Covariances are full up to LARGEST_FULL_COVARIANCE dimensions and MOST_FULL components, and diagonal beyond. The single
    Gaussian has the exact moments of the posteriors. Mixtures are fitted by scikit-learn's expectation-maximization to draws of
    z from random images, at most MIXTURE_DRAWS per image and MIXTURE_POINTS in all.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, specs: list[LatentSpec], *components: int):
        super().__init__()
        spec = only(specs)
        self.shape = spec.shape
        self.tried = components
        size, first = spec.dimensions, components[0]
        full = size <= LARGEST_FULL_COVARIANCE
        self.register_buffer("weights", torch.full((first,), 1 / first))
        self.register_buffer("means", torch.zeros(first, size))
        # Lower Cholesky factors of full covariances, K D D, or standard deviations, K D.
        self.register_buffer("factors", torch.eye(size).repeat(first, 1, 1) if full else torch.ones(first, size))

    def fits(self, found: dict[str, Tensor]) -> bool:
        components, size = found["weights"].numel(), self.means.shape[1]
        shapes = [tuple(found[name].shape) for name in ("weights", "means", "factors")]
        as_own = shapes[:2] == [(components,), (components, size)]
        scaled = shapes[2] in ((components, size), (components, size, size))
        positive = components and bool((found["weights"] >= 0).all() and found["weights"].sum() > 0)
        return bool(as_own and scaled and positive)

    @property
    def full(self) -> bool:
        """Whether covariances are full or diagonal."""
        return self.factors.ndim == 3

    def estimate(self, dataset: LatentDataset) -> None:
        if self.tried == (1,):
            self.match_moments(only(dataset.subsample()))
            return
        fitted, held_out = choosing_images(len(dataset))
        most = max(max(self.tried), min(MIXTURE_POINTS, MIXTURE_BYTES // (8 * self.means.shape[1])))
        levels, _ = dataset[fitted.repeat(MIXTURE_DRAWS)[:most]]
        judged = [draw(level).to(self.means) for level in dataset.posteriors(held_out)]
        found = []
        for components in self.tried:
            self.fit(only(levels), min(components, len(levels[0])))
            if not len(held_out):
                return
            found.append((float(self(judged)["loss"]), components, self.state_dict()))
        _, _, best = min(found, key=lambda fit: fit[:2])
        self.load_state_dict(best)

    def match_moments(self, posterior: Posterior) -> None:
        """Fit the single Gaussian to the moments of q(z)."""
        mean, variance = (moment.flatten() for moment in moments(posterior))
        variance = variance + 1e-6 * variance.mean()  # deterministic posteriors may have no variance in some directions
        self.means.copy_(mean[None])
        if not self.full:
            self.factors.copy_(variance.sqrt()[None])
            return
        covariance, means = mean.new_zeros(len(mean), len(mean)), posterior["mean"].flatten(1)
        for rows in parts_of(means):
            centred = means[rows].double() - mean
            covariance.addmm_(centred.T, centred, alpha=1 / len(means))
        covariance.diagonal().copy_(variance)  # q(z|x) is diagonal, so it adds only to variances
        self.factors.copy_(torch.linalg.cholesky(covariance)[None])

    def fit(self, points: Tensor, components: int) -> None:
        """Fit a mixture by expectation-maximization. points: N …."""
        from sklearn.mixture import GaussianMixture

        full = points[0].numel() <= LARGEST_FULL_COVARIANCE and components <= MOST_FULL
        mixture = GaussianMixture(
            components,
            covariance_type="full" if full else "diag",
            reg_covar=1e-4,
            max_iter=30,
            tol=0.1,  # nats an image: same held-out loss on mnist5k as with 0.01, in half the time
            init_params="kmeans" if components <= MOST_FULL else "k-means++",
            random_state=0,
        ).fit(points.flatten(1).double().cpu().numpy())
        covariances = torch.from_numpy(mixture.covariances_)
        factors = torch.linalg.cholesky(covariances) if full else covariances.sqrt()
        self.weights = torch.from_numpy(mixture.weights_).to(self.weights)
        self.means = torch.from_numpy(mixture.means_).to(self.means)
        self.factors = factors.to(self.factors).contiguous()  # in the memory layout of loaded files, for the same rounding

    def fitted_numbers(self) -> int:
        dimensions = self.means.shape[1]
        scales = dimensions * (dimensions + 1) // 2 if self.full else dimensions
        return len(self.weights) * (1 + dimensions + scales) - 1  # weights sum to one

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        value = only(levels).flatten(1)
        per_component = []
        for weight, mean, factor in zip(self.weights, self.means, self.factors):
            centred = (value - mean).T
            scale = factor.diagonal() if self.full else factor
            whitened = torch.linalg.solve_triangular(factor, centred, upper=False) if self.full else centred / scale[:, None]
            density = (-0.5 * whitened.square() - LOG_SQRT_2PI).sum(0) - scale.log().sum()
            per_component.append(weight.log() + density)
        return torch.stack(per_component, -1).logsumexp(-1)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        """Sample as `Prior.sample` says. The temperature is that of `tempered`."""
        how.check(codes=False, contexts=False)
        scales = self.factors.diagonal(dim1=-2, dim2=-1) if self.full else self.factors  # K D
        logits = tempered(self.weights.log(), scales.log(), how.temperature)
        component = choose(logits.expand(len(indices), -1), first_uniforms(seed, indices, COMPONENT_STREAM))
        noise = how.temperature**0.5 * normals(seed, indices, (self.means.shape[1],)).to(self.means)
        value = self.means[component]
        for k in component.unique():  # one component at a time: B D D factors would not fit in memory
            rows = component == k
            value[rows] += noise[rows] @ self.factors[k].T if self.full else noise[rows] * self.factors[k]
        return [value.view(-1, *self.shape)]


def gaussian_log_probs(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(value; mean, diag std²) of every value under every Gaussian, B N in float64. value: B D; mean and std: N D.

    On MPS, which has no float64, this is computed on the CPU.
    """
    if value.device.type == "mps":
        value, mean, std = value.cpu(), mean.cpu(), std.cpu()
    # Σ (z-m)²/s² = Σ z²/s² - 2 z·m/s² + m²/s², as matrix products; in float64, because the terms nearly cancel.
    value, mean, precision = value.double(), mean.double(), std.double().square().reciprocal()
    distance = value.square() @ precision.T - 2 * value @ (mean * precision).T + (mean.square() * precision).sum(1)
    return 0.5 * precision.log().sum(1) - value.shape[1] * LOG_SQRT_2PI - 0.5 * distance


class AggregatePosterior(Prior):
    """q(z) = 1/N Σ q(z|x_i) itself, as a reference. It is no generator: its samples decode to reconstructions of training images.

    `sample` draws from the posterior of a random training image, and raises CannotSample for any setting in `how`. `log_prob` is
    exact, and evaluates N Gaussians for each latent.
    """

    def __init__(self, dataset: LatentDataset):
        super().__init__()
        self.dataset = dataset

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        value = only(levels).flatten(1)
        at_once = max(1, min(GAUSSIANS_AT_ONCE, BYTES_AT_ONCE // (8 * value.shape[1])))
        totals: list[Tensor] = []
        for rows in torch.arange(len(self.dataset)).split(at_once):  # every posterior is read once, for all values
            posterior = only(self.dataset.posteriors(rows))
            mean, std = (posterior[name].flatten(1).to(value) for name in ("mean", "std"))
            parts = [gaussian_log_probs(part, mean, std).logsumexp(1) for part in value.split(at_once)]
            totals = [torch.logaddexp(total, part) for total, part in zip(totals, parts)] if totals else parts
        return torch.cat(totals).to(value) - math.log(len(self.dataset))

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        if how != AS_FITTED:
            raise CannotSample("posteriors of training images are drawn as they are: without temperature, top-k, top-p, guidance")
        chosen = (first_uniforms(seed, indices, COMPONENT_STREAM).cpu().double() * len(self.dataset)).long()
        levels = []
        for posterior in self.dataset.posteriors(chosen):
            posterior = {name: tensor.to(indices.device) for name, tensor in posterior.items()}
            shape = tuple(posterior["mean"].shape[1:]) if "mean" in posterior else ()
            levels.append(draw(posterior, normals(seed, indices, shape)))
        return levels
