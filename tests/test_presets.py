"""Every preset end to end, in process, shrunk, on a small data set: of few and smaller images, with as many channels."""

import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import compare as compare_module
from pipelines import generate
from pipelines.console import UserError
from pipelines.data.folder import Folder
from pipelines.data.images import ImageSet, Mirrored, Splits
from pipelines.judging.comparison import from_dict as comparison_from_dict
from pipelines.judging.comparison import read_comparison
from pipelines.judging.comparison import to_dict as comparison_to_dict
from pipelines.judging.features import feature_space
from pipelines.judging.quality import nearest_neighbours
from pipelines.judging.tradeoffs import best_of
from pipelines.pages.report import is_of
from pipelines.runs import latents as latents_module
from pipelines.runs import phases
from pipelines.runs.config import RunConfig, read_config, replaced
from pipelines.runs.config import to_dict as config_to_dict
from pipelines.runs.dataset import load_data
from pipelines.runs.latents import encode, training_latents
from pipelines.runs.names import PRIORS
from pipelines.runs.parts import load_autoencoder, specs_of, weights_of
from pipelines.runs.recipes import parts_of, preset
from pipelines.runs.run import CHECKPOINTS, Run
from pipelines.train_all import parse, train_all
from pipelines.training import checkpoints
from pipelines.training.fit import fit
from stage1_vae import bottlenecks
from stage2_prior.autoregressive import AutoregressivePrior
from stage2_prior.baselines import CODE_BASELINES, CONTINUOUS_BASELINES
from stage2_prior.sampling import AS_FITTED
from tests.parts import compared, shrunk, small_splits

LISTING = Path(__file__).parent.parent / "checkpoints" / "README.md"
README = Path(__file__).parents[1] / "README.md"
NAMED = json.loads((Path(__file__).parent / "presets.json").read_text())
NEW = ["folder-givt", "cifar10-dalle", "mnist5k-vqvae2"]  # of the combinations that have come since
IMAGES = 140  # half of them for the test: few more than a Fréchet distance needs


def images_of(name: str) -> tuple[int, int, int]:
    return (1, 20, 20) if parts_of(name)[0] in ("mnist5k", "mnist", "fashion-mnist") else (3, 16, 16)


def splits_of(name: str, classes: int = 4) -> Splits:
    return small_splits(images_of(name), classes, IMAGES)


def train(name: str, config: RunConfig, monkeypatch, classes: int = 4, through=train_all) -> Run:
    splits = splits_of(name, classes)
    monkeypatch.setattr(type(config.data), "load", lambda self, report=None: splits)
    run = Run.create(CHECKPOINTS / name, config, "cpu")
    through(run)
    return run


def first_of_alike(names: list[str]) -> list[str]:
    """Of presets that are the same once they are shrunk, but for the data set, the first: those of the others repeat it."""
    found: dict[str, str] = {}
    for name in names:
        config = config_to_dict(shrunk(preset(name))) | {"data": images_of(name), "metrics": None}
        found.setdefault(json.dumps(config), name)
    return [*found.values()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A shrunk run of mnist5k with its comparison, which tests take copies of."""
    with pytest.MonkeyPatch.context() as patch:
        config = shrunk(preset("mnist5k"))
        patch.setattr(type(config.data), "load", lambda self, report=None: splits_of("mnist5k"))
        run = Run.create(tmp_path_factory.mktemp("finished") / "checkpoints" / "mnist5k", config, "cpu")
        train_all(run)
    return run


def copied(finished: Run, monkeypatch, folder: Path = CHECKPOINTS / "mnist5k") -> Run:
    """With what lies beside it, the classifiers."""
    monkeypatch.setattr(type(finished.config.data), "load", lambda self, report=None: splits_of("mnist5k"))
    shutil.copytree(finished.folder.parent, folder.parent)
    (folder.parent / finished.folder.name).rename(folder)
    return Run.create(folder, finished.config, "cpu")


@pytest.mark.parametrize("name", first_of_alike([*NAMED, *NEW]))
def test_end_to_end(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = train(name, shrunk(preset(name)), monkeypatch)
    metrics = json.loads((run.folder / "compare" / "metrics.json").read_text())
    discrete = "codes" in metrics
    known = [name for name in PRIORS if name not in (CONTINUOUS_BASELINES if discrete else CODE_BASELINES) or name == "standard"]
    tuned, best = metrics["priors"].pop("tuned", None), best_of(comparison_from_dict(metrics).sampling)
    assert (tuned is not None) == bool(best and best.sampling != AS_FITTED)
    assert set(metrics["priors"]) == set(known)
    if not run.learned:
        assert "stage2.steps 0" in metrics["priors"].pop("learned")["note"]
        known.remove("learned")
        with pytest.raises(UserError, match="no learned prior.*--prior standard"):
            generate.main([name, "--device", "cpu"])
    for row in (metrics["real"], metrics["reconstruction"], *metrics["priors"].values()):
        assert np.isfinite(row["fd"]) and row["fd"] > 0
    assert all(np.isfinite(row["nll"]) for name, row in metrics["priors"].items() if name != "posterior")
    assert "not a generator" in metrics["priors"]["posterior"]["note"]
    assert "gap_closed" in metrics and metrics["images"] == IMAGES // 2
    assert (run.folder / "compare" / "samples.png").stat().st_size > 1000
    made = {path.name for path in run.folder.iterdir()}
    assert made <= set(re.findall(r"^(?:RUN/|    )([\w.]+)", LISTING.read_text(), re.MULTILINE))
    capsys.readouterr()

    train(name, run.config, monkeypatch)
    phases = 1 + run.learned + (run.config.refine is not None)
    assert capsys.readouterr().out.count("skipped") == phases + 1

    for prior in known:
        generate.main([name, "--prior", prior, "--count", "5", "--out", f"{prior}.npz", "--device", "cpu"])
        images = np.load(tmp_path / f"{prior}.npz")["arr_0"]
        channels, height, width = images_of(name)
        assert images.shape == (5, height, width, channels) and images.dtype == np.uint8


@pytest.mark.parametrize("name", ["mnist5k", "mnist5k-vqvae", "fashion-dalle"])
def test_priors_are_fitted_to_mirror_images(name, tmp_path, monkeypatch):
    """Stage 2 has the latents of both, under the same condition. Stage 1, and what samples are measured by, are not mirrored.

    The comparison is made for one of them: it does not look at what the latents are.
    """
    monkeypatch.chdir(tmp_path)
    seen = {}

    def watched(fabric, model, examples, held_out, config, seed, folder, label, **rest):
        seen[label] = examples
        return fit(fabric, model, examples, held_out, config, seed, folder, label, **rest)

    monkeypatch.setattr("pipelines.runs.phases.fit", watched)
    through = train_all if name == "mnist5k" else phases.train
    run = train(name, dataclasses.replace(shrunk(preset(name)), mirror=True), monkeypatch, through=through)
    images, autoencoder = load_data(run).train, load_autoencoder(run)
    assert not isinstance(seen["stage 1"], Mirrored) and seen["stage 1"].images is images.images
    latents, count = seen["stage 2"], len(images)
    assert len(latents) == 2 * count and torch.equal(latents.contexts[:count], latents.contexts[count:])
    for half, shown in ((slice(None, count), images.images), (slice(count, None), images.images.flip(-1))):
        expected = encode(run, autoencoder, ImageSet(shown, images.labels), f"{half.start}").posteriors(slice(None))
        for found, level in zip(latents.posteriors(half), expected):
            assert all(torch.equal(found[name], tensor) for name, tensor in level.items())
    assert len(training_latents(run, specs_of(autoencoder))) == 2 * count

    if name != "mnist5k":
        return
    # What is copied may be copied from either.
    metrics = json.loads((run.folder / "compare" / "metrics.json").read_text())
    space = feature_space(run.fabric, run.config.metrics, load_data(run), run.classifiers)
    either = torch.cat([space.reference[:], space.features(images.images.flip(-1), "flipped")])
    distances, _ = nearest_neighbours(space.features(load_data(run).test.images, "test"), either)
    assert metrics["real"]["distance_to_training"] == pytest.approx(float(distances.median()))


def test_samples_do_not_depend_on_the_batch_size(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied(finished, monkeypatch)
    for prior in (*CONTINUOUS_BASELINES, "posterior", "learned"):
        rows = []
        for batch in ("7", "3"):
            generate.main(
                ["mnist5k", "--prior", prior, "--count", "7", "--batch-size", batch, "--out", "s.npz", "--device", "cpu"]
            )
            rows.append(np.load("s.npz")["arr_0"].astype(int))
        assert np.abs(rows[0] - rows[1]).max() <= 1
    drawn = []
    for batch in ("7", "3"):  # other batch-mates, and another place in the batch
        generate.main(
            ["mnist5k", "--count", "7", "--batch-size", batch, "--pixels", "sample", "--out", "s.npz", "--device", "cpu"]
        )
        drawn.append(np.load("s.npz")["arr_0"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 and np.abs(drawn[0] - rows[0]).max() > 1


def test_a_batch_that_does_not_fit_is_halved(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copied(finished, monkeypatch)
    rows, sample = [], AutoregressivePrior.sample
    for fits in (100, 3, 0):

        def limited(self, indices, *rest, fits=fits, **more):
            if len(indices) > fits:
                raise torch.OutOfMemoryError("out of memory")
            return sample(self, indices, *rest, **more)

        monkeypatch.setattr(AutoregressivePrior, "sample", limited)
        if fits:
            generate.main(["mnist5k", "--count", "9", "--out", "s.npz", "--device", "cpu"])
            rows.append(np.load("s.npz")["arr_0"].astype(int))
        else:
            with pytest.raises(UserError, match="not even one image fits"):
                generate.main(["mnist5k", "--count", "9", "--out", "s.npz", "--device", "cpu"])
    assert "going on with batches of 4" in capsys.readouterr().out
    assert np.abs(rows[0] - rows[1]).max() <= 1


def test_a_deterministic_bottleneck_has_no_likelihoods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = shrunk(preset("mnist5k"))
    config = dataclasses.replace(
        config, autoencoder=dataclasses.replace(config.autoencoder, bottleneck=bottlenecks.Deterministic())
    )
    run = train("mnist5k", config, monkeypatch)
    metrics = json.loads((run.folder / "compare" / "metrics.json").read_text())
    assert all("nll" not in row for row in metrics["priors"].values())


def test_without_labels_the_random_network_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train("folder", shrunk(preset("folder")), monkeypatch, classes=0)
    metrics = json.loads((run.folder / "compare" / "metrics.json").read_text())
    assert "random network" in metrics["features"]["extractor"]


def test_another_config_under_the_same_name_is_refused_with_the_difference(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = copied(finished, monkeypatch)
    other = dataclasses.replace(run.config, stage2=dataclasses.replace(run.config.stage2, batch_size=99))
    with pytest.raises(UserError, match="stage2.batch_size: 16 in the run, 99 asked for"):
        Run.create(run.folder, other)


def test_what_no_weight_depends_on_may_change_in_a_trained_run(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = copied(finished, monkeypatch)
    first, weights = read_comparison(run.folder / "compare" / "metrics.json"), weights_of(run)
    other = replaced(replaced(run.config, "metrics.images", 60), "stage2.checkpoint_steps", 4)
    capsys.readouterr()
    again = train("mnist5k", other, monkeypatch)
    said = capsys.readouterr().out
    assert all(f"{part}: finished, skipped" in said for part in ("stage 1", "stage 2")) and weights_of(again) == weights
    assert "compare: finished" not in said
    second = read_comparison(run.folder / "compare" / "metrics.json")
    assert (first.images, second.images) == (IMAGES // 2, 60) and read_config(run.folder / "config.json") == other
    splits = load_data(again)
    assert is_of(second, again, splits)
    for path, value in (("pixels", "sample"), ("classifier.steps", 5), ("weights", Path("other.pth"))):
        asked = dataclasses.replace(again, config=replaced(other, f"metrics.{path}", value))
        assert not is_of(second, asked, splits)


def test_a_comparison_of_other_settings_replaces_none(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = copied(finished, monkeypatch)
    first = (run.folder / "compare" / "metrics.json").read_text()
    compare_module.main(["mnist5k", "--seed", "3", "--metrics.images", "60", "--device", "cpu"])
    compare_module.main(["mnist5k", "--metrics.images", "60", "--device", "cpu"])
    found = {path.parent.name: read_comparison(path) for path in (run.folder / "compare").glob("*/metrics.json")}
    assert {name: (made.seed, made.images) for name, made in found.items()} == {"seed-3-60-images": (3, 60), "60-images": (0, 60)}
    assert (run.folder / "compare" / "metrics.json").read_text() == first
    assert (run.folder / "compare" / "60-images" / "page.html").is_file()


def test_a_codebook_too_large_for_the_data_is_warned_of(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = shrunk(preset("mnist-vqvae"))
    large = dataclasses.replace(config.autoencoder, bottleneck=bottlenecks.VectorQuantized(codes=20_000))
    train("mnist-vqvae", dataclasses.replace(config, autoencoder=large), monkeypatch, through=phases.train)
    assert "of 20000 codes on the 5×5 grid; a smaller codebook would do" in capsys.readouterr().out


def test_a_second_process_on_a_run_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = shrunk(preset("mnist5k"))
    first, second = (Run.create(tmp_path / "r", config, "cpu") for _ in range(2))
    with first.locked():
        with pytest.raises(UserError, match="another process is working on"), second.locked():
            pass
    with second.locked():
        pass


def test_an_unfinished_run_says_so(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run.create(tmp_path / "r", finished.config, "cpu")
    assert not run.folder.exists()
    with pytest.raises(UserError, match="unfinished: stage 1"):
        load_autoencoder(run)
    run = copied(finished, monkeypatch)
    shutil.rmtree(run.folder / "stage2")
    with pytest.raises(UserError, match="unfinished: stage 2"):
        generate.main(["mnist5k", "--device", "cpu"])


def test_the_standard_prior_needs_no_training_latents(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = copied(finished, monkeypatch)
    shutil.rmtree(run.folder / "latents")
    for prior in ("standard", "gaussian", "learned"):  # the second was fitted, and kept
        generate.main(["mnist5k", "--prior", prior, "--count", "2", "--out", f"{prior}.png", "--device", "cpu"])
    with pytest.raises(UserError, match="there is no .*stage1-train.safetensors.*train_all"):
        generate.main(["mnist5k", "--prior", "posterior", "--device", "cpu"])


@pytest.mark.parametrize(
    ("library", "name", "changes", "says"),
    [
        ("tokenizers", "fashion-dalle", {}, r"\[text\]"),
        ("torch_fidelity.feature_extractor_inceptionv3", "mnist5k", {"extractor": "inception"}, r"\[inception\]"),
        ("timm", "mnist5k", {"extractor": "dinov2"}, r"need timm: .*\[dinov2\]"),
    ],
)
def test_what_is_not_installed_is_said_before_anything_is_trained(tmp_path, monkeypatch, library, name, changes, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("it is of no use"))
    config = shrunk(preset(name))
    with pytest.raises(UserError, match=says):
        train(name, dataclasses.replace(config, metrics=dataclasses.replace(config.metrics, **changes)), monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_of_a_run_is_the_one_its_config_asks_for(finished, tmp_path, monkeypatch, capsys):
    """One made with another seed lies beside it; the hint names the run as `generate` knows it."""
    monkeypatch.chdir(tmp_path)
    config = finished.config
    for folder in (CHECKPOINTS / "named", tmp_path / "else where" / "it's a run"):
        copied(finished, monkeypatch, folder)
        first = json.loads((folder / "compare" / "metrics.json").read_text())
        compare_module.main([str(folder), "--seed", "3", "--device", "cpu"])
        assert json.loads((folder / "compare" / "seed-3" / "metrics.json").read_text())["seed"] == 3
        assert json.loads((folder / "compare" / "metrics.json").read_text()) == first
        capsys.readouterr()
        train_all(Run.create(folder, config, "cpu"))
        assert json.loads((folder / "compare" / "metrics.json").read_text()) == first
        printed = capsys.readouterr().out
        (command,) = re.findall(r"python -m pipelines.generate (.*)", printed)
        generate.main([*shlex.split(command), "--device", "cpu"])
        train_all(Run.create(folder, config, "cpu"))
        assert "compare: finished, skipped" in capsys.readouterr().out


def test_the_rows_of_the_comparison_use_the_same_images(finished, tmp_path, monkeypatch):
    """Sampling the same prior twice gives the same figure; the seed is stated."""
    monkeypatch.chdir(tmp_path)
    run = copied(finished, monkeypatch)
    first = json.loads((run.folder / "compare" / "metrics.json").read_text())
    assert comparison_to_dict(compared(run, load_data(run))) == first
    other = compared(run, load_data(run), seed=1)
    assert other.priors["learned"].fd != first["priors"]["learned"]["fd"] and other.seed == 1


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.usefixtures("small_data")
def test_very_few_held_out_images_are_compared(run, images, monkeypatch):
    """And no file of a checkpoint is hashed more than twice: once when it is written, and once when it is read."""
    hashed = []

    def counting(content=b""):
        hashed.append(content)
        return hashlib.sha256(content)

    monkeypatch.setattr(checkpoints, "hashlib", SimpleNamespace(sha256=counting))
    monkeypatch.setattr(checkpoints, "SETTLED_SECONDS", -1.0)
    checkpoints.checksum_of_state.cache_clear()
    splits = load_data(run)
    few = dataclasses.replace(splits, test=splits.test.subset(torch.arange(images)))
    comparison = compared(run, few)
    assert comparison.images == images and "fd" in comparison.withheld
    stored = {path.read_bytes() for folder in (run.folder, run.classifiers) for path in folder.rglob("step-*/*")}
    assert sum(map(len, hashed)) <= 2 * sum(map(len, stored)) and stored & {*hashed} and max(Counter(hashed).values()) <= 2


def test_the_example_of_the_readme_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(run.folder.parent)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(example, found := {})
    assert found["images"].shape == (64, 1, 28, 28) and found["images"].dtype == torch.uint8
    assert found["nats"].isfinite().all() and found["nats"].shape == (64,)


OUT_OF_RANGE = [
    "--stage1.steps 0",
    "--stage1.batch-size 0",
    "--stage2.checkpoint-steps 0",
    "--metrics.classifier.steps 0",
    "--metrics.images 0",
    "--autoencoder.bottleneck.channels 0",
    "--prior.head.components 0",
]


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused_before_anything_is_written(tmp_path, monkeypatch, override):
    name, config, _ = parse(["mnist5k", "--run", str(tmp_path / "r"), *override.split()])
    monkeypatch.setattr(type(config.data), "load", lambda self, report=None: small_splits((1, 28, 28), 4))
    with pytest.raises(UserError, match="0"):
        train_all(Run.create(Path(name), config, "cpu"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_read_from_disk_ends_in_the_figures_of_one_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits, folder = small_splits((1, 28, 28), 3), tmp_path / "images"
    for index, (image, label) in enumerate(zip(splits.train.images, splits.train.labels.tolist())):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / str(label) / f"{index}.png")
    figures, latents = [], []
    for in_memory in (1.0, 0.0):
        monkeypatch.setattr(latents_module, "SHARD_BYTES", 1 if in_memory == 0 else 2**28)
        monkeypatch.setattr(latents_module, "ENCODING_BATCH", 50)
        config = dataclasses.replace(shrunk(preset("mnist5k")), data=Folder(folder, size=28, channels=1, in_memory=in_memory))
        run = Run.create(tmp_path / f"from-{in_memory}" / "run", config, "cpu")
        train_all(run)
        figures.append(json.loads((run.folder / "compare" / "metrics.json").read_text()))
        del figures[-1]["features"]["reference"]["digest"]  # of the pixels, or of the files' names
        latents.append(len(list((run.folder / "latents").glob("stage1-train*"))))
    assert figures[0] == figures[1] and latents == [1, 2]
