"""Whether the images, labels and captions of a data set are still the same, wherever its files lie.

The size and time of every file are compared first. Only where these differ, as in a copy, are the files read.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipelines.data.reading import Files, size_and_mtime
from pipelines.files import digest_of

READ_BYTES = 2**28  # of the files of a set at most: of more, evenly spread ones are read, and the sizes of all count


@dataclass(frozen=True)
class Used:
    """The images of a set in files that are used."""

    files: Files
    rows: list[int]


def stamp(used: Sequence[Used]) -> str:
    """A checksum of the sizes of files, and when they were last written."""
    return digest_of(repr(size_and_mtime(path)).encode() for part in used for path in part.files.paths)


def content_of_files(used: Sequence[Used]) -> str:
    """A checksum of what is in the files, in order, and not of where they lie."""
    sizes = [[part.files.size(row) for row in part.rows] for part in used]
    every = max(1, math.ceil(sum(map(sum, sizes)) / READ_BYTES))

    def parts() -> Iterator[bytes]:
        for part, of_part in zip(used, sizes):
            for number, (row, size) in enumerate(zip(part.rows, of_part)):
                yield size.to_bytes(8, "little")
                if number % every == 0:
                    yield hashlib.sha256(read(part.files, row)).digest()

    return digest_of(parts())


def read(files: Files, row: int) -> bytes:
    """What a file holds; nothing where it cannot be read, which is for those to say who decode it."""
    try:
        opened = files.open(row)
        with open(opened, "rb") if isinstance(opened, str) else opened as file:
            return file.read()
    except OSError:
        return b""


def content_of_tensors(tensors: Iterable[Tensor | None]) -> str:
    """A checksum of images and labels in memory."""
    return digest_of(b"" if tensor is None else tensor.contiguous().numpy().tobytes() for tensor in tensors)


def content_of_captions(captions: Iterable[Sequence[str] | None]) -> str:
    return digest_of(repr(part).encode(errors="surrogatepass") for part in captions)
