"""What the explorer shows, without a browser; and its command."""

import socket
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from pipelines import TwoStage, explore
from pipelines.console import UserError
from pipelines.explorer.views import TILES, Views, hidden_part
from pipelines.runs.run import names_of_runs
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import AS_FITTED, Sampling
from tests.parts import trained_run


@pytest.fixture(scope="module")
def views(run) -> Views:
    """The prior is told labels; its latents are continuous."""
    return Views(TwoStage.open(run.folder, "cpu"))


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Views:
    """Two latent numbers."""
    run = trained_run(tmp_path_factory.mktemp("flat"), "mnist5k-2d")
    return Views(TwoStage.open(run.folder, "cpu"))


def test_every_prior_is_drawn_at_the_same_seeds_and_only_the_learned_one_is_told(views):
    how = Sampling(temperature=0.7, guidance=2.0)
    strips = views.draw(3, 5, how, "2", None)
    assert [strip.heading for strip in strips] == [
        "learned prior, temperature 0.7, guidance 2",
        "Gaussian mixture",
        "fitted Gaussian",
        "N(0, I)",
    ]
    assert torch.equal(strips[0].images, views.model.sample(3, label="2", seed=5, temperature=0.7, guidance=2.0))
    assert torch.equal(strips[-1].images, views.model.sample(3, prior="standard", seed=5))


def test_a_prior_that_cannot_be_opened_says_why_and_the_others_are_drawn(views, monkeypatch):
    def missing(run, specs):
        raise UserError("there are no latents")

    monkeypatch.setattr(views.model, "opened", {})
    monkeypatch.setattr("pipelines.runs.priors.training_latents", missing)
    monkeypatch.setattr("pipelines.files.key_of", lambda path: None)
    strips = {strip.heading: strip for strip in views.draw(2, 0, AS_FITTED, None, None)}
    both = strips["Gaussian mixture, fitted Gaussian"]
    assert both.images is None and "no latents" in both.note, "once"
    assert len(strips["N(0, I)"].images) == 2


def test_a_place_in_the_picture_of_the_plane_is_what_stands_there(flat, small_data):
    plane = flat.plane
    assert torch.equal(plane.at(0, 1), plane.low) and torch.equal(plane.at(1, 0), plane.high)
    row, column = 3, 7  # from the top
    (strip,) = flat.under((column + 0.5) / TILES, (row + 0.5) / TILES)
    assert torch.equal(strip.images[0], plane.images[row * TILES + column])
    assert len(plane.points) == len(plane.labels) == len(flat.data.train)
    inside = (plane.points >= plane.low) & (plane.points <= plane.high)
    assert inside.float().mean() > 0.95
    assert strip.note.startswith("log p(z)") and all(title in strip.note for title in ("N(0, I)", "learned prior"))


def test_a_walk_goes_from_one_reconstruction_to_the_other(views, small_data):
    start, end = views.held_out(0), views.held_out(3)
    first, between, last = views.walk(start, end, 5)
    assert torch.equal(first.images[0], start) and torch.equal(last.images[0], end) and len(between.images) == 5
    ends = views.model.decode(views.model.encode(torch.stack([start, end])))
    assert torch.equal(between.images[[0, -1]], ends)


def test_what_is_painted_over_is_drawn_anew_and_the_rest_is_kept(views, small_data, tmp_path, capsys):
    picture = views.held_out(1)
    large = Image.fromarray(picture[0].numpy()).resize((280, 280), Image.Resampling.NEAREST)
    large.convert("RGBA").save(tmp_path / "background.png")
    layer = Image.new("RGBA", large.size)
    ImageDraw.Draw(layer).rectangle((0, 145, 279, 279), fill=(255, 0, 0, 128))  # from the middle of row 14 on
    layer.save(tmp_path / "layer.png")
    read, hidden = hidden_part(views.model, str(tmp_path / "background.png"), [str(tmp_path / "layer.png")])
    assert torch.equal(read, picture), "a picture that was only enlarged is what it was"
    assert torch.equal(hidden, torch.arange(28)[:, None].expand(28, 28) >= 14)
    given, made = views.complete(picture, hidden, 2, 16, 0, "1", None)
    assert (given.images[0, :, 14:] == 128).all()
    assert torch.equal(made.images[:, :, :14], picture[None, :, :14].expand(2, -1, -1, -1))
    capsys.readouterr()
    views.model.complete(picture, "top-half", 2, label="1", seed=0, particles=16)
    assert made.note.startswith("effective sample size: median ") and made.note == capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="nothing is painted over"):
        views.complete(picture, torch.zeros_like(hidden), 2, 16, 0, None, None)


def test_a_caption_is_what_a_completion_is_told(views, small_data, monkeypatch):
    heard = []

    def complete(*_, tell, **told):
        heard.append(told)
        tell("of how many particles")
        return torch.zeros(1, 1, 28, 28)

    monkeypatch.setattr(views.model, "complete", complete)
    views.complete(views.held_out(1), torch.ones(28, 28, dtype=torch.bool), 1, 32, 0, None, "a boot")
    assert heard[0]["caption"] == "a boot" and heard[0]["label"] is None and heard[0]["particles"] == 32


@pytest.mark.parametrize(("caption", "remark"), [("the two", "know: two"), ("the 2 " * 20, "are cut: the 2"), ("the 2", "")])
def test_what_a_prior_does_not_see_of_a_caption_stands_below_its_samples(caption, remark):
    views = Views(TwoStage.open("mnist5k-dalle", "cpu"))
    learned, *others = views.draw(1, 0, AS_FITTED, None, caption)
    assert remark in learned.note and bool(learned.note) == bool(remark)
    assert not any("caption" in strip.note for strip in others)


def test_what_was_asked_of_one_run_does_not_stop_another(views, small_data, tmp_path, monkeypatch):
    """Its caption may still be in the box, which is hidden where the prior takes labels."""
    page = page_of(views, monkeypatch)
    settings = 1.0, 0.0, 0.0
    assert page.draw("run", 0, 2, "any", "a boot", *settings)[0].images.shape == (2, 1, 28, 28)
    monkeypatch.setattr(views, "nearest", lambda *asked: asked)
    assert page.nearest("run", 0, 2, "1", "a boot", *settings)[3:] == ("1", None)
    monkeypatch.setattr(views, "complete", lambda *asked: asked)
    Image.fromarray(views.held_out(1)[0].numpy()).save(tmp_path / "x.png")
    drawing = {"background": str(tmp_path / "x.png"), "layers": []}
    assert page.complete("run", 0, drawing, 1, 32, "any", "a boot")[2:] == (1, 32, 0, None, None)
    monkeypatch.setattr(type(views.run), "conditioned_on", "caption")
    assert page.nearest("run", 0, 2, "1", "a boot", *settings)[3:] == (None, "a boot")


@pytest.mark.parametrize(("how", "value"), [(Sampling(guidance=1.0), "a boot"), (Sampling(temperature=0.9), "")])
def test_guidance_that_is_set_for_a_run_of_captions_comes_with_a_caption(monkeypatch, how, value):
    run = SimpleNamespace(conditioned_on="caption", learned=True)
    model = SimpleNamespace(labels=["boot"], captions=["a boot", "a shoe"], tuned=vars(how))
    stand_in = SimpleNamespace(run=run, model=model, guided=True, autoguided=False)
    label, caption, temperature, guidance, _ = page_of(stand_in, monkeypatch).settings("run")
    assert (caption["value"], caption["visible"], label["visible"]) == (value, True, False)
    assert (temperature["value"], guidance["value"]) == (how.temperature, how.guidance)


def test_a_file_that_is_no_picture_is_said_in_a_sentence(views, tmp_path, monkeypatch):
    page = page_of(views, monkeypatch)
    from gradio.data_classes import ImageData

    from pipelines.explorer.page import shown, upload_of

    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    upload = upload_of("a file")
    assert upload.preprocess(None) is None
    read = upload.preprocess(ImageData(path=str(broken)))
    assert "broken.png cannot be read as a picture" in shown(page.score)("run", 0, read)


def page_of(views, monkeypatch):
    """A page of one run, without a browser."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[explore]'")
    from pipelines.explorer.page import Page

    page = Page("run", "cpu")
    monkeypatch.setattr(page, "views", lambda name: views)
    return page


def test_data_are_loaded_beside_what_is_drawn_and_looked_for_again_where_they_are_not_there(run, monkeypatch):
    begun, there, found = threading.Event(), threading.Event(), []

    def load(_):
        begun.set()
        there.wait(60)
        if not found:
            raise UserError("no data")
        return found[0]

    monkeypatch.setattr("pipelines.explorer.views.load_data", load)
    views = Views(TwoStage.open(run.folder, "cpu"))
    assert not begun.is_set()
    _ = views.loading
    assert begun.wait(60) and views.draw(1, 0, AS_FITTED, None, None), "drawing waits for no data"
    there.set()
    with pytest.raises(UserError, match="no data"):
        _ = views.data
    found.append("splits")
    assert views.data == "splits"


def test_the_nearest_training_image_is_found(views, small_data, monkeypatch):
    train = views.data.train.images
    monkeypatch.setattr(views.model, "sample", lambda count, **told: train[torch.tensor([5, 17])])
    samples, by_pixels, by_features = views.nearest(2, 0, AS_FITTED, None, None)
    for strip in (by_pixels, by_features):
        assert torch.equal(strip.images, samples.images)
    assert "5 (0), 17 (0)" in by_pixels.note


def test_the_score_says_how_many_held_out_images_are_more_usual(views, small_data):
    noise = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both, maps = views.score(noise)
    assert torch.equal(both.images[0], noise) and maps.images.shape == (1, 3, 28, 28)
    assert both.note.startswith("More unusual than 100 % of 120 held-out images")


def test_what_a_run_lacks_is_said_in_a_sentence(views, monkeypatch, small_data):
    with pytest.raises(UserError, match="has 196 latent numbers, and a plane two numbers: choose the run mnist5k-2d"):
        _ = views.plane
    with pytest.raises(UserError, match="numbered from 0 to 119"):
        views.held_out(120)
    image = views.held_out(0)
    monkeypatch.setattr(views.model, "specs", [LatentSpec((7, 7), vocabulary=5)])
    with pytest.raises(UserError, match="are codes, between which there is no line"):
        views.walk(image, image, 3)
    page = page_of(views, monkeypatch)
    monkeypatch.setattr(views, "held_out", lambda number: pytest.fail("the images may not be there, and are not needed"))
    with pytest.raises(UserError, match="are codes, between which there is no line"):
        page.walk("run", 0, None, 3, None, 3)
    with pytest.raises(UserError, match="has 49 latent codes"):
        _ = views.plane


def test_the_command_says_what_is_wrong_in_a_sentence(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} is in use: name another, such as --port {port + 1}$"):
            explore.main(["--port", str(port)])
    with pytest.raises(UserError, match="--port is a number from 1 to 65535, not 0"):
        explore.main(["--port", "0"])
    assert explore.Arguments().run in names_of_runs(), "without a run, one that comes with the software"
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "pipelines.explorer.page", raising=False)
    with pytest.raises(UserError, match="needs gradio: pip install"):
        explore.main([str(run.folder), "--port", str(port)])
