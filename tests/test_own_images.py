"""Folders and shards as people have them: what is read, what is left out, and what is said of it."""

import io
import json
import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

from pipelines.console import UserError
from pipelines.data import decoding
from pipelines.data.alike import groups_of, look_alike
from pipelines.data.decoding import Unreadable, read_image
from pipelines.data.folder import Folder, images_at
from pipelines.data.images import ImageSet, Splits
from pipelines.data.images import split as split_images
from pipelines.data.reading import content_of
from pipelines.data.shards import Shards
from pipelines.explorer.views import hidden_part
from pipelines.judging.features import Classifier
from pipelines.runs import phases
from pipelines.runs.completion import known_pixels, picture_to_complete
from pipelines.runs.conditions import check_captions
from pipelines.runs.dataset import load_data, write_facts
from pipelines.runs.pictures import write_images
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run


def fill(folder: Path, count: int = 12, first: int = 0, ending: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        Image.new("RGB", (8, 8), (index, 10, 20)).save(folder / f"{index}.{ending}")


def fill_grey(folder: Path, count: int) -> None:
    """Images of which no two are the same."""
    for index in range(count):
        Image.new("RGB", (8, 8), (index % 256, index // 256, 0)).save(folder / f"{index}.png")


def labelled(folder: Path, count: int = 12) -> None:
    for name in ("circle", "square"):
        fill(folder / name, count)


def loaded(folder: Path, **settings) -> Splits:
    return Folder(folder, size=8, **settings).load()


# Splits


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        (("Training", "TEST"), (46, 2, 24)),
        (("train", "val"), (46, 2, 24)),
        (("train2017", "val2017"), (46, 2, 24)),
        (("train_images", "test-set"), (46, 2, 24)),
        (("train", "testing", "valid"), (48, 24, 24)),
    ],
)
def test_the_usual_names_of_splits_are_known(tmp_path, folders, sizes):
    for folder, count in zip(folders, (24, 12, 12)):
        labelled(tmp_path / "archive" / folder, count)
    splits = loaded(tmp_path)
    assert splits.label_names == ["circle", "square"] and tuple(splits.sizes.values()) == sizes


@pytest.mark.parametrize(
    ("folders", "message"),
    [(("train", "dev", "eval"), "two folders of validation images, dev and eval"), (("val", "test"), "no folder for training")],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, folders, message):
    for folder in folders:
        fill(tmp_path / folder)
    with pytest.raises(UserError, match=message):
        loaded(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    for folder in ("boat", "plane", "train"):
        fill(tmp_path / folder)
    assert loaded(tmp_path).label_names == ["boat", "plane", "train"]


def test_what_lies_beside_the_splits_is_left_out_and_said(tmp_path, capsys):
    for folder in ("train", "test"):
        labelled(tmp_path / folder)
    fill(tmp_path / "more", 3)
    assert sum(loaded(tmp_path).sizes.values()) == 48
    assert "3 beside test and train" in capsys.readouterr().out


@pytest.mark.parametrize("count", [60, 194, 195, 300, 640, 650])
def test_before_the_training_it_is_said_how_many_more_test_images_give_a_frechet_distance(tmp_path, capsys, count):
    """What is advised holds out as many, and no more than a third; and nothing is said where there are enough."""
    fill_grey(tmp_path, count)
    few = loaded(tmp_path)
    said = capsys.readouterr().out
    assert len(few.test) == round(0.1 * count)
    advised = re.search(r"A new run with --data.test-share ([\d.]+) has as many", said)
    assert ("Judge this run by its pictures" in said, advised is not None) == (count < 195, 195 <= count < 645)
    if advised:
        enough = loaded(tmp_path, test_share=float(advised[1]))
        assert Classifier.dimensions < len(enough.test) <= 0.35 * count and "Fréchet" not in capsys.readouterr().out
        assert sum(enough.sizes.values()) == count and enough.listing == few.listing


def test_a_share_for_the_test_is_of_whole_groups_and_does_nothing_where_there_is_a_test_split(tmp_path, capsys):
    scenes(tmp_path / "PLACES")
    splits = loaded(tmp_path / "PLACES", split_by="folder", test_share=0.4)
    assert len(splits.test) == 36 and not {*splits.test.groups} & {*splits.train.groups}
    for split in ("train", "test"):
        fill(tmp_path / "split" / split)
    capsys.readouterr()
    assert len(loaded(tmp_path / "split", test_share=0.4).test) == 12
    assert "--data.test-share does nothing" in capsys.readouterr().out


# Labels


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stray", "no labels: in no subfolder: 1 of 25 images: .*/0.png"),
        ("flat test", "no labels: in no subfolder: 12 of 36 images: .*test/0.png"),
        ("one folder in test", "no labels: .*test and .*train have no subfolder in common"),
        ("one label", "no labels: all images lie in one subfolder, circle"),
    ],
)
def test_what_costs_the_labels_is_said(tmp_path, capsys, kind, message):
    labelled(tmp_path / "train" if "test" in kind else tmp_path)
    if kind == "stray":
        fill(tmp_path, 1)
    elif kind == "one label":
        (tmp_path / "square").rename(tmp_path.parent / f"{tmp_path.name} elsewhere")
    else:
        fill(tmp_path / "test" / ("images" if "one folder" in kind else ""))
    assert loaded(tmp_path).label_names == []
    assert re.search(message, capsys.readouterr().out)


def test_a_label_that_only_held_out_images_have_is_said(tmp_path, capsys):
    """Of a label with a single image, chance decides."""
    for number in range(12):
        fill(tmp_path / f"one{number}", 1, first=number)
    fill(tmp_path / "many", 28)
    splits = loaded(tmp_path)
    trained = {splits.label_names[number] for number in splits.train.labels}
    never = [name for name in splits.label_names if name not in trained]
    assert never and f"no training image has the label {', '.join(never)}," in capsys.readouterr().out


def scenes(folder: Path, count: int = 30) -> None:
    """Three pictures of each scene, which differ in their colours alone, and by the end of their names."""
    generator = np.random.default_rng(0)
    for number in range(count):
        scene = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).resize((24, 24))
        for ending, colour in (("", "white"), ("-red", "pink"), ("-blue", "lightblue")):
            inner = folder / f"place{number}"
            inner.mkdir(parents=True, exist_ok=True)
            ImageOps.colorize(scene, "black", colour).save(inner / f"scene_{number}{ending}.png")


@pytest.mark.parametrize("by", ["folder", "name-prefix"])
def test_near_duplicates_are_told_and_kept_on_one_side(tmp_path, capsys, by):
    scenes(tmp_path / "PLACES")
    before = loaded(tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"with a near-duplicate among the training images: \d of 9, as \S*place\d", said)
    assert "--data.split-by folder, or name-prefix" in said
    splits = loaded(tmp_path, split_by=by)
    assert "near-duplicate" not in capsys.readouterr().out
    parts = [{*part.groups} for part in (splits.train, splits.validation, splits.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2]) and sum(map(len, parts)) == 30
    assert all(count % 3 == 0 for count in splits.sizes.values()) and splits.listing == before.listing


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "place{number}/{copy}.png",
            ": --data.split-by folder keeps together what belongs together. folder is no help where folders are classes: it would"
            " hold out whole classes",
        ),
        ("{number}-{copy}.png", ": --data.split-by name-prefix keeps together what belongs together"),
        ("{copy}{number}.png", ""),
    ],
)
def test_of_near_duplicates_only_a_split_that_helps_is_advised(tmp_path, capsys, name, remedy):
    generator = np.random.default_rng(0)
    for number in range(30):
        scene = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).resize((24, 24))
        for copy in ("a", "b", "c"):
            path = tmp_path / name.format(number=number, copy=copy)
            path.parent.mkdir(exist_ok=True)
            scene.save(path)
    loaded(tmp_path)
    assert f"So figures look better than they are{remedy}\n" in capsys.readouterr().out


def test_groups_by_name_are_those_of_a_folder_that_begin_alike():
    names = ["a/emoji_u1f44b.png", "a/emoji_u1f44b_1f3fb.png", "a/emoji_u1f44c.x.png", "b/emoji_u1f44b.png"]
    prefixes = ["a/emoji_u1f44b", "a/emoji_u1f44b", "a/emoji_u1f44c", "b/emoji_u1f44b"]
    assert groups_of(names, "name-prefix") == prefixes and groups_of(names, "folder") == ["a", "a", "a", "b"]


def test_images_without_structure_and_other_images_are_no_near_duplicates(tmp_path, capsys):
    fill(tmp_path / "flat", 40)
    noise = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not look_alike(noise[:50], noise[50:]) and look_alike(noise[:50], noise) == {index: index for index in range(50)}
    loaded(tmp_path / "flat")
    assert "near-duplicate" not in capsys.readouterr().out


def test_by_file_images_are_split_as_ever_and_few_groups_are_refused(tmp_path):
    images, labels = torch.arange(60).view(-1, 1, 1, 1), torch.arange(60) % 2
    for names in ([str(index) for index in range(60)], ["same"] * 60):
        kept, out = split_images(ImageSet(images, labels, groups=groups_of(names, "file")), 6)
        as_ever = split_images(ImageSet(images, labels), 6)
        assert torch.equal(kept.images, as_ever[0].images) and torch.equal(out.images, as_ever[1].images)
    labelled(tmp_path)
    with pytest.raises(UserError, match="finds only 2 groups among 24 images"):
        loaded(tmp_path, split_by="folder")


def test_three_groups_are_one_for_each_part(tmp_path):
    for name in ("circle", "square", "star"):
        fill(tmp_path / name)
    splits = loaded(tmp_path, split_by="folder")
    groups = [{*part.groups} for part in (splits.train, splits.validation, splits.test)]
    assert [*map(len, groups)] == [1, 1, 1] and set.union(*groups) == {"circle", "square", "star"}


def test_one_folder_around_the_classes_costs_no_labels(tmp_path):
    labelled(tmp_path / "archive" / "pictures")
    assert loaded(tmp_path).label_names == ["circle", "square"]


def test_hidden_and_system_folders_are_no_classes(tmp_path, capsys):
    labelled(tmp_path)
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "circle/@eaDir"):
        fill(tmp_path / name)
    (tmp_path / "circle" / "._0.png").write_bytes(b"\0\5\x16\7")
    splits = loaded(tmp_path)
    assert splits.label_names == ["circle", "square"] and sum(splits.sizes.values()) == 24
    assert f"left out of {tmp_path}: 5 hidden or system folders, 1 hidden image\n" in capsys.readouterr().out


# What is left out


def test_linked_folders_are_followed_once(tmp_path, capsys):
    labelled(tmp_path / "elsewhere")
    root = tmp_path / "images"
    fill(root / "star")
    for name in ("circle", "square"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (root / "star" / "round").symlink_to(root)
    (tmp_path / "elsewhere" / "circle" / "again").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root / "star")
    splits = loaded(root)
    assert splits.label_names == ["circle", "square", "star"] and sum(splits.sizes.values()) == 36
    assert "left out of" in (said := capsys.readouterr().out) and "3 linked folders" in said


def test_a_folder_that_two_links_lead_to_is_read_once(tmp_path, capsys):
    """Else the same image could be trained on and tested on."""
    fill(tmp_path / "elsewhere" / "circle")
    fill(tmp_path / "images" / "star")
    for name, target in (("first", "elsewhere/circle"), ("second", "elsewhere/circle"), ("third", "elsewhere")):
        (tmp_path / "images" / name).symlink_to(tmp_path / target)
    assert sum(loaded(tmp_path / "images").sizes.values()) == 24
    assert "2 linked folders" in capsys.readouterr().out


def test_a_link_to_itself_is_a_file_that_cannot_be_read(tmp_path):
    fill(tmp_path)
    for name in ("train", "loop.png"):
        (tmp_path / name).symlink_to(name)
    with pytest.raises(UserError, match="1 of 13 images .* cannot be read: .*loop.png"):
        loaded(tmp_path)
    assert sum(loaded(tmp_path, skip_unreadable=True).sizes.values()) == 12


def test_what_a_run_has_drawn_is_no_data(tmp_path, capsys):
    fill(tmp_path)
    fill(tmp_path / "checkpoints" / "one" / "compare", 3)
    (tmp_path / "checkpoints" / "one" / "stage1").mkdir()
    (tmp_path / "checkpoints" / "one" / "config.json").write_text("{}")
    write_images(tmp_path / "samples.png", torch.arange(5 * 48, dtype=torch.uint8).view(5, 3, 4, 4), scale=1)
    assert sum(loaded(tmp_path).sizes.values()) == 12
    assert f"left out of {tmp_path}: 1 run folder, 1 drawn image\n" in capsys.readouterr().out
    drawn = np.asarray(Image.open(tmp_path / "samples.png"))
    assert drawn[1, 1].tolist() == [0, 16, 32] and (drawn[0] == 128).all()


def test_endings_that_are_not_read_are_said(tmp_path, capsys):
    fill(tmp_path)
    for name in ("a.heic", "b.HEIC", "notes.txt", "LICENSE", "captions.jsonl.gz", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"something")
    assert sum(loaded(tmp_path).sizes.values()) == 12
    assert f"left out of {tmp_path}: 2 .heic, 1 unknown file, 1 .gz, 1 .txt\n" in capsys.readouterr().out


def test_images_of_other_endings_or_none_are_read(tmp_path):
    fill(tmp_path)
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    for name in ("a.jfif", "b.jpe", "d41d8cd98f00b204"):
        (tmp_path / name).write_bytes(content.getvalue())
    if features.check("avif"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.avif")
    assert sum(loaded(tmp_path).sizes.values()) == 15 + features.check("avif")


# Transparency


def transparent(kind: str, mode: str) -> bytes:
    """A black bar on a ground that is transparent, and white noise where it can be."""
    content = io.BytesIO()
    image = Image.new("RGBA", (8, 8), (255, 0, 255, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        image = image.convert("P")
        image.save(content, kind, transparency=image.getpixel((7, 7)))
    elif mode == "L":
        image = Image.new("L", (8, 8), 77)
        image.paste(0, (0, 0, 4, 8))
        image.save(content, kind, transparency=77)
    elif mode == "I;16":
        values = np.full((8, 8), 40_000, np.uint16)
        values[:, :4] = 0
        Image.fromarray(values).save(content, kind, transparency=40_000)
    else:
        image.convert(mode).save(content, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return content.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", mode) for mode in ("RGBA", "LA", "P", "L", "I;16")] + [("GIF", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")],
)
def test_a_background_shows_through_transparent_pixels(kind, mode, channels):
    content = transparent(kind, mode)
    for background, shown in (("white", 255), ("#202020", 32)):
        pixels, said = read_image(io.BytesIO(content), (channels, 8, 8), background=background)
        assert (pixels[:, :, :3] == 0).all() and (pixels[:, :, 5:] == shown).all() and said == {"transparent"}


def test_transparent_images_are_said_once(tmp_path, capsys):
    fill(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(transparent("PNG", "RGBA"))
    for in_memory in (1.0, 0.0):
        splits = loaded(tmp_path, background="black", in_memory=in_memory)
        assert sum(int((part.images[:] == 0).flatten(1).all(1).sum()) for part in (splits.train, splits.test)) == 2
    assert capsys.readouterr().out.count("--data.background shows there") == 2  # one of each loading
    assert content_of(loaded(tmp_path, in_memory=0.0).train.images) != content_of(splits.train.images)
    with pytest.raises(UserError, match="--data.background is a colour .* not 'invisible'"):
        loaded(tmp_path, background="invisible")


def test_images_of_which_more_than_half_is_cropped_are_said(tmp_path, capsys):
    for name, size in {"banner": (41, 20), "column": (20, 41), "panorama": (40, 20)}.items():
        for number in range(5):
            Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{name}{number}.png")
    loaded(tmp_path)
    said = capsys.readouterr().out
    assert "10 images are more than twice as long one way as the other; of each, only the middle square is used: " in said
    assert "panorama" not in said


def test_transparent_parts_of_a_mask_are_not_kept(tmp_path):
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 4))
    mask.save(tmp_path / "mask.png")
    assert known_pixels(str(tmp_path / "mask.png"), (3, 8, 8)).tolist() == [[True] * 8] * 4 + [[False] * 8] * 4


@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 12, 8)])
def test_a_picture_for_a_model_of_images_that_are_not_square_is_not_cut(tmp_path, shape):
    """To complete, to score, as a mask, and as the explorer has it painted over."""
    channels, height, width = shape
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    picture = Image.fromarray(pixels.squeeze())
    picture.save(path := str(tmp_path / "picture.png"))
    expected = torch.tensor(pixels).movedim(-1, 0)
    assert torch.equal(picture_to_complete(Path(path), shape), expected)
    names, images = images_at([path], shape, "white")
    assert names == [path] and torch.equal(images.images, expected[None])
    mask = Image.fromarray(np.where(np.arange(width) < 3, 255, 0)[None].repeat(height, 0).astype(np.uint8))
    mask.resize((4 * width, 4 * height), Image.Resampling.NEAREST).save(painted := str(tmp_path / "mask.png"))
    known = (torch.arange(width) < 3).expand(height, width)
    assert torch.equal(known_pixels(painted, shape), known)
    layer = Image.new("RGBA", (2 * width, 2 * height))
    layer.paste((255, 0, 0, 255), (0, 0, 6, 2 * height))
    layer.save(painted)
    run = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(background="white")))
    model = SimpleNamespace(image_shape=shape, run=run, read=lambda file: picture_to_complete(Path(file), shape))
    read, hidden = hidden_part(model, path, [painted])
    assert torch.equal(read, expected) and torch.equal(hidden, known)
    Image.new("RGBA", (width, height), (0, 0, 0, 0)).save(path)
    assert (hidden_part(model, path, [painted])[0] == 255).all(), "black was not seen"


# Values


def grey_png(values: np.ndarray, bits: int | None = None) -> io.BytesIO:
    """A PNG of 16 bits that says, where bits is given, how many of them count."""
    content, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if bits is not None:
        info.add(b"sBIT", bytes([bits]))
    Image.fromarray(values.astype(np.uint16)).save(content, "PNG", pnginfo=info)
    return content


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_in_16_are_scaled_by_what_the_file_says(bits):
    full = np.full((8, 8), 2**bits - 1)
    for values in (full, full << (16 - bits), full // 2):
        pixels, said = read_image(grey_png(values, bits), (1, 8, 8))
        assert abs(int(pixels.mean()) - (127 if values.max() < full.max() else 255)) <= 1 and not said


def test_dark_images_of_16_bits_are_said(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / "a.png").write_bytes(grey_png(np.full((8, 8), 4095)).getvalue())
    (tmp_path / "b.png").write_bytes(grey_png(np.full((8, 8), 40_000)).getvalue())
    (tmp_path / "c.png").write_bytes(grey_png(np.full((8, 8), 200)).getvalue())
    (tmp_path / "d.png").write_bytes(grey_png(np.zeros((8, 8))).getvalue())
    loaded(tmp_path)
    assert "2 images are of 16 bits and darker than a quarter; of each, values are as in the file" in capsys.readouterr().out


def swapped_profile() -> bytes:
    """sRGB whose red and green are exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return (
        profile.replace(b"rXYZ", b"????")
        .replace(b"gXYZ", b"rXYZ")
        .replace(b"????", b"gXYZ")
        .replace(b"s\0R\0G\0B", b"n\0o\0n\0e")
    )


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB")])
def test_colours_are_those_of_the_profile_in_the_file(kind, mode):
    content = io.BytesIO()
    Image.new(mode, (8, 8), "red").save(content, kind, icc_profile=swapped_profile())
    pixels, _ = read_image(content, (3, 8, 8))
    assert np.abs(pixels[:, 4, 4].astype(int) - (0, 255, 0)).max() < 8
    Image.new("L", (8, 8), 100).save(grey := io.BytesIO(), "PNG", icc_profile=swapped_profile())  # does not fit its pixels
    assert (read_image(grey, (3, 8, 8))[0] == 100).all()


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch):
    photo = Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    photo.save(content := io.BytesIO(), "JPEG", quality=95)
    fractions = []
    fit = ImageOps.fit
    monkeypatch.setattr(ImageOps, "fit", lambda image, *rest: fractions.append(image.size) or fit(image, *rest))
    pixels, _ = read_image(content, (3, 64, 64))
    assert fractions == [(200, 150)]
    exact = np.asarray(fit(photo, (64, 64), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.abs(pixels.astype(int) - exact).mean() < 2


# Shards


def png(index: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (index, 10, 20)).save(content, "PNG")
    return content.getvalue()


def tar(path: Path, files: list[tuple[str, bytes | str]]) -> str:
    """files: names, and what they hold, or the name that they are a hard link to."""
    with tarfile.open(path, "w") as written:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.LNKTYPE, content
                written.addfile(member)
            else:
                member.size = len(content)
                written.addfile(member, io.BytesIO(content))
    return str(path)


def reds(splits: Splits) -> list[int]:
    return sorted(int(red) for part in (splits.train, splits.validation, splits.test) for red in part.images[:, 0, 4, 4])


IMAGES = [(f"{i:02d}.png", png(i)) for i in range(20)]
LABELS = [(f"{i:02d}.cls", str(i % 2).encode()) for i in range(20)]
CAPTIONS = [(f"{i:02d}.txt", b"a drawing") for i in range(20)]


@pytest.mark.parametrize("kind", ["unsorted", "concatenated", "dots", "linked", "same name"])
def test_shards_of_any_order_and_names_are_read(tmp_path, capsys, kind):
    def dotted(files):
        return [(f"photo.{name}", content) for name, content in files]

    files = {
        "unsorted": IMAGES + LABELS + CAPTIONS,
        "concatenated": IMAGES[:12] + LABELS[:12] + CAPTIONS[:12],
        "dots": dotted(IMAGES + LABELS + CAPTIONS),
        "linked": IMAGES + LABELS + CAPTIONS + [("20.png", "07.png"), ("20.cls", b"1"), ("20.txt", b"a drawing")],
        "same name": [(name.replace(name[:2], "x"), c) for row in zip(IMAGES, LABELS, CAPTIONS) for name, c in row],
    }
    path = Path(tar(tmp_path / "0.tar", files[kind]))
    if kind == "concatenated":
        second = Path(tar(tmp_path / "1.tar", IMAGES[12:] + LABELS[12:] + CAPTIONS[12:]))
        path.write_bytes(path.read_bytes() + second.read_bytes())
    splits = Shards(str(path), size=8).load()
    assert reds(splits) == sorted([*range(20), *([7] if kind == "linked" else [])])
    assert splits.label_names == ["0", "1"] and splits.train.captions == ["a drawing"] * len(splits.train)
    for part in (splits.train, splits.test):
        assert (part.images[:, 0, 4, 4] % 2 == part.labels).all()
    assert ("19 samples whose name is that of another" in capsys.readouterr().out) == (kind == "same name")


def test_samples_that_lack_a_part_are_said(tmp_path, capsys):
    files = IMAGES + LABELS[1:] + CAPTIONS[2:] + [("98.cls", b"0"), ("03.mask.png", png(0)), ("99.png", "nowhere.png")]
    splits = Shards(tar(tmp_path / "0.tar", files), size=8).load()
    assert reds(splits) == [*range(20)] and splits.train.labels is None and splits.train.captions is None
    said = capsys.readouterr().out
    for line in (
        "left out of .*0.tar: 1 broken link, 1 .mask.png, 1 imageless sample",
        "no labels: no cls in 1 of 20 samples: 00",
        "no captions: neither txt nor json with one in 2 of 20 samples: 00, 01",
    ):
        assert re.search(line, said), said


# Captions


def captioned(folder: Path, texts: list[object], names: list[str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts)]
    (folder / "captions.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("text", [None, ["one", "two"], 3, "thumbs \ud83d up"])
def test_captions_that_are_no_text_are_refused_with_the_line(tmp_path, text):
    fill(tmp_path)
    captioned(tmp_path, ["a", "b", text, *"cdefghijk"], [f"{i}.png" for i in range(12)])
    with pytest.raises(UserError, match="captions.jsonl, line 3: expected"):
        loaded(tmp_path)
    files = IMAGES + [(f"{i:02d}.json", json.dumps({"caption": text if i == 3 else "a"}).encode()) for i in range(20)]
    with pytest.raises(UserError, match="the caption of the sample 03"):
        Shards(tar(tmp_path / "0.tar", files), size=8).load()


def test_captions_beside_the_splits_are_used(tmp_path):
    names = [f"{split}/{i}.png" for split in ("train", "test") for i in range(12)]
    for split in ("train", "test"):
        fill(tmp_path / split)
    captioned(tmp_path, [f"of {name}" for name in names], names)
    splits = loaded(tmp_path)
    assert sorted(splits.test.captions) == sorted(f"of test/{i}.png" for i in range(12))
    assert set(splits.train.captions) < {f"of train/{i}.png" for i in range(12)}


def test_training_begins_after_captions_are_checked(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "images")
    captioned(tmp_path / "images", [f"{'very ' * 20}red {i}" for i in range(12)], [f"{i}.png" for i in range(12)])
    monkeypatch.setattr(phases, "fit", None)  # nothing is trained
    run = Run.create(tmp_path / "run", replace(preset("folder-dalle"), data=Folder(tmp_path / "images", size=8)), "cpu")
    with pytest.raises(TypeError, match="NoneType"):
        phases.train(run)
    assert "warning: captions longer than 16 tokens" in capsys.readouterr().out and (run.folder / "tokenizer.json").is_file()


def test_captions_are_checked_before_anything_is_trained(tmp_path, capsys):
    fill(tmp_path / "images")
    data = Folder(tmp_path / "images", size=8)
    run = Run.create(tmp_path / "run", replace(preset("folder-dalle"), data=data), "cpu")
    for words in ("red", "entirely"):  # a tokenizer of captions before them is not kept
        texts = [f"{'very ' * 20}{words} {i}" for i in range(12)]
        captioned(tmp_path / "images", texts, [f"{i}.png" for i in range(12)])
        splits = load_data(run)
        write_facts(run, splits)
        check_captions(run, splits.train)
        assert words in (run.folder / "tokenizer.json").read_text()
        said = capsys.readouterr().out
        assert "warning: captions longer than 16 tokens, which are cut: 10 of 10; equal to another once cut: 9." in said


@pytest.mark.filterwarnings("error")
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (13_300, 13_300)).save(path)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(Unreadable, match="13300×13300 pixels, of at most"):
        read_image(str(path), (3, 8, 8))


@pytest.mark.parametrize("kind", ["one scan", "progressive", "several scans"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_that_is_held_whole_is_limited_by_its_full_size(monkeypatch, mode, kind):
    """Though it would be decoded at a fraction of it: of a progressive one of 13,300×13,300, decoding takes a GiB."""
    monkeypatch.setattr(decoding, "MOST_PIXELS", 5000)
    Image.new(mode, (100, 100)).save(content := io.BytesIO(), "JPEG", progressive=kind == "progressive")
    if kind == "one scan":
        assert read_image(content, (3, 8, 8))[0].shape == (3, 8, 8)
        Image.new(mode, (600, 600)).save(content := io.BytesIO(), "JPEG")  # a fraction that is too large
    elif kind == "several scans":
        head, scan, rest = content.getvalue().partition(b"\xff\xda")
        content = io.BytesIO(head + scan + rest[:2] + bytes([rest[2] + 1]) + rest[3:])  # of one colour fewer, or more
    with pytest.raises(Unreadable, match="pixels, of at most 5000"):
        read_image(content, (3, 8, 8) if kind != "one scan" else (3, 64, 64))


@pytest.mark.parametrize("kind", ["sparse", "long"])
def test_a_small_shard_that_says_much_is_refused(tmp_path, kind):
    path = tmp_path / "x.tar"
    with open(tmp_path / "0.txt", "wb") as caption:
        caption.truncate(2**31 if kind == "sparse" else 2**20 + 1)
    options = ["--sparse"] if kind == "sparse" else []
    subprocess.run(["tar", "-cf", str(path), *options, "-C", str(tmp_path), "0.txt"], check=True)
    assert path.stat().st_size < 2**21
    with pytest.raises(UserError, match="sparse file" if kind == "sparse" else "too many for a sample"):
        Shards(str(path), size=8).load()
