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


def enlarged(images: Tensor, scale: int) -> Tensor:
    """images N C H W with each pixel as a square of scale × scale pixels."""
    return images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def files_of(path: Path, images: Tensor, scale: int) -> dict[Path, bytes]:
    """What `write_images` writes, by file."""
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
        return {path: buffer.getvalue()}
    images = enlarged(images, scale)
    if path.suffix == ".png":
        return {path: tiled(images, columns=max(1, round(len(images) ** 0.5)))}
    return {path / f"{number:05}.png": tiled(image[None], columns=1) for number, image in enumerate(images)}


def write_images(path: Path, images: Tensor, scale: int = 1) -> None:
    """images uint8 N C H W as one picture (.png), as the array arr_0, N H W C (.npz), or each as a file in a folder.

    scale: enlarges pictures with sharp pixels; an array stays as it is. Each file is there whole or not at all. Raises UserError
    where one cannot be written, and says where the images lie instead: drawing them may have taken hours.
    """
    made = files_of(path, images, scale)
    try:
        for file, content in made.items():
            write_file(file, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {elsewhere(path, made)}") from error


def elsewhere(path: Path, made: dict[Path, bytes]) -> str:
    """Write files to a new folder for temporary files instead; what to say of it."""
    try:
        folder = Path(tempfile.mkdtemp())
        for file, content in made.items():
            write_file(folder / file.relative_to(path.parent), content)
    except OSError as error:
        return (
            f"nor can it be under {tempfile.gettempdir()} ({error.strerror}), so what was drawn is lost: make room and draw again"
        )
    return f"what was drawn lies in {folder / path.name}"
