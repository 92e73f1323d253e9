"""Sets of images, the examples drawn from them (binarized, mirrored), and their splits into train, validation and test.

N images, C colour channels, H×W pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.console import UserError, counted
from pipelines.data.identity import Used, content_of_tensors
from pipelines.data.reading import Stored

SPLIT_SEED = 0
BINARIZATION_SEED = 0
VALIDATION_SHARE = 0.05


class ImageSet:
    """images: uint8 N C H W, or on disk; labels: int64 N, or None; captions: N, or None.

    groups: N, or None; images of the same group stay on one side of a split. Indexing gives what the autoencoder's forward
    takes.
    """

    def __init__(
        self,
        images: Tensor | Stored,
        labels: Tensor | None = None,
        captions: list[str] | None = None,
        groups: list[str] | None = None,
    ):
        self.images, self.labels, self.captions, self.groups = images, labels, captions, groups

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
        groups = None if self.groups is None else [self.groups[index] for index in indices.tolist()]
        images = self.images.subset(indices) if isinstance(self.images, Stored) else self.images[indices]
        return ImageSet(images, labels, captions, groups)


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
    content: str | None = None  # a checksum of the grey images and their labels, of which pixels are drawn black or white
    used: Sequence[Used] = ()  # where images in files lie

    def binarized(self) -> "Splits":
        """Drawn black or white: training images anew each time they come by, the others once."""
        validation, test = (ImageSet(Binarized(part).images, part.labels) for part in (self.validation, self.test))
        return replace(self, train=Binarized(self.train), validation=validation, test=test, content=self.content_in_memory())

    def content_in_memory(self) -> str:
        """A checksum of images and labels that did not come from files."""
        parts = [tensor for part in (self.train, self.validation, self.test) for tensor in (part.images, part.labels)]
        return self.content or content_of_tensors(part for part in parts if not isinstance(part, Stored))

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.train.images.shape
        return channels, height, width


def split(images: ImageSet, held_out: int) -> tuple[ImageSet, ImageSet]:
    """A seeded split, stratified by label where labels have enough images; or one of whole groups.

    An image that is alone in its class is kept then, and the others are stratified. Raises UserError where there is only one
    group.
    """
    from sklearn.model_selection import GroupShuffleSplit, train_test_split  # slow to import

    labels, groups = images.labels, images.groups or []
    if (count := len({*groups})) < len(groups):
        if count < 2:
            raise too_few_groups(count, len(groups))
        by_group = GroupShuffleSplit(1, test_size=held_out / len(images), random_state=SPLIT_SEED)
        rows = next(by_group.split(groups, groups=groups))
        kept, out = (images.subset(torch.from_numpy(part).sort().values) for part in rows)
        return kept, out
    indices, stratify, alone = torch.arange(len(images)), None, torch.arange(0)
    if labels is not None and held_out >= len(counts := torch.bincount(labels)):
        several = counts[labels] >= 2
        if held_out + len(counts) <= int(several.sum()):
            indices, alone, stratify = indices[several], indices[~several], labels[several]
    kept, out = train_test_split(indices, test_size=held_out, random_state=SPLIT_SEED, stratify=stratify)
    return images.subset(torch.cat([kept, alone]).sort().values), images.subset(out.sort().values)


def too_few_groups(count: int, images: int) -> UserError:
    return UserError(f"--data.split-by finds only {counted(count, 'group')} among {images} images; use --data.split-by file")


def with_validation(train: ImageSet, test: ImageSet, label_names: Iterable[str], listing: str | None = None) -> Splits:
    train, validation = split(train, max(1, round(VALIDATION_SHARE * len(train))))
    return Splits(train, validation, test, list(label_names), listing)
