"""The only training loop, used by both stages and by the classifier behind the metrics.

It knows only `model(*batch, step=step)["loss"]`, and judges held-out batches by the same dict.

The data order is a function of (seed, step); torch is reseeded from (seed, step, rank) before every step; the learning
rate is a function of the step. So a resumed run equals an uninterrupted one, and there is no state but weights,
optimizer, step, and how often training was rewound: the seed is also a function of that.
"""

import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsFloat

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pipelines import checkpoint
from pipelines.console import Progress, Signals, Stopped, UserError, say

Precision = Literal["auto", "float32", "bfloat16"]
OnNan = Literal["stop", "skip", "rewind"]
REWINDS = 3  # from one checkpoint, before it is given up
CURVE_STEPS = 50  # between two points of a tracker's curves


def fabric_for(device: str, precision: Precision) -> Fabric:
    """Where and how to train. device: a Lightning accelerator's name; auto precision: see RunConfig."""
    if precision == "auto":
        on_gpu = device != "cpu" and torch.cuda.is_available()
        cpu = torch.cpu.get_capabilities()
        native = torch.cuda.is_bf16_supported() if on_gpu else cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        precision = "bfloat16" if native else "float32"
    return Fabric(accelerator=device, devices=1, precision="bf16-mixed" if precision == "bfloat16" else "32-true")


class Source(Protocol):
    """Examples: `source[indices]` are the positional arguments of the model for a batch.

    One that reads from disk has a method `prefetch(indices)` as well, which starts on the batch that is asked for next.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Any) -> tuple: ...


def prefetch(source: Source, indices: Any) -> None:
    if hasattr(source, "prefetch"):
        source.prefetch(indices)


class Tracker:
    """Where the curves and pictures of a training go; this one keeps none of them."""

    def begin(self, step: int) -> None:
        """Training goes on from this step; what was kept of later ones is forgotten."""

    def scalars(self, step: int, part: str, values: Mapping[str, SupportsFloat]) -> None:
        """part: train or held_out."""

    def pictures(self, step: int, model: nn.Module) -> None:
        """What the model has to show. It is left in training mode."""


class NotANumber(UserError):
    """A loss or gradient is not a number. No weight or buffer was touched."""


@dataclass(frozen=True)
class FitConfig:
    """One training."""

    steps: int
    """optimizer steps"""
    batch_size: int = 128
    """images a step, over all devices"""
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


def learning_rate(config: FitConfig, step: int) -> float:
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


class Order:
    """Which examples step s sees: consecutive slices of one permutation an epoch, a function of (seed, step) alone."""

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch, self.permutation = -1, torch.empty(0)

    def permuted(self, epoch: int) -> Tensor:
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self.epoch, self.permutation = epoch, torch.randperm(self.length, generator=generator)
        return self.permutation

    def indices(self, step: int) -> Tensor:
        position, stop = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while position < stop:  # a batch may cross the end of an epoch, or of several when the data set is tiny
            epoch, start = divmod(position, self.length)
            parts.append(self.permuted(epoch)[start : start + stop - position])
            position += len(parts[-1])
        return torch.cat(parts)


def seed_of(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbours share nothing."""
    state = 0
    for number in numbers:  # the finalizer of splitmix64 (Steele et al. 2014)
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def running_average(decay: float):
    """An exponential average whose window grows with the step, so that it forgets the initial weights early."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        steps = float(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + steps) / (10 + steps)))

    return update


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, source: Source, batch_size: int, seed: int) -> dict[str, float]:
    """The mean of the model's terms over a data set, with the same draws every time. The model is left in training mode."""
    model.eval()
    torch.manual_seed(seed_of(seed, 1))
    totals: dict[str, float] = {}
    for start in range(0, len(source), batch_size):
        rows = slice(start, min(start + batch_size, len(source)))
        batch = source[rows]
        prefetch(source, slice(rows.stop, rows.stop + batch_size))
        for name, value in model(*fabric.to_device(batch)).items():
            totals[name] = totals.get(name, 0.0) + float(value) * (rows.stop - rows.start)
    model.train()
    return {name: total / len(source) for name, total in totals.items()}


def fit(
    fabric: Fabric,
    model: nn.Module,
    train: Source,
    held_out: Source,
    config: FitConfig,
    seed: int,
    folder: Path,
    label: str,
    on_nan: OnNan = "stop",
    tracker: Tracker | None = None,
) -> checkpoint.Checkpoint:
    """Train `model` in place, from its last checkpoint under `folder` if there is one; returns the best checkpoint.

    The model ends with the best checkpoint's weights, in eval mode. A finished training is only loaded.
    Raises UserError when a loss or gradient is not a number (on_nan "stop"; "skip" leaves that step out and goes on; "rewind"
    goes back to the last checkpoint and on with another data order and other noise, REWINDS times at most), OSError when a
    checkpoint cannot be written, and Stopped when a signal asked to end: after a checkpoint, from which it goes on.
    """
    done = checkpoint.usable(folder)
    if not done or done[-1].step < config.steps:
        done = Training(fabric, model, train, held_out, config, seed, folder, label, on_nan, tracker).run(done)
    else:
        say(f"{label}: finished, skipped")
    chosen = checkpoint.best(checkpoint.prune(folder, done))
    chosen.load_into(model)
    fabric.to_device(model).eval()
    return chosen


class Training:
    """The state of one `fit`: weights, their average, the optimizer, and the history of held-out terms."""

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        train: Source,
        held_out: Source,
        config: FitConfig,
        seed: int,
        folder: Path,
        label: str,
        on_nan: OnNan = "stop",
        tracker: Tracker | None = None,
    ):
        self.on_nan, self.tracker = on_nan, tracker or Tracker()
        self.fabric, self.model, self.train, self.held_out = fabric, model, train, held_out
        self.config, self.seed, self.folder, self.label = config, seed, folder, label
        self.draw_anew(rewinds=0)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.wrapped, self.wrapped_optimizer = fabric.setup(model, self.optimizer)
        self.average = AveragedModel(model, multi_avg_fn=running_average(config.average_decay))
        self.history: list[dict[str, Any]] = []
        self.kept: list[checkpoint.Checkpoint] = []

    def run(self, checkpoints: list[checkpoint.Checkpoint]) -> list[checkpoint.Checkpoint]:
        """Train to the end from the last of these checkpoints; returns those that are kept."""
        config, step, self.kept = self.config, 0, checkpoints
        if checkpoints:
            step = self.restore(checkpoints[-1])
            say(f"{self.label}: going on from step {step}")
        elif self.on_nan == "rewind":
            self.write(0, held_out=None)  # something to go back to
        self.tracker.begin(step)
        self.model.train()
        rate = config.batch_size
        with Progress(self.label, config.steps * rate, "images", step * rate) as progress, Signals() as signals:
            while step < config.steps:
                try:
                    terms = self.step(step)
                except NotANumber as error:
                    before, step = step, self.rewind(error)
                    progress.update((step - before) * rate)
                    continue
                step += 1
                progress.update(rate, terms)
                if step % CURVE_STEPS == 0:
                    self.tracker.scalars(step, "train", terms)
                if step % config.checkpoint_steps == 0 or step == config.steps:
                    self.save(step, terms)
                elif signals.received:
                    self.write(step, held_out=None)
                if signals.received:
                    name = signal.Signals(signals.received).name
                    where = f"{self.label}, step {step} of {config.steps}"
                    raise Stopped(f"{name}: saved at {where}; the same command goes on from there", signals.received)
        return self.kept

    def indices(self, step: int) -> Tensor:
        return self.order.indices(step)[self.fabric.global_rank :: self.fabric.world_size]

    def step(self, step: int) -> dict[str, Tensor]:
        indices = self.indices(step)
        torch.manual_seed(seed_of(self.order.seed, step, self.fabric.global_rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        buffers = [buffer.clone() for buffer in self.model.buffers()]  # a forward pass may move them, as a codebook's averages
        batch = self.train[indices]
        prefetch(self.train, self.indices(step + 1))
        terms = self.wrapped(*self.fabric.to_device(batch), step=step)
        self.optimizer.zero_grad()
        self.fabric.backward(terms["loss"])
        norm = self.fabric.clip_gradients(
            self.wrapped, self.wrapped_optimizer, max_norm=self.config.gradient_clip, error_if_nonfinite=False
        )
        if bool(terms["loss"].isfinite()) and norm is not None and bool(norm.isfinite()):
            self.wrapped_optimizer.step()
            self.average.update_parameters(self.model)
        else:
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), buffers):
                    buffer.copy_(before)
            self.not_a_number(step, indices, terms)
        return {name: value.detach() for name, value in terms.items()}

    def not_a_number(self, step: int, indices: Tensor, terms: dict[str, Tensor]) -> None:
        """Say what is not a number, and where; raises NotANumber unless such steps are to be skipped."""
        wrong = [name for name, value in terms.items() if not value.isfinite().all()]
        wrong += [
            f"the gradient of {name}"
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        wrong.append("the norm of the gradient")  # where every part of it is a number still
        what = f"{self.label}, step {step}: {wrong[0]} is not a number (images {', '.join(map(str, indices.tolist()))})"
        if self.on_nan != "skip":
            raise NotANumber(what)
        say(f"warning: {what}; the step is left out")

    def rewind(self, error: NotANumber) -> int:
        """Go back to the last checkpoint, and on with other draws; returns its step. Raises UserError when that is not asked for,
        or has not helped."""
        last = self.kept[-1] if self.kept else None
        where = f"the last good checkpoint is {last.folder}" if last else "no checkpoint was written before"
        if self.on_nan != "rewind" or last is None:
            raise UserError(
                f"{error}; {where}. A lower learning rate may help; --on-nan skip leaves such steps out, --on-nan rewind goes"
                " back and on with other draws."
            ) from error
        rewinds = self.rewinds + 1
        step = self.restore(last)
        if rewinds > self.rewinds + REWINDS:
            raise UserError(f"{error}, after {REWINDS} rewinds to {last.folder}, too. A lower learning rate may help.") from error
        self.draw_anew(rewinds)
        self.tracker.begin(step)
        say(f"warning: {error}; rewound to {last.folder}, and on with another data order and other noise")
        return step

    def draw_anew(self, rewinds: int) -> None:
        """The data order and the noise from here on, after so many rewinds."""
        self.rewinds = rewinds
        seed = seed_of(self.seed, 2, rewinds) if rewinds else self.seed
        self.order = Order(len(self.train), self.config.batch_size, seed)

    def save(self, step: int, terms: dict[str, Tensor]) -> None:
        """Measure the held-out loss and write a checkpoint."""
        held_out = evaluate(self.fabric, self.average.module, self.held_out, self.config.batch_size, self.seed)
        if not math.isfinite(held_out["loss"]):
            raise UserError(f"{self.label}, step {step}: the held-out loss is not a number. A lower learning rate may help.")
        self.history.append({"step": step, "train": {k: float(v) for k, v in terms.items()}, "held_out": held_out})
        self.tracker.scalars(step, "held_out", held_out)
        self.tracker.pictures(step, self.average.module)
        self.write(step, held_out)

    def write(self, step: int, held_out: dict[str, float] | None) -> None:
        training = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        record = {"step": step, "held_out": held_out, "history": self.history, "rewinds": self.rewinds, "time": time.time()}
        saved = checkpoint.save(self.folder, record, self.average.module.state_dict(), training)
        self.kept = checkpoint.prune(self.folder, [*self.kept, saved])

    def restore(self, last: checkpoint.Checkpoint) -> int:
        training = last.training()
        raw = {name.removeprefix("model."): tensor for name, tensor in training.items() if name.startswith("model.")}
        checkpoint.fill(self.model, raw, last.folder / "training.safetensors")
        last.load_into(self.average.module)
        updates = [int(tensor) for name, tensor in training.items() if name.startswith("optimizer.") and name.endswith(".step")]
        self.average.n_averaged.fill_(max(updates, default=0))  # fewer than steps where some were left out
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in training.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.history = list(last.record["history"])
        self.draw_anew(last.record.get("rewinds", 0))
        return last.step
