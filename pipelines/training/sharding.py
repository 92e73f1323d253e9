"""Weights of which each process holds a share (FSDP2), brought together and split again."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.processes import rank


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor brought together on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, in the same memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_split(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, the same on every process, sharded as the example is."""
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies of tensors, sharded ones brought together, on the CPU of the first process; nothing on the others."""
    copies = {}
    for name, tensor in state.items():
        entire = whole(tensor.detach())
        if rank() == 0:
            copies[name] = entire.cpu().contiguous().clone()
    return copies
