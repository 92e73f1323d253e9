"""What can be asked of generate beyond a count: labels, guidance, text, rejection, completion."""

import dataclasses
import io
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid, save_image

from pipelines import TwoStage, generate, likelihood
from pipelines.console import UserError
from pipelines.data.captions import CaptionTokenizer
from pipelines.data.folder import Folder
from pipelines.judging.comparison import read_comparison
from pipelines.judging.features import FIGURES, FeatureSpace, feature_space
from pipelines.judging.tradeoffs import best_of, described, lowest_fd, ways_to_sample, ways_with_both
from pipelines.pages.exports import card, first_samples, networks_of
from pipelines.pages.words import notes
from pipelines.runs import sampling
from pipelines.runs.completion import completions, held_latents, known_pixels, picture_to_complete
from pipelines.runs.conditions import contexts_asked, contexts_of, label_number
from pipelines.runs.dataset import load_data
from pipelines.runs.latents import encode
from pipelines.runs.parts import load_autoencoder, specs_of
from pipelines.runs.phases import train
from pipelines.runs.pictures import tiled
from pipelines.runs.priors import open_prior
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.train_all import command_to_draw, train_all
from stage1_vae import autoencoder, bottlenecks
from stage1_vae.autoencoder import AutoencoderConfig
from stage1_vae.networks import FullyConnected
from stage2_prior.conditions import Unconditional
from stage2_prior.gaussians import StandardNormal
from stage2_prior.latents import LatentSpec
from stage2_prior.sampling import AS_FITTED, Sampling
from tests.parts import NETWORKS, compared, shrunk, small_splits


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of labels, one of several levels, one of captions and an unconditional one, shrunk, on images of four classes."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("mnist-vqvae", "fashion-vqvae2", "fashion-dalle", "mnist5k"):
            config = shrunk(preset(name))
            if name == "mnist5k":
                config = dataclasses.replace(config, prior=dataclasses.replace(config.prior, condition=Unconditional()))
            patch.setattr(type(config.data), "load", lambda self, report=None: small_splits((1, 28, 28), 4))
            made[name] = Run.create(folder / name, config, "cpu")
            train(made[name]) if name == "mnist5k" else train_all(made[name])
        yield {name: str(run.folder) for name, run in made.items()}


def drawn(*arguments: str, tmp_path) -> np.ndarray:
    generate.main([*arguments, "--count", "6", "--out", str(tmp_path / "x.npz"), "--device", "cpu"])
    return np.load(tmp_path / "x.npz")["arr_0"].astype(int)


def test_weights_alone_are_enough_to_draw_and_to_compare(runs, tmp_path, capsys):
    run = shutil.copytree(runs["mnist-vqvae"], tmp_path / "run")
    before = drawn(str(run), tmp_path=tmp_path)
    for path in run.glob("stage*/step-*/training.safetensors"):
        path.unlink()
    assert (drawn(str(run), tmp_path=tmp_path) == before).all()
    likelihood.main([str(run), "--images", "4", "--naive", "0", "--device", "cpu"])
    capsys.readouterr()
    train_all(Run.open(str(run), "cpu"))
    assert capsys.readouterr().out.count("finished, skipped") == 3
    shutil.rmtree(max(run.glob("stage2/step-*")))
    with pytest.raises(UserError, match="stage2 has weights, which are enough to draw"):
        train_all(Run.open(str(run), "cpu"))


def test_a_label_by_name_and_guidance(runs, tmp_path):
    for name in ("mnist-vqvae", "fashion-vqvae2"):
        plain = drawn(runs[name], "--label", "2", tmp_path=tmp_path)
        assert plain.shape == (6, 28, 28, 1)
        assert (drawn(runs[name], "--label", "2", tmp_path=tmp_path) == plain).all()
        assert (drawn(runs[name], "--label", "2", "--guidance", "50", tmp_path=tmp_path) != plain).any()
    names = ["0 - zero", "Ankle boot"]
    assert [label_number(name, names) for name in ("0", "Zero", "0 - zero", "ankle boot")] == [0, 0, 0, 1]
    assert label_number("1", ["Shirt", "Ankle boot"]) == 1
    for name, others in (("2", ["3", "7", "8"]), ("2", ["Shirt", "Ankle boot"]), ("9" * 5000, ["Shirt"])):
        with pytest.raises(UserError, match="there is no label"):
            label_number(name, others)
    with pytest.raises(UserError, match="no label 'two'.*There are: 0, 1, 2, 3"):
        drawn(runs["mnist-vqvae"], "--label", "two", tmp_path=tmp_path)


def test_text(runs, tmp_path):
    run, texts = Run.open(runs["fashion-dalle"], "cpu"), ("a pair of 2s", "a picture of a 3")
    assert not torch.equal(*(contexts_asked(run, 1, caption=text) for text in texts))
    guided = ["--guidance", "3"]
    one, other = (drawn(runs["fashion-dalle"], "--caption", text, *guided, tmp_path=tmp_path) for text in texts)
    assert one.shape == other.shape == (6, 28, 28, 1) and (one != other).any()
    assert (drawn(runs["fashion-dalle"], "--caption", texts[0], tmp_path=tmp_path) != one).any()
    for nothing in ([], ["--caption", ""]):
        with pytest.raises(UserError, match="goes toward a caption: say which"):
            drawn(runs["fashion-dalle"], *nothing, *guided, tmp_path=tmp_path)
    with pytest.raises(UserError, match="takes no caption; it takes a label"):
        drawn(runs["mnist-vqvae"], "--caption", "a 2", tmp_path=tmp_path)
    with pytest.raises(UserError, match="takes no label; it takes a caption"):
        drawn(runs["fashion-dalle"], "--label", "2", tmp_path=tmp_path)
    with pytest.raises(UserError, match="trained without"):
        drawn(runs["mnist5k"], "--label", "2", tmp_path=tmp_path)


def test_codes_and_captions_from_python(runs):
    model = TwoStage.open(runs["fashion-vqvae2"], "cpu")
    images = model.sample(3, seed=0)
    codes = model.encode(images)
    assert [level.dtype for level in codes] == [torch.int64] * 2 and model.decode(codes).shape == images.shape
    for wrong, says in ((codes[0] + 10**6, "codes are numbers from 0"), (codes[0].float(), "a level of latents")):
        with pytest.raises(UserError, match=says):
            model.decode([wrong, codes[1]])
    nats = model.log_likelihood(images, 3, label="1")
    assert nats.shape == (3,) and torch.equal(nats, model.log_likelihood(images, 1, label="1"))  # of codes there is one draw
    model = TwoStage.open(runs["fashion-dalle"], "cpu")
    texts = ["a pair of 2s", "a picture of a 3"]
    assert not torch.equal(model.log_likelihood(images[:2], caption=texts), model.log_likelihood(images[:2]))
    alone = [model.sample(2, caption=text, guidance=3)[i] for i, text in enumerate(texts)]
    assert torch.equal(model.sample(2, caption=texts, guidance=3), torch.stack(alone))


def test_a_caption_of_the_training_images_is_named_where_none_was_given(runs, tmp_path, capsys):
    model = TwoStage.open(runs["fashion-dalle"], "cpu")
    examples = model.captions
    assert 1 < len(examples) == len({*examples}) <= 16 and examples[0] == "the 0"
    drawn(runs["fashion-dalle"], tmp_path=tmp_path)
    assert "drawn without a caption; with one they are better, such as --caption 'the 0'" in capsys.readouterr().out
    drawn(runs["fashion-dalle"], "--caption", "a 1", tmp_path=tmp_path)
    assert "without a caption" not in capsys.readouterr().out
    assert TwoStage.open(runs["mnist-vqvae"], "cpu").captions == []
    run = Run.open(runs["fashion-dalle"], "cpu")
    assert 'sample(64, caption="the 0")' in card(run, None, "x", False, None)
    shown = first_samples(run, *networks_of(run))
    asked = (examples * 16)[: len(shown)]
    assert torch.equal(shown, model.sample(len(shown), caption=asked))


def test_captions_from_a_file_are_taken_in_turn(runs, tmp_path):
    texts = ["a pair of 2s", "a picture of a 3"]
    (tmp_path / "captions.txt").write_text("\n".join([texts[0], "", texts[1]]))
    base = [
        runs["fashion-dalle"],
        "--captions",
        str(tmp_path / "captions.txt"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x.npz"),
    ]
    generate.main(base)
    model = TwoStage.open(runs["fashion-dalle"], "cpu")
    assert (np.load(tmp_path / "x.npz")["arr_0"] == model.sample(2, caption=texts).permute(0, 2, 3, 1).numpy()).all()
    generate.main([*base, "--count", "3"])
    expected = model.sample(3, caption=[*texts, texts[0]]).permute(0, 2, 3, 1).numpy()
    assert (np.load(tmp_path / "x.npz")["arr_0"] == expected).all()
    (tmp_path / "captions.txt").write_text("\n")
    with pytest.raises(UserError, match="has no captions"):
        generate.main(base)


@pytest.mark.parametrize(("name", "option"), [("fashion-dalle", "--caption"), ("mnist-vqvae", "--label")])
def test_a_folder_of_drawn_images_says_what_each_was_drawn_with_and_can_be_trained_on(runs, name, option, tmp_path):
    base = [runs[name], "--device", "cpu", "--out", str(tmp_path / "drawn")]
    asked = {"--caption": ["ein Stück", "a 3"], "--label": ["2", "3"]}[option]
    (tmp_path / "captions.txt").write_text("\n".join(asked))
    each = ["--captions", str(tmp_path / "captions.txt")] if option == "--caption" else []
    generate.main([*base, *each, "--count", "14"])
    told = asked * 7 if each else TwoStage.open(runs[name], "cpu").conditions(14)
    assert drawn_captions(tmp_path / "drawn") == told and len({*told}) > 1
    generate.main([*base, option, asked[1], "--count", "3", "--seed", "1"])
    assert drawn_captions(tmp_path / "drawn") == [asked[1]] * 3 + told[3:], "those that are drawn anew"
    splits = Folder(root=tmp_path / "drawn", size=28, channels=1).load()
    pixels = {np.asarray(Image.open(path).convert("L")).tobytes(): path.name for path in (tmp_path / "drawn").glob("*.png")}
    by_name = dict(zip(sorted(pixels.values()), [asked[1]] * 3 + told[3:], strict=True))
    for part in (splits.train, splits.test):
        names = [pixels[image.numpy().tobytes()] for image in part.images]
        assert part.captions == [by_name[name] for name in names]
    generate.main([*base, "--prior", "standard", "--count", "2"])
    assert drawn_captions(tmp_path / "drawn") == ["", "", asked[1], *told[3:]], "no caption of what is no longer there"
    generate.main([*base[:-1], str(tmp_path / "untold"), "--no-texts", "--count", "2"])
    assert sorted(path.name for path in (tmp_path / "untold").iterdir()) == ["00000.png", "00001.png"]


def drawn_captions(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({line["file_name"] for line in lines}) == len(lines) == len([*folder.glob("*.png")])
    return [line["text"] for line in sorted(lines, key=lambda line: line["file_name"])]


def test_rejection_keeps_some_of_what_would_be_drawn(runs, tmp_path):
    generate.main([runs["mnist-vqvae"], "--count", "12", "--label", "1", "--out", str(tmp_path / "all.npz"), "--device", "cpu"])
    pool = {image.tobytes() for image in np.load(tmp_path / "all.npz")["arr_0"].astype(int)}
    kept = drawn(runs["mnist-vqvae"], "--label", "1", "--keep-best", "0.5", tmp_path=tmp_path)
    assert len(kept) == 6 and all(image.tobytes() in pool for image in kept)
    with pytest.raises(UserError, match="needs a learned prior conditioned on labels"):
        drawn(runs["mnist5k"], "--keep-best", "0.5", tmp_path=tmp_path)
    with pytest.raises(UserError, match="keep-best is a share"):
        drawn(runs["mnist-vqvae"], "--keep-best", "0", tmp_path=tmp_path)


@pytest.mark.parametrize("name", ["mnist-vqvae", "fashion-vqvae2", "mnist5k"])
def test_completion_of_a_picture(runs, name, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)).save(tmp_path / "in.png")
    mask = np.zeros((28, 28), dtype=np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for keep in ("top-half", "right-half", str(tmp_path / "mask.png")):
        out = drawn(runs[name], "--complete", str(tmp_path / "in.png"), "--keep", keep, "--particles", "3", tmp_path=tmp_path)
        assert out.shape == (6, 28, 28, 1)
    said = capsys.readouterr().out
    assert "cropped, resized, to fit the model's 1×28×28" in said
    assert "held:" in said and "effective sample size: median" in said
    with pytest.raises(UserError, match="there is no 'top-haf'.*top-half"):
        drawn(runs[name], "--complete", str(tmp_path / "in.png"), "--keep", "top-haf", tmp_path=tmp_path)
    with pytest.raises(UserError, match="there is no picture .*nothing.png"):
        drawn(runs[name], "--complete", str(tmp_path / "nothing.png"), tmp_path=tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        drawn(runs[name], "--complete", str(tmp_path / "broken.png"), tmp_path=tmp_path)


def to_complete():
    """Untrained networks, an image, and which half of it is kept."""
    config = shrunk(preset("mnist5k"))
    torch.manual_seed(0)
    model = config.autoencoder.build((1, 28, 28)).eval()
    prior = config.prior.build([LatentSpec(shape, vocabulary) for shape, vocabulary in model.latents], 3).eval()
    image = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    return model, prior, image, torch.arange(28)[:, None].expand(28, 28) < 14


def completed(model, prior, image, known, particles: int) -> torch.Tensor:
    cpu, labels = torch.device("cpu"), torch.zeros(2, dtype=torch.int64)
    return completions(
        model, prior, image, known, 2, seed=0, device=cpu, batch_size=8, particles=particles, contexts=labels, pixels="mean"
    )


def test_few_particles_are_decoded_at_once_with_the_same_completions(monkeypatch):
    model, *others = to_complete()
    whole, decoded = completed(model, *others, particles=4), []
    monkeypatch.setattr(autoencoder, "PIXELS_AT_ONCE", 3 * 28 * 28)
    model.decoder.register_forward_hook(lambda decoder, inputs, outputs: decoded.append(len(outputs)))
    assert (completed(model, *others, particles=4).int() - whole.int()).abs().max() <= 1
    assert decoded == [3, 3, 2, 2]


def test_a_completion_keeps_the_kept_pixels_and_says_what_helps_where_there_was_no_choice(capsys):
    model, prior, image, known = to_complete()
    drawn = completed(model, prior, image, known, particles=1)
    assert torch.equal(drawn[:, :, :14], image[None, :, :14].expand(2, -1, -1, -1))
    assert not torch.equal(drawn[:, :, 14:], image[None, :, 14:].expand(2, -1, -1, -1))
    said = capsys.readouterr().out
    assert (
        "which depend on kept pixels alone" in said
        and "median 1.0 of 1 particle: " in said
        and "; 4 particles choose among more" in said
    )


@pytest.mark.parametrize("bottleneck", [bottlenecks.Gaussian(channels=3), bottlenecks.FiniteScalar((8, 8, 8))], ids=str)
def test_a_latent_is_held_where_hidden_pixels_do_not_reach_and_never_where_only_they_do(bottleneck):
    """They reach where what is not a number goes when put in their place. None of them tells in what is held."""
    torch.manual_seed(0)
    model = AutoencoderConfig(NETWORKS["convolutional"], bottleneck).build((1, 64, 64)).eval()
    model.bottleneck.project.weight.data.mul_(10)  # away from the initial weights, at which every image gets the middle level
    pictures = torch.randint(0, 256, (4, 1, 64, 64), dtype=torch.uint8)
    (whole,) = model.mean(model.encode(pictures[:1]))

    @torch.no_grad()
    def out_of_reach(pixels: torch.Tensor) -> torch.Tensor:
        return ~model.encoder(torch.zeros(1, 1, 64, 64).masked_fill(pixels, torch.nan)).isnan().any(1)[0]

    top = torch.arange(64)[:, None].expand(64, 64) < 32
    for known, least in ((top, 64), (~top, 64), (torch.ones_like(top), 256), (torch.zeros_like(top), 0)):
        (given,), (held,) = held_latents(model, pictures[0], known, torch.device("cpu"))
        certain, hopeless = out_of_reach(~known), out_of_reach(known)
        assert held[certain].all() and certain.sum() >= least
        assert not held[hopeless].any() and hopeless.sum() >= min(64, 256 - least)
        assert torch.allclose(given[..., certain], whole[0][..., certain], atol=1e-4)
        for other in pictures[1:]:
            (again,), (same,) = held_latents(model, torch.where(known, pictures[0], other), known, torch.device("cpu"))
            assert torch.equal(again, given) and torch.equal(same, held)


def test_a_position_is_held_only_when_all_its_channels_stay():
    """The first channel of this latent is the picture, the second nothing at all: what is hidden changes one of two."""

    class Doubled:
        def encode(self, images):
            mean = torch.cat([images / 255, torch.zeros_like(images, dtype=torch.float32)], 1)
            return [{"mean": mean, "std": torch.zeros_like(mean)}]

        def mean(self, posteriors):
            return [posterior["mean"] for posterior in posteriors]

    picture, known = torch.arange(0, 160, 10, dtype=torch.uint8).view(1, 4, 4), known_pixels("top-half", (1, 4, 4))
    (given,), (held,) = held_latents(Doubled(), picture, known, torch.device("cpu"))
    assert torch.equal(held, known) and torch.equal(given[0][known], picture[0][known] / 255)


def test_of_a_picture_that_is_known_whole_a_latent_of_one_position_is_held_too():
    torch.manual_seed(0)
    model = AutoencoderConfig(FullyConnected(positions=1), bottlenecks.Gaussian(channels=1)).build((1, 8, 8)).eval()
    model.bottleneck.project.weight.data.mul_(100)  # away from the initial weights, which hardly tell pictures apart
    picture = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    for all_known in (True, False):
        _, (held,) = held_latents(model, picture, torch.full((8, 8), all_known), torch.device("cpu"))
        assert held.tolist() == [[all_known]]


def test_hidden_pixels_do_not_weigh_the_completions(runs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    drawings = []
    for hidden in (0, 255):
        pixels[14:] = hidden
        Image.fromarray(pixels).save(tmp_path / "in.png")
        drawings.append(drawn(runs["mnist5k"], "--complete", str(tmp_path / "in.png"), tmp_path=tmp_path))
    assert (drawings[0] == drawings[1]).all()


@pytest.mark.parametrize(("keep", "corners"), [("top", [0, 1]), ("bottom", [2, 3]), ("left", [0, 2]), ("right", [1, 3])])
def test_a_half_is_kept_by_its_name(keep, corners):
    known = known_pixels(f"{keep}-half", (3, 6, 8))
    assert known.sum() == 24 and known[[0, 0, -1, -1], [0, -1, 0, -1]].nonzero().flatten().tolist() == corners


@pytest.mark.parametrize(("mode", "colour"), [("L", 120), ("RGB", "red"), ("RGBA", (255, 255, 255, 0))])
def test_a_mask_that_is_white_nowhere_is_refused(tmp_path, mode, colour):
    Image.new(mode, (28, 28), colour).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="mask.png is white nowhere, so nothing of the picture would be kept"):
        known_pixels(str(tmp_path / "mask.png"), (1, 28, 28))


def test_a_mask_lies_where_it_was_drawn_on_the_picture(tmp_path):
    """The same file as picture and as mask, wide, so that both are cropped."""
    pixels = np.zeros((30, 60, 3), dtype=np.uint8)
    pixels[:, :20] = 255
    Image.fromarray(pixels).save(tmp_path / "both.png")
    picture = picture_to_complete(tmp_path / "both.png", (1, 30, 30))
    known = known_pixels(str(tmp_path / "both.png"), (1, 30, 30))
    assert torch.equal(known, picture[0] > 127) and known.sum() == 30 * 5


def test_a_stage_1_trained_anew_is_not_mixed_with_an_older_stage_2(runs, tmp_path, monkeypatch):
    config = shrunk(preset("mnist-vqvae"))
    run = Run.create(shutil.copytree(runs["mnist-vqvae"], tmp_path / "run"), config, "cpu")
    shutil.rmtree(tmp_path / "run" / "stage1")
    monkeypatch.setattr(type(config.data), "load", lambda self, report=None: small_splits((1, 28, 28), 4, count=260))
    with pytest.raises(UserError, match="stage2 was trained after another stage 1.*delete"):
        train_all(run)
    before = (tmp_path / "run/compare/metrics.json").read_text()
    shutil.rmtree(tmp_path / "run" / "stage2")
    train_all(run)
    assert (tmp_path / "run/compare/metrics.json").read_text() != before


def test_the_comparison_of_a_conditional_prior_of_codes(runs):
    for name in ("mnist-vqvae", "fashion-vqvae2", "fashion-dalle"):
        comparison = read_comparison(Path(runs[name]) / "compare" / "metrics.json")
        for row in (comparison.priors["learned"], comparison.reconstruction, comparison.real):
            assert 0 <= row.label_read <= 1
        assert all(1 <= level.perplexity <= level.codes for level in comparison.codes)
        shares = [point.kept for point in comparison.rejection]
        assert shares == sorted(shares, reverse=True) and len({point.images for point in comparison.rejection}) == 1
        best = best_of(comparison.sampling).sampling
        assert ("tuned" in comparison.priors) == (best != AS_FITTED)
        tried = [point.sampling for point in comparison.sampling]
        away = lowest_fd([point for point in comparison.sampling if point.sampling.autoguidance and not point.sampling.guidance])
        assert tried == ways_to_sample(guided=True, weaker=True) + ways_with_both(away.sampling.autoguidance)
        named = described(best) if "tuned" in comparison.priors else f"not used; sampling {described(best)}"
        assert any(note.startswith(f"tuned: {named} has the lowest fd of the") for note in notes(comparison))


def test_the_best_way_to_draw_that_is_guidance_is_named_with_a_caption(runs, tmp_path, monkeypatch):
    """Without one there is no guidance."""
    run = Run.open(runs["fashion-dalle"], "cpu")
    comparison = read_comparison(run.folder / "compare" / "metrics.json")
    row = dataclasses.replace(comparison.priors["learned"], fd=1e-6, sampling=Sampling(guidance=2.0))
    guided = dataclasses.replace(comparison, priors=comparison.priors | {"tuned": row})
    assert guided.recommended == "tuned"
    monkeypatch.setattr(TwoStage, "tuned", {"guidance": 2.0})
    command = shlex.split(command_to_draw(run, guided).removeprefix("python -m pipelines.generate "))
    drawn(*command[: command.index("--count")], tmp_path=tmp_path)
    (line,) = [
        line
        for line in card(run, guided, "boots", False, None, weaker=True).splitlines()
        if line.startswith("The comparison chose")
    ]
    call, options = re.findall("`(.*?)`", line)
    assert len(eval(call.replace("64", "2"), {"model": TwoStage.open(run.folder, "cpu")})) == 2
    drawn(str(run.folder), *shlex.split(options), tmp_path=tmp_path)


def test_with_few_images_sampling_is_not_tuned(runs):
    run = Run.open(runs["mnist-vqvae"], "cpu")
    splits = load_data(run)
    comparison = compared(run, dataclasses.replace(splits, test=splits.test.subset(torch.arange(50))))
    few = "tuned: not used; 50 samples for each way to sample are too few for a Fréchet distance."
    assert few in notes(comparison) and "tuned" not in comparison.priors


BEST = [AS_FITTED, Sampling(0.8), Sampling(guidance=2.0), Sampling(autoguidance=0.5), Sampling(guidance=0.5, autoguidance=0.5)]


@pytest.mark.parametrize("best", BEST, ids=described)
def test_the_comparison_finds_the_best_way_to_draw(runs, monkeypatch, best):
    """By the fd in the features of another network; the row of it is of samples as `generate` draws them.

    Several levels, of which samples take longest, are drawn with guidance.
    """
    run = Run.open(runs["fashion-vqvae2" if best.guidance else "mnist-vqvae"], "cpu")
    ways, judges = ways_to_sample(guided=True, weaker=True), []
    ways += ways_with_both(0.5)
    first = [2.0]  # of autoguidance alone, to see which strength goes with guidance
    distances = itertools.chain(first, [1.0 + (how != best) for how in ways], itertools.repeat(2.0))

    def distance_of(space, features):
        judges.append(space.description.digest)
        return next(distances)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureSpace, "distance_of", distance_of)
        patch.setattr(FeatureSpace, "error_of", lambda space, features: 0.5)
        comparison = compared(run, load_data(run))
    assert [point.sampling for point in comparison.sampling] == ways and {point.images for point in comparison.sampling} == {120}
    assert comparison.features.digest not in judges[: len(ways)]
    page = (run.folder / "compare" / "page.html").read_text()
    assert ("tuned" in comparison.priors) == (f"Samples: learned, {described(best)}" in page) == (best != AS_FITTED)
    if best == AS_FITTED:
        return
    row = comparison.priors["tuned"]
    assert row.sampling == best and 0 <= row.label_read <= 1 and row.fd != comparison.priors["learned"].fd
    labels = contexts_of(run, load_data(run).test)[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    autoencoder, space = load_autoencoder(run), feature_space(run.fabric, run.config.metrics, load_data(run), run.classifiers)
    prior, device = open_prior(run, "learned", specs_of(autoencoder)), run.fabric.device
    again = sampling.generate(autoencoder, prior, 120, seed=0, device=device, how=best, contexts=labels)
    assert row.fd == pytest.approx(space.frechet_distance(again.images, "features"))


def test_a_damaged_tokenizer_is_named(runs, tmp_path):
    path = Path(runs["fashion-dalle"]) / "tokenizer.json"
    content = path.read_bytes()
    larger = json.loads(content)
    larger["model"]["vocab"]["unknown"] = 10**6
    for damaged in (content[:-100], b"", b"{}", json.dumps(larger).encode()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="tokenizer.json is no tokenizer .*train_all again"):
            drawn(runs["fashion-dalle"], "--caption", "a boot", tmp_path=tmp_path)
    path.write_bytes(content)


def test_a_tokenizer_is_fitted_to_the_training_split_alone(runs):
    run, splits = Run.open(runs["fashion-dalle"], "cpu"), small_splits((1, 28, 28), 4)
    path = run.folder / "tokenizer.json"
    content = path.read_bytes()
    path.unlink()
    for part in ("validation", "test"):
        with pytest.raises(UserError, match="there is no .*tokenizer.json.* train_all"):
            encode(run, load_autoencoder(run), getattr(splits, part), part)
        assert not path.exists()
    encode(run, load_autoencoder(run), splits.train, "train")
    assert path.read_bytes() == content


def test_words_of_no_training_caption_are_named(tmp_path, capsys):
    path, captions = tmp_path / "tokenizer.json", ["a 3", "the Schuh", "a pair of 3s"]
    CaptionTokenizer.train(captions, 300, path)
    assert CaptionTokenizer(path, 300).unknown_words(["THE 3", *captions]) == []
    assert CaptionTokenizer(path, 300).unknown_words(["the two", "zero 3", "two"]) == ["two", "zero"]
    CaptionTokenizer.train(captions, 260, path)
    assert CaptionTokenizer(path, 260).unknown_words(["the two"]) == [], "a full vocabulary splits words of training captions"
    contexts_asked(Run.open("mnist5k-dalle", "cpu"), 2, caption=["the two", "the 2"])
    assert "warning: words of no training caption, which the prior cannot know: two\n" in capsys.readouterr().out
    contexts_asked(Run.open("mnist5k-dalle", "cpu"), 2, caption=["the 2", "the 2 " * 20])
    assert "warning: captions longer than 16 tokens, which are cut: the 2 the 2" in capsys.readouterr().out
    contexts_asked(Run.open("mnist5k-dalle", "cpu"), 1, caption="the 2")
    assert "warning" not in capsys.readouterr().out


def test_own_captions_are_read_and_wrong_ones_named(tmp_path):
    for index in range(12):
        Image.fromarray(np.full((8, 8, 3), index, dtype=np.uint8)).save(tmp_path / f"{index}.png")
    lines = [json.dumps({"file_name": f"{index}.png", "text": f"grey number {index}"}) for index in range(12)]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(lines))
    splits = Folder(root=tmp_path, size=8).load()
    for part in (splits.train, splits.validation, splits.test):
        assert part.captions == [f"grey number {int(image[0, 0, 0])}" for image in part.images]
    file.write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"captions.jsonl has no caption for 1 of 12 images .*: 11.png"):
        Folder(root=tmp_path, size=8).load()
    file.write_text(lines[0] + "\nnonsense\n")
    with pytest.raises(UserError, match="line 2: expected"):
        Folder(root=tmp_path, size=8).load()
    assert torch.is_tensor(splits.train.images)


def test_the_noise_of_pixels_is_a_samples_own():
    def noise(seed, *indices):
        return sampling.pixel_noise("sample", seed, torch.tensor(indices), (3, 8, 6))

    three = noise(0, 5, 300, 2)
    assert three.shape == (3, 3, 8, 6) and len(three.unique()) == three.numel()
    assert torch.equal(noise(0, 2, 5), three[[2, 0]]) and torch.equal(noise(0, 300), three[[1]])
    assert not torch.isin(noise(256, 0), noise(0, 256)).any()
    assert sampling.pixel_noise("mean", 0, torch.arange(3), (3, 8, 6)) is None


def test_samples_that_are_not_numbers_are_counted_and_named(runs, tmp_path, monkeypatch, capsys):
    sample = StandardNormal.sample

    def broken(self, indices, *rest):
        (z,) = sample(self, indices, *rest)
        z[indices == 2] = torch.nan
        return [z]

    monkeypatch.setattr(StandardNormal, "sample", broken)
    images = drawn(runs["mnist5k"], "--prior", "standard", tmp_path=tmp_path)
    assert (images[2] == 0).all() and "warning: not numbers, and so black: 1 of 6 samples" in capsys.readouterr().out
    run = Run.open(runs["mnist5k"], "cpu")
    comparison = compared(run, load_data(run))
    assert comparison.warnings == ["standard: not numbers, and so black: 1 of 120 samples"]
    assert "standard: not numbers, and so black: 1 of 120 samples" in (run.folder / "compare" / "page.html").read_text()
    assert all(np.isfinite(vars(comparison.priors["standard"])[figure]) for figure in FIGURES)


def test_a_damaged_early_prior_costs_autoguidance_and_nothing_else(runs, tmp_path, capsys):
    early = Path(runs["mnist-vqvae"]) / "stage2" / "early.safetensors"
    content = early.read_bytes()
    plain = drawn(runs["mnist-vqvae"], "--label", "1", tmp_path=tmp_path)
    early.write_bytes(content[:-100])
    try:
        assert (drawn(runs["mnist-vqvae"], "--label", "1", tmp_path=tmp_path) == plain).all()
        assert "early.safetensors is damaged, so there is no autoguidance" in capsys.readouterr().out
        with pytest.raises(UserError, match="no weaker copy"):
            drawn(runs["mnist-vqvae"], "--label", "1", "--autoguidance", "1", tmp_path=tmp_path)
    finally:
        early.write_bytes(content)
    assert (drawn(runs["mnist-vqvae"], "--label", "1", "--autoguidance", "20", tmp_path=tmp_path) != plain).any()


def test_a_prior_that_was_best_as_early_has_no_weaker_copy(runs, monkeypatch):
    run = Run.open(runs["mnist-vqvae"], "cpu")
    specs = specs_of(load_autoencoder(run))
    assert open_prior(run, "learned", specs).weaker is not None
    monkeypatch.setattr("pipelines.runs.parts.early_step", lambda config: config.steps)
    assert open_prior(run, "learned", specs).weaker is None


@pytest.mark.parametrize(("count", "channels", "columns"), [(7, 1, 3), (9, 3, 3), (2, 1, 5), (1, 3, 1)])
def test_a_picture_of_many_is_that_of_torchvision(count, channels, columns):
    images = torch.randint(0, 256, (count, channels, 5, 6), dtype=torch.uint8)
    save_image(make_grid(images / 255, nrow=columns, padding=1, pad_value=0.5), expected := io.BytesIO(), format="png")
    with Image.open(io.BytesIO(tiled(images, columns))) as made, Image.open(expected) as other:
        assert (np.asarray(made) == np.asarray(other)).all()


@pytest.mark.parametrize("width", [5, 28, 120])
def test_texts_stand_below_images_and_leave_the_images_as_they_are(width):
    images = torch.randint(0, 256, (4, 1, 20, width), dtype=torch.uint8)

    def sheet(*texts: str) -> np.ndarray:
        with Image.open(io.BytesIO(tiled(images, 2, texts))) as made:
            return np.asarray(made)[..., 0]

    long = "a photo of a very small dog " * 50
    plain, made, longer = sheet(), sheet("a", "b", "c", ""), sheet("a", "b", "c", long)
    rows = (len(made) - 1) // 2
    assert (made[:21] == plain[:21]).all() and (made[rows : rows + 21] == plain[21:42]).all()
    strips = [made[row + 21 : row + rows, column + 1 : column + width + 1] for row in (0, rows) for column in (0, width + 1)]
    assert [bool((strip < 255).any()) for strip in strips] == [True, True, True, False] or width == 5
    assert made.shape[1] == longer.shape[1] == plain.shape[1] and len(longer) <= 3 * len(made)
    one = sheet("a", "a", "a", "a")
    assert (one[: len(plain)] == plain).all() and len(plain) < len(one) < len(made)
    assert (sheet("a", "a\x1b\n", "", "") != sheet("a", "a", "", "")).any() or width == 5
