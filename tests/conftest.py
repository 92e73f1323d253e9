"""One thread a test process: small tensors gain nothing from more, and test processes that share cores lose a lot."""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch

from pipelines.data.sets import EmbeddedDigits, TorchvisionSet
from pipelines.runs.run import Run
from tests.parts import cheaper_comparisons, small_splits, trained_run

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
STATE = tempfile.TemporaryDirectory()  # what tests have commands remember is none of the user's
os.environ["XDG_STATE_HOME"] = STATE.name
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cheaper_comparisons(patch)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A shrunk run of mnist5k, without its comparison; its data are `small_data`."""
    return trained_run(tmp_path_factory.mktemp("run"), "mnist5k")


@pytest.fixture
def small_data(monkeypatch) -> None:
    """The data set of every run is a small one, of the shape of mnist5k's."""
    for kind in (EmbeddedDigits, TorchvisionSet):
        monkeypatch.setattr(kind, "load", lambda self, report=None: small_splits((1, 28, 28), 4))
