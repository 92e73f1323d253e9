"""A run from Python: what a few lines of a notebook do."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import TwoStage, generate
from pipelines.console import UserError
from pipelines.runs.pictures import enlarged, tiled, write_images
from stage1_vae.bounds import draws, elbo
from stage2_prior.baselines import baselines
from stage2_prior.sampling import Sampling

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(run) -> TwoStage:
    """The prior is conditioned on labels."""
    return TwoStage.open(run.folder, "cpu")


def test_the_package_is_light_until_it_is_used(run, tmp_path):
    """Also where nobody is in the repository, as in a notebook elsewhere."""
    lines = f"""
import sys
import pipelines
assert "torch" not in sys.modules
from pipelines import TwoStage
images = TwoStage.open({str(run.folder)!r}, device="cpu").sample(2, seed=0)
print(images.dtype, tuple(images.shape))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "torch.uint8 (2, 1, 28, 28)\n", done.stderr
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from pipelines import Nothing  # noqa: F401


def test_sample_draws_what_the_command_draws(run, model, tmp_path):
    how = {"temperature": 0.7, "guidance": 2.0}
    options = [word for name, value in how.items() for word in (f"--{name}", str(value))]
    command = [str(run.folder), "--count", "5", "--label", "2", "--seed", "3", *options, "--device", "cpu"]
    generate.main([*command, "--out", str(tmp_path / "x.npz")])
    images = model.sample(5, label="2", seed=3, **how)
    assert images.dtype == torch.uint8 and (images.permute(0, 2, 3, 1).numpy() == np.load(tmp_path / "x.npz")["arr_0"]).all()
    assert torch.equal(images, model.sample(5, label=2, seed=3, **how))
    assert not torch.equal(images, model.sample(5, label=2, seed=4, **how))
    assert torch.equal(images[:2], model.sample(2, label="2", seed=3, **how))
    images[0] = 0  # as any other tensor


def test_images_are_files_of_a_folder_and_enlarged_with_sharp_pixels(run, model, tmp_path):
    command = [str(run.folder), "--count", "3", "--scale", "4", "--device", "cpu"]
    generate.main([*command, "--out", f"{tmp_path}/drawn/"])
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [f"0000{n}.png" for n in range(3)] + ["captions.jsonl"]
    for number, image in enumerate(model.sample(3)):
        with Image.open(tmp_path / "drawn" / f"{number:05}.png") as made:
            pixels = np.asarray(made)[..., 0]
        assert (pixels == np.kron(image[0].numpy(), np.ones((4, 4), dtype=np.uint8))).all()
    generate.main([*command, "--no-texts", "--out", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 112 + 3, 2 * 112 + 3)


@pytest.mark.parametrize(("size", "count", "scale"), [(28, 2, 3), (32, 2, 2), (63, 2, 2), (64, 2, 1), (200, 2, 1), (28, 1, 1)])
def test_small_images_are_enlarged_in_one_picture_of_several(tmp_path, size, count, scale):
    """To 64 pixels at least; not in files of their own."""
    images = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8)
    write_images(tmp_path / "sheet.png", images)
    assert (tmp_path / "sheet.png").read_bytes() == tiled(enlarged(images, scale), 1)
    write_images(tmp_path / "apart", images)
    with Image.open(tmp_path / "apart" / "00000.png") as made:
        assert made.size == (size, size)


def test_pictures_of_an_earlier_draw_in_a_folder_are_said_and_kept(tmp_path, capsys):
    images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    write_images(tmp_path / "drawn", images)
    for own in ("holiday.png", "2026.png"):
        (tmp_path / "drawn" / own).write_bytes(b"my own")
    write_images(tmp_path / "drawn", images)
    assert capsys.readouterr().out == ""
    write_images(tmp_path / "drawn", images[:2])
    assert "still holds 3 pictures of an earlier draw, from 00002.png to 00004.png: delete them" in capsys.readouterr().out
    assert len([*(tmp_path / "drawn").iterdir()]) == 7


def test_a_picture_that_was_not_drawn_is_not_replaced(run, tmp_path):
    asked = [str(run.folder), "--device", "cpu", "--out", str(tmp_path), "--count"]
    Image.new("RGB", (8, 8)).save(tmp_path / "00003.png")
    before = (tmp_path / "00003.png").read_bytes()
    with pytest.raises(UserError, match="holds 00003.png, which was not drawn and would be lost: name another folder"):
        generate.main([*asked, "4"])
    assert (tmp_path / "00003.png").read_bytes() == before and len([*tmp_path.iterdir()]) == 1
    for _ in range(2):
        generate.main([*asked, "3"])
    assert (tmp_path / "00003.png").read_bytes() == before and len([*tmp_path.glob("*.png")]) == 4


def test_the_label_of_each_image_stands_below_it_in_one_picture(run, model, tmp_path):
    labels = model.conditions(4, seed=2)
    assert len({*labels}) > 1 and torch.equal(model.sample(4, label=labels, seed=2), model.sample(4, seed=2))
    assert model.conditions(2, label=3) == ["3", "3"]
    asked = [str(run.folder), "--count", "4", "--seed", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    generate.main(asked)
    assert (tmp_path / "x.png").read_bytes() == tiled(enlarged(model.sample(4, seed=2), 3), 2, labels)
    generate.main([*asked, "--label", "1"])
    assert (tmp_path / "x.png").read_bytes() == tiled(enlarged(model.sample(4, seed=2, label="1"), 3), 2, ["1"] * 4)
    generate.main([*asked, "--prior", "standard"])
    assert (tmp_path / "x.png").read_bytes() == tiled(enlarged(model.sample(4, seed=2, prior="standard"), 3), 2)


def test_a_model_leaves_the_random_state_of_its_caller_alone(run):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = TwoStage.open(run.folder, "cpu")
    images = model.sample(2, pixels="sample")
    model.sample(2, prior="mixture")
    model.decode(model.encode(images))
    model.log_likelihood(images, samples=2)
    model.score(images)
    model.complete(images[0], count=1, particles=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_of_any_width_are_decoded_and_those_of_other_lengths_refused():
    model = TwoStage.open("fashion-vqvae2", "cpu")
    coarse, fine = model.encode(model.sample(3))
    assert torch.equal(model.decode([coarse.int(), fine.short()]), model.decode([coarse, fine]))
    for levels in ([coarse, fine[:2]], [coarse[:2], fine]):
        with pytest.raises(UserError, match="a level of latents has the shape"):
            model.decode(levels)


def test_a_bound_with_a_backbone_in_bfloat16_is_near_that_in_float32():
    exact, rounded = (TwoStage.open("mnist5k", "cpu", dtype) for dtype in ("float32", "bfloat16"))
    images = exact.sample(4)
    nats, other = (model.log_likelihood(images, samples=2, label="3") for model in (exact, rounded))
    assert not torch.equal(nats, other) and (nats - other).abs().max() < 5


def test_each_image_has_its_own_label(model):
    mixed = model.sample(4, label=["0", 3, "0", "2"], seed=1, temperature=0.5)
    for label in (0, 2, 3):
        alone = model.sample(4, label=label, seed=1, temperature=0.5)
        same = [torch.equal(one, other) for one, other in zip(mixed, alone)]
        assert same == [name == label for name in (0, 3, 0, 2)]


def test_latents_go_there_and_back(model):
    images = model.sample(3, seed=0)
    latents = model.encode(images)
    assert [tuple(level.shape[1:]) for level in latents] == [spec.shape for spec in model.specs]
    again = model.decode(latents)
    assert again.shape == images.shape and again.dtype == torch.uint8
    assert torch.equal(again, model.autoencoder.render(model.autoencoder.mean(model.autoencoder.encode(images))))
    again[0] = latents[0][0].sum()  # no tensors of the inference mode


def test_the_likelihood_without_a_label_is_of_the_mixture_over_labels(model):
    images = model.sample(6, seed=0)
    prior = model.prior("learned")
    frequencies = prior.condition.frequencies
    with torch.no_grad():
        levels = model.encode(images)
        each = torch.stack([prior.log_prob(levels, torch.full((6,), label)) for label in range(4)])
        torch.manual_seed(5)
        told = draws(model.autoencoder, images, 1, {"learned": prior.log_prob}, torch.full((6,), 2))
    by_label = torch.stack([model.log_likelihood(images, 1, label=label, seed=5) for label in range(4)])
    assert torch.allclose(by_label[2], elbo(told.log_weights("learned")))
    assert not torch.allclose(each[0], each[1])
    mixture = (by_label + frequencies.log()[:, None]).logsumexp(0)  # the same z, so the mixture over labels is that of the bounds
    assert torch.allclose(model.log_likelihood(images, 1, seed=5), mixture, rtol=1e-4)
    state = torch.get_rng_state()
    several = model.log_likelihood(images, 8)
    assert several.shape == (6,) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(several, model.log_likelihood(images, 8))
    assert model.log_likelihood(images, prior="standard").isfinite().all()


def test_a_picture_is_completed_from_a_tensor_as_from_a_file(run, model, tmp_path):
    (picture,) = model.sample(1, seed=0)
    keep = torch.zeros(28, 28, dtype=torch.bool)
    keep[:14] = True
    made = model.complete(picture, keep, 2, particles=4, seed=1)
    assert made.shape == (2, 1, 28, 28) and torch.equal(made, model.complete(picture, "top-half", 2, particles=4, seed=1))
    assert not torch.equal(*made)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda model: model.sample(0), "count is a whole number from 1 up, not 0"),
        (lambda model: model.sample(2, batch_size=0), "batch_size is a whole number from 1 up, not 0"),
        (lambda model: model.complete(model.sample(1)[0], count=0), "count is a whole number from 1 up, not 0"),
        (lambda model: model.complete(model.sample(1)[0], particles=0), "particles is a whole number from 1 up, not 0"),
        (lambda model: model.sample(2, label=["1", "2", "3"]), "3 labels for 2 images"),
        (lambda model: model.sample(2, label=7), "no label number 7; labels are numbers from 0 to 3"),
        (lambda model: model.sample(2, label="1", caption="a 1"), "a label or a caption, not both"),
        (lambda model: model.sample(2, caption="a 1"), "takes no caption; it takes a label"),
        (lambda model: model.sample(2, prior="standard", label="1"), "the standard prior takes neither"),
        (lambda model: model.sample(2, prior="no such prior", label="1"), "takes neither"),  # said before one is fitted
        (lambda model: model.sample(2, prior="standrad"), "did you mean 'standard'"),
        (lambda model: model.sample(2, temperature=-1), "a temperature is 0 or more"),
        (lambda model: model.sample(2, top_k=3), "these latents are continuous: set a temperature instead"),
        (
            lambda model: model.encode(torch.zeros(2, 1, 28, 28)),
            "images are uint8, of shape .N, 1, 28, 28., not .*float32",
        ),
        (lambda model: model.encode(torch.zeros(1, 28, 28, dtype=torch.uint8)), "images are uint8"),
        (lambda model: model.decode([]), "a list of 1 tensor, one for each level, not 0"),
        (lambda model: model.decode([torch.zeros(2, 1, 7, 7)]), r"has the shape \(2, 4, 7, 7\), not"),
        (lambda model: model.complete(model.sample(1)[0], torch.ones(28, 28, dtype=torch.bool)), "all of the picture is kept"),
        (lambda model: model.complete(torch.zeros(1, 28, 28, dtype=torch.uint8), torch.ones(28, 28)), "boolean, .28, 28., not"),
        (lambda model: model.log_likelihood(model.sample(1), 0), "samples is a whole number from 1 up, not 0"),
        (lambda model: model.sample(2.5), "count is a whole number from 1 up, not 2.5"),
        (lambda model: model.sample("2"), "count is a whole number from 1 up, not '2'"),
        (lambda model: model.sample(2, seed=0.5), "the seed is a whole number, not 0.5"),
        (lambda model: model.sample(2, seed=None), "the seed is a whole number, not None"),
        (lambda model: model.sample(2, pixels="mode"), "no way to draw pixels 'mode' .* There are: mean, sample"),
        (lambda model: model.sample(2, prior=None), "a prior is asked for by its name, not by None"),
        (lambda model: model.sample(2, temperature="1"), "temperature is a number, not '1'"),
        (lambda model: model.sample(2, guidance=None), "guidance is a number, not None"),
        (lambda model: model.sample(2, keep_best="half"), "keep_best is a number, not 'half'"),
        (lambda model: model.sample(2, label=True), "a label is a name or a number, not True"),
        (lambda model: model.sample(2, label=[1, None]), "a label is a name or a number, not None"),
        (lambda model: model.sample(2, label=1.0), "a label is a name or a number, not 1.0"),
        (lambda model: model.sample(2, label={1, 2}), "a label is a name or a number, not {1, 2}"),
        (lambda model: model.conditions(-1), "count is a whole number from 1 up, not -1"),
        (lambda model: model.conditions(2, caption="a 1"), "takes no caption; it takes a label"),
        (lambda model: model.encode([torch.zeros(1, 28, 28)]), "images are a tensor of uint8, .*, not a list of Tensor"),
        (lambda model: model.score(None), "images are a tensor of uint8, .*, not None"),
        (lambda model: model.score(torch.zeros(0, 1, 28, 28, dtype=torch.uint8)), "there are no images"),
        (lambda model: model.log_likelihood("a.png"), "images are a tensor of uint8, .*, not str"),
        (lambda model: model.log_likelihood(torch.zeros(0, 1, 28, 28, dtype=torch.uint8)), "there are no images"),
        (lambda model: model.decode(None), "latents are a list of 1 tensor, one for each level, not None"),
        (lambda model: model.decode(torch.zeros(1, 4, 7, 7)), "latents are a list of 1 tensor, .*, not Tensor"),
        (lambda model: model.decode([np.zeros((1, 4, 7, 7))]), "latents are a list of 1 tensor, .*, not a list of ndarray"),
        (
            lambda model: model.complete(Image.new("L", (28, 28))),
            "a picture is a tensor, uint8 .1, 28, 28., or a file, not Image",
        ),
        (lambda model: model.complete(model.sample(1)[0], None), "what is kept is a boolean tensor, .28, 28., .*, not None"),
        (lambda model: TwoStage.open(model.run.folder, dtype="float16"), "no precision 'float16' - did you mean"),
        (lambda model: TwoStage.open(model.run.folder, torch.device("cuda:7")), "no device 'cuda:7' - did you mean 'cuda'"),
        (lambda model: TwoStage.open("no such run"), "there is no run 'no such run'"),
        (lambda model: TwoStage.train(model.run.config), "give the run one"),
    ],
)
def test_a_mistake_is_one_sentence(model, ask, says):
    with pytest.raises(UserError, match=says):
        ask(model)


def test_labels_are_taken_from_arrays_and_tensors(model):
    wanted = model.sample(2, label=[1, 2], seed=3)
    for labels in (np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), torch.tensor(2)], ("1", "2"), range(1, 3)):
        assert torch.equal(model.sample(np.int64(2), label=labels, seed=np.int64(3)), wanted)
    for label in (np.int64(1), torch.tensor(1)):
        assert model.conditions(2, label=label) == ["1", "1"]


def test_train_goes_on_with_a_run_and_compare_gives_its_comparison(run, small_data, monkeypatch):
    """A finished run is not trained again; the comparison is that of the command, as data."""
    monkeypatch.chdir(run.folder.parent)
    again = TwoStage.train(run.config, f"./{run.folder.name}")
    assert torch.equal(again.sample(2), TwoStage.open(run.folder).sample(2))
    with pytest.raises(UserError, match="seed: 0 in the run, 5 asked for"):
        TwoStage.train(run.config, f"./{run.folder.name}", settings={"seed": 5})
    comparison = again.compare()
    assert comparison.priors.keys() >= {"standard", "gaussian", "mixture", "learned"} and comparison.images == 120
    assert again.compare() == comparison and (run.folder / "compare/page.html").is_file()


def test_what_a_model_is_can_be_read(model):
    assert repr(model).endswith("images 1×28×28, latents 4×7×7, conditioned on the label)")
    assert model.labels == ["0", "1", "2", "3"] and model.priors == [*baselines(model.specs), "learned"]
    assert model.prior("learned") is model.prior()
    shown = "".join(str(inspect.signature(vars(TwoStage)[name])) for name in ("sample", "log_likelihood", "prior"))
    assert "prior: str = " in shown and "Annotated" not in shown, "what help() shows is for people"
    assert "maps" not in repr(model.score(model.sample(1))), "which are long"
    assert vars(Sampling()).keys() <= TwoStage.sample.__kwdefaults__.keys()
