"""A trained run is trained longer: it goes on exactly, what depends on it is made anew, and what it was is kept."""

import dataclasses
import shutil

import pytest
import torch

from pipelines.console import UserError
from pipelines.files import read_as
from pipelines.runs import run as run_module
from pipelines.runs.config import read_config, replaced, to_dict
from pipelines.runs.parts import finished, weights_of
from pipelines.runs.phases import train
from pipelines.runs.run import Run
from pipelines.training import checkpoints, devices
from pipelines.training.fit import learning_rate
from stage2_prior.autoregressive import AutoregressivePrior
from tests.test_fit import CONFIG, Breaks, Killed, assert_equal
from tests.test_fit import train as fitted

LONGER = dataclasses.replace(CONFIG, steps=2 * CONFIG.steps)


def test_a_longer_training_follows_its_own_schedule_from_the_step_reached_and_resumes_exactly(tmp_path, monkeypatch):
    rates = {}

    def seen(config, step):
        rates[step] = learning_rate(config, step)
        return rates[step]

    monkeypatch.setattr("pipelines.training.fit.learning_rate", seen)
    for name in ("whole", "killed"):
        fitted(tmp_path / name)
    rates.clear()
    _, whole = fitted(tmp_path / "whole", LONGER)
    assert rates == {step: learning_rate(LONGER, step) for step in range(CONFIG.steps, LONGER.steps)}
    assert whole.record.history[-1].step == checkpoints.usable(tmp_path / "whole")[-1].step == LONGER.steps
    with pytest.raises(Killed):  # its progress is told in steps of the shorter training
        fitted(tmp_path / "killed", LONGER, model=Breaks([], killed_at=CONFIG.steps * 18 // LONGER.steps))
    assert CONFIG.steps < checkpoints.usable(tmp_path / "killed")[-1].step < LONGER.steps
    fitted(tmp_path / "killed", LONGER)
    assert_equal(*(checkpoints.usable(tmp_path / name)[-1] for name in ("whole", "killed")))


@pytest.fixture
def copy(run, small_data, tmp_path) -> Run:
    return dataclasses.replace(run, folder=shutil.copytree(run.folder, tmp_path / "run"))


def trained(run: Run, changes: dict) -> Run:
    config = run.config
    for path, value in changes.items():
        config = replaced(config, path, value)
    longer = Run.create(run.folder, config, "cpu")
    train(longer)
    return longer


def test_a_longer_stage_1_makes_all_that_depends_on_it_anew_and_keeps_the_run_as_it_was(copy, capsys):
    (copy.folder / "compare").mkdir()
    (copy.folder / "compare" / "metrics.json").write_text("{}")
    before, latents = weights_of(copy), (copy.folder / "latents" / "stage1-train.safetensors").read_bytes()
    longer = trained(copy, {"stage1.steps": 60})
    said = capsys.readouterr().out
    assert "stage 1: going on from step 40" in said and "stage 1 is trained on from 40 to 60 steps" in said
    kept = Run.open(str(copy.folder) + "-stage1-40", "cpu")
    assert weights_of(kept) == before and (kept.folder / "compare" / "metrics.json").is_file()
    assert str(kept.folder) in said and "stage2, compare" in said
    assert finished(longer, "stage1").digest() != before.get("stage1")
    assert read_as(longer.folder / "stage2" / "after.json", dict) == {"stage1": finished(longer, "stage1").digest()}
    assert (longer.folder / "latents" / "stage1-train.safetensors").read_bytes() != latents
    assert (kept.folder / "latents" / "stage1-train.safetensors").read_bytes() == latents
    assert not (longer.folder / "compare").exists() and read_config(longer.folder / "config.json").stage1.steps == 60
    trained(longer, {})
    assert capsys.readouterr().out.count("finished, skipped") == 2


def test_a_longer_stage_2_goes_on_after_the_same_stage_1(copy, capsys, monkeypatch):
    """What its checkpoints hold of the latents, such as clusters, is not estimated again."""
    monkeypatch.setattr(AutoregressivePrior, "estimate", None)
    first = finished(copy, "stage1").digest()
    longer = trained(copy, {"stage2.steps": 6})
    said = capsys.readouterr().out
    assert "stage 1: finished, skipped" in said and "stage 2: going on from step 4" in said
    assert finished(longer, "stage1").digest() == first
    assert Run.open(str(copy.folder) + "-stage2-4", "cpu").config == copy.config


def test_a_damaged_checkpoint_is_left_out_once(copy, capsys):
    longer = trained(copy, {"stage2.steps": 6})
    (longer.folder / "stage2" / "step-0000006" / "model.safetensors").write_bytes(b"damaged")
    capsys.readouterr()
    trained(longer, {})
    assert capsys.readouterr().out.count("using step-0000004 instead") == 1


@pytest.mark.parametrize(
    "changes", [{"stage1.steps": 60, "stage1.batch_size": 8}, {"stage1.steps": 20}, {"stage1.steps": 60, "seed": 1}], ids=str
)
def test_other_changes_of_a_run_are_refused_and_nothing_is_touched(copy, changes):
    before = {path: path.stat().st_mtime_ns for path in copy.folder.parent.rglob("*")}
    with pytest.raises(UserError, match="another config") as told:
        trained(copy, changes)
    assert ("stage1.steps" in str(told.value)) == (len(changes) == 1) and "elete" not in str(told.value)
    assert before == {path: path.stat().st_mtime_ns for path in copy.folder.parent.rglob("*")}


def test_what_is_in_the_way_of_the_run_as_it_was_is_not_touched(copy):
    other = copy.folder.with_name("run-stage1-40")
    other.mkdir()
    with pytest.raises(UserError, match="run-stage1-40, which is there already: rename"):
        trained(copy, {"stage1.steps": 60})
    assert not [*other.iterdir()] and weights_of(copy)


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(copy, monkeypatch, capsys):
    """Whatever auto stands for on the machine that it goes on on."""
    automatic = replaced(copy.config, "precision", "auto")
    for native, used in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native}, raising=False)
        assert devices.resolved("auto", "cpu") == used
        assert Run.create(copy.folder.with_name("new"), automatic, "cpu").config.precision == used
    run_module.files.write_json(copy.folder / "config.json", to_dict(replaced(copy.config, "precision", "bfloat16")))
    capsys.readouterr()
    again = Run.create(copy.folder, automatic, "cpu")
    assert again.config.precision == "bfloat16" and "bf16" in again.fabric._precision.precision
    train(again)
    said = capsys.readouterr()
    assert "trained in bfloat16, which this device does not support natively" in said.out
    assert "Mixed Precision" not in said.out + said.err
    with pytest.raises(UserError, match="precision: bfloat16 in the run, float32 asked for"):
        Run.create(copy.folder, replaced(copy.config, "precision", "float32"), "cpu")
