"""The wheel holds every folder of the package: installed without the repository, it trains a run, writes its page and draws."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.test_command_line import SHRUNK

ROOT = Path(__file__).parents[1]


def test_the_wheel_trains_a_run_without_the_repository(tmp_path):
    source, installed, work = (tmp_path / name for name in ("source", "installed", "work"))
    work.mkdir()
    for room in ("stage1_vae", "stage2_prior", "pipelines"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(installed)}
    where = "import pipelines.pages.page, stage2_prior; print(pipelines.pages.page.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=work, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(installed)
    images, noise = work / "images", np.random.default_rng(0)
    images.mkdir()
    for number in range(200):
        Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8)).save(images / f"{number}.png")
    own = ["folder", "--data.root", "images", "--data.size", "16"]
    command = [sys.executable, "-m", "pipelines.train_all", *own, *SHRUNK]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "gap closed" in done.stdout, done.stderr
    assert (work / "checkpoints/folder/compare/page.html").is_file()
    command = [sys.executable, "-m", "pipelines.generate", "folder", "--count", "9", "--out", "nine.npz", "--device", "cpu"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and np.load(work / "nine.npz")["arr_0"].shape == (9, 16, 16, 3), done.stderr
