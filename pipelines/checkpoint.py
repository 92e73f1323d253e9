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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from pipelines.console import UserError, say

CHECKSUMS = "checksums.json"


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    write_file(path, safetensors.torch.save(packed(tensors), metadata))


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


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
        return safetensors.torch.load_file(self.folder / "model.safetensors")

    def training(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.folder / "training.safetensors")

    def digest(self) -> str:
        """Names these weights: the checksum of the model file."""
        return json.loads((self.folder / CHECKSUMS).read_text())["model.safetensors"]


def save(folder: Path, record: dict[str, Any], model: dict[str, Tensor], training: dict[str, Tensor]) -> Checkpoint:
    """Write `folder`/step-N whole or not at all. Raises OSError when the disk does not take it; older ones are untouched."""
    target = folder / f"step-{record['step']:07d}"
    aside = folder / f".{target.name}.{os.getpid()}"
    contents = {
        "model.safetensors": safetensors.torch.save(packed(model)),
        "training.safetensors": safetensors.torch.save(packed(training)),
        "config.json": json.dumps(record).encode(),
    }
    contents[CHECKSUMS] = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}).encode()
    try:
        for name, content in contents.items():
            write_file(aside / name, content)
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
        return Checkpoint(folder, json.loads((folder / "config.json").read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / CHECKSUMS} is unreadable") from error


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


def prune(folder: Path, keep_last: int = 2) -> None:
    """Keep the newest and the best checkpoints, and clear what a killed process left half-written."""
    checkpoints = usable(folder)
    keep = {checkpoint.folder for checkpoint in checkpoints[-keep_last:]} | {best(checkpoints).folder}
    for path in folder.glob("*step-*"):
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


def cached(path: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file made once; made again when the file is not there, is unreadable, or was made under another key."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        pass
    except safetensors.SafetensorError:
        say(f"warning: {path} is truncated or altered; made again")
    tensors = make()
    write_tensors(path, tensors, {"key": key})
    return tensors
