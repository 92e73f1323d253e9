"""One stage 1 for several priors: trained once, linked rather than copied, refused where it does not fit."""

import dataclasses
import shutil

import pytest

from pipelines.console import UserError
from pipelines.pages.exports import export
from pipelines.runs import latents as latents_module
from pipelines.runs import phases
from pipelines.runs.config import replaced
from pipelines.runs.dataset import load_data
from pipelines.runs.latents import training_latents
from pipelines.runs.options import Options
from pipelines.runs.parts import finished, load_autoencoder, load_prior, specs_of, weights_of
from pipelines.runs.priors import open_prior
from pipelines.runs.run import Run
from pipelines.runs.sharing import check_source, link, share_stage1
from pipelines.train_all import parse
from pipelines.training import checkpoints
from pipelines.training import fit as fitting
from stage2_prior.transformer import TransformerConfig
from tests.parts import small_splits

pytestmark = pytest.mark.usefixtures("small_data")
OTHER = TransformerConfig(width=8, layers=2, heads=2)


def sharing(run: Run, name: str, source: str | None = None, **changes) -> Run:
    """A run of other settings beside `run`, trained on its stage 1."""
    config = run.config
    for path, value in {"prior__backbone": OTHER, **changes}.items():
        if value is not None:
            config = replaced(config, path.replace("__", "."), value)
    other = Run.create(run.folder.parent / name, config, "cpu")
    phases.train(other, Options(device="cpu", stage1_from=source or str(run.folder)))
    return other


def test_several_priors_share_one_training_and_one_copy_of_stage_1(run, monkeypatch):
    open_prior(run, "gaussian", specs_of(load_autoencoder(run)))
    trained, encoded = [], []
    watched, encode = fitting.Training.run, latents_module.encoded
    monkeypatch.setattr(fitting.Training, "run", lambda self, done: (trained.append(self.label), watched(self, done))[1])
    monkeypatch.setattr(latents_module, "encoded", lambda *given: (encoded.append(given[3]), encode(*given))[1])
    others = [sharing(run, "attention"), sharing(run, "seeded", seed=1)]
    assert trained == ["stage 2", "stage 2"] and encoded == []
    for other in others:
        assert weights_of(other)["stage1"] == weights_of(run)["stage1"]
        assert weights_of(other)["stage2"] != weights_of(run)["stage2"]
        for pattern in ("stage1/step-*/model.safetensors", "latents/stage1-train.safetensors", "baselines/gaussian.safetensors"):
            for path in run.folder.glob(pattern):
                assert (other.folder / path.relative_to(run.folder)).samefile(path)
    # Again, with the option or without: nothing is trained. Deleting one run leaves the other whole.
    sharing(run, "attention")
    phases.train(others[0])
    shutil.rmtree(others[1].folder)
    load_prior(run, specs_of(load_autoencoder(run)))
    assert len(training_latents(others[0], specs_of(load_autoencoder(run)))) == len(load_data(run).train) and len(trained) == 2


def test_a_stage_1_that_does_not_fit_is_refused_in_one_sentence(run, monkeypatch):
    def refused(says: str, name: str = "refused", source: str | None = None, **changes) -> None:
        with pytest.raises(UserError, match=says):
            sharing(run, name, source, **changes)
        assert not (run.folder.parent / "refused").exists()

    refused("does not fit .stage1.learning_rate: .* in the run", stage1__learning_rate=0.5)
    refused("does not fit .autoencoder.bottleneck.channels", autoencoder__bottleneck__channels=3)
    refused("does not fit .data.binarize", data__binarize=True)
    refused("there is no run 'nowhere'", source="nowhere")
    refused("names the run itself", name=run.folder.name, prior__backbone=run.config.prior.backbone)
    trained = small_splits((1, 28, 28), 4)
    fewer = dataclasses.replace(trained, test=trained.test.subset(slice(None, None, 2)))
    with monkeypatch.context() as patch:
        patch.setattr(type(run.config.data), "load", lambda self, report=None: fewer)
        refused("is trained on other images")

    unfinished = run.folder.parent / "unfinished"
    (unfinished / "stage1").mkdir(parents=True)
    shutil.copy(run.folder / "config.json", unfinished)
    refused("unfinished: stage 1 has not been trained. Run its train_all command again", source=str(unfinished))

    own = Run.create(run.folder.parent / "own", replaced(run.config, "seed", 5), "cpu")
    phases.train(own)
    with pytest.raises(UserError, match="own has a stage 1 already, which is not that of"):
        phases.train(own, Options(device="cpu", stage1_from=str(run.folder)))


def test_a_prior_with_mirror_images_takes_over_a_stage_1_but_no_fitted_baselines(run):
    open_prior(run, "gaussian", specs_of(load_autoencoder(run)))
    other = sharing(run, "mirrored", mirror=True)
    assert weights_of(other)["stage1"] == weights_of(run)["stage1"] and not (other.folder / "baselines").exists()
    assert len(training_latents(other, specs_of(load_autoencoder(run)))) == 2 * len(load_data(run).train)


def test_a_stage_1_that_was_taken_over_in_part_is_taken_over_to_its_end(run, monkeypatch):
    """Whichever of the source's checkpoints is its best."""
    for best in (0, -1):
        monkeypatch.setattr(checkpoints, "best", lambda found, best=best: found[best])
        source = replaced(run.config, "prior.backbone", OTHER)
        other, linked = Run.create(run.folder.parent / f"interrupted-{best}", source, "cpu"), []

        def interrupted(path, target, linked=linked):
            if "stage1" in str(target) and path.name == "model.safetensors":
                linked.append(path)
                if len(linked) == 2:
                    raise KeyboardInterrupt
            link(path, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("pipelines.runs.sharing.link", interrupted)
            share_stage1(other, run)
        check_source(other, run)
        share_stage1(other, run)
        assert finished(other, "stage1").digest() == finished(run, "stage1").digest()


def test_the_stage_1_of_an_export_is_taken_over_whose_best_checkpoint_is_not_its_last(run, tmp_path, monkeypatch):
    """An export has the best checkpoint alone, without the state of its training."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "best", lambda found: found[0])
        export(run, tmp_path / "export")
    (kept,) = (tmp_path / "export" / "stage1").glob("step-*")
    assert checkpoints.check(kept).step < run.config.stage1.steps
    monkeypatch.chdir(tmp_path)
    source = Run.open("export", "cpu")
    other = sharing(run, "of-an-export", source="export")
    assert weights_of(other)["stage1"] == weights_of(source)["stage1"]
    phases.train(other)
    third = sharing(run, "of-that", source=str(other.folder), seed=2)
    assert weights_of(third)["stage1"] == weights_of(source)["stage1"]
    longer = Run.create(other.folder, replaced(other.config, "stage1.steps", 50), "cpu")
    with pytest.raises(UserError, match="not the state of the optimizer"):
        phases.train(longer)


def test_the_command_begins_from_the_settings_of_that_run(run):
    source = ["--stage1-from", str(run.folder)]
    name, config, options = parse([*source, "--run", "attention", "--prior.backbone", "transformer"])
    assert name == "attention" and options.stage1_from == str(run.folder)
    assert config == replaced(run.config, "prior.backbone", TransformerConfig())
    assert parse(["mnist5k-givt", *source])[1].stage1.steps > run.config.stage1.steps  # a preset's settings are its own
    with pytest.raises(UserError, match="name it with --run NAME"):
        parse(source)
