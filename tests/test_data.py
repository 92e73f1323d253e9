"""Data sets: the embedded one, torchvision's, and the user's own folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.console import UserError
from pipelines.data import Binarized, EmbeddedDigits, Folder, ImageSet, TorchvisionSet, split


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


def test_unreadable_images_are_named_and_left_out_only_on_request(tmp_path, capsys):
    fill(tmp_path, 20)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(UserError, match="2 of 22 images.*broken.png.*--data.skip-unreadable"):
        Folder(tmp_path, size=8).load()
    splits = Folder(tmp_path, size=8, skip_unreadable=True).load()
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 20
    assert "cut.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: Folder(None), "--data.root PATH"),
        (lambda path: Folder(path / "nowhere"), "there is no folder"),
        (lambda path: Folder(path), "holds 0 images"),
        (lambda path: Folder(path, size=0), "above 0"),
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


def test_torchvisions_layout_is_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        images = np.arange(count * 784, dtype=np.int64).astype(np.uint8)
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())
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
