"""What all of the user's own images have in common, wherever they lie: which can be read, and how they are split."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from PIL import ImageColor
from torch import Tensor

from pipelines.console import UserError, counted, say
from pipelines.data.alike import SplitBy, groups_of, look_alike
from pipelines.data.decoding import REMARKS
from pipelines.data.identity import Used
from pipelines.data.images import ImageSet, Splits, split, too_few_groups, with_validation
from pipelines.data.layout import some
from pipelines.data.reading import Stored, printable
from pipelines.files import digest_of, read_as, write_json

FOLDER_TEST_SHARE = 0.1
LEAST_ALIKE = 0.01  # share of the test images from which near-duplicates are told of
FEWEST_IMAGES = 10  # of a folder, or its part
FEWEST_GROUPS = 3  # for training, validation and test
FOR_FIGURES = 65  # test images: a Fréchet distance in the 64 features of the classifier needs more images than features
MOST_FOR_FIGURES = 3  # the part of all images, 1 in so many, that is advised to be held out for it at most


@dataclass(frozen=True, kw_only=True)
class OwnImages:
    """Settings that all data sets of the user's own images share."""

    size: Annotated[int, Interval(ge=1, le=16_384)] = 64
    """height and width of an image, in pixels"""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour"""
    background: str = "white"
    """colour behind transparent pixels, by name or as #rrggbb"""
    split_by: SplitBy = "file"
    """the groups of images that the split keeps together: each image is a group of its own, or each folder, or in each folder the
    images whose names begin alike, up to the first `-`, `_`, space or dot"""
    test_share: Annotated[float, Interval(gt=0, le=0.5)] = FOLDER_TEST_SHARE
    """share of the images that is held out for testing, where they come without a test split"""
    skip_unreadable: bool = False
    """leave out images that cannot be read"""
    in_memory: Annotated[float, Interval(ge=0, le=1_000_000)] = 1.0
    """GiB of decoded images up to which all are kept in memory; of larger sets, images are read from disk when they are used"""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C H W."""
        return self.channels, self.size, self.size

    def check(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise UserError(f"--data.background is a colour by its name or as #rrggbb, not {self.background!r}") from error

    def splits(self, sets: dict[str, ImageSet], where: str, label_names: list[str], report: Path | None) -> Splits:
        """The splits made of the sets for `train`, `test` and perhaps `validation`; or of `all`, a share of which is held out.

        Where only some sets have captions, none is used. Raises as `readable`.
        """
        captioned = [split for split, images in sets.items() if images.captions is not None]
        if captioned and len(captioned) < len(sets):
            say(f"no captions: of {where}, only the images for {' and '.join(captioned)} have them")
            for images in sets.values():
                images.captions = None
        for images in sets.values():
            assert isinstance(images.images, Stored)
            images.groups = groups_of(images.images.files.names, self.split_by)
        read, unreadable = readable([*sets.values()], where, self.skip_unreadable, self.in_memory, report)
        label_names = readable_labels([*sets.values()], read, label_names)
        listing = listing_of([*sets.values()], unreadable, label_names)
        used = [
            Used(images.images.files, [row for row in range(len(images)) if row not in out])
            for images, out in zip(sets.values(), unreadable)
            if isinstance(images.images, Stored)
        ]
        parts = dict(zip(sets, read))
        if "all" in parts:
            everything = parts.pop("all")
            parts["train"], parts["test"] = without_test(everything, self.test_share)
            tell_of_few(len(everything), len(parts["test"]))
        elif self.test_share != FOLDER_TEST_SHARE:
            say(f"warning: --data.test-share does nothing: {where} has a test split of its own")
        if "validation" in parts:
            splits = Splits(parts["train"], parts["validation"], parts["test"], label_names, listing, used=used)
        else:
            splits = replace(with_validation(parts["train"], parts["test"], label_names, listing), used=used)
        self.warn_of_duplicates(splits, where, chosen="all" in sets)
        if splits.train.labels is not None and (never := labels_without(splits.train.labels, label_names)):
            say(f"warning: no training image has the label {some(never)}, which the prior cannot learn to draw")
        return splits

    def warn_of_duplicates(self, splits: Splits, where: str, chosen: bool) -> None:
        """Say so where near-duplicates of training images are test images. chosen: whether the split was made here."""
        train, test = splits.train, splits.test
        if not (isinstance(train.images, Tensor) and isinstance(test.images, Tensor) and train.groups and test.groups):
            return  # on disk, where nothing is read first
        alike = look_alike(test.images, train.images)
        if len(alike) >= max(1, LEAST_ALIKE * len(test)):
            number, other = next(iter(alike.items()))
            ways = helping_splits(test.groups, train.groups, alike) if chosen and self.split_by == "file" else []
            helping, comma = ", or ".join(ways), "," * (len(ways) > 1)
            remedy = f": --data.split-by {helping}{comma} keeps together what belongs together" if ways else ""
            if splits.label_names and "folder" in ways:
                remedy += ". folder is no help where folders are classes: it would hold out whole classes"
            say(
                f"warning: test images under {where} with a near-duplicate among the training images: {len(alike)} of"
                f" {len(test)}, as {printable(test.groups[number])} and {printable(train.groups[other])}. So figures look better"
                f" than they are{remedy}"
            )


def helping_splits(test: list[str], train: list[str], alike: dict[int, int]) -> list[SplitBy]:
    """The ways to split that would keep at least half of the near-duplicates on one side. test, train: names of the images."""
    ways: list[SplitBy] = []
    for by in ("folder", "name-prefix"):
        groups = groups_of([*test, *train], by)
        together = sum(groups[number] == groups[len(test) + other] for number, other in alike.items())
        if 2 * together >= len(alike) and len({*groups}) >= FEWEST_GROUPS:
            ways.append(by)
    return ways


def labels_without(labels: Tensor, label_names: list[str]) -> list[str]:
    """The names of the labels that no image has. labels: of the images, N."""
    counts = labels.bincount(minlength=len(label_names)).tolist()
    return [name for name, count in zip(label_names, counts) if count == 0]


def tell_of_few(images: int, test: int) -> None:
    """Before the training, that so few test images give no Fréchet distance, and the share of all images that would."""
    if test >= FOR_FIGURES:
        return
    held_out = f"{counted(test, 'image is', 'images are')} held out for testing, and a Fréchet distance needs {FOR_FIGURES}"
    if (share := share_for_figures(images)) is None:
        say(f"{held_out}, so about {MOST_FOR_FIGURES * FOR_FIGURES} images in all. Judge this run by its pictures")
    else:
        say(f"{held_out}. A new run with --data.test-share {share} has as many")


def share_for_figures(images: int) -> float | None:
    """The share of so many images that gives a Fréchet distance, in whole percent; None where too few were left to train on."""
    return math.ceil(100 * FOR_FIGURES / images) / 100 if images >= MOST_FOR_FIGURES * FOR_FIGURES else None


def without_test(images: ImageSet, share: float = FOLDER_TEST_SHARE) -> tuple[ImageSet, ImageSet]:
    """Images that no split is known of: those to train on, and a share for the test. Raises UserError where there are too few
    groups."""
    groups = images.groups or []
    if (count := len({*groups})) < min(FEWEST_GROUPS, len(groups)):
        raise too_few_groups(count, len(images))
    return split(images, max(1, round(share * len(images))))


def labels_of(
    parts: Sequence[tuple[Sequence[str], Sequence[str | None]]], rows: str, label: str
) -> tuple[list[Tensor | None], list[str]]:
    """The labels of each part as numbers, and their names by number. parts: the names and the labels as texts of each.

    None and no labels unless all have one; nor are there any where all have the same, which says nothing. rows, label: what
    they are called.
    """
    without = [name for names, texts in parts for name, text in zip(names, texts) if text is None]
    total = sum(len(names) for names, _ in parts)
    if 0 < len(without) < total:
        say(f"no labels: no {label} in {len(without)} of {total} {rows}: {some(without, 3)}")
    known = {text for _, texts in parts for text in texts if text is not None}
    if without or len(known) < 2:
        return [None for _ in parts], []
    ordered = sorted(known, key=lambda text: (0, int(text), text) if text.isdecimal() else (1, 0, text))
    number = {name: index for index, name in enumerate(ordered)}
    return [torch.tensor([number[text] for text in texts if text is not None]) for _, texts in parts], ordered


def listing_of(sets: list[ImageSet], left_out: list[dict[int, str]], label_names: list[str]) -> str:
    """A checksum of the names and labels of images in files, wherever those lie, but of those that are left out."""

    def parts() -> Iterator[bytes]:
        yield repr(label_names).encode()
        for images, out in zip(sets, left_out):
            assert isinstance(images.images, Stored)
            labels = [None] * len(images) if images.labels is None else images.labels.tolist()
            for index, (name, label) in enumerate(zip(images.images.files.names, labels)):
                if index not in out:
                    yield os.fsencode(f"{name}\0{label}\0")
            yield b"\0"

    return digest_of(parts())


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
    known = None if fits or report is None else known_unreadable(report, listing, stored)
    if known is None:
        known = [{} for _ in sets]
        remarks: dict[str, list[str]] = {name: [] for name in REMARKS}
        for number, images in enumerate(stored):
            pixels[number], known[number], so_are = images.read_all(f"reading {where}", keep=fits)
            for name, so in so_are.items():
                remarks[name] += [images.files.name(index) for index in so]
        for name, (what, then) in REMARKS.items():
            if remarks[name]:
                say(f"{counted(len(remarks[name]), 'image is', 'images are')} {what}; of each, {then}: {some(remarks[name], 3)}")
        if report is not None and (any(known) or not fits or report.exists()):
            rows = [
                {"file": images.files.name(index), "reason": found[index]}
                for images, found in zip(stored, known)
                for index in sorted(found)
            ]
            write_json(report, {"listing": listing, "unreadable": rows, **remarks})
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
        say(f"warning: left out {count} of {total} images under {where} that cannot be read: {listed}")
    kept = []
    for part, tensor, found in zip(sets, pixels, known):
        part = part if tensor is None else ImageSet(tensor, part.labels, part.captions, part.groups)
        rest = torch.tensor([index for index in range(len(part)) if index not in found])
        kept.append(part.subset(rest) if found else part)
    return kept, known


def known_unreadable(report: Path, listing: str, stored: list[Stored]) -> list[dict[int, str]] | None:
    """The unreadable images of each part by number, from a report on the very same files; None when there is none."""

    def known_in(found: Any) -> list[dict[int, str]] | None:
        if found["listing"] != listing:
            return None
        reasons = {row["file"]: row["reason"] for row in found["unreadable"]}
        named = [[(index, images.files.name(index)) for index in range(len(images))] for images in stored]
        known = [{index: reasons[name] for index, name in part if name in reasons} for part in named]
        if sum(map(len, known)) != len(found["unreadable"]):
            raise ValueError("it names other files")
        return known

    try:
        known = read_as(report, known_in, "all images are read again") if report.is_file() else None
    except UserError as error:
        say(f"warning: {error}")
        return None
    if known is not None:
        say(f"all images were read before; delete {report} to have them read again")
    return known


def readable_labels(sets: list[ImageSet], read: list[ImageSet], label_names: list[str]) -> list[str]:
    """The labels of which images can be read, by number; the labels of all sets are changed to these numbers, as if the
    unreadable images were not there. No labels where fewer than two are left.

    read: the sets without unreadable images.
    """
    labels = [part.labels for part in read if part.labels is not None]
    used = torch.cat(labels).unique().tolist() if labels else []
    if len(used) == len(label_names):
        return label_names
    gone = sorted({*label_names} - {label_names[number] for number in used})
    left = len(used) if len(used) > 1 else 0
    say(f"warning: no image with the label {some(gone)} can be read; {left} of {len(label_names)} labels are left")
    place = torch.zeros(len(label_names), dtype=torch.int64)
    place[used] = torch.arange(len(used))
    for part in {id(part): part for part in (*sets, *read)}.values():  # a set of which all can be read is the same in both
        part.labels = place[part.labels] if left and part.labels is not None else None
    return [label_names[number] for number in used] if left else []
