"""What can end a run, and the exit code of each.

    BatchrunError
    ├── JobError            2   the job, its input or the command line is wrong; nothing was sent
    │   ├── InputError      2   the input cannot be read as it stands
    │   └── MissingHereError 2  the job is right, and this machine lacks its key or its model
    ├── ProviderError       4   the provider refuses the account or cannot be reached
    │   └── ClusterError    4   the cluster cannot be reached, or has no room for a worker
    ├── LimitError          3   a limit of the job keeps anything from being sent
    ├── LedgerHeldError     5   another process holds this job's ledger
    ├── StorageError        6   the ledger or the output cannot be read or written
    └── BrokenPromiseError 70   one of our own promises was broken: a bug

A failure of one row is not an exception: it is a `records.Failure`, a value whose `action` says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from pathlib import Path


class ExitCode(IntEnum):
    """The exit codes of the command line, as the README lists them."""

    OK = 0
    ROWS_FAILED = 1
    WRONG_JOB = 2
    LIMIT = 3
    PROVIDER = 4
    HELD = 5
    STORAGE = 6
    BUG = 70
    INTERRUPTED = 130
    TERMINATED = 143


_LISTED = 30


def listed(names: Sequence[str]) -> str:
    """Names for a message; the first of very many."""
    more = f", … and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(name if len(name) <= 100 else f"{name[:99]}…" for name in names[:_LISTED]) + more


def oneline(exc: BaseException) -> str:
    """An error of somebody else for a message: its kind and its words, on one line."""
    words = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {words if len(words) <= 400 else words[:399] + '…'}".rstrip(": ")


class BatchrunError(Exception):
    """Base of all errors that the command line prints and exits with."""

    exit_code = ExitCode.BUG


class JobError(BatchrunError):
    """The job, its input or the command line is wrong; nothing was sent."""

    exit_code = ExitCode.WRONG_JOB


class InputError(JobError):
    """The input cannot be read as it stands; the message names file and row."""


class MissingHereError(JobError):
    """The job is right, and this machine lacks what it needs: a key, a variable, a model."""


class ProviderError(BatchrunError):
    """The provider refuses the account or cannot be reached; what was done is kept."""

    exit_code = ExitCode.PROVIDER


class ClusterError(ProviderError):
    """The cluster cannot be reached, or has no room for a worker; what was done is kept."""


class LimitError(BatchrunError):
    """A limit of the job keeps anything from being sent."""

    exit_code = ExitCode.LIMIT


class LedgerHeldError(BatchrunError):
    """Another process holds this job's ledger."""

    exit_code = ExitCode.HELD


class StorageError(BatchrunError):
    """The ledger or the output cannot be read or written; sending has stopped."""

    exit_code = ExitCode.STORAGE


def exit_code_of(exc: BaseException | None) -> ExitCode:
    """What the process exits with that an exception ends."""
    match exc:
        case BatchrunError():
            return exc.exit_code
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED
        case SystemExit():
            return ExitCode.TERMINATED
        case OSError():
            return ExitCode.STORAGE
    return ExitCode.BUG


@dataclass(frozen=True)
class Stop:
    """Why a run stopped before its rows were all settled."""

    exit_code: ExitCode
    reason: str
    message: str
    is_immediate: bool = False
    """A second signal: nothing is awaited, not even the writing of the output."""


class Promise(StrEnum):
    """What users rely on, and what is checked on every run."""

    ONE_STATE = "every row ends in one state"
    PAID_ONCE = "no answer is paid for twice"
    INTENT_FIRST = "nothing is sent before its intent is on record"
    CAP = "the cap holds"
    EXACT = "money is exact"


class BrokenPromiseError(BatchrunError):
    """One of our own promises was broken: a bug. The message names it, and what to keep for a report.

    Args:
        found: what contradicts the promise.
        ledger: the file that tells what happened.
    """

    exit_code = ExitCode.BUG

    def __init__(self, promise: Promise, found: str, ledger: Path | str) -> None:
        self.promise = promise
        super().__init__(
            f"a promise was broken, {promise.value!r}: {found}. This is a bug in batchrun, and nothing more is sent: "
            f"please report it with this message, and keep {ledger} as it is (with its -wal)"
        )
