"""Scores of images: what they are made of, and that unusual images come first."""

import csv
import dataclasses
import io
import math

import pytest
import torch
from PIL import Image

from pipelines import score
from pipelines.console import UserError
from pipelines.data import folder as folders
from pipelines.judging.scores import Scorer, Scores, Usual, auroc
from pipelines.runs import dataset
from stage1_vae import autoencoder
from stage1_vae.bottlenecks import GaussianBottleneck
from stage2_prior.heads import gaussian_log_prob
from tests.parts import small_splits, trained_run

SPLITS = small_splits((1, 28, 28), 4)


def of(bits_of_z, bits_of_x, bits_of_png=None) -> Scores:
    bits_of_z, bits_of_x = torch.tensor(bits_of_z), torch.tensor(bits_of_x)
    bits_of_png = torch.full_like(bits_of_z, 900.0) if bits_of_png is None else torch.tensor(bits_of_png)
    return Scores(bits_of_z, bits_of_x, bits_of_png, [bits_of_z[:, None, None]])


def around(count: int = 200, seed: int = 0) -> Scores:
    noise = torch.randn(2, count, generator=torch.Generator().manual_seed(seed))
    return of((100 + 5 * noise[0]).tolist(), (50 + noise[1] + 0.5 * noise[0]).tolist())


def test_bits_are_those_of_both_stages_and_a_map_adds_up_to_the_bits_of_z(run):
    scorer = Scorer.of(run)
    images = SPLITS.test.subset(torch.arange(7))
    found = scorer(images)
    (batch,) = images[slice(7)]
    with torch.inference_mode():
        torch.manual_seed(0)
        posteriors = scorer.autoencoder.encode(batch)
    assert found.maps[0].shape == (7, *scorer.prior.levels[0].spec.grid)
    assert torch.allclose(found.maps[0].flatten(1).sum(1), found.bits_of_z, atol=1e-3)
    buffer = io.BytesIO()
    Image.fromarray(batch[0, 0].numpy()).save(buffer, "PNG", compress_level=6)
    assert float(found.bits_of_png[0]) == pytest.approx(8 * len(buffer.getvalue()), rel=0.1)
    # The average over many draws of z is KL(q(z|x) ‖ p(z)) and the distortion, in bits.
    many = [scorer.of_batch(batch) for _ in range(200)]
    drawn = [scorer.autoencoder.sample(posteriors) for _ in range(200)]
    nothing = scorer.prior.condition.null(7)
    with torch.inference_mode():
        rate = torch.stack(
            [
                gaussian_log_prob(z, posteriors[0]["mean"], posteriors[0]["std"].log()).flatten(1).sum(1)
                - scorer.prior.log_prob([z], nothing)
                for (z,) in drawn
            ]
        )
        target = scorer.autoencoder.likelihood.scale(batch)
        distortion = torch.stack([-scorer.autoencoder.decode(levels).log_prob(target) for levels in drawn])
    for mine, theirs in (("bits_of_z", rate), ("bits_of_x", distortion)):
        mean = torch.stack([getattr(one, mine) for one in many]).mean(0)
        spread = theirs.std(0) / math.log(2) / 200**0.5
        assert ((mean - theirs.mean(0) / math.log(2)).abs() < 6 * spread + 1e-3).all()


def test_scores_are_the_same_when_images_are_scored_again(run):
    scorer = Scorer.of(run)
    assert torch.equal(scorer(SPLITS.test).bits, scorer(SPLITS.test).bits)


def test_few_large_images_are_decoded_at_once_with_the_same_scores(run, monkeypatch):
    scorer, images, decoded = Scorer.of(run), SPLITS.test.subset(torch.arange(7)), []
    whole = scorer(images)
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 3 * 28 * 28)
    scorer.autoencoder.decoder.register_forward_hook(lambda decoder, inputs, outputs: decoded.append(len(outputs)))
    assert torch.allclose(scorer(images).numbers, whole.numbers, rtol=1e-5)
    assert decoded == [3, 3, 1]


def test_held_out_images_are_scored_once(run, monkeypatch):
    first = Scorer.of(run).held_out(SPLITS.test)
    fresh = Scorer.of(run)(SPLITS.test)
    monkeypatch.setattr(Scorer, "of_batch", lambda *_: pytest.fail("scored again"))
    again = Scorer.of(run).held_out(SPLITS.test)
    for scores in (again, fresh):
        assert torch.equal(scores.numbers, first.numbers)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(scores.maps, first.maps, strict=True))


def test_codes_have_maps_of_every_level(tmp_path):
    run = trained_run(tmp_path, "mnist5k-vqvae2")
    found = Scorer.of(run)(SPLITS.test.subset(torch.arange(3)))
    assert [tuple(level.shape) for level in found.maps] == [(3, 7, 7), (3, 14, 14)]
    assert torch.allclose(sum(level.flatten(1).sum(1) for level in found.maps), found.bits_of_z, atol=1e-2)
    assert (found.maps[0] >= 0).all()  # a code has a probability


def test_images_far_from_held_out_ones_in_either_direction_are_unusual():
    usual = Usual.of(around())
    more = usual.more_usual(usual.distance(of([100.0, 40.0, 160.0, 100.0], [50.0, 44.0, 56.0, 60.0])))
    assert more[0] < 0.2 and (more[1:] == 1).all()
    own = usual.more_usual(usual.distance(around(seed=1)))
    assert abs(float(own.mean()) - 0.5) < 0.1  # of images like the held-out ones, as many are less usual as more


def test_few_held_out_images_are_no_more_usual_than_new_ones():
    """Each is judged by the others: of ten by themselves, a third of new images were more unusual than all."""
    more = []
    for seed in range(100):
        held_out = around(10, seed)
        usual = Usual.of(held_out)
        others = Scores(*(values[1:] for values in (held_out.bits_of_z, held_out.bits_of_x, held_out.bits_of_png)), maps=[])
        if seed == 0:
            alone = Scores(*(values[:1] for values in (held_out.bits_of_z, held_out.bits_of_x, held_out.bits_of_png)), maps=[])
            expected = (alone.numbers - others.numbers.mean(0))[0]
            expected = expected @ torch.linalg.pinv(others.numbers.T.cov(), hermitian=True) @ expected
            assert float(usual.distances[0]) == pytest.approx(float(expected), rel=1e-6)
        more.append(usual.more_usual(usual.distance(around(10, 1000 + seed))))
    assert float((torch.cat(more) == 1).double().mean()) < 1.5 / 11  # 1/11 by exchangeability


def test_a_simple_image_with_as_few_bits_as_a_complex_one_is_unusual():
    """What the likelihood alone does not see (Serrà et al. 2020)."""
    noise = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    usual = Usual.of(of((100 + 5 * noise[0]).tolist(), [50.0] * 200, (900 + 50 * noise[0] + 10 * noise[1]).tolist()))
    more = usual.more_usual(usual.distance(of([100.0, 100.0], [50.0, 50.0], [900.0, 600.0])))
    assert more[0] < 0.2 and more[1] == 1


def test_bits_that_do_not_vary_and_too_few_images():
    usual = Usual.of(of([5.0] * 20, [3.0] * 20))
    assert usual.distance(of([5.0], [3.0])).isfinite().all()
    with pytest.raises(UserError, match="held-out images: 3, too few"):
        Usual.of(around(3))


def test_auroc_is_the_share_of_pairs():
    usual, unusual = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0])
    pairs = (unusual[:, None] > usual).double() + 0.5 * (unusual[:, None] == usual)
    assert auroc(usual, unusual) == pytest.approx(float(pairs.mean()))


def test_the_table_begins_with_the_most_unusual_and_keeps_the_names_of_files(run, tmp_path, small_data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for number, image in enumerate(SPLITS.test.images[:3, 0].numpy()):
        Image.fromarray(image).resize((40, 40)).save(folder / "inner" / f"usual-{number}.png")
    noise = torch.randint(0, 256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(folder / "noise.png")
    (folder / "broken.png").write_bytes(b"no picture")
    score.main([str(run.folder), str(folder), "--out", "found.csv"])
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [row["image"] for row in rows][0] == str(folder / "noise.png") and len(rows) == 4
    assert float(rows[0]["held_out_more_usual"]) == 1
    assert float(rows[0]["bits"]) == pytest.approx(float(rows[0]["bits_of_z"]) + float(rows[0]["bits_of_x_given_z"]), abs=0.02)
    page = (tmp_path / "found.html").read_text()
    assert page.count("<figure>") == 4 and page.index("noise.png") < page.index("usual-0.png")
    printed = capsys.readouterr().out
    assert "of 4 pictures, to fit the model's 1×28×28: 3 resized\n" in printed
    assert "broken.png cannot be read" in printed and "AUROC against held-out images: " in printed


def test_without_images_the_runs_own_are_scored(run, tmp_path, small_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    score.main([str(run.folder), "--shown", "2"])
    assert len(list(csv.DictReader((tmp_path / "scores.csv").open()))) == len(SPLITS.test)
    assert (tmp_path / "scores.html").read_text().count("<figure>") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.png"], "no picture and no folder nowhere.png"),
        (["empty"], "no pictures under empty"),
        (["--out", "page.html"], "--out is the file of a table"),
        (["--shown", "0"], "--shown is a number from 1 up"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(run, tmp_path, small_data, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        score.main([str(run.folder), *arguments])


def test_too_few_held_out_images_are_said_before_any_picture_is_read(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = dataclasses.replace(SPLITS, test=SPLITS.test.subset(torch.arange(9)))
    monkeypatch.setattr(dataset, "load_data", lambda run: few)
    monkeypatch.setattr(folders, "images_at", lambda *_: pytest.fail("read in vain"))
    monkeypatch.setattr(Scorer, "__call__", lambda *_: pytest.fail("scored in vain"))
    with pytest.raises(UserError, match="held-out images: 9, too few .*; at least 10 are needed: train a new run on more"):
        score.main([str(run.folder), "pictures"])


def test_a_run_without_a_density_is_refused(run, monkeypatch):
    monkeypatch.setattr(GaussianBottleneck, "has_density", False)
    with pytest.raises(UserError, match="deterministic encoder"):
        Scorer.of(run)
    monkeypatch.setattr(type(run), "learned", False)
    with pytest.raises(UserError, match="no learned prior"):
        Scorer.of(run)
