"""Images from a torch Dataset: one that a Python program gave, or any data set of torchvision by its name.

N images, C colour channels, H×W pixels.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
from annotated_types import Interval
from PIL import Image, ImageOps
from torch import Tensor

from pipelines.console import NotThere, Progress, UserError, counted, first_line, nearest, say
from pipelines.data.decoding import GREY, eight_bit, opaque, significant_bits
from pipelines.data.downloads import downloaded
from pipelines.data.images import ImageSet, Splits, with_validation
from pipelines.data.own import FEWEST_IMAGES, without_test
from pipelines.files import packed, read_tensors

TRAIN, TEST = ("train", "trainval", "training"), ("test", "val", "valid")
"""What data sets of torchvision call their splits."""


@dataclass(frozen=True)
class Given:
    """Images of a Dataset that a Python program passed to `TwoStage.train`, copied to a file of the run."""

    root: Path | None = None
    """the file, images.safetensors in the run's folder"""

    def load(self, report: Path | None = None) -> Splits:
        if self.root is None:
            raise UserError("the images of this run were given by a Python program, and did not come with it")
        if not self.root.is_file():
            raise NotThere(f"there is no {self.root}, with the images that a Python program gave")
        tensors = read_tensors(self.root)
        try:
            names = bytes(tensors.get("label_names", torch.empty(0, dtype=torch.uint8)).tolist()).decode()
            train, test = (ImageSet(tensors[part], tensors.get(f"{part}_labels")) for part in ("train", "test"))
            return with_validation(train, test, names.split("\n") if names else [])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.root} holds no images that a Python program gave ({error})") from error


def file_of(dataset: Any, held_out: Any = None) -> bytes:
    """What a file of `Given` holds: of a Dataset of images, or of pairs of an image and a class number.

    held_out: the Dataset of test images; a tenth of the images when None. Raises UserError for other items.
    """
    train = image_set(dataset, "reading the Dataset")
    if held_out is None:
        train, test = without_test(train)
    else:
        test = image_set(held_out, "reading the Dataset of held-out images")
    assert isinstance(train.images, Tensor) and isinstance(test.images, Tensor)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(f"held-out images are {tuple(test.images.shape[1:])}, and others {tuple(train.images.shape[1:])}")
    tensors = {"train": train.images, "test": test.images}
    if train.labels is not None and test.labels is not None:
        tensors |= {"train_labels": train.labels, "test_labels": test.labels}
        names = "\n".join(names_of(dataset, [train.labels, test.labels]))
        tensors["label_names"] = torch.tensor([*names.encode()], dtype=torch.uint8)
    return safetensors.torch.save(packed(tensors))


def image_set(dataset: Any, label: str) -> ImageSet:
    """All of a Dataset, in memory; without labels where an item is an image alone, or its second part no class number."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"a Dataset has a length, and items by number, which {type(dataset).__name__} has not: pass a list of items"
        )
    images, labels, pairs = [], [], 0
    with Progress(label, len(dataset), "images") as progress:
        for index in range(len(dataset)):  # a Dataset need not say where it ends otherwise
            item = dataset[index]
            pair = isinstance(item, tuple | list) and len(item) > 1
            images.append(pixels_of(item[0] if isinstance(item, tuple | list) else item, index))
            labels.append(class_of(item[1]) if pair else None)
            pairs += pair
            if images[-1].shape != images[0].shape:
                sizes = f"{tuple(images[-1].shape)}, and the first is {tuple(images[0].shape)}"
                raise UserError(f"image {index} of the Dataset is {sizes}: resize them to one size in its transform")
            progress.update(1)
    if len(images) < FEWEST_IMAGES:
        raise UserError(f"the Dataset holds {counted(len(images), 'image')}; at least {FEWEST_IMAGES} are needed")
    known = [number for number in labels if number is not None and number >= 0]
    if pairs and len(known) < len(labels):
        say(f"no labels: no class number in {len(labels) - len(known)} of {len(labels)} items")
    return ImageSet(torch.stack(images), torch.tensor(known) if len(known) == len(labels) else None)


def pixels_of(image: Any, index: int) -> Tensor:
    """uint8 C H W, of an image of Pillow; or of a tensor or an array C H W or H W, of bytes or of numbers from 0 to 1.

    Raises UserError for anything else.
    """
    if isinstance(image, Image.Image):
        try:
            shown = seen(image)
        except ValueError as error:
            raise UserError(f"item {index} of the Dataset is an image of {error}: convert it to 8 bits first") from error
        grey = image.mode.partition(";")[0] in GREY
        pixels = torch.from_numpy(np.array(shown.convert("L" if grey else "RGB")))
        return pixels[None] if grey else pixels.permute(2, 0, 1).contiguous()
    pixels = torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    if isinstance(pixels, Tensor):
        pixels = pixels[None] if pixels.ndim == 2 else pixels
        if pixels.ndim == 3 and len(pixels) in (1, 3) and pixels.dtype == torch.uint8:
            return pixels.cpu()
        if pixels.ndim == 3 and len(pixels) in (1, 3) and pixels.is_floating_point() and 0 <= pixels.min() <= pixels.max() <= 1:
            return (pixels.cpu() * 255).round().to(torch.uint8)
        what = f"{tuple(pixels.shape)} of {pixels.dtype}" + (", not all from 0 to 1" if pixels.is_floating_point() else "")
    else:
        what = type(image).__name__
    raise UserError(
        f"item {index} of the Dataset holds no image but {what}: an image is one of Pillow, or a tensor of 1 or 3 channels,"
        " C H W, of uint8 or of numbers from 0 to 1"
    )


def seen(image: Image.Image) -> Image.Image:
    """An image of 8 bits, with white behind its transparent parts, as of a file in a folder of images.

    Raises ValueError for pixels whose range is not known.
    """
    if image.mode == "I" and np.asarray(image).max() <= 255:  # whole numbers of 32 bits, which hold bytes here
        return image
    if image.mode == "I":
        raise ValueError("whole numbers above 255, whose range is not known")
    return opaque(eight_bit(image, significant_bits(image), {}), "white", {})


def class_of(label: Any) -> int | None:
    """The number, also of numpy or in a tensor or an array that holds nothing else; None for anything else."""
    if isinstance(label, Tensor | np.ndarray | np.generic) and math.prod(label.shape) == 1:
        label = label.item()
    return int(label) if isinstance(label, int) else None


def names_of(dataset: Any, labels: Iterable[Tensor]) -> list[str]:
    """The names of the classes, as the Dataset says; numbers where it does not."""
    count = 1 + max(int(part.max()) for part in labels)
    names = getattr(dataset, "classes", None)
    usable = isinstance(names, Sequence) and len(names) >= count and all(isinstance(name, str) for name in names)
    return [name.replace("\n", " ") for name in names] if usable else [str(number) for number in range(count)]  # type: ignore


@dataclass(frozen=True)
class TorchvisionByName:
    """Any data set of torchvision with one image in each item; images are resized and cropped to squares, and held in memory."""

    name: str | None = None
    """torchvision's name of the data set, such as SVHN or Flowers102"""
    root: Path = Path("data")
    """folder with the data in torchvision's layout, or to download them to"""
    size: Annotated[int, Interval(ge=1, le=16_384)] = 64
    """height and width of an image, in pixels"""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour"""

    def load(self, report: Path | None = None) -> Splits:
        """Raises UserError where there is no such data set, it cannot be had, or its items are no pictures."""
        kind = self.kind()
        parameters = inspect.signature(kind).parameters
        if "train" in parameters:
            found = [self.made(kind, {"train": part}) for part in (True, False)]
        elif "split" in parameters:
            found = [self.first(kind, names) for names in (TRAIN, TEST)]
        else:
            found = [self.made(kind, {})]
        sets = [image_set(part, f"reading {self.name}") for part in found]
        if len(sets) == 1:
            sets = [*without_test(sets[0])]
        train, test = sets
        labels = [part.labels for part in sets if part.labels is not None]
        if len(labels) < 2:
            return with_validation(ImageSet(train.images), ImageSet(test.images), [])
        return with_validation(train, test, names_of(found[0], labels))

    def kind(self) -> Any:
        from torchvision import datasets  # slow to import

        kinds = {name: getattr(datasets, name) for name in datasets.__all__}
        names = [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)]
        if self.name is None:
            raise UserError("the preset torchvision needs the name of a data set, such as --data.name SVHN")
        if self.name not in names:
            raise UserError(f"torchvision has no data set {self.name!r}{nearest(self.name, names)}")
        return kinds[self.name]

    def first(self, kind: Any, names: Sequence[str]) -> Any:
        """The first of several splits that there is. Raises UserError where there is none of them."""
        for name in names:
            try:
                return self.made(kind, {"split": name})
            except UserError as error:
                if not str(error.__cause__).startswith("Unknown value"):
                    raise
                why = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else str(error)
        raise UserError(
            f"{self.name} has no split by the names {', '.join(names)} ({why}): load it in Python, and give its parts to"
            " TwoStage.train as dataset and held_out"
        )

    def made(self, kind: Any, part: dict[str, Any]) -> Any:
        """Downloaded where it is not there. Raises UserError where it cannot be had."""
        parameters = inspect.signature(kind).parameters
        given = part | ({"root": self.root} if "root" in parameters else {}) | {"transform": self.square}
        try:
            try:
                return kind(**given)
            except (RuntimeError, FileNotFoundError):
                if "download" not in parameters:
                    raise
            return downloaded(kind, self.root, **given)
        except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
            raise NotThere(
                f"{self.name} is not in {self.root}/ in torchvision's layout, and torchvision could not bring it there"
                f" ({first_line(error)})",
                ": put it there, or name a folder that has it with --data.root",
            ) from error

    def square(self, image: Any) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise UserError(f"items of {self.name} hold no single picture but {type(image).__name__}: take another data set")
        try:
            shown = seen(image)
        except ValueError as error:
            raise UserError(f"items of {self.name} hold {error}: take another data set") from error
        shown = shown.convert("L" if self.channels == 1 else "RGB")
        return ImageOps.fit(shown, (self.size, self.size), Image.Resampling.LANCZOS)
