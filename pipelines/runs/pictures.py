"""Images as files: one picture of all of them, or an array."""

import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipelines.console import UserError, counted, escaped, say
from pipelines.data.layout import DRAWN, is_drawn
from pipelines.files import write_files
from pipelines.grids import grid

LETTERS = (9, 14)  # pixels: the least and the largest size of text
LEGIBLE = 64  # pixels: the least width of an image among others in one picture, so that the text below it is read
MOST_LINES = 3  # of text below an image


def tiled(images: Tensor, columns: int, texts: Sequence[str] = ()) -> bytes:
    """images uint8 N C H W as one picture in rows, with grey lines between them; PNG.

    texts: one for each image, which stands below it; where all are the same, it stands once, below all images.
    """
    of_all = len({*texts}) == 1
    if texts and not of_all:
        images = torch.cat(
            [repeat(images, "n c h w -> n (c grey) h w", grey=3 // images.shape[1]), text_strips(texts, images)], 2
        )
    picture = grid(images, columns)
    if of_all:
        picture = torch.cat([picture, rearrange(text_strips(texts[:1], picture.movedim(-1, 0)[None]), "1 c h w -> h w c")])
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", DRAWN)  # so that it is no image of a data set
    Image.fromarray(picture.numpy()).save(buffer, format="png", pnginfo=info)
    return buffer.getvalue()


def text_strips(texts: Sequence[str], images: Tensor) -> Tensor:
    """Texts in black on white, each as wide as an image of N C H W and all of the same height; uint8 N 3 h W."""
    width = images.shape[3]
    font = ImageFont.load_default(max(LETTERS[0], min(LETTERS[1], width // 8)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    fitting = ["\n".join(wrapped(escaped(text), font, width - 2)) for text in texts]
    lines = 1 + max(text.count("\n") for text in fitting)
    height = lines * (round(font.size) + 2) + 3
    strips = []
    for text in fitting:
        strip = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(strip).multiline_text((width / 2, 1), text, "black", font, anchor="ma", spacing=2, align="center")
        strips.append(torch.from_numpy(np.array(strip)))
    return rearrange(torch.stack(strips), "n h w c -> n c h w")


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A text as lines that are no wider than `width` pixels; … stands for what does not fit into MOST_LINES of them."""
    lines, words = [""], text.split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < MOST_LINES:
            lines.append(word)
        else:
            lines[-1] = f"{longer} {' '.join(words[number + 1 :])}"
            break
    return [cut(line, font, width) for line in lines]


def cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A line as it is where it fits, else its beginning and …"""
    if font.getlength(line) <= width:
        return line
    fitting = (end for end in range(min(len(line), width), 0, -1) if font.getlength(f"{line[:end]}…") <= width)
    return f"{line[: next(fitting, 0)]}…"


def enlarged(images: Tensor, scale: int) -> Tensor:
    """images N C H W with each pixel as a square of scale × scale pixels."""
    return images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def legible(images: Tensor) -> int:
    """The factor to enlarge images N C H W by that are shown in one picture, if there are several."""
    return max(1, -(-LEGIBLE // images.shape[3])) if len(images) > 1 else 1


def name_of(number: int) -> str:
    """The name of an image's file by its number, in a folder of them."""
    return f"{number:05}.png"


def check_own(option: str, folder: Path, count: int) -> None:
    """Raises UserError where so many images in a folder would replace a picture that was not drawn."""
    files = (folder / name_of(number) for number in range(count))
    if theirs := next((file for file in files if file.exists() and not is_drawn(file)), None):
        raise UserError(f"{option} {folder} holds {theirs.name}, which was not drawn and would be lost: name another folder")


def encoded_files(path: Path, images: Tensor, scale: int | None, texts: Sequence[str]) -> dict[Path, bytes]:
    """What `write_images` writes, by file."""
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
        return {path: buffer.getvalue()}
    images = enlarged(images, scale or (legible(images) if path.suffix == ".png" else 1))
    if path.suffix == ".png":
        return {path: tiled(images, max(1, round(len(images) ** 0.5)), texts)}
    made = {path / name_of(number): tiled(image[None], columns=1) for number, image in enumerate(images)}
    captions = path / "captions.jsonl"
    if texts or captions.is_file():
        told = dict(zip((file.name for file in made), texts or [""] * len(images), strict=True))
        made[captions] = captioned(captions, told)
    return made


def captioned(file: Path, told: Mapping[str, str]) -> bytes:
    """A captions.jsonl with the captions of images beside it, by their names; what it says of others stays."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    own = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False).encode() for name, text in told.items()]
    return b"\n".join([*(line for line in lines if image_named(line) not in told), *own, b""])


def image_named(line: bytes) -> str | None:
    """Which image a line of a captions.jsonl is about; None where it does not say."""
    try:
        return os.path.normpath(json.loads(line)["file_name"])
    except (ValueError, TypeError, KeyError):
        return None


def write_images(path: Path, images: Tensor, scale: int | None = None, texts: Sequence[str] = ()) -> None:
    """images uint8 N C H W as one picture (.png), as the array arr_0, N H W C (.npz), or each as a file in a folder.

    scale: enlarges pictures with sharp pixels; an array stays as it is. None enlarges small images in one picture. texts: stand
    below images in one picture; in a folder, they are in its captions.jsonl.

    Each file is there whole or not at all. Raises UserError where one cannot be written, and says where the images lie instead:
    drawing them may have taken hours.
    """
    made = encoded_files(path, images, scale, texts)
    try:
        write_files(made)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {elsewhere(path, made)}") from error
    others = [] if path.suffix else sorted({*path.glob("*.png")} - made.keys())
    if older := [file for file in others if file.stem.isdecimal() and is_drawn(file)]:
        pictures = f"{counted(len(older), 'picture')} of an earlier draw, from {older[0].name} to {older[-1].name}"
        say(f"warning: {path} still holds {pictures}: delete them, or draw into a new folder")


def elsewhere(path: Path, made: dict[Path, bytes]) -> str:
    """Write files to a new folder for temporary files instead; what to say of it."""
    try:
        folder = Path(tempfile.mkdtemp())
        write_files({folder / file.relative_to(path.parent): content for file, content in made.items()})
    except OSError as error:
        return (
            f"nor can it be under {tempfile.gettempdir()} ({error.strerror}), so what was drawn is lost: make room and draw again"
        )
    return f"what was drawn lies in {folder / path.name}"
