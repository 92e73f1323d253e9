"""Medians over repeats that alternate between what is compared, and memory."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipelines.console import UserError

Rows = list[dict[str, Any]]


def median_seconds(parts: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each part, over repeats that alternate between the parts, after one unmeasured round."""
    if repeats < 1:
        raise UserError(f"--repeats is a number from 1 up, not {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(part: Callable[[], object], device: torch.device) -> int:
    """The most memory that torch's allocator held for a part at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        part()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nothing of what the profiler does, and of GPUs that are not there
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        part()
    held = peak = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
