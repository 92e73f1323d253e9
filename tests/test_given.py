"""A torch Dataset that a program gives, and any data set of torchvision by its name."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision import datasets

from pipelines import TwoStage
from pipelines.console import UserError
from pipelines.data.given import Given, TorchvisionByName, file_of, image_set
from pipelines.runs.dataset import load_data
from pipelines.runs.recipes import preset
from tests.parts import shrunk, small_splits


class Listed(Dataset):
    def __init__(self, items: list, classes: list[str] | None = None):
        self.items, self.classes = items, classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


def test_images_of_every_kind_are_the_same_images():
    images = torch.randint(0, 256, (12, 3, 5, 4), dtype=torch.uint8)
    kinds = {
        "tensors": [*images],
        "numbers from 0 to 1": [image / 255 for image in images],
        "arrays": [image.numpy() for image in images],
        "pictures": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
        "pairs": [(image, index) for index, image in enumerate(images)],
    }
    for name, items in kinds.items():
        found = image_set(Listed(items), "reading")
        assert torch.equal(found.images, images), name
        assert (found.labels is None) == (name != "pairs")
    grey = images[:, 0]
    for items in ([*grey], [Image.fromarray(image.numpy()) for image in grey], [image[None].double() / 255 for image in grey]):
        assert torch.equal(image_set(Listed(items), "reading").images, grey[:, None])
    labelled = image_set(TensorDataset(images, torch.arange(12) % 3), "reading")
    assert labelled.labels.tolist() == [0, 1, 2] * 4


def test_pictures_of_16_bits_and_transparent_ones_look_as_in_a_folder():
    """Pillow would clip 16 bits at 255, so that nearly all is white, and show what lies behind transparent pixels: black."""
    values = torch.arange(256, dtype=torch.uint8).view(16, 16)
    deep = Image.fromarray(values.numpy().astype(np.uint16) * 257)
    whole = Image.fromarray(values.numpy().astype(np.int32))
    see_through = Image.new("LA", (16, 16), (0, 0))
    colours = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    for picture in (deep, whole):
        assert torch.equal(image_set(Listed([picture] * 12), "reading").images[0], values[None])
    assert image_set(Listed([see_through] * 12), "reading").images.unique().tolist() == [255]
    found = image_set(Listed([colours] * 12), "reading").images
    assert found.shape == (12, 3, 16, 16) and found.unique().tolist() == [255]
    square = TorchvisionByName("SVHN", size=16, channels=1).square
    assert np.array_equal(square(deep), values.numpy()) and np.array(square(colours)).min() == 255


def test_arrays_that_run_backwards_are_read():
    images = [np.full((4, 4, 3), (0, 100, 200), np.uint8)[..., ::-1].transpose(2, 0, 1) for _ in range(12)]  # BGR to RGB
    assert image_set(Listed(images), "reading").images[0, :, 0, 0].tolist() == [200, 100, 0]


def test_class_numbers_of_every_kind_are_labels_and_others_are_said(capsys):
    images = [*torch.zeros(12, 1, 4, 4, dtype=torch.uint8)]
    for kind in (np.int64, np.uint8, torch.tensor, lambda number: torch.tensor([number]), lambda number: np.array([[number]])):
        found = image_set(Listed([(image, kind(index)) for index, image in enumerate(images)]), "reading")
        assert found.labels.tolist() == [*range(12)] and found.labels.dtype == torch.int64
    assert "no labels" not in capsys.readouterr().out
    for label in ("cat", 0.5, torch.zeros(2), np.float32(1), None):
        assert image_set(Listed([(image, label) for image in images]), "reading").labels is None
        assert "no labels: no class number in 12 of 12 items" in capsys.readouterr().out
    assert image_set(Listed(images), "reading").labels is None
    assert "no labels" not in capsys.readouterr().out, "there are none to miss"


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([torch.zeros(3, 4, 4)] * 11 + [torch.full((3, 4, 4), 2.0)], "item 11 .* .3, 4, 4. of torch.float32, not all from 0"),
        ([torch.zeros(3, 4, 4, dtype=torch.int64)] * 12, "no image but .3, 4, 4. of torch.int64: an image is"),
        ([torch.zeros(4, 4, 3)] * 12, "no image but .4, 4, 3. of torch.float32"),
        ([Image.new("F", (4, 4))] * 12, "item 0 .* is an image of floating-point pixels, whose range is not known: convert it"),
        ([Image.fromarray(np.full((4, 4), 256, np.int32))] * 12, "image of whole numbers above 255, whose range is not known"),
        (["a.png"] * 12, "item 0 of the Dataset holds no image but str"),
        ([torch.zeros(1, 4, 4)] * 11 + [torch.zeros(1, 4, 5)], "image 11 .* is .1, 4, 5., and the first is .1, 4, 4.: resize"),
        ([torch.zeros(1, 4, 4)] * 3, "holds 3 images; at least 10"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_said(items, says):
    with pytest.raises(UserError, match=says):
        image_set(Listed(items), "reading")


def test_what_has_no_items_by_number_is_no_dataset():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([torch.zeros(1, 4, 4)] * 12)

    for dataset, kind in ((Stream(), "Stream"), (5, "int")):
        with pytest.raises(UserError, match=f"which {kind} has not: pass a list of items"):
            image_set(dataset, "reading")


def test_a_dataset_is_trained_on_and_every_command_knows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = small_splits((1, 28, 28), 4).train.images[:60]
    dataset = Listed([(image, index % 2) for index, image in enumerate(images)], ["even", "odd"])
    config = shrunk(preset("mnist5k"))
    model = TwoStage.train(config, "mine", dataset=dataset)
    assert model.labels == ["even", "odd"] and model.sample(2, label="odd").shape == (2, 1, 28, 28)
    monkeypatch.chdir("/")
    splits = load_data(TwoStage.open(tmp_path / "checkpoints/mine", "cpu").run)
    assert splits.sizes == {"train": 51, "validation": 3, "test": 6}
    every = torch.cat([part.images for part in (splits.train, splits.validation, splits.test)])
    assert sorted(map(hash, map(bytes, every.numpy()))) == sorted(map(hash, map(bytes, images.numpy())))
    monkeypatch.chdir(tmp_path)
    again = TwoStage.train(config, "mine", dataset=dataset)
    assert torch.equal(again.sample(2), model.sample(2))
    with pytest.raises(UserError, match="is trained on other images than this Dataset's"):
        TwoStage.train(config, "mine", dataset=Listed(dataset.items[::-1]))
    unlabelled = Listed([*images])
    with pytest.raises(UserError, match="label"):
        TwoStage.train(config, "unlabelled", dataset=unlabelled)
    (tmp_path / "held-out").write_bytes(file_of(unlabelled, Listed([*images[:12]])))
    splits = Given(tmp_path / "held-out").load()
    assert torch.equal(splits.test.images, images[:12]) and splits.train.labels is None


def test_scores_are_bits_of_each_image(run):
    model = TwoStage.open(run.folder, "cpu")
    images = model.sample(3)
    scores = model.score(images)
    assert scores.bits_of_z.shape == scores.bits_of_x.shape == (3,) and scores.maps[0].shape == (3, 7, 7)
    with pytest.raises(UserError, match="images are uint8"):
        model.score(images / 255)


class Tiny(datasets.VisionDataset):
    """As torchvision's: pictures of any size with a class; a split that is not there is a ValueError."""

    PARTS = ("train", "val")

    def __init__(self, root, split="train", transform=None, download=False):
        if split not in self.PARTS:
            raise ValueError(f"Unknown value '{split}' for argument split.")
        if not download:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.numbers, self.transform, self.classes = range(40 if split == "train" else 10), transform, ["a", "b"]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int):
        pixels = np.full((9, 20, 3), index, np.uint8)
        return self.transform(Image.fromarray(pixels)), index % 2


def test_a_data_set_of_torchvision_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "Tiny", Tiny, raising=False)
    monkeypatch.setattr(datasets, "__all__", (*datasets.__all__, "Tiny"))
    splits = TorchvisionByName("Tiny", tmp_path, size=8).load()
    assert splits.sizes == {"train": 38, "validation": 2, "test": 10} and splits.image_shape == (3, 8, 8)
    assert splits.label_names == ["a", "b"] and "downloading Tiny" in capsys.readouterr().out
    assert splits.test.images[:, 0, 0, 0].tolist() == [*range(10)] and splits.test.labels.tolist() == [0, 1] * 5
    with pytest.raises(UserError, match="no data set 'SVNH'.*did you mean 'SVHN'"):
        TorchvisionByName("SVNH").load()
    with pytest.raises(UserError, match="--data.name SVHN"):
        TorchvisionByName().load()

    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "PARTS", ("letters", "digits"))
        with pytest.raises(UserError, match="Tiny has no split by the names train, trainval, training .Unknown value"):
            TorchvisionByName("Tiny", tmp_path).load()

    def no_network(self, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(Tiny, "__init__", no_network)
    with pytest.raises(UserError, match="Tiny is not in .*no route to host"):
        TorchvisionByName("Tiny", tmp_path).load()
