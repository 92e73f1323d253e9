"""How a run is trained and where, which no figure depends on."""

from dataclasses import dataclass
from typing import Literal

from pipelines.runs.names import Device
from pipelines.training.config import OnNan, TrackerKind


@dataclass(frozen=True)
class Options:
    """How to run: no part of the config, and free to change when a run goes on."""

    device: Device = "auto"
    """the device to run on; auto takes the fastest that is there"""
    on_nan: OnNan = "stop"
    """when a loss or gradient is not a number: stop before it touches a weight, skip the step, or rewind to the last
    checkpoint and go on with another data order and other noise"""
    tracker: TrackerKind = "none"
    """where curves and pictures of the training go, under RUN/track: csv, tensorboard or wandb"""
    stage1_from: str | None = None
    """run whose stage 1 this one takes over, by its name or path: its encoder, decoder and latents, of which the disk holds one
    copy. Only the prior is trained"""
    compare: bool = True
    """whether to compare the priors at the end; without it, python -m pipelines.compare RUN does"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """under torchrun, what each process holds of the prior in training: ddp all of it, fsdp a share of its weights, gradients
    and optimizer (FSDP2), for a prior larger than one device trains"""


DEFAULTS = Options()
