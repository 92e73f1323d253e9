"""Data sets that torchvision downloads."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from pipelines.console import say

failed: dict[Hashable, Exception] = {}
"""What went wrong with downloads in the life of this process: without a network, each one that is tried can take long."""


def downloaded(kind: type, root: Path, /, **given: Any) -> Any:
    """A data set of torchvision, brought to a folder, unless that has failed before. Raises what torchvision raises."""
    asked = (kind, *given.items())
    if asked not in failed:
        say(f"downloading {kind.__name__} to {root}/")
        try:
            return kind(**given, download=True)
        except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
            failed[asked] = error.with_traceback(None)
    raise failed[asked]
