"""How and where a run is trained, as far as it is not part of its config."""

from dataclasses import dataclass
from typing import Literal

from pipelines.runs.names import Device
from pipelines.training.config import OnNan, TrackerKind


@dataclass(frozen=True)
class Options:
    """Options that are not part of the config, and may change when a run is continued."""

    device: Device = "auto"
    on_nan: OnNan = "stop"
    """what to do when a loss or gradient is not a number: stop before it changes a weight, skip the step, or rewind to the last
    checkpoint and continue with another data order and other noise"""
    tracker: TrackerKind = "none"
    """tool that records curves and images of the training, under RUN/track: csv, tensorboard or wandb"""
    stage1_from: str | None = None
    """name or path of a run whose stage 1 is reused: its encoder, decoder and latents, of which the disk holds one copy. Only the
    prior is trained"""
    compare: bool = True
    """compare the priors at the end; python -m pipelines.compare RUN does so later"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """how the prior is trained under torchrun: ddp keeps a copy in each process; fsdp (FSDP2) shards its weights, gradients and
    optimizer state, for a prior that is too large for one device"""


DEFAULTS = Options()
