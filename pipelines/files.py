"""Files that are whole or absent: they are written aside, flushed and renamed. Also JSON, tensors, digests, locks and caches.

Nothing is read by pickle.
"""

import functools
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import cattrs
import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from pipelines import processes
from pipelines.console import UserError, first_process, say

try:
    import fcntl
except ImportError:  # on Windows, where what killed writers left stays
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
PARTIAL = re.compile(r"\.(?P<name>.+?)\.[0-9a-f]{8}\.partial", re.DOTALL)
"""Name of what is written aside, each writer's own."""


def flush(path: Path) -> None:
    """fsync a folder, so that new names in it last; Windows opens none, and keeps names by itself."""
    if os.name == "nt":
        return
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


ATTEMPTS = 100  # to begin a file; a file system that makes none says the same as one where another writer was faster


@contextmanager
def aside(path: Path, folder: bool = False, cleared: bool = False) -> Iterator[Path]:
    """A new file or folder beside `path`, renamed to it at the end; after an exception it is deleted instead.

    The files' content is flushed by those who write it. It is locked as long as it is written: so what killed writers of the
    same path have left is known, and deleted first, unless that is done already (cleared).
    """
    if not cleared:
        clear_partial(path.parent, path.name.__eq__)
    for left in reversed(range(ATTEMPTS)):
        made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            made.mkdir() if folder else made.touch(exist_ok=False)
            lock = locked(made)
            break
        except (BlockingIOError, FileNotFoundError):  # another writer was faster, and took it for what a killed one had left
            if not left or not path.parent.is_dir():
                raise
    try:
        yield made
        if folder:
            flush(made)
        os.replace(made, path)
        flush(path.parent)
    finally:
        delete(made)
        if lock is not None:
            os.close(lock)


def locked(path: Path) -> int | None:
    """A descriptor by which this process alone holds a file or folder; closed, it does so no longer. None without locks here.

    Raises BlockingIOError where another process holds it, FileNotFoundError where it is gone.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def partial_of(path: Path) -> str | None:
    """The name of the file or folder that one written aside was to become; None for another."""
    match = PARTIAL.fullmatch(path.name)
    return match["name"] if match else None


def clear_partial(folder: Path, ours: Callable[[str], object]) -> None:
    """Delete what killed writers have left of the files and folders in a folder that are ours, by their names."""
    for path in folder.iterdir() if folder.is_dir() else ():
        name = partial_of(path)
        if name is not None and ours(name):
            try:
                lock = locked(path)
            except OSError:
                continue
            if lock is not None:
                delete(path)
                os.close(lock)


def delete(path: Path) -> None:
    """A file or folder, where it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Delete a folder so that it is there whole or not at all: what a killed process leaves of it is partial."""
    os.rename(folder, gone := folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial"))
    delete(gone)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all. Of several processes the first does; the others return at once."""
    if first_process():
        replace_file(path, content)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """The same of several files. What killed writers have left is looked for once in each folder: listing a folder again for
    each of its files would take a time that grows with the square of their number."""
    if not first_process():
        return
    names: dict[Path, set[str]] = {}
    for path in contents:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, ours in names.items():
        clear_partial(folder, ours.__contains__)
    for path, content in contents.items():
        replace_file(path, content, cleared=True)


def replace_file(path: Path, content: bytes, cleared: bool = False) -> None:
    """Like `write_file`, but every process that calls this writes. cleared: as of `aside`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path, cleared=cleared) as made:
        write_flushed(made, content)


def check_writable(option: str, path: Path, folder: bool = False) -> None:
    """Raises UserError where a command could not write to the path that an option names: before it works for what it writes.

    folder: whether the path is that of a folder.
    """
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    folder_wanted = place != path.absolute() or folder
    if place.is_dir() != folder_wanted:
        raise UserError(f"{option} {path} cannot be written: {place} is a {'file' if folder_wanted else 'folder'}")
    for needed in {place, place if place.is_dir() else place.parent}:  # a file is replaced, for which its folder is written
        if not os.access(needed, os.W_OK):
            raise UserError(f"{option} {path} cannot be written: {needed} is read only")


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_file(path, as_json(value))


AGAIN = "delete it and run train_all again, to have it made again"


def read_as(path: Path, make: Callable[[Any], T], mend: str = AGAIN) -> T:
    """What `make` makes of the values in a file of JSON, which may come from anyone. mend: ends the message of the UserError that
    is raised where the file is no JSON, or `make` raises what other values lead to."""
    try:
        return make(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})" + (f"; {mend}" if mend else "")) from error


def structured(values: Any, kind: type[T], by: cattrs.Converter | None = None) -> T:
    """What JSON holds as a dataclass. by: how its fields are read, where not as usual. Raises ValueError for other values."""
    if not isinstance(values, dict):
        raise ValueError(f"it holds no {kind.__name__}")
    try:
        return (by or converter()).structure(values, kind)
    except cattrs.BaseValidationError as error:
        raise ValueError("; ".join(cattrs.transform_error(error))) from error


def strict(converter: cattrs.Converter) -> cattrs.Converter:
    """One that takes numbers and truth values as they are, where cattrs would make 5 of "5" and of 5.7, and True of "no"."""

    def same(value: Any, kind: type[Any]) -> Any:
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
        raise ValueError(f"{value!r:.40} is no {kind.__name__}")

    for kind in (bool, int, float):
        converter.register_structure_hook(kind, same)
    return converter


@functools.cache  # it makes code for each class that it reads
def converter() -> cattrs.Converter:
    return strict(cattrs.Converter())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    write_file(path, safetensors.torch.save(packed(tensors), metadata))


def replace_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Like `write_tensors`, but every process that calls this writes."""
    replace_file(path, safetensors.torch.save(packed(tensors), metadata))


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. On a CPU they are views of it, which take memory only where they are read.

    Raises UserError when it is no safetensors file. Nothing in it is ever run.
    """
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a file of tensors ({error}); delete {path.parent} to have it made again") from error


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """Names what is in the parts, one after another: the first 64 bits of their SHA-256."""
    key = hashlib.sha256()
    for part in parts:
        key.update(part)
    return key.hexdigest()[:16]


def cached(path: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are made once and kept in a file; made again where it is missing, unreadable, or was written with another key.

    Of several runs that need it, one makes it. Called by all processes of a run together, and so is `make`.
    """

    def current() -> bool:
        return key_of(path) == key

    with alone(path, current):
        if processes.on_first(current):
            return read_tensors(path)
        if processes.on_first(lambda: path.is_file() and key_of(path) is None):
            say(f"warning: {path} is truncated or altered; made again")
        tensors = make()
        processes.on_first(lambda: write_tensors(path, tensors, {"key": key}))
    return tensors


def key_of(path: Path) -> str | None:
    """The key that a file of tensors was written with, or "" where it has none; None where the file is missing or unreadable."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("key", "")
    except (FileNotFoundError, safetensors.SafetensorError):
        return None


def lock_of(path: Path) -> FileLock:
    """The lock of what lies at a path. Its file, beside that and empty, stays there; a killed process holds no lock."""
    return FileLock(path.with_name(f".{path.name}.lock"))


@contextmanager
def alone(path: Path, there: Callable[[], bool]) -> Iterator[None]:
    """The first of several runs that need what lies at `path` makes it; the others wait until it has.

    there: whether it is made already, so that nobody has to wait. Called by all processes of a run together.
    """
    lock = lock_of(path)

    def acquire() -> None:
        if there():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process, which makes the same {path}")
            lock.acquire()

    processes.on_first(acquire)
    try:
        yield
    finally:
        lock.release()


def shards(path: Path, count: int) -> list[Path]:
    """Where the rows of `path` lie when they are too many for one file: in `count` files beside it, one after the other."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1)]


def found_shards(path: Path) -> list[Path]:
    """The files with rows of `path` that are there, complete or not."""
    return sorted({*path.parent.glob(path.name), *path.parent.glob(f"{path.stem}-*-of-*{path.suffix}")})
