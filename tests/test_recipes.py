"""Recipes on data sets: the names of presets, what they mean, and that every combination is built or refused in a sentence."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from pipelines.console import UserError
from pipelines.runs.config import RunConfig, from_dict, read_config, replaced, to_dict, with_settings
from pipelines.runs.kinds import choose_kinds, kinds_of, name_of, name_of_prior
from pipelines.runs.names import DATA, PRIORS, RECIPES, preset_name
from pipelines.runs.options import Options
from pipelines.runs.phases import train
from pipelines.runs.priors import open_prior
from pipelines.runs.recipes import DATA_SETS, MADE_BY, TUNED, parts_of, preset
from pipelines.runs.run import Run
from pipelines.train_all import main, parse, short_help
from stage2_prior.autoregressive import AutoregressiveConfig, CascadeConfig
from stage2_prior.baselines import CODE_BASELINES, CONTINUOUS_BASELINES
from stage2_prior.conditions import ClassLabel, Cluster, Unconditional
from stage2_prior.flow import FlowConfig
from stage2_prior.latents import LatentSpec
from stage2_prior.second_vae import SecondVaeConfig
from stage2_prior.vamp import VampConfig
from tests.parts import BACKBONES, HEADS, LEARNED, shrunk, small_splits

NAMED = json.loads((Path(__file__).parent / "presets.json").read_text())
"""The names of presets from before there were recipes, and the kinds of parts that each means."""
SHAPES = dict.fromkeys(DATA, (3, 64, 64)) | dict.fromkeys(("mnist5k", "mnist", "fashion-mnist"), (1, 28, 28))
SHAPES["cifar10"] = (3, 32, 32)
ALL = [preset_name(data, recipe) for data in DATA for recipe in RECIPES]
SENSELESS = ["cifar10-binary", "folder-binary", "webdataset-binary", "parquet-binary", "torchvision-binary"]


@pytest.mark.parametrize("name", NAMED)
def test_every_name_keeps_its_meaning(name):
    config = to_dict(preset(name))
    parts, top = config["autoencoder"], config["prior"].get("top", config["prior"])
    assert NAMED[name] == {
        "data": " ".join([config["data"]["kind"], *([config["data"]["name"]] if "name" in config["data"] else [])]),
        **{part: parts[part]["kind"] for part in ("network", "bottleneck", "likelihood")},
        "prior": config["prior"]["kind"],
        "head": top["head"]["kind"],
        "refined": config["refine"] is not None,
        "second stage": config["stage2"]["steps"] > 0,
    }


@pytest.mark.parametrize("name", [name for name in ALL if name not in SENSELESS])
def test_every_recipe_is_built_on_every_data_set(name):
    """And both stages take a step."""
    config = shrunk(preset(name))
    splits = small_splits(SHAPES[parts_of(name)[0]], classes=4, count=20)
    images, labels = splits.train.images[:4], splits.train.labels[:4]
    autoencoder = config.autoencoder.build(splits.image_shape)
    assert autoencoder(images)["loss"].isfinite()
    prior = config.prior.build([LatentSpec(shape, vocabulary) for shape, vocabulary in autoencoder.latents], classes=4)
    told = {"ClassLabel": labels, "Caption": torch.ones(4, 16, dtype=torch.int64)}.get(type(config.prior.top.condition).__name__)
    with torch.no_grad():
        latents = autoencoder.eval().sample(autoencoder.encode(images))
    assert prior(latents, told)["loss"].isfinite()


@pytest.mark.parametrize("name", SENSELESS)
def test_what_makes_no_sense_is_said_in_a_sentence(name):
    with pytest.raises(UserError, match="binary draws grey pixels black or white: it is for mnist5k, mnist and fashion-mnist"):
        preset(name)


@pytest.mark.parametrize("name", ["mnist5k-binary", "fashion-binary"])
def test_binary_images_are_black_or_white(name):
    config = preset(name)
    assert config.data.binarize and config.refine is not None and config.metrics.pixels == "sample"
    if name == "mnist5k-binary":
        splits = config.data.load()
        assert {*splits.test.images[:10].unique().tolist()} == {0, 255}
        assert not torch.equal(splits.train[slice(10)][0], splits.train[slice(10)][0])


def test_a_preset_is_data_and_a_recipe():
    assert parts_of("mnist5k") == parts_of("mnist5k-vae") == ("mnist5k", "vae")
    assert parts_of("fashion-vqvae2") == parts_of("fashion-mnist-vqvae2") == ("fashion-mnist", "vqvae2")
    assert parts_of("fashion") == ("fashion-mnist", "vae") and preset_name("fashion-mnist", "dalle") == "fashion-dalle"
    assert {*MADE_BY} == {*RECIPES} and {*DATA_SETS} == {*DATA} and {*TUNED} <= {*ALL}
    for wrong in ("mnits", "mnist-vqvea", "mnist-", "vqvae", ""):
        with pytest.raises(UserError, match="there is no preset.*DATA or DATA-RECIPE.*folder.*vqvae2"):
            preset(wrong)


def test_the_priors_that_are_offered_are_those_there_are():
    assert {*PRIORS} == {*CONTINUOUS_BASELINES, *CODE_BASELINES, "learned", "posterior"}


@pytest.mark.parametrize("learned", [True, False])
def test_a_run_offers_the_priors_that_it_has(learned):
    config = preset("mnist5k") if learned else replaced(preset("mnist5k"), "stage2.steps", 0)
    run, last = Run.create(Path("nowhere"), config, "cpu"), "learned, posterior" if learned else "posterior"
    with pytest.raises(UserError, match=f"no prior 'unigram' .* There are: standard, gaussian, mixture, {last}$"):
        open_prior(run, "unigram", [LatentSpec((4, 7, 7))])


@pytest.mark.parametrize("name", NAMED)
def test_a_config_comes_back_from_its_file(name):
    config = preset(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("values", [[], 5, None, "x", {}, {"data": 5}])
def test_what_is_no_config_is_refused(values):
    with pytest.raises(ValueError):
        from_dict(values)


def test_a_config_of_a_version_without_some_setting_is_read(tmp_path):
    for name in ("mnist5k", "mnist5k-plain", "mnist-2d"):
        values = to_dict(preset(name))
        del values["autoencoder"]["network"]["features"]
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert read_config(tmp_path / "config.json") == preset(name)


@pytest.mark.parametrize(("backbone", "head"), LEARNED)
def test_a_config_names_the_kinds_of_its_prior(backbone, head):
    config = dataclasses.replace(preset("mnist"), prior=AutoregressiveConfig(BACKBONES[backbone], HEADS[head]))
    values = json.loads(json.dumps(to_dict(config)))
    assert values["prior"]["backbone"]["kind"] == type(BACKBONES[backbone]).__name__
    assert values["prior"]["head"]["kind"] == type(HEADS[head]).__name__
    assert from_dict(values) == config


@pytest.mark.parametrize("name", NAMED)
def test_values_are_overridden_on_the_command_line(name):
    arguments = ["--run", "r", "--stage2.steps", "7", "--autoencoder.network.width", "12", "--seed", "3"]
    run, config, options = parse([name, *arguments])
    expected = dataclasses.replace(preset(name), stage2=dataclasses.replace(preset(name).stage2, steps=7), seed=3)
    network = dataclasses.replace(expected.autoencoder.network, width=12)
    assert config == dataclasses.replace(expected, autoencoder=dataclasses.replace(expected.autoencoder, network=network))
    assert (run, options) == ("r", Options())


def test_no_steps_of_the_third_phase_are_none():
    """The same config, so the same run, whatever the preset says."""
    unrefined = dataclasses.replace(preset("mnist-binary"), refine=None)
    assert parse(["mnist-binary", "--refine.steps", "0"])[1] == unrefined
    assert with_settings(preset("mnist-binary"), {"refine.steps": 0}) == unrefined


def test_the_default_is_the_embedded_preset():
    assert parse([]) == ("mnist5k", preset("mnist5k"), Options())


# Kinds of parts


def built(config: RunConfig) -> RunConfig:
    autoencoder = config.autoencoder.build((1, 28, 28))
    config.prior.build([LatentSpec(shape, vocabulary) for shape, vocabulary in autoencoder.latents], classes=10)
    return config


def test_the_kind_of_a_part_is_chosen_by_name():
    for path, kinds in kinds_of(preset("mnist")).items():
        for name in kinds:
            _, config, _ = parse(["mnist", f"--{path.replace('_', '-')}", name])
            part = config
            for step in path.split("."):
                part = getattr(part, step)
            assert name_of(type(part)) == name
    assert {*kinds_of(preset("mnist"))} >= {
        "autoencoder.network",
        "autoencoder.bottleneck",
        "prior",
        "prior.backbone",
        "prior.head",
    }


@pytest.mark.parametrize("kind", ["deterministic", "vector-quantized", "finite-scalar", "gumbel-softmax", "hierarchical"])
def test_the_prior_follows_the_bottleneck_that_is_chosen(kind):
    """From any kind to any other."""
    finer = ["--autoencoder.network.downsample", "2"]  # which can be halved
    built(parse(["mnist", f"--autoencoder.bottleneck={kind}", *finer])[1])
    built(parse(["mnist-vqvae", "--autoencoder.bottleneck", kind, *finer])[1])
    built(parse(["mnist-vqvae2", "--autoencoder.bottleneck", kind])[1])
    built(parse(["mnist-vqvae2", "--autoencoder.bottleneck", "gaussian"])[1])


@pytest.mark.parametrize(
    ("preset_and_prior", "said"),
    [
        (["mnist", "--prior", "cascade"], "a cascade is for several levels"),
        (["mnist-vqvae", "--prior", "flow"], "a flow models continuous latents"),
        (["mnist-vqvae2", "--prior", "autoregressive"], "2 levels of latents need a prior for each"),
    ],
)
def test_a_prior_that_does_not_fit_the_latents_is_refused_before_training(tmp_path, preset_and_prior, said):
    run = Run.create(tmp_path / "run", shrunk(parse(preset_and_prior)[1]), "cpu")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr("pipelines.runs.phases.load_data", lambda run: small_splits((1, 28, 28), 10))
        train(run)
    assert not [*tmp_path.rglob("step-*")]


def test_a_chosen_kind_takes_overrides_and_the_same_kind_keeps_its_settings():
    config = parse(["mnist", "--prior.backbone", "transformer", "--prior.backbone.width", "24"])[1]
    assert type(config.prior.backbone).__name__ == "TransformerConfig" and config.prior.backbone.width == 24
    assert parse(["mnist5k", "--prior.backbone", "pixelsnail"])[1] == preset("mnist5k")
    config = parse(["mnist", "--prior.top.backbone", "transformer", "--prior", "cascade"])[1]
    assert type(config.prior.top.backbone).__name__ == "TransformerConfig"
    with pytest.raises(UserError, match="no kind 'transfomer' - did you mean 'transformer'"):
        choose_kinds(preset("mnist"), ["--prior.backbone", "transfomer"])
    with pytest.raises(UserError, match="--prior.backbone needs a kind: pixelcnn, pixelsnail, transformer"):
        choose_kinds(preset("mnist"), ["--prior.backbone"])


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "condition"),
    [
        ("mnist5k", ["--prior", "flow"], FlowConfig, ClassLabel()),
        ("mnist5k", ["--prior", "vamp", "--prior.condition", "none"], VampConfig, Unconditional()),
        ("mnist5k-dalle", ["--prior", "flow"], FlowConfig, Unconditional()),
        ("folder", ["--prior", "second-vae"], SecondVaeConfig, Unconditional()),
        ("folder-vqvae2", ["--prior", "autoregressive"], AutoregressiveConfig, Cluster()),
        ("folder", ["--prior", "cascade"], CascadeConfig, Cluster()),
    ],
)
def test_another_kind_of_prior_keeps_the_condition_where_it_takes_such_a_one(name, arguments, kind, condition):
    config, left = choose_kinds(preset(name), arguments)
    assert isinstance(config.prior, kind) and config.prior.condition == condition and left == []
    if kind is CascadeConfig:
        assert config.prior.bottom.condition == condition


# Where a config comes from


def write_config(folder: Path, config: RunConfig) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder / "config.json"


def test_the_config_of_any_run_is_taken(tmp_path):
    config = replaced(preset("mnist-vqvae"), "stage1.steps", 77)
    file = write_config(tmp_path / "begun", config)
    assert parse(["--config", str(file)]) == ("begun", config, Options())
    assert parse([f"--config={file}", "--run", "other", "--seed", "4"]) == ("other", replaced(config, "seed", 4), Options())
    with pytest.raises(UserError, match="a preset or --config FILE, not both"):
        parse(["mnist", "--config", str(file)])
    with pytest.raises(UserError, match="there is no file .*: --config takes the config.json of a run"):
        parse(["--config", "nowhere.json"])


def test_a_run_goes_on_without_its_overrides_being_typed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replaced(preset("mnist-vqvae"), "stage1.steps", 77)
    write_config(tmp_path / "checkpoints" / "begun", config)
    assert parse(["--run", "begun"]) == ("begun", config, Options())
    assert parse(["--run", "begun", "--metrics.images", "50"])[1] == replaced(config, "metrics.images", 50)
    assert parse(["--run", "new"]) == ("new", preset("mnist5k"), Options())
    assert parse(["mnist", "--run", "begun"])[1] == preset("mnist")


def test_without_a_preset_a_misspelt_run_is_no_new_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "digits").mkdir(parents=True)
    (tmp_path / "checkpoints" / "digits" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no run 'digist' - did you mean 'digits'.*train_all mnist5k --run digist --seed 2"):
        parse(["--run", "digist", "--seed", "2"])
    assert not capsys.readouterr().out
    assert parse(["--run", "numbers"])[0] == "numbers"
    assert "'numbers' yet: it is begun with the preset mnist5k" in capsys.readouterr().out
    assert parse(["mnist", "--run", "digist"])[0] == "digist"


def test_a_new_run_named_as_a_preset_begins_with_that_preset(tmp_path, monkeypatch, capsys):
    """Also where a run of nearly that name is there."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "checkpoints" / "mnist5k-vqvae", preset("mnist5k-vqvae"))
    for name in ("mnist5k-vqvae2", "elsewhere/fashion-vqvae2"):
        assert parse(["--run", name]) == (name, preset(Path(name).name), Options())
        assert f"it is begun with the preset {Path(name).name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--seed", "1", "mnist"], ["--mirror", "mnist"], ["--run", "a b", "mnist"]], ids=str)
def test_a_preset_that_is_not_first_is_said_in_a_sentence(arguments):
    command = shlex.join(["mnist", *arguments[:-1]])
    with pytest.raises(UserError, match=f"the preset comes first: python -m pipelines.train_all {re.escape(command)}$"):
        parse(arguments)
    assert parse(shlex.split(command))[1].data == preset("mnist").data


def test_help_without_a_preset_fits_on_one_screen(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert said == short_help() + "\n" and said.count("\n") <= 40 and max(map(len, said.splitlines())) <= 130
    assert all(name in said for name in (*DATA, *RECIPES, "--config", "PRESET --help"))


def test_a_prior_can_be_told_nothing_by_name():
    _, config, _ = parse(["folder-vqvae2", "--prior.condition", "class-label"])
    assert config.prior.top.condition == config.prior.bottom.condition == ClassLabel()
    assert preset("folder").prior.condition == preset("folder-vqvae2").prior.condition == Cluster()
    names = {name: name_of_prior(preset(name).prior) for name in ("folder", "folder-vqvae2", "mnist5k", "mnist5k-vqvae2")}
    assert names["folder"] == "PixelSNAIL with clusters" and names["folder-vqvae2"] == "PixelSNAIL with clusters"
    assert names["mnist5k"] == "PixelSNAIL" and names["mnist5k-vqvae2"] == "PixelSNAIL + PixelCNN"
    _, config, _ = parse(["mnist5k", "--prior.condition", "none"])
    assert config.prior.condition == Unconditional() and config.prior.head == preset("mnist5k").prior.head
