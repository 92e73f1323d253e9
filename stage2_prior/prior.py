"""The Prior contract, and the baselines that the learned prior is compared with.

B batch, C latent channels, h×w latent grid, N encoded images, K mixture components, D all dimensions of one level.

A prior takes all levels as a list, always, so that nothing that uses one loops over levels:

    forward(levels, contexts, progress) -> {"loss": …}, mean nats per image: what training calls
    log_prob(levels, contexts)      -> B, nats per image in raw latents
    sample(indices, seed, …)        -> levels; sample i under one seed is the same in any batch, up to rounding
    estimate(dataset)               -> fits what is not trained by gradient, into buffers

contexts, B …, is what a conditional prior is told of each image, such as its label; the baselines pay it no attention.
`sample` raises CannotSample where `how` asks for what a prior does not have: top-k and top-p need codes, guidance a context.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from stage2_prior.heads import LOG_SQRT_2PI, NUMBERS_AT_ONCE, tempered, truncated
from stage2_prior.latents import LatentDataset, LatentSpec, draw
from stage2_prior.sampling import (
    AS_FITTED,
    COMPONENT_STREAM,
    CannotSample,
    Sampling,
    choose,
    choose_many,
    first_uniforms,
    normals,
    uniforms,
)

# What the mixture is fitted to: at most five draws an image, and 20,000 in all. With one draw of each of 3,800 images of mnist5k
# it costs 197 nats an image on held-out latents, worse than N(0, I) with 171; with five, 140. Of more images, one draw of each
# of 20,000 is better than five of each of 4,000: 246.4 against 251.6 nats on mnist.
MIXTURE_DRAWS, MIXTURE_POINTS = 5, 20_000
MIXTURE_BYTES = 2**28  # of these points in float64; fitting takes a multiple of it
LARGEST_FULL_COVARIANCE = 1024  # dimensions; beyond it the Gaussian and the mixture are diagonal
GAUSSIANS_AT_ONCE, BYTES_AT_ONCE = 2048, 2**25  # of the aggregate posterior's density
MOST_FULL = 10  # components with full covariances: fitting fifty takes minutes; diagonal ones, seconds


T = TypeVar("T")


class Prior(nn.Module, ABC):
    bounded = False
    """Whether `log_prob` is a lower bound rather than the density itself."""

    def forward(self, levels: list[Tensor], contexts: Tensor | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        return {"loss": -self.log_prob(levels, contexts).mean()}

    @abstractmethod
    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]: ...

    def estimate(self, dataset: LatentDataset) -> None:
        """Fit what is not trained by gradient. N(0, I) has nothing to fit."""

    def draw_contexts(self, indices: Tensor, seed: int) -> Tensor | None:
        """Contexts as frequent as in the training set, one for each sample number; None where the prior is told nothing."""
        return None

    def fitted_numbers(self) -> int:
        """How many numbers are trained or fitted."""
        return sum(parameter.numel() for parameter in self.parameters())


def only(levels: list[T]) -> T:
    """The single level of a one-level prior."""
    if len(levels) != 1:
        raise ValueError(f"this prior models one level of latents, not {len(levels)}")
    return levels[0]


def gaussian_log_probs(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(value; mean, diag std²) of every value under every Gaussian, B N in float64: value B D, mean and std N D.

    On the CPU where the device, MPS, has no float64.
    """
    if value.device.type == "mps":
        value, mean, std = value.cpu(), mean.cpu(), std.cpu()
    # Σ (z-m)²/s² = Σ z²/s² - 2 z·m/s² + m²/s², three matrix products; in float64, because the terms nearly cancel.
    value, mean, precision = value.double(), mean.double(), std.double().square().reciprocal()
    distance = value.square() @ precision.T - 2 * value @ (mean * precision).T + (mean.square() * precision).sum(1)
    return 0.5 * precision.log().sum(1) - value.shape[1] * LOG_SQRT_2PI - 0.5 * distance


class StandardNormal(Prior):
    """N(0, I): what the VAE's training assumed."""

    def __init__(self, specs: list[LatentSpec]):
        super().__init__()
        self.shape = only(specs).shape

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        return (-0.5 * only(levels).square() - LOG_SQRT_2PI).flatten(1).sum(1)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        how.check(codes=False, contexts=False)
        return [how.temperature**0.5 * normals(seed, indices, self.shape)]


class Sized(nn.Module):
    """A module whose buffers have as many numbers as the data ask for: loading a state, it takes on the sizes there.

    load_state_dict raises RuntimeError where these do not fit, as for any module.
    """

    def fits(self, found: dict[str, Tensor]) -> bool:
        """Whether tensors, by the names of the buffers, can be a state of this module."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        found = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if len(found) == len(self._buffers):
            if not self.fits(found):
                errors.append(f"{prefix or type(self).__name__}: sizes or values do not fit")
                return
            own = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
            self._buffers.update({name: buffer.new_empty(found[name].shape) for name, buffer in own.items()})
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def choosing_images(count: int) -> tuple[Tensor, Tensor]:
    """Of so many images those to fit to, and those to choose a setting of the fit by: a twentieth, at most 1,000; at random."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = min(count // 20, 1000)
    return order[held_out:], order[:held_out]


class GaussianMixturePrior(Sized, Prior):
    """A mixture of K Gaussians over the flattened latent; with one component, the Gaussian of q(z)'s own moments.

    components: several numbers to try. The one with the lowest loss on images that it is not fitted to is taken.

    Full covariances up to LARGEST_FULL_COVARIANCE dimensions and MOST_FULL components, diagonal beyond. The mixture is fitted by
    scikit-learn's expectation-maximization to draws of z, at most MIXTURE_DRAWS an image and MIXTURE_POINTS in all, of images
    chosen at random; the single Gaussian from the posteriors' exact moments.
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
        # Lower Cholesky factors, K D D, or standard deviations, K D.
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
        """Whether covariances are full, rather than diagonal."""
        return self.factors.ndim == 3

    def estimate(self, dataset: LatentDataset) -> None:
        if self.tried == (1,):
            posterior = only(dataset.sample())
            means, stds = (posterior[name].flatten(1) for name in ("mean", "std"))
            parts = torch.arange(len(means)).split(max(1, NUMBERS_AT_ONCE // means.shape[1]))  # few are held in float64 at once

            def average(of: Callable[[Tensor], Tensor]) -> Tensor:
                return torch.stack([of(rows) for rows in parts]).sum(0) / len(means)

            # Law of total variance: Cov[z] = Cov[E[z|x]] + E[Var[z|x]].
            mean = average(lambda rows: means[rows].double().sum(0))
            noise = average(lambda rows: stds[rows].double().square().sum(0))
            variance = average(lambda rows: (means[rows].double() - mean).square().sum(0))
            noise = noise + 1e-6 * (noise + variance).mean()  # a point posterior can leave directions empty
            self.means.copy_(mean[None])
            if self.full:
                covariance = torch.diag(noise)
                for centred in (means[rows].double() - mean for rows in parts):
                    covariance.addmm_(centred.T, centred, alpha=1 / len(means))
                self.factors.copy_(torch.linalg.cholesky(covariance)[None])
            else:
                self.factors.copy_((variance + noise).sqrt()[None])
            return
        fitted, held_out = choosing_images(len(dataset))
        most = max(max(self.tried), min(MIXTURE_POINTS, MIXTURE_BYTES // (8 * self.means.shape[1])))
        levels, _ = dataset[fitted.repeat(MIXTURE_DRAWS)[:most]]
        judged, found = [draw(level).to(self.means) for level in dataset.posteriors(held_out)], []
        for components in self.tried:
            self.fit(only(levels), min(components, len(levels[0])))
            if not len(held_out):
                return
            loss = float(self(judged)["loss"])
            found.append((loss, components, self.weights, self.means, self.factors))
        _, _, self.weights, self.means, self.factors = min(found, key=lambda fit: fit[:2])

    def fit(self, points: Tensor, components: int) -> None:
        """points: N D."""
        from sklearn.mixture import GaussianMixture

        full = points[0].numel() <= LARGEST_FULL_COVARIANCE and components <= MOST_FULL
        mixture = GaussianMixture(
            components,
            covariance_type="full" if full else "diag",
            reg_covar=1e-4,
            max_iter=30,
            tol=0.1,  # nats an image: held-out latents of mnist5k cost as much as at 0.01, and the fit takes half the time
            init_params="kmeans" if components <= MOST_FULL else "k-means++",
            random_state=0,
        ).fit(points.flatten(1).double().cpu().numpy())
        covariances = torch.from_numpy(mixture.covariances_)
        factors = torch.linalg.cholesky(covariances) if full else covariances.sqrt()
        self.weights = torch.from_numpy(mixture.weights_).to(self.weights)
        self.means = torch.from_numpy(mixture.means_).to(self.means)
        self.factors = factors.to(self.factors).contiguous()  # as files give them back, for the same rounding

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
        """See `tempered` for what the temperature does."""
        how.check(codes=False, contexts=False)
        scales = self.factors.diagonal(dim1=-2, dim2=-1) if self.full else self.factors  # K D; their product is the volume
        logits = tempered(self.weights.log(), scales.log(), how.temperature)
        component = choose(logits.expand(len(indices), -1), first_uniforms(seed, indices, COMPONENT_STREAM))
        noise = how.temperature**0.5 * normals(seed, indices, (self.means.shape[1],)).to(self.means)
        value = self.means[component]
        for k in component.unique():  # one factor at a time: a gathered B D D would not fit
            rows = component == k
            value[rows] += noise[rows] @ self.factors[k].T if self.full else noise[rows] * self.factors[k]
        return [value.view(-1, *self.shape)]


class IndependentCodes(Prior):
    """Codes that know nothing of each other: all equally likely, or as frequent at each position as in the training set."""

    def __init__(self, specs: list[LatentSpec], fitted: bool):
        super().__init__()
        self.specs, self.fitted = specs, fitted
        for level, spec in enumerate(specs):
            assert spec.vocabulary is not None
            self.register_buffer(
                f"log_probabilities_{level}", torch.full((*spec.grid, spec.vocabulary), -math.log(spec.vocabulary))
            )

    def tables(self) -> list[Tensor]:
        """For each level, log p of every code at every position: h w K."""
        return [getattr(self, f"log_probabilities_{level}") for level in range(len(self.specs))]

    def estimate(self, dataset: LatentDataset) -> None:
        """Count, with one more of every code so that none is impossible."""
        if self.fitted:
            for table, posterior in zip(self.tables(), dataset.sample()):
                cells = torch.arange(0, table.numel(), table.shape[-1], device=table.device).view(table.shape[:-1])
                counts = torch.ones_like(table)
                for codes in posterior["codes"].long().split(1000):
                    counts += torch.bincount((cells + codes).flatten(), minlength=table.numel()).view_as(table)
                table.copy_((counts / counts.sum(-1, keepdim=True)).log())

    def fitted_numbers(self) -> int:
        return sum(table[..., 1:].numel() for table in self.tables()) if self.fitted else 0

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        total = torch.zeros(len(levels[0]), device=levels[0].device)
        for table, codes in zip(self.tables(), levels, strict=True):
            total = total + table.expand(len(codes), *table.shape).gather(-1, codes[..., None]).flatten(1).sum(1)
        return total

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        how.check(codes=True, contexts=False)
        levels = []
        for level, (table, spec) in enumerate(zip(self.tables(), self.specs)):
            logits = truncated(table.flatten(0, 1), how)
            positions = torch.arange(len(logits), device=indices.device)
            noise = uniforms(seed, indices, positions, 1, level)[..., 0]
            levels.append(choose_many(logits, noise.T.contiguous()).T.reshape(-1, *spec.grid))
        return levels


class AggregatePosterior(Prior):
    """q(z) = 1/N Σ q(z|x_i) itself: a z from the posterior of a random training image. Not a generator, a yardstick.

    Its samples decode to reconstructions of training images, and are drawn as they are: `sample` raises CannotSample where
    `how` asks for anything else. Its density is exact, at the cost of N Gaussians a latent.
    """

    def __init__(self, dataset: LatentDataset):
        super().__init__()
        self.dataset = dataset

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        value = only(levels).flatten(1)
        at_once = max(1, min(GAUSSIANS_AT_ONCE, BYTES_AT_ONCE // (8 * value.shape[1])))
        totals: list[Tensor] = []
        for rows in torch.arange(len(self.dataset)).split(at_once):  # each is read once, however many values there are
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
