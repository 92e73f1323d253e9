"""Files that survive: a checkpoint is one folder, written aside, flushed, and renamed as a whole.

    step-000500/model.safetensors      the weights to use (averaged where an average is kept)
                training.safetensors   raw weights and optimizer state, to go on from
                config.json            step, held-out terms, history
                checksums.json         SHA-256 of each file above

Nothing is read by pickle. A folder whose checksums do not fit is never used.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from pipelines import ranks
from pipelines.console import UserError, first_process, say

CHECKSUMS = "checksums.json"


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_flushed(path: Path, content: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # which a full disk does not name
        raise


def beside(path: Path) -> Path:
    """Where a file or folder is written before it is renamed: the same place every time, so that a kill leaves no litter."""
    return path.with_name(f".{path.name}.partial")


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all. Of several processes the first does; the others return at once."""
    if not first_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = beside(path)
    try:
        write_flushed(aside, content)
        os.replace(aside, path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises UserError when that is not what the file holds."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run train_all again, to have it made again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    write_file(path, safetensors.torch.save(packed(tensors), metadata))


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """On a CPU these are views of the file, which take memory only where they are read.

    Raises UserError when it is no safetensors file. Nothing in it is ever run.
    """
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a file of tensors ({error}); delete {path.parent} to have it made again") from error


def fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Set a model's state. Raises UserError when names, shapes or types are not the model's own."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            wrong = f"{name} is {'missing' if name in expected else 'not one of its tensors'}"
        elif tensors[name].shape != expected[name].shape or tensors[name].dtype != expected[name].dtype:
            shown = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (tensors[name], expected[name])]
            wrong = f"{name} is {shown[0]}, not {shown[1]}"
        else:
            continue
        raise UserError(f"{path} is of another model: {wrong}")
    model.load_state_dict({name: ranks.as_split(tensor, expected[name]) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return self.record["step"]

    @property
    def loss(self) -> float:
        """The held-out loss in nats an image; infinite where a signal left no time to measure it."""
        held_out = self.record["held_out"]
        return math.inf if held_out is None else held_out["loss"]

    def model(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "model.safetensors")

    def training(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "training.safetensors")

    def load_into(self, model: nn.Module) -> None:
        """Put the weights to use into a model. Raises UserError when they are another model's."""
        fill(model, self.model(), self.folder / "model.safetensors")

    def digest(self) -> str:
        """Names these weights: the checksum of the model file."""
        return json.loads((self.folder / CHECKSUMS).read_text())["model.safetensors"]


def save(folder: Path, record: dict[str, Any], model: dict[str, Tensor], training: dict[str, Tensor]) -> Checkpoint:
    """Write `folder`/step-N whole or not at all. Raises OSError when the disk does not take it; older ones are untouched."""
    target = folder / f"step-{record['step']:07d}"
    aside = beside(target)
    contents = {
        "model.safetensors": safetensors.torch.save(packed(model)),
        "training.safetensors": safetensors.torch.save(packed(training)),
        "config.json": json.dumps(record).encode(),
    }
    contents[CHECKSUMS] = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}).encode()
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, content in contents.items():
            write_flushed(aside / name, content)
        flush(aside)
        if target.exists():  # an unusable one, or the very same
            shutil.rmtree(target)
        os.rename(aside, target)
        flush(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Checkpoint(target, record)


def check(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises UserError naming the file that is missing, truncated or altered."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name in ("model.safetensors", "training.safetensors", "config.json"):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != checksums[name]:
                raise UserError(f"{folder / name} is truncated or altered: its checksum does not fit")
        found = Checkpoint(folder, json.loads((folder / "config.json").read_text()))
        history, counts = found.record.get("history", []), (found.step, found.record.get("rewinds", 0))
        counted = all(isinstance(count, int) and count >= 0 for count in counts)
        if not (counted and isinstance(history, list) and isinstance(found.loss, float)):
            raise ValueError("not a checkpoint's record")
        return found
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / CHECKSUMS}, or the record beside it, is unreadable") from error


def usable(folder: Path) -> list[Checkpoint]:
    """The good checkpoints of a stage, oldest first; each bad one is named and left out.

    Raises UserError when there are checkpoints and none is good.
    """
    good, bad = [], []
    for path in sorted(folder.glob("step-*")):
        try:
            good.append(check(path))
        except UserError as error:
            bad.append(str(error))
    if bad and not good:
        raise UserError(f"no usable checkpoint in {folder}: {'; '.join(bad)}. Delete {folder} to train this part again.")
    for message in bad:
        say(f"warning: {message}; using {good[-1].folder.name} instead")
    return good


def best(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one of lowest held-out loss; among equals the newest."""
    return min(checkpoints, key=lambda checkpoint: (checkpoint.loss, -checkpoint.step))


def prune(folder: Path, checkpoints: list[Checkpoint], keep_last: int = 2) -> list[Checkpoint]:
    """Delete all but the newest and the best of these good checkpoints, and what a killed process left; returns those kept.

    One whose held-out loss was not measured, because a signal asked for it, is kept only while it is the very newest.
    """
    lasting = [c for c in checkpoints if c is checkpoints[-1] or c.record["held_out"] is not None]
    kept = [c for c in lasting if c in lasting[-keep_last:] or c is best(lasting)]
    for path in {*folder.glob("step-*"), *folder.glob(".step-*")} - {c.folder for c in kept}:
        shutil.rmtree(path, ignore_errors=True)
    return kept


def cached(path: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file made once; made again when the file is not there, is unreadable, or was made under another key.

    Of several runs that need it, one makes it. Called by all processes of a run together, and so is `make`.
    """

    def current() -> bool:
        return key_of(path) == key

    with alone(path, current):
        if ranks.on_first(current):
            return read_tensors(path)
        if ranks.on_first(lambda: path.is_file() and key_of(path) is None):
            say(f"warning: {path} is truncated or altered; made again")
        tensors = make()
        ranks.on_first(lambda: write_tensors(path, tensors, {"key": key}))
    return tensors


def key_of(path: Path) -> str | None:
    """What a file of tensors was made under, "" where it does not say; None where there is no such file, or it cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("key", "")
    except (FileNotFoundError, safetensors.SafetensorError):
        return None


@contextmanager
def alone(path: Path, there: Callable[[], bool]) -> Iterator[None]:
    """Of several runs that need what lies at `path`, the first to get here makes it; the others wait until it has.

    there: whether it is made already, so that nobody has to wait. Called by all processes of a run together. The lock lies
    beside it; a killed process holds none.
    """
    lock = FileLock(path.with_suffix(".lock"))

    def acquire() -> None:
        if there():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process, which makes the same {path}")
            lock.acquire()

    ranks.on_first(acquire)
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def shards(path: Path, count: int) -> list[Path]:
    """Where the rows of `path` lie when they are too many for one file: in `count` files beside it, one after the other."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1)]


def found_shards(path: Path) -> list[Path]:
    """The files with rows of `path` that are there, complete or not."""
    return sorted({*path.parent.glob(path.name), *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")})
