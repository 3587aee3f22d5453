"""batchrun beside floors and peers, in one run: what a row costs, and how busy the provider is kept.

    uv run python tests/bench/run.py                  # every case, three times; peers in environments of their own
    uv run python tests/bench/run.py cost --no-peers  # some cases, without peers
    uv run python tests/bench/run.py million          # a million rows, once; not among the others
    uv run python tests/bench/run.py cost --profile   # where the time goes

Client and stub have a core each. Runs are interleaved, and each figure is the median.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import Measured, Stub, measured, stub, write_input, write_job

HERE = Path(__file__).parent
PEERS = ("lm-deluge", "openai", "litellm")
PACKAGES = {"lm-deluge": ["lm-deluge"], "openai": ["openai[aiohttp]"], "litellm": ["litellm"]}
SLOW_PEERS = {"openai": 4, "litellm": 8}
"""By how much fewer rows a peer is given, where it would take minutes."""
COLUMNS = (
    "what", "rows", "rows/s", "CPU µs a row", "efficiency", "peak MB", "most in flight", "outside of sending",
    "ledger bytes a row",
)  # fmt: skip


@dataclass
class Row:
    """One line of a table: a command, and what was measured of it."""

    name: str
    rows: int
    command: Callable[[Stub, int], list[str]]
    runs: list[Measured] = field(default_factory=list)
    ledger_bytes: float = 0.0

    def median(self, of: Callable[[Measured], float]) -> float:
        return statistics.median(map(of, self.runs))


@dataclass
class Case:
    """Some rows beside each other, against the same stub."""

    title: str
    concurrency: int
    stub: dict[str, Any]
    rows: list[Row]
    latency: float = 0.0


class Bench:
    """Builds the cases.

    Args:
        number: rows of the input.
    """

    def __init__(self, folder: Path, number: int, peers: tuple[str, ...]) -> None:
        self.folder = folder
        self.number = number
        self.peers = peers
        self._inputs: dict[int, Path] = {}

    def cases(self) -> dict[str, Case]:
        number = self.number
        return {
            "cost": Case(
                "no latency, 256 at once, plain HTTP", 256, {},
                [
                    self.only_sends("raw sockets, only sends", "sockets", number),
                    self.only_sends("aiohttp, only sends", "aiohttp", number),
                    self.floor(number), self.batchrun(number), self.batchrun_capped(number),
                    *(self.peer(name, number) for name in self.peers),
                ],
            ),
            "tls": Case(
                "no latency, 256 at once, TLS", 256, {"is_tls": True},
                [
                    self.only_sends("aiohttp, only sends", "aiohttp", number),
                    self.floor(number), self.batchrun(number),
                    *(self.peer(name, number) for name in self.peers if name == "lm-deluge"),
                ],
            ),
            "streamed": Case(
                "streamed answers of 72 chunks over 0.2 s, 256 at once", 256, {"chunks": 72, "chunk_seconds": 0.003},
                [
                    self.only_sends("aiohttp, only reads", "aiohttp-streamed", number // 2),
                    self.batchrun(number // 2, stream=True),
                ],
            ),
            "burst": Case(
                "streamed answers of 72 chunks at once, 256 at once", 256, {"chunks": 72},
                [
                    self.only_sends("aiohttp, only reads", "aiohttp-streamed", number // 2),
                    self.batchrun(number // 2, stream=True),
                ],
            ),
            "latency": self.efficiency("200 ms, 256 at once", 256, 0.2),
            "faults": self.efficiency("200 ms, 256 at once, 5 % 429 and 2 % 500", 256, 0.2, p429=0.05, p500=0.02),
            "slow": self.efficiency("1 s, 1000 at once", 1000, 1.0),
            "wide": self.efficiency("200 ms, 1000 at once", 1000, 0.2),
        }  # fmt: skip

    def million(self) -> Case:
        return Case("1,000,000 rows, no latency, 256 at once", 256, {}, [self.floor(10**6), self.batchrun(10**6)])

    def efficiency(self, title: str, concurrency: int, latency: float, **faults: float) -> Case:
        rows = [self.batchrun(self.number), *(self.peer(name, self.number) for name in self.peers[:1])]
        return Case(title, concurrency, {"latency": latency, **faults}, rows, latency)

    # --- commands -------------------------------------------------------------------------------------------

    def batchrun(self, rows: int, name: str = "batchrun", **keys: Any) -> Row:
        def command(server: Stub, concurrency: int) -> list[str]:
            job = write_job(self.folder, self.input(rows), concurrency, **keys)
            return [sys.executable, "-m", "batchrun", str(job)]

        return Row(name, rows, command)

    def batchrun_capped(self, rows: int) -> Row:
        return self.batchrun(
            rows, "batchrun with a budget", budget={"usd": 1_000_000}, prices={"input_mtok": 3, "output_mtok": 15}
        )

    def floor(self, rows: int) -> Row:
        def command(server: Stub, concurrency: int) -> list[str]:
            paths = [str(self.input(rows)), server.base_url, str(concurrency), str(self.folder / "floor.parquet")]
            return [sys.executable, str(HERE / "floor.py"), "run", *paths]

        return Row("bare floor: the same transport, SQLite, Parquet", rows, command)

    def only_sends(self, name: str, kind: str, rows: int) -> Row:
        def command(server: Stub, concurrency: int) -> list[str]:
            return [sys.executable, str(HERE / "floor.py"), kind, str(rows), server.base_url, str(concurrency)]

        return Row(name, rows, command)

    def peer(self, name: str, rows: int) -> Row:
        rows //= SLOW_PEERS.get(name, 1)

        def command(server: Stub, concurrency: int) -> list[str]:
            python = _environment(name)
            paths = [str(self.input(rows)), server.base_url, str(concurrency), str(self.folder / "peer.parquet")]
            return [str(python), str(HERE / "peers.py"), name, *paths]

        return Row(name, rows, command)

    def input(self, rows: int) -> Path:
        if rows not in self._inputs:
            self._inputs[rows] = write_input(self.folder / f"reviews-{rows}.csv", rows)
        return self._inputs[rows]


def _environment(peer: str) -> Path:
    """The Python of an environment that has a peer in it, made where it is missing."""
    folder = Path(tempfile.gettempdir()) / "batchrun-bench" / peer
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        packages = [*PACKAGES[peer], "pyarrow", "tqdm"]
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), *packages], check=True)
    return python


def run(case: Case, folder: Path, repeat: int) -> None:
    """Measure each row so many times, in turn."""
    with stub(folder, **case.stub) as server:
        for _ in range(repeat):
            for row in case.rows:
                command = row.command(server, case.concurrency)
                row.runs.append(measured(command, server, folder / "log"))
                ledger = folder / "job.ledger.sqlite"
                if row.name.startswith("batchrun"):
                    row.ledger_bytes = ledger.stat().st_size / row.rows


def table(case: Case) -> Iterator[str]:
    """Markdown."""
    yield f"**{case.title}**"
    yield ""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"| --- |{' --: |' * (len(COLUMNS) - 1)}"
    for row in case.rows:
        wall = row.median(lambda run: run.wall)
        ideal = row.rows * case.latency / case.concurrency
        yield " | ".join(
            [
                f"| {row.name}", f"{row.rows:,}", f"{row.rows / wall:,.0f}",
                f"{row.median(lambda run: run.cpu) / row.rows * 1e6:.0f}",
                f"{ideal / wall:.0%}" if ideal else "–",
                f"{row.median(lambda run: run.peak_mb):.0f}",
                f"{row.median(lambda run: run.most_in_flight):.0f}",
                f"{row.median(lambda run: run.wall - run.sending):.1f} s",
                f"{row.ledger_bytes:.0f} |" if row.ledger_bytes else "– |",
            ]
        )  # fmt: skip
    yield ""


def profile(case: Case, folder: Path) -> None:
    """Where batchrun's time goes, by the standard profiler; it makes everything slower, and calls most of all."""
    (row,) = [row for row in case.rows if row.name == "batchrun"]
    with stub(folder, **case.stub) as server:
        command = row.command(server, case.concurrency)
        kept = str(folder / "profile")
        measured([sys.executable, "-m", "cProfile", "-o", kept, *command[1:]], server, folder / "log")
    import pstats

    pstats.Stats(kept).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, options.rows, () if options.no_peers else PEERS)
        cases = bench.cases()
        chosen = {key: cases.get(key) or bench.million() for key in options.cases} if options.cases else cases
        if unknown := set(options.cases) - {*cases, "million"}:
            parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(cases)} and million")
        print(f"Python {platform.python_version()}, {platform.machine()}\n")
        for key, case in chosen.items():
            if options.profile:
                profile(case, folder)
                continue
            run(case, folder, 1 if key == "million" else options.repeat)
            print("\n".join(table(case)), flush=True)


if __name__ == "__main__":
    main()
