"""One process per ledger: a lock file that dies with its holder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

from filelock import FileLock, Timeout

from batchrun.errors import LedgerHeldError, StorageError

_LOOKS, _LOOK_SECONDS = 10, 0.02
_POLL_SECONDS = 0.2


def lock_path(ledger: Path) -> Path:
    """The lock file of a ledger."""
    return ledger.with_name(f"{ledger.name}.lock")


@contextmanager
def held(
    ledger: Path, *, wait: float = 0.0, say: Callable[[str], None] = lambda line: None, until: Callable[[], bool] = bool
) -> Iterator[None]:
    """Hold the lock of a ledger.

    The file stays behind and means nothing by itself: the lock is the kernel's, and cannot go stale.

    Args:
        wait: so many seconds for another process that holds it; infinity for as long as it takes.
        say: is told of whom it waits for.
        until: true when nobody wants the lock any more.

    Raises:
        LedgerHeldError: another process holds it; the message says which.
        StorageError: this disk grants no locks.
    """
    path = lock_path(ledger)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, mode=0o600, fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            say(f"waiting for {_holder(path)}, who uses {ledger}")
            lock.acquire(timeout=wait if isfinite(wait) else -1, poll_interval=_POLL_SECONDS, cancel_check=until)
    except Timeout:
        waited = f", and was for {wait:g} s" if wait else ""
        raise LedgerHeldError(f"{ledger} is in use by {_holder(path)}{waited}: wait for it to end") from None
    except (OSError, NotImplementedError) as exc:
        raise StorageError(
            f"{path}: no lock can be had: {exc}: make the folder writable, or set `ledger:` to a path on a local disk"
        ) from exc
    try:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
        }
        try:
            path.write_text(json.dumps(holder), encoding="utf-8")
        except OSError as exc:
            raise StorageError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    for _ in range(_LOOKS):
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(path.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        time.sleep(_LOOK_SECONDS)  # whoever has just got the lock has not written its name yet
    return "another process"
