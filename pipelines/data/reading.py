"""Images that stay in their files, and are read when they are asked for.

N images, B a batch of them, C colour channels, H×W pixels.
"""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from pipelines.console import Progress, UserError, say
from pipelines.data.decoding import REMARKS, Unreadable, read_image
from pipelines.files import digest_of

READERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
CHUNK = 1000  # images read at once where all are read


class Files(Protocol):
    """Pictures by number, each in a file or a part of one. names: theirs, wherever the files lie."""

    names: list[str]

    def __len__(self) -> int: ...

    @property
    def paths(self) -> list[str]:
        """The files that they lie in."""

    def name(self, index: int) -> str:
        """What an image is called in messages."""

    def size(self, index: int) -> int:
        """The size of an image's file in bytes; 0 where it is not there."""

    def open(self, index: int) -> str | BinaryIO:
        """What Pillow opens. Raises OSError."""


class FolderFiles:
    """Files under a folder. names: relative to it."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = str(folder), names

    @property
    def paths(self) -> list[str]:
        return [os.path.join(self.folder, name) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return printable(self.open(index))

    def size(self, index: int) -> int:
        return size_and_mtime(self.open(index))[0]

    def open(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])


def size_and_mtime(path: str) -> tuple[int, int]:
    """Size of a file in bytes, and when it was last written; zeros where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def printable(path: str) -> str:
    """A path whose name is not text can be opened, but not printed."""
    return os.fsencode(path).decode(errors="replace")


class Reading:
    """Images on their way: threads fill `images`, uint8 B C H W; `unreadable` has the reason for each that is left out."""

    def __init__(self, pool: ThreadPoolExecutor, files: Files, rows: Tensor, images: Tensor, background: str):
        self.files, self.rows, self.images, self.background = files, rows, images, background
        self.unreadable: dict[int, str] = {}
        self.remarks: dict[str, list[int]] = {name: [] for name in REMARKS}
        self.pixels = images.numpy()
        numbers = list(enumerate(rows.tolist()))
        self.jobs = [pool.submit(self.fill, numbers[reader::READERS]) for reader in range(min(READERS, len(numbers)))]

    def fill(self, numbers: list[tuple[int, int]]) -> None:
        _, *image_shape = self.pixels.shape
        for position, index in numbers:
            try:
                opened = self.files.open(index)
                self.pixels[position], remarks = read_image(opened, tuple(image_shape), background=self.background)
                for name in remarks:
                    self.remarks[name].append(index)
            except (Unreadable, OSError) as error:
                self.unreadable[index] = str(error)

    def finished(self) -> "Reading":
        for job in self.jobs:
            job.result()
        return self


class Stored:
    """What a uint8 tensor N C H W of all images would be to its users, by `len`, `shape` and indexing.

    Indexing raises UserError for an image that cannot be read.
    """

    def __init__(self, files: Files, image_shape: tuple[int, int, int], background: str = "white"):
        """image_shape: C H W."""
        self.files, self.image_shape, self.background = files, image_shape, background
        self.rows = torch.arange(len(files))
        self.pool = ThreadPoolExecutor(READERS, "reader")
        self.ahead: Reading | None = None
        self.told: set[str] = set()

    def subset(self, indices: Tensor) -> "Stored":
        part = copy.copy(self)
        part.rows, part.ahead = self.rows[indices], None
        return part

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.image_shape))

    def reading(self, rows: Tensor, images: Tensor | None = None) -> Reading:
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8) if images is None else images
        return Reading(self.pool, self.files, rows, images, self.background)

    def prefetch(self, indices: Tensor | slice) -> None:
        """Start to read what will be asked for next."""
        self.ahead = self.reading(self.rows[indices])

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        rows, ahead = self.rows[indices], self.ahead
        if ahead is None or not torch.equal(ahead.rows, rows):
            ahead = self.reading(rows)
        unreadable = ahead.finished().unreadable
        for name, so in ahead.remarks.items():
            if so and name not in self.told:
                self.told.add(name)
                what, then = REMARKS[name]
                say(f"{self.files.name(so[0])} is {what}: of it, and of any other such image, {then}")
        if unreadable:
            index, reason = min(unreadable.items())
            more = f" and {len(unreadable) - 1} more of these {len(rows)}" if len(unreadable) > 1 else ""
            raise UserError(
                f"{self.files.name(index)}{more} cannot be read ({reason}). Mend it and run the same command again;"
                " or leave it out: remove it, or have all images read once first and the unreadable ones skipped with"
                " --data.skip-unreadable. A run that has a checkpoint goes on with the same images only: leaving one out takes"
                " another --run."
            )
        return ahead.images

    def read_all(self, label: str, keep: bool) -> tuple[Tensor | None, dict[int, str], dict[str, list[int]]]:
        """Every image, uint8 N C H W, or None unless they are to be kept; by number, why an image cannot be read; and by the
        name of each of the `REMARKS`, the numbers of the images that it applies to."""
        everything = torch.empty(self.shape, dtype=torch.uint8) if keep else None
        unreadable: dict[int, str] = {}
        remarks: dict[str, list[int]] = {name: [] for name in REMARKS}
        with Progress(label, len(self), "images") as progress:
            for rows in torch.arange(len(self)).split(CHUNK):
                images = None if everything is None else everything[rows[0] : rows[-1] + 1]
                reading = self.reading(self.rows[rows], images).finished()
                unreadable |= reading.unreadable
                for name, so in reading.remarks.items():
                    remarks[name] += so
                progress.update(len(rows))
        return everything, unreadable, {name: sorted(so) for name, so in remarks.items()}

    def digest(self) -> str:
        """Names these images: a checksum of their order and names, and of the size and age of their files."""
        names = (self.files.name(index).encode() + b"\0" for index in range(len(self.files)))
        return digest_of(
            chain([self.rows.numpy().tobytes()], names, (repr(size_and_mtime(path)).encode() for path in self.files.paths))
        )


def content_of(images: Tensor | Stored) -> bytes | memoryview:
    """What goes into a checksum: the images' bytes, or of those on disk what names them and says how they are read."""
    if not isinstance(images, Stored):
        return images.contiguous().flatten().numpy().data  # no copy
    return f"{images.digest()} {tuple(images.shape)} {images.background}".encode()
