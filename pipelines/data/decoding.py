"""One image file as pixels.

C colour channels, H×W pixels.
"""

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, features

JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
IMAGE_ENDINGS = JPEG | {".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
FORMATS = ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]  # whatever a file is called, no other decoder is tried on it
if features.check("avif"):
    IMAGE_ENDINGS |= {".avif"}
    FORMATS += ["AVIF"]


class Unreadable(ValueError):
    """A file holds no image that can be read; the message says why."""


def read_image(
    file: str | BinaryIO, size: int, channels: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> tuple[np.ndarray, bool]:
    """One image as uint8 C H W: turned upright, its shorter side resized, its centre cropped; and whether it is animated.

    resampling: how its pixels become those of the size; NEAREST for what is black or white.

    Of an animated image this is the first frame. Raises Unreadable.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            animated = image.format != "MPO" and getattr(image, "is_animated", False)  # an MPO is a photo with its preview
            upright = eight_bit(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(upright, (size, size), resampling)
    except Exception as error:  # a decoder that is fed broken bytes raises nearly anything
        raise Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    pixels = np.asarray(square)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), animated


def eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, scaled to 8: Pillow would clip it at 255. Raises ValueError for pixels whose range is not known."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits, whose range is not known")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
