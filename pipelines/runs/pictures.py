"""Images as files: one picture of all of them, or an array."""

import io
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.utils import make_grid, save_image

from pipelines.files import write_file


def tiled(images: Tensor, columns: int) -> bytes:
    """images uint8 N C H W as one picture in rows, PNG."""
    buffer = io.BytesIO()
    save_image(make_grid(images.float() / 255, nrow=columns, padding=1, pad_value=0.5), buffer, format="png")
    return buffer.getvalue()


def write_images(path: Path, images: Tensor) -> None:
    """images uint8 N C H W as a picture (.png) or as the array arr_0, N H W C (.npz); whole or not at all."""
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
        write_file(path, buffer.getvalue())
    else:
        write_file(path, tiled(images, columns=max(1, round(len(images) ** 0.5))))
