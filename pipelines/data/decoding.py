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


SAID = {
    "animated": ("animated", "the first frame is used"),
    "transparent": ("transparent in parts", "--data.background shows there"),
}
"""What may be said of an image: what it is, and what is done."""


def read_image(
    file: str | BinaryIO,
    size: int,
    channels: int,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
    background: str = "white",
) -> tuple[np.ndarray, set[str]]:
    """One image as uint8 C H W: turned upright, its shorter side resized, its centre cropped; and what of `SAID` it is.

    resampling: how its pixels become those of the size; NEAREST for what is black or white. background: the colour behind
    transparent pixels.

    Of an animated image this is the first frame. Raises Unreadable.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            # An MPO is a photo with its preview.
            is_so = {"animated": image.format != "MPO" and getattr(image, "is_animated", False)}
            upright = eight_bit(ImageOps.exif_transpose(image))
            shown = opaque(upright, background, is_so).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(shown, (size, size), resampling)
    except Exception as error:  # a decoder that is fed broken bytes raises nearly anything
        raise Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    pixels = np.asarray(square)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), {name for name, so in is_so.items() if so}


def opaque(image: Image.Image, background: str, is_so: dict[str, bool]) -> Image.Image:
    """In front of a background, where the image is transparent: the colour of a pixel that is not seen can be anything."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    is_so["transparent"] = image.getchannel("A").getextrema() != (255, 255)
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, scaled to 8: Pillow would clip it at 255. Raises ValueError for pixels whose range is not known."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits, whose range is not known")
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    see_through = image.info.get("transparency")
    if see_through is not None:  # the grey that is not seen
        grey.putalpha(Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8)))
    return grey
