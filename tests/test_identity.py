"""Images and captions that change in place are other data; the same ones elsewhere, or written anew, are not."""

import dataclasses
import io
import json
import os
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.console import UserError
from pipelines.data import identity
from pipelines.data.folder import Folder
from pipelines.data.images import Splits
from pipelines.data.sets import TorchvisionSet
from pipelines.data.shards import Shards
from pipelines.runs import latents as latents_module
from pipelines.runs.dataset import FACTS, load_data, read_facts, write_facts
from pipelines.runs.latents import encode
from pipelines.runs.parts import load_autoencoder
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.train_all import parse
from stage2_prior.conditions import Caption
from tests.parts import small_splits

COUNT = 24


def pixels(invert: bool) -> list[bytes]:
    """Bitmaps, whose size does not tell what they show."""
    drawn, made = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8), []
    for image in 255 - drawn if invert else drawn:
        Image.fromarray(image).save(buffer := io.BytesIO(), format="bmp")
        made.append(buffer.getvalue())
    return made


def write(root, kind: str, invert: bool = False, captions: str = "a picture") -> None:
    root.mkdir(exist_ok=True)
    if kind == "shards":
        with tarfile.open(root / "x.tar", "w") as tar:
            for number, content in enumerate(pixels(invert)):
                for ending, part in (("bmp", content), ("txt", f"{captions} {number}".encode())):
                    member = tarfile.TarInfo(f"{number:03}.{ending}")
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
        return
    for number, content in enumerate(pixels(invert)):
        (root / f"{number:03}.bmp").write_bytes(content)
    lines = [json.dumps({"file_name": f"{number:03}.bmp", "text": f"{captions} {number}"}) for number in range(COUNT)]
    (root / "captions.jsonl").write_text("\n".join(lines))


def begun(tmp_path, kind: str, root, in_memory: float = 1.0, told: bool = False) -> Run:
    """A run whose stage 1 has begun, on these data."""
    if kind == "shards":
        pytest.importorskip("webdataset")
        data = Shards(size=8, in_memory=in_memory, urls=str(root / "x.tar"))
    else:
        data = Folder(root, size=8, in_memory=in_memory)
    config = dataclasses.replace(preset("folder"), data=data)
    if told:
        config = dataclasses.replace(config, prior=dataclasses.replace(config.prior, condition=Caption()))
    run = Run.create(tmp_path / "run", config, "cpu")
    if not (run.folder / FACTS).is_file():
        write_facts(run, load_data(run))
        (run.folder / "stage1" / "step-0000001").mkdir()
    return run


def later(root) -> None:
    """Every file as written at another time."""
    for path in root.iterdir():
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("in_memory", [1.0, 0.0])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_images_that_change_under_the_same_names_are_other_images(tmp_path, kind, in_memory, monkeypatch):
    root, place = tmp_path / "data", tmp_path / "elsewhere"
    write(root, kind)
    run = begun(tmp_path, kind, root, in_memory)
    with monkeypatch.context() as patch:  # nothing is read that was not written since
        patch.setattr(identity, "read", None)
        load_data(run)
    shutil.copytree(root, place)
    later(place)
    assert identity.stamp(load_data(begun(tmp_path, kind, place, in_memory)).used) != read_facts(run).stamp
    write(root, kind, invert=True)
    later(root)
    with pytest.raises(UserError, match="trained on other images: as many .*what is in them has changed.*another --run"):
        load_data(run)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_captions_that_change_are_other_captions_for_a_prior_that_is_told_them(tmp_path, kind):
    root = tmp_path / "data"
    write(root, kind)
    told = begun(tmp_path / "told", kind, root, told=True)
    untold = begun(tmp_path / "untold", kind, root)
    write(root, kind, captions="an etching")
    assert isinstance(load_data(untold), Splits)
    with pytest.raises(UserError, match="other captions of these images"):
        load_data(told)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_of_data_that_were_moved_the_command_is_named_that_finds_them(tmp_path, kind):
    """Whatever command looks for them: not all take the place as an option."""
    place = tmp_path / "else where"
    (tmp_path / "a run").mkdir()
    write(tmp_path / "data", kind)
    run = begun(tmp_path / "a run", kind, tmp_path / "data")
    (tmp_path / "data").rename(place)
    with pytest.raises(UserError, match="there is no .*data.*Say where they lie now: python -m pipelines.train_all") as told:
        load_data(Run.open(str(run.folder), "cpu"))
    command = str(told.value).partition("train_all ")[2].replace("PATTERN", f"'{place}/x.tar'").replace("PATH", f"'{place}'")
    name, config, _ = parse(shlex.split(command))
    write_facts(again := Run.create(Path(name), config, "cpu"), load_data(again))
    assert len(load_data(Run.open(str(run.folder), "cpu")).train) > 0


def test_of_many_files_some_are_read_and_the_size_of_all(tmp_path, monkeypatch):
    write(tmp_path / "data", "folder")
    used = Folder(tmp_path / "data", size=8).load().used
    read, taken = identity.read, []
    monkeypatch.setattr(identity, "read", lambda files, row: taken.append(row) or read(files, row))
    monkeypatch.setattr(identity, "READ_BYTES", sum(map(len, pixels(False))) // 3)
    first = identity.content_of_files(used)
    assert taken == [*range(0, COUNT, 3)]
    with open(tmp_path / "data" / "001.bmp", "ab") as file:
        file.write(b"x")
    assert identity.content_of_files(used) != first


@pytest.mark.parametrize("binarize", [False, True])
def test_a_set_in_memory_that_changes_is_another(tmp_path, monkeypatch, binarize):
    splits = small_splits((1, 28, 28), 4)

    def load(self, report=None):
        return splits.binarized() if self.binarize else splits

    monkeypatch.setattr(TorchvisionSet, "load", load)
    config = dataclasses.replace(preset("mnist"), data=TorchvisionSet("MNIST", binarize=binarize))
    run = Run.create(tmp_path / "run", config, "cpu")
    write_facts(run, load_data(run))
    (run.folder / "stage1" / "step-0000001").mkdir()
    load_data(run)
    splits.test.images[3] = 255 - splits.test.images[3]
    with pytest.raises(UserError, match="what is in them has changed"):
        load_data(run)


@pytest.mark.usefixtures("small_data")
def test_latents_are_those_of_these_images(run, tmp_path, monkeypatch):
    copy = dataclasses.replace(run, folder=shutil.copytree(run.folder, tmp_path / "run"))
    autoencoder, images, encoded, made = load_autoencoder(copy), load_data(copy).test, latents_module.encoded, []
    monkeypatch.setattr(latents_module, "encoded", lambda *rest: made.append(rest) or encoded(*rest))
    encode(copy, autoencoder, images, "test")
    encode(copy, autoencoder, images, "test")
    assert len(made) == 1
    facts = vars(read_facts(copy)) | {"content": "another"}
    (copy.folder / FACTS).write_text(json.dumps(facts))
    assert torch.equal(
        encode(copy, autoencoder, images, "test").posteriors(slice(3))[0]["mean"].isfinite().all(), torch.tensor(True)
    )
    assert len(made) == 2
