"""The arms of utility, each with each seed a Ray task."""

from collections.abc import Callable, Mapping, Sequence

import ray
import torch

from pipeline.evaluate.utility import ARMS, Accuracy, Labelled, accuracy, told_right


def utility(
    real: Labelled,
    gen: Labelled,
    test: Labelled,
    num_classes: int,
    *,
    steps: int,
    seeds: Sequence[int],
    on_progress: Callable[[int], None] = lambda _: None,
) -> Mapping[str, Accuracy]:
    """Accuracy by arm; needs a running Ray. A classifier is trained by one thread, so it does not depend on how many
    CPUs there are; as many as there are CPUs for are trained at once. `on_progress` hears how many more steps are done.
    """
    images = [ray.put(one) for one in (real, gen, test)]
    keys = [(name, seed) for name in ARMS for seed in seeds]
    tasks = {_told_right.remote(name, *images, num_classes, steps, seed): (name, seed) for name, seed in keys}
    right, waiting = {}, list(tasks)
    while waiting:
        done, waiting = ray.wait(waiting)
        for task in done:
            right[tasks[task]] = ray.get(task)
            on_progress(steps)
    return {name: accuracy([right[name, seed] for seed in seeds], test.labels, num_classes) for name in ARMS}


@ray.remote(num_cpus=1)
def _told_right(name, real, gen, test, num_classes, steps, seed):  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    return told_right(ARMS[name], (real, gen), test, num_classes, steps, seed)
