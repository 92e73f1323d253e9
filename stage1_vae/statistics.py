"""Statistics of a batch of which every process holds an equal share.

Where training runs in one process they are those of its batch, at no cost.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn


def processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class Total(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, share: Tensor) -> Tensor:
        total = share.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Every process's loss depends on every share."""
        (gradient,) = gradients
        return Total.forward(context, gradient)


def total(share: Tensor) -> Tensor:
    """The sum over all processes, the same bits on each; gradients pass."""
    return share if processes() == 1 else Total.apply(share)


def together(rows: Tensor) -> Tensor:
    """The rows of all processes, of which each has equally many; N … to processes·N …."""
    if processes() == 1:
        return rows
    everywhere = [torch.empty_like(rows) for _ in range(processes())]
    distributed.all_gather(everywhere, rows.contiguous())
    return torch.cat(everywhere)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization over the batch of all processes. Torch's own, SyncBatchNorm, refuses CPUs."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int):
        super().__init__(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """B C h w to B C h w."""
        if not self.training or processes() == 1:
            return super().forward(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        count = processes() * x.numel() // x.shape[1]
        mean = total(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = total(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        return centred * (variance + self.eps).rsqrt()[:, None, None]
