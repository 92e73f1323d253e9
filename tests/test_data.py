"""Data sets: the embedded one, torchvision's, and the user's own folder."""

import io
import json
import os
import shutil
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from webdataset import TarWriter

from pipelines import files
from pipelines.console import UserError
from pipelines.data import reading, shard_index
from pipelines.data.decoding import Unreadable, changes_to_fit, read_image
from pipelines.data.folder import Folder
from pipelines.data.images import Binarized, ImageSet, Mirrored, Splits, split
from pipelines.data.layout import images_under
from pipelines.data.reading import Stored, content_of
from pipelines.data.sets import EmbeddedDigits, TorchvisionSet
from pipelines.data.shards import Shards, cache_name
from pipelines.data.tars import Member
from pipelines.runs.config import to_dict
from pipelines.runs.dataset import load_data, write_facts
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.training import checkpoints
from pipelines.training.config import FitConfig
from pipelines.training.fit import fit
from stage1_vae.autoencoder import AutoencoderConfig
from stage1_vae.networks import FullyConnected


def fill(folder: Path, count: int, size=(20, 30), mode="RGB", ending="png", value=0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new(mode, size, (value + index) if mode == "L" else (value + index, 10, 20)).save(folder / f"{index}.{ending}")


def test_the_embedded_digits_are_split_by_class_and_disjoint():
    splits = EmbeddedDigits().load()
    assert splits.image_shape == (1, 28, 28) and splits.train.images.dtype == torch.uint8
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [3800, 200, 1000]
    for part in parts:
        assert torch.bincount(part.labels).tolist() == [len(part) // 10] * 10
    rows = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert sum(map(len, rows)) == len(set().union(*rows)) > 4950  # a few images stand twice in the package
    again = EmbeddedDigits().load()
    assert torch.equal(again.train.images, splits.train.images)


def test_a_folder_of_any_sizes_with_subfolders_as_labels(tmp_path):
    fill(tmp_path / "cat", 20, (20, 30))
    fill(tmp_path / "dog" / "deep", 20, (50, 31), mode="L", ending="jpg")
    splits = Folder(tmp_path, size=16).load()
    assert splits.label_names == ["cat", "dog"]
    assert splits.image_shape == (3, 16, 16)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [34, 2, 4]
    assert torch.bincount(splits.test.labels).tolist() == [2, 2]
    assert Folder(tmp_path, size=8, channels=1).load().image_shape == (1, 8, 8)


def test_an_image_that_is_alone_in_its_class_is_trained_on_and_the_others_are_stratified(tmp_path):
    fill(tmp_path / "cat", 100)
    fill(tmp_path / "dog", 100)
    fill(tmp_path / "unicorn", 1)
    splits = Folder(tmp_path, size=8).load()
    assert torch.bincount(splits.test.labels, minlength=3).tolist() == [10, 10, 0]
    assert splits.train.labels.tolist().count(2) == 1
    assert sorted(torch.bincount(splits.validation.labels, minlength=3).tolist()) == [0, 4, 5]
    assert sum(splits.sizes.values()) == 201


def test_a_folder_with_splits(tmp_path):
    fill(tmp_path / "train" / "a", 15)
    fill(tmp_path / "train" / "b", 15)
    fill(tmp_path / "test" / "a", 12, value=100)
    splits = Folder(tmp_path, size=8).load()
    assert len(splits.test) == 12 and splits.label_names == ["a", "b"]
    assert splits.test.images[:, 0, 4, 4].min() >= 100 > splits.train.images[:, 0, 4, 4].max()


def test_a_flat_folder_has_no_labels(tmp_path):
    fill(tmp_path, 20)
    assert Folder(tmp_path, size=8).load().label_names == []
    (tmp_path / "a").mkdir()
    fill(tmp_path / "a", 3)
    assert Folder(tmp_path, size=8).load().label_names == []


def test_images_are_turned_upright_and_cropped_to_the_centre(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    for index in range(11):
        Image.fromarray(wide).save(tmp_path / f"{index}.png")
    assert Folder(tmp_path, size=10).load().train.images[0].float().mean() > 150
    rotated = Image.fromarray(np.tri(20, dtype=np.uint8) * 255)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    for index in range(11):
        rotated.save(tmp_path / f"{index}.png", exif=exif)
    image = Folder(tmp_path, size=20, channels=1).load().train.images[0, 0]
    assert image[2, 17] == 255 and image[17, 2] == 0


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1", "RGB", "P"])
def test_what_is_done_to_a_picture_to_fit_a_model_is_told(tmp_path, mode):
    for size, done in (((8, 8), []), ((4, 4), ["resized"]), ((8, 6), ["cropped", "resized"])):
        Image.new(mode, size).save(tmp_path / "a.png")
        assert changes_to_fit(tmp_path / "a.png", (3, 8, 8)) == done
        assert changes_to_fit(tmp_path / "a.png", (1, 8, 8)) == done + ["turned grey"] * (mode in ("RGB", "P"))


def test_unreadable_images_are_named_and_left_out_only_on_request(tmp_path, capsys):
    fill(tmp_path, 20)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(UserError, match="2 of 22 images.*broken.png.*--data.skip-unreadable"):
        Folder(tmp_path, size=8).load()
    splits = Folder(tmp_path, size=8, skip_unreadable=True).load()
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 20
    assert "cut.png" in capsys.readouterr().out
    for index in range(11):
        (tmp_path / f"{index}.png").write_bytes(b"")
    for skip in (False, True):
        with pytest.raises(UserError, match="13 of 22 images.* At least 10 that can are needed: mend them, or add others.$"):
            Folder(tmp_path, size=8, skip_unreadable=skip).load()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size=(24, 24), mode="RGB") -> Image.Image:
    return Image.frombytes(mode, size, np.random.default_rng(0).bytes(size[0] * size[1] * len(mode)))


FRAMES = [Image.new("P", (9, 9), 0), noise((9, 9)).convert("P")]
DEEP = Image.fromarray(np.full((5, 5), 100 * 257, np.uint16))
ORANGE = (200, 100, 50)
READABLE = [
    ("CMYK", encoded(Image.new("CMYK", (5, 5), (255, 255, 0, 0)), "JPEG"), (0, 0, 255)),
    ("grey of 16 bits", encoded(DEEP, "PNG"), (100, 100, 100)),
    ("grey of 16 bits in a TIFF", encoded(DEEP, "TIFF"), (100, 100, 100)),
    ("grey of 16 bits in a PGM", b"P5 2 2 65535 " + np.full(4, 100 * 257, ">u2").tobytes(), (100, 100, 100)),
    ("grey", encoded(Image.new("L", (5, 5), 70), "PNG"), (70, 70, 70)),
    ("one bit", encoded(Image.new("1", (5, 5), 1), "PNG"), (255, 255, 255)),
    ("palette", encoded(Image.new("RGB", (5, 5), ORANGE).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), ORANGE),
    ("transparency", encoded(Image.new("RGBA", (5, 5), (*ORANGE, 255)), "PNG"), ORANGE),
    ("one pixel", encoded(Image.new("RGB", (1, 1), ORANGE), "PNG"), ORANGE),
    ("one row", encoded(Image.new("RGB", (300, 1), ORANGE), "PNG"), ORANGE),
    ("animated", encoded(Image.new("RGB", (5, 5), ORANGE), "PNG", save_all=True, append_images=[noise((5, 5))]), ORANGE),
]


@pytest.mark.parametrize(("content", "colour"), [case[1:] for case in READABLE], ids=[case[0] for case in READABLE])
def test_images_of_any_kind_are_read(content, colour):
    pixels, said = read_image(io.BytesIO(content), (3, 4, 4))
    assert pixels.shape == (3, 4, 4) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(colour)[:, None, None]).max() <= 3
    with Image.open(io.BytesIO(content)) as image:
        cropped = max(image.size) > 2 * min(image.size)
    assert said == {name for name, so in {"animated": b"acTL" in content, "cropped": cropped}.items() if so}
    grey, _ = read_image(io.BytesIO(content), (1, 4, 4))
    assert grey.shape == (1, 4, 4) and abs(float(grey.mean()) - np.dot(colour, (0.299, 0.587, 0.114))) <= 3


KINDS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("WEBP", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_an_image_cut_off_anywhere_is_unreadable_or_whole(kind, options):
    content = encoded(noise(), kind, **options)
    whole, _ = read_image(io.BytesIO(content), (3, 24, 24))
    cuts = np.linspace(0, len(content) - 1, 60).astype(int)
    refused = 0
    for cut in cuts:
        try:
            pixels, _ = read_image(io.BytesIO(content[:cut]), (3, 24, 24))
            assert np.array_equal(pixels, whole), f"cut at byte {cut} of {len(content)}"
        except Unreadable as error:
            assert str(error)
            refused += 1
    assert refused > len(cuts) / 2


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_an_image_with_flipped_bytes_never_breaks_the_reader(kind):
    content, random = encoded(noise(), kind), np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(content)
        for position in random.integers(0, len(content), 3):
            broken[position] = random.integers(256)
        try:
            pixels, _ = read_image(io.BytesIO(bytes(broken)), (3, 8, 8))
            assert pixels.shape == (3, 8, 8)
        except Unreadable:
            pass


def hostile(folder: Path) -> int:
    """Ten images that cannot be read, among things that are no images; returns their number."""
    random = np.random.default_rng(0)
    whole, bitmap = encoded(noise((64, 64)), "JPEG"), encoded(noise(), "BMP")
    bad = {
        "random.jpg": random.bytes(1000),
        "empty.png": b"",
        "text.png": b"<html>404</html>",
        "cut.jpg": whole[: len(whole) // 2],
        "headless.jpg": whole[20:],
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "bomb.bmp": bitmap[:18] + np.full(2, 20000, "<i4").tobytes() + bitmap[26:],  # says that it is 20,000×20,000 pixels
        "float.tif": encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"),
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    with open(os.path.join(os.fsencode(folder), b"\xff.jpg"), "wb") as file:
        file.write(b"no text, no image")
    (folder / "broken-link.png").symlink_to("nowhere.png")
    (folder / "a.png").mkdir()
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    return len(bad) + 2


@pytest.mark.parametrize("in_memory", [1.0, 0.0])
def test_a_hostile_folder(tmp_path, capsys, in_memory):
    folder, report = tmp_path / "images", tmp_path / "run" / "unreadable.json"
    fill(folder, 20)
    count = hostile(folder)
    if in_memory:
        with pytest.raises(UserError, match=f"{count} of {20 + count} images.*bomb.bmp.*unreadable.json.*--data.skip-unreadable"):
            Folder(folder, size=8).load(report)
        report.unlink()
    splits = Folder(folder, size=8, skip_unreadable=True, in_memory=in_memory).load(report)
    assert f"{count} of {20 + count} images" in capsys.readouterr().out
    reasons = {Path(row["file"]).name: row["reason"] for row in json.loads(report.read_text())["unreadable"]}
    assert len(reasons) == count and all(reasons.values())
    assert "decompression bomb" in reasons["bomb.bmp"] and "No such file" in reasons["broken-link.png"]
    reds = torch.cat([part.images[:][:, 0, 4, 4] for part in (splits.train, splits.validation, splits.test)])
    assert sorted(reds.tolist()) == list(range(20))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_without_permission_is_named(tmp_path):
    fill(tmp_path, 20)
    (tmp_path / "3.png").chmod(0)
    with pytest.raises(UserError, match="1 of 20 images.*3.png"):
        Folder(tmp_path, size=8).load()


def test_what_cannot_be_read_is_found_once(tmp_path, monkeypatch, capsys):
    folder, report = tmp_path / "images", tmp_path / "unreadable.json"
    fill(folder, 20)
    (folder / "7.png").write_bytes(b"")
    config = Folder(folder, size=8, skip_unreadable=True, in_memory=0)
    first, reads = config.load(report), []
    monkeypatch.setattr(reading, "read_image", lambda *given, **named: reads.append(given) or read_image(*given, **named))
    assert torch.equal(config.load(report).train.images.rows, first.train.images.rows) and not reads
    (row,) = json.loads(report.read_text())["unreadable"]
    assert row.keys() == {"file", "reason"} and row["file"] == str(folder / "7.png")
    written = json.loads(report.read_text())
    for damaged in ("{", json.dumps({**written, "unreadable": [{**row, "file": "other.png"}]})):
        report.write_text(damaged)
        reads.clear()
        config.load(report)
        assert len(reads) == 20 and "cannot be read" in capsys.readouterr().out
    fill(folder / "more", 1)
    config.load(report)
    assert len(reads) == 41


@pytest.mark.parametrize("others", ["", "ant"])
def test_a_label_without_a_readable_image_is_left_out_as_where_its_files_are_removed(tmp_path, capsys, others):
    for name in filter(None, ("cat", "dog", others)):
        fill(tmp_path / name, 12)
    for file in (tmp_path / "cat").iterdir():
        file.write_bytes(b"no picture")
    config = Folder(tmp_path, size=8, skip_unreadable=True)
    loaded = config.load()
    said = capsys.readouterr().out
    assert f"no image with the label cat can be read; {2 if others else 0} of {3 if others else 2} labels are left" in said
    shutil.rmtree(tmp_path / "cat")
    removed = config.load()
    assert loaded.label_names == removed.label_names == (["ant", "dog"] if others else [])
    assert loaded.listing == removed.listing
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(loaded, part), getattr(removed, part)
        assert torch.equal(ours.images[:], theirs.images[:]) and (not others or torch.equal(ours.labels, theirs.labels))


def test_a_run_that_was_refused_goes_on_with_permission(tmp_path):
    folder, run = tmp_path / "images", tmp_path / "run"
    fill(folder, 20)
    (folder / "7.png").write_bytes(b"")
    config = replace(preset("folder"), data=Folder(folder, size=8))
    with pytest.raises(UserError, match="7.png"):
        load_data(Run.create(run, config, "cpu"))
    assert [path.name for path in run.iterdir()] == ["unreadable.json"]
    allowed = replace(config, data=replace(config.data, skip_unreadable=True))
    splits = load_data(Run.create(run, allowed, "cpu"))
    assert sum(map(len, parts(splits))) == 19
    files.write_json(run / "config.json", to_dict(config))
    Run.create(run, replace(allowed, data=replace(allowed.data, in_memory=0)), "cpu")  # the same images: the same run
    with pytest.raises(UserError, match="data.size: 8 in the run, 9 asked for"):
        Run.create(run, replace(allowed, data=replace(allowed.data, size=9)), "cpu")


def test_a_run_that_was_killed_while_its_config_was_written_goes_on(tmp_path):
    for name in ("config.json", "unreadable.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f".{name}.0123abcd.partial").write_text("{")
    Run.create(tmp_path / "run", preset("mnist5k"), "cpu")
    (tmp_path / "run" / "x.partial").touch()
    with pytest.raises(UserError, match="holds no run"):
        Run.create(tmp_path / "run", preset("mnist5k"), "cpu")


def test_a_trained_run_goes_on_with_the_same_images_only(tmp_path):
    folder = tmp_path / "images"
    fill(folder, 40)
    run = Run.create(tmp_path / "run", replace(preset("folder"), data=Folder(folder, size=8)), "cpu")
    write_facts(run, load_data(run))
    (folder / "7.png").unlink()
    write_facts(run, load_data(run))  # nothing is trained yet: the splits may be drawn anew
    checkpoints.save(run.folder / "stage1", checkpoints.Record(1, None), {}, {})
    assert len(load_data(run).test) == 4
    (folder / "9.png").rename(folder / "90.png")
    with pytest.raises(UserError, match=r"as many \(33 \+ 2 \+ 4\), but under other names or labels\..* --run"):
        load_data(run)
    (folder / "90.png").rename(folder / "9.png")
    (folder / "8.png").write_bytes(b"")
    run = replace(run, config=replace(run.config, data=replace(run.config.data, skip_unreadable=True)))
    with pytest.raises(UserError, match=r"33 \+ 2 \+ 4 of them .*, now there are 32 \+ 2 \+ 4\..* --run"):
        load_data(run)
    fill(folder, 45)
    with pytest.raises(UserError, match="now there are"):
        load_data(Run.open(str(run.folder), "cpu"))


def test_images_on_disk_are_named_by_their_shape_too(tmp_path):
    fill(tmp_path, 12)
    shapes = [{"size": 8}, {"size": 9}, {"size": 8, "channels": 1}]
    named = [content_of(Folder(tmp_path, in_memory=0, **shape).load().train.images) for shape in [*shapes, shapes[0]]]
    assert len(set(named[:3])) == 3 and named[3] == named[0]


def test_animated_images_are_said(tmp_path, capsys):
    fill(tmp_path, 10)
    for name in ("x.gif", "y.gif"):
        (tmp_path / name).write_bytes(encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]))
    Folder(tmp_path, size=8).load()
    assert "2 images are animated; of each, the first frame is used" in capsys.readouterr().out
    for _ in range(2):
        Folder(tmp_path, size=8, in_memory=0).load().train.images[:]
    assert capsys.readouterr().out.count("is animated: of it, and of any other such image") == 2


def test_the_order_of_a_folder_is_that_of_its_parts(tmp_path):
    for name in ("b/1.png", "a-b/1.png", "a/2.png", "a/10.png", "a.png", "a/c/1.JPG", "a/no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix in (".png", ".JPG"))
    assert images_under(tmp_path) == [str(path) for path in expected]


# Images that stay on disk


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index in range(60):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (10, 12, 3), np.uint8)).save(path)
    return folder


def parts(splits: Splits) -> list[ImageSet]:
    return [splits.train, splits.validation, splits.test]


def test_images_on_disk_are_those_in_memory(pictures):
    memory, disk = (Folder(pictures, size=8, in_memory=limit).load() for limit in (1, 0))
    for a, b in zip(parts(memory), parts(disk)):
        assert isinstance(a.images, torch.Tensor) and isinstance(b.images, Stored)
        assert a.images.shape == b.images.shape and torch.equal(a.labels, b.labels)
        for indices in (slice(None), slice(1, 3), torch.tensor([2, 0, 2]), torch.tensor([], dtype=torch.int64)):
            b.prefetch(torch.tensor([1, 0]))
            assert torch.equal(a.images[indices], b.images[indices])
            b.prefetch(indices)
            assert torch.equal(a.images[indices], b.images[indices])


def test_an_unreadable_image_on_disk_is_named_when_its_turn_comes(pictures, tmp_path):
    fill(tmp_path, 20)
    (tmp_path / "7.png").write_bytes(b"")
    splits = Folder(tmp_path, size=8, in_memory=0).load()
    with pytest.raises(UserError, match="7.png cannot be read.*--data.skip-unreadable"):
        for part in parts(splits):
            part.prefetch(slice(None))
            part[:]


class Killed(Exception):
    pass


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_training_from_disk_killed_and_resumed_equals_training_from_memory(pictures, shards, tmp_path, monkeypatch, source):
    config = FitConfig(steps=9, batch_size=16, checkpoint_steps=3, warmup_steps=1)  # several epochs, batches across their ends
    save, network = checkpoints.save, AutoencoderConfig(FullyConnected(layers=1, width=8, positions=3, features=8))
    data = Folder(pictures, size=8) if source == "folder" else Shards(shards, size=8)

    def trained(in_memory: float, folder: Path) -> dict:
        torch.manual_seed(0)
        splits = replace(data, in_memory=in_memory).load()
        model = network.build(splits.image_shape)
        return fit(Fabric(accelerator="cpu"), model, splits.train, splits.validation, config, 0, folder, "test").training()

    def killed_after_saving(*arguments):
        save(*arguments)
        raise Killed

    whole = trained(1, tmp_path / "memory")
    monkeypatch.setattr(checkpoints, "save", killed_after_saving)
    for _ in range(2):
        with pytest.raises(Killed):
            trained(0, tmp_path / "disk")
    monkeypatch.setattr(checkpoints, "save", save)
    resumed = trained(0, tmp_path / "disk")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


# Shards


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory) -> str:
    """The pictures, in their order, in four tar files."""
    folder = tmp_path_factory.mktemp("shards")
    names = images_under(pictures)
    for shard in range(4):
        with TarWriter(str(folder / f"part-{shard}.tar")) as tar:
            for index in range(15 * shard, 15 * shard + 15):
                image, label = (pictures / names[index]).read_bytes(), names[index][0]
                tar.write(
                    {"__key__": f"{index:03d}", "png": image, "cls": label, "txt": f"picture {index}", "json": {"caption": "x"}}
                )
    return str(folder / "part-{0..3}.tar")


def test_shards_are_read_as_a_folder_is(pictures, shards):
    for limit in (1, 0):
        expected, found = Folder(pictures, size=8).load(), Shards(shards, size=8, in_memory=limit).load()
        assert found.label_names == expected.label_names == ["a", "b"]
        for a, b in zip(parts(expected), parts(found)):
            assert torch.equal(a.images[:], b.images[:]) and torch.equal(a.labels, b.labels)
            assert len(set(b.captions)) == len(b) and all(caption.startswith("picture ") for caption in b.captions)


def test_the_index_of_shards_is_read_from_beside_them_until_they_change(shards, tmp_path, monkeypatch):
    for shard in range(4):
        (tmp_path / f"{shard}.tar").write_bytes(Path(shards.replace("{0..3}", str(shard))).read_bytes())
    urls, entries_of, read = str(tmp_path / "{0..3}.tar"), shard_index.entries_of, []
    monkeypatch.setattr(shard_index, "entries_of", lambda path, *rest: read.append(path) or entries_of(path, *rest))

    def loaded(kept: Path) -> Splits:
        read.clear()
        return Shards(urls, size=8, cache=kept).load()

    first = loaded(tmp_path / "cache")
    assert len(read) == 4 and not (tmp_path / "cache").exists() and len([*tmp_path.glob("*.tar.index")]) == 4
    again = loaded(tmp_path / "cache")
    assert read == []
    for a, b in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.captions == b.captions
    os.utime(tmp_path / "2.tar", (0, 0))
    (tmp_path / "1.tar.index").write_bytes(b"damaged")
    loaded(tmp_path / "cache")
    assert read == [str(tmp_path / "1.tar"), str(tmp_path / "2.tar")]
    # Where nothing can be written beside the shards, as in a folder that is read only (which root may write to).
    for path in tmp_path.glob("*.tar.index"):
        path.unlink()
        path.mkdir()
    loaded(tmp_path / "cache")
    assert len(read) == 4 and len([*(tmp_path / "cache").glob("*.index")]) == 4
    loaded(tmp_path / "cache")
    assert read == []


@pytest.mark.parametrize("says", ["much in few bytes", "that much follows"])
def test_an_index_of_someone_else_that_takes_more_memory_than_its_bytes_is_not_used(tmp_path, says):
    path, shard = tmp_path / "0.tar.index", (100, 1)
    path.write_bytes(shard_index.OfShard.of([Member("a", 512, 10, {"txt": b"a text"})], Counter()).packed(shard))
    assert shard_index.OfShard.unpacked(path, shard).keys == ["a"]
    with np.load(path) as columns:
        contents = dict(columns)
    if says == "much in few bytes":
        np.savez_compressed(file := io.BytesIO(), **contents)
        path.write_bytes(file.getvalue())
    else:
        with zipfile.ZipFile(path, "w") as parts:
            for name, column in contents.items():
                np.save(file := io.BytesIO(), column)
                claims = b"(%d,), }" % 2**50
                said = file.getvalue().replace(b"(6,), }".ljust(len(claims)), claims) if name == "txt" else file.getvalue()
                parts.writestr(f"{name}.npy", said)
    assert shard_index.OfShard.unpacked(path, shard) is None


def test_shards_from_elsewhere_are_copied_once_and_test_shards_are_the_test_split(shards, tmp_path, monkeypatch):
    first, last = (f"pipe:cat {shards.replace('{0..3}', part)}" for part in ("{0..2}", "3"))
    config = Shards(first, last, cache=tmp_path / "copies", size=8)
    splits = config.load()
    assert [len(part) for part in parts(splits)] == [43, 2, 15]
    assert sorted(splits.test.captions) == sorted(f"picture {index}" for index in range(45, 60))
    assert len(list((tmp_path / "copies").glob("*.tar"))) == 4
    monkeypatch.setattr("webdataset.cache.download", None)
    assert torch.equal(config.load().test.images[:], splits.test.images[:])
    assert cache_name("https://a/train/0.tar") != cache_name("https://a/test/0.tar")


def test_samples_without_labels_or_captions(tmp_path):
    def written(sample) -> Splits:
        with TarWriter(str(tmp_path / "x.tar")) as tar:
            for index in range(20):
                tar.write({"__key__": f"dir/{index}", "jpg": encoded(noise(), "JPEG"), **sample(index)})
        return Shards(str(tmp_path / "x.tar"), size=8).load()

    assert written(lambda index: {"json": {"caption": "c", "n": index}}).train.captions == ["c"] * 17
    for sample in (lambda index: {"json": {"n": index}}, lambda index: {"txt": "c", "cls": "1"} if index else {"json": b"["}):
        splits = written(sample)
        assert splits.train.captions is None and splits.train.labels is None and splits.label_names == []
    assert written(lambda index: {"cls": f"{index % 2}", "txt": b"\xef\xbb\xbfa caf\xc3\xa9"}).train.captions == ["a café"] * 17
    for sample in (lambda index: {"txt": b"caf\xe9"}, lambda index: {"cls": b"\xe9" if index % 2 else b"\xe8"}):
        with pytest.raises(UserError, match="a text of the sample dir/0 is not in UTF-8"):
            written(sample)
    splits = written(lambda index: {"cls": "one and the same"})
    assert splits.train.labels is None and splits.label_names == []
    splits = written(lambda index: {"cls": str(8 + index % 3), "mask.png": encoded(noise((3, 3)), "PNG")})
    assert splits.label_names == ["8", "9", "10"] and splits.train.images.shape == (17, 3, 8, 8)
    # Whatever the order of a set: every process numbers the labels alike.
    assert written(lambda index: {"cls": ("01", "1", "001")[index % 3]}).label_names == ["001", "01", "1"]


def test_an_unreadable_image_in_a_shard_is_named(shards, tmp_path):
    content = bytearray(Path(shards.replace("{0..3}", "0")).read_bytes())
    content[content.index(b"PNG") : content.index(b"PNG") + 3] = b"XXX"
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match="1 of 15 images.*0.tar: 000"):
        Shards(str(tmp_path / "0.tar"), size=8).load()
    splits = Shards(str(tmp_path / "0.tar"), size=8, skip_unreadable=True).load()
    assert sum(map(len, parts(splits))) == 14


def test_a_shard_cut_off_anywhere_is_refused(shards, tmp_path):
    content = Path(shards.replace("{0..3}", "0")).read_bytes()
    end = len(content.rstrip(b"\0"))  # what follows are empty blocks
    for cut in [0, 512, 1024, *np.linspace(1, end, 50).astype(int)]:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        with pytest.raises(UserError, match="cut.tar cannot be read as a tar file"):
            Shards(str(tmp_path / "cut.tar"), size=8).load()


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (None, "--data.urls"),
        ("nowhere-{0..3}.tar", "there is no shard nowhere-0.tar"),
        ("text.tar", "text.tar cannot be read as a tar file"),
        ("packed.tar.gz", "without compression"),
        ("empty.tar", "holds 0 images"),
        ("part-{000..", "'part-{000..' names no shards .Unbalanced braces"),
        ("${NOWHERE}/part.tar", "names no shards .*NOWHERE.*write it like 'data/train-{000..099}.tar'"),
        ("pipe:false", "the shard pipe:false cannot be copied"),
        ("gopher://x/y.tar", "the shard gopher://x/y.tar cannot be copied"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, monkeypatch, urls, message):
    monkeypatch.chdir(tmp_path)
    Path("text.tar").write_text("no tar file" * 1000)
    for name in ("empty.tar", "packed.tar.gz"):
        with TarWriter(name):
            pass
    with pytest.raises(UserError, match=message):
        Shards(urls).load()


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match=r"\[webdataset\]"):
        Shards("x.tar").load()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: Folder(None), "--data.root PATH"),
        (lambda path: Folder(path / "nowhere"), "there is no folder"),
        (lambda path: Folder(path), "holds 0 images"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path).load()


@pytest.mark.parametrize(("name", "file"), [("MNIST", "train-images-idx3-ubyte"), ("CIFAR10", "cifar-10-python.tar.gz")])
def test_no_data_and_no_network_says_which_file_to_put_where(tmp_path, monkeypatch, name, file):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=f"(?s){file}.*mnist5k"):
        TorchvisionSet(name, tmp_path).load()


def test_a_download_that_failed_is_not_tried_again_but_files_put_there_since_are_read(tmp_path, monkeypatch):
    tried = []

    def no_network(*_, **__):
        tried.append(1)
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    messages = []
    for _ in range(3):
        with pytest.raises(UserError) as raised:
            TorchvisionSet("MNIST", tmp_path).load()
        messages.append((str(raised.value), len(tried)))
    assert messages[0] == messages[1] == messages[2] and tried
    with pytest.raises(UserError):
        TorchvisionSet("MNIST", tmp_path / "elsewhere").load()
    assert len(tried) == 2 * messages[0][1]
    mnist_at(tmp_path)
    assert len(TorchvisionSet("MNIST", tmp_path).load().test) == 20


def mnist_at(root: Path) -> None:
    """A few images in torchvision's layout."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 60), ("t10k", 20)):
        images = np.arange(count * 784, dtype=np.int64).astype(np.uint8)
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())


def test_torchvisions_layout_is_read(tmp_path):
    mnist_at(tmp_path)
    splits = TorchvisionSet("MNIST", tmp_path).load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (57, 3, 20)
    assert splits.label_names[3].startswith("3")


def test_a_split_works_where_it_cannot_be_stratified():
    images = torch.zeros(12, 1, 4, 4, dtype=torch.uint8)
    for labels in (None, torch.tensor([0] * 11 + [1]), torch.arange(12)):
        kept, out = split(ImageSet(images, labels), 2)
        assert (len(kept), len(out)) == (10, 2)


def test_binarized_images_are_drawn_by_their_grey_levels():
    """Anew each time as an example; on average the grey level; one fixed draw to look at."""
    grey = torch.tensor([0, 51, 204, 255], dtype=torch.uint8).repeat_interleave(2500).reshape(4, 1, 50, 50)
    images = Binarized(ImageSet(grey, torch.arange(4)))
    torch.manual_seed(0)
    ((first,), (second,)) = images[torch.arange(4)], images[:4]
    for drawn in (first, second, images.images):
        assert drawn.dtype == torch.uint8 and drawn.unique().tolist() == [0, 255]
        assert torch.allclose(drawn.double().mean((1, 2, 3)) / 255, torch.tensor([0, 0.2, 0.8, 1.0]).double(), atol=0.04)
        assert (drawn[0] == 0).all() and (drawn[3] == 255).all()
    assert not torch.equal(first, second)
    assert torch.equal(images.images, Binarized(ImageSet(grey)).images)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_share_of_the_examples_is_mirrored(share):
    """Each left to right and nothing else, anew each time; what is looked at never is."""
    images = torch.randint(256, (1000, 3, 4, 5), dtype=torch.uint8)
    mirrored = Mirrored(ImageSet(images, torch.arange(1000), ["text"] * 1000), share)
    torch.manual_seed(0)
    ((first,), (second,)) = mirrored[torch.arange(1000)], mirrored[:1000]
    for drawn in (first, second):
        as_it_was, flipped = (drawn == images).flatten(1).all(1), (drawn == images.flip(-1)).flatten(1).all(1)
        assert (as_it_was ^ flipped).all()
        assert abs(int(flipped.sum()) - 1000 * share) <= 5 * (1000 * share * (1 - share)) ** 0.5
    assert torch.equal(first, second) == (share != 0.5)
    assert torch.equal(mirrored.images, images) and len(mirrored.labels) == len(mirrored.captions) == 1000


def test_mirrored_drawings_are_drawn_anew():
    grey = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    grey[..., :4] = 128
    (drawn,) = Mirrored(Binarized(ImageSet(grey)))[torch.arange(200)]
    left, right = (drawn[..., :4] > 0).flatten(1).any(1), (drawn[..., 4:] > 0).flatten(1).any(1)
    assert (left ^ right).all() and left.any() and right.any()


def test_own_images_are_known_by_their_names_and_labels(tmp_path):
    """Wherever the folder lies, and however much of it is kept in memory."""

    def listing(**settings) -> str:
        return Folder(folder, size=8, **settings).load().listing

    folder = tmp_path / "images"
    fill(folder / "a", 10)
    fill(folder / "b", 10)
    before = listing()
    assert listing(in_memory=0.0) == before
    folder = folder.rename(tmp_path / "moved")
    assert listing() == before
    (folder / "a").rename(folder / "c")
    assert listing() != before
    (folder / "c").rename(folder / "a")
    assert listing() == before
    (folder / "b" / "zzz.png").write_bytes(b"")
    assert listing(skip_unreadable=True) == listing(skip_unreadable=True, in_memory=0.0) == before
    (folder / "a" / "0.png").rename(folder / "a" / "10.png")
    assert listing(skip_unreadable=True) != before


def test_images_on_disk_are_known_by_the_age_of_their_files(tmp_path):
    """So that nothing made of other images of the same names is used again."""
    fill(tmp_path, 20)
    images = Folder(tmp_path, size=8, in_memory=0.0).load().train.images
    before = images.digest()
    assert images.digest() == before
    os.utime(tmp_path / "0.png", ns=(0, 1))
    assert images.digest() != before


def test_captions_of_one_part_alone_are_not_used(tmp_path, capsys):
    for part in ("train", "test"):
        fill(tmp_path / part, 12)
    lines = [json.dumps({"file_name": f"{index}.png", "text": "t"}) for index in range(12)]
    (tmp_path / "test" / "captions.jsonl").write_text("\n".join(lines))
    splits = Folder(tmp_path, size=8).load()
    assert [part.captions for part in parts(splits)] == [None, None, None]
    assert "no captions: of" in (said := capsys.readouterr().out) and "only the images for test have them" in said
