"""Work shared by the processes that torchrun starts, one for each device.

All of them run the same program. The first alone writes and prints; everything here is called by all of them together, and
where there is one process it costs nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from pipelines.console import Progress, UserError
from stage1_vae.statistics import world_size as count

T = TypeVar("T")

AGES = timedelta(days=10_000)


def rank() -> int:
    return distributed.get_rank() if count() > 1 else 0


def on_this_machine() -> tuple[int, int]:
    """The number of this process among those of its machine, and how many these are."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if count() > 1 else (0, 1)


def on_first(action: Callable[[], T]) -> T:
    """What `action` returns on the first process, on all; what it raises of a user's mistake or a disk, too."""
    if count() == 1:
        return action()
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def largest(number: int, device: torch.device) -> int:
    """The largest of the numbers of all processes; device: of this process."""
    if count() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return int(tensor)


def gathered(value: T, group: "distributed.ProcessGroup | None" = None) -> list[T]:
    """The values of all processes, first to last. group: through which they are connected; as in training, when None."""
    if count() == 1:
        return [value]
    values: list = [None] * count()
    distributed.all_gather_object(values, value, group)
    return values


@contextmanager
def patient() -> Iterator["distributed.ProcessGroup | None"]:
    """A group of all processes in which one waits for the others for ages, where that of training gives up after minutes."""
    if count() == 1:
        yield None
        return
    group = distributed.new_group(timeout=AGES, backend="gloo")
    assert isinstance(group, distributed.ProcessGroup)  # all are in it
    try:
        yield group
    finally:
        distributed.destroy_process_group(group)


def on_each(action: Callable[[], object], group: "distributed.ProcessGroup | None" = None) -> None:
    """An action of each process; what one raises of a user's mistake or a disk is raised on all. group: as of `gathered`."""
    failure = None
    try:
        action()
    except (UserError, OSError) as error:
        failure = error
    for other in gathered(failure, group):
        if other is not None:
            raise other


def shared(work: Callable[[T], object], items: Sequence[T], label: str, unit: str) -> None:
    """Work on each of some items, however long it takes, by turns of the processes.

    work: leaves something on disk, and looks first whether it is there. Where machines share a disk, each item is worked on
    once. Where they do not, a machine does not see what others have left; then its own processes do what is missing there.
    What one raises of a user's mistake or a disk is raised on all. label, unit: of the progress.
    """

    def by_turns(own: int, turns: int, label: str) -> None:
        with Progress(label, len(items), unit) as progress:
            for start in range(0, len(items), turns):
                if start + own < len(items):
                    work(items[start + own])
                progress.update(min(turns, len(items) - start))

    with patient() as group:
        on_each(lambda: by_turns(rank(), count(), label), group)
        own, here = on_this_machine()
        if here < count():
            on_each(lambda: by_turns(own, here, f"{label}, what this machine lacks"), group)


def in_batches(
    work: Callable[[Tensor], T],
    indices: Tensor,
    size: int,
    label: str | None = None,
    alone: bool = False,
    unit: str = "images",
) -> list[T]:
    """What `work` makes of each batch of `size` indices, in order; the processes take turns, and all get all.

    What is made does not depend on the number of processes, if `work` depends on its indices alone. label, unit: of the progress.
    alone: of its own indices, each process for itself.
    """
    batches = indices.split(size)
    turns, own = (1, 0) if alone else (count(), rank())
    made: list[T] = []
    with Progress(label, len(indices), unit) as progress:
        for start in range(0, len(batches), turns):
            number = start + own
            # Sharded weights are brought together by all processes at once: with no batch left, one works in vain.
            result = work(batches[min(number, len(batches) - 1)])
            if number < len(batches):
                made.append(result)
            progress.update(sum(len(batch) for batch in batches[start : start + turns]))
    if alone:
        return made
    by_rank = gathered(made)
    return [by_rank[number % turns][number // turns] for number in range(len(batches))]
