"""Statistics of a batch that is divided equally among processes.

With one process they are the statistics of its own batch, and nothing is communicated.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over all processes."""

    @staticmethod
    def forward(context: Any, share: Tensor) -> Tensor:
        total = share.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """The sum over processes of the gradient: every process's loss depends on every share."""
        (gradient,) = gradients
        return AllReduceSum.forward(context, gradient)


def all_reduce_sum(share: Tensor) -> Tensor:
    """The sum of `share` over all processes, bit-identical on each. Differentiable."""
    return share if world_size() == 1 else AllReduceSum.apply(share)


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, one process after the other: N … to world_size·N …. Every process has the same number N."""
    if world_size() == 1:
        return rows
    everywhere = [torch.empty_like(rows) for _ in range(world_size())]
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
        if not self.training or world_size() == 1:
            return super().forward(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        count = world_size() * x.numel() // x.shape[1]
        mean = all_reduce_sum(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_reduce_sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        return centred * (variance + self.eps).rsqrt()[:, None, None]
