"""One thread a test process: small tensors gain nothing from more, and test processes that share cores lose a lot.

`__init__.py` says so to other libraries and to the commands that tests start.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.data.sets import EmbeddedDigits, TorchvisionSet
from pipelines.runs.run import Run
from tests.parts import cheaper_comparisons, small_splits, trained_run

STATE = tempfile.TemporaryDirectory()  # what tests have commands remember is none of the user's
os.environ["XDG_STATE_HOME"] = STATE.name
torch.set_num_threads(1)
LONGEST = "presets generate ranks command_line wheel page study notebook".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, so that at the end no process waits for another one."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cheaper_comparisons(patch)
        yield


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Run:
    """What `run` is a copy of."""
    return trained_run(tmp_path_factory.mktemp("once"), "mnist5k")


@pytest.fixture(scope="module")
def run(trained_once, tmp_path_factory) -> Run:
    """A shrunk run of mnist5k, without its comparison, for each module its own; its data are `small_data`."""
    folder = tmp_path_factory.mktemp("run") / trained_once.folder.name
    return dataclasses.replace(trained_once, folder=Path(shutil.copytree(trained_once.folder, folder)))


@pytest.fixture
def small_data(monkeypatch) -> None:
    """The data set of every run is a small one, of the shape of mnist5k's."""
    for kind in (EmbeddedDigits, TorchvisionSet):
        monkeypatch.setattr(kind, "load", lambda self, report=None: small_splits((1, 28, 28), 4))
