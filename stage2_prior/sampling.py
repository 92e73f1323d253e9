"""What the samplers of all priors share: noise, sampling by inverse CDF, and the settings of sampling.

B batch, P positions, K categories.

The noise of sample i under seed s is a function of (s, i, position) only, by the counter-based generator Philox (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"). So it is exactly the same at any batch size, at any place in a batch, with
any number of processes and on any device. The sample is the same up to rounding in the network.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # the low 32 bits of an int64
MOST_NUMBERS = 2**18  # of one position: the counter has 16 bits for blocks of 4 numbers
# Streams of the noise. Level l of the latents uses stream l.
CONTEXT_STREAM, COMPONENT_STREAM, CHOICE_STREAM, RESAMPLING_STREAM, PIXEL_STREAM = 1000, 1001, 1002, 1003, 1004


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words; returns four words for each counter.

    The product of two 32-bit words wraps in int64 as in uint64, so shifts and masks give both halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & WORD) ^ c1 ^ k0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniforms(seed: int, indices: Tensor, positions: Tensor, count: int, stream: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float32, B P count: a function of (seed, index, position, stream) only.

    indices: B sample numbers; positions: P position numbers. Both are int64, on the device of the result.
    count: at most MOST_NUMBERS. stream: below 2**16, a different one for each independent use.
    Raises ValueError for a larger count, whose numbers would be those of the next stream.
    """
    if count > MOST_NUMBERS:
        raise ValueError(f"a position has {MOST_NUMBERS:,} uniform numbers, not {count:,}: use more positions")
    blocks = -(-count // 4)
    index = indices[:, None, None]
    position = positions[None, :, None]
    block = torch.arange(blocks, device=indices.device)[None, None, :] + (stream << 16)
    counter = torch.broadcast_tensors(index & WORD, (index >> 32) & WORD, position & WORD, block)
    words = torch.stack(philox(counter, (seed & WORD, (seed >> 32) & WORD)), dim=-1)  # B P blocks 4
    # The midpoints of 2**23 equal cells: exact in float32, never 0 and never 1.
    return ((words.flatten(2)[..., :count] >> 9).to(torch.float32) + 0.5) * 2.0**-23


def first_uniforms(seed: int, indices: Tensor, stream: int) -> Tensor:
    """One uniform number for each sample, B."""
    return uniforms(seed, indices, torch.zeros(1, dtype=torch.int64, device=indices.device), 1, stream)[:, 0, 0]


def normals(seed: int, indices: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Standard normal numbers, B × shape, by the inverse CDF of `uniforms`."""
    count = torch.Size(shape).numel()
    positions = torch.arange(max(1, -(-count // MOST_NUMBERS)), device=indices.device)
    uniform = uniforms(seed, indices, positions, min(count, MOST_NUMBERS), stream).flatten(1)[:, :count]
    return inverse_normal_cdf(uniform).view(len(indices), *shape)


def inverse_normal_cdf(uniforms: Tensor) -> Tensor:
    """Uniform numbers to standard normal ones, any shape. On MPS, which has no ndtri, this is computed on the CPU."""
    if uniforms.device.type == "mps":
        return torch.special.ndtri(uniforms.cpu()).to(uniforms.device)
    return torch.special.ndtri(uniforms)


def choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample categories by inverse CDF. logits: B K, not necessarily normalized; uniform: B; returns B."""
    return choose_many(logits, uniform[:, None]).squeeze(1)


def choose_many(logits: Tensor, uniform: Tensor) -> Tensor:
    """M samples from each row. logits: B K; uniform: B M; returns B M."""
    cumulative = logits.softmax(-1).cumsum(-1)
    # Rounding can make the last entry differ from 1, so search for a share of it. The clamp keeps NaN logits within bounds.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp_(max=logits.shape[-1] - 1)


class CannotSample(ValueError):
    """A request to a prior that it cannot serve. The message says why, and what to do."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. The default samples from the fitted density."""

    temperature: float = 1.0
    """T: values below 1 sharpen the density at each position; 0 takes its mode"""
    top_k: int | None = None
    """sample each code from the k likeliest ones only"""
    top_p: float = 1.0
    """sample each code from the fewest likeliest ones whose probabilities sum to p"""
    guidance: float = 0.0
    """strength w of classifier-free guidance toward the context (Ho and Salimans 2022): p(z|context)^(1+w) / p(z)^w, normalized
    at each position, not over whole latents; 0 is none. Some codes call 1 + w the scale of guidance"""
    autoguidance: float = 0.0
    """strength w of autoguidance (Karras et al. 2024): the same away from a weaker copy of the prior, which is what the prior was
    early in its training, under the same context; 0 is none. The paper's w is 1 + this one"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise CannotSample(f"a temperature is 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise CannotSample(f"top-k is a number of codes from 1 up, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise CannotSample(f"top-p lies above 0 and at most at 1, not at {self.top_p}")
        for name, strength in (("guidance", self.guidance), ("autoguidance", self.autoguidance)):
            if not 0 <= strength < math.inf:
                raise CannotSample(f"{name} is 0 or more, not {strength}")

    @property
    def guided(self) -> bool:
        """Whether guidance of either kind is in use. Of both, the two ratios are multiplied."""
        return self.guidance > 0 or self.autoguidance > 0

    def check(self, *, codes: bool, contexts: bool, weaker: bool = False) -> None:
        """Raises CannotSample for settings that a prior does not have.

        codes: whether the prior models codes. contexts: whether it takes contexts. weaker: whether it has a weaker copy.
        """
        if not codes and (self.top_k is not None or self.top_p < 1):
            raise CannotSample("top-k and top-p choose among codes, and these latents are continuous: set a temperature instead")
        if not contexts and self.guidance:
            other = "autoguidance" if weaker else "a temperature"
            raise CannotSample(f"this prior takes no context, a label or a caption, to be guided toward: set {other} instead")
        if not weaker and self.autoguidance:
            raise CannotSample("there is no weaker copy of this prior to be guided away from: set autoguidance to 0")
        if not codes and self.guided and self.temperature == 0:
            raise CannotSample("draws of continuous latents at a temperature of 0 are all the same: guided, set it above 0")


AS_FITTED = Sampling()
