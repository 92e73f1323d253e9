"""python -m tests.kill --kills 50: a run that is killed at any moment ends as if it had never been.

A shrunk `train_all`, and `generate` after it, are killed (SIGKILL) at a random moment, every other time right before a random
one of their operations on files; the same commands again may be killed again, and again until they end. Then the folder must
hold the files of one that was never killed, bit for bit: weights, optimizer, latents, figures, pictures, samples. Only seconds
and times of day may differ.

Every start is a fork of this process, which has imported everything and computed nothing: a short run is mostly imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import generate, train_all
from pipelines.console import run_command
from tests.parts import cheaper_comparisons

FIT = "--{0}.steps 6 --{0}.batch-size 16 --{0}.checkpoint-steps 2 --{0}.warmup-steps 1"
SMALL = "--autoencoder.network.width 8 --autoencoder.network.blocks 1 --prior.backbone.width 8 --prior.backbone.layers 1"
STAGES = " ".join(FIT.format(part) for part in ("stage1", "stage2", "metrics.classifier"))
COMMON = f"--run run --data.root data --metrics.images 80 --device cpu --tracker csv {SMALL} {STAGES}"
PRESETS = {
    "mnist": "",
    "mnist-binary": FIT.format("refine"),
    "mnist-vqvae": "--autoencoder.bottleneck.codes 16 --stage1.no-compile --stage2.no-compile",
    "fashion-dalle": "--autoencoder.bottleneck.codes 16 --prior.condition.vocabulary 300",
}
AGAIN = 0.3  # chance that a run that was killed is killed once more
FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
ALWAYS_DIFFERENT = {"timing.json", "page.html", "checksums.json"}  # seconds, times of day, or checksums of files with such


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of MNIST: two zero bytes, 8 for uint8, the number of axes, their lengths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + b"".join(length.to_bytes(4, "big") for length in values.shape)
    path.write_bytes(header + values.tobytes())


def write_data(root: Path) -> None:
    """240 pictures of noise, 10 labels, as MNIST and as Fashion-MNIST."""
    generator = np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        for part, count in (("train", 160), ("t10k", 80)):
            write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28), np.uint8))
            write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))


def commands(preset: str) -> None:
    cheaper_comparisons(pytest.MonkeyPatch())
    train_all.main([preset, *COMMON.split(), *PRESETS[preset].split()])
    generate.main(["run", "--count", "8", "--out", "samples.npz", "--device", "cpu"])


class Start:
    """The commands in `folder`, in a process of their own; killed before its file operation number `operation`, if given."""

    def __init__(self, folder: Path, preset: str, operation: int | None = None):
        self.folder, self.log = folder, folder / "log"
        self.process = os.fork()
        if self.process:
            return
        os.chdir(folder)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        counted = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal counted
            if event in FILE_OPERATIONS and under(folder, arguments[0]):
                counted += 1
                if counted == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        code: Any = 1
        try:
            run_command(lambda: commands(preset))
            print(f"{counted} operations on files", flush=True)
            code = 0
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def end(self) -> bool:
        """Wait for it; whether it was killed. Raises AssertionError when it failed."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        assert code in (0, -signal.SIGKILL), f"ended with {code}:\n{self.log.read_text()}"
        return code != 0

    def operations(self) -> int:
        """How many of its operations were on files."""
        return int(self.log.read_text().splitlines()[-1].split()[0])


def under(folder: Path, path: object) -> bool:
    """Whether a file operation is on an output of the commands."""
    if not isinstance(path, str | os.PathLike):
        return False
    inside = Path(os.path.abspath(path))
    return inside.is_relative_to(folder) and not inside.is_relative_to(folder / "data")


def outcome(folder: Path) -> dict[str, bytes]:
    """Every file that the commands have left, without what is different every time."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / "data")):
        content = path.read_bytes()
        if path.name == "config.json" and path.parent.name.startswith("step-"):
            content = json.dumps(json.loads(content) | {"time": None, "seconds": None}).encode()
        found[str(path.relative_to(folder))] = b"" if path.name in ALWAYS_DIFFERENT or path.name == "log" else content
    return found


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def folder_with_data(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "data").symlink_to(root / "data")
    return folder


def place(folder: Path) -> str:
    """What the commands were at, from the files they had finished."""
    run = folder / "checkpoints" / "run"
    last = "step-0000006"
    parts = {
        "stage 1": [f"stage1/{last}"],
        "encoding": ["latents/stage1-train.safetensors", "latents/stage1-validation.safetensors"],
        "stage 2": [f"stage2/{last}"],
        "refining or comparing": ["compare/metrics.json"],
    }
    return next((part for part, files in parts.items() if not all((run / file).exists() for file in files)), "generate")


def survive(kills: int, seed: int, presets: list[str], root: Path) -> int:
    """How many of so many killed runs end in the very files of one that was never killed; says where they were killed."""
    write_data(root / "data")
    expected, seconds, operations = {}, {}, {}
    for preset in presets:
        started = time.perf_counter()
        start = Start(folder_with_data(root, preset), preset)
        start.end()
        seconds[preset], operations[preset] = time.perf_counter() - started, start.operations()
        expected[preset] = outcome(start.folder)
        print(f"{preset}: {seconds[preset]:.1f} seconds, {operations[preset]} operations on files", flush=True)
    chance = random.Random(seed)
    trial = same = 0
    places: Counter[str] = Counter()
    while trial < kills:
        preset = presets[trial % len(presets)]
        folder, killed = folder_with_data(root, f"{trial}"), []
        while True:
            moment, again = chance.random(), not killed or chance.random() < AGAIN
            at_operation = again and trial // len(presets) % 2 == 1
            start = Start(folder, preset, 1 + int(moment * operations[preset]) if at_operation else None)
            if again and not at_operation:
                time.sleep(moment * seconds[preset])
                os.kill(start.process, signal.SIGKILL)
            if not start.end():
                break
            killed.append(place(folder))
        if killed:  # else it ended before its moment came
            wrong = differences(expected[preset], outcome(folder))
            print(
                f"{preset}, killed in {', '.join(killed)}: {'differs in ' + ', '.join(wrong) if wrong else 'the same'}",
                flush=True,
            )
            places.update(killed)
            trial, same = trial + 1, same + (not wrong)
        shutil.rmtree(folder)
    print("kills:", ", ".join(f"{count} in {name}" for name, count in places.most_common()))
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed, each once or more")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="in turn")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        same = survive(asked.kills, asked.seed, asked.presets, Path(root))
    print(f"{same} of {asked.kills}")
    sys.exit(same != asked.kills)


if __name__ == "__main__":
    main()
