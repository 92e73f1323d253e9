"""A run as a folder to hand on: the same model elsewhere, refused where it is not whole, and only read."""

import dataclasses
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipelines import TwoStage, compare, generate, score, train_all
from pipelines import export as command
from pipelines.console import NotThere, UserError
from pipelines.data.sets import TorchvisionSet
from pipelines.explorer.views import Views
from pipelines.judging.comparison import read_comparison
from pipelines.judging.tradeoffs import Tradeoff, described
from pipelines.pages import exports
from pipelines.pages.exports import SAMPLES, first_samples, networks_of, rounded
from pipelines.runs import run as runs
from pipelines.runs.config import replaced
from pipelines.runs.dataset import load_data, write_facts
from pipelines.runs.exported import CARD, LIST, files_of
from pipelines.runs.parts import EARLY_PRIOR
from pipelines.runs.pictures import tiled
from pipelines.runs.recipes import preset
from pipelines.runs.run import TRAINED, Run
from pipelines.training.checkpoints import checksum, fill
from stage2_prior.conditions import ClassLabel
from stage2_prior.sampling import AS_FITTED, Sampling
from tests.parts import BOTTLENECKS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "digits"
    command.main([str(run.folder), "--out", str(folder), "--device", "cpu"])
    return folder


@pytest.fixture
def copied(exported, tmp_path, monkeypatch) -> Path:
    """At a friend's, who works elsewhere."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(exported, tmp_path / "friend" / "digits"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_the_same_model(run, copied, small_data, monkeypatch):
    before, model, other = content(copied), TwoStage.open(run.folder, "cpu"), TwoStage.open(copied, "cpu")
    for how in (
        {},
        {"label": "1", "guidance": 2.0},
        {"autoguidance": 1.0},
        {"guidance": 1.0, "autoguidance": 1.0},
        {"prior": "standard"},
        {"prior": "gaussian"},
    ):
        assert torch.equal(model.sample(4, seed=1, **how), other.sample(4, seed=1, **how))
    images = model.sample(3)
    assert torch.equal(model.log_likelihood(images, 4), other.log_likelihood(images, 4))
    assert torch.equal(model.score(images).numbers, other.score(images).numbers)
    assert {name: row.fd for name, row in other.compare().rows.items()} == {
        name: row.fd for name, row in model.compare().rows.items()
    }
    assert content(copied) == before and [path.name for path in copied.parent.iterdir()] == ["digits"]
    (work,) = Path("checkpoints/from-exports").glob("digits-*")
    assert (work / "compare/page.html").is_file() and (work / "baselines").is_dir()


def test_an_export_made_without_the_earlier_prior_still_opens_and_draws(exported, copied):
    """Those that come with the software have none where it is too large."""
    (copied / EARLY_PRIOR).unlink()
    listing = json.loads((copied / LIST).read_text())
    del listing["files"][EARLY_PRIOR]
    (copied / LIST).write_text(json.dumps(listing))
    model = TwoStage.open(copied, "cpu")
    assert torch.equal(model.sample(4), TwoStage.open(exported, "cpu").sample(4))
    with pytest.raises(UserError, match="no weaker copy of this prior"):
        model.sample(4, autoguidance=1.0)


def test_an_export_has_what_drawing_needs_and_nothing_more(run, exported):
    names = {re.sub("step-[0-9]+", "step", name) for name in files_of(exported)}
    files = ("model.safetensors", "config.json", "checksums.json")
    weights = {f"{phase}/step/{name}" for phase in ("stage1", "stage2") for name in files}
    rest = {"config.json", CARD, "samples.png", "stage1/facts.json", "stage2/early.safetensors"}
    assert weights | rest <= names <= weights | rest | {"compare/metrics.json"}
    assert not any(os.access(path, os.X_OK) for path in exported.rglob("*") if path.is_file())
    text = (exported / "config.json").read_text() + (exported / "stage1/facts.json").read_text()
    assert str(run.folder.parent) not in text
    card = (exported / CARD).read_text()
    assert card.startswith("---\npipeline_tag: unconditional-image-generation\n") and 'TwoStage.open("digits")' in card
    assert "It draws grey images of 28×28 pixels, and was trained on " in card and " images (mnist5k)." in card


@pytest.mark.parametrize("folder", sorted(TRAINED.iterdir()), ids=lambda folder: folder.name)
def test_the_cards_of_the_trained_models_are_as_export_writes_them(folder):
    run, metrics = Run.open(str(folder), "cpu"), folder / "compare/metrics.json"
    early = (folder / EARLY_PRIOR).is_file()
    written = exports.card(run, read_comparison(metrics), folder.name, True, "mit", early)
    assert early or "| learned, autoguidance" not in written
    assert (folder / CARD).read_text() == written and "library_name: two-stage-latent-prior\nlicense: mit\n" in written
    assert json.loads((folder / LIST).read_text())["files"][CARD] == checksum(folder / CARD)


def test_without_a_weaker_copy_a_card_names_the_best_way_to_draw_that_needs_none():
    run = Run.open(str(TRAINED / "mnist5k-dalle"), "cpu")
    tried = [(AS_FITTED, 5.0), (Sampling(0.9), 4.0), (Sampling(guidance=1.0), 2.5), (Sampling(autoguidance=1.0), 2.0)]
    found = read_comparison(run.folder / "compare/metrics.json")
    figures = {"kid": 0.0, "precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0, "images": 1000}
    ways = [Tradeoff(sampling=how, fd=fd, **figures) for how, fd in tried]
    row = dataclasses.replace(found.priors["learned"], fd=1.0, sampling=Sampling(autoguidance=1.0))
    comparison = dataclasses.replace(found, sampling=ways, priors=found.priors | {"tuned": row})
    whole, small = (exports.card(run, comparison, "x", True, None, weaker=known) for known in (True, False))
    assert "The comparison chose autoguidance 1." in whole and "| learned, autoguidance 1 | 1.00 |" in whole
    assert "Without autoguidance, the comparison chose guidance 1." in small and "`--tuned --caption " in small
    assert "| learned, autoguidance" not in small
    assert dataclasses.replace(comparison, sampling=ways[:1]).tuned(weaker=False) == AS_FITTED
    assert dataclasses.replace(comparison, sampling=[]).tuned(weaker=False) == AS_FITTED


@pytest.mark.parametrize("name", ["mnist5k-2d", "mnist5k-dalle"])
def test_of_a_trained_model_without_a_weaker_copy_the_explorer_begins_with_what_can_be_drawn(name):
    views = Views(TwoStage.open(name, "cpu"))
    found = read_comparison(TRAINED / name / "compare/metrics.json")
    assert found.priors["tuned"].sampling.autoguidance and not views.autoguided
    assert Sampling(**views.model.tuned) == found.tuned(weaker=False) and "autoguidance" not in views.model.tuned


def test_of_a_run_that_was_compared_the_best_settings_are_known(tmp_path, capsys):
    model = TwoStage.open("mnist5k", "cpu")
    best = described(Sampling(**model.tuned))
    assert best != "as fitted" and not torch.equal(model.sample(2, **model.tuned), model.sample(2))
    to = ["--device", "cpu", "--out", str(tmp_path / "x.npz")]
    generate.main(["mnist5k", "--count", "1", *to])
    assert f"samples are better with --tuned: {best}\n" in capsys.readouterr().out
    generate.main(["mnist5k", "--count", "1", "--temperature", "0.9", *to])
    assert "better" not in capsys.readouterr().out
    generate.main(["mnist5k", "--count", "2", "--tuned", *to])
    printed, images = capsys.readouterr().out, np.load(tmp_path / "x.npz")["arr_0"]
    assert f"drawn with {best}: " in printed and "better" not in printed
    assert torch.equal(torch.from_numpy(images), model.sample(2, **model.tuned).movedim(1, -1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--guidance", "1"], "give --tuned or settings"),
        (["--prior", "standard"], "--tuned needs the learned prior"),
        (["--complete", "digit.png"], "without tuned"),
    ],
)
def test_the_best_settings_are_for_samples_of_the_learned_prior_alone(options, reason):
    with pytest.raises(UserError, match=reason):
        generate.main(["mnist5k", "--tuned", *options])


def test_where_there_is_no_comparison_or_a_damaged_one_nothing_is_advised(tmp_path, capsys):
    run, listing = tmp_path / "run", json.loads((TRAINED / "mnist5k" / LIST).read_text())
    shutil.copytree(TRAINED / "mnist5k", run)
    metrics = run / "compare/metrics.json"
    metrics.write_text("{")
    listing["files"]["compare/metrics.json"] = checksum(metrics)
    (run / LIST).write_text(json.dumps(listing))
    generate.main([str(run), "--count", "1", "--device", "cpu", "--out", str(tmp_path / "x.png")])
    assert "better" not in capsys.readouterr().out and (tmp_path / "x.png").is_file()
    with pytest.raises(UserError, match="metrics.json cannot be read"):
        generate.main([str(run), "--tuned", "--device", "cpu"])
    metrics.unlink()
    del listing["files"]["compare/metrics.json"]
    (run / LIST).write_text(json.dumps(listing))
    assert TwoStage.open(run, "cpu").tuned == {}
    with pytest.raises(UserError, match="was not compared; first run python -m pipelines.compare"):
        generate.main([str(run), "--tuned", "--device", "cpu"])


def test_where_the_images_of_an_export_are_looked_for_is_said(monkeypatch):
    """No option of a command names another place, and it cannot be trained on to put one down."""

    def nowhere(*_, **__):
        raise NotThere("Fashion-MNIST could not be downloaded", ": name a folder with --data.root")

    monkeypatch.setattr(TorchvisionSet, "part", nowhere)
    with pytest.raises(UserError, match="^Fashion-MNIST could not be downloaded: put the images there, or make data a link"):
        load_data(Run.open(str(TRAINED / "fashion-vqvae2"), "cpu"))


def test_own_images_of_an_export_are_looked_for_beside_downloads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.open("cifar10-jpeg", "cpu")
    with pytest.raises(
        UserError, match="^there is no folder data/cifar10-jpeg: put the images there, or make data/cifar10-jpeg a link"
    ):
        load_data(run)
    for label in ("cat", "dog"):
        folder = tmp_path / "data/cifar10-jpeg/train" / label
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    with pytest.raises(UserError, match="is trained on other images: 47500"):
        load_data(run)


@pytest.mark.usefixtures("small_data")
def test_a_card_says_whether_its_figures_are_of_the_weights_before_they_were_rounded(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TwoStage.open(run.folder, "cpu").compare()
    command.main([str(run.folder), "--out", "half", "--half", "--device", "cpu"])
    before = "Measured before the weights were rounded"
    assert before in Path("half", CARD).read_text()
    compare.main(["half", "--device", "cpu"])
    command.main(["half", "--out", "again", "--device", "cpu"])
    assert before not in Path("again", CARD).read_text()
    command.main([str(run.folder), "--out", "full", "--device", "cpu"])
    command.main(["full", "--out", "rounded", "--half", "--device", "cpu"])
    assert before not in Path("full", CARD).read_text() and before in Path("rounded", CARD).read_text()


def test_half_precision_is_half_the_size_and_nearly_the_same_model(run, exported, tmp_path, monkeypatch):
    read, load = [], safetensors.torch.load_file
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "load_file", lambda path: read.append(path) or load(path))
        command.main([str(run.folder), "--out", str(tmp_path / "half"), "--half", "--device", "cpu"])
    assert {*Counter(read).values()} == {2}  # into the networks, and to be written
    command.main([str(tmp_path / "half"), "--out", str(tmp_path / "again"), "--device", "cpu"])
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.safetensors")) for folder in (tmp_path / "half", exported)]
    assert 0.35 < sizes[0] / sizes[1] < 0.55
    half, again, whole = (TwoStage.open(folder, "cpu") for folder in (tmp_path / "half", tmp_path / "again", exported))
    images = whole.sample(4)
    assert (tmp_path / "half" / SAMPLES).read_bytes() == (tmp_path / "again" / SAMPLES).read_bytes()
    assert torch.equal(half.sample(4), again.sample(4)) and "in half precision" in (tmp_path / "again" / CARD).read_text()
    assert 0 < (half.sample(4).int() - images.int()).abs().max() <= 8
    (codes,), (others,) = half.encode(images), whole.encode(images)
    assert codes.dtype == torch.float32 and not torch.equal(codes, others) and torch.allclose(codes, others, atol=0.02)
    for buffer, other in zip(half.prior().buffers(), whole.prior().buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_in_half_precision_the_weaker_copy_is_in_eight_bits_and_is_drawn_with(run, exported, tmp_path):
    for source, name in ((run.folder, "half"), (tmp_path / "half", "again")):
        command.main([str(source), "--out", str(tmp_path / name), "--half", "--device", "cpu"])
    assert (tmp_path / "half" / EARLY_PRIOR).read_bytes() == (tmp_path / "again" / EARLY_PRIOR).read_bytes()
    sizes = [(folder / EARLY_PRIOR).stat().st_size for folder in (tmp_path / "half", exported)]
    assert sizes[0] / sizes[1] < 0.4
    small, whole = (safetensors.torch.load_file(folder / EARLY_PRIOR) for folder in (tmp_path / "half", exported))
    trained = dict(networks_of(run)[1].named_parameters())
    for tensor_name, tensor in small.items():
        before, matrix = whole[tensor_name], whole[tensor_name].ndim > 1
        if tensor_name not in trained:
            assert torch.equal(tensor, before)
            continue
        assert (tensor.dtype == torch.float8_e4m3fn) == matrix
        assert (tensor.float() - before).norm() <= (0.07 if matrix else 0.001) * before.norm()
    (others,) = (tmp_path / "half/stage2").glob("step-*/model.safetensors")
    assert torch.float8_e4m3fn not in {tensor.dtype for tensor in safetensors.torch.load_file(others).values()}
    half = TwoStage.open(tmp_path / "half", "cpu")
    (weaker,) = (level.weaker for level in half.prior().levels)
    for tensor_name, tensor in weaker.state_dict().items():
        assert tensor.dtype == whole[tensor_name].dtype and torch.equal(tensor, small[tensor_name].to(tensor.dtype))
    assert not torch.equal(half.sample(4, label="1", autoguidance=20.0), half.sample(4, label="1"))


def test_a_damaged_weaker_copy_in_eight_bits_is_refused(run, tmp_path, capsys):
    command.main([str(run.folder), "--out", str(tmp_path / "half"), "--half", "--device", "cpu"])
    early, other = tmp_path / "half" / EARLY_PRIOR, shutil.copytree(run.folder, tmp_path / "other") / EARLY_PRIOR
    content = early.read_bytes()
    early.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="early.safetensors is truncated or altered"):
        TwoStage.open(tmp_path / "half", "cpu")
    tensors = safetensors.torch.load(content)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn)
    for wrong in (content[:-100], safetensors.torch.save(tensors | {name: tensors[name][:-1].clone()})):
        other.write_bytes(wrong)
        with pytest.raises(UserError, match="no weaker copy of this prior"):
            TwoStage.open(tmp_path / "other", "cpu").sample(1, label="1", autoguidance=1.0)
        assert "early.safetensors is damaged, so there is no autoguidance" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_weights_are_read_in_float32_wherever_types_of_fewer_bits_stand(dtype):
    layer, path = torch.nn.Linear(3, 2), Path("model.safetensors")
    small = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}
    fill(layer, small, path)
    assert all(tensor.dtype == torch.float32 for tensor in layer.state_dict().values())
    assert all(torch.equal(tensor, small[name].float()) for name, tensor in layer.state_dict().items())
    with pytest.raises(UserError, match="num_batches_tracked is .* torch.float32, not .* torch.int64"):
        counting = torch.nn.BatchNorm1d(2)
        fill(counting, {name: tensor.to(dtype) for name, tensor in counting.state_dict().items()}, path)


@pytest.mark.parametrize(("dtype", "unsafe"), [(torch.float16, (70_000.0, 1e-6)), (torch.float8_e4m3fn, (500.0, 1e-3))])
def test_a_tensor_with_numbers_out_of_the_range_of_a_smaller_type_stays_as_it_is(dtype, unsafe):
    for number in unsafe:
        tensor = torch.tensor([1e-9, number])
        assert rounded(tensor, dtype) is tensor
    small = rounded(torch.tensor([1e-9, 1.0]), dtype)
    assert small.dtype == dtype and rounded(small, torch.float16) is small


@pytest.mark.parametrize(
    ("name", "written", "says"),
    [
        ("stage2/step-*/model.safetensors", "", "model.safetensors is truncated or altered"),
        ("config.json", "{}", "config.json is truncated or altered"),
        ("stage1/step-*/model.safetensors", None, "model.safetensors is missing"),
        ("stage2/more.json", "{}", "stage2/more.json was added"),
        (LIST, None, "is a part of an export: it has no export.json"),
        (LIST, "{}", "export.json cannot be read"),
        (LIST, json.dumps({"format": 2, "files": {}}), "by a later version.*: update it"),
    ],
)
def test_what_is_not_as_it_was_exported_is_refused(copied, name, written, says):
    TwoStage.open(copied, "cpu")
    (path,) = copied.glob(name) if "*" in name else [copied / name]
    path.unlink() if written is None else path.write_text(written)
    with pytest.raises(UserError, match=says):
        TwoStage.open(copied, "cpu")


def test_an_export_is_never_trained_on_nor_written_over(run, copied, small_data):
    before = content(copied)
    with pytest.raises(UserError, match="is an export, which is not trained on"):
        TwoStage.train(run.config, str(copied))
    with pytest.raises(UserError, match="is an export, which is not trained on"):
        train_all.main(["--run", str(copied)])
    with pytest.raises(UserError, match="is there already"):
        command.main([str(run.folder), "--out", str(copied), "--device", "cpu"])
    assert content(copied) == before


def test_a_run_with_notes_of_the_user_is_no_export(run, copied):
    """Only a card, which names this software in its metadata, tells that a folder is part of an export."""
    own = Path(shutil.copytree(run.folder, "own"))
    for notes in ("# My digits\n", "---\nlicense: mit\n---\n\nlibrary_name: two-stage-latent-prior\n"):
        (own / CARD).write_text(notes)
        assert not Run.open(str(own), "cpu").exported
    (copied / LIST).unlink()
    with pytest.raises(UserError, match="is a part of an export"):
        Run.open(str(copied), "cpu")


def test_the_own_images_of_a_model_on_the_hub_are_looked_for_under_its_name(monkeypatch):
    """Its folder is named by the commit."""
    run = dataclasses.replace(Run.open("cifar10-jpeg", "cpu"), on_hub="hub:owner/pictures@main")
    with pytest.raises(UserError, match="^there is no folder data/pictures: put the images there"):
        load_data(run)


def test_a_run_of_ones_own_comes_before_one_that_comes_with_the_software(run, copied, monkeypatch):
    monkeypatch.setattr(runs, "TRAINED", copied.parent)
    local = dataclasses.replace(run, folder=runs.CHECKPOINTS / "digits")
    assert local.known_as == "checkpoints/digits" and dataclasses.replace(local, folder=runs.CHECKPOINTS / "x").known_as == "x"
    assert Run.open("digits", "cpu").folder == copied and Run.open("digits", "cpu").name == "digits"
    with pytest.raises(UserError, match="There are: digits"):
        Run.open("shoes", "cpu")
    shutil.copytree(run.folder, "checkpoints/digits")
    assert not Run.open("digits", "cpu").exported
    shutil.rmtree("checkpoints/digits/stage2")  # as while it is trained
    with pytest.raises(
        UserError, match="digits is unfinished: stage 2 has not .* with the software, name it by its path: "
    ) as raised:
        score.main(["digits", "--device", "cpu"])
    path = str(raised.value).rpartition(": ")[2]
    assert Path(path) == copied and Run.open(path, "cpu").exported


@pytest.mark.parametrize("name", sorted(path.parent.name for path in TRAINED.glob("*/config.json")))
def test_a_run_that_comes_with_the_software_draws_its_first_samples(name):
    """As on the picture that it was exported with, up to the rounding of another processor."""
    run = Run.open(name, "cpu")
    with (
        Image.open(run.folder / SAMPLES) as kept,
        Image.open(io.BytesIO(tiled(first_samples(run, *networks_of(run)), 4))) as made,
    ):
        difference = np.abs(np.asarray(kept).astype(int) - np.asarray(made)).max(-1)
    assert np.mean(difference > 8) < 0.05


def test_runs_that_come_with_the_software_are_small():
    assert sum(path.stat().st_size for path in TRAINED.rglob("*") if path.is_file()) <= 30e6


def test_without_a_second_stage_nothing_says_that_a_prior_takes_labels(tmp_path, monkeypatch):
    """The recipe `plain` keeps the condition of the prior that it does not train."""
    monkeypatch.chdir(tmp_path)
    run = Run.create(tmp_path / "plain", preset("mnist5k-plain"), "cpu")
    assert isinstance(run.condition, ClassLabel) and run.conditioned_on is None
    write_facts(run, load_data(run))
    assert "is conditioned on" not in exports.card(run, None, "plain", False, None)


@pytest.mark.parametrize(
    ("bottleneck", "tag"),
    [
        ("gaussian", "vae"),
        ("deterministic", "autoencoder"),
        ("finite-scalar", "discrete-latents"),
        ("vector-quantized", "discrete-latents"),
    ],
)
def test_the_card_names_the_kind_of_latents(bottleneck, tag, small_data, tmp_path):
    config = replaced(preset("mnist5k"), "autoencoder.bottleneck", BOTTLENECKS[bottleneck])
    run = Run.create(tmp_path / "run", config, "cpu")
    write_facts(run, load_data(run))
    tags = exports.card(run, None, "x", False, None).partition("tags:\n")[2].partition("---")[0].split("\n")
    assert tags == ["- two-stage-latent-prior", f"- {tag}", ""]
