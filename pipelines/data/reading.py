"""Images that stay in their files, and are read when they are asked for.

N images, B a batch of them, C colour channels, H×W pixels.
"""

import copy
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipelines.console import Progress, UserError, say

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # whatever a file is called, no other decoder is tried on it
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
        """For a person."""

    def open(self, index: int) -> str | BinaryIO:
        """What Pillow opens. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where the image of one sample lies in a list of tar files, and what else its sample says."""

    key: str
    shard: int
    offset: int
    size: int
    said: dict[str, bytes]


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

    def open(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])


class TarFiles:
    """Members of tar files that are not compressed, read where they lie."""

    def __init__(self, paths: list[str], members: list[Member]):
        self.paths, self.names = paths, [member.key for member in members]
        self.shards, self.offsets, self.sizes = (
            np.array([(m.shard, m.offset, m.size) for m in members], np.int64).reshape(-1, 3).T
        )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return printable(f"{self.paths[self.shards[index]]}: {self.names[index]}")

    def open(self, index: int) -> BinaryIO:
        with open(self.paths[self.shards[index]], "rb") as file:
            file.seek(self.offsets[index])
            return io.BytesIO(file.read(self.sizes[index]))


def written(path: str) -> tuple[int, int]:
    """Size of a file in bytes, and when it was last written; zeros where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def printable(path: str) -> str:
    """A path whose name is not text can be opened, but not printed."""
    return os.fsencode(path).decode(errors="replace")


SAID = ("cls", "txt", "json")  # what is read of a sample beside its image


def members_of(paths: list[str], base_plus_ext: Callable[[str], tuple[str | None, str | None]]) -> list[Member]:
    """The samples with an image in WebDataset shards, in the order in which they lie there. No image is read.

    base_plus_ext: splits a member's name into the key of its sample and its kind. Raises UserError for a file that is not a
    tar file, is compressed, or is cut off.
    """
    found: list[Member] = []
    with Progress("reading the index of the shards", len(paths), "shards") as progress:
        for shard, path in enumerate(paths):
            try:
                found += members(path, shard, base_plus_ext)
            except (OSError, tarfile.TarError, ValueError) as error:
                raise UserError(
                    f"{path} cannot be read as a tar file without compression ({error}). Mend or remove it, or copy it again."
                ) from error
            progress.update(1)
    return found


def members(path: str, shard: int, base_plus_ext: Callable[[str], tuple[str | None, str | None]]) -> Iterator[Member]:
    key: str | None = None
    image: tarfile.TarInfo | None = None
    said: dict[str, bytes] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            base, kind = base_plus_ext(member.name) if member.isreg() else (None, None)
            if base is None or kind is None:
                continue
            if base != key:
                if key is not None and image is not None:
                    yield Member(key, shard, image.offset_data, image.size, said)
                key, image, said = base, None, {}
            if f".{kind.lower()}" in IMAGE_ENDINGS:
                image = member
            elif kind.lower() in SAID:
                content = tar.extractfile(member)
                said[kind.lower()] = content.read() if content is not None else b""
            tar.members = []  # type: ignore[attr-defined]  # which it would keep
        end = tar.offset
    if key is not None and image is not None:
        yield Member(key, shard, image.offset_data, image.size, said)
    with open(path, "rb") as file:  # the library stops without a word at anything that is not a member
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"damaged or cut off at byte {end}")


class Unreadable(ValueError):
    """A file holds no image that can be read; the message says why."""


def read_image(
    file: str | BinaryIO, size: int, channels: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> tuple[np.ndarray, bool]:
    """One image as uint8 C H W: turned upright, its shorter side resized, its centre cropped; and whether it is animated.

    resampling: how its pixels become those of the size; NEAREST for what is black or white.

    Of an animated image this is the first frame. Raises Unreadable.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            animated = image.format != "MPO" and getattr(image, "is_animated", False)  # an MPO is a photo with its preview
            upright = eight_bit(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(upright, (size, size), resampling)
    except Exception as error:  # a decoder that is fed broken bytes raises nearly anything
        raise Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    pixels = np.asarray(square)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), animated


def eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, scaled to 8: Pillow would clip it at 255. Raises ValueError for pixels whose range is not known."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits, whose range is not known")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


class Reading:
    """Images on their way: threads fill `images`, uint8 B C H W; `unreadable` has the reason for each that is left out."""

    def __init__(self, pool: ThreadPoolExecutor, files: Files, rows: Tensor, images: Tensor):
        self.files, self.rows, self.images = files, rows, images
        self.unreadable: dict[int, str] = {}
        self.animated: list[int] = []
        self.pixels = images.numpy()
        numbers = list(enumerate(rows.tolist()))
        self.jobs = [pool.submit(self.fill, numbers[reader::READERS]) for reader in range(min(READERS, len(numbers)))]

    def fill(self, numbers: list[tuple[int, int]]) -> None:
        _, channels, size, _ = self.pixels.shape
        for position, index in numbers:
            try:
                self.pixels[position], animated = read_image(self.files.open(index), size, channels)
                if animated:
                    self.animated.append(index)
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

    def __init__(self, files: Files, channels: int, size: int):
        self.files, self.channels, self.size = files, channels, size
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
        return torch.Size((len(self), self.channels, self.size, self.size))

    def reading(self, rows: Tensor, images: Tensor | None = None) -> Reading:
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8) if images is None else images
        return Reading(self.pool, self.files, rows, images)

    def prefetch(self, indices: Tensor | slice) -> None:
        """Start to read what will be asked for next."""
        self.ahead = self.reading(self.rows[indices])

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        rows, ahead = self.rows[indices], self.ahead
        if ahead is None or not torch.equal(ahead.rows, rows):
            ahead = self.reading(rows)
        unreadable = ahead.finished().unreadable
        if ahead.animated and not self.told:
            say(f"{self.files.name(ahead.animated[0])} is animated: of it, and of any other such image, the first frame is used")
            self.told.add("animated")
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

    def read_all(self, label: str, keep: bool) -> tuple[Tensor | None, dict[int, str], list[int]]:
        """Every image, uint8 N C H W, or None unless they are to be kept; why which cannot be read; which are animated."""
        everything = torch.empty(self.shape, dtype=torch.uint8) if keep else None
        unreadable: dict[int, str] = {}
        animated: list[int] = []
        with Progress(label, len(self), "images") as progress:
            for rows in torch.arange(len(self)).split(CHUNK):
                images = None if everything is None else everything[rows[0] : rows[-1] + 1]
                reading = self.reading(self.rows[rows], images).finished()
                unreadable |= reading.unreadable
                animated += reading.animated
                progress.update(len(rows))
        return everything, unreadable, sorted(animated)

    def digest(self) -> str:
        """Names these images: a checksum of their order and names, and of the size and age of their files."""
        key = hashlib.sha256(self.rows.numpy().tobytes())
        for index in range(len(self.files)):
            key.update(self.files.name(index).encode() + b"\0")
        for path in self.files.paths:
            key.update(repr(written(path)).encode())
        return key.hexdigest()[:16]


def content_of(images: Tensor | Stored) -> bytes:
    """For a checksum: the images' bytes, or of those on disk what names them and the shape in which they are read."""
    return f"{images.digest()} {tuple(images.shape)}".encode() if isinstance(images, Stored) else images.numpy().tobytes()
