"""The arms of utility, each with each seed a Ray task."""

from collections.abc import Callable, Mapping, Sequence

import ray

from pipeline.evaluate.ray_spread import spread
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
    """Accuracy by arm; needs a running Ray. As many classifiers are trained at once as there are CPUs. `on_progress`
    hears how many more steps are done.
    """
    images = [ray.put(one) for one in (real, gen, test)]
    work = {
        (name, seed): (told_right, arm, *images, num_classes, steps, seed)
        for name, arm in ARMS.items()
        for seed in seeds
    }
    right = spread(work, lambda _: on_progress(steps))
    return {name: accuracy([right[name, seed] for seed in seeds], test.labels, num_classes) for name in ARMS}
