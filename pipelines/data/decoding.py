"""One image file as pixels.

C colour channels, H×W pixels.
"""

import functools
import io
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, features

JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
IMAGE_ENDINGS = JPEG | {".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
FORMATS = ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]  # whatever a file is called, no other decoder is tried on it
MOST_PIXELS = 2**26  # 8192×8192: a file of 21 KiB can hold many more, and memory must hold each several times
LONG = 2  # times the part of a picture that is kept: one that is longer loses more than half of it, which is said
DRAFT = 2  # times the size asked for: at least so large a JPEG is decoded, and then resized
if features.check("avif"):
    IMAGE_ENDINGS |= {".avif"}
    FORMATS += ["AVIF"]


class Unreadable(ValueError):
    """A file holds no image that can be read; the message says why."""


REMARKS = {
    "cropped": ("more than twice as long one way as the other", "only the middle square is used"),
    "animated": ("animated", "the first frame is used"),
    "transparent": ("transparent in parts", "--data.background shows there"),
    "dark": ("of 16 bits and darker than a quarter", "values are as in the file: scale them up if they have fewer bits"),
}
"""What may be special about an image, by name, and what is done with it."""
GREY = ("1", "L", "LA", "La", "I", "F")
"""Pillow's modes of pictures without colour; after a semicolon, in which bits."""


def opened(file: str | Path | BinaryIO) -> Image.Image:
    """An image file, of which no pixel is read yet. Pillow's warning of many pixels is left out: `read_image` refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=FORMATS)


def changes_to_fit(path: Path, image_shape: tuple[int, int, int]) -> list[str]:
    """What happens to a picture so that it becomes an image C H W: cropped, resized or turned grey."""
    channels, height, width = image_shape
    with opened(path) as image:
        (wide, high), mode = image.size, image.mode
    done = {
        "cropped": wide * height != high * width,
        "resized": (wide, high) != (width, height),
        "turned grey": channels == 1 and mode.partition(";")[0] not in GREY,
    }
    return [what for what, so in done.items() if so]


def read_image(
    file: str | BinaryIO,
    image_shape: tuple[int, int, int],
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
    background: str = "white",
) -> tuple[np.ndarray, set[str]]:
    """One image as uint8 C H W, turned upright, resized and cropped at its edges; and the names of the `REMARKS` that apply.

    image_shape: C H W. resampling: how its pixels become those of the size; NEAREST for what is black or white. background: the
    colour behind transparent pixels.

    Of an animated image this is the first frame. Raises Unreadable.
    """
    channels, height, width = image_shape
    try:
        with opened(file) as image:
            # An MPO is a photo with its preview.
            is_so = {"animated": image.format != "MPO" and getattr(image, "is_animated", False)}
            bits = significant_bits(image)
            side = DRAFT * max(height, width)  # the same whether it is turned or not
            whole = image.size
            image.draft(None, (side, side))  # a JPEG is decoded at a fraction of its size, where that is enough
            if math.prod(whole) > MOST_PIXELS and (math.prod(image.size) > MOST_PIXELS or not row_by_row(image)):
                raise ValueError(f"{whole[0]}×{whole[1]} pixels, of at most {MOST_PIXELS}: make it smaller")
            upright = in_srgb(eight_bit(ImageOps.exif_transpose(image), bits, is_so))
            shown = opaque(upright, background, is_so).convert("L" if channels == 1 else "RGB")
            sides = sorted((shown.width * height, shown.height * width))
            is_so["cropped"] = sides[1] > LONG * sides[0]
            fitting = ImageOps.fit(shown, (width, height), resampling)
    except Exception as error:  # a decoder that is fed broken bytes raises nearly anything
        raise Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    pixels = np.asarray(fitting)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), {name for name, so in is_so.items() if so}


def row_by_row(image: Image.Image) -> bool:
    """Whether this is a JPEG of one scan. One of several, as a progressive one, is held in memory at its full size."""
    if image.format not in ("JPEG", "MPO") or "progressive" in image.info:
        return False
    file = image.fp  # type: ignore[attr-defined]
    here, colours = file.tell(), b""
    file.seek(2)
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        if head[1] == 0xDA:  # the first scan begins
            colours = file.read(1)
            break
        file.seek(int.from_bytes(head[2:], "big") - 2, 1)
    file.seek(here)
    return colours == bytes([len(image.getbands())])


def opaque(image: Image.Image, background: str, is_so: dict[str, bool]) -> Image.Image:
    """The image in front of a background, where it is transparent: the colour of a pixel that is not seen can be anything."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    is_so["transparent"] = image.getchannel("A").getextrema() != (255, 255)
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def eight_bit(image: Image.Image, bits: int, is_so: dict[str, bool]) -> Image.Image:
    """Grey of 16 bits, scaled to 8: Pillow would clip it at 255. Raises ValueError for pixels whose range is not known.

    bits: that the file says it has. Where no value needs more, they are the lower ones: the upper ones, as the PNG
    specification wants it, need no other scale.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits, whose range is not known")
    full = 2**bits - 1 if values.max() < 2**bits else 65535
    is_so["dark"] = full == 65535 and 0 < values.max() < 2**14
    grey = Image.fromarray(((values * 255 + full // 2) // full).astype(np.uint8))
    see_through = image.info.get("transparency")
    if see_through is not None:  # the grey that is not seen
        grey.putalpha(Image.fromarray(np.where(values == see_through, 0, 255).astype(np.uint8)))
    return grey


def significant_bits(image: Image.Image) -> int:
    """The bits that count of grey of 16 bits, as the chunk sBIT of a PNG or the tag BitsPerSample of a TIFF says; 16 where
    nothing does."""
    if image.format == "TIFF":
        return int(min(16, *image.tag_v2.get(258, (16,)), 16))  # type: ignore[attr-defined]
    if image.format != "PNG" or not image.mode.startswith("I"):
        return 16
    file = image.fp  # type: ignore[attr-defined]
    here, bits = file.tell(), 16
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"sBIT" and length:
            bits = min(16, max(1, file.read(1)[0]))
            break
        file.seek(length + 4, 1)
    file.seek(here)
    return bits


def in_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB, by the colour profile in its file, if there is one that fits its pixels."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("L", "RGB", "CMYK", "RGBA", "LA", "P"):
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    colours = image.convert(image.mode.removesuffix("A"))
    try:
        transform = to_srgb(profile, colours.mode)
        shown = colours if transform is None else ImageCms.applyTransform(colours, transform)
    except ImageCms.PyCMSError:  # of other pixels than these, or damaged
        return image
    assert shown is not None
    if alpha is not None:
        shown.putalpha(alpha)
    elif "transparency" in image.info:
        shown = Image.composite(shown.convert("RGBA"), Image.new("RGBA", shown.size), image.convert("RGBA").getchannel("A"))
    return shown


@functools.lru_cache(maxsize=64)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from pixels of a mode to RGB in sRGB; None where the profile is sRGB already. Raises PyCMSError."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    name = source.profile.profile_description or ""
    if mode == "RGB" and "sRGB" in name and "linear" not in name.lower():
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
