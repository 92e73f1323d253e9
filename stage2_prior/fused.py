"""The steps of gated layers in C, where the installation found a compiler: see steps.c. Elsewhere torch's operations do the same.

B batch, D width, L layers.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stage2_prior.pixelcnn import Stacks

LANES, BLOCK = 16, 32  # of steps.c: the width is a multiple of LANES
ROWS_A_THREAD = 8  # of a batch; for fewer, another thread costs more than it saves


@cache
def library() -> ctypes.CDLL | None:
    """steps.c as it was compiled at installation; None where it was not, or was for another processor."""
    spec = find_spec("stage2_prior.steps")
    if spec is None or spec.origin is None:
        return None
    compiled = ctypes.CDLL(spec.origin)
    if not compiled.runs_here():
        return None
    number: Any = ctypes.c_ssize_t
    address: Any = ctypes.c_void_p
    compiled.gated_row.argtypes = [number] * 7 + [address] * 7 + [number]
    compiled.gated_steps.argtypes = [number] * 5 + [address, number, address, number, number] + [address] * 3 + [number]
    compiled.gated_row.restype = compiled.gated_steps.restype = None
    return compiled


def fused_steps(stacks: "Stacks") -> "FusedSteps | None":
    """None where torch's operations have to do it: there is no library, or it is not made for this device, dtype or width."""
    compiled, inputs = library(), stacks.inputs
    if compiled is None or inputs.device.type != "cpu" or inputs.dtype != torch.float32 or inputs.shape[-1] % LANES:
        return None
    return FusedSteps(stacks, compiled)


class FusedSteps:
    """`row` and `step` of Stacks, on the same tensors."""

    def __init__(self, stacks: "Stacks", compiled: ctypes.CDLL):
        self.gated_row, self.gated_steps = compiled.gated_row, compiled.gated_steps
        (layers, m, _, batch, width), columns = stacks.rows.shape, len(stacks.row)
        self.threads = torch.get_num_threads()
        # Made here, or what another dtype or layout was converted to would be gone when it is used.
        self.kept = [weights.contiguous() for weights in stacks.weights]
        vertical, vertical_bias, across, across_bias, horizontal, output = map(address, self.kept)
        self.scratch = stacks.rows.new_empty(max(self.threads * BLOCK * 2, batch) * width)
        sizes = layers, batch, width, columns, m, 2 * stacks.margin + 1
        rows, seen, inputs, scratch = map(address, (stacks.rows, stacks.seen, stacks.inputs, self.scratch))
        self.of_row = *sizes, rows, seen, vertical, vertical_bias, across, across_bias, scratch, self.threads
        self.sizes, self.weights = (batch, width, m), (horizontal, output, scratch, min(self.threads, -(-batch // ROWS_A_THREAD)))
        self.seen, self.inputs = seen, inputs
        self.seen_layer, seen_column = stacks.seen.stride()[:2]
        self.inputs_layer, self.inputs_row, inputs_column = stacks.inputs.stride()[:3]
        self.seen_bytes, self.inputs_bytes = (stacks.seen.element_size() * stride for stride in (seen_column, inputs_column))

    def row(self, place: int) -> None:
        """Stacks.step_row."""
        self.gated_row(place, *self.of_row)

    def step(self, column: int, first: int, last: int) -> None:
        """Stacks.step."""
        seen, inputs = self.seen + column * self.seen_bytes, self.inputs + column * self.inputs_bytes
        self.gated_steps(
            first, last, *self.sizes, seen, self.seen_layer, inputs, self.inputs_layer, self.inputs_row, *self.weights
        )


def address(tensor: Tensor) -> int:
    return tensor.data_ptr()
