"""The parts that docs/examples/ adds: each diff applies to this code, and the contract tests hold for the new part."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.forks import PACKAGES, forked

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs/examples"
PYTEST = ["pytest", "-q", "-n", "0", "-o", "addopts="]
TINY = "--stage1.steps=2 --stage2.steps=2 --autoencoder.network.width=8 --prior.backbone.width=8 --device=cpu --no-compare"
RUN = {
    "bottleneck": [*PYTEST, "tests/test_bottlenecks.py", "tests/test_autoencoder.py", "-k", "fixed-width"],
    "backbone": [*PYTEST, "tests/test_backbones.py", "-k", "gru"],
    "head": [*PYTEST, "tests/test_priors.py", "-k", "pixelcnn-tied or transformer-tied or gru-tied"],
    "prior": [*PYTEST, "tests/test_rivals.py", "-k", "kernels and not trained and not compared"],
    "data-set": ["pipelines.train_all", "digits", *TINY.split()],
}
"""The module, and its arguments, that tries the part"""


def test_every_kind_of_example_is_tried():
    assert {path.stem for path in EXAMPLES.iterdir()} == {*RUN}


@pytest.mark.parametrize("name", RUN)
def test_an_example_is_complete(name, tmp_path, monkeypatch):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("trained", "__pycache__"))
    subprocess.run(["git", "apply", EXAMPLES / f"{name}.diff"], cwd=tmp_path, check=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what a fork leaves there
    done = forked(*RUN[name], cwd=tmp_path, anew=True)
    assert done.returncode == 0, done.stdout + done.stderr  # pytest fails where no test is selected
