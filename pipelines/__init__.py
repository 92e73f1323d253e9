"""Runs both stages. The only place that owns disk, devices, data sets and the command line.

From Python: `from pipelines import TwoStage`.
"""

import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.two_stage import TwoStage

__all__ = ["TwoStage"]

if sys.argv[0] == "-m" and "".join(sys.orig_argv[1:]).partition("-m")[2].startswith("pipelines"):
    # A command that is interrupted while it is imported, which takes seconds, has lost nothing: it ends without a traceback.
    # From `run_command` on, it says so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
    """TwoStage is imported when it is asked for: it imports torch, which the help of a command need not wait for."""
    if name == "TwoStage":
        from pipelines.two_stage import TwoStage

        return TwoStage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
