"""The only training loop, used by both stages and by the classifier behind the metrics.

It knows only `model(*batch, progress=…)["loss"]`, progress being the share of the steps that are done, and judges held-out
batches by the same dict.

The data order is a function of (seed, step); torch is reseeded from (seed, step, rank) before every step; the learning
rate is a function of the step. So a resumed run equals an uninterrupted one, and there is no state but weights,
optimizer, step, and how often training was rewound: the seed is also a function of that.

Of every batch each process takes an equal share, in one or more microbatches. Losses are means over them, so gradients are
those of the whole batch, and every process takes the same step.
"""

import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipelines import processes
from pipelines.console import Progress, Signals, Stopped, UserError, say
from pipelines.files import write_tensors
from pipelines.training import checkpoints, sharding
from pipelines.training.average import Average
from pipelines.training.config import FitConfig, OnNan, check_batches
from pipelines.training.fabric import Fabric, ModelParallelStrategy
from pipelines.training.muon import Muon
from pipelines.training.order import Order, Source, in_order, prefetch, seed_of

REMEDY = "A lower learning rate, under another --run, may help"
REWINDS = 3  # from one checkpoint, before it is given up
SAVE_SECONDS = 60.0  # without a checkpoint, then one is written between two held-out evaluations
SAVE_SHARE = 0.02  # of the time at most goes into such checkpoints: large ones are written less often
EARLY = 1 / 8  # of the steps: when the weights are kept that autoguidance leads away from
WORTH_COMPILING = 2000  # steps of a training: compiling takes minutes, which a shorter one does not win back
CURVE_STEPS = 50  # between two points of a tracker's curves
NAMED = 8  # images of a batch that a message names


class Tracker:
    """Where the curves and pictures of a training go; this one keeps none of them."""

    def begin(self, step: int) -> None:
        """Training goes on from this step; what was kept of later ones is forgotten."""

    def scalars(self, step: int, part: str, values: Mapping[str, SupportsFloat]) -> None:
        """part: train or held_out."""

    def pictures(self, step: int, model: nn.Module) -> None:
        """What the model has to show. It is left in training mode."""


UNTRACKED = Tracker()


class NotANumber(UserError):
    """A loss or gradient is not a number. No weight or buffer was touched."""


def early_step(config: FitConfig) -> int:
    """After which step the weights for autoguidance are kept."""
    return math.ceil(EARLY * config.steps)


def learning_rate(config: FitConfig, step: int) -> float:
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def can_compile(fabric: Fabric) -> bool:
    """Whether torch.compile works here; says so where it does not, for want of a compiler, say."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # on a CPU it misses a GPU
    probe = nn.Linear(1, 1, device=fabric.device)
    probe.compile()
    try:
        probe(torch.ones(1, 1, device=fabric.device))
    except RuntimeError as error:
        say(f"warning: torch.compile does not work here ({shortened(error)}); going on without")
        return False
    return True


def shortened(error: Exception) -> str:
    return " ".join(str(error).split()[:20])


@torch.no_grad()
def evaluate(fabric: Fabric, model: nn.Module, source: Source, batch_size: int, seed: int) -> dict[str, float]:
    """The mean of the model's terms over a data set, with the same draws every time. The model is left in training mode."""

    def terms(rows: Tensor) -> dict[str, float]:
        torch.manual_seed(seed_of(seed, 1, int(rows[0])))
        batch = in_order(source, rows, batch_size)
        return {name: float(value) * len(rows) for name, value in model(*fabric.to_device(batch)).items()}

    model.eval()
    batches = processes.in_batches(terms, torch.arange(len(source)), batch_size)
    model.train()
    return {name: sum(batch[name] for batch in batches) / len(source) for name in batches[0]}


def fit(
    fabric: Fabric,
    model: nn.Module,
    train: Source,
    held_out: Source,
    config: FitConfig,
    seed: int,
    folder: Path,
    label: str,
    *,
    on_nan: OnNan = "stop",
    tracker: Tracker = UNTRACKED,
    early: Path | None = None,
    beside: Callable[[], Mapping[str, float]] = dict,
    says_skipped: bool = True,
) -> checkpoints.Checkpoint:
    """Train `model` in place, from its last checkpoint under `folder` if there is one; returns the best checkpoint.

    label: names the training in messages. early: file for the weights after an eighth of the steps, for autoguidance.
    beside: held-out losses of other models, by name, to show beside this one's; called where there is something to train.
    says_skipped: print a line where the training is finished already.

    The model ends with the best checkpoint's weights, in eval mode. A finished training is only loaded.
    Raises UserError when a loss or gradient is not a number (on_nan "stop"; "skip" leaves that step out and goes on; "rewind"
    goes back to the last checkpoint and on with another data order and other noise, REWINDS times at most), OSError when a
    checkpoint cannot be written, and Stopped when a signal asked to end: after a checkpoint, from which it goes on.
    """
    done = processes.on_first(lambda: checkpoints.usable(folder))
    if not done or done[-1].step < config.steps:
        done = processes.on_first(lambda: checkpoints.resumable(done))
        # What has been sharded stays so; the caller's model is not.
        trained = copy.deepcopy(model) if isinstance(fabric.strategy, ModelParallelStrategy) else model
        training = Training(
            fabric,
            trained,
            train,
            held_out,
            config,
            seed,
            folder,
            label,
            on_nan=on_nan,
            tracker=tracker,
            early=early,
            beside=beside(),
        )
        done = training.run(done)
        warn_of_divergence(label, done[-1].record.history)
    elif says_skipped:
        say(f"{label}: finished, skipped")
    chosen = checkpoints.best(processes.on_first(lambda: checkpoints.prune(folder, done)))
    chosen.load_into(model)
    fabric.to_device(model).eval()
    return chosen


def like(weight: Tensor, moment: Tensor) -> Tensor:
    """A moment of the optimizer, of the weight's shape, with its numbers in the weight's order in memory."""
    return torch.empty_like(weight, requires_grad=False).copy_(moment)


def warn_of_divergence(label: str, history: list[checkpoints.Moment]) -> None:
    """Say so where the loss ends far above where it has been, in training and held out: half of what was gained is lost again.

    Held out alone, that is overfitting, and the comparison says so.
    """
    first, last = history[0], history[-1]
    best = min(history, key=lambda moment: moment.held_out["loss"])

    def lost(losses: Callable[[checkpoints.Moment], dict[str, float]]) -> bool:
        gained, again = (losses(moment)["loss"] - losses(best)["loss"] for moment in (first, last))
        return gained > 0 and again > gained / 2

    if lost(lambda moment: moment.train) and lost(lambda moment: moment.held_out):
        say(
            f"warning: {label} diverged: the held-out loss was {best.held_out['loss']:.4g} at step {best.step} and is"
            f" {last.held_out['loss']:.4g} at the end. The weights of step {best.step} are used. {REMEDY}; so may larger"
            " batches."
        )


@dataclass(eq=False)
class Training:
    """The state of one `fit`: weights, their average, the optimizer, and the history of held-out terms."""

    fabric: Fabric
    model: nn.Module
    train: Source
    held_out: Source
    config: FitConfig
    seed: int
    folder: Path
    label: str
    on_nan: OnNan = "stop"
    tracker: Tracker = UNTRACKED
    early: Path | None = None
    beside: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fabric, model, config, label = self.fabric, self.model, self.config, self.label
        check_batches(config)
        self.draw_anew(rewinds=0)
        if config.compile and config.steps < WORTH_COMPILING:
            say(f"{label}: not compiled, which would take longer than it saves in so few steps")
        elif config.compile and can_compile(fabric):
            say(f"{label}: compiling, which takes minutes before the first step")
            # As without: gradients of what is computed in full precision are not rounded (pytorch issue 153044). Versions of
            # torch before that setting round them.
            if hasattr(torch._functorch.config, "backward_pass_autocast"):
                torch._functorch.config.backward_pass_autocast = "off"
            model.compile()
        self.wrapped = fabric.setup_module(model)
        settings: dict[str, Any] = {
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
            "betas": (0.9, 0.99),
            "fused": True,
        }
        self.optimizer = (
            Muon(model, **settings) if config.optimizer == "muon" else torch.optim.AdamW(model.parameters(), **settings)
        )
        self.wrapped_optimizer: Any = fabric.setup_optimizers(self.optimizer)
        self.average = Average(model, config.average_decay)
        self.history: list[checkpoints.Moment] = []
        self.kept: list[checkpoints.Checkpoint] = []
        self.began = time.monotonic()

    def run(self, done: list[checkpoints.Checkpoint]) -> list[checkpoints.Checkpoint]:
        """Train to the end from the last of these checkpoints; returns those that are kept."""
        config, step, self.kept = self.config, 0, done
        self.began = time.monotonic() - (done[-1].record.seconds or 0.0 if done else 0.0)
        if done:
            step = self.restore(done[-1])
            say(f"{self.label}: going on from step {step}")
        elif self.on_nan == "rewind":
            self.write(0, held_out=None)  # something to go back to
        self.tracker.begin(step)
        self.model.train()
        self.save_at = time.monotonic() + SAVE_SECONDS
        with Progress(self.label, config.steps, "steps", step) as progress, Signals() as signals:
            while step < config.steps:
                try:
                    terms = self.step(step)
                except NotANumber as error:
                    before, step = step, self.rewind(error)
                    progress.update(step - before)
                    continue
                step += 1
                progress.update(1, {**terms, **self.held_out_losses()})
                if self.early is not None and step == early_step(config):
                    self.write_early(self.early)
                if step % CURVE_STEPS == 0:
                    self.tracker.scalars(step, "train", terms)
                due = self.due(signals)
                if step % config.checkpoint_steps == 0 or step == config.steps:
                    self.save(step, terms)
                elif due >= 0:
                    self.write(step, held_out=None)
                if due > 0:
                    name = signal.Signals(due).name
                    where = f"{self.label}, step {step} of {config.steps}"
                    raise Stopped(f"{name}: saved at {where}; the same command goes on from there", due)
        return self.kept

    def held_out_losses(self) -> dict[str, float]:
        """The last one of the model, and those of others."""
        own = {"held out": self.history[-1].held_out["loss"]} if self.history else {}
        return {**own, **self.beside}

    def due(self, signals: Signals) -> int:
        """The signal that some process received, 0 when the last checkpoint is too long ago, or -1: the same on all."""
        number = 0 if time.monotonic() > self.save_at else -1
        return processes.largest(signals.received or number, self.fabric.device)

    def own(self, step: int) -> list[Tensor]:
        """The indices of the examples of a step's batch that this process trains on, one tensor for each microbatch."""
        shares = self.order.indices(step).tensor_split(self.config.microbatches * processes.count())
        return list(shares[processes.rank() :: processes.count()])

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimizer step, of every process; returns the terms of the whole batch."""
        torch.manual_seed(seed_of(self.order.seed, step, processes.rank()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        buffers = [buffer.clone() for buffer in self.model.buffers()]  # a forward pass may move them, as a codebook's averages
        own = self.own(step)
        try:
            found = [self.backward(part, after, step, part is own[0]) for part, after in zip(own, [*own[1:], None])]
        except TorchDynamoException as error:
            self.put_back(buffers)
            self.stop_compiling(error)
            return self.step(step)
        parameters = list(self.model.parameters())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        terms = self.mean(found)
        if bool(terms["loss"].isfinite()) and bool(norm.isfinite()):
            # Only a finite norm clips: NaN would make every gradient NaN, and `not_a_number` looks for those that are.
            clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
            self.wrapped_optimizer.step()
            self.average.update(step)
        else:
            self.put_back(buffers)
            self.not_a_number(step, terms)
        return terms

    @torch.no_grad()
    def put_back(self, buffers: list[Tensor]) -> None:
        for buffer, before in zip(self.model.buffers(), buffers):
            buffer.copy_(before)

    def stop_compiling(self, error: Exception) -> None:
        """Go on without, as where a kill has left half a file in the compiler's cache. Raises UserError where processes would
        then wait for each other."""
        what = f"torch.compile failed ({shortened(error)}); if it does again, delete its cache, {cache_dir()}"
        if processes.count() > 1:
            raise UserError(f"{self.label}: {what}, or turn compile off") from error
        say(f"warning: {self.label}: {what}; going on without")
        self.model._compiled_call_impl = None

    def backward(self, part: Tensor, after: Tensor | None, step: int, first: bool) -> dict[str, Tensor]:
        """Add the gradients of a microbatch; after the last one (None comes after it), those of all processes."""
        batch = self.train[part]
        prefetch(self.train, self.own(step + 1)[0] if after is None else after)
        with self.fabric.no_backward_sync(self.wrapped, enabled=after is not None):
            terms = self.wrapped(*self.fabric.to_device(batch), progress=step / self.config.steps)
            if first:  # not before, for the new gradients to take the memory of the old ones, which is faster on CPUs
                self.optimizer.zero_grad()
            self.fabric.backward(terms["loss"] / self.config.microbatches)
        return {name: value.detach() for name, value in terms.items()}

    def mean(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The terms of the whole batch, from those of this process's microbatches: the same on all."""
        if len(found) == processes.count() == 1:
            return found[0]
        means = torch.stack([torch.stack([terms[name] for terms in found]).mean() for name in found[0]])
        return dict(zip(found[0], self.fabric.all_reduce(means, reduce_op="mean")))

    def not_a_number(self, step: int, terms: dict[str, Tensor]) -> None:
        """Say what is not a number, and where; raises NotANumber unless such steps are to be skipped."""
        images = self.order.indices(step).tolist()
        wrong = [name for name, value in terms.items() if not value.isfinite().all()]
        wrong += [
            f"the gradient of {name}"
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not sharding.whole(parameter.grad).isfinite().all()
        ]
        wrong.append("the norm of the gradient")  # where every part of it is a number still
        more = f" and {len(images) - NAMED} more" if len(images) > NAMED else ""
        what = f"{self.label}, step {step}: {wrong[0]} is not a number (images {', '.join(map(str, images[:NAMED]))}{more})"
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
                f"{error}; {where}. {REMEDY}; --on-nan skip leaves such steps out, --on-nan rewind goes on from the last"
                " checkpoint with another data order."
            ) from error
        rewinds = self.rewinds + 1
        step = self.restore(last)
        if rewinds > self.rewinds + REWINDS:
            raise UserError(f"{error}, after {REWINDS} rewinds to {last.folder}, too. {REMEDY}.") from error
        self.draw_anew(rewinds)
        self.tracker.begin(step)
        say(f"warning: {error}; rewound to {last.folder}, going on with another data order and other noise")
        return step

    def draw_anew(self, rewinds: int) -> None:
        """The data order and the noise from here on, after so many rewinds."""
        self.rewinds = rewinds
        seed = seed_of(self.seed, 2, rewinds) if rewinds else self.seed
        self.order = Order(len(self.train), self.config.batch_size, seed)

    def judged(self, size: int) -> dict[str, float]:
        """The held-out terms, of batches of a size."""
        try:
            return evaluate(self.fabric, self.model, self.held_out, size, self.seed)
        except TorchDynamoException as error:
            self.stop_compiling(error)
            return self.judged(size)

    def save(self, step: int, terms: dict[str, Tensor]) -> None:
        """Measure the held-out loss and write a checkpoint."""
        size = len(self.own(step)[0])  # as many as a device holds at once
        with self.average.in_use():
            held_out = self.judged(size)
        if not math.isfinite(held_out["loss"]):
            raise UserError(f"{self.label}, step {step}: the held-out loss is not a number. {REMEDY}.")
        self.history.append(checkpoints.Moment(step, {name: float(value) for name, value in terms.items()}, held_out))
        self.tracker.scalars(step, "held_out", held_out)
        if not isinstance(self.fabric.strategy, ModelParallelStrategy):  # sharded weights come together for a loss only
            with self.average.in_use():
                self.tracker.pictures(step, self.model)
        self.write(step, held_out)

    def write_early(self, path: Path) -> None:
        with self.average.in_use():
            weights = sharding.on_cpu(self.model.state_dict())
        processes.on_first(lambda: write_tensors(path, weights))

    def write(self, step: int, held_out: dict[str, float] | None) -> None:
        started = time.monotonic()
        with self.average.in_use():
            weights = sharding.on_cpu(self.model.state_dict())
        training = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            training |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        training = sharding.on_cpu(training)
        seconds = time.monotonic() - self.began
        record = checkpoints.Record(step, held_out, [*self.history], self.rewinds, time=time.time(), seconds=seconds)

        def write() -> list[checkpoints.Checkpoint]:
            saved = checkpoints.save(self.folder, record, weights, training)
            return checkpoints.prune(self.folder, [*self.kept, saved])

        self.kept = processes.on_first(write)
        written = time.monotonic()
        self.save_at = written + max(SAVE_SECONDS, (written - started) / SAVE_SHARE)

    def restore(self, last: checkpoints.Checkpoint) -> int:
        training = last.training()
        raw = {name.removeprefix("model."): tensor for name, tensor in training.items() if name.startswith("model.")}
        with self.average.in_use():
            last.load_into(self.model)
        checkpoints.fill(self.model, raw, last.folder / checkpoints.TRAINING)
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        parameters = {str(index): parameter for index, parameter in enumerate(ordered)}
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in training.items():
            if key.startswith("optimizer."):
                index, _, name = key.removeprefix("optimizer.").partition(".")
                found.setdefault(index, {})[name] = tensor
        state: dict[int, dict[str, Tensor]] = {}
        for index, moments in found.items():
            shape = parameters[index].shape if index in parameters else None
            orthogonal = isinstance(self.optimizer, Muon) and parameters.get(index) in self.optimizer.matrices
            names = ["momentum"] if orthogonal else ["exp_avg", "exp_avg_sq"]
            if {name: tensor.shape for name, tensor in moments.items()} != {"step": (), **dict.fromkeys(names, shape)}:
                raise UserError(f"{last.folder / 'training.safetensors'} is of another training: optimizer.{index} does not fit")
            # The fused optimizer takes numbers in the order they have in memory, so moments lie there as their weights do.
            state[int(index)] = {
                name: tensor if name == "step" else like(parameters[index], sharding.as_split(tensor, parameters[index]))
                for name, tensor in moments.items()
            }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.history = list(last.record.history)
        self.draw_anew(last.record.rewinds)
        return last.step
