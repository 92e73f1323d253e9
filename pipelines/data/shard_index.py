"""An index of what is in WebDataset shards, in columns. It is kept beside each shard, so that the shard is scanned only once.

N samples with an image.
"""

import io
import json
import os
import posixpath
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.console import NotThere, Progress, UserError
from pipelines.data.reading import size_and_mtime
from pipelines.data.tars import ANNOTATIONS, MOST_OF_IMAGE, Member, Numbers, SplitName, entries_of, samples
from pipelines.files import digest_of, replace_file

VERSION = 1


@dataclass(frozen=True)
class Index:
    """The samples of several shards, one shard after the other."""

    keys: list[str]
    shards: Numbers
    """in which shard each lies, N"""
    offsets: Numbers
    sizes: Numbers
    """of its image in the shard, in bytes, N"""
    annotations: dict[str, list[bytes | None]]
    """what the samples have beside an image, by its kind: N each; None where a sample has none"""
    repeated: int
    """samples whose key is that of another in the same shard"""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class OfShard:
    """The same of one shard, with what is left out of it by its kind."""

    keys: list[str]
    places: Numbers
    """offset and size, 2 N"""
    annotations: dict[str, list[bytes | None]]
    left_out: dict[str, int]

    @classmethod
    def of(cls, members: list[Member], left_out: Counter[str]) -> "OfShard":
        places = np.array([(member.offset, member.size) for member in members], np.int64).reshape(-1, 2).T
        annotations = {kind: [member.annotations.get(kind) for member in members] for kind in ANNOTATIONS}
        return cls([member.key for member in members], places, annotations, dict(left_out))

    def packed(self, shard: tuple[int, int]) -> bytes:
        """The content of the file that keeps it. shard: size of the tar file, and when it was last written."""
        columns: dict[str, Any] = {"shard": np.array([VERSION, *shard], np.int64), "places": self.places}
        columns["keys"] = as_bytes("\0".join(self.keys).encode(errors="surrogateescape"))
        columns["left_out"] = as_bytes(json.dumps(self.left_out).encode())
        for kind, contents in self.annotations.items():
            columns[f"{kind}_lengths"] = np.array([-1 if content is None else len(content) for content in contents], np.int64)
            columns[kind] = as_bytes(b"".join(content or b"" for content in contents))
        file = io.BytesIO()
        np.savez(file, **columns)
        return file.getvalue()

    @classmethod
    def unpacked(cls, path: Path, shard: tuple[int, int]) -> "OfShard | None":
        """Read a file, which may come from anyone; None where it is not there, not whole, or of another state of the shard."""
        try:
            with zipfile.ZipFile(path) as parts:
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):  # a few bytes for gigabytes
                    return None
            with np.load(path, allow_pickle=False) as columns:
                if columns["shard"].tolist() != [VERSION, *shard]:
                    return None
                places, text = columns["places"], columns["keys"].tobytes().decode(errors="surrogateescape")
                keys = text.split("\0") if places.size else []
                annotations = {kind: split(columns[kind].tobytes(), columns[f"{kind}_lengths"]) for kind in ANNOTATIONS}
                left_out = {str(kind): int(count) for kind, count in json.loads(columns["left_out"].tobytes()).items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, MemoryError, zipfile.BadZipFile):
            return None
        lengths = {len(keys), *map(len, annotations.values())}
        if places.dtype != np.int64 or places.shape != (2, len(keys)) or len(lengths) > 1:
            return None
        if places.size and (places.min() < 0 or places[1].max() > MOST_OF_IMAGE):
            return None
        return cls(keys, places, annotations, left_out)


def as_bytes(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)


def split(content: bytes, lengths: Numbers) -> list[bytes | None]:
    """The inverse of joining. Raises ValueError where the lengths do not fit."""
    if (lengths < 0).all():
        return [None] * len(lengths)
    ends = np.maximum(lengths, 0).cumsum()
    if ends[-1] != len(content):
        raise ValueError("lengths do not fit")
    starts = (ends - np.maximum(lengths, 0)).tolist()
    return [
        None if length < 0 else content[start : start + length] for start, length in zip(starts, lengths.tolist(), strict=True)
    ]


def index_of(paths: list[str], split_name: SplitName, left_out: Counter[str], cache: Path) -> Index:
    """The samples with an image in WebDataset shards, in the order in which they begin there. No image is read.

    split_name: into the key of the sample and the kind; left_out: takes the number of what is left out, by its kind; cache, and
    what is raised: as of `index_of_shard`.
    """
    parts = []
    with Progress("reading the index of the shards", len(paths), "shards") as progress:
        for path in paths:
            parts.append(index_of_shard(path, split_name, cache))
            left_out.update(parts[-1].left_out)
            progress.update(1)
    offsets, sizes = np.concatenate([part.places for part in parts], 1)
    numbers = np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts])
    annotations = {kind: [content for part in parts for content in part.annotations[kind]] for kind in ANNOTATIONS}
    repeated = sum(len(part.keys) - len({*part.keys}) for part in parts)
    return Index([key for part in parts for key in part.keys], numbers, offsets, sizes, annotations, repeated)


def index_of_shard(path: str, split_name: SplitName, cache: Path) -> OfShard:
    """The index of one shard: read from the file that keeps it, or made and kept there.

    That file lies beside the shard, or in a folder of the cache where nothing can be written beside it. It counts as long as
    the shard has the same size and age. Raises UserError for a shard that is not a tar file, is compressed, or is cut off.
    """
    state = size_and_mtime(path)
    places = places_for(path, cache)
    kept = next((found for place in places if (found := OfShard.unpacked(place, state)) is not None), None)
    if kept is None:
        kept = read_shard(path, split_name)
        keep(places, kept.packed(state))
    return kept


def places_for(path: str, cache: Path) -> list[Path]:
    """Where the index of a shard is kept: the first of these that can be written."""
    name = digest_of([os.fsencode(os.path.abspath(path))])
    return [Path(f"{path}.index"), cache / f"{name}.index"]


def keep(places: list[Path], content: bytes) -> None:
    """Where no place can be written, the index is made again at the next start."""
    for place in places:
        try:
            replace_file(place, content)
            return
        except OSError:
            continue


def read_shard(path: str, split_name: SplitName) -> OfShard:
    left_out: Counter[str] = Counter()
    try:
        entries = [*entries_of(path, left_out)]
    except (OSError, tarfile.TarError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise NotThere(f"there is no shard {path}", ": give your shards with --data.urls PATTERN") from error
        raise UserError(
            f"{path} cannot be read as a tar file without compression ({error}). Mend or remove it, or copy it again."
        ) from error
    members, others = samples(entries, split_name)
    if not members:  # keys with dots in them
        members, others = samples(entries, posixpath.splitext)
    return OfShard.of(members, left_out + others)
