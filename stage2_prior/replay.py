"""A GPU's replay of what was launched once: CUDA graphs of the sampling loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stage2_prior.layers import Backbone

Graph = tuple[torch.cuda.CUDAGraph, list["Tensor | None"], Tensor]  # with the tensors it reads, and the one it writes
MOST_POSITIONS = 1024  # of a grid; for more, a graph takes long to make and much memory


class Replayed:
    """Calls of a function of tensors on a GPU. The second of a kind in a row is captured as a CUDA graph, later ones replay it.

    A grid is drawn by thousands of small kernels, each of which takes longer to launch than to run; a graph launches them all
    at once. The weights are read anew in each replay.
    """

    def __init__(self) -> None:
        self.kind: Hashable = None
        self.graph: Graph | None = None
        self.refused = False  # a capture failed: not tried again

    def __call__(
        self, kind: Hashable, modules: list[Any], function: Callable[..., Tensor], inputs: list[Tensor | None]
    ) -> Tensor:
        """kind: what else the result depends on, beside the modules' weights and the inputs."""
        places = [tensor.data_ptr() for module in modules for tensor in (*module.parameters(), *module.buffers())]
        shapes = [None if x is None else (x.shape, x.dtype) for x in inputs]
        kind = (kind, tuple(places), tuple(shapes), torch.is_inference_mode_enabled())
        if kind != self.kind:
            self.kind, self.graph = kind, None
            return function(*inputs)
        if self.graph is None and not self.refused:
            try:
                self.graph = self.captured(function, inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"sampling goes on without a CUDA graph: {error}", stacklevel=2)
                self.refused = True
        if self.graph is None:
            return function(*inputs)
        graph, kept, result = self.graph
        for place, value in zip(kept, inputs):
            if place is not None and value is not None:
                place.copy_(value)
        graph.replay()
        return result.clone()

    @staticmethod
    def captured(function: Callable[..., Tensor], inputs: list[Tensor | None]) -> Graph:
        graph, kept = torch.cuda.CUDAGraph(), [None if x is None else x.clone() for x in inputs]
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            result = function(*kept)
        return graph, kept, result


replayed: WeakKeyDictionary[Backbone, Replayed] = WeakKeyDictionary()  # the last graph of each backbone, gone with it
