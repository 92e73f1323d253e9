"""The contract of a prior, and helpers of the priors that are fitted without gradients.

B batch, N encoded images.

A prior always takes all levels as a list, so that its callers need no loop over levels:

    forward(levels, contexts, progress) -> {"loss": …}, mean nats per image: the loss of training
    log_prob(levels, contexts)          -> B, nats per image in raw latents
    sample(indices, seed, how, …)       -> levels, without gradients
    estimate(dataset)                   -> fits what has no gradient, into buffers

levels, indices and contexts are on the prior's device. Sample i under a seed is the same in any batch, up to rounding.

contexts, B …, are the condition of a conditional prior, such as labels; other priors ignore them in `forward` and `log_prob`.
`log_prob` raises CannotSample for a conditional prior without contexts. `sample` raises it for settings in `how` that the prior
does not have: top-k and top-p need codes, guidance needs a context.
"""

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor, nn

from stage2_prior.conditions import CaptionCondition, ClusterCondition, Embedded, LabelCondition
from stage2_prior.latents import LatentDataset
from stage2_prior.sampling import AS_FITTED, CannotSample, Sampling

T = TypeVar("T")


class Prior(nn.Module, ABC):
    """A density over latents."""

    bounded = False
    """whether `log_prob` is a lower bound on the log density, not the log density itself"""
    condition: LabelCondition | CaptionCondition | ClusterCondition | None

    def __init__(self) -> None:
        super().__init__()
        self.condition = None

    @property
    def given_condition(self) -> LabelCondition | CaptionCondition | None:
        """The condition on labels or captions, which callers give as contexts; None where they give none: clusters are a function
        of the latent."""
        return None if isinstance(self.condition, ClusterCondition) else self.condition

    def null_contexts(self, batch: int) -> Tensor | None:
        """Null contexts, B …, with which the prior is unconditional; None where it takes no contexts.

        Raises CannotSample for a prior that was trained without any.
        """
        if self.given_condition is None:
            return None
        if self.given_condition.dropout == 0:
            raise CannotSample(
                "this prior was always trained with its label or caption (--prior.condition.dropout 0), so it has no density"
                " without one, which guidance and scores need"
            )
        return self.given_condition.null(batch)

    def with_dropout(self, contexts: Tensor | None) -> Tensor | None:
        """In training, the contexts with some of them replaced by the null context; otherwise as they are."""
        if not self.training or self.given_condition is None or contexts is None:
            return contexts
        return self.given_condition.with_dropout(contexts)

    def embedded_contexts(self, contexts: Tensor | None) -> Embedded:
        """Raises CannotSample for a conditional prior without contexts."""
        if self.condition is None:
            return Embedded(None, None)
        if contexts is None:
            raise CannotSample("this prior is conditional: give a context for each latent, such as a label")
        return self.condition(contexts)

    def forward(self, levels: list[Tensor], contexts: Tensor | None = None, progress: float = 0.0) -> dict[str, Tensor]:
        """The loss of training, mean nats per image, as "loss". levels: one latent for each level, B … each. contexts: B ….

        progress: share of the training that is done, from 0 to 1; where it is left out, noise on inputs never ends.
        """
        return {"loss": -self.log_prob(levels, contexts).mean()}

    @abstractmethod
    def log_prob(self, levels: list[Tensor], contexts: Tensor | None = None) -> Tensor:
        """log p(levels | contexts), or a bound on it: B, nats per image in raw latents. Arguments as in `forward`."""

    @abstractmethod
    def sample(self, indices: Tensor, seed: int, how: Sampling = AS_FITTED, contexts: Tensor | None = None) -> list[Tensor]:
        """One latent for each level, B … each, without gradients. indices: int64, B: the numbers of the samples, as of arange.

        contexts: one for each sample, or one for all. None draws them with the frequencies of the training set.
        Raises CannotSample for contexts and settings in `how` that the prior does not have.
        """

    def estimate(self, dataset: LatentDataset) -> None:
        """Fit what has no gradient, once, before the training; here that of the condition.

        Raises ValueError for missing contexts.
        """
        if self.given_condition is not None and dataset.contexts is None:
            raise ValueError("a conditional prior needs a data set with contexts")
        if self.condition is not None:
            self.condition.estimate(dataset)

    def draw_contexts(self, indices: Tensor, seed: int) -> Tensor | None:
        """A context for each sample number, with the frequencies of the training set; None for an unconditional prior."""
        return None if self.condition is None else self.condition.draw(indices, seed)

    def given_or_drawn(self, indices: Tensor, seed: int, contexts: Tensor | None) -> Tensor | None:
        """A context for each sample: those that are given, or drawn ones. Raises CannotSample as `for_each` does."""
        return self.draw_contexts(indices, seed) if contexts is None else self.for_each(indices, contexts)

    def for_each(self, indices: Tensor, contexts: Tensor) -> Tensor:
        """Contexts, one for each sample or one for all, as one for each.

        Raises CannotSample for another number of them, and where the prior takes none.
        """
        if self.condition is None:
            raise CannotSample("this prior takes no context")
        if contexts.ndim == 0 or len(contexts) not in (1, len(indices)):
            raise CannotSample(
                f"{len(indices)} samples take a context each, or one for all, not of shape {tuple(contexts.shape)}"
            )
        return contexts.expand(len(indices), *contexts.shape[1:])

    def fitted_numbers(self) -> int:
        """The number of trained or fitted parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


def only(levels: list[T]) -> T:
    """The single level of a list. Raises ValueError for several levels."""
    if len(levels) != 1:
        raise ValueError(f"this prior models one level of latents, not {len(levels)}")
    return levels[0]


class ResizableBuffers(nn.Module):
    """A module whose buffers have sizes that depend on the data. `load_state_dict` resizes them to those of the state.

    It raises RuntimeError where `fits` is false, as for a wrong size in any module.
    """

    def fits(self, found: dict[str, Tensor]) -> bool:
        """Whether these tensors, by name of the buffer, are a valid state of this module."""
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
    """A random split of `count` images: numbers of those to fit to, and of a twentieth, at most 1,000, to choose settings by."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = min(count // 20, 1000)
    return order[held_out:], order[:held_out]
