"""One thread a test process: small tensors gain nothing from more, and test processes that share cores lose a lot."""

import os

import pytest
import torch

from pipelines.data.sets import EmbeddedDigits
from pipelines.runs.run import Run
from tests.parts import small_splits, trained_run

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A shrunk run of mnist5k, without its comparison; its data are `small_data`."""
    return trained_run(tmp_path_factory.mktemp("run"), "mnist5k")


@pytest.fixture
def small_data(monkeypatch) -> None:
    """The embedded data set is a small one."""
    monkeypatch.setattr(EmbeddedDigits, "load", lambda self, report=None: small_splits((1, 28, 28), 4))
