"""Heads: the density of a latent at one position given the backbone's features, sampling from it, and embedding the result.

B batch, D width, C latent channels, K codes or mixture components, h×w latent grid.

A head works on *values*: standardized latents with channels last, B h w C, or codes, B h w. It samples by inverse CDF from a
fixed number of uniforms for each position, so it has no random state. No other part of an autoregressive prior samples latents.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Interval
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_prior.compiled import CompiledDraw, compiled_draw
from stage2_prior.latents import LatentSpec, Posterior, moments
from stage2_prior.sampling import AS_FITTED, Sampling, choose, choose_many, inverse_normal_cdf

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
CANDIDATES = 32  # drawn at each position under guidance; one of them is chosen
MINIMUM_LOG_STD = -7.0  # of standardized latents, so that no component can collapse onto a single training latent


class Head(nn.Module, ABC):
    """The contract of a head. `…` is any leading axes: B h w in training, B in sampling."""

    def estimate(self, posterior: Posterior) -> None:
        """Fit the parameters without gradient, once, to the encoded training set."""

    @abstractmethod
    def values(self, latent: Tensor) -> Tensor:
        """Latents in the shape of the level to values."""

    @abstractmethod
    def latent(self, values: Tensor) -> Tensor:
        """The inverse of `values`."""

    @abstractmethod
    def embed(self, values: Tensor) -> Tensor:
        """Values to the backbone's input at the next position, … D."""

    @abstractmethod
    def perturbed(self, values: Tensor, noise: Tensor) -> Tensor:
        """Values B h w … with noise added. noise: its strength for each image, B 1 1: see AutoregressiveConfig.input_noise."""

    @abstractmethod
    def log_prob(self, features: Tensor, values: Tensor) -> Tensor:
        """log p(values) at features … D: …, in nats of raw latents, the change of scale included."""

    @abstractmethod
    def uniforms_per_position(self, how: Sampling) -> int:
        """The number U of uniforms that one position takes."""

    @abstractmethod
    def begin(self, uniforms: Tensor, how: Sampling) -> Any:
        """Prepare the noise of P positions for `draw`, from uniforms B P U."""

    @abstractmethod
    def draw(self, features: Tensor, position: int, state: Any, weaker: "Sequence[Weaker]" = ()) -> Tensor:
        """Sample the values at one position, B …. features: B D. position: 0 … P-1, among those that `begin` prepared.

        state: what `begin` returned. weaker: all that guidance leads away from.
        """


class Weaker(NamedTuple):
    """What guidance leads away from."""

    strength: float  # w
    head: Any  # of the same kind
    features: Tensor  # of its backbone at this position, B D


# Continuous latents


def gaussian_log_prob(value: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return -0.5 * ((value - mean) * torch.exp(-log_std)).square() - log_std - LOG_SQRT_2PI


def floored(raw_log_std: Tensor) -> Tensor:
    """log(e^raw + e^MINIMUM_LOG_STD), a log standard deviation with a smooth floor, which passes gradients."""
    return torch.logaddexp(raw_log_std, raw_log_std.new_full((), MINIMUM_LOG_STD))


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of K diagonal Gaussians over all C channels of a position jointly (GIVT, Tschannen et al. 2023).

    Modelling channels one after the other, with a mixture for each, was no better, and needs C steps per position to sample: see
    docs/trials.md.
    """

    components: Annotated[int, Interval(ge=1, le=1000)] = 16
    """number of Gaussians in the mixture; GIVT's default"""

    def build(self, spec: LatentSpec, width: int) -> "GaussianMixtureHead":
        """width: D of the backbone. Raises ValueError for codes."""
        if spec.vocabulary is not None:
            raise ValueError("a mixture of Gaussians is a head for continuous latents, not for codes")
        return GaussianMixtureHead(spec.channels, width, self.components)


class MixtureDraws(NamedTuple):
    """The noise to sample a mixture: for M candidates, which are CANDIDATES under guidance and one without."""

    how: Sampling
    uniforms: Sequence[Tensor]  # for the choice of the component, B M at each position
    normals: Sequence[Tensor]  # B M C at each position
    choice: Sequence[Tensor]  # for the choice among candidates, B 1 at each position; B 0 without guidance
    compiled: CompiledDraw | None


class GaussianMixtureHead(Head):
    """Two linear layers from the features to the parameters of the mixture."""

    shift: Tensor
    scale: Tensor

    def __init__(self, channels: int, width: int, components: int):
        super().__init__()
        self.channels, self.components = channels, components
        # To standardize latents: of each channel, C, fitted once by `estimate`.
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))
        self.embedding = nn.Linear(channels, width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, components * (1 + 2 * channels))

    def estimate(self, posterior: Posterior) -> None:
        """Shift and scale become the mean and standard deviation of the aggregate posterior, per channel."""
        mean, variance = moments(posterior)
        self.shift.copy_(mean.mean((1, 2)))
        variance = variance.mean((1, 2)) + mean.var((1, 2), correction=0)
        self.scale.copy_(variance.sqrt().clamp(min=1e-6))  # not 0 where a channel never varies

    def values(self, latent: Tensor) -> Tensor:
        return (latent.movedim(1, -1) - self.shift) / self.scale

    def latent(self, values: Tensor) -> Tensor:
        return (values * self.scale + self.shift).movedim(-1, 1)

    def embed(self, values: Tensor) -> Tensor:
        return self.embedding(values)

    def perturbed(self, values: Tensor, noise: Tensor) -> Tensor:
        return values + noise[..., None] * torch.randn_like(values)

    def raw(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the components, … K; their means and their log standard deviations before `floored`, … K 2C."""
        raw = self.output(F.silu(self.hidden(features)))
        logits, components = raw.tensor_split((self.components,), dim=-1)
        return logits, components.unflatten(-1, (self.components, 2 * self.channels))

    def log_prob(self, features: Tensor, values: Tensor) -> Tensor:
        logits, components = self.raw(features)
        mean, raw_log_std = components.chunk(2, dim=-1)
        per_component = gaussian_log_prob(values[..., None, :], mean, floored(raw_log_std)).sum(-1)
        return (logits.log_softmax(-1) + per_component).logsumexp(-1) - self.scale.log().sum()

    def uniforms_per_position(self, how: Sampling) -> int:
        return 1 + CANDIDATES * (1 + self.channels) if how.guided else 1 + self.channels

    def begin(self, uniforms: Tensor, how: Sampling) -> MixtureDraws:
        choice, candidates = uniforms.tensor_split((1 if how.guided else 0,), dim=-1)
        candidates = rearrange(candidates, "b p (m u) -> p b m u", u=1 + self.channels)
        normals = inverse_normal_cdf(candidates[..., 1:]).to(self.shift.dtype).contiguous()
        compiled = compiled_draw(self.hidden, self.output, self.components, len(uniforms)) if how == AS_FITTED else None
        return MixtureDraws(how, candidates[..., 0].contiguous().unbind(), normals.unbind(), choice.unbind(1), compiled)

    def draw(self, features: Tensor, position: int, state: MixtureDraws, weaker: Sequence[Weaker] = ()) -> Tensor:
        """Draw from the mixture at a temperature, as `tempered` says, and with guidance.

        Guidance asks for p(z) Π (p(z) / weaker(z))^w, which need not have a finite integral. So CANDIDATES are drawn from
        p(z)^(1/T), and one of them is chosen with weights Π (p(z) / weaker(z))^(w/T). This is exact as their number grows. GIVT
        draws a component first, and guides within it, by rejection sampling.
        """
        how, uniforms, normals = state.how, state.uniforms[position], state.normals[position]
        if state.compiled is not None:
            return state.compiled.of_mixture(features, uniforms, normals, math.exp(MINIMUM_LOG_STD))
        logits, components = self.raw(features)
        if how.temperature != 1:
            logits = tempered(logits.log_softmax(-1), floored(components[..., self.channels :]), how.temperature)
        candidates = self.draw_many(logits, components, uniforms, normals, how.temperature)
        if not weaker:
            return candidates.squeeze(1)
        own = self.log_prob(features[:, None], candidates)
        advantage = sum(one.strength * (own - one.head.log_prob(one.features[:, None], candidates)) for one in weaker)
        chosen = choose(advantage / how.temperature, state.choice[position][:, 0])
        return candidates[torch.arange(len(chosen), device=chosen.device), chosen]

    def draw_many(self, logits: Tensor, components: Tensor, uniforms: Tensor, normals: Tensor, temperature: float) -> Tensor:
        """M samples from each mixture, B M C. logits: B K; components: B K 2C; uniforms: B M; normals: B M C."""
        chosen = choose_many(logits, uniforms)[..., None].expand(-1, -1, 2 * self.channels)
        mean, raw_log_std = components.gather(1, chosen).chunk(2, dim=-1)
        return torch.addcmul(mean, raw_log_std.exp().add_(math.exp(MINIMUM_LOG_STD)), normals, value=math.sqrt(temperature))


def tempered(log_weights: Tensor, log_std: Tensor, temperature: float) -> Tensor:
    """The component logits, … K, of a Gaussian mixture p at a temperature T, which approximate those of p^(1/T).

    log_weights: … K. log_std: … K C, of axes whose standard deviations multiply to a component's volume.

    For components that do not overlap, p^(1/T) is again a mixture: variances are multiplied by T, and a component of weight π and
    volume s gets the weight π^(1/T) s^(1-1/T). T = 1 is the mixture itself, and T = 0 its highest mode. The temperature of GIVT
    multiplies standard deviations, so it is √T, and another one is for the weights.
    """
    log_volume = log_std.sum(-1)
    if temperature == 0:
        return only_largest(log_weights - log_volume)
    return log_weights / temperature + (1 - 1 / temperature) * log_volume


# Codes


@dataclass(frozen=True)
class Categorical:
    """A categorical distribution over codes."""

    hidden: Annotated[int, Interval(ge=1, le=65_536)] | None = None
    """hidden units before the logits, None for the backbone's width. Logits are linear in them, so their number bounds the rank
    of the logits over contexts (softmax bottleneck, Yang et al. 2018)"""

    def build(self, spec: LatentSpec, width: int) -> "CategoricalHead":
        """width: D of the backbone. Raises ValueError for continuous latents."""
        if spec.vocabulary is None:
            raise ValueError("a categorical head is for codes, not for continuous latents")
        return CategoricalHead(spec.vocabulary, width, width if self.hidden is None else self.hidden)


class CodeDraws(NamedTuple):
    """The noise to sample codes."""

    how: Sampling
    uniforms: Sequence[Tensor]  # B at each position
    compiled: CompiledDraw | None


class Logits(nn.Linear):
    """The layer before the logits of K codes: row k of its weights belongs to code k, as in an embedding."""


class CategoricalHead(Head):
    """Two linear layers from the features to the logits of K codes."""

    def __init__(self, vocabulary: int, width: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, hidden)
        self.output = Logits(hidden, vocabulary)

    def values(self, latent: Tensor) -> Tensor:
        return latent

    def latent(self, values: Tensor) -> Tensor:
        return values

    def embed(self, values: Tensor) -> Tensor:
        return self.embedding(values)

    def perturbed(self, values: Tensor, noise: Tensor) -> Tensor:
        other = torch.randint_like(values, self.embedding.num_embeddings)
        return torch.where(torch.rand(values.shape, device=values.device) < noise, other, values)

    def logits(self, features: Tensor) -> Tensor:
        return self.output(F.silu(self.hidden(features)))

    def log_prob(self, features: Tensor, values: Tensor) -> Tensor:
        logits = self.logits(features)
        return -F.cross_entropy(logits.flatten(0, -2), values.flatten(), reduction="none").view(values.shape)

    def uniforms_per_position(self, how: Sampling) -> int:
        return 1

    def begin(self, uniforms: Tensor, how: Sampling) -> CodeDraws:
        compiled = compiled_draw(self.hidden, self.output, self.output.out_features, len(uniforms)) if how == AS_FITTED else None
        return CodeDraws(how, uniforms.squeeze(2).T.contiguous().unbind(), compiled)

    def draw(self, features: Tensor, position: int, state: CodeDraws, weaker: Sequence[Weaker] = ()) -> Tensor:
        how, uniforms = state.how, state.uniforms[position]
        if state.compiled is not None:
            return state.compiled.code(features, uniforms)
        logits = self.logits(features)
        if weaker:
            own = logits.log_softmax(-1)
            logits = own + sum(one.strength * (own - one.head.logits(one.features).log_softmax(-1)) for one in weaker)
        return choose(truncated(logits, how), uniforms)


def truncated(logits: Tensor, how: Sampling) -> Tensor:
    """Logits B K at a temperature, with -inf for all codes outside top-k and top-p.

    Top-p keeps the fewest codes whose probabilities sum to p or more (nucleus sampling, Holtzman et al. 2020). Ties do not
    enlarge either set.
    """
    if how.temperature == 0:
        return only_largest(logits)
    logits = logits / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        best, codes = logits.topk(how.top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, codes, best)
    if how.top_p < 1:
        descending, order = logits.sort(dim=-1, descending=True)
        probabilities = descending.softmax(-1)
        dropped = probabilities.cumsum(-1) - probabilities >= how.top_p
        logits = logits.masked_fill(dropped.gather(-1, order.argsort(-1)), -math.inf)
    return logits


def only_largest(logits: Tensor) -> Tensor:
    """Logits … K with -inf for all but the largest."""
    return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)


HeadConfig = GaussianMixture | Categorical
