"""Which images belong together: by their names, so that a split keeps them together; and which look alike.

N images, C colour channels, H×W pixels.
"""

import os
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

HASH_BATCH = 100
HASH_GRID = 8

SplitBy = Literal["file", "folder", "name-prefix"]


def groups_of(names: list[str], by: SplitBy) -> list[str]:
    """The group of each image, by its name. Images of one group stay on one side of a split.

    by: `file`, each image is a group; `folder`, the folder that it lies in; `name-prefix`, the folder, and the name up to the
    first `-`, `_`, space or dot. What all names begin with does not count.
    """
    if by == "file":  # samples of two shards may have the same name
        return names if len({*names}) == len(names) else [f"{name} ({number})" for number, name in enumerate(names)]
    folders = [os.path.dirname(name) for name in names]
    if by == "folder":
        return folders
    files = [os.path.basename(name) for name in names]
    common = len(os.path.commonprefix(files))
    ends = str.maketrans("-_ ", "...")
    prefixes = [name[:common] + name[common:].translate(ends).partition(".")[0] for name in files]
    return [os.path.join(folder, prefix) for folder, prefix in zip(folders, prefixes)]


def look_alike(images: Tensor, others: Tensor) -> dict[int, int]:
    """The images of which a near-duplicate is among others, by number, with the number of the first such.

    images, others: uint8 N C H W. Near-duplicates have the same difference hash: of 8×8 fields of the grey image, which are
    brighter than their left, and which than their upper neighbour (dHash, Krawetz 2013). It does not depend on the colours.
    An image without any such field is compared with none.
    """
    first: dict[bytes, int] = {}
    for number, code in enumerate(hashes(others)):
        first.setdefault(code, number)
    return {number: first[code] for number, code in enumerate(hashes(images)) if code in first and any(code)}


def hashes(images: Tensor) -> list[bytes]:
    """The bits of each image's difference hash, a byte for each."""
    found = []
    for batch in images.split(HASH_BATCH):
        grey = batch.float().mean(1, keepdim=True)
        across = interpolate(grey, (HASH_GRID, HASH_GRID + 1), mode="area").diff(dim=-1)
        down = interpolate(grey, (HASH_GRID + 1, HASH_GRID), mode="area").diff(dim=-2)
        found += [bits.tobytes() for bits in torch.cat([across.flatten(1), down.flatten(1)], 1).gt(0).numpy()]
    return found
