"""The benchmarks run, and write the rows they promise. Their speeds are not tested."""

import json
import subprocess
import sys

import pytest
import torch

from pipelines import benchmark
from pipelines.benchmarks import device
from pipelines.console import UserError
from pipelines.judging import scores


def test_training(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "BATCH", 20)
    benchmark.main(["training", "--repeats", "1", "--json", str(tmp_path / "b.json"), "--device", "cpu"])
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["part"] for row in rows] == ["stage 1", "encoding", "stage 2", "scoring"]
    assert rows[3]["ratio_without_decoder"] > 0
    assert all(row["images_per_s"] > 0 and row["bare_images_per_s"] > 0 and row["ratio"] > 0 for row in rows)
    for row in (rows[0], rows[2]):
        assert row["checkpoint_bytes"] > 10**6 and row["checkpoint_s"] > 0


def test_data(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    small = ["--images", "1000", "--folder", str(made), "--repeats", "1", "--steps", "1", "--device", "cpu"]
    benchmark.main(["data", *small, "--json", str(tmp_path / "b.json")])
    (row,) = json.loads((tmp_path / "b.json").read_text())
    assert row["images"] == 1000 and row["training_images"] == 855 and row["ratio"] > 0 and row["first_batch_s"] > 0
    assert min(row["resident_bytes"]) > 0 and list(made.iterdir()) == []
    shards = ["--source", "shards", "--images", "1000", "--folder", str(made), "--size", "16", "--steps", "0", "--device", "cpu"]
    benchmark.main(["data", *shards, "--json", str(tmp_path / "s.json")])
    (row,) = json.loads((tmp_path / "s.json").read_text())
    assert (row["source"], row["size"], row["training_images"]) == ("shards", 16, 855) and list(made.iterdir()) == []
    assert min(row["index_making_cpu_s"], row["index_reading_cpu_s"]) > 0 and 50 < row["bytes_a_sample"] < 10_000


def test_sampling(tmp_path):
    small = ["--grid", "3x4", "--batch", "2", "--threads", "1", "--growth", "2", "4", "--repeats", "1", "--device", "cpu"]
    benchmark.main(["sampling", *small, "--json", str(tmp_path / "b.json")])
    row, growth = json.loads((tmp_path / "b.json").read_text())
    assert row["grid"] == "3x4" and row["batch"] == 2 and row["full_loop_extrapolated"]
    assert row["forward_s"] > 0 and row["ratio"] > 0 and row["sample_peak_bytes"] > 0
    assert len(growth["seconds"]) == 2


def test_metrics(tmp_path):
    small = ["--images", "30", "--features", "4", "--training", "50"]
    benchmark.main(["metrics", *small, "--json", str(tmp_path / "b.json")])
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["part"].split(",")[0] for row in rows] == ["fd", "kid", "nearest training image"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 and row["resamples"] == 100 for row in rows)


@pytest.fixture
def one_process(monkeypatch):
    """The parts of benchmark device on one preset, all in this process, which is no longer connected with itself afterwards."""
    monkeypatch.setattr(device, "PRESETS", ("cifar10-givt",))
    monkeypatch.setattr(device, "BACKBONES", ("transformer", "nonsense"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)

    def run(command, stderr, timeout):
        benchmark.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    yield
    torch.distributed.destroy_process_group()


def test_device(tmp_path, one_process, capsys):
    file = tmp_path / "b.json"
    benchmark.main(["device", "--small", "--run", "mnist5k-2d", "nowhere", "--device", "cpu", "--json", str(file)])
    about, *rows = json.loads(file.read_text())
    assert about["device"] == "cpu" and [*dict.fromkeys(row["part"] for row in rows)] == [*device.PARTS]
    failed = [row for row in rows if "error" in row]
    assert {row.get("backbone", row.get("run")) for row in failed} == {"nonsense", "nowhere"}
    said = capsys.readouterr().out
    assert all("Traceback" in row["traceback"] and f"failed: {row['error']}" in said for row in failed)
    trained = [row for row in rows if "preset" in row]
    assert all(row["images_per_s"] > 0 and row["peak_bytes"] > 0 for row in trained)
    by_part = {(row["part"], row.get("strategy"), row["stage"]): row["losses"] for row in trained}
    assert by_part["sharded", "FSDP", 2] == pytest.approx(by_part["sharded", "without", 2], rel=1e-4)
    assert by_part["compiled", None, 1] == by_part["training", None, 1]
    assert [row["same"] for row in rows if "same" in row] == [1.0]
    assert all(row["ratio"] > 0 for row in rows if row["part"] == "sampling" and row not in failed)


def test_a_part_of_device_that_ends_early_leaves_what_it_wrote(tmp_path, monkeypatch):
    def run(command, stderr, timeout):
        with open(command[command.index("--json") + 1], "w") as file:
            json.dump([{"part": command[command.index("--part") + 1], "error": "first"}], file)
        if "sampling" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        stderr.write(b"what went before\nthe last line\n")
        return subprocess.CompletedProcess(command, -9)

    monkeypatch.setattr(subprocess, "run", run)
    command = ["device", "--part", "training", "sampling", "--minutes", "3", "--device", "cpu"]
    benchmark.main([*command, "--json", str(tmp_path / "b.json")])
    errors = [row.get("error") for row in json.loads((tmp_path / "b.json").read_text())]
    assert errors == [None, "first", "exit code -9: the last line", "first", "not finished after the 3 minutes of --minutes"]


BAD = [
    ("device --part sample", "there is no part 'sample' - did you mean 'sampling'"),
    ("metrics --images 64", "a covariance needs more images than features"),
    ("metrics --size 30", "--size is a multiple of 32 from 32 up"),
    ("metrics --features 0", "--features is a number from 1 up"),
    ("data --images 10", "--images is a number from 1000 up"),
    ("data --size 0", "--size is a number from 1 up"),
    ("data --size 30", "divisible by 4"),
    ("data --repeats 0", "--repeats is a number from 1 up"),
    ("data --steps -1", "--steps is a number from 0 up"),
    ("data --folder nowhere", "--folder is a folder that is there"),
    ("sampling --growth 0 2", "--growth is a number from 1 up, not 0"),
    ("sampling --grid 8", "a grid is HxW"),
    ("sampling --grid 8x8 --batch 1 2", "--batch needs one number"),
    ("training --repeats 0 --preset mnist5k", "--repeats is a number from 1 up"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_one_sentence(arguments, says):
    with pytest.raises(UserError, match=says):
        benchmark.main([*arguments.split(), "--device", "cpu"] if not arguments.startswith("metrics") else arguments.split())


def test_without_webdataset_the_extra_is_named_before_files_are_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.writer", None)
    with pytest.raises(UserError, match=r"\[webdataset\]"):
        benchmark.main(["data", "--source", "shards", "--images", "1000", "--folder", str(tmp_path), "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []
