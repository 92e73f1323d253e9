"""docs/tutorial.ipynb: it runs from the first cell to the last, and stands in the repository with its pictures."""

import os
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
QUICK = """
from pipelines.data.sets import EmbeddedDigits
from pipelines.judging import tradeoffs
from tests.parts import small_splits

EmbeddedDigits.load = lambda self, report=None: small_splits((1, 28, 28), 10)
tradeoffs.TEMPERATURES, tradeoffs.GUIDANCE, tradeoffs.AUTOGUIDANCE, tradeoffs.BOTH = (0.8,), (2.0,), (0.5,), (0.5,)
STEPS = 4
SETTINGS = {"metrics.images": 60, "metrics.classifier.steps": 4, "prior.backbone.width": 8}
SETTINGS |= {"autoencoder.network.width": 8, "autoencoder.network.blocks": 1}
"""


@pytest.fixture(scope="module")
def book():
    return nbformat.read(ROOT / "docs/tutorial.ipynb", 4)


def pictures(book) -> list[int]:
    """In each cell."""
    return [sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ())) for cell in book.cells]


def test_the_tutorial_stands_there_with_its_pictures(book):
    nbformat.validate(book)
    assert sum(pictures(book)) >= 8
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert 8 <= len(code) <= 12 and [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type in ("display_data", "stream") for output in outputs)
    assert not any(place in str(outputs) for place in ("/tmp", "/home", "/work", "Traceback", "warning"))


def test_the_tutorial_runs(book, tmp_path, monkeypatch):
    """With few steps and few images, outside of the repository."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert "STEPS = " in first.source and "SETTINGS = " in first.source
    there, first.source = pictures(book), QUICK
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(book) == there
    assert (tmp_path / "checkpoints/tutorial/compare/page.html").is_file()
