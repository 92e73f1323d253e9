"""The user's own images as files in a folder."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.console import UserError
from pipelines.data.images import ImageSet, Splits
from pipelines.data.own import FEWEST_IMAGES, OwnImages
from pipelines.data.reading import IMAGE_ENDINGS, FolderFiles, Stored, images_under, printable


@dataclass(frozen=True)
class Folder(OwnImages):
    """Your own images, of any size and aspect: resized and cropped to squares. Subfolders are labels.

    Folders named `train` and `test` at the top are taken as the splits; else a tenth of the images is held out. A file
    captions.jsonl in such a folder gives captions: a line {"file_name": "sub/a.png", "text": "…"} for each image.
    """

    root: Path | None = None
    """the folder of images"""

    def load(self, report: Path | None = None) -> Splits:
        """report: file to name the unreadable images in."""
        if self.root is None:
            raise UserError("this preset needs your folder of images: --data.root PATH")
        if not self.root.is_dir():
            raise UserError(f"there is no folder {self.root}: give your folder of images with --data.root PATH")
        self.check()
        parts = (
            [self.root / "train", self.root / "test"] if all((self.root / p).is_dir() for p in ("train", "test")) else [self.root]
        )
        found = [images_under(part) for part in parts]
        for part, names in zip(parts, found):
            if len(names) < FEWEST_IMAGES:
                raise UserError(
                    f"{part} holds {len(names)} images; at least {FEWEST_IMAGES} are needed ({', '.join(sorted(IMAGE_ENDINGS))})"
                )
        label_names = sorted({label for names in found for label in map(label_of, names)})
        if len(label_names) == 1 or "" in label_names:
            label_names = []  # one folder of pictures, or pictures outside the labelled ones: no labels
        number = {label: index for index, label in enumerate(label_names)}
        sets = [
            ImageSet(
                Stored(FolderFiles(part, names), self.channels, self.size),
                torch.tensor([number[label_of(name)] for name in names]) if label_names else None,
                read_captions(part, names),
            )
            for part, names in zip(parts, found)
        ]
        return self.splits(sets, str(self.root), label_names, report)


def read_captions(folder: Path, names: list[str]) -> list[str] | None:
    """The captions of images under a folder, from its captions.jsonl; None when there is no such file.

    Raises UserError for a line that is not what it should be, or an image without a caption.
    """
    file = folder / "captions.jsonl"
    if not file.is_file():
        return None
    captions: dict[str, str] = {}
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                captions[os.path.normpath(entry["file_name"])] = str(entry["text"])
            except (ValueError, TypeError, KeyError) as error:
                shown = line[:60].decode(errors="replace").rstrip()
                raise UserError(
                    f'{file}, line {number}: expected {{"file_name": "sub/a.png", "text": "what it shows"}}, not {shown!r}'
                ) from error
    without = [name for name in names if name not in captions]
    if without:
        listed = ", ".join(map(printable, without[:5]))
        raise UserError(f"{len(without)} of {len(names)} images under {folder} have no caption in {file.name}: {listed}")
    return [captions[name] for name in names]


def label_of(name: str) -> str:
    """The first folder in the name of an image; empty when there is none."""
    first, separator, _ = name.partition(os.sep)
    return first if separator else ""
