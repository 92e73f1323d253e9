"""The user's own images in Parquet files, as the data sets of the Hugging Face hub have them."""

import functools
import io
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipelines.console import NotThere, UserError, counted, first_line, nearest, say
from pipelines.data.captions import usable_text
from pipelines.data.images import ImageSet, Splits
from pipelines.data.layout import SPLITS, some
from pipelines.data.own import FEWEST_IMAGES, OwnImages, labels_of
from pipelines.data.reading import Stored, printable
from pipelines.data.tars import MOST_OF_ANNOTATION, MOST_OF_IMAGE

LABELS = ("label", "labels", "class", "cls", "category", "fine_label")
CAPTIONS = ("text", "caption", "captions", "prompt", "description")
SPLIT = {name: re.compile(rf"({names})([-_.].*)?", re.IGNORECASE) for name, names in SPLITS.items()}
UNPACKED, PACKED = 2**28, 100  # bytes of a row group from which on it may take no more than so many times its bytes in the file
GROUPS = 2  # row groups kept in memory: of images read in order, that which is read and the one after it


@dataclass(frozen=True)
class Parquet(OwnImages):
    """Parquet files with a column of encoded images, and perhaps one of labels and one of captions, found by themselves.

    Files, or folders, whose names begin with `train`, `test` and perhaps `validation` are taken as the splits; else a share of
    the images is held out. Images beyond --data.in-memory are read a row group at a time, whenever they are used.
    """

    root: Path | None = None
    """a Parquet file, or a folder of them"""
    image: str | None = None
    """column of the images; by default the one that holds images"""
    label: str | None = None
    """column of the labels, texts or whole numbers; by default the one named label, or similar"""
    caption: str | None = None
    """column of the captions; by default the one named text, caption, or similar"""

    def load(self, report: Path | None = None) -> Splits:
        """report: file to name the unreadable images in."""
        if self.root is None:
            raise UserError("the preset parquet needs your files: --data.root PATH, of a Parquet file or a folder of them")
        self.check()
        found = {name: self.rows(paths) for name, paths in files_by_split(self.root).items()}
        labels, label_names = labels_of([(rows.files.names, rows.labels) for rows in found.values()], "rows", "label")
        sets = {
            name: ImageSet(Stored(rows.files, self.image_shape, self.background), part_labels, rows.usable_captions(self.root))
            for (name, rows), part_labels in zip(found.items(), labels)
        }
        return self.splits(sets, str(self.root), label_names, report)

    def rows(self, paths: list[Path]) -> "Rows":
        """The rows of the files of one split. Raises UserError for one that is no Parquet file, or has no images."""
        assert self.root is not None
        files: list[tuple[Path, str, str]] = []
        groups: list[tuple[int, int, int, int]] = []
        labels: list[str | None] = []
        captions: list[str | None] = []
        for path in paths:
            content = opened(path)
            columns = Columns.of(content.schema_arrow, self, path)
            leaves = [content.schema.column(number).path for number in range(len(content.schema))]
            files.append(
                (path, columns.image, next(leaf for leaf in leaves if leaf in (columns.image, f"{columns.image}.bytes")))
            )
            for group in range(content.num_row_groups):
                about = content.metadata.row_group(group)
                check_packed(about, path)
                groups.append((len(files) - 1, group, about.num_rows, about.total_byte_size))
            count = content.metadata.num_rows
            content = opened(path, [name for name in (columns.label, columns.caption) if name is not None])
            labels += texts_in(content, columns.label, columns.label_names) if columns.label else [None] * count
            captions += texts_in(content, columns.caption) if columns.caption else [None] * count
        made = Rows(ParquetFiles(self.root, files, groups), labels, captions)
        if len(made.files) < FEWEST_IMAGES:
            found = counted(len(made.files), "image")
            raise UserError(f"{self.root} holds {found} for a split; at least {FEWEST_IMAGES} are needed")
        return made


@dataclass(frozen=True)
class Rows:
    files: "ParquetFiles"
    labels: list[str | None]
    captions: list[str | None]

    def usable_captions(self, root: Path) -> list[str] | None:
        """None unless every row has one. Raises UserError for one that is no text."""
        without = [name for name, caption in zip(self.files.names, self.captions) if caption is None]
        if 0 < len(without) < len(self.captions):
            say(f"no captions: none in {len(without)} of {len(self.captions)} rows of {root}: {some(without, 3)}")
        return None if without else [usable_text(caption) for caption in self.captions]


def library() -> Any:
    """Raises UserError where it is not installed: only Parquet files need it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need the library `pyarrow`: pip install -e '.[parquet]'") from error
    return pyarrow


def check_packed(group: Any, path: Path) -> None:
    """Raises UserError for a row group that takes far more memory than its bytes in the file: encoded images hardly shrink."""
    packed = sum(group.column(number).total_compressed_size for number in range(group.num_columns))
    if group.total_byte_size > max(UNPACKED, PACKED * packed):
        sizes = f"{group.total_byte_size / 2**20:.0f} MiB from {packed / 2**20:.2f} MiB"
        raise UserError(f"{path} is refused: a row group unpacks to {sizes}, which encoded images do not; remove it")


def opened(path: Path, shared: Sequence[str] = ()) -> Any:
    """A file, of which only the footer is read yet. shared: columns of which a value is held once, however many rows have it."""
    arrow = library()
    try:
        return arrow.parquet.ParquetFile(path, read_dictionary=[*shared])
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a Parquet file ({first_line(error)}): copy it again, or remove it") from error


def files_by_split(root: Path) -> dict[str, list[Path]]:
    """The files of each split: train and test and perhaps validation, or all of them as `all`.

    As in a folder of images, validation stands in for a test split that is not there.
    """
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*.parquet") if path.is_file())
    if not paths:
        what = "holds no file *.parquet" if root.is_dir() else "is not there"
        raise NotThere(f"{root} {what}", ": give a Parquet file, or a folder of them, with --data.root PATH")
    parts: dict[str, list[Path]] = {}
    for path in paths:
        names = reversed(path.relative_to(root).parts) if path != root else [path.name]
        split = next((split for name in names for split, pattern in SPLIT.items() if pattern.fullmatch(name)), "all")
        parts.setdefault(split, []).append(path)
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    if len(parts) == 1:
        return {"all": paths}
    named = ", ".join(sorted(parts.keys() - {"all"}))
    if "all" in parts:
        raise UserError(
            f"of the files under {root}, some are named as splits, {named}, and {parts['all'][0].name} is not: name all of them"
            " train-… and test-…, or none"
        )
    if "train" not in parts:
        raise UserError(
            f"the files under {root} are named as splits, {named}, and none as train: name those for training train-…"
        )
    return {split: parts[split] for split in ("train", "validation", "test") if split in parts}


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what, by name. label_names: what numbers in the label's column stand for."""

    image: str
    label: str | None
    caption: str | None
    label_names: list[str] | None

    @classmethod
    def of(cls, schema: Any, asked: Parquet, path: Path) -> "Columns":
        """Raises UserError where a column that is asked for is not there, or none or several hold images."""
        types = library().types
        for name in filter(None, (asked.image, asked.label, asked.caption)):
            if name not in schema.names:
                raise UserError(f"{path} has no column {name!r}{nearest(name, schema.names)}")
        features = features_in(schema)
        of_bytes = {field.name for field in schema if holds_bytes(field.type)}
        pictures = [name for name in schema.names if name in of_bytes and kind_in(features, name) in (None, "Image")]
        if asked.image is not None and asked.image not in of_bytes:
            raise UserError(f"the column {asked.image!r} of {path} holds no encoded images")
        if asked.image is None and len(pictures) != 1:
            what = f"several columns of images: {', '.join(pictures)}" if pictures else "no column of images"
            raise UserError(f"{path} has {what}; name it with --data.image, of: {', '.join(schema.names)}")
        image = asked.image or pictures[0]
        label = asked.label or next((name for name in LABELS if name in schema.names), None)
        if label is not None and not (types.is_integer(schema.field(label).type) or is_text(schema.field(label).type)):
            if asked.label is not None:
                raise UserError(f"the column {label!r} of {path} holds neither texts nor whole numbers, so no labels")
            label = None
        caption = asked.caption or next((name for name in CAPTIONS if name in schema.names), None)
        if caption is not None and not is_text(schema.field(caption).type):
            if asked.caption is not None:
                raise UserError(f"the column {caption!r} of {path} holds no texts, so no captions")
            caption = None
        names = None
        if label is not None and types.is_integer(schema.field(label).type) and kind_in(features, label) == "ClassLabel":
            names = features[label].get("names")
        usable = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return cls(image, label, caption, names if usable else None)


def features_in(schema: Any) -> dict[str, Any]:
    """What the library `datasets` says of the columns, in the file's metadata; nothing where it says nothing that can be read."""
    try:
        return dict(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
    except (TypeError, KeyError, ValueError, RecursionError):
        return {}


def kind_in(features: dict[str, Any], name: str) -> str | None:
    feature = features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None


def holds_bytes(kind: Any) -> bool:
    """Bytes, or as `datasets` has images a struct with a field of bytes."""
    types = library().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def is_text(kind: Any) -> bool:
    types = library().types
    return types.is_string(kind) or types.is_large_string(kind) or (types.is_dictionary(kind) and is_text(kind.value_type))


def texts_in(content: Any, column: str, names: Sequence[str] | None = None) -> list[str | None]:
    """A column of texts or whole numbers. names: what the numbers stand for; one below 0 stands for nothing.

    Raises UserError where it cannot be read, or holds a text that is too long for a caption.
    """
    arrow = library()
    try:
        values: list[Any] = []
        for chunk in content.read([column]).column(column).chunks:
            if isinstance(chunk, arrow.DictionaryArray):  # each text is held once, however many rows have it
                known = chunk.dictionary.to_pylist()
                if any(text is not None and len(text) > MOST_OF_ANNOTATION for text in known):
                    raise UserError(
                        f"the column {column!r} of a Parquet file holds a text of more than {MOST_OF_ANNOTATION} letters"
                    )
                values += [None if number is None else known[number] for number in chunk.indices.to_pylist()]
            else:
                values += chunk.to_pylist()
    except (OSError, arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"the column {column!r} of a Parquet file cannot be read ({first_line(error)}): copy it again") from error
    if names is None:
        return [None if value is None else str(value) for value in values]
    return [None if value is None or not 0 <= value < len(names) else names[value] for value in values]


class ParquetFiles:
    """Rows of Parquet files. files: of each, the column of images, and the leaf of it that holds bytes. groups: of each row
    group, the file, its number in it, its rows and its bytes."""

    def __init__(self, root: Path, files: list[tuple[Path, str, str]], groups: list[tuple[int, int, int, int]]):
        self.files, self.groups = files, groups
        self.ends = np.cumsum([0, *(rows for _, _, rows, _ in groups)])
        inside = [path.name if path == root else path.relative_to(root).as_posix() for path, *_ in files]
        counts = [0] * len(files)
        self.names = []
        for file, _, rows, _ in groups:
            self.names += [f"{inside[file]}/{row}" for row in range(counts[file], counts[file] + rows)]
            counts[file] += rows
        self.lock = threading.Lock()
        self.images = functools.lru_cache(maxsize=GROUPS)(self.images_of)

    @property
    def paths(self) -> list[str]:
        return [str(path) for path, *_ in self.files]

    def __len__(self) -> int:
        return len(self.names)

    def place(self, index: int) -> tuple[int, int]:
        """The row group, and the row in it."""
        group = int(np.searchsorted(self.ends, index, side="right")) - 1
        return group, index - int(self.ends[group])

    def name(self, index: int) -> str:
        return printable(self.names[index])

    def size(self, index: int) -> int:
        """The average size of an image in its row group, in bytes."""
        _, _, rows, size = self.groups[self.place(index)[0]]
        return size // rows

    def open(self, index: int) -> BinaryIO:
        group, row = self.place(index)
        with self.lock:
            image = self.images(group)[row]
        if image.is_valid:
            image = image["bytes"] if "bytes" in getattr(image.type, "names", ()) else image
            image = getattr(image, "value", image)  # of a column whose values are shared
        size = image.as_buffer().size if image.is_valid and hasattr(image, "as_buffer") else 0
        if not 0 < size <= MOST_OF_IMAGE:
            raise OSError(f"{size} bytes in this row")
        return io.BytesIO(image.as_py())

    def images_of(self, group: int) -> Any:
        """The images of a row group. Raises OSError where they cannot be read."""
        file, number, _, _ = self.groups[group]
        path, column, leaf = self.files[file]
        try:
            return opened(path, [leaf]).read_row_group(number, columns=[column]).column(column)
        except library().ArrowException as error:
            raise OSError(first_line(error)) from error
