"""The contract of a prior, and what priors share that are fitted without gradients.

B batch, N encoded images.

A prior takes all levels as a list, always, so that nothing that uses one loops over levels:

    forward(levels, contexts, progress) -> {"loss": …}, mean nats per image: what training calls
    log_prob(levels, contexts)      -> B, nats per image in raw latents
    sample(indices, seed, …)        -> levels; sample i under one seed is the same in any batch, up to rounding
    estimate(dataset)               -> fits what is not trained by gradient, into buffers

contexts, B …, are what a conditional prior is conditioned on, such as labels; the other priors ignore them.
`sample` raises CannotSample where `how` asks for what a prior does not have: top-k and top-p need codes, guidance a context.
"""

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor, nn

from stage2_prior.latents import LatentDataset
from stage2_prior.sampling import AS_FITTED, Sampling

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
        """Contexts as frequent as in the training set, one for each sample number; None for an unconditional prior."""
        return None

    def fitted_numbers(self) -> int:
        """How many numbers are trained or fitted."""
        return sum(parameter.numel() for parameter in self.parameters())


def only(levels: list[T]) -> T:
    """The single level of a one-level prior."""
    if len(levels) != 1:
        raise ValueError(f"this prior models one level of latents, not {len(levels)}")
    return levels[0]


class ResizableBuffers(nn.Module):
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
