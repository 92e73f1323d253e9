"""Tar files of samples, as WebDataset has them: which images are in them, and what else a sample says."""

import io
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.data.decoding import IMAGE_ENDINGS
from pipelines.data.reading import printable

ANNOTATIONS = ("cls", "txt", "json")  # what is read of a sample beside its image
Numbers = NDArray[np.int64]
SplitName = Callable[[str], tuple[str | None, str | None]]
CHUNK = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Member:
    """Where the image of one sample lies in a tar file, and what else its sample says."""

    key: str
    offset: int
    size: int
    annotations: dict[str, bytes]


class TarFiles:
    """Members of tar files that are not compressed, read where they lie."""

    def __init__(self, paths: list[str], names: list[str], shards: Numbers, offsets: Numbers, sizes: Numbers):
        """shards: the number of the path that each lies in; offsets and sizes in bytes."""
        self.paths, self.names, self.shards, self.offsets, self.sizes = paths, names, shards, offsets, sizes

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return printable(f"{self.paths[self.shards[index]]}: {self.names[index]}")

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    def open(self, index: int) -> BinaryIO:
        with open(self.paths[self.shards[index]], "rb") as file:
            file.seek(self.offsets[index])
            return io.BytesIO(file.read(self.sizes[index]))


MOST_OF_ANNOTATION, MOST_OF_IMAGE = 2**20, 2**28  # bytes of a label or caption, and of anything else in a shard


class Entry(NamedTuple):
    """A file in a tar file: where it lies, in bytes, and what it holds where that is a label or a caption."""

    name: str
    offset: int
    size: int
    content: bytes


def entries_of(path: str, left_out: Counter[str]) -> Iterator[Entry]:
    """The files in a tar file, or in several that were written one after the other into one file; links as what they name."""
    places: dict[str, Entry] = {}
    length = os.path.getsize(path)
    begin: int | None = 0
    with open(path, "rb") as file:
        while begin is not None:
            file.seek(begin)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # which it would keep
                    if member.isreg():
                        if member.issparse():  # a few bytes would stand for gigabytes
                            raise ValueError(f"{member.name} is stored as a sparse file; pack it without --sparse")
                        annotations = member.name.rpartition(".")[2].lower() in ANNOTATIONS
                        if member.size > (MOST_OF_ANNOTATION if annotations else MOST_OF_IMAGE):
                            raise ValueError(f"{member.name} holds {member.size} bytes, too many for a sample")
                        content = tar.extractfile(member) if annotations else None
                        found = Entry(member.name, member.offset_data, member.size, content.read() if content else b"")
                    elif member.islnk() or member.issym():
                        within = posixpath.dirname(member.name) if member.issym() else ""
                        target = places.get(posixpath.normpath(posixpath.join(within, member.linkname)))
                        if target is None:
                            left_out["broken link"] += 1
                            continue
                        found = target._replace(name=member.name)
                    else:
                        continue
                    places[posixpath.normpath(member.name)] = found
                    yield found
                end = tar.offset
            file.seek(end)  # the library stops without a word at anything that is not a member
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"damaged or cut off at byte {end}")
            begin = after_zeros(file, length)


def after_zeros(file: BinaryIO, length: int) -> int | None:
    """Where the first block with content begins, from here on; None where there is none."""
    while (begin := file.tell()) < length:
        blocks = file.read(CHUNK)
        if content := blocks.lstrip(b"\0"):
            return begin + (len(blocks) - len(content)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


def samples(entries: list[Entry], split_name: SplitName) -> tuple[list[Member], Counter[str]]:
    """The samples of one shard, in whatever order its files come, and what is left out. A name that comes again begins another
    sample."""
    everything: list[dict[str, Entry]] = []
    current: dict[str, dict[str, Entry]] = {}
    keys: list[str] = []
    left_out: Counter[str] = Counter()
    for entry in entries:
        key, kind = split_name(entry.name)
        if not key or not kind or posixpath.basename(key).startswith("."):
            continue
        kind = kind.lower().lstrip(".")
        if key not in current or kind in current[key]:
            current[key] = {}
            everything.append(current[key])
            keys.append(key)
        current[key][kind] = entry
        if f".{kind}" not in IMAGE_ENDINGS and kind not in ANNOTATIONS:
            left_out[f".{kind}"] += 1
    found = []
    for key, sample in zip(keys, everything):
        images = [entry for kind, entry in sample.items() if f".{kind}" in IMAGE_ENDINGS]
        if not images:
            left_out["imageless sample"] += 1
            continue
        if len(images) > 1:
            left_out["second image"] += len(images) - 1
        annotations = {kind: entry.content for kind, entry in sample.items() if kind in ANNOTATIONS}
        found.append(Member(key, images[-1].offset, images[-1].size, annotations))
    return found, left_out
