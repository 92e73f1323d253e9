"""All that stage 2 knows of stage 1: the shape of the latents, and the encoded posteriors.

B batch, C latent channels, h×w latent grid, K codes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_BYTES = 2**30  # of posteriors that statistics are estimated from
NUMBERS_AT_ONCE = 2**21  # of posteriors that are converted to float64 together

Posterior = dict[str, Tensor]
"""One level of an encoded batch: `mean` and `std`, both B C h w, or `codes`, B h w."""


@dataclass(frozen=True)
class LatentSpec:
    """The shape of one level of latents.

    shape: (C, h, w) for continuous latents, (h, w) for a grid of codes. A flat latent of n numbers is (1, 1, n).
    vocabulary: None for continuous latents, K for codes 0 … K-1.
    Raises ValueError for a shape of another rank.
    """

    shape: tuple[int, ...]
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        rank = 3 if self.vocabulary is None else 2
        if len(self.shape) != rank or min(self.shape) < 1:
            kind = "continuous latents are (C, h, w)" if self.vocabulary is None else "codes are (h, w)"
            raise ValueError(f"latent shape {self.shape} does not fit: {kind}")

    @property
    def channels(self) -> int:
        return self.shape[0] if self.vocabulary is None else 1

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[-2], self.shape[-1]

    @property
    def dimensions(self) -> int:
        return math.prod(self.shape)


def check_levels(levels: Sequence[Tensor], specs: Sequence[LatentSpec]) -> None:
    """Raises ValueError for anything but a list with a batch of latents for each level: numbers, or codes as int64."""
    fits = len(levels) == len(specs) and all(
        tuple(level.shape[1:]) == tuple(spec.shape) and (spec.vocabulary is None or level.dtype == torch.int64)
        for level, spec in zip(levels, specs)
    )
    if not fits:
        shapes = ", ".join("×".join(map(str, ("B", *spec.shape))) + (" int64" if spec.vocabulary else "") for spec in specs)
        raise ValueError(f"latents are a list with one tensor for each level, here of shape {shapes}")


def draw(posterior: Posterior, noise: Tensor | None = None) -> Tensor:
    """z ~ q(z|x), B C h w. Codes are returned unchanged.

    noise: standard normal numbers in the shape of the mean. None draws them from torch's generator.
    """
    if "codes" in posterior:
        return posterior["codes"]
    noise = torch.randn_like(posterior["mean"]) if noise is None else noise
    return torch.addcmul(posterior["mean"], posterior["std"], noise)


def parts_of(means: Tensor) -> tuple[Tensor, ...]:
    """Row numbers of N … means, in parts that are small enough to convert to float64."""
    return torch.arange(len(means)).split(max(1, NUMBERS_AT_ONCE // means[0].numel()))


def moments(posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and variance of the aggregate posterior, C h w each, in float64."""
    means, stds = posterior["mean"], posterior["std"]
    mean = torch.stack([means[rows].double().sum(0) for rows in parts_of(means)]).sum(0) / len(means)
    # Law of total variance: Var[z] = Var[E[z|x]] + E[Var[z|x]].
    squares = ((means[rows].double() - mean).square() + stds[rows].double().square() for rows in parts_of(means))
    return mean, torch.stack([part.sum(0) for part in squares]).sum(0) / len(means)


class Joined:
    """Several tensors as one, concatenated along the first axis, with `len` and indexing.

    It copies only the rows that are asked for. So tensors that are mapped from disk need no memory for the rest.
    """

    def __init__(self, parts: Sequence["Tensor | Joined"]):
        self.parts: list[Tensor] = [tensor for part in parts for tensor in (part.parts if isinstance(part, Joined) else [part])]
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        if isinstance(indices, slice):
            start, stop, step = indices.indices(len(self))
            indices = torch.arange(start, max(start, stop), step)
        part = torch.bucketize(indices.contiguous(), self.ends, right=True)
        rows = self.parts[0].new_empty(len(indices), *self.parts[0].shape[1:])
        for number in part.unique().tolist():
            here = part == number
            rows[here] = self.parts[number][indices[here] - (self.ends[number] - len(self.parts[number]))]
        return rows


class LatentDataset:
    """The encoded training set: for each image a context, and a new z ~ q(z|x) each time it is read.

    Because mean and std are stored, not a single draw, the data set is the aggregate posterior of the training images,
    1/N Σ q(z|x_i), itself, not N points of it.
    """

    def __init__(
        self,
        levels: Sequence[Mapping[str, Tensor | Joined]],
        contexts: Tensor | None = None,
        vectors: Tensor | None = None,
    ):
        """levels: posteriors of N images, coarse to fine. contexts: N …, such as labels. vectors: the codebook of the coarsest
        level, K D. Raises ValueError where lengths differ or are 0, and for tensors in place of posteriors."""
        if not all(isinstance(level, Mapping) for level in levels):
            raise ValueError('a latent data set takes a posterior for each level: {"mean": …, "std": …}, or {"codes": …}')
        lengths = {len(tensor) for level in levels for tensor in level.values()}
        lengths |= set() if contexts is None else {len(contexts)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"the levels of a latent data set need one common, positive length, not {sorted(lengths)}")
        self.levels, self.contexts, self.vectors = levels, contexts, vectors
        (self.length,) = lengths

    def __len__(self) -> int:
        return self.length

    def __add__(self, other: "LatentDataset") -> "LatentDataset":
        """Both data sets, one after the other. Raises ValueError where only one of them has contexts."""
        both = [
            {name: Joined([tensor, level[name]]) for name, tensor in own.items()}
            for own, level in zip(self.levels, other.levels, strict=True)
        ]
        contexts = [part.contexts for part in (self, other) if part.contexts is not None]
        return LatentDataset(both, torch.cat(contexts) if contexts else None, self.vectors)

    def posteriors(self, indices: Tensor | slice) -> list[Posterior]:
        """The posteriors of these images, one for each level."""
        return [{name: tensor[indices] for name, tensor in level.items()} for level in self.levels]

    def subsample(self) -> list[Posterior]:
        """Posteriors to estimate statistics from: all, or as many evenly spaced ones as SAMPLE_BYTES allow."""
        one = self.posteriors(slice(0, 1))
        size = len(self) * sum(tensor.nbytes for level in one for tensor in level.values())
        return self.posteriors(slice(None, None, math.ceil(size / SAMPLE_BYTES)))

    def __getitem__(self, indices: Tensor | slice) -> tuple[list[Tensor], Tensor | None]:
        """Arguments of `Prior.forward` for these images: new draws, one for each level, and the contexts."""
        contexts = None if self.contexts is None else self.contexts[indices]
        return [draw(posterior) for posterior in self.posteriors(indices)], contexts
