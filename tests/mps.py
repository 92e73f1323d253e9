"""A stand-in for a Mac's GPU: tensors that compute on the CPU, but refuse what MPS lacks.

An operation on its tensors runs on the CPU tensors inside them. It is refused where torch lists no kernel for MPS, where
float64 is involved, or where tensors of the CPU are mixed in. What a real MPS computes wrongly is not found.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("mps", 0)
BENEATH = torch.device("meta")  # what torch's own code in C++ takes it for: gradients need a device that every build has
TYPES = (DEVICE.type, BENEATH.type)
LACKING = (torch.float64, torch.complex128)
# Operations that may have tensors of both devices: moves, and those with indices.
MIXED = {"aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}


class Refused(RuntimeError):
    """What a real device would refuse too."""


class OnDevice(Tensor):
    """A tensor of the stand-in; `inner` is the CPU tensor that holds its numbers."""

    inner: Tensor
    device = DEVICE  # type: ignore[assignment]
    is_meta = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        if inner.dtype in LACKING:
            raise Refused(f"MPS has no {inner.dtype}")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=BENEATH, **layout)
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:  # which torch has for no subclass
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Inside, tensors can be made on the stand-in and moved to it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("device")
    made = asked is not None and torch.device(asked).type in TYPES
    found: list[Tensor] = []
    inner = [plain(value, found) for value in args]
    named = {name: plain(value, found) for name, value in kwargs.items()}
    here = any(isinstance(tensor, OnDevice) for tensor in found)
    if not here and not made:
        return function(*args, **kwargs)
    name, there = described(function)
    if not there:
        raise Refused(f"{name} is not there on MPS")
    strays = [tuple(tensor.shape) for tensor in found if not isinstance(tensor, OnDevice) and tensor.ndim]
    if here and strays and name not in MIXED:
        raise Refused(f"{name} of tensors of MPS and of the CPU, {strays}")
    if asked is not None:
        named["device"] = torch.device("cpu")
    result = function(*inner, **named)
    if asked is not None and not made:  # a move to the CPU
        if result.dtype in LACKING:
            raise Refused(f"MPS has no {result.dtype}: move first")
        return result
    returns = function._schema.returns
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:  # what was written to
        return kwargs.get("out", args[0])
    return wrapped(result)


def plain(value: Any, found: list[Tensor]) -> Any:
    """An argument with the CPU tensors of those of the stand-in; all its tensors are added to `found`."""
    if isinstance(value, Tensor):
        found.append(value)
        return value.inner if isinstance(value, OnDevice) else value
    return type(value)(plain(part, found) for part in value) if isinstance(value, list | tuple) else value


def wrapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return OnDevice(value)
    return type(value)(wrapped(part) for part in value) if isinstance(value, list | tuple) else value


@cache
def described(function: Any) -> tuple[str, bool]:
    """The name of an operation, and whether it is there on MPS."""
    name = function._schema.name + (f".{function._schema.overload_name}" if function._schema.overload_name else "")
    return name, on_mps(name.removeprefix("aten::"))


@cache
def listed() -> dict[str, dict[str, Any]]:
    """What torch says of its operations: for which devices it has a kernel."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(path.read_text(), yaml.CSafeLoader)}


def on_mps(name: str) -> bool:
    entry = listed().get(name, {})
    if "structured_delegate" in entry:
        return on_mps(entry["structured_delegate"])
    keys = [key.strip() for keys in entry.get("dispatch", ()) for key in keys.split(",")]
    return not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys)
