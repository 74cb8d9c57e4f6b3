"""`make bench-ingest`: our feed, the decode ceiling and the peers, on the same images, in one run.

Contenders run one at a time, in rounds, so that what else happens on the machine meets all of them; a figure is the
median of its rounds. Prints tables, and JSON as the last line; exits with 1 where a target's must is missed.
"""

import argparse
import contextlib
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline import storage
from tests.benchmarks.ingest import contenders, data, report
from tests.benchmarks.ingest.cases import Case, cases
from tests.benchmarks.ingest.contenders import Contender, ContenderError
from tests.benchmarks.ingest.measure import Spec
from tests.benchmarks.ingest.report import Row
from tests.s3_server import run_s3_server

_PEERS_PYTHON = ".venv-peers/bin/python"


class Bench:
    """One run of the benchmark."""

    def __init__(self, cache: Path, quick: bool, only: list[str]) -> None:
        self._cache, self._only = cache, only
        self._rounds = 1 if quick else 3
        self._passes, self._pass_samples = (4, 512) if quick else (50, 2048)
        self._warmup_sec, self._window_sec = (1.0, 1.0) if quick else (3.0, 12.0)
        self._probe_sec = 1.0 if quick else 4.0
        self.failures: list[str] = []
        """Contenders without a result, and why."""

    def rates(self, case: Case, where: str, chosen: list[Contender], url: str, env: Mapping[str, str]) -> list[Row]:
        """Every wanted contender of a case, at `url` if not at its own place."""
        name = f"{case.name} {where}"
        chosen = [one for one in chosen if self._wanted(case.name, where, one.name)]
        workers = {}
        for one in chosen:
            with self._failing(f"{name} {one.name}"):
                contenders.convert(one, case, self._cache)
                workers[one] = self._best_workers(one, case, url, env)
        found: dict[Contender, list[dict[str, float]]] = {one: [] for one in workers}
        for number in range(1, self._rounds + 1):
            for one, count in workers.items():
                with self._failing(f"{name} {one.name}"):
                    spec = self._spec(one.name, case, url or str(one.url(case, self._cache)), count)
                    found[one].append(self._run(one.command, spec, env))
                    say(
                        f"round {number}/{self._rounds}: {name}: {one.name}: {found[one][-1]['img_per_sec']:,.0f} img/s"
                    )
        return [
            Row(
                case=name,
                contender=one.name,
                kind=one.kind,
                workers=workers[one],
                rates=[result["img_per_sec"] for result in results],
                is_default=bool(results[0].get("is_default")),
            )
            for one, results in found.items()
            if results
        ]

    def _best_workers(self, one: Contender, case: Case, url: str, env: Mapping[str, str]) -> int:
        """The number of workers that is fastest in a short window."""
        if len(one.workers) == 1:
            return one.workers[0]
        rates = {}
        for count in one.workers:
            spec = self._spec(one.name, case, url or str(one.url(case, self._cache)), count, self._probe_sec)
            rates[count] = self._run(one.command, spec, env)["img_per_sec"]
            say(f"{case.name}: {one.name} with {count} workers: {rates[count]:,.0f} img/s")
        return max(rates, key=lambda count: rates[count])

    def first_batch(self, mode: str, case: Case) -> float | None:
        """Seconds to the first batch, median of the rounds."""
        found = []
        for _ in range(self._rounds if self._wanted(mode) else 0):
            with self._failing(f"{mode} {case.name}"):
                spec = self._spec("ganymede+trainer", case, str(case.folder(self._cache)), 1)
                result = self._run(_ours(mode), spec, {})
                found.append(result["first_batch_sec"])
                say(f"{mode}: {case.name}: {found[-1]:.2f} s, after {result['ray_init_sec']:.2f} s of ray.init")
        return round(statistics.median(found), 2) if found else None

    def growth(self, case: Case) -> float | None:
        """MB over the passes."""
        with self._failing("growth"):
            if self._wanted("growth"):
                spec = self._spec(
                    "ganymede+trainer", case, str(case.folder(self._cache)), 1, samples=self._pass_samples
                )
                result = self._run(_ours("growth"), spec, {})
                say(f"growth: from {result['before']} MB to {result['after']} MB over {result['passes']} passes")
                return round(result["growth_mb"], 1)
        return None

    def _wanted(self, *names: str) -> bool:
        return not self._only or bool(set(self._only) & set(names))

    def _spec(self, name: str, case: Case, url: str, workers: int, window_sec: float = 0.0, samples: int = 0) -> Spec:
        window_sec = window_sec or self._window_sec
        highest = int(case.highest_rate * (self._warmup_sec + window_sec))
        return Spec(
            contender=name,
            url=url,
            shards=[] if "://" in url else case.shards(self._cache),
            extension=case.extension,
            resolution=case.resolution,
            num_samples=samples or case.num_samples,
            batch_size=case.batch_size,
            num_images=samples * self._passes or highest,
            workers=workers,
            warmup_sec=self._warmup_sec,
            window_sec=window_sec,
        )

    def _run(self, command: tuple[str, ...], spec: Spec, env: Mapping[str, str]) -> dict[str, float]:
        log = self._cache / "logs" / f"{spec.contender}-{spec.resolution}.log"
        return contenders.run(command, spec, log, env)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """A contender without a result is said and left out; the others go on."""
        try:
            yield
        except ContenderError as error:
            self.failures.append(f"{what}: {error}")
            say(f"FAILED {self.failures[-1]}")


def _ours(mode: str) -> tuple[str, ...]:
    return sys.executable, "-m", "tests.benchmarks.ingest.ours", mode


@contextlib.contextmanager
def on_s3(case: Case, cache: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A dataset on an S3 server that runs meanwhile: its URL, and the environment that reaches it."""
    with tempfile.TemporaryDirectory(dir=cache) as folder, run_s3_server(Path(folder)) as server:
        environment, url = server.environment(), f"s3://{server.bucket}/{case.name}"
        os.environ.update(environment)
        root = case.folder(cache)
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            storage.put_if_absent(storage.join(url, *file.relative_to(root).parts), file.read_bytes())
        yield url, environment


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


def machine() -> str:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}, load {load:.1f} before the run"


def main(args: argparse.Namespace) -> int:
    """Measure, print, and say whether every must was reached."""
    cache = Path(args.cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(cache, args.quick, args.only)
    on = machine()
    jpeg256, png32 = both = cases(args.quick)
    rows: list[Row] = []
    for case in both:
        say(f"data: {data.make(case, cache)}")
    for case in both:
        if args.quick and not args.peers_python:
            peers = [contenders.stock_webdataset(sys.executable, (2,))]
        else:
            peers = contenders.all_peers(case, args.peers_python or _PEERS_PYTHON)
        rows += bench.rates(case, "local", [*contenders.ours_and_ceiling(), *peers], "", {})
    with on_s3(jpeg256, cache) as (url, environment):
        rows += bench.rates(jpeg256, "s3", contenders.ours_and_ceiling(), url, environment)
    first = [bench.first_batch("first_batch", case) for case in both]
    figures: dict[str, float | None] = {
        **report.ratios(rows),
        "first_batch_sec": max((sec for sec in first if sec is not None), default=None),
        "first_batch_long_plan_sec": bench.first_batch("first_batch_long_plan", png32),
        "growth_mb": bench.growth(jpeg256),
    }
    say(f"\n{on}\n\n{report.rates_table(rows)}\n\n{report.targets_table(figures)}\n")
    for failure in bench.failures:
        say(f"failed: {failure}")
    missed = [] if args.quick else report.missed(figures)
    if missed:
        say(f"missed: {', '.join(missed)}")
    print(report.last_line(figures))
    return 1 if missed or bench.failures else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ingest", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images and short windows: does everything work?")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a case, place, contender, first_batch, first_batch_long_plan or growth; may be repeated",
    )
    parser.add_argument("--cache", default=".bench/ingest", help="folder for the data, which is made once")
    parser.add_argument(
        "--peers-python",
        help=f"Python of the peers' environment, by default {_PEERS_PYTHON}; a quick run without it has one peer",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
