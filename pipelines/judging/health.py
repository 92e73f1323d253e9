"""Whether stage 2 has learned: its nats beside those of priors that need no training, and training beside held out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipelines.judging.quality import error_of_mean
from pipelines.training.checkpoints import Moment

OVERFIT = 0.05  # of what the prior gains over the standard one, lost again by the end of the training


@dataclass(frozen=True)
class Health:
    """Nats an image of held-out latents under the learned prior, and what they compare with."""

    rival: str
    """the best of the priors that need no training"""
    gain: float
    """how many nats the learned prior saves over it, on the same draws"""
    plus_minus: float
    """half of the 95 % interval of the gain"""
    training: float
    """loss of the last training batch at the best checkpoint"""
    held_out: float
    """loss on validation data at the best checkpoint"""
    best_step: int
    last_step: int
    lost: float
    """by how much the held-out loss has risen from the best checkpoint to the last"""
    gain_over_standard: float

    @property
    def overfits(self) -> bool:
        return self.best_step < self.last_step and self.lost > OVERFIT * max(self.gain_over_standard, 0.0)

    @property
    def gains_nothing(self) -> bool:
        """Whether the prior is not better than the best rival beyond the error; from a single image, this cannot be told."""
        return self.gain < self.plus_minus < math.inf


def health_of(nats: Mapping[str, Tensor], history: Sequence[Moment]) -> Health | None:
    """nats: of each prior, N held-out images, the same draws; history: of stage 2.

    None where there is no learned prior, or no density.
    """
    rivals = {name: values for name, values in nats.items() if name != "learned"}
    if "learned" not in nats or not rivals or not history:
        return None
    learned = nats["learned"]
    rival = min(rivals, key=lambda name: float(rivals[name].mean()))
    saved = rivals[rival] - learned
    best = min(history, key=lambda moment: moment.held_out["loss"])
    return Health(
        rival=rival,
        gain=float(saved.mean()),
        plus_minus=error_of_mean(saved) if len(saved) > 1 else float("inf"),
        training=best.train["loss"],
        held_out=best.held_out["loss"],
        best_step=best.step,
        last_step=history[-1].step,
        lost=history[-1].held_out["loss"] - best.held_out["loss"],
        gain_over_standard=float((nats["standard"] - learned).mean()),
    )
