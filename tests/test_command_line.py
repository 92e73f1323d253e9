"""The command line, in an empty folder: one run, and what it says of bad input. See test_wheel.py for processes of their own."""

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import pipelines.__main__ as everything
from pipelines.command_line import read_arguments
from pipelines.data.sets import EmbeddedDigits
from tests.forks import forked
from tests.parts import small_splits

SHRUNK = [
    *("--stage1.steps", "6", "--stage1.batch-size", "16", "--stage1.checkpoint-steps", "3"),
    *("--stage2.steps", "6", "--stage2.batch-size", "16", "--stage2.checkpoint-steps", "3"),
    *("--autoencoder.network.width", "8", "--autoencoder.network.blocks", "1"),
    *("--prior.backbone.width", "8", "--prior.backbone.blocks", "1", "--prior.backbone.layers", "1"),
    *("--metrics.classifier.steps", "6", "--metrics.images", "100", "--device", "cpu"),
]


def said_by(module: str, *arguments: str, cwd: Path) -> str:
    """What a command says, which is called here: another process would take seconds to begin."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.chdir(cwd)
        importlib.import_module(f"pipelines.{module}").main([*arguments])
    return output.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The folder, and what was said."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddedDigits, "load", lambda self, report=None: small_splits((1, 28, 28), 10))
        yield folder, said_by("train_all", *SHRUNK, cwd=folder)


def test_trains_and_compares(trained):
    folder, said = trained
    assert "checkpoints/mnist5k" in said and "gap closed" in said
    metrics = json.loads((folder / "checkpoints/mnist5k/compare/metrics.json").read_text())
    assert {"real", "reconstruction", "priors", "gap_closed"} <= set(metrics)
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]


def test_the_same_command_again_skips_everything(trained):
    folder, _ = trained
    assert said_by("train_all", *SHRUNK, cwd=folder).count("skipped") == 3


def test_compares_again_and_generates(trained):
    folder, _ = trained
    before = (folder / "checkpoints/mnist5k/compare/metrics.json").read_text()
    said_by("compare", "mnist5k", "--device", "cpu", cwd=folder)
    assert (folder / "checkpoints/mnist5k/compare/metrics.json").read_text() == before
    said_by("generate", "checkpoints/mnist5k", "--count", "9", "--out", "nine.npz", "--device", "cpu", cwd=folder)
    assert np.load(folder / "nine.npz")["arr_0"].shape == (9, 28, 28, 1)
    (folder / "nine.npz").unlink()


BAD = [
    (["train_all", "mnits"], "mnist"),
    (["train_all", "folder"], "--data.root"),
    (["train_all", "--run", ""], "--run names a folder"),
    (["train_all", "--run", "odd", "--stage1.learning-rate", "-1"], "learning-rate is a number above 0"),
    (["train_all", "--run", "odd", "--metrics.classifier.gradient-clip", "0"], "gradient-clip is a number above 0"),
    (
        ["train_all", "--run", "odd", "--stage2.average-decay", "1"],
        "average-decay is a number from 0 up and below 1, not 1.0",
    ),
    (["train_all", "--run", "odd", "--prior.backbone.width", "0"], "--prior.backbone.width is a number from 1 to 65,536, not 0"),
    (["train_all", "mnist5k-vqvae", "--autoencoder.bottleneck.decay", "-1"], "decay is a number from 0 up and below 1, not -1.0"),
    (["train_all", "--run", "odd", "--autoencoder.bottleneck.beta", "-1"], "--autoencoder.bottleneck.beta is a number from 0 to"),
    (["train_all", "--run", "odd", "--stage1.steps", "0"], "--stage1.steps is a number from 1 up, not 0"),
    (["train_all", "folder", "--data.root", "nowhere"], "nowhere"),
    (["train_all", "folder", "--data.root", "empty"], "holds 0 images"),
    (["train_all", "--run", "odd", "--autoencoder.network.downsample", "8"], "divisible by 8"),
    (["train_all", *SHRUNK, "--stage1.steps", "5"], "stage1.steps: 6 in the run, 5 asked for"),
    (["train_all", "--stage1.stepz", "7"], "stage1.steps"),
    (["generate", "mnist5K"], "mnist5k"),
    (["generate", "mnist5k", "--prior", "lerned"], "learned"),
    (["generate", "mnist5k", "--count", "0"], "--count"),
    (["generate", "mnist5k", "--temperature", "-1"], "temperature is 0 or more"),
    (["generate", "mnist5k", "--top-p", "0"], "top-p lies above 0"),
    (["generate", "mnist5k", "--top-k", "3"], "continuous"),
    (["generate", "mnist5k", "--label", "11"], "there is no label '11'"),
    (["generate", "mnist5k", "--caption", "a three"], "takes no caption; it takes a label"),
    (["generate", "mnist5k", "--guidance", "-2"], "guidance is 0 or more"),
    (["generate", "mnist5k", "--out", "x.jpg"], ".png or .npz"),
    (["generate", "mnist5k", "--scale", "0"], "--scale is a number from 1 up"),
    (["generate", "mnist5k", "--captions", "none.txt"], "a text file with a caption on each line, which none.txt is not"),
    (["generate", "mnist5k", "--device", "tpu"], "there is no device"),
    (["compare", "nothing"], "there is no run"),
    (["compare", "mnist5k", "--seed", str(2**64)], "--seed is a number below"),
    (["compare", "mnist5k", "--out", "x.json"], "the file of a page"),
    (["compare", "mnist5k", "checkpoints/mnist5k"], "need different names, and these are mnist5k, mnist5k: rename one"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(arguments)[:70] for arguments, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(trained, arguments, says):
    folder, _ = trained
    (folder / "empty").mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    module, *rest = arguments
    done = forked(f"pipelines.{module}", *rest, cwd=folder)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before, "something half-written was left"
    (folder / "empty").rmdir()


COMMANDS = "train_all generate compare likelihood score study benchmark export publish explore reproduce".split()
WITH_TORCH = ["generate", *(f"benchmark {name}" for name in ("training", "data", "sampling", "batches", "metrics"))]


SLOW = ["torch", "lightning_fabric", "torchvision", "scipy", "sklearn", "matplotlib", "torchmetrics", "torch._dynamo"]
HELP = """
import io, json, runpy, sys
from contextlib import redirect_stdout, suppress
slow, asked, found = json.loads(sys.argv[1]), sys.argv[2:], {}
for command in asked:
    module, *names = command.split()
    sys.argv[:] = ["x", *names, "--help"]
    with redirect_stdout(io.StringIO()) as said, suppress(SystemExit):
        runpy.run_module(f"pipelines.{module}", run_name="__main__")
    found[command] = said.getvalue(), [name for name in slow if name in sys.modules]
import pipelines.runs.pictures, pipelines.runs.priors, pipelines.runs.completion, pipelines.two_stage
found["drawing"] = "", [name for name in slow if name in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, tuple[str, list[str]]]:
    """The help of each command, and what of SLOW is imported by then, in one process: those that may import torch come last."""
    commands = sorted([*COMMANDS, *WITH_TORCH[1:]], key=lambda command: command in WITH_TORCH)
    start = [sys.executable, "-c", HELP, json.dumps(SLOW), *commands]
    done = subprocess.run(start, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("asked", [*COMMANDS, *WITH_TORCH[1:]])
def test_help_imports_little(imported, asked):
    """What takes seconds to import is not imported for it."""
    said, slow = imported[asked]
    assert set(slow) <= ({"torch"} if asked in WITH_TORCH else set())
    assert f"python -m pipelines.{asked.split()[0]}" in said and len(said) > 200


@dataclass
class Asked:
    """What a command is asked for."""

    count: int = 1
    """how many images to draw, which is said here in a sentence
    of two lines"""


def test_help_does_not_break_lines_where_the_source_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        read_arguments(Asked, "draw", ["--help"])
    assert "which is said here in a sentence of two lines (default: 1)" in capsys.readouterr().out


def test_drawing_imports_neither_metrics_nor_plots(imported):
    """They take longer to import than all that draws."""
    assert not {"torchmetrics", "torchvision", "scipy", "matplotlib", "sklearn"} & {*imported["drawing"][1]}


def test_one_command_starts_all_others(tmp_path):
    """As it is installed, two-stage COMMAND; and as a module."""
    assert {*everything.COMMANDS} == {*COMMANDS}
    installed = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'two-stage = "pipelines.__main__:main"' in installed and callable(everything.main)

    def started(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        start = [sys.executable, "-m", "pipelines", *arguments]
        return subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True)

    said = started("--help").stdout
    assert all(f"  {name}" in said for name in COMMANDS)
    done = started("train-all", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m pipelines.train_all")
    for arguments, says in ((["trian_all"], "did you mean 'train_all'"), (["compare"], "name a run to compare")):
        done = started(*arguments)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_command_starts_and_fails_as_a_process_of_its_own(trained):
    folder, _ = trained
    (_, *arguments), says = BAD[14]
    done = subprocess.run([sys.executable, "-m", "pipelines.train_all", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_run_that_is_killed_ends_as_one_that_is_not():
    """Few kills of one preset; by itself the script kills more, of several."""
    done = forked("tests.kill", "--kills", "2", "--presets", "mnist-vqvae", cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.endswith("2 of 2\n"), done.stdout + done.stderr


def test_a_damaged_checkpoint_is_named(trained):
    folder, _ = trained
    newest = sorted((folder / "checkpoints/mnist5k/stage2").glob("step-*"))[-1] / "model.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-10])
    try:
        assert str(newest.relative_to(folder)) in said_by("train_all", *SHRUNK, cwd=folder)
        assert newest.read_bytes() == content  # trained again from the one before
    finally:
        newest.write_bytes(content)
