"""Conditions of a prior: none, a class label, the cluster of the latent, a caption, the coarser levels of the same latent.

B batch, D width, K codes, T prefix length, h×w latent grid.

A condition embeds its context once, into a `map` (B D h w, added at every position) and a `prefix` (B T D, tokens
before the first position); backbones know nothing else. In training some contexts are replaced by the null context, so that
the same network also learns the unconditional density, which guidance needs (Ho and Salimans 2022, "Classifier-free diffusion
guidance").
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn

from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.sampling import CONTEXT_STREAM, CannotSample, choose, first_uniforms


class Embedded(NamedTuple):
    """Contexts as a backbone takes them."""

    map: Tensor | None  # B D h w, or 1 D h w for all
    prefix: Tensor | None  # B T D


@dataclass(frozen=True)
class Unconditional:
    """No condition."""

    def build(self, width: int, specs: list[LatentSpec], classes: int) -> None:
        return None


@dataclass(frozen=True)
class ClassLabel:
    """The class of the image."""

    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """share of labels dropped in training; 0.1 to 0.2 in the paper"""

    def build(self, width: int, specs: list[LatentSpec], classes: int) -> "LabelCondition":
        """specs: of the levels down to the one that is modelled. Raises ValueError when the data set has no labels."""
        if classes < 1:
            raise ValueError("a prior conditioned on class labels needs images with labels")
        return LabelCondition(width, specs[-1].grid, classes, self.dropout)


FEW = 64  # labels that each have a map of their own


class LabelCondition(nn.Module):
    """A map for each label, rather than one vector for the whole grid, and a last one for the null label.

    With many labels that would be most of a model: 1,000 on a 32×32 grid of width 64 have 66 million numbers. So more than FEW
    labels share FEW maps: the map of a label is a weighted sum of them.
    """

    frequencies: Tensor

    def __init__(self, width: int, grid: tuple[int, int], classes: int, dropout: float):
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.maps = nn.Parameter(0.1 * torch.randn(min(classes + 1, FEW), width, *grid))
        shared = classes + 1 > FEW
        self.weights = nn.Parameter(torch.randn(classes + 1, FEW) / FEW**0.5) if shared else None  # maps as large as without
        self.register_buffer("frequencies", torch.full((classes,), 1 / classes))

    def estimate(self, contexts: Tensor) -> None:
        """Count how often each label occurs."""
        counts = torch.bincount(contexts, minlength=self.classes).to(self.frequencies)
        self.frequencies.copy_(counts / counts.sum())

    def draw(self, indices: Tensor, seed: int) -> Tensor:
        """A label for each sample number, as often as in the training set; B."""
        return choose(self.frequencies.log().expand(len(indices), -1), first_uniforms(seed, indices, CONTEXT_STREAM))

    def null(self, batch: int) -> Tensor:
        """The null label; B."""
        return torch.full((batch,), self.classes, device=self.frequencies.device)

    def with_dropout(self, contexts: Tensor) -> Tensor:
        """For training: each label is replaced by the null label with the probability `dropout`; B."""
        dropped = torch.rand(len(contexts), device=contexts.device) < self.dropout
        return torch.where(dropped, self.classes, contexts)

    def forward(self, contexts: Tensor) -> Embedded:
        """contexts: labels 0 … classes, B, the last of which is the null label. Raises CannotSample for another."""
        if not self.training and not ((contexts >= 0) & (contexts <= self.classes)).all():
            raise CannotSample(f"labels are numbers from 0 to {self.classes - 1}")
        if self.weights is None:
            return Embedded(self.maps[contexts], None)
        return Embedded(torch.einsum("b k, k d h w -> b d h w", self.weights[contexts], self.maps), None)


@dataclass(frozen=True)
class Cluster:
    """The cluster that the latent lies in, for images without labels.

    Without a condition, a prior decides position by position what it draws, and where it is undecided it draws what is neither
    one thing nor another. A cluster decides it from the start, as a label does (Liu et al. 2020, "Diverse image generation via
    self-conditioned GANs"; Bao et al. 2022, "Why are conditional generative models better than unconditional ones?").
    """

    clusters: Annotated[int, Interval(ge=1, le=10_000)] = 30
    """the most clusters; fewer where there are not 20 images for each"""

    def build(self, width: int, specs: list[LatentSpec], classes: int) -> "ClusterCondition":
        return ClusterCondition(width, specs, self.clusters)


FEWEST_MEMBERS = 20  # images for each cluster
CLUSTERED_POINTS, CLUSTERED_BYTES = 20_000, 2**28  # latents that clusters are found in, at most
VECTOR = 16  # numbers that stand for a code: principal components of its vector


class ClusterCondition(nn.Module):
    """Clusters of the coarsest level, which k-means finds in the posteriors' means, or in the vectors that codes stand for.

    No contexts are given. The cluster k(z) is a function of the latent, and samples draw one with the probability p(k):

        p(z) = Σ_k p(k) p(z|k) ≥ p(k(z)) p(z|k(z))

    The right side is what training maximizes and what the prior's `log_prob` returns: a bound, in one pass of the network.
    """

    centres: Tensor
    vectors: Tensor

    def __init__(self, width: int, specs: list[LatentSpec], clusters: int):
        super().__init__()
        self.labels = LabelCondition(width, specs[-1].grid, clusters, dropout=0.0)
        codes = specs[0].vocabulary or 0
        self.register_buffer("centres", torch.zeros(clusters, specs[0].dimensions * (VECTOR if codes else 1)))
        self.register_buffer("vectors", torch.zeros(codes, VECTOR))  # of each code; none for continuous latents

    @property
    def frequencies(self) -> Tensor:
        """p(k)."""
        return self.labels.frequencies

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Latents of the coarsest level, B C h w or B h w codes, as what distances are taken between: B D."""
        return (self.vectors[latents] if len(self.vectors) else latents.to(self.centres)).flatten(1)

    def fit(self, dataset: LatentDataset) -> None:
        """The clusters of a data set, and how often each occurs. Raises ValueError for codes without their vectors."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        posterior = dataset.sample()[0]
        latents = posterior["codes"] if "codes" in posterior else posterior["mean"]
        if len(self.vectors):
            if dataset.vectors is None:
                raise ValueError("clusters of codes need the vectors that the codes stand for")
            found = components(dataset.vectors, latents)
            self.vectors.zero_()[:, : found.shape[1]] = found.to(self.vectors)
        most = max(1, min(CLUSTERED_POINTS, CLUSTERED_BYTES // (4 * self.centres.shape[1])))
        some = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:most]
        points = self.embed_latents(latents[some].to(self.centres.device)).float().cpu()
        clusters = max(1, min(len(self.centres), len(points) // FEWEST_MEMBERS))
        # One thread, since the order in which several add up differs from run to run; fewer distinct points than clusters are no
        # fault, the others stay empty.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = KMeans(clusters, random_state=0).fit(points.numpy())
        self.centres.zero_()[:clusters] = torch.from_numpy(fitted.cluster_centers_).to(self.centres)
        self.labels.estimate(torch.from_numpy(fitted.labels_).long())

    def assign(self, latents: Tensor) -> Tensor:
        """The cluster of each latent of the coarsest level, B."""
        with torch.autocast(latents.device.type, enabled=False):
            distance = self.centres.square().sum(1) - 2 * self.embed_latents(latents) @ self.centres.T
        return distance.masked_fill(self.frequencies == 0, torch.inf).argmin(1)

    def log_prob(self, clusters: Tensor) -> Tensor:
        """log p(k), B nats."""
        return self.frequencies[clusters].log()

    def draw(self, indices: Tensor, seed: int) -> Tensor:
        """A cluster for each sample number, as often as in the training set; B."""
        return self.labels.draw(indices, seed)

    def forward(self, contexts: Tensor) -> Embedded:
        """contexts: clusters, B."""
        return self.labels(contexts)


def components(vectors: Tensor, codes: Tensor) -> Tensor:
    """The first principal components of the codes' vectors K D, at most VECTOR, weighed by how often the codes N h w occur."""
    weights = torch.bincount(codes.flatten(), minlength=len(vectors)).double() / codes.numel()
    centred = vectors.double() - weights @ vectors.double()
    axes = torch.linalg.svd(weights.sqrt()[:, None] * centred, full_matrices=False).Vh[:VECTOR]
    return centred @ axes.T


BYTES_AND_PADDING = 257  # tokens that any tokenizer of captions has


@dataclass(frozen=True)
class Caption:
    """A caption, as tokens before the first position of the latent (DALL-E, Ramesh et al. 2021)."""

    vocabulary: Annotated[int, Interval(ge=BYTES_AND_PADDING, le=1_000_000)] = 1000
    """largest number of kinds of tokens"""
    length: Annotated[int, Interval(ge=1, le=10_000)] = 16
    """tokens of a caption; longer ones are cut"""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """share of captions dropped in training"""

    def build(self, width: int, specs: list[LatentSpec], classes: int) -> "CaptionCondition":
        return CaptionCondition(width, self)


class CaptionCondition(nn.Module):
    def __init__(self, width: int, config: Caption):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(config.length, width))

    def estimate(self, contexts: Tensor) -> None:
        """Captions are conditioned on, never modelled."""

    def draw(self, indices: Tensor, seed: int) -> Tensor:
        """The null caption: captions have no density to draw from; B T."""
        return self.null(len(indices))

    def null(self, batch: int) -> Tensor:
        """The null caption; B T."""
        return torch.zeros(batch, self.config.length, dtype=torch.int64, device=self.position.device)

    def with_dropout(self, contexts: Tensor) -> Tensor:
        """For training: each caption is replaced by the null caption with the probability `dropout`; B T."""
        return contexts.masked_fill(torch.rand(len(contexts), 1, device=contexts.device) < self.config.dropout, 0)

    def forward(self, contexts: Tensor) -> Embedded:
        """contexts: tokens, B T, where 0 is padding and the null caption is all padding."""
        return Embedded(None, self.embedding(contexts) + self.position)


COARSER_BLOCKS = 4


class CoarserLevel(nn.Module):
    """A coarser level of codes to a map of a finer grid, through a small residual network (VQ-VAE-2, Razavi et al. 2019)."""

    def __init__(self, coarse: LatentSpec, grid: tuple[int, int], width: int):
        """Raises ValueError where the grids do not nest."""
        super().__init__()
        if coarse.vocabulary is None:
            raise ValueError("more than one level of latents needs codes, not continuous latents")
        self.rows, self.columns = (fine // coarser for fine, coarser in zip(grid, coarse.grid))
        if grid != (self.rows * coarse.grid[0], self.columns * coarse.grid[1]):
            raise ValueError(f"a {coarse.grid} grid does not nest in a {grid} grid: every coarse cell holds whole finer ones")
        self.embedding = nn.Embedding(coarse.vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))
            for _ in range(COARSER_BLOCKS)
        )
        self.unfold = nn.Conv2d(width, width * self.rows * self.columns, 1)

    def forward(self, codes: Tensor) -> Tensor:
        """codes B h w; returns B D rows·h columns·w."""
        x = self.embedding(codes).movedim(-1, 1)
        for block in self.blocks:
            x = x + block(x)
        return rearrange(self.unfold(x), "b (d r c) h w -> b d (h r) (w c)", r=self.rows, c=self.columns)


ConditionConfig = Unconditional | ClassLabel | Cluster | Caption
