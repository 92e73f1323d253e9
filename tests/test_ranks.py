"""Several processes against one: two that torchrun starts, connected by gloo, do the work of tests/on_ranks.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from pipelines.files import read_tensors
from pipelines.judging.comparison import to_dict
from pipelines.runs.dataset import load_data
from pipelines.runs.parts import load_autoencoder
from pipelines.runs.run import Run
from pipelines.training import checkpoints
from tests import on_ranks
from tests.parts import compared, random_latents, small_splits

ROOT = Path(__file__).parent.parent
ONE = Fabric(accelerator="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "-m", "tests.on_ranks", folder], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each of them found."""
    found = [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(of_one["processes"] == 2 for of_one in found)
    return found


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_losses_are_those_of_one_process(found):
    for name, losses in on_ranks.losses_without_draws(ONE).items():
        for of_one in found:
            assert of_one["losses"][name] == pytest.approx(losses, rel=0, abs=1e-5), name
        assert losses[-1] < losses[0], "nothing was learned"


def test_microbatches_make_the_step_of_the_whole_batch(found):
    whole = on_ranks.losses_in_microbatches(ONE, 1)
    for parts in (on_ranks.losses_in_microbatches(ONE, 4), *(of_one["microbatches"] for of_one in found)):
        for name, losses in whole.items():
            assert parts[name] == pytest.approx(losses, rel=1e-10), name


def test_all_processes_have_the_same_buffers_after_every_step(found):
    """Codebooks, revived ones too, their averages and use, statistics of normalizations, a learned σ."""
    for of_one in found:
        assert of_one["differ"] == dict.fromkeys({**on_ranks.WITHOUT_DRAWS, **on_ranks.WITH_DRAWS}, [])


def test_what_is_made_does_not_depend_on_the_number_of_processes(found):
    made = on_ranks.sampled(ONE)
    for of_one in found:
        assert all(torch.equal(made[name], of_one["sampled"][name]) for name in made)


def test_each_process_writes_latents_of_its_own(found, folder):
    torch.set_default_dtype(torch.float32)  # of the run
    name = "stage1-train-0000{}-of-00006.safetensors".format
    assert [of_one["wrote"]["first"] for of_one in found] == [[name(1), name(3), name(5), name(6)], [name(2), name(4)]]
    assert [of_one["wrote"]["again"] for of_one in found] == [[], []]
    assert [of_one["wrote"]["one gone"] for of_one in found] == [[name(3)], [name(4)]]
    several = [read_tensors(folder / "latents" / "latents" / name(number)) for number in range(1, 7)]
    run = Run.open(str(folder / "latents"), "cpu")
    (whole,) = load_autoencoder(run).encode(small_splits((1, 28, 28), 4).train.images[:11])
    assert torch.allclose(torch.cat([part["0.mean"] for part in several]), whole["mean"], atol=1e-5)


def test_processes_share_the_indexing_of_shards(found, folder, tmp_path):
    """Each shard is read once to index it, on one disk or one of each machine; the images are those of one process."""
    on_ranks.write_shards(tmp_path / "shards")
    one = on_ranks.shards_in(tmp_path / "shards").load().train
    several = [of_one["indexed"] for of_one in found]
    assert [of_one["first"]["read"] for of_one in several] == [["0.tar", "2.tar", "4.tar"], ["1.tar", "3.tar"]]
    assert [of_one["again"]["read"] for of_one in several] == [[], []]
    assert [of_one["changed"]["read"] for of_one in several] == [["0.tar"], ["3.tar"]]
    for of_one in several:
        assert sorted(of_one["two machines"]["read"]) == [f"{shard}.tar" for shard in range(on_ranks.SHARDS)]
        for case in ("first", "again", "changed", "two machines"):
            assert torch.equal(of_one[case]["images"], one.images) and torch.equal(of_one[case]["labels"], one.labels)


def test_a_shard_that_is_no_good_is_said_by_all_processes(found):
    for case, name in (("cut off", "1.tar cannot be read as a tar file"), ("gone", "NotThere: there is no shard .*1.tar")):
        said = {of_one["indexed"][case]["said"] for of_one in found}
        assert len(said) == 1 and re.search(name, said.pop())


def test_all_leave_out_a_step_that_is_not_a_number_on_one(found, tmp_path):
    left_out = on_ranks.broken(ONE, "skip")
    for of_one in found:
        assert largest_difference(left_out, of_one["skip"]) < 1e-10
        assert "test, step 3: loss is not a number" in of_one["stop"]


def test_a_signal_to_one_stops_all_and_one_process_goes_on(found, folder):
    assert (
        found[0]["stopped"] == found[1]["stopped"] == "SIGTERM: saved at test, step 13 of 20; the same command goes on from there"
    )
    assert [c.step for c in checkpoints.usable(folder / "stopped")] == [10, 13]
    resumed = on_ranks.trained(ONE, on_ranks.prior(), folder / "stopped").state_dict()
    assert largest_difference(resumed, found[0]["whole"]) < 1e-10


def test_sharded_training_is_the_same_and_its_checkpoint_is_whole(found, folder):
    for name, losses in found[0]["sharded losses"].items():
        assert losses == pytest.approx(found[0]["losses"][f"categorical prior, {name}"], rel=0, abs=1e-5), name
    model = on_ranks.prior()
    (*_, last) = checkpoints.usable(folder / "sharded")
    last.load_into(model)
    assert largest_difference(model.state_dict(), found[0]["whole"]) < 1e-10
    assert largest_difference(last.training(), checkpoints.usable(folder / "whole")[-1].training()) < 1e-10
    assert on_ranks.evaluate(ONE, model, random_latents(20, on_ranks.CODES, seed=1), 4, 0)["loss"] == pytest.approx(last.loss)


def test_a_run_of_two_processes_is_finished_for_one(folder, capsys, monkeypatch):
    monkeypatch.setattr(on_ranks.TorchvisionSet, "load", on_ranks.made)
    torch.set_default_dtype(torch.float32)
    metrics = json.loads((folder / "run" / "compare" / "metrics.json").read_text())
    run = on_ranks.run_of_codes(folder / "run")
    assert capsys.readouterr().out.count("skipped") == 3
    again = to_dict(compared(run, load_data(run)))
    assert json.loads(json.dumps(again)) == metrics
    assert (folder / "said").read_text().count("gap closed") == 1, "only one process prints"
