"""Whole processes, measured against a stub: the client on one core, the stub on another."""

from __future__ import annotations

import csv
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import trustme

HERE = Path(__file__).parent
USED = HERE.with_name("used.py")
REVIEW = "the film moves along with grace and wit, " * 11


class Measured(NamedTuple):
    """One run of a command."""

    wall: float
    """Seconds, from its start to its end."""
    cpu: float
    """Seconds, user and system."""
    peak_mb: float
    requests: int
    refusals: int
    most_in_flight: int
    sending: float
    """Seconds from the first request to the last."""


@dataclass(frozen=True)
class Stub:
    """A stub that is running."""

    base_url: str
    certificate: Path | None

    def stats(self) -> dict[str, Any]:
        context = ssl.create_default_context(cafile=self.certificate) if self.certificate else None
        with urllib.request.urlopen(f"{self.base_url}/stats", context=context, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextmanager
def stub(folder: Path, *, is_tls: bool = False, **options: Any) -> Iterator[Stub]:
    """Start a stub, and end it. `options`: those of `stub.Stub`, and `port`."""
    certificate = None
    if is_tls:
        authority = trustme.CA()
        certificate = folder / "authority.pem"
        authority.cert_pem.write_to_path(str(certificate))
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
        options["certificate"] = str(folder / "server.pem")
    command = [sys.executable, str(HERE / "stub.py"), json.dumps(options)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=pinned(-1)
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield Stub(f"http{'s' if is_tls else ''}://127.0.0.1:{port}/v1", certificate)
        finally:
            process.stdin.close()
            process.wait(30)


def measured(command: Sequence[str], server: Stub, log: Path, code: int = 0) -> Measured:
    """Run a command to its end.

    Raises:
        RuntimeError: it did not end with `code`; with the end of what it said.
    """
    before = server.stats()
    trusted = {"SSL_CERT_FILE": str(server.certificate)} if server.certificate else {}
    with log.open("w") as fp:
        began = time.monotonic()
        told = log.with_name(f"{log.name}.used")
        subprocess.run(
            [sys.executable, "-S", str(USED), str(told), *command], stdout=fp, stderr=fp, check=True,
            stdin=subprocess.DEVNULL, preexec_fn=pinned(0),
            env={**os.environ, **trusted, "STUB": server.base_url, "STUB_KEY": "sk-stub"},
        )  # fmt: skip
        wall = time.monotonic() - began
    ended, cpu, peak = json.loads(told.read_text())
    if ended != code:
        raise RuntimeError(f"{' '.join(command)} ended with {ended}:\n{log.read_text()[-2000:]}")
    after = server.stats()
    return Measured(
        wall,
        cpu,
        peak / (1024 if sys.platform == "linux" else 1024**2),
        after["requests"] - before["requests"],
        after["refusals"] - before["refusals"],
        after["most_in_flight"],
        after["first_to_last_seconds"],
    )


def write_input(path: Path, rows: int, marked: Container[int] = (), mark: str = "") -> Path:
    """Prompts of about 500 bytes, some of them with a mark."""
    with path.open("w", newline="") as fp:
        writer = csv.writer(fp)
        writer.writerow(["id", "review"])
        writer.writerows(
            [number, f"Review {number}: {REVIEW}{mark if number in marked else ''}"] for number in range(rows)
        )
    return path


def write_job(folder: Path, source: Path, concurrency: int, **keys: Any) -> Path:
    """A job over `source` that asks the stub named in the environment; a fresh ledger each time."""
    for old in folder.glob("*job.*sqlite*"):
        old.unlink()
    job = {
        "input": str(source),
        "prompt": {
            "system": "You label film reviews.",
            "user": "Review: {{ review }}\nIs it positive or negative?",
        },
        "provider": {"name": "custom", "base_url": "${STUB}"},
        "model": "stub-model",
        "parameters": {"max_tokens": 128, "temperature": 0},
        "concurrency": concurrency,
        "output": "job.parquet",
        **keys,
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def pinned(place: int) -> Any:
    """To be called in the child: keep it on one of the cores that there are."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (lambda: os.sched_setaffinity(0, {cores[place]})) if len(cores) > 1 else None
