"""Folders and shards as people have them: what is read, what is left out, and what is said of it."""

import re
from pathlib import Path

import pytest
from PIL import Image

from pipelines.console import UserError
from pipelines.data.folder import Folder
from pipelines.data.images import Splits


def fill(folder: Path, count: int = 12, first: int = 0, ending: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        Image.new("RGB", (8, 8), (index, 10, 20)).save(folder / f"{index}.{ending}")


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


# Labels


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stray", "no labels: 1 of 25 images lie in no subfolder: .*/0.png"),
        ("flat test", "no labels: 12 of 36 images lie in no subfolder: .*test/0.png"),
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
