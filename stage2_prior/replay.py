"""CUDA graphs of the sampling loop: its kernels are recorded once, and launched together afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stage2_prior.layers import Backbone

Graph = tuple[torch.cuda.CUDAGraph, list["Tensor | None"], Tensor]  # the graph, its input tensors, its output tensor
MOST_POSITIONS = 1024  # of a grid: capturing a larger one takes long, and its graph much memory


def can_replay(device: torch.device, positions: int) -> bool:
    """Whether sampling a grid of so many positions on this device goes through a CUDA graph."""
    return device.type == "cuda" and positions <= MOST_POSITIONS


class GraphedFunction:
    """Calls a function of tensors on a GPU, through a CUDA graph where the same call comes again.

    The first call with a key runs the function. The second one captures it as a graph, and later ones replay that graph. A call
    with another key starts over: one graph is kept.

    Sampling a grid launches thousands of small kernels, and each launch takes longer than the kernel. A graph launches them all
    at once. A replay reads the weights as they are then.
    """

    def __init__(self) -> None:
        self.key: Hashable = None
        self.graph: Graph | None = None
        self.refused = False  # a capture failed: not tried again

    def __call__(self, key: Hashable, modules: list[Any], function: Callable[..., Tensor], inputs: list[Tensor | None]) -> Tensor:
        """function(*inputs), on a new tensor.

        key: all that the result depends on except the weights of `modules` and the inputs, such as the settings of sampling.
        Shapes and dtypes of the inputs, and where the weights lie in memory, become part of it. A graph that cannot be captured
        is a warning, and the function is called instead.
        """
        places = [tensor.data_ptr() for module in modules for tensor in (*module.parameters(), *module.buffers())]
        shapes = [None if x is None else (x.shape, x.dtype) for x in inputs]
        key = (key, tuple(places), tuple(shapes), torch.is_inference_mode_enabled())
        if key != self.key:
            self.key, self.graph = key, None
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


replayed: WeakKeyDictionary[Backbone, GraphedFunction] = WeakKeyDictionary()  # one for each backbone, deleted with it
