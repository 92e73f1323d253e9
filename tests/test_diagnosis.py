"""The diagnosis of a run: what it says of comparisons whose figures are known."""

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines.files import write_json
from pipelines.judging.comparison import CodeUse, Comparison, ImagesOf, Row
from pipelines.judging.features import Features, Reference
from pipelines.judging.health import health_of
from pipelines.judging.rows import Rows, exchange
from pipelines.judging.tradeoffs import Tradeoff
from pipelines.pages.diagnosis import another_prior, diagnosis, health_line
from pipelines.pages.words import about_measures, about_sampling
from pipelines.runs.config import replaced
from pipelines.runs.dataset import FACTS, Facts
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.train_all import parse
from pipelines.training.checkpoints import Moment
from stage2_prior.conditions import Unconditional
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import Sampling

RUN = Run.create(Path("nowhere") / "run", preset("mnist5k"), "cpu")


def row(fd: float | None, kid: float = 1.0, precision: float = 0.5, nll: float | None = None, **more) -> Row:
    figures = dict(recall=0.5, density=precision, coverage=0.5, nearer=0.5, distance_to_training=1.0)
    return Row(fd=fd, kid=kid, precision=precision, nll=nll, plus_minus={"fd": 0.5}, **(figures | more))


def made(reconstruction: float = 0.6, learned: float = 1.2, mixture: float = 20.0, **more) -> Comparison:
    priors = {"standard": row(80.0, 9.0, 0.1, 200.0), "mixture": row(mixture, nll=140.0), "learned": row(learned, nll=100.0)}
    known = dict(
        real=row(0.1),
        reconstruction=row(reconstruction, 1.0, 0.9),
        priors=priors,
        gap_closed=0.9,
        conditioned_on=None,
        images=1000,
        images_of=ImagesOf(5000),
        seed=0,
        weights={},
        judged_by={},
        features=Features("classifier", 64, "digest", Reference(5000, "digest"), accuracy=0.95),
        intervals="",
        withheld={},
        warnings=[],
        versions={},
        commonest=0.1,
    )
    return Comparison(**{**known, **more})


def test_too_few_images_to_choose_a_way_to_draw_are_named():
    says = ["tuned: not used; 49 images are too few to choose a way to sample: at least 50 are needed."]
    assert about_sampling(made(images=49)) == about_sampling(made(images_of=ImagesOf(49))) == says
    alone = made(images=49)
    del alone.priors["learned"]
    assert about_sampling(alone) == about_sampling(made(images=50)) == []


def said(comparison: Comparison) -> str:
    return "\n".join(diagnosis(RUN, comparison))


def test_what_limits_is_named_with_what_to_do_next():
    assert said(made()).startswith("By these figures, neither the decoder nor the prior limits")
    decoder = said(made(reconstruction=20.0, learned=22.0, mixture=60.0))
    assert decoder.startswith("The decoder limits: real images lie at 0.10 ± 0.50, reconstructions at 20.00 ± 0.50")
    assert f"python -m pipelines.train_all --run nowhere/run --stage1.steps {2 * RUN.config.stage1.steps};" in decoder
    prior = said(made(learned=9.0))
    assert prior.startswith("The prior limits") and "--stage1-from nowhere/run --prior.backbone transformer --run run-2" in prior
    assert f"--stage2.steps {2 * RUN.config.stage2.steps}" in prior
    for name, kind in (("mnist-vqvae2", "--prior.top.backbone transformer"), ("mnist-givt", "--prior.backbone pixelsnail")):
        assert kind in another_prior(replace(RUN, config=preset(name)), made())
    untold = replace(RUN, config=replaced(RUN.config, "prior.condition", Unconditional()))
    assert "--prior.condition class-label" in another_prior(untold, made())
    without = replace(made(), commonest=None)
    assert "--prior.condition cluster" in another_prior(untold, without)
    for name, kind in (("folder", "--prior.backbone transformer"), ("folder-vqvae2", "--prior.top.backbone transformer")):
        assert kind in another_prior(replace(RUN, config=preset(name)), without)
    priors = {"standard": row(None), "learned": row(None)}
    alike = made(withheld={"fd": "the training images have all the same features"}, priors=priors)
    alike = replace(alike, real=row(None), reconstruction=row(None))
    cannot = "What limits this run cannot be told without a Fréchet distance: the training images have all the same features."
    assert said(alike).startswith(cannot) and alike.recommended is None


def test_a_rival_that_is_better_beyond_the_error_is_recommended():
    better = made(learned=68.0, mixture=53.7)
    assert better.recommended == "mixture"
    assert said(better).startswith("Another prior is better than the learned one: samples drawn from Gaussian mixture at 53.70")
    assert "--prior mixture" in said(better) and "68.00" in said(better)
    assert made(learned=9.0, mixture=8.6).recommended == "learned"  # within the error


def test_a_plain_autoencoder_is_told_to_train_a_prior():
    plain = made()
    plain = replace(plain, priors={"standard": plain.priors["standard"]})
    assert "prior limits" in said(plain) and "learned prior" not in said(plain)
    run = replace(RUN, config=replaced(RUN.config, "stage2.steps", 0))
    assert "--stage1-from nowhere/run --stage2.steps 2000 --run run-2" in "\n".join(diagnosis(run, plain))


def test_the_health_line_compares_nats_and_says_when_stage_2_fails():
    torch.manual_seed(0)
    hard = torch.randn(500)
    nats = {"standard": 200 + hard, "mixture": 140 + hard, "learned": 100 + hard + 0.1 * torch.randn(500)}
    history = [Moment(step, {"loss": 90.0}, {"loss": loss}) for step, loss in ((1, 120), (2, 101), (3, 102))]
    found = health_of(nats, history)
    assert found.rival == "mixture" and found.gain == pytest.approx(40, abs=0.1) and 0 < found.plus_minus < 0.1
    assert (found.best_step, found.last_step, found.lost) == (2, 3, 1) and not found.overfits and not found.gains_nothing
    line = health_line(made(health=found, prior="PixelSNAIL"))
    assert (
        "100.0 nats an image of held-out latents under the PixelSNAIL, 200.0 under N(0, I), 140.0 under Gaussian mixture" in line
    )
    assert "Loss 90.0 in training, 101.0 held out, at step 2 of 3" in line
    limited = said(made(learned=9.0, health=found))
    assert "More steps do not help: the held-out loss was lowest at step 2 of 3" in limited and "Train stage 2" not in limited

    worse = health_of(nats, [*history, Moment(4, {"loss": 50.0}, {"loss": 130.0})])
    assert worse.overfits and "overfits: its held-out loss was lowest at step 2 of 4, and 29.0 nats" in said(made(health=worse))
    idle = health_of({**nats, "learned": nats["mixture"] + 0.1}, history)
    assert idle.gains_nothing and "no better than the Gaussian mixture" in said(made(health=idle))
    assert "A better prior cannot help much" in said(made(reconstruction=20.0, learned=22.0, mixture=60.0, health=found))
    both = said(made(reconstruction=20.0, learned=22.0, mixture=60.0, health=idle))
    assert "decoder limits" in both and "cannot help much" not in both and "Train it longer" in both
    lost = health_of({"standard": nats["learned"] - 0.1, "learned": nats["learned"]}, history)
    assert lost.gains_nothing and "no better than N(0, I)" in said(made(health=lost))
    single = health_of({name: values[:1] for name, values in nats.items()}, history)
    assert not single.gains_nothing and "inf" not in said(made(health=single)), "a single image cannot tell"
    assert health_of({"standard": hard}, history) is None and health_of({}, history) is None
    collapsed = made(codes=[CodeUse((7, 7), 512, 3, 1.4)])
    assert "codes on the 7×7 grid have collapsed" in said(collapsed)


def test_perturbed_latents_have_values_of_other_images_at_the_same_position():
    images = torch.arange(50)
    for shape in ((3, 4, 5), (4, 5)):
        level = (1000 * torch.arange(math.prod(shape)).view(shape) + images.view(-1, *(1,) * len(shape))).double()
        for share in (0.0, 0.2, 1.0):
            torch.manual_seed(0)
            found = exchange(level, share)
            assert torch.equal(found // 1000, level // 1000)  # each from its own position and channel
            assert float((found != level).double().mean()) == pytest.approx(share, abs=0.05)
            source = (found % 1000).view(50, -1, 4, 5)
            assert (source == source[:, :1]).all()  # all channels of a position from one image
    assert torch.equal(exchange(level[:1], 1.0), level[:1])


def test_the_progress_of_a_comparison_says_which_row_is_made():
    rows = object.__new__(Rows)
    rows.subject = SimpleNamespace(priors=["standard", "learned", "posterior"], specs=[LatentSpec((7, 7), 8)])
    assert rows.doing("real") == "comparison, row 1 of 5, real images"
    assert rows.doing("standard") == "comparison, row 3 of 5, uniform codes"
    assert rows.doing("tuned") == "comparison, learned, tuned"
    assert rows.doing("temperature 0.9") == "comparison, trying temperature 0.9"


def test_figures_of_too_few_images_are_flagged_and_what_new_images_give_is_right():
    few = made(images=8)
    assert "Too few held-out images, 8 of at least 50" in said(few) and "Too few" not in said(made(images=50))
    for images, share in ((8, "12.5"), (100, "1"), (1000, "1"), (150, "1.33")):
        assert f"New images give {share} %." in "\n".join(about_measures(made(images=images)))


@pytest.mark.parametrize(
    ("images", "test", "advised"), [(60, 6, None), (200, 20, "0.33"), (450, 45, "0.15"), (1500, 150, None), (300, 70, None)]
)
def test_own_images_get_a_frechet_distance_by_holding_out_more_where_that_leaves_enough(tmp_path, images, test, advised):
    run = Run.create(tmp_path / "run", preset("folder"), "cpu")
    facts = Facts((3, 8, 8), [], {"train": images - test - 2, "validation": 2, "test": test}, content="", captions="")
    write_json(run.folder / FACTS, vars(facts))
    none = replace(made(images=test), real=row(None))
    (says,) = [line for line in diagnosis(run, none) if "cannot be told" in line]
    found = re.search(r"--data.test-share ([\d.]+) holds out enough", says)
    assert (found[1] if found else None) == advised
    assert "test-share" not in "".join(diagnosis(RUN, none))


def test_another_network_is_advised_only_where_its_features_have_images_enough():
    weak = replace(made().features, accuracy=0.2)
    for images, reference, inception in ((45, 385, False), (2048, 5000, False), (2049, 2048, False), (2049, 5000, True)):
        says = said(made(images=images, images_of=ImagesOf(reference), features=weak))
        assert ("--metrics.extractor inception" in says) == inception and "--metrics.classifier.steps" in says


def test_figures_that_fail_a_check_are_flagged():
    assert "does not count" not in said(made())
    fooled = replace(made(), reconstruction=row(1.0, kid=9.5, precision=0.05))
    assert "kid: does not count here. N(0, I) scores 9.00" in said(fooled) and "precision: does not count here" in said(fooled)
    codes = made()
    codes.priors["unigram"] = row(8.0, density=2.0)
    assert "density: does not count here. unigram of codes scores 2.00" in said(codes)
    weak = replace(made(), features=replace(made().features, accuracy=0.839), commonest=0.6)
    assert "its accuracy on test images is 83.9 %, and always guessing the commonest label reaches 60.0 %" in said(weak)
    assert "--metrics.classifier.steps 800" in said(weak)
    assert "only 379 training images" in said(replace(made(), images_of=ImagesOf(379)))
    points = {"kid": 1.0, "precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0, "images": 76, "fd": 1.0}
    how = Sampling(guidance=0.5)
    tuned = made(sampling=[Tradeoff(sampling=how, **points)])
    tuned.priors["tuned"] = row(1.1, sampling=how)
    assert "learned, guidance 0.5: chosen by only 76 samples in 64 features" in said(tuned)
    assert "gap closed: above 1" in said(replace(made(), gap_closed_tuned=1.01))


@pytest.mark.parametrize("name", ["fashion-vqvae2", "cifar10-jpeg"])
def test_the_advice_for_an_export_begins_a_run_of_its_config(name, tmp_path, monkeypatch):
    """An export is only read: `--run` with its name would begin another run, of other data."""
    monkeypatch.chdir(tmp_path)
    run = Run.open(name, "cpu")
    decoder = diagnosis(run, made(reconstruction=20.0, learned=22.0, mixture=60.0))[0]
    weak = replace(made(), features=replace(made().features, accuracy=0.2))
    advised = re.findall("python -m (pipelines.train_all .*?)[;.]? ?(?:or |Another |$)", f"{decoder} {diagnosis(run, weak)[-1]}")
    configs = [parse(shlex.split(command)[1:]) for command in (*advised, another_prior(run, made()).removeprefix("python -m "))]
    assert [named for named, _, _ in configs] == [f"{name}-2"] * 3
    data = run.config.data if name == "fashion-vqvae2" else replace(run.config.data, root=Path("data") / name)
    assert all(config.data == data for _, config, _ in configs)
    longer, judged, shared = (replace(config, data=run.config.data) for _, config, _ in configs)
    assert longer == replaced(run.config, "stage1.steps", 2 * run.config.stage1.steps)
    assert judged == replaced(run.config, "metrics.classifier.steps", 2 * run.config.metrics.classifier.steps)
    assert shared.prior != run.config.prior and shared.autoencoder == run.config.autoencoder
