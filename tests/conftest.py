"""One thread a test process: small tensors gain nothing from more, and test processes that share cores lose a lot."""

import os
import tempfile

import pytest
import torch

from pipelines.data.sets import EmbeddedDigits, TorchvisionSet
from pipelines.runs.run import Run
from tests.parts import small_splits, trained_run

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
STATE = tempfile.TemporaryDirectory()  # what tests have commands remember is none of the user's
os.environ["XDG_STATE_HOME"] = STATE.name
torch.set_num_threads(1)


APART = ("test_presets.py", "test_recipes.py")  # whose tests share little and take long together


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a file share its fixtures, so they run in one process; those of a few files each where there is room."""
    for item in items:
        if item.path.name not in APART:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A shrunk run of mnist5k, without its comparison; its data are `small_data`."""
    return trained_run(tmp_path_factory.mktemp("run"), "mnist5k")


@pytest.fixture
def small_data(monkeypatch) -> None:
    """The data set of every run is a small one, of the shape of mnist5k's."""
    for kind in (EmbeddedDigits, TorchvisionSet):
        monkeypatch.setattr(kind, "load", lambda self, report=None: small_splits((1, 28, 28), 4))
