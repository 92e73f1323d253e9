"""Images in Parquet files, as the data sets of the Hugging Face hub have them."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.console import UserError
from pipelines.data.images import Splits
from pipelines.data.parquet import Parquet
from pipelines.runs.dataset import Facts

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(number: int) -> bytes:
    """Its number is its red; 9 by 7 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (number, 0, 255 - number)).save(buffer, format="png")
    return buffer.getvalue()


def pictures(numbers: range) -> "arrow.Array":
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    return arrow.array([{"bytes": png(number), "path": f"{number}.png"} for number in numbers], kind)


def write(path: Path, numbers: range, features: dict | None = None, **columns) -> None:
    """A row for each number, in row groups of 7."""
    table = arrow.table({"id": arrow.array(numbers), **columns})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=7)


def reds(part) -> list[int]:
    return part.images[:][:, 0, 0, 0].tolist()


def parts(splits: Splits) -> list:
    return [splits.train, splits.validation, splits.test]


@pytest.mark.parametrize("in_memory", [1, 0])
def test_files_as_the_hub_has_them(tmp_path, in_memory):
    """Splits by the names of files, labels by their names in the metadata, captions from `text`."""
    names = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    pieces = {"train-00000-of-00002": range(30), "train-00001-of-00002": range(30, 60), "test-00000-of-00001": range(60, 80)}
    for name, numbers in pieces.items():
        told = {"label": [number % 2 for number in numbers], "text": [f"number {number}" for number in numbers]}
        write(tmp_path / f"data/{name}.parquet", numbers, names, image=pictures(numbers), **told)
    splits = Parquet(root=tmp_path, size=4, in_memory=in_memory).load()
    assert splits.label_names == ["cat", "dog"] and splits.image_shape == (3, 4, 4)
    assert sorted(reds(splits.test)) == [*range(60, 80)]
    assert sorted(reds(splits.train) + reds(splits.validation)) == [*range(60)]
    for part in parts(splits):
        assert part.labels.tolist() == [red % 2 for red in reds(part)]
        assert part.captions == [f"number {red}" for red in reds(part)]
    backward = torch.arange(len(splits.train) - 1, -1, -1)
    assert torch.equal(splits.train.images[backward], splits.train.images[:].flip(0))


def test_one_file_of_plain_bytes_is_split_by_class(tmp_path):
    words = [("red", "green", "blue")[number % 3] for number in range(40)]
    write(tmp_path / "all.parquet", range(40), picture=[png(number) for number in range(40)], category=words)
    splits = Parquet(root=tmp_path / "all.parquet", size=4).load()
    assert splits.label_names == ["blue", "green", "red"] and splits.train.captions is None
    assert sorted(sum((reds(part) for part in parts(splits)), [])) == [*range(40)]
    for part in parts(splits):
        assert [splits.label_names[label] for label in part.labels] == [words[red] for red in reds(part)]


def test_labels_that_are_texts_are_their_own_names_whatever_the_metadata_say(tmp_path):
    words = [("cat", "dog")[number % 2] for number in range(40)]
    names = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    write(tmp_path / "x.parquet", range(40), names, image=pictures(range(40)), label=words)
    splits = Parquet(root=tmp_path, size=4).load()
    assert splits.label_names == ["cat", "dog"]
    assert all(part.labels.tolist() == [red % 2 for red in reds(part)] for part in parts(splits))


def test_the_same_images_are_known_wherever_they_lie_and_others_are_told(tmp_path):
    def facts(folder: str, last: int, label: int) -> Facts:
        numbers = range(20)
        images = [png(number) for number in numbers[:-1]] + [png(last)]
        write(tmp_path / folder / "x.parquet", numbers, image=images, label=[number % 2 for number in numbers[:-1]] + [label])
        return Facts.of(Parquet(root=tmp_path / folder, size=4).load())

    first, again, others, relabelled = facts("a", 19, 1), facts("b", 19, 1), facts("c", 99, 1), facts("d", 19, 0)
    assert (first.content, first.listing) == (again.content, again.listing)
    assert others.content != first.content and relabelled.listing != first.listing


def test_what_is_missing_is_said(tmp_path, capsys):
    images = [png(number) for number in range(30)]
    images[3], images[4], images[5] = None, b"", b"no picture"
    told = {"label": [None, *range(29)], "caption": [None, *("a",) * 29]}
    write(tmp_path / "x.parquet", range(30), image=images, **told)
    with pytest.raises(UserError, match="3 of 30 images .* cannot be read: x.parquet/3, x.parquet/4, x.parquet/5"):
        Parquet(root=tmp_path, size=4).load()
    splits = Parquet(root=tmp_path, size=4, skip_unreadable=True).load()
    assert sum(map(len, parts(splits))) == 27 and splits.label_names == [] and splits.train.captions is None
    said = capsys.readouterr().out
    assert "no labels: no label in 1 of 30 rows: x.parquet/0" in said and "no captions: none in 1 of 30 rows" in said


def hostile(path: Path) -> None:
    path.write_bytes(b"PAR1" + np.random.default_rng(0).bytes(500) + b"PAR1")


TWO = {"image": [b"x"] * 12, "mask": [b"x"] * 12}


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (None, {}, "holds no file .*parquet: give a Parquet file"),
        (lambda path: hostile(path / "x.parquet"), {}, "x.parquet cannot be read as a Parquet file"),
        (lambda path: write(path / "x.parquet", range(12)), {}, "has no column of images; name it with --data.image, of: id"),
        (lambda path: write(path / "x.parquet", range(12), **TWO), {}, "several columns of images: image, mask; name it"),
        (lambda path: write(path / "x.parquet", range(12), **TWO), {"image": "imgae"}, "no column 'imgae'.*did you mean 'image'"),
        (lambda path: write(path / "x.parquet", range(12), **TWO), {"image": "id"}, "'id' of .* holds no encoded images"),
        (lambda path: write(path / "x.parquet", range(12), **TWO), {"image": "mask", "label": "image"}, "so no labels"),
        (lambda path: write(path / "x.parquet", range(12), **TWO), {"image": "mask", "caption": "id"}, "so no captions"),
        (lambda path: write(path / "x.parquet", range(3), image=[b"x"] * 3), {}, "holds 3 images .*at least 10"),
        (
            lambda path: [write(path / f"{name}.parquet", range(12), image=[b"x"] * 12) for name in ("train-0", "more")],
            {},
            "named as splits, train, and more.parquet is not",
        ),
        (
            lambda path: [write(path / f"{name}.parquet", range(12), image=[b"x"] * 12) for name in ("test", "validation")],
            {},
            "named as splits, test, validation, and none as train: name those for training train-…",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, make, settings, says):
    if make is not None:
        make(tmp_path)
    with pytest.raises(UserError, match=says):
        Parquet(root=tmp_path, **settings).load()


def test_a_small_file_of_long_texts_takes_little_memory(tmp_path):
    """A text of many rows is stored once in each group of them, and held as often; one too long for a caption is refused."""
    images = [png(number) for number in range(50)]
    write(tmp_path / "x.parquet", range(50), image=images, caption=["x" * 2**20] * 50)
    splits = Parquet(root=tmp_path, size=4).load()
    assert len({id(caption) for caption in splits.train.captions}) <= 50 // 7 + 1 and len(splits.train.captions[0]) == 2**20
    write(tmp_path / "x.parquet", range(50), image=images, caption=["x" * (2**20 + 1)] * 50)
    with pytest.raises(UserError, match="'caption' of a Parquet file holds a text of more than 1048576"):
        Parquet(root=tmp_path, size=4).load()


@pytest.mark.parametrize("as_struct", [False, True])
def test_an_image_that_many_rows_share_is_held_once(tmp_path, as_struct):
    content = png(0) + bytes(2**20)  # which follows the picture, and is not read
    rows = [{"bytes": content, "path": None} if as_struct else content] * 400
    parquet.write_table(arrow.table({"image": rows}), tmp_path / "x.parquet", row_group_size=400)
    splits = Parquet(root=tmp_path, size=4, in_memory=0).load()
    files = splits.train.images.files
    assert splits.train.images[torch.arange(3)].shape == (3, 3, 4, 4)
    assert files.images(0).nbytes < 2 * len(content)


def test_a_row_group_that_unpacks_to_far_more_than_the_file_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.data.parquet.UNPACKED", 2**20)
    table = arrow.table({"image": [png(number) + bytes(2**18) for number in range(20)]})
    parquet.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match="a row group unpacks to 5 MiB from 0.0"):
        Parquet(root=tmp_path, size=4).load()


def test_a_cut_off_file_is_refused(tmp_path):
    write(tmp_path / "x.parquet", range(12), image=[png(number) for number in range(12)])
    content = (tmp_path / "x.parquet").read_bytes()
    for cut in range(0, len(content), len(content) // 12):
        (tmp_path / "x.parquet").write_bytes(content[:cut])
        with pytest.raises(UserError, match="x.parquet cannot be read"):
            Parquet(root=tmp_path, size=4).load()


def test_a_damaged_column_of_labels_is_said(tmp_path):
    write(tmp_path / "x.parquet", range(12), image=[png(number) for number in range(12)], label=["mark of a label"] * 12)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    at = content.index(b"mark of a label")
    content[at - 30 : at + 5] = bytes(35)
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match="the column 'label' of a Parquet file cannot be read"):
        Parquet(root=tmp_path, size=4).load()


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"\[parquet\]"):
        Parquet(root=tmp_path).load()
    with pytest.raises(UserError, match="--data.root PATH"):
        Parquet().load()
