"""What a plan will take, from a few of its images made at once."""

import dataclasses
import time

from pipeline.dataset import index, tar
from pipeline.generate import shard_writer
from pipeline.generate.factory import Factory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was measured of one worker."""

    img_per_sec: float
    bytes_per_image: float
    """In a shard, its part of headers and padding included."""

    def hours(self, num_images: int, workers: int) -> float:
        """Time for so many images by so many workers, each on cores or a GPU of its own."""
        return num_images / (self.img_per_sec * workers) / 3600


def probe(factory: Factory, window_sec: float) -> Estimate:
    """Make micro-batches of a plan's first shard, in tars, for `window_sec` or a little longer. Nothing is stored."""
    batches = shard_writer.micro_batches(factory.plan, 0)
    list(factory.samples(batches[:1]))  # memory is taken and kernels are chosen
    count, size_bytes, started = 0, 0, time.perf_counter()
    while not count or time.perf_counter() - started < window_sec:
        for seeds in batches:
            made = tar.build(factory.samples([seeds]))
            index.rows_of_shard("probe", made, factory.plan.channels)
            count, size_bytes = count + len(seeds), size_bytes + len(made) - tar.END_BYTES
            if time.perf_counter() - started > window_sec:
                break
    return Estimate(img_per_sec=count / (time.perf_counter() - started), bytes_per_image=size_bytes / count)
