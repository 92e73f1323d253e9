"""How a model is trained: settings, apart from the loop that follows them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from pipelines import processes
from pipelines.console import UserError

Precision = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
OnNan = Literal["stop", "skip", "rewind"]
TrackerKind = Literal["none", "csv", "tensorboard", "wandb"]


@dataclass(frozen=True)
class FitConfig:
    """One training."""

    steps: Annotated[int, Interval(ge=0, le=1_000_000_000)]
    """optimizer steps"""
    batch_size: Annotated[int, Interval(ge=1, le=1_000_000)] = 128
    """images in the batch of a step, over all devices"""
    microbatches: Annotated[int, Interval(ge=1, le=1_000_000)] = 1
    """gradient accumulation: a device's share of the batch is processed in so many parts, for a batch that memory cannot hold at
    once. Codebooks, normalizations and a learned σ see one part at a time"""
    learning_rate: Annotated[float, Interval(gt=0, le=10)] = 1e-3
    """peak learning rate, after a linear warm-up and before a cosine decay to 0"""
    optimizer: Optimizer = "adamw"
    """muon makes the momentum of matrices orthogonal (Jordan et al. 2024), so that a convolutional autoencoder needs fewer steps;
    vectors, embeddings of codes and the layer before their logits are left to AdamW, at the same learning rate"""
    warmup_steps: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 100
    """steps of linear warm-up"""
    weight_decay: Annotated[float, Interval(ge=0, le=100)] = 0.01
    """decoupled weight decay; torch's default for AdamW"""
    gradient_clip: Annotated[float, Interval(gt=0, le=1_000_000_000)] = 100.0
    """largest norm of the gradient, in nats an image"""
    average_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.999
    """decay of the exponential moving average of the weights, which are the weights to use; 0 uses the raw weights"""
    checkpoint_steps: Annotated[int, Interval(ge=1, le=1_000_000_000)] = 500
    """steps between checkpoints; the held-out loss is measured at each, and the checkpoint with the lowest is used"""
    compile: bool = False
    """compile the model with torch.compile, which takes minutes at first; not done where torch.compile does not work, or for
    fewer than 2,000 steps"""


def check_batches(config: FitConfig) -> None:
    """Raises UserError when a batch does not divide into equal parts in each process."""
    shares = config.microbatches * processes.count()
    if config.batch_size % shares:
        raise UserError(
            f"batches of {config.batch_size} do not divide into {config.microbatches} microbatches in each of {processes.count()}"
            f" processes; a multiple of {shares} does"
        )
