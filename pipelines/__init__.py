"""Runs both stages. The only place that owns disk, devices, data sets and the command line.

From Python: `from pipelines import TwoStage`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.two_stage import TwoStage

__all__ = ["TwoStage"]


def __getattr__(name: str) -> Any:
    """TwoStage is imported when it is asked for: it imports torch, which the help of a command need not wait for."""
    if name == "TwoStage":
        from pipelines.two_stage import TwoStage

        return TwoStage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
