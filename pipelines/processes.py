"""Work shared by the processes that torchrun starts, one for each device.

All of them run the same program. The first alone writes and prints; everything here is called by all of them together, and
where there is one process it costs nothing.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

from pipelines.console import Progress, UserError
from stage1_vae.statistics import world_size as count

T = TypeVar("T")


def rank() -> int:
    return distributed.get_rank() if count() > 1 else 0


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


def gathered(value: T) -> list[T]:
    """The values of all processes, first to last."""
    if count() == 1:
        return [value]
    values: list = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def on_each(action: Callable[[], object]) -> None:
    """An action of each process; what one raises of a user's mistake or a disk is raised on all."""
    failure = None
    try:
        action()
    except (UserError, OSError) as error:
        failure = error
    for other in gathered(failure):
        if other is not None:
            raise other


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
