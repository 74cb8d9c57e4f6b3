"""Independent pieces of work as Ray tasks of one CPU and one thread each."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
import torch

Key = TypeVar("Key")


def spread(work: Mapping[Key, tuple[Any, ...]], on_done: Callable[[Key], None] = lambda _: None) -> dict[Key, Any]:
    """By key, what a function makes of arguments: (function, argument, …), an argument being a value or what `ray.put`
    gave for one, which many may share; needs a running Ray. `on_done` hears of each.

    One thread each: with more of them on the same CPUs each thread waits for the others, and sums depend on how many.
    """
    tasks = {_called.remote(*piece): key for key, piece in work.items()}
    found, waiting = {}, list(tasks)
    try:
        while waiting:
            (done,), waiting = ray.wait(waiting)
            found[tasks[done]] = ray.get(done)
            on_done(tasks[done])
    finally:
        for task in waiting:  # after an error: the cluster may outlive this process
            ray.cancel(task, force=True)
    return {key: found[key] for key in work}


@ray.remote(num_cpus=1)
def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    return function(*arguments)
