"""The user's own images as files in a folder."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.console import NotThere, UserError, counted, say
from pipelines.data.captions import usable_text
from pipelines.data.decoding import IMAGE_ENDINGS, changes_to_fit
from pipelines.data.images import ImageSet, Splits
from pipelines.data.layout import images_under, label_of, labels_in, listed, some, splits_of
from pipelines.data.own import FEWEST_IMAGES, OwnImages
from pipelines.data.reading import FolderFiles, Stored, printable


@dataclass(frozen=True)
class Folder(OwnImages):
    """Your own images, of any size and aspect: resized and cropped to squares. Subfolders are labels.

    Folders named `train`, `test` and perhaps `val` at the top are taken as the splits; else a share of the images is held
    out. A file captions.jsonl in such a folder gives captions: a line {"file_name": "sub/a.png", "text": "…"} for each image.
    """

    root: Path | None = None
    """the folder of images"""

    def load(self, report: Path | None = None) -> Splits:
        """report: file to name the unreadable images in."""
        if self.root is None:
            raise UserError("this preset needs your folder of images: --data.root PATH")
        if not self.root.is_dir():
            raise NotThere(f"there is no folder {self.root}", ": give your folder of images with --data.root PATH")
        self.check()
        left_out: Counter[str] = Counter()
        parts = splits_of(self.root, left_out)
        if left_out:
            say(f"left out of {self.root}: {listed(left_out)}")
        for part in parts.values():
            if len(part.names) < FEWEST_IMAGES:
                raise UserError(
                    f"{part.folder} holds {counted(len(part.names), 'image')}; at least {FEWEST_IMAGES} are needed."
                    f" Their names end in {', '.join(sorted(IMAGE_ENDINGS))}"
                )
        label_names, why_none = labels_in([*parts.values()])
        if why_none:
            say(f"no labels: {why_none}")
        number = {label: index for index, label in enumerate(label_names)}
        sets = {
            split: ImageSet(
                Stored(FolderFiles(part.folder, part.names), self.image_shape, self.background),
                torch.tensor([number[label_of(name)] for name in part.names]) if label_names else None,
                read_captions(part.folder, part.names, self.root),
            )
            for split, part in parts.items()
        }
        return self.splits(sets, str(self.root), label_names, report)


def read_captions(folder: Path, names: list[str], root: Path) -> list[str] | None:
    """The captions of images under a folder, from the captions.jsonl in it, or else in a folder around it, up to the root.

    None when there is no such file. Raises UserError for a line that is not what it should be, or an image without a caption.
    """
    around = [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]
    file = next((path for parent in around if (path := parent / "captions.jsonl").is_file()), None)
    if file is None:
        return None
    captions: dict[str, str] = {}
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                captions[os.path.normpath(entry["file_name"])] = usable_text(entry["text"])
            except (ValueError, TypeError, KeyError) as error:
                shown = line[:60].decode(errors="replace").rstrip()
                why = f" ({error})" if isinstance(error, UserError) else ""
                raise UserError(
                    f'{file}, line {number}: expected {{"file_name": "sub/a.png", "text": "what it shows"}}, not {shown!r}{why}'
                ) from error
    known = [captions.get(os.path.relpath(folder / name, file.parent)) for name in names]
    without = [name for name, caption in zip(names, known) if caption is None]
    if without:
        raise UserError(f"{file} has no caption for {len(without)} of {len(names)} images under {folder}: {some(without, 5)}")
    return [caption for caption in known if caption is not None]


def images_at(paths: Sequence[str], image_shape: tuple[int, int, int], background: str) -> tuple[list[str], ImageSet]:
    """Pictures by their paths, and all under the folders among these, resized to C H W; with their names.

    background: the colour behind transparent pixels.

    What cannot be read is named and left out. Raises UserError where a path is not there, or nothing is left.
    """
    names = []
    for path in paths:
        if os.path.isdir(path):
            names += [os.path.join(path, name) for name in images_under(Path(path))]
        elif os.path.exists(path):
            names.append(path)
        else:
            raise UserError(f"there is no picture and no folder {printable(path)}")
    if not names:
        raise UserError(f"no pictures under {some([*paths])}; those that are read end in {', '.join(sorted(IMAGE_ENDINGS))}")
    stored = Stored(FolderFiles(Path(), names), image_shape, background)
    images, unreadable, _ = stored.read_all("reading images", keep=True)
    assert images is not None
    for number, reason in unreadable.items():
        say(f"left out: {printable(names[number])} cannot be read ({reason})")
    kept = [number for number in range(len(names)) if number not in unreadable]
    if not kept:
        raise UserError("no picture is left that can be read")
    done = Counter(what for number in kept for what in changes_to_fit(Path(names[number]), image_shape))
    if done:
        channels, height, width = image_shape
        counts = ", ".join(f"{count} {what}" for what, count in done.items())
        say(f"of {counted(len(kept), 'picture')}, to fit the model's {channels}×{height}×{width}: {counts}")
    return [printable(names[number]) for number in kept], ImageSet(images[kept])
