"""Images as files: one picture of all of them, or an array."""

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from pipelines.console import UserError
from pipelines.data.layout import DRAWN
from pipelines.files import write_file

GREY = 128


def tiled(images: Tensor, columns: int) -> bytes:
    """images uint8 N C H W as one picture in rows, with grey lines between them; PNG.

    As torchvision's make_grid does it, but that takes seconds to import.
    """
    columns, line = min(columns, len(images)), int(len(images) > 1)
    framed = F.pad(repeat(images, "n c h w -> n (c grey) h w", grey=3 // images.shape[1]), (line, 0, line, 0), value=GREY)
    blank = torch.full_like(framed[:1], GREY).expand(-len(framed) % columns, -1, -1, -1)
    rows = rearrange(torch.cat([framed, blank]), "(r c) k h w -> (r h) (c w) k", c=columns)
    picture = F.pad(rows, (0, 0, 0, line, 0, line), value=GREY)
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", DRAWN)  # so that it is no image of a data set
    Image.fromarray(picture.numpy()).save(buffer, format="png", pnginfo=info)
    return buffer.getvalue()


def write_images(path: Path, images: Tensor) -> None:
    """images uint8 N C H W as a picture (.png) or as the array arr_0, N H W C (.npz); whole or not at all.

    Raises UserError where the file cannot be written, and says where the images lie instead: drawing them may have taken hours.
    """
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
        content = buffer.getvalue()
    else:
        content = tiled(images, columns=max(1, round(len(images) ** 0.5)))
    try:
        write_file(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {elsewhere(path.name, content)}") from error


def elsewhere(name: str, content: bytes) -> str:
    """Write a file to a new folder for temporary files instead; what to say of it."""
    try:
        path = Path(tempfile.mkdtemp()) / name
        write_file(path, content)
    except OSError as error:
        return (
            f"nor can it be under {tempfile.gettempdir()} ({error.strerror}), so what was drawn is lost: make room and draw again"
        )
    return f"what was drawn lies in {path}"
