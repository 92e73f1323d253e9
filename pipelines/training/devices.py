"""The devices that a run computes on, as a Fabric."""

import logging
import os
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from pipelines.console import DEVICES, UserError, nearest, under_torchrun
from pipelines.training.config import Precision
from pipelines.training.fabric import DDPStrategy, Fabric, ModelParallelStrategy, Strategy


def resolved(precision: Precision, device: str) -> Precision:
    """What an auto precision stands for on a device: bfloat16 where it multiplies in it."""
    if precision != "auto":
        return precision
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        return "float32"  # MPS has bfloat16 from macOS 14 on, but multiplies no faster in it on every chip
    cpu: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
    return "bfloat16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "float32"


def open_fabric(device: str = "auto", precision: Precision = "float32", sharded: bool = False) -> Fabric:
    """Where and how to train. device: one of DEVICES; auto precision: see `resolved`.

    Under torchrun, connects its processes. sharded: each holds a share of weights and optimizer, not all of them.
    Raises UserError when the device is not there, or a machine has fewer of them than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no MPS device here; use --device cpu")
    if device not in DEVICES:
        raise UserError(f"there is no device {device!r}{nearest(device, DEVICES)}")
    torch.backends.cudnn.allow_tf32 = False  # torch would round the float32 numbers of convolutions to 10 bits; not in products
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    processes, here = (int(os.environ[name]) if under_torchrun() else 1 for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if on_gpu and here > torch.cuda.device_count():
        raise UserError(f"{here} processes need as many CUDA devices, and this machine has {torch.cuda.device_count()}")
    strategy: str | Strategy = "auto"
    if processes > 1:
        strategy = ModelParallelStrategy(shard, processes, tensor_parallel_size=1) if sharded else DDPStrategy()
        # Of 1×1 convolutions and single channels, whose strides can be told in two ways.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    elif sharded:
        raise UserError("weights can be sharded over two or more processes only: torchrun --nproc-per-node N -m pipelines.…")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # of precision and processes, also where nothing is trained
    fabric = Fabric(
        accelerator=device,
        devices=here,
        num_nodes=processes // here,
        strategy=strategy,
        precision="bf16-mixed" if resolved(precision, device) == "bfloat16" else "32-true",
    )
    fabric.launch()
    return fabric


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2: every block of a causal backbone by itself, brought together only while it computes; then the rest."""
    for name, block in model.named_modules():
        if name.rpartition(".")[0].endswith(("backbone.blocks", "backbone.layers")):
            fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model
