"""Conditions of a prior: none, a class label, the latent's cluster, a caption, and the coarser levels of the same latent.

B batch, D width, K codes, T prefix length, h×w latent grid.

A condition embeds its context into a `map` (B D h w, added at every position) and a `prefix` (B T D, tokens before the first
position). Backbones know no other conditions. In training a share of the contexts is replaced by the null context. The network
then also learns the unconditional density, which guidance needs (Ho and Salimans 2022, "Classifier-free diffusion guidance").

Every `build` takes the backbone's width D, the specs of the levels down to the one that is modelled, coarse to fine, and the
number of classes of the data set, 0 for none.
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
    """Embedded contexts, the inputs of a backbone."""

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
        """Raises ValueError where the data set has no labels."""
        if classes < 1:
            raise ValueError(
                "a prior conditioned on class labels needs images with labels: sort them into a folder for each, or use another"
                " condition"
            )
        return LabelCondition(width, specs[-1].grid, classes, self.dropout)


FEW = 64  # maps at most; more labels share them


class LabelCondition(nn.Module):
    """A map D h w for each label, not only one vector for the whole grid. The null label has a map too, the last one.

    Maps of many labels would be most of a model: 1,000 labels on a 32×32 grid of width 64 need 66 million numbers. So more than
    FEW labels share FEW maps: the map of each label is a weighted sum of these.
    """

    frequencies: Tensor

    def __init__(self, width: int, grid: tuple[int, int], classes: int, dropout: float):
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.maps = nn.Parameter(0.1 * torch.randn(min(classes + 1, FEW), width, *grid))
        shared = classes + 1 > FEW  # weighted sums start as large as single maps
        self.weights = nn.Parameter(torch.randn(classes + 1, FEW) / FEW**0.5) if shared else None
        self.register_buffer("frequencies", torch.full((classes,), 1 / classes))

    def estimate(self, dataset: LatentDataset) -> None:
        """Count how often each label occurs."""
        assert dataset.contexts is not None
        self.count(dataset.contexts)

    def count(self, labels: Tensor) -> None:
        counts = torch.bincount(labels, minlength=self.classes).to(self.frequencies)
        self.frequencies.copy_(counts / counts.sum())

    def draw(self, indices: Tensor, seed: int) -> Tensor:
        """A label for each sample number, with the frequencies of the training set; B."""
        return choose(self.frequencies.log().expand(len(indices), -1), first_uniforms(seed, indices, CONTEXT_STREAM))

    def null(self, batch: int) -> Tensor:
        """The null label; B."""
        return torch.full((batch,), self.classes, device=self.frequencies.device)

    def with_dropout(self, contexts: Tensor) -> Tensor:
        """In training: replace each label by the null label with probability `dropout`; B."""
        dropped = torch.rand(len(contexts), device=contexts.device) < self.dropout
        return torch.where(dropped, self.classes, contexts)

    def forward(self, contexts: Tensor) -> Embedded:
        """contexts: labels 0 … classes, B; `classes` is the null label. Outside training, raises CannotSample for others."""
        if not self.training and not ((contexts >= 0) & (contexts <= self.classes)).all():
            raise CannotSample(f"labels are numbers from 0 to {self.classes - 1}")
        if self.weights is None:
            return Embedded(self.maps[contexts], None)
        return Embedded(torch.einsum("b k, k d h w -> b d h w", self.weights[contexts], self.maps), None)


@dataclass(frozen=True)
class Cluster:
    """The cluster of the latent, for images without labels.

    An unconditional prior decides position by position what to draw. While it is undecided, it can draw a mixture of two things.
    A cluster, like a label, decides at the start (Liu et al. 2020, "Diverse image generation via self-conditioned GANs"; Bao et
    al. 2022, "Why are conditional generative models better than unconditional ones?").
    """

    clusters: Annotated[int, Interval(ge=1, le=10_000)] = 30
    """largest number of clusters; small data sets have one for every 20 images at most"""

    def build(self, width: int, specs: list[LatentSpec], classes: int) -> "ClusterCondition":
        return ClusterCondition(width, specs, self.clusters)


FEWEST_MEMBERS = 20  # images for each cluster, on average
CLUSTERED_POINTS, CLUSTERED_BYTES = 20_000, 2**28  # at most, of the latents that k-means is fitted to
VECTOR = 16  # principal components that represent a code's vector


class ClusterCondition(nn.Module):
    """K-means clusters of the coarsest level: of posterior means, or of the vectors of codes.

    Densities take no contexts: the cluster k(z) is a function of the latent. Sampling draws a cluster from p(k), or takes the
    numbers of clusters as contexts:

        p(z) = Σ_k p(k) p(z|k) ≥ p(k(z)) p(z|k(z))

    Training maximizes the right side, and the prior's `log_prob` returns it. It is a bound that takes one pass of the network.
    """

    centres: Tensor
    vectors: Tensor

    def __init__(self, width: int, specs: list[LatentSpec], clusters: int):
        super().__init__()
        self.labels = LabelCondition(width, specs[-1].grid, clusters, dropout=0.0)
        codes = specs[0].vocabulary or 0
        self.register_buffer("centres", torch.zeros(clusters, specs[0].dimensions * (VECTOR if codes else 1)))
        self.register_buffer("vectors", torch.zeros(codes, VECTOR))  # of the codes, after PCA; empty for continuous latents

    @property
    def frequencies(self) -> Tensor:
        """p(k)."""
        return self.labels.frequencies

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Latents of the coarsest level, B C h w or codes B h w, to the points that k-means clusters, one vector each."""
        return (self.vectors[latents] if len(self.vectors) else latents.to(self.centres)).flatten(1)

    def estimate(self, dataset: LatentDataset) -> None:
        """Fit the clusters and their frequencies to a data set. Raises ValueError for codes without their vectors."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        posterior = dataset.subsample()[0]
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
        # One thread, because with several the order of additions differs from run to run. Fewer distinct points than clusters
        # make a warning; the remaining clusters stay empty, which does no harm.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = KMeans(clusters, random_state=0).fit(points.numpy())
        self.centres.zero_()[:clusters] = torch.from_numpy(fitted.cluster_centers_).to(self.centres)
        self.labels.count(torch.from_numpy(fitted.labels_).long())

    def assign(self, latents: Tensor) -> Tensor:
        """The cluster of each latent of the coarsest level, B."""
        with torch.autocast(latents.device.type, enabled=False):
            distance = self.centres.square().sum(1) - 2 * self.embed_latents(latents) @ self.centres.T
        return distance.masked_fill(self.frequencies == 0, torch.inf).argmin(1)

    def log_prob(self, clusters: Tensor) -> Tensor:
        """log p(k), B nats."""
        return self.frequencies[clusters].log()

    def draw(self, indices: Tensor, seed: int) -> Tensor:
        """A cluster for each sample number, with the frequencies of the training set; B."""
        return self.labels.draw(indices, seed)

    def forward(self, contexts: Tensor) -> Embedded:
        """contexts: clusters, B."""
        return self.labels(contexts)


def components(vectors: Tensor, codes: Tensor) -> Tensor:
    """Code vectors K D projected on their first principal components, at most VECTOR, weighted by counts of codes N h w."""
    weights = torch.bincount(codes.flatten(), minlength=len(vectors)).double() / codes.numel()
    centred = vectors.double() - weights @ vectors.double()
    axes = torch.linalg.svd(weights.sqrt()[:, None] * centred, full_matrices=False).Vh[:VECTOR]
    return centred @ axes.T


BYTES_AND_PADDING = 257  # the smallest vocabulary of a tokenizer: every byte, and padding


@dataclass(frozen=True)
class Caption:
    """A caption, as tokens before the first position of the latent (DALL-E, Ramesh et al. 2021)."""

    vocabulary: Annotated[int, Interval(ge=BYTES_AND_PADDING, le=1_000_000)] = 1000
    """largest number of different tokens"""
    length: Annotated[int, Interval(ge=1, le=10_000)] = 16
    """tokens of a caption; longer captions are truncated"""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """share of captions dropped in training"""

    def build(self, width: int, specs: list[LatentSpec], classes: int) -> "CaptionCondition":
        return CaptionCondition(width, self)


class CaptionCondition(nn.Module):
    """Token and position embeddings of a caption, as the prefix. Captions are conditioned on, never modelled."""

    def __init__(self, width: int, config: Caption):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(config.length, width))

    def estimate(self, dataset: LatentDataset) -> None:
        """Nothing to estimate."""

    def draw(self, indices: Tensor, seed: int) -> Tensor:
        """The null caption, because there is no density of captions to draw from; B T.

        Raises CannotSample where the prior was trained without it.
        """
        if self.dropout == 0:
            raise CannotSample("this prior was always trained with a caption (--prior.condition.dropout 0): give one")
        return self.null(len(indices))

    def null(self, batch: int) -> Tensor:
        """The null caption; B T."""
        return torch.zeros(batch, self.config.length, dtype=torch.int64, device=self.position.device)

    def with_dropout(self, contexts: Tensor) -> Tensor:
        """In training: replace each caption by the null caption with probability `dropout`; B T."""
        return contexts.masked_fill(torch.rand(len(contexts), 1, device=contexts.device) < self.dropout, 0)

    def forward(self, contexts: Tensor) -> Embedded:
        """contexts: tokens, B T. 0 is padding, and the null caption is all padding."""
        return Embedded(None, self.embedding(contexts) + self.position)


COARSER_BLOCKS = 4


class CoarserLevel(nn.Module):
    """A coarser level of codes to a map on a finer grid, by a small residual network (VQ-VAE-2, Razavi et al. 2019)."""

    def __init__(self, coarse: LatentSpec, grid: tuple[int, int], width: int):
        """Raises ValueError for continuous latents, and for a fine grid that is not a multiple of the coarse one."""
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


RivalCondition = Unconditional | ClassLabel
"""Conditions of priors that ignore the grid."""
ConditionConfig = RivalCondition | Cluster | Caption
