"""How a model is trained: settings, apart from the loop that follows them."""

from dataclasses import dataclass
from typing import Literal

from pipelines import processes
from pipelines.console import UserError

Precision = Literal["auto", "float32", "bfloat16"]
OnNan = Literal["stop", "skip", "rewind"]
TrackerKind = Literal["none", "csv", "tensorboard", "wandb"]


@dataclass(frozen=True)
class FitConfig:
    """One training."""

    steps: int
    """optimizer steps"""
    batch_size: int = 128
    """images a step, over all devices"""
    microbatches: int = 1
    """parts of a device's share of the batch, one after the other, whose gradients are summed: for what memory cannot hold at
    once. The step is that of the whole batch; but codebooks, normalizations and a learned σ take in one part at a time"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW, after a linear warm-up and before a cosine decay to 0"""
    warmup_steps: int = 100
    """steps of linear warm-up"""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; torch's default"""
    gradient_clip: float = 100.0
    """largest norm of the gradient, in nats an image"""
    average_decay: float = 0.999
    """decay a step of the running average of the weights, which is what is kept; 0 keeps the raw weights"""
    checkpoint_steps: int = 500
    """steps between checkpoints; the held-out loss is measured at each, and the best one is kept"""
    compile: bool = False
    """compile the model with torch.compile, which takes minutes before it saves any time; without, where it does not work"""


def check_config(config: FitConfig, fewest_steps: int = 1) -> None:
    """Raises UserError when a setting is out of range, or a batch does not divide into equal parts in each process."""
    for name, least in (
        ("steps", fewest_steps),
        ("batch_size", 1),
        ("checkpoint_steps", 1),
        ("weight_decay", 0),
        ("warmup_steps", 0),
    ):
        value = getattr(config, name)
        if not value >= least:
            raise UserError(f"{name.replace('_', '-')} is a number from {least} up, not {value}")
    for name in ("learning_rate", "gradient_clip"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name.replace('_', '-')} is a number above 0, not {getattr(config, name)}")
    if not 0 <= config.average_decay < 1:
        raise UserError(f"average-decay lies from 0 up and below 1, not at {config.average_decay}")
    shares = config.microbatches * processes.count()
    if config.microbatches < 1 or config.batch_size % shares:
        raise UserError(
            f"batches of {config.batch_size} do not divide into {config.microbatches} microbatches in each of {processes.count()}"
            f" processes; a batch size that is a multiple of {max(shares, processes.count())} does"
        )
