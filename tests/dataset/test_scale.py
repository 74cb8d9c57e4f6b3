"""1e9 samples in 1e6 shards: the driver is soon ready, and a task reads its own rows and little else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.dataset import record
from pipeline.dataset.index import open_split
from tests.scale import made_up_dataset

_DRIVER = """
import json, pickle, resource, sys, time
started = time.perf_counter()
from jobs import train
job = train.TrainJob(dataset=sys.argv[1], out=sys.argv[1] + "/run")
imported = time.perf_counter()
spec, reader = train._open(job, job.dataset)
first = reader.plan.chunk(0)
pickled = pickle.dumps(reader)
open(sys.argv[1] + "/reader.pickle", "wb").write(pickled)
print(json.dumps({
    "samples": spec.plan.num_samples,
    "import_sec": imported - started,
    "ready_sec": time.perf_counter() - imported,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "pickled_mb": len(pickled) / 1e6,
}))
"""
_TASKS = """
import json, pickle, random, statistics, sys, time
started = time.perf_counter()
reader = pickle.load(open(sys.argv[1] + "/reader.pickle", "rb"))
opened = time.perf_counter() - started
numbers, times = random.Random(1), {"cold": [], "warm": []}

def read_bytes():
    return int(next(line.split()[1] for line in open("/proc/self/io") if line.startswith("rchar")))

at_first = read_bytes()
for _ in range(200):  # parts are 128 times 1000 rows: nearly every place is in another part
    start = numbers.randrange(reader.index.num_samples - 1024)
    for kind in times:
        before = time.perf_counter()
        assert len(reader.index.rows(start, start + 1024)) == 1024
        times[kind].append(1000 * (time.perf_counter() - before))
read = read_bytes() - at_first
before = time.perf_counter()
table = reader.read(12345)
print(json.dumps({
    "open_sec": opened,
    **{f"{kind}_ms": statistics.median(of) for kind, of in times.items()},
    "first_ms": times["cold"][0],
    "chunk_rows": len(table),
    "chunk_sec": time.perf_counter() - before,
    "read_kb": read / 200 / 1e3,
}))
"""


def _measured(code: str, url: str) -> dict[str, float]:
    """What a process of its own says of itself, as JSON on its last line."""
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_billion_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = made_up_dataset(tmp_path / "data", 1_000_000, 1000)
    driver, tasks = _measured(_DRIVER, url), _measured(_TASKS, url)
    with capsys.disabled():
        print(f"\ndriver: {driver}\ntasks: {tasks}")
    assert driver["samples"] == 1e9
    assert driver["import_sec"] + driver["ready_sec"] <= 60
    assert driver["peak_mb"] <= 2000
    # A cold read fetches 47 KB of footer and 40 to 80 KB of rows; the index as a whole has 40 GB.
    assert tasks["read_kb"] <= 150
    assert tasks["cold_ms"] <= 50
    assert tasks["chunk_rows"] == 1024


@pytest.mark.parametrize("num_shards", [1, 127, 128, 300])
def test_a_made_up_dataset_is_a_real_one(tmp_path: Path, num_shards: int) -> None:
    url = made_up_dataset(tmp_path / "data", num_shards, 5)
    dataset, _ = record.read(url)
    assert dataset.num_samples("train") == 5 * num_shards
    assert len(dataset.splits["train"]) == -(-num_shards // 128)
    rows = open_split(url, dataset, "train").rows(5 * num_shards - 5, 5 * num_shards).to_pylist()
    assert [row["key"] for row in rows] == [f"{i:09d}" for i in range(5)]
    assert {row["shard"] for row in rows} == {f"shard-{(num_shards - 1) % 128:06d}.tar"}
