"""Encoded posteriors in several files: the same as in one, written part by part, read where they are used."""

import math
import sys

import pytest
import torch

from pipelines.console import UserError
from pipelines.runs import latents as latents_module
from pipelines.runs import phases
from pipelines.runs.dataset import write_facts
from pipelines.runs.latents import encode, training_latents
from pipelines.runs.parts import load_autoencoder, new_autoencoder, specs_of
from pipelines.runs.recipes import preset
from pipelines.runs.run import Run
from pipelines.training.fit import fit
from stage2_prior import latents
from stage2_prior.latents import Joined, LatentDataset
from tests.parts import shrunk, small_splits, trained_run


@pytest.mark.parametrize("lengths", [(5, 1, 4), (10,), (3, 3, 3, 1)])
def test_joined_tensors_are_indexed_as_one(lengths):
    whole = torch.randn(10, 2, 3)
    joined = Joined([*whole.split(lengths)])
    assert len(joined) == 10
    for indices in (
        slice(None),
        slice(2, 8),
        slice(-3, 20),
        slice(8, 2),
        slice(None, None, 3),
        torch.tensor([9, 0, 4, 4, 5]),
        torch.tensor([], dtype=torch.int64),
    ):
        assert torch.equal(joined[indices], whole[indices])


def test_a_slice_of_joined_tensors_needs_no_memory_for_the_rest():
    rows = 10**15  # whose numbers fit in no memory
    joined = Joined([torch.zeros(1).expand(rows), torch.ones(1).expand(rows)])
    assert joined[rows - 2 : rows + 1].tolist() == [0, 0, 1]


@pytest.mark.parametrize("told", [True, False])
def test_two_data_sets_added_are_one(told):
    levels = [{"codes": torch.randint(9, (10, 2, 2))}, {"mean": torch.randn(10, 3, 4, 4), "std": torch.rand(10, 3, 4, 4)}]
    contexts = torch.arange(10) if told else None
    split_levels = [{name: Joined([*tensor.split(3)]) for name, tensor in level.items()} for level in levels]
    both = LatentDataset(levels, contexts) + LatentDataset(split_levels, contexts)
    indices = torch.tensor([19, 3, 10, 0, 12, 13])
    assert len(both) == 20
    for level, found in zip(levels, both.posteriors(indices)):
        assert found.keys() == level.keys() and all(torch.equal(found[name], level[name][indices % 10]) for name in level)
    assert both.contexts is None if not told else torch.equal(both.contexts[indices], indices % 10)
    with pytest.raises(ValueError, match="one common, positive length"):
        LatentDataset(levels, torch.arange(10)) + LatentDataset(levels)


def test_statistics_of_too_many_posteriors_are_of_some_evenly_spaced(monkeypatch):
    codes = torch.arange(100)[:, None, None].expand(100, 2, 2)
    dataset = LatentDataset([{"codes": Joined([*codes.split(30)])}])
    assert torch.equal(dataset.subsample()[0]["codes"], codes)
    monkeypatch.setattr(latents, "SAMPLE_BYTES", 100 * 4 * 8 // 5)
    assert dataset.subsample()[0]["codes"][:, 0, 0].tolist() == list(range(0, 100, 5))


class Killed(Exception):
    pass


def test_many_latents_lie_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "ENCODING_BATCH", 10)
    splits = small_splits((1, 28, 28), 4)
    config = shrunk(preset("mnist5k"))
    run = Run.create(tmp_path / "run", config, "cpu")
    write_facts(run, splits)
    autoencoder, folder = new_autoencoder(run, splits.image_shape), run.folder / "latents"
    fit(run.fabric, autoencoder, splits.train, splits.validation, config.stage1, config.seed, run.folder / "stage1", "stage 1")
    one = encode(run, autoencoder, splits.train, "train")
    everything = one.posteriors(slice(None))
    assert len(everything[0]["mean"]) == 114 and (folder / "stage1-train.safetensors").is_file()
    if sys.platform == "linux":
        assert str(folder / "stage1-train.safetensors") in open("/proc/self/maps").read(), "read into memory, not mapped"

    # Room for 30 images in each file; killed while the third of four is made.
    (spec,) = specs_of(autoencoder)
    monkeypatch.setattr(latents_module, "SHARD_BYTES", 8 * spec.dimensions * 30)
    encode_images, count = type(autoencoder).encode, 0

    def counted(self, images):
        nonlocal count
        count += 1
        if count == 8:
            raise Killed
        return encode_images(self, images)

    monkeypatch.setattr(type(autoencoder), "encode", counted)
    with pytest.raises(Killed):
        encode(run, autoencoder, splits.train, "train")
    names = [f"stage1-train-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert [path.name for path in sorted(folder.glob("stage1-train-*"))] == names[:2]
    several = encode(run, autoencoder, splits.train, "train")
    assert count == 8 + 12 - 6  # the first two were kept
    assert sorted(path.name for path in folder.glob("stage1-train*")) == names

    def same(dataset: LatentDataset) -> None:
        for indices in (slice(None), torch.randperm(114)[:16]):
            for name, tensor in dataset.posteriors(indices)[0].items():
                assert torch.equal(tensor, everything[0][name][indices])

    same(several)
    same(training_latents(run, [spec]))
    batches = []
    for dataset in (one, several):
        torch.manual_seed(0)
        batches.append(dataset[torch.tensor([100, 3, 50])])
    assert torch.equal(batches[0][0][0], batches[1][0][0]) and torch.equal(batches[0][1], batches[1][1])

    path = folder / names[1]
    path.write_bytes(path.read_bytes()[:-9])
    same(encode(run, autoencoder, splits.train, "train"))
    path.unlink()
    with pytest.raises(UserError, match="not all of it"):
        training_latents(run, [spec])
    same(encode(run, autoencoder, splits.train, "train"))
    fewer = splits.train.subset(torch.arange(25))
    assert len(encode(run, autoencoder, fewer, "train")) == 25
    assert [path.name for path in folder.glob("stage1-train*")] == ["stage1-train.safetensors"]


@pytest.mark.parametrize(("name", "shown"), [("mnist5k", ["N(0, I)", "Gaussian"]), ("mnist5k-vqvae", ["uniform", "unigram"])])
def test_stage_2_is_shown_beside_the_losses_of_baselines_on_the_same_held_out_latents(tmp_path, monkeypatch, name, shown):
    found = {}

    def fitting(fabric, model, train, held_out, *arguments, beside=dict, **options):
        found.update(beside(), latents=held_out)  # of stage 2, which comes last
        return fit(fabric, model, train, held_out, *arguments, **options)

    monkeypatch.setattr(phases, "fit", fitting)
    run = trained_run(tmp_path, name)
    specs, held_out = specs_of(load_autoencoder(run)), found.pop("latents")
    assert list(found) == shown
    if specs[0].vocabulary:
        assert found["uniform"] == pytest.approx(specs[0].dimensions * math.log(specs[0].vocabulary))
    else:
        (posterior,) = held_out.subsample()
        expected = 0.5 * (posterior["mean"].square() + posterior["std"].square() + math.log(2 * math.pi))
        assert found["N(0, I)"] == pytest.approx(float(expected.flatten(1).sum(1).mean()), rel=0.02), "one draw for each image"
    assert found[shown[1]] < found[shown[0]]
