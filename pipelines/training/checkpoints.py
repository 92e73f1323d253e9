"""Checkpoints that survive a crash: each is one folder, written aside, flushed, and renamed as a whole.

    step-000500/model.safetensors      the weights to use (averaged where an average is kept)
                training.safetensors   raw weights and optimizer state, to go on from
                config.json            step, held-out terms, history
                checksums.json         SHA-256 of each file above

The weights alone are enough to use a model; only training needs the rest. Nothing is read by pickle. A file whose checksum
does not fit is never used.
"""

import functools
import hashlib
import json
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from pipelines.console import UserError, say
from pipelines.files import aside, clear_partial, discard, read_as, read_tensors, structured, write_flushed
from pipelines.training import sharding

CHECKSUMS = "checksums.json"
STORED = (torch.float16, torch.float8_e4m3fn)
"""types of fewer bits, which weights are stored in and never computed with"""
SETTLED_SECONDS = 2.0  # since the last change of a file: only then would its times tell of another one
TRAINING = "training.safetensors"


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Set a model's state; types of fewer bits are for storing alone.

    Raises UserError when names, shapes or types are not the model's own.
    """
    expected = model.state_dict()
    tensors = {name: tensor.float() if tensor.dtype in STORED else tensor for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            wrong = f"{name} is {'missing' if name in expected else 'not one of its tensors'}"
        elif tensors[name].shape != expected[name].shape or tensors[name].dtype != expected[name].dtype:
            shown = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (tensors[name], expected[name])]
            wrong = f"{name} is {shown[0]}, not {shown[1]}"
        else:
            continue
        raise UserError(f"{path} is of another model: {wrong}")
    model.load_state_dict({name: sharding.as_split(tensor, expected[name]) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Moment:
    """The terms of a training at one of its checkpoints: those of the last batch, and of the held-out examples."""

    step: int
    train: dict[str, float]
    held_out: dict[str, float]


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself."""

    step: int
    held_out: dict[str, float] | None
    """None where a signal left no time to measure it"""
    history: list[Moment] = field(default_factory=list)
    rewinds: int = 0
    time: float | None = None
    """seconds since 1970"""
    seconds: float | None = None
    """of training, all starts together"""

    def __post_init__(self) -> None:
        """Raises ValueError for what is no record of ours."""
        terms = [{"loss": 0.0} if self.held_out is None else self.held_out]
        terms += [part for moment in self.history for part in (moment.train, moment.held_out)]
        if not all("loss" in part for part in terms) or not math.isfinite(terms[0]["loss"]):
            raise ValueError("a loss is missing, or is not a number")
        if self.rewinds < 0 or not all(0 <= moment.step <= self.step for moment in self.history):
            raise ValueError("a number of steps or rewinds is out of range")


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    record: Record

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def loss(self) -> float:
        """The held-out loss in nats an image; infinite where a signal left no time to measure it."""
        held_out = self.record.held_out
        return math.inf if held_out is None else held_out["loss"]

    def model(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "model.safetensors")

    def training(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / TRAINING)

    def load_into(self, model: nn.Module) -> None:
        """Put the weights to use into a model. Raises UserError when they are another model's."""
        fill(model, self.model(), self.folder / "model.safetensors")

    def digest(self) -> str:
        """Names these weights: the checksum of the model file."""
        return json.loads((self.folder / CHECKSUMS).read_text())["model.safetensors"]


def save(folder: Path, record: Record, model: dict[str, Tensor], training: dict[str, Tensor]) -> Checkpoint:
    """Write `folder`/step-N whole or not at all. Raises OSError when the disk does not take it; older ones are untouched.

    model, training: contiguous tensors on the CPU that share no memory.
    """
    target = folder / f"step-{record.step:07d}"
    contents = {
        "model.safetensors": safetensors.torch.save(model),
        TRAINING: safetensors.torch.save(training),
        "config.json": json.dumps(asdict(record)).encode(),
    }
    contents[CHECKSUMS] = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with aside(target, folder=True) as made:
        for name, content in contents.items():
            write_flushed(made / name, content)
        if target.exists():
            try:
                check(target)
                discard(target)  # the very same
            except UserError:
                set_aside(target)
    return Checkpoint(target, record)


def checksum(path: Path) -> str:
    """SHA-256 of a file, read once a process unless the file has changed or may be changing."""
    found = os.stat(path)
    state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
    settled = time.time() - max(found.st_mtime, found.st_ctime) > SETTLED_SECONDS
    return (checksum_of_state if settled else checksum_of_state.__wrapped__)(path.resolve(), state)


@functools.cache
def checksum_of_state(path: Path, state: tuple[int, ...]) -> str:
    """state: of the file, its size and times: what tells that it is another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(folder: Path, *names: str) -> None:
    """Raises UserError naming the file of a checkpoint that is missing, truncated or altered."""
    try:
        checksums = read_as(folder / CHECKSUMS, dict, mend="")
        for name in names:
            if checksum(folder / name) != checksums.get(name):
                raise UserError(f"{folder / name} is truncated or altered: its checksum does not fit")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing") from error


def check(folder: Path) -> Checkpoint:
    """Read one checkpoint folder, and verify all but the state of the training, which only training needs.

    Raises UserError naming the file that is missing, truncated or altered.
    """
    verify(folder, "model.safetensors", "config.json")
    found = Checkpoint(folder, read_as(folder / "config.json", lambda values: structured(values, Record), mend=""))
    if found.step != int(folder.name.removeprefix("step-")):
        raise UserError(f"{folder} holds the checkpoint of another step")
    return found


def folders(folder: Path) -> list[Path]:
    """The folders of checkpoints under a folder, good or bad, by their steps. Whatever else lies there is the user's."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, whose name another needs, so that it is not lost."""
    number = 1
    while (target := path.with_name(f"damaged-{number}-{path.name}")).exists():
        number += 1
    os.rename(path, target)
    say(f"{path} is damaged; it lies in {target.name} now, which you may delete")


def usable(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a stage whose weights are good, oldest first; each bad one is named and left out.

    Raises UserError when there are checkpoints and none is good.
    """
    good, bad = [], []
    for path in folders(folder):
        try:
            good.append(check(path))
        except UserError as error:
            bad.append(str(error))
    if bad and not good:
        raise UserError(
            f"no usable checkpoint in {folder}: {'; '.join(bad)}. Copy the run again from where it came; or, where its data are"
            f" here, delete {folder} to train this part again."
        )
    for message in bad:
        say(f"warning: {message}; using {good[-1].folder.name} instead")
    return good


def resumable(found: list[Checkpoint]) -> list[Checkpoint]:
    """The usable checkpoints up to the newest that training can go on from; each one after it is named.

    Raises UserError where there are some, and none has the state of its training.
    """
    bad = []
    for last in range(len(found), 0, -1):
        try:
            verify(found[last - 1].folder, TRAINING)
        except UserError as error:
            bad.append(str(error))
            continue
        for message in bad:
            say(f"warning: {message}; going on from {found[last - 1].folder.name} instead")
        return found[:last]
    if bad:
        raise UserError(
            f"{found[-1].folder.parent} has weights, which are enough to draw, but not the state of the optimizer, without which"
            f" training cannot go on: {'; '.join(bad)}. Bring that file back, or train another run: train_all with another --run."
        )
    return []


def best(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one of lowest held-out loss; among equals the newest."""
    return min(checkpoints, key=lambda checkpoint: (checkpoint.loss, -checkpoint.step))


def prune(folder: Path, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Delete all but the two newest and the best of these good checkpoints, and what a killed process left; returns those kept.

    Damaged ones are set aside. One without a held-out loss, written because of a signal or the time, is kept only while it is
    the very newest.
    """
    lasting = [each for each in checkpoints if each is checkpoints[-1] or each.record.held_out is not None]
    kept = [each for each in lasting if each in lasting[-2:] or each is best(lasting)]
    known = {each.folder for each in checkpoints}
    for path in folders(folder):
        if path not in known:
            set_aside(path)
    for path in known - {each.folder for each in kept}:
        with suppress(OSError):  # one that cannot be deleted stops no training
            discard(path)
    clear_partial(folder, re.compile(r"step-\d+").fullmatch)
    return kept
