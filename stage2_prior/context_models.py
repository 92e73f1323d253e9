"""Context models of codes, fitted by counting: order 0, the unigram, and order 2, a strong simple baseline.

B batch, h×w grid, K codes, n counts of the training set, c a code, l and a its neighbours to the left and above.

    p₀(c)      = frequency at this position                             (order 0)
    p₁(c|l, a) = (n(l, c) + n(a, c) + α p₀(c)) / (n(l) + n(a) + α)      (each neighbour separately)
    p₂(c|l, a) = (n(l, a, c) + α p₁(c|l, a)) / (n(l, a) + α)            (order 2: both jointly)

Each order backs off to the one before by a Dirichlet prior of weight α (MacKay and Peto 1995). α is chosen on images that are not
counted. Levels are independent. A neighbour outside the grid has a symbol of its own.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from stage2_prior.heads import truncated
from stage2_prior.latents import LatentDataset, LatentSpec
from stage2_prior.prior import Prior, ResizableBuffers, choosing_images
from stage2_prior.sampling import AS_FITTED, Sampling, choose, choose_many, uniforms

WEIGHTS = (1.0, 4.0, 16.0, 64.0, 256.0)  # candidates for α
PROBABILITIES_AT_ONCE = 2**24  # of all codes at some positions
MOST_COUNTED = 8192  # codes of a level: the two tables of pairs have K² numbers each


class IndependentCodes(Prior):
    """Independent codes: uniform, or with the frequencies of the training set at each position."""

    def __init__(self, specs: list[LatentSpec], fitted: bool):
        super().__init__()
        self.specs, self.fitted = specs, fitted
        for level, spec in enumerate(specs):
            assert spec.vocabulary is not None
            self.register_buffer(
                f"log_probabilities_{level}", torch.full((*spec.grid, spec.vocabulary), -math.log(spec.vocabulary))
            )

    def tables(self) -> list[Tensor]:
        """log p of every code at every position, h w K for each level."""
        return [getattr(self, f"log_probabilities_{level}") for level in range(len(self.specs))]

    def estimate(self, dataset: LatentDataset) -> None:
        """Count codes, plus one of each, so that no probability is 0."""
        if self.fitted:
            for table, posterior in zip(self.tables(), dataset.subsample()):
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


class Order2Level(ResizableBuffers):
    """The counts of one level, of K codes: two dense tables of K + 1 × K pairs, and the triples that occur."""

    left: Tensor
    above: Tensor
    keys: Tensor
    counts: Tensor
    weight: Tensor

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.register_buffer("left", torch.zeros(vocabulary + 1, vocabulary))
        self.register_buffer("above", torch.zeros(vocabulary + 1, vocabulary))
        # All (l, a, c) that occur, as one number each in ascending order, and their counts. The last key is above any other.
        self.register_buffer("keys", torch.full((1,), (vocabulary + 1) ** 3))
        self.register_buffer("counts", torch.zeros(1))
        self.register_buffer("weight", torch.tensor(1.0))

    def fits(self, found: dict[str, Tensor]) -> bool:
        keys, counts, tables = found["keys"], found["counts"], (found["left"], found["above"])
        shaped = all(table.shape == self.left.shape for table in tables) and found["weight"].ndim == 0
        listed = keys.dtype == torch.int64 and keys.ndim == 1 and keys.shape == counts.shape and len(keys) > 0
        positive = all(bool((tensor >= 0).all()) for tensor in (counts, found["weight"], *tables))
        return shaped and listed and positive and int(keys[-1]) == (self.vocabulary + 1) ** 3

    def neighbours(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The left and the upper neighbour of each position, B h w each; codes B h w."""
        left = functional.pad(codes, (1, 0), value=self.vocabulary)[..., :-1]
        above = functional.pad(codes, (0, 0, 1, 0), value=self.vocabulary)[..., :-1, :]
        return left, above

    def count(self, codes: Tensor) -> None:
        """Count pairs and triples of codes B h w."""
        left, above = self.neighbours(codes)
        size = self.vocabulary
        for table, neighbour in ((self.left, left), (self.above, above)):
            table.copy_(torch.bincount((neighbour * size + codes).flatten(), minlength=table.numel()).view_as(table))
        keys, counts = self.key(left, above, codes).flatten().unique(return_counts=True)
        self.keys, self.counts = torch.cat([keys, self.keys[-1:]]), torch.cat([counts.float(), self.counts.new_zeros(1)])

    def key(self, left: Tensor, above: Tensor, code: Tensor) -> Tensor:
        return (left * (self.vocabulary + 1) + above) * self.vocabulary + code

    @property
    def at_once(self) -> int:
        """The number of positions whose probabilities are computed together."""
        return max(1, PROBABILITIES_AT_ONCE // self.vocabulary)

    def probabilities(self, unigram: Tensor, left: Tensor, above: Tensor) -> Tensor:
        """p₂ of every code given the neighbours, … K. left, above: codes …. unigram: p₀, … K, or K for all."""
        single, alpha = self.left[left] + self.above[above], self.weight
        backed = (single + alpha * unigram) / (single.sum(-1, keepdim=True) + alpha)
        keys = self.key(left[..., None], above[..., None], torch.arange(self.vocabulary, device=left.device))
        place = torch.searchsorted(self.keys, keys)
        both = torch.where(self.keys[place] == keys, self.counts[place], 0.0)
        return (both + alpha * backed) / (both.sum(-1, keepdim=True) + alpha)


class Order2Codes(Prior):
    """The context model of order 2, for each level by itself."""

    def __init__(self, specs: list[LatentSpec]):
        super().__init__()
        self.specs = specs
        self.unigram = IndependentCodes(specs, fitted=True)
        self.levels: list[Order2Level] = nn.ModuleList(  # type: ignore[assignment]
            Order2Level(spec.vocabulary or 0) for spec in specs
        )

    def fitted_numbers(self) -> int:
        """The stored counts."""
        tables = sum(level.left.numel() + level.above.numel() + level.counts.numel() for level in self.levels)
        return tables + self.unigram.fitted_numbers()

    def estimate(self, dataset: LatentDataset) -> None:
        """Choose α of each level on images that are not counted, if there are enough; then count all images."""
        codes = [posterior["codes"].long() for posterior in dataset.subsample()]
        counted, held_out = choosing_images(len(codes[0]))
        self.unigram.estimate(LatentDataset([{"codes": values[counted]} for values in codes]))
        for number, (level, values) in enumerate(zip(self.levels, codes)):
            level.count(values[counted])
            losses = []
            for weight in WEIGHTS if len(held_out) else ():
                level.weight.fill_(weight)
                losses.append((-float(self.of_level(number, values[held_out]).sum()), weight))
            level.weight.fill_(min(losses)[1] if losses else 16.0)
            level.count(values)
        self.unigram.estimate(dataset)

    def of_level(self, number: int, codes: Tensor) -> Tensor:
        """log p of the codes of one level, B."""
        level, unigram = self.levels[number], self.unigram.tables()[number].exp().flatten(0, 1)
        positions = torch.arange(len(unigram), device=codes.device).view(codes.shape[1:]).expand_as(codes)
        parts = []
        for part in zip(*(kept.flatten().split(level.at_once) for kept in (codes, positions, *level.neighbours(codes)))):
            code, position, left, above = part
            probabilities = level.probabilities(unigram[position], left, above)
            parts.append(probabilities.gather(1, code[:, None]).log())
        return torch.cat(parts).view(len(codes), len(unigram)).sum(1)

    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        return torch.stack([self.of_level(number, codes) for number, codes in enumerate(levels)]).sum(0)

    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        how.check(codes=True, contexts=False)
        drawn = []
        for number, (level, spec, table) in enumerate(zip(self.levels, self.specs, self.unigram.tables())):
            height, width = spec.grid
            noise = uniforms(seed, indices, torch.arange(height * width, device=indices.device), 1, number)[..., 0]
            padded = indices.new_full((len(indices), height + 1, width + 1), level.vocabulary)
            for position in range(height * width):
                row, column = divmod(position, width)
                asked = padded[:, row + 1, column], padded[:, row, column + 1], noise[:, position]
                codes: list[Tensor] = []
                for left, above, uniform in zip(*(kept.split(level.at_once) for kept in asked)):
                    logits = level.probabilities(table[row, column].exp(), left, above).log()
                    codes.append(choose(truncated(logits, how), uniform))
                padded[:, row + 1, column + 1] = torch.cat(codes)
            drawn.append(padded[:, 1:, 1:].clone())
        return drawn
