"""What lies in a folder of images: which files are pictures, which folders are splits, and what is left out."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipelines.console import UserError, counted
from pipelines.data.decoding import IMAGE_ENDINGS
from pipelines.data.reading import printable

SPLITS = {
    "train": "train|training",
    "test": "test|testing",
    "validation": "val|valid|validation|dev|eval|evaluation",
}
"""Usual names of the folders of a split, in any case; `SUFFIX` may follow, as in train2017 or test_images."""
SUFFIX = r"[-_ ]?(set|split|images|imgs|data|\d{4})?"
SYSTEM = {
    *("__macosx", "__pycache__", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    "system volume information",
}
"""Folders, in small letters, that systems and tools make. Names that begin with a dot are hidden in any case."""
DRAWN = "two-stage latent priors"
"""What a picture of drawn images says of itself, as its software."""
NO_PICTURES = {"captions.jsonl", "thumbs.db", "desktop.ini"}
BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
NOUNS = ("folder", "image", "file", "link", "sample")
LISTED = 6  # kinds of what is left out, of which a line tells


@dataclass(frozen=True)
class Part:
    """The images of one split. names: relative to the folder, in the order of their parts."""

    folder: Path
    names: list[str]


def skipped(name: str) -> bool:
    """Whether a folder's or a file's name is hidden, or a system's."""
    return name.startswith(".") or name.lower() in SYSTEM


def images_under(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """Names of the images under a folder, relative to it, in the order of their parts. No file is looked into but those
    whose name has no ending, and samples*.png, which `generate` may have drawn. Folders of runs are left out.

    Links to folders are followed, unless they lead to what is walked through already, here or by another link. left_out: takes
    the number of what is left out, by its kind. Raises UserError for a subfolder that cannot be read.
    """
    names: list[str] = []
    left_out = Counter() if left_out is None else left_out

    walked = [os.path.realpath(folder)]  # where the folder, and the links in it that were followed, really lie

    def walk(inner: str) -> None:
        prefix, entries = inner and inner + os.sep, entries_of(os.path.join(folder, inner))
        if {"config.json", "stage1"} <= {entry.name for entry in entries}:
            left_out["run folder"] += 1
            return
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()
            if is_folder(entry):
                linked = [os.path.realpath(entry.path)] if entry.is_symlink() else []
                if skipped(entry.name):
                    left_out["hidden or system folder"] += 1
                elif any(within(a, b) or within(b, a) for a in linked for b in walked):
                    left_out["linked folder"] += 1
                else:
                    walked.extend(linked)
                    walk(prefix + entry.name)
            # A link is followed only when it is read: a broken one is an image that cannot be read.
            elif not (entry.is_symlink() or entry.is_file(follow_symlinks=False)) or entry.name.lower() in NO_PICTURES:
                continue
            elif ending in IMAGE_ENDINGS or not ending and begins_as_image(entry.path):
                if skipped(entry.name):
                    left_out["hidden image"] += 1
                elif ending == ".png" and entry.name.startswith("samples") and is_drawn(entry.path):
                    left_out["drawn image"] += 1
                else:
                    names.append(prefix + entry.name)
            elif not skipped(entry.name):
                left_out[ending or "unknown file"] += 1

    walk("")
    return names


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Or a link to one; not a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def within(path: str, folder: str) -> bool:
    """Whether a path is a folder, or lies in it."""
    return f"{path}{os.sep}".startswith(f"{folder.rstrip(os.sep)}{os.sep}")


def begins_as_image(path: str) -> bool:
    """Whether a file begins with the bytes of a format that is read."""
    begin = beginning_of(path, 16)
    return begin.startswith(BEGINNINGS) or begin[:4] == b"RIFF" and begin[8:12] == b"WEBP"


def is_drawn(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a picture that says of itself that it was drawn."""
    return DRAWN.encode() in beginning_of(path, 200)


def beginning_of(path: str | os.PathLike[str], count: int) -> bytes:
    """The first `count` bytes of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError:
        return b""


def entries_of(folder: str) -> list["os.DirEntry[str]"]:
    """What is in a folder, by name. Raises UserError where it cannot be read."""
    try:
        with os.scandir(folder) as listing:
            return sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {printable(folder)} cannot be read: {error.strerror}") from error


def splits_of(root: Path, left_out: Counter[str]) -> dict[str, Part]:
    """The splits of a folder by name, train and test and perhaps validation; or all its images as `all`.

    A folder that alone holds everything is entered. Without test images, those for validation are the test images.

    Raises UserError where two folders are the same split, or none is for training.
    """
    names = images_under(root, left_out)
    while True:
        splits = splits_in(root)
        first = {name.partition(os.sep)[0] for name in names if os.sep in name}
        if not first or len(first) > 1 or any(os.sep not in name for name in names):
            break
        (only,) = first
        inside = [name.removeprefix(only + os.sep) for name in names]
        if len(splits) > 1 or all(os.sep not in name for name in inside):
            break
        root, names = root / only, inside
    if splits and {*splits} >= first and "train" not in {*splits.values()} and len(splits) > 1:
        raise UserError(f"{root} holds {' and '.join(sorted(splits))}, but no folder for training: name it {root / 'train'}")
    if "train" not in splits.values() or len({*splits.values()}) < 2:
        return {"all": Part(root, names)}
    parts: dict[str, Part] = {}
    for folder, split in splits.items():
        if split in parts:
            raise UserError(f"{root} holds two folders of {split} images, {parts[split].folder.name} and {folder}: join them")
        inside = [name.removeprefix(folder + os.sep) for name in names if name.startswith(folder + os.sep)]
        parts[split] = Part(root / folder, inside)
    beside = len(names) - sum(len(part.names) for part in parts.values())
    if beside:
        left_out[f"beside {' and '.join(splits)}"] += beside
    if "test" not in parts:
        parts["test"] = parts.pop("validation")
    return {split: parts[split] for split in SPLITS if split in parts}


def splits_in(folder: Path) -> dict[str, str]:
    """The folders in a folder that are named as a split, and as which."""
    found = {}
    for entry in entries_of(str(folder)):
        for split, usual in SPLITS.items():
            if is_folder(entry) and re.fullmatch(f"({usual}){SUFFIX}", entry.name.lower()):
                found[entry.name] = split
    return found


def labels_in(parts: list[Part]) -> tuple[list[str], str]:
    """The names of the labels, the first folders in the images' names, sorted; and why there are none, or nothing.

    parts: those for training first.
    """
    found = [set(map(label_of, part.names)) for part in parts]
    labels = set().union(*found)
    if labels <= {""}:
        return [], ""
    if "" in labels:
        outside = [os.path.join(part.folder, name) for part in parts for name in part.names if not label_of(name)]
        return [], f"in no subfolder: {len(outside)} of {sum(len(part.names) for part in parts)} images: {some(outside, 3)}"
    if len(labels) == 1:
        return [], f"all images lie in one subfolder, {printable(*labels)}"
    for part, own in zip(parts, found):
        if not own & found[0]:
            return [], f"{part.folder} and {parts[0].folder} have no subfolder in common"
    return sorted(labels), ""


def label_of(name: str) -> str:
    """The first folder in the name of an image; empty when there is none."""
    first, separator, _ = name.partition(os.sep)
    return first if separator else ""


def listed(left_out: Counter[str]) -> str:
    """What was left out, in words such as "300 .heic, 2 hidden or system folders"."""
    kinds = left_out.most_common()
    named = [counted(count, kind, None if kind.endswith(NOUNS) else kind) for kind, count in kinds[:LISTED]]
    more = sum(count for _, count in kinds[LISTED:])
    return ", ".join(named) + (f" and {more} more" if more else "")


def some(names: list[str], count: int = 10) -> str:
    """The first of several names, and how many more there are."""
    return ", ".join(map(printable, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")
