"""What a head costs when others send, and what data in a store costs.

uv run --group ray python tests/bench/scale.py head [ROWS [TIMES]]
uv run --group s3 python tests/bench/scale.py store [ROWS]
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.bench.measure import REVIEW, Measured, Stub, measured, pinned, stub, write_job  # noqa: E402

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}
BATCHRUN = [sys.executable, "-m", "batchrun"]
CONCURRENCY = 2000
"""Requests in flight, as one has workers for."""


def head(folder: Path, rows: int = 60_000, times: int = 3) -> None:
    """This process's sender, one worker and two: rows a second, and processor time of the head for each row more.

    Beside them a client that only sends: by it, one machine and hour are told from another. Each is run several times,
    and the least that a run took counts: neighbours of this machine, in its caches and cores, only add to it.
    """
    few = rows // 6
    with stub(folder) as server:
        floor = [sys.executable, str(HERE / "floor.py"), "aiohttp"]
        small, large = (
            least(
                measured([*floor, str(number), server.base_url, str(CONCURRENCY)], server, folder / "log")
                for _ in range(times)
            )
            for number in (few, rows)
        )
        more = (large.cpu - small.cpu) / (rows - few) * 1e6
        print(f"aiohttp, only sends: {rows / large.sending:,.0f} rows/s, {more:.0f} us CPU a row", flush=True)
        for name, workers in (("this process", 0), ("1 worker", 1), ("2 workers", 2)):
            with cluster(server) if workers else nothing() as address:
                engine = {"name": "ray", "address": address, "workers": workers, "worker_cpus": 0.5}
                keys: dict[str, Any] = {"engine": engine} if workers else {}
                small, large = (
                    least(once(folder, server, number, keys) for _ in range(times)) for number in (few, rows)
                )
            ledger = (folder / "job.ledger.sqlite").stat().st_size
            more = (large.cpu - small.cpu) / (rows - few) * 1e6
            print(
                f"{name}: {rows / large.sending:,.0f} rows/s, {more:.0f} us CPU a row, {large.peak_mb:.0f} MB, "
                f"{ledger / rows:.0f} bytes of ledger a row",
                flush=True,
            )


def least(found: Iterable[Measured]) -> Measured:
    """The run that took the least processor time."""
    return min(found, key=lambda one: one.cpu)


def once(folder: Path, server: Stub, rows: int, keys: dict[str, Any]) -> Measured:
    source = folder / "in.parquet"
    write_reviews(source, rows)
    job = write_job(folder, source, CONCURRENCY, **keys)
    found = measured([*BATCHRUN, str(job), "--quiet"], server, folder / "log")
    assert found.requests == rows, found
    return found


@contextmanager
def nothing() -> Iterator[None]:
    yield None


@contextmanager
def cluster(server: Stub) -> Iterator[str]:
    """The address of a cluster of one node, which leaves the head's core to the head, as one on other machines does."""
    with subprocess.Popen(
        [sys.executable, str(HERE.with_name("cluster.py")), "1", "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, preexec_fn=pinned(-1),
        env={**os.environ, "STUB": server.base_url, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.stdin.close()
        process.wait(60)


def write_reviews(sink: Any, rows: int) -> None:
    """Prompts of about 500 bytes, as Parquet."""
    with pq.ParquetWriter(sink, pa.schema([("id", pa.int64()), ("review", pa.string())])) as writer:
        for start in range(0, rows, 50_000):
            numbers = range(start, min(rows, start + 50_000))
            texts = [f"Review {number}: {REVIEW}" for number in numbers]
            writer.write_table(pa.table({"id": pa.array(numbers, pa.int64()), "review": texts}))


def store(folder: Path, rows: int = 60_000) -> None:
    """From an object to an object, and to parts."""
    from pyarrow.fs import S3FileSystem

    with subprocess.Popen(
        [sys.executable, str(HERE.with_name("s3_server.py"))], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint)
        fs = S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True, region="us-east-1")
        fs.create_dir("reviews")
        sink = io.BytesIO()
        write_reviews(sink, rows)
        with fs.open_output_stream("reviews/in.parquet") as fp:
            fp.write(sink.getvalue())
        del sink
        outputs = {
            "one object": "s3://reviews/out.parquet", "parts": {"path": "s3://reviews/parts", "part_mb": 64},
        }  # fmt: skip
        with stub(folder) as server:
            for name, output in outputs.items():
                keys = {"output": output, "ledger": "job.ledger.sqlite"}
                job = write_job(folder, Path("in"), 256, **keys, **{"input": "s3://reviews/in.parquet"})
                found = measured([*BATCHRUN, str(job), "--quiet"], server, folder / "log")
                print(
                    f"{name}: {rows / found.wall:,.0f} rows/s, {found.cpu / rows * 1e6:.0f} us CPU a row, "
                    f"{found.peak_mb:.0f} MB",
                    flush=True,
                )
        process.kill()


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="batchrun-") as name:
        {"head": head, "store": store}[what](Path(name), *map(int, numbers))
