"""The exponential average of a model's weights, which is what a training ends in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipelines.training import sharding


class Average:
    """An exponential average of the weights, whose window grows with the step, so that it forgets the initial weights early.

    Buffers are not averaged. So the averaged encoder of a VQ-VAE meets a codebook that follows the raw one: that raises the
    held-out commitment loss, but hardly changes images.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.current = [sharding.own_part(parameter.detach()) for parameter in model.parameters()]
        self.averaged = [weights.clone() for weights in self.current]

    def update(self, step: int) -> None:
        """Take in the weights after this step."""
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        torch._foreach_lerp_(self.averaged, self.current, 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        for averaged, current in zip(self.averaged, self.current):
            held = current.clone()
            current.copy_(averaged)
            averaged.copy_(held)
