"""The cached steps of sampling in C, steps.c, where the installation found a compiler. Elsewhere `library` returns None.

B batch, D width, L layers, K codes or mixture components, C latent channels.
"""

import ctypes
import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_prior.sampling import CannotSample

VERSION = 4  # of steps.c
# The extension modules of pyproject.toml, the fastest first.
ONE_THREAD = "compiled_steps_one_thread"  # without OpenMP
BUILDS = "compiled_steps_avx512", "compiled_steps_avx2", "compiled_steps", ONE_THREAD
SIGNATURES = {
    "gated_row": "place layers batch width columns m k *features *rows *seen *norm *vertical *vertical_bias *across *across_bias"
    " *scratch threads",
    "gated_steps": "first last batch width m *features *seen seen_layer *inputs inputs_layer inputs_row *norm *horizontal *output"
    " threads",
    "draw": "batch width hidden_width count columns channels *x x_row *hidden *hidden_bias *output *output_bias *uniforms"
    " *normals ~least_std *values *codes *scratch threads",
    "attention_steps": "first last batch width heads inner room position *x x_row *keys *values *norm *qkv *output *inner_norm"
    " *expand *contract *scratch threads",
}
"""The parameters of each function of steps.c, in order: * is an address, ~ a float, the others are sizes."""
ROWS_A_THREAD = 16  # rows of a batch for each thread; with fewer, another thread costs more than it saves
BLOCK_ROWS_A_THREAD = 8  # the same for blocks of attention, which compute more for each row


@cache
def library() -> ctypes.CDLL | None:
    """The fastest build of steps.c that runs on this processor; None where there is none.

    To test and to time each build, the environment variable STEPS_BUILD names one, or `none`. Raises CannotSample for others.
    """
    asked = os.environ.get("STEPS_BUILD")
    if asked == "none":
        return None
    if asked is not None and asked not in BUILDS:
        raise CannotSample(f"STEPS_BUILD is {', '.join(BUILDS)} or none, not {asked!r}")
    found = {build: find_spec(f"stage2_prior.{build}") for build in BUILDS if asked in (None, build)}
    installed = {build: ctypes.CDLL(spec.origin) for build, spec in found.items() if spec is not None and spec.origin is not None}
    current = {build: compiled for build, compiled in installed.items() if version_of(compiled) == VERSION}
    for build, compiled in current.items():
        if compiled.runs_here() or asked is not None:
            if build == ONE_THREAD and asked is None:
                advise("this was installed by a compiler without OpenMP, so sampling uses one thread: install one with it, and")
            return declared(compiled)
    if len(current) < len(installed):
        advise("steps.c is not what was installed, so sampling is slower:")
    elif not installed:
        advise("this was installed without a C compiler, so sampling is slower: install one, and")
    return None


def advise(what: str) -> None:
    warnings.warn(f"{what} pip install -e . again", stacklevel=3)


def declared(compiled: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument types of the library's functions, and return it."""
    types: dict[str, Any] = {"*": ctypes.c_void_p, "~": ctypes.c_float}
    for name, parameters in SIGNATURES.items():
        function = getattr(compiled, name)
        function.argtypes = [types.get(parameter[0], ctypes.c_ssize_t) for parameter in parameters.split()]
        function.restype = None
    return compiled


def version_of(compiled: ctypes.CDLL) -> int:
    try:
        return ctypes.c_int.in_dll(compiled, "steps_version").value
    except ValueError:  # of before there were versions
        return 0


def library_for(tensor: Tensor, width: int) -> ctypes.CDLL | None:
    """The library, or None where it is missing or does not support this device, dtype or width. Then torch computes the steps."""
    compiled = library()
    if compiled is None or tensor.device.type != "cpu" or tensor.dtype != torch.float32 or width % lanes(compiled):
        return None
    return compiled


def lanes(compiled: ctypes.CDLL) -> int:
    return ctypes.c_int.in_dll(compiled, "lanes").value


def panels(compiled: ctypes.CDLL, matrices: Tensor) -> Tensor:
    """Matrices, … inner columns, in the order of memory that steps.c multiplies by: panels of columns one after another."""
    panel, (inner, columns) = ctypes.c_int.in_dll(compiled, "panel").value, matrices.shape[-2:]
    whole = columns // panel * panel
    split = matrices[..., :whole].split(panel, -1) + matrices[..., whole:].split(lanes(compiled), -1)
    return torch.cat([part.flatten(-2) for part in split], -1).view(*matrices.shape[:-2], inner, columns)


def threads_for(batch: int, rows: int = ROWS_A_THREAD) -> int:
    return min(torch.get_num_threads(), -(-batch // rows))


class CompiledSteps:
    """`step_row` and `step` of Stacks in steps.py, in C, on the same tensors. weights: StepWeights."""

    def __init__(
        self,
        compiled: ctypes.CDLL,
        weights: Sequence[Tensor],
        *,
        row_features: Tensor,
        rows: Tensor,
        seen: Tensor,
        features: Tensor,
        inputs: Tensor,
    ):
        self.gated_row, self.gated_steps = compiled.gated_row, compiled.gated_steps
        (layers, m, padded, batch, width), columns = rows.shape, len(row_features)
        threads, block = torch.get_num_threads(), ctypes.c_int.in_dll(compiled, "block").value
        self.scratch = rows.new_empty(threads * block * 2 * width)
        sizes = layers, batch, width, columns, m, padded - columns + 1
        vertical_norm, vertical, vertical_bias, across, across_bias, horizontal_norm, horizontal, output = weights
        vertical, across, horizontal, output = (
            panels(compiled, matrices) for matrices in (vertical.unflatten(2, (-1, width)), across, horizontal, output)
        )
        of_row, of_step = (vertical_norm, vertical, vertical_bias, across, across_bias), (horizontal_norm, horizontal, output)
        self.weights = *of_row, *of_step
        self.of_row = *sizes, *map(address, (row_features, rows, seen, *of_row, self.scratch)), threads
        self.of_step, self.rest = (batch, width, m, address(features)), (*map(address, of_step), threads_for(batch))
        self.seen, self.inputs = address(seen), address(inputs)
        self.seen_layer, seen_column = seen.stride()[:2]
        self.inputs_layer, self.inputs_row, inputs_column = inputs.stride()[:3]
        self.seen_bytes, self.inputs_bytes = (seen.element_size() * stride for stride in (seen_column, inputs_column))

    def row(self, place: int) -> None:
        """Stacks.step_row."""
        self.gated_row(place, *self.of_row)

    def step(self, column: int, first: int, last: int) -> None:
        """Stacks.step."""
        seen, inputs = self.seen + column * self.seen_bytes, self.inputs + column * self.inputs_bytes
        self.gated_steps(
            first, last, *self.of_step, seen, self.seen_layer, inputs, self.inputs_layer, self.inputs_row, *self.rest
        )


class CompiledBlocks:
    """`step` of Blocks in steps.py, in C, on the same tensors, but with another order of a head's keys in memory.

    weights: BlockWeights.
    """

    def __init__(self, compiled: ctypes.CDLL, weights: Sequence[Tensor], heads: int, keys: Tensor, values: Tensor):
        self.attention_steps = compiled.attention_steps
        (_, images_heads, d, room), (_, inner, width) = keys.shape, weights[-1].shape
        batch = images_heads * d // width
        threads = threads_for(batch, BLOCK_ROWS_A_THREAD)
        self.scratch = keys.new_empty(batch * (4 * width + inner) + threads * room)
        self.sizes = batch, width, heads, inner, room
        norm, qkv, output, inner_norm, expand, contract = weights
        qkv, output, expand, contract = (panels(compiled, matrices) for matrices in (qkv, output, expand, contract))
        self.weights = norm, qkv, output, inner_norm, expand, contract
        self.rest = *map(address, (keys, values, *self.weights, self.scratch)), threads

    def step(self, x: Tensor, position: int, first: int, last: int) -> None:
        """Blocks.step."""
        assert x.stride(1) == 1
        self.attention_steps(first, last, *self.sizes, position, x.data_ptr(), x.stride(0), *self.rest)


def compiled_draw(hidden: nn.Linear, output: nn.Linear, count: int, batch: int) -> "CompiledDraw | None":
    """`draw` in C for a head of two linear layers with a SiLU between them, whose first `count` outputs are logits; or None."""
    compiled = library_for(hidden.weight, hidden.out_features)
    return None if compiled is None else CompiledDraw(compiled, hidden, output, count, batch)


class CompiledDraw:
    """Samples codes, or a mixture of diagonal Gaussians, with the weights that the head has when this is made."""

    def __init__(self, compiled: ctypes.CDLL, hidden: nn.Linear, output: nn.Linear, count: int, batch: int):
        padding = -output.out_features % lanes(compiled)
        inner, columns = hidden.out_features, output.out_features + padding
        # Weights are transposed: rows are inputs. The outputs are padded to whole tiles.
        first = panels(compiled, hidden.weight.detach().T), hidden.bias.detach()
        second = panels(compiled, F.pad(output.weight.detach(), (0, 0, 0, padding)).T), F.pad(output.bias.detach(), (0, padding))
        self.weights = *first, *second
        self.scratch, self.draw = hidden.weight.new_empty(batch, inner + columns), compiled.draw
        self.sizes = batch, hidden.in_features, inner, count, columns
        self.weights_at, self.rest = tuple(map(address, self.weights)), (address(self.scratch), threads_for(batch))

    def code(self, features: Tensor, uniform: Tensor) -> Tensor:
        """features B D, uniform B; returns B."""
        codes = uniform.new_empty(len(uniform), dtype=torch.int64)
        self.call(features, uniform, codes=codes)
        return codes

    def of_mixture(self, features: Tensor, uniform: Tensor, normals: Tensor, least_std: float) -> Tensor:
        """features B D, uniform B 1, normals B 1 C; returns B C. Outputs: K logits, then mean and log std of each component.

        least_std: added to every standard deviation.
        """
        values = normals.new_empty(len(normals), normals.shape[-1])
        self.call(features, uniform, normals=normals, least_std=least_std, values=values)
        return values

    def call(
        self,
        features: Tensor,
        uniform: Tensor,
        *,
        normals: Tensor | None = None,
        least_std: float = 0.0,
        values: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> None:
        """Call steps.c, which writes samples to `values`, B C, or `codes`, B."""
        channels = 0 if values is None else values.shape[1]
        if features.stride(1) != 1:
            features = features.contiguous()
        assert uniform.is_contiguous() and (normals is None or normals.is_contiguous())
        at_features, at_noise = (features.data_ptr(), features.stride(0)), (uniform.data_ptr(), address(normals), least_std)
        self.draw(*self.sizes, channels, *at_features, *self.weights_at, *at_noise, address(values), address(codes), *self.rest)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
