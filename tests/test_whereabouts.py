"""A run that comes from someone else: its config names no places that are believed, its files may hold anything, its links lead
nowhere."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelines import compare, generate, likelihood, study, train_all
from pipelines.console import UserError
from pipelines.data.folder import Folder
from pipelines.data.shards import Shards
from pipelines.pages import report
from pipelines.runs import whereabouts
from pipelines.runs.dataset import load_data
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.two_stage import TwoStage

HOSTILE = {
    "program": {"kind": "Shards", "urls": "pipe:touch executed; cat x.tar"},
    "test-program": {"kind": "Shards", "urls": "x.tar", "test_urls": "pipe:touch executed"},
    "cache": {"kind": "Shards", "urls": "file:x.tar", "cache": "executed"},
    "elsewhere": {"kind": "Folder", "root": "/"},
    "download": {"kind": "TorchvisionSet", "name": "MNIST", "root": "executed"},
}
COMMANDS = {
    "compare": lambda run: compare.main([run, "--device", "cpu"]),
    "likelihood": lambda run: likelihood.main([run, "--device", "cpu"]),
    "study": lambda run: study.main(["mean-or-sample", "--run", run, "--device", "cpu"]),
    "generate": lambda run: generate.main([run, "--keep-best", "0.5", "--count", "4", "--device", "cpu"]),
    "train_all": lambda run: train_all.main(["--run", run, "--device", "cpu"]),
    "config": lambda run: train_all.main(["--config", f"{run}/config.json", "--run", "another", "--device", "cpu"]),
    "stage1-from": lambda run: train_all.main(["--stage1-from", run, "--run", "another", "--device", "cpu"]),
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [(command, kind) for command in COMMANDS for kind in HOSTILE if command == "compare" or kind == "program"],
)
def test_an_imported_config_runs_nothing_and_writes_and_reads_nowhere(run, tmp_path, monkeypatch, command, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.folder, "friend")
    config = json.loads(Path("friend/config.json").read_text())
    Path("friend/config.json").write_text(json.dumps(config | {"data": HOSTILE[kind]}))
    with pytest.raises(UserError, match="a place that you have not confirmed on this machine"):
        COMMANDS[command]("./friend")
    assert not Path("executed").exists() and not Path("another").exists()


def test_what_a_command_has_named_is_believed_from_then_on(tmp_path, monkeypatch):
    """Also of a run that was moved, and by a path relative to another folder; of other places nothing is."""
    config = replace(preset("folder"), data=Folder(tmp_path / "images"))
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=f"--run run --data.root {tmp_path}/images"):
        whereabouts.check(config, Path("run"))
    whereabouts.check(config, Path("run"), given={"--data.root"})
    whereabouts.remember(config)
    whereabouts.check(config, Path("moved"))
    monkeypatch.chdir(tmp_path)
    whereabouts.check(replace(config, data=Folder(Path("images"))), Path("run"))
    for data in (Folder(tmp_path), Shards(str(tmp_path / "images"))):
        with pytest.raises(UserError, match="you have not confirmed on this machine"):
            whereabouts.check(replace(config, data=data), Path("run"))


def test_a_run_that_is_opened_is_not_believed_and_one_that_is_made_is(run, monkeypatch):
    assert run.trusted and not Run.open(str(run.folder), "cpu").trusted
    monkeypatch.setattr(whereabouts, "places", lambda config: {"--data.root": Path("/")})
    with pytest.raises(UserError, match="you have not confirmed on this machine"):
        load_data(Run.open(str(run.folder), "cpu"))


def with_values(**changes):
    """A file of JSON in which some entries are others."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def with_tensors(change):
    """A file of tensors in which they are others, under the same key."""

    def changed(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        return safetensors.torch.save(change(safetensors.torch.load(content)), metadata)

    return changed


def folder_at(place: str) -> dict:
    return {"kind": "Folder", "root": place}


def moment(**changes) -> dict:
    return {"step": 1, "train": {"loss": 1.0}, "held_out": {"loss": 1.0}} | changes


ANY_JSON = (
    "stage1/facts.json",
    "config.json",
    "stage1/step-*/config.json",
    "stage2/step-*/checksums.json",
    "compare/metrics.json",
)
DAMAGED = [
    *((name, lambda _, content=content: content) for name in ANY_JSON for content in (b"\xff{}", b"[" * 200_000, b"3")),
    *(("config.json", with_values(**{name: value})) for name in ("seed", "stage1") for value in (math.nan, 10**30, None)),
    *(("config.json", with_values(data=folder_at(place))) for place in ("a\0b", "\ud800")),
    *(
        ("stage1/facts.json", with_values(image_shape=shape))
        for shape in ([28, 28], [1, -1, 28], [1, 10**18, 28], [math.nan] * 3)
    ),
    *(("stage1/facts.json", with_values(**{name: 3})) for name in ("label_names", "images")),
    *(
        ("stage1/step-*/config.json", with_values(history=[entry]))
        for entry in (3, {"step": 1}, moment(train={}), moment(step=99))
    ),
    *(("stage2/step-*/config.json", with_values(held_out={"loss": loss})) for loss in (math.nan, "x", None)),
    *(("stage2/step-*/config.json", with_values(**{name: "x"})) for name in ("seconds", "rewinds", "step")),
    ("stage2/step-*/config.json", with_values(step=10**30)),
    *(
        (name, with_tensors(change))
        for name in ("latents/stage1-train.safetensors", "baselines/gaussian.safetensors")
        for change in (
            lambda tensors: tensors | {"x": torch.zeros(1)},
            lambda tensors: dict(list(tensors.items())[1:]),
            lambda tensors: {name: torch.zeros(()) for name in tensors},
            lambda tensors: {name: tensor.flatten() for name, tensor in tensors.items()},
            lambda tensors: {name: tensor[:0] for name, tensor in tensors.items()},
            lambda tensors: {name: tensor / 0 for name, tensor in tensors.items()},
        )
    ),
    ("compare/metrics.json", lambda _: b'{"priors": {"x": {}}, "real": {}}'),
]


@pytest.fixture(scope="module")
def whole(run) -> Path:
    """The folder of a run with a fitted baseline."""
    TwoStage(run).prior("gaussian")
    return run.folder


@pytest.mark.parametrize(("name", "damage"), DAMAGED, ids=[f"{number}-{name}" for number, (name, _) in enumerate(DAMAGED)])
@pytest.mark.usefixtures("small_data")
def test_a_file_that_holds_anything_is_refused_in_a_sentence_that_names_it(whole, tmp_path, monkeypatch, name, damage):
    friend = shutil.copytree(whole, tmp_path / "friend")
    for path in [*friend.glob(name)] or [friend / name]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage(path.read_bytes() if path.exists() else b""))
        sums = path.with_name("checksums.json")
        if sums.exists() and path != sums:  # a stranger's checksums fit
            sums.write_bytes(with_values(**{path.name: checksum_of(path)})(sums.read_bytes()))
    monkeypatch.setattr(report, "write_report", None)
    with pytest.raises(UserError, match=f"friend/{name.partition('/')[0]}"):
        opened = Run.open(str(friend), "cpu")
        model = TwoStage(opened)
        for prior in ("learned", "gaussian", "posterior"):
            model.sample(1, prior=prior)
        whereabouts.check(opened.config, friend)
        train_all.train_all(Run.create(friend, opened.config, "cpu"))


def checksum_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_link_that_leads_out_of_a_run_is_refused_and_others_are_followed(run, tmp_path):
    friend, link, elsewhere = shutil.copytree(run.folder, tmp_path / "friend"), tmp_path / "link", tmp_path / "elsewhere"
    link.symlink_to(friend)
    (friend / "stage2" / "latest").symlink_to("step-0000004")
    os.link(friend / "config.json", tmp_path / "config.json")
    Run.create(link, Run.open(str(link), "cpu").config, "cpu")
    for folder, name in ((friend, "compare"), (friend, "latents/more"), (link, "likelihood"), (link, "stage1/facts.json")):
        (friend / name).unlink(missing_ok=True)
        (friend / name).symlink_to(elsewhere)
        with pytest.raises(UserError, match=f"{folder / name} is a link to {elsewhere}, outside of the run"):
            Run.open(str(folder), "cpu")
        with pytest.raises(UserError, match="outside of the run"):
            Run.create(folder, run.config, "cpu")
        (friend / name).unlink()
