"""Which examples a batch has: in training a function of (seed, step), otherwise all in turn. Also seeds."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines import processes


class Source(Protocol):
    """Examples: `source[indices]` are the positional arguments of the model for a batch.

    One that reads from disk has a method `prefetch(indices)` as well, which starts on the batch that is asked for next.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any) -> tuple: ...


def prefetch(source: Any, indices: Any) -> None:
    if hasattr(source, "prefetch"):
        source.prefetch(indices)


def in_order(source: Any, rows: Tensor, batch_size: int, alone: bool = False) -> Any:
    """The examples of a batch that `processes.in_batches` gives; of those on disk, the next of this process begin to be read."""
    turns = 1 if alone else processes.count()
    start, after = int(rows[0]), int(rows[0]) + turns * batch_size
    batch = source[start : start + len(rows)]
    prefetch(source, slice(after, after + batch_size))
    return batch


def evenly(count: int, most: int) -> Tensor:
    """The numbers of `count` examples; of more than are allowed, evenly spaced ones: the first may all be of one class."""
    return torch.arange(0, count, math.ceil(count / most))


class Order:
    """Which examples step s sees: consecutive slices of one permutation an epoch, a function of (seed, step) alone."""

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch, self.permutation = -1, torch.empty(0)

    def permuted(self, epoch: int) -> Tensor:
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self.epoch, self.permutation = epoch, torch.randperm(self.length, generator=generator)
        return self.permutation

    def indices(self, step: int) -> Tensor:
        position, stop = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while position < stop:  # a batch may cross the end of an epoch, or of several when the data set is tiny
            epoch, start = divmod(position, self.length)
            parts.append(self.permuted(epoch)[start : start + stop - position])
            position += len(parts[-1])
        return torch.cat(parts)


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbours share nothing."""
    state = 0
    for number in numbers:  # the finalizer of splitmix64 (Steele et al. 2014)
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
