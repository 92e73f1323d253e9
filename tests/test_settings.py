"""Every numeric setting declares its range. What lies outside is refused before training; so is what the disk cannot hold."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from pipelines import benchmark, compare, export, generate, likelihood, score
from pipelines.console import UserError
from pipelines.runs import phases
from pipelines.runs.config import RunConfig, check_ranges, from_dict, interval_of, replaced, to_dict, with_settings
from pipelines.runs.kinds import kinds_of
from pipelines.runs.names import DATA, RECIPES, preset_name
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.two_stage import TwoStage
from stage1_vae.autoencoder import AutoencoderConfig
from stage2_prior.autoregressive import AutoregressiveConfig
from stage2_prior.conditions import ClassLabel
from tests.parts import BACKBONES, BOTTLENECKS, HEADS, LIKELIHOODS, NETWORKS, shrunk, small_splits, spec_for

HUGE = 10**30


def every_config() -> Iterator[RunConfig]:
    """Of every recipe, and of every kind of each part in its place."""
    for name in [preset_name("mnist5k", recipe) for recipe in RECIPES] + [preset_name(data, "vae") for data in DATA]:
        config = preset(name)
        yield config
        for path, kinds in kinds_of(config).items():
            yield from (replaced(config, path, kind()) for kind in kinds.values())


def numeric(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path and the type of every numeric setting."""
    for entry in fields(config):
        value, hint = getattr(config, entry.name), get_type_hints(type(config), include_extras=True)[entry.name]
        if is_dataclass(value):
            yield from numeric(value, f"{path}{entry.name}.")
        elif {int, float} & {hint, *get_args(hint), *(part for inner in get_args(hint) for part in get_args(inner))}:
            yield f"{path}{entry.name}", hint


def settings() -> dict[tuple[type, str], tuple[RunConfig, str, Any]]:
    """Each once: by the class of the part and its name."""
    found = {}
    for config in every_config():
        for path, hint in numeric(config):
            part = config
            for name in path.split(".")[:-1]:
                part = vars(part)[name]
            found.setdefault((type(part), path.rpartition(".")[2]), (config, path, hint))
    return found


def test_every_numeric_setting_has_a_range_and_what_lies_outside_is_refused():
    found = settings()
    assert len(found) > 60
    for config, path, hint in found.values():
        check_ranges(config)
        interval = interval_of(hint)
        assert interval is not None, f"{path} declares no range"
        lower = interval.ge if interval.ge is not None else interval.gt
        upper = interval.le if interval.le is not None else interval.lt
        bad = [lower - 1, lower - HUGE, upper + 1, HUGE, 1e300, math.nan, math.inf, -math.inf]
        bad += [lower] * (interval.ge is None) + [upper] * (interval.le is None)
        for value in bad:
            changed = replaced(config, path, (value,) if "tuple" in str(hint) else value)
            with pytest.raises(UserError) as refused:
                check_ranges(changed)
            option, said = f"--{path.replace('_', '-')} is a number ", str(refused.value)
            assert said.startswith(option) and said.endswith(f"not {value}")
        for value in (bound for bound in (interval.ge, interval.le) if bound is not None):
            check_ranges(replaced(config, path, (value,) if "tuple" in str(hint) else value))


def test_a_run_is_refused_before_it_begins_and_so_is_a_stored_config(tmp_path):
    config = replaced(preset("mnist5k"), "autoencoder.bottleneck.beta", math.nan)
    with pytest.raises(UserError, match="--autoencoder.bottleneck.beta is a number from 0 to 1,000,000, not nan"):
        Run.create(tmp_path / "run", config, "cpu")
    assert not (tmp_path / "run").exists() and to_dict(config)


PARTS = {"network": NETWORKS, "bottleneck": BOTTLENECKS, "likelihood": LIKELIHOODS, "backbone": BACKBONES, "head": HEADS}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, parts in PARTS.items() for name in parts])
def test_the_least_of_every_setting_takes_a_step_or_is_refused_with_a_reason(kind, name):
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = PARTS[kind][name]
    for path, hint in numeric(part):
        least = interval_of(hint).ge
        if least is None:
            continue
        smallest = replaced(part, path, (least,) if "tuple" in str(hint) else least)
        try:
            if kind in ("network", "bottleneck", "likelihood"):
                config = AutoencoderConfig(NETWORKS["convolutional"], BOTTLENECKS["gaussian"], LIKELIHOODS["gaussian"])
                loss = replace(config, **{kind: smallest}).build((1, 16, 16))(images)["loss"]
            else:
                head = "categorical" if name == "categorical" else "mixture"
                spec = spec_for(head, (2, 2))
                config = replace(AutoregressiveConfig(BACKBONES["pixelcnn"], HEADS[head], ClassLabel()), **{kind: smallest})
                latents = torch.zeros(4, 2, 2).long() if spec.vocabulary else torch.randn(4, 2, 2, 2)
                loss = config.build([spec], 3)([latents], torch.tensor([0, 1, 2, 0]))["loss"]
            assert loss.isfinite(), path
        except ValueError as error:
            assert str(error), path


def test_room_on_the_disk_is_looked_for_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "load_data", lambda run: small_splits((1, 28, 28), 4))
    monkeypatch.setattr(phases.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="needs about .* GiB, .* for latents, and .* are free on the disk of .*: make room"):
        phases.train(Run.create(tmp_path / "run", shrunk(preset("mnist5k")), "cpu"))
    assert not (tmp_path / "run").exists()


def test_where_images_go_is_looked_at_before_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(TwoStage, "open", lambda *_: pytest.fail("it is opened to draw"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out, what in (("file/x.png", "file is a file"), ("file", "file is a file"), ("folder.png", "folder.png is a folder")):
        with pytest.raises(UserError, match=f"--out .* cannot be written: .*{what}"):
            generate.main(["mnist5k", "--out", str(tmp_path / out)])


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (score, ["mnist5k", "--out", "scores.csv"]),
        (compare, ["mnist5k", "mnist", "--out", "page.html"]),
        (likelihood, ["mnist5k", "--json", "bounds.json"]),
        (export, ["mnist5k", "--out", "export"]),
        (benchmark, ["batches", "mnist5k", "--json", "rows.json"]),
    ],
)
def test_where_results_go_is_looked_at_before_work_begins(tmp_path, monkeypatch, command, option):
    *others, name, path = option
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.runs.parts.load_autoencoder", lambda run: pytest.fail("the work has begun"))
    for module in ("judging.scores", "judging.likelihood", "pages.report", "pages.exports", "benchmarks.batches"):
        monkeypatch.setattr(f"pipelines.{module}.load_autoencoder", lambda run: pytest.fail("begun"), raising=False)
    monkeypatch.setattr("pipelines.benchmarks.batches.BenchmarkBatches.rows", lambda asked: pytest.fail("the work has begun"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{name} file/{path} cannot be written: .*file is a file$"):
        command.main([*others, name, f"file/{path}"])
    (tmp_path / "there").mkdir(0o555)
    monkeypatch.setattr("pipelines.files.os.access", lambda place, how: "there" not in str(place))  # root may write anywhere
    with pytest.raises(UserError, match="there is read only$"):
        command.main([*others, name, f"there/{path}"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stage2.step": 5}, "no setting 'step' in 'stage2.step' - did you mean 'steps'"),
        ({"stag2.steps": 5}, "no setting 'stag2' in 'stag2.steps' - did you mean 'stage2'"),
        ({"stage2.steps.more": 5}, "no setting 'more' in 'stage2.steps.more': what it is to be a part of is"),
        ({"refine.steps": 5}, "no setting 'steps' in 'refine.steps': what it is to be a part of is None"),
        ({"stage2.steps": "5"}, "stage2.steps is a whole number, not '5'"),
        ({"stage2.steps": 5.0}, "stage2.steps is a whole number, not 5.0"),
        ({"seed": True}, "seed is a whole number, not True"),
        ({"mirror": 1}, "mirror is True or False, not 1"),
        ({"stage1.learning_rate": "1e-3"}, "stage1.learning_rate is a number, not '1e-3'"),
        ({"metrics.extractor": "incption"}, "metrics.extractor is one of 'classifier', 'inception', 'dinov2', not 'incption'"),
        ({"metrics.weights": 3}, "metrics.weights is a path or None, not 3"),
        ({"prior.backbone": "transformer"}, "prior.backbone is a PixelCNNConfig or .*TransformerConfig.*, not 'transformer'"),
    ],
)
def test_a_setting_in_python_that_there_is_not_or_of_another_type_is_refused(settings, says, tmp_path):
    with pytest.raises(UserError, match=says):
        TwoStage.train("mnist5k", str(tmp_path / "run"), settings)


@pytest.mark.parametrize(("path", "value"), [("seed", "5"), ("seed", 5.7), ("seed", True), ("mirror", "no"), ("mirror", 1)])
def test_a_config_with_a_value_of_another_type_is_refused(path, value):
    """cattrs would make 5 of the first two, 1 of the third, and True of the others."""
    values = to_dict(preset("mnist5k"))
    with pytest.raises(ValueError, match=path):
        from_dict(values | {path: value})
    values["stage1"]["learning_rate"] = 1
    assert from_dict(values).stage1.learning_rate == 1.0


def test_every_setting_takes_the_value_that_it_has():
    """So the check of types knows the type of every setting there is."""

    def parts(config: Any, path: str = "") -> Iterator[str]:
        for entry in fields(config):
            yield f"{path}{entry.name}"
            if is_dataclass(getattr(config, entry.name)):
                yield from parts(getattr(config, entry.name), f"{path}{entry.name}.")

    for config in every_config():
        for path in parts(config):
            value: Any = config
            for name in path.split("."):
                value = getattr(value, name)
            assert with_settings(config, {path: value}) == config
    config = preset("folder")
    assert with_settings(config, {"data.root": "images", "stage1.learning_rate": 1}).data.root == Path("images")
