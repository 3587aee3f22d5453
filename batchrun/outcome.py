"""One call of a job from the lock to the outcome that machines read."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

from batchrun.errors import BatchrunError, ClusterError, ExitCode, LedgerHeldError, StorageError, exit_code_of
from batchrun.folders import appearing
from batchrun.job import Job
from batchrun.lock import held
from batchrun.moments import deadline_of
from batchrun.money import exact_json
from batchrun.options import Options
from batchrun.records import now_us, utc
from batchrun.stopper import Stopper

if TYPE_CHECKING:  # what takes long to import is imported under the lock
    from batchrun.progress import Watch
    from batchrun.summary import Summary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    exit_code: int
    document: dict[str, Any]
    """What `--json` prints, and `<name>.last-run.json` holds."""
    summary: Summary | None = None
    """None if another process was at work, and this one has left it to that; or if an error has ended the call."""
    error: BaseException | None = None
    """What has ended it, for the caller to raise."""


@dataclass(frozen=True)
class Surroundings:
    """Whom a call talks to."""

    say: Say
    """Takes lines of talk."""
    warn: Say
    """Takes what must be heard."""
    environ: Mapping[str, str] = field(repr=False)
    watch: Watch | None = None
    """Is told the progress; None for nobody."""
    stopper: Stopper | None = None
    """Stops it; without one, signals do."""
    output: IO[str] | None = None
    """Where the output of the job's `on_finish` goes; None for nowhere."""
    begin: Callable[[], object] = lambda: None
    """Called once the lock is held."""


def carry_out(job: Job, options: Options, around: Surroundings) -> Outcome:
    """Run a job and tell machines how it ended, whatever that was.

    Raises:
        LedgerHeldError: another process is at work.
        BatchrunError: the lock cannot be taken. What goes wrong under it is in the outcome.
    """
    began = now_us()
    # Before the wait for another process: what 06:00 means must not change by it.
    deadline = deadline_of(job.deadline, utc(began)) if job.deadline is not None else None
    stopper = around.stopper
    error: BaseException | None = None
    outcome: Outcome | None = None
    try:
        with held(
            job.ledger_path,
            wait=options.overlap.wait_seconds,
            say=around.say,
            until=lambda: stopper is not None and stopper.calls > 0,
        ):
            around.begin()
            try:
                with _errors_of_files():
                    outcome = _run(job, options, deadline, around)
            except BaseException as exc:  # noqa: BLE001 - machines are told of it first, and it is raised below
                error = exc
            told = outcome.document if outcome is not None else failed(error, job) | _spent(job, began)
            _tell(job, told, around)
    except LedgerHeldError as exc:
        if not options.overlap.is_skipped:
            raise
        around.say(f"{exc}; skipped")
        return Outcome(ExitCode.OK, failed(exc, job) | {"exit_code": int(ExitCode.OK), "reason": "skipped"})
    # Not under the lock: the command may well call batchrun.
    warning = _finish(job, told, around)
    if warning is not None:
        around.warn(f"warning: {warning}")
    ended = outcome or Outcome(exit_code_of(error), told, error=error)
    if warning is None:
        return ended
    return replace(ended, document=ended.document | {"warnings": [*ended.document.get("warnings", []), warning]})


def failed(exc: BaseException | None, job: Job | None = None) -> dict[str, Any]:
    """What machines are told of a call that an error has ended."""
    exit_code = exit_code_of(exc)
    reason = {
        ExitCode.WRONG_JOB: "job", ExitCode.LIMIT: "budget", ExitCode.PROVIDER: "provider", ExitCode.HELD: "running",
        ExitCode.STORAGE: "storage", ExitCode.INTERRUPTED: "interrupted", ExitCode.TERMINATED: "interrupted",
    }.get(exit_code, "bug")  # fmt: skip
    if isinstance(exc, ClusterError):
        reason = "cluster"
    is_message = isinstance(exc, BatchrunError | OSError) or reason == "bug"
    return {
        "job": job.name if job is not None else None,
        "run_id": None,
        "exit_code": int(exit_code),
        "reason": reason,
        "error": (str(exc) or type(exc).__name__) if is_message else reason,
        "ledger": str(job.ledger_path) if job is not None else None,
        "output": None,
        "finished_at": _now(),
    }


@contextmanager
def _errors_of_files() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)) from exc


def _run(job: Job, options: Options, deadline: datetime | None, around: Surroundings) -> Outcome:
    from batchrun.invocation import run

    summary = run(
        job,
        options,
        around.environ,
        deadline=deadline,
        say=around.say,
        watch=around.watch,
        stopper=around.stopper,
    )
    return Outcome(summary.exit_code, summary.document() | {"error": None, "finished_at": _now()}, summary)


def _spent(job: Job, began: int) -> dict[str, Any]:
    """What the ledger says of the run that this call has worked on, if it got so far."""
    from batchrun import accounts
    from batchrun.ledger_view import LedgerView

    if not job.ledger_path.exists():
        return {}
    with suppress(StorageError), closing(LedgerView.read(job.ledger_path)) as ledger:
        rows = ledger.rows(
            "SELECT run_id FROM invocation JOIN run USING (run) WHERE invocation = (SELECT max(invocation) FROM "
            "invocation) AND pid = ? AND host = ? AND invocation.started_at >= ?",
            (os.getpid(), socket.gethostname(), began),
        )
        run = ledger.run_named(rows[0][0]) if rows else None
        if run is not None:
            totals = accounts.totals(ledger, run)
            return {
                "run_id": run.run_id, "ok": totals.ok, "failed": totals.failed, "usd_spent": totals.usd,
                "unknown_attempts": totals.unknown_cost, "total_tokens": totals.total_tokens,
            }  # fmt: skip
    return {}


def _tell(job: Job, document: dict[str, Any], around: Surroundings) -> None:
    """Write the outcome where machines look for it; a disk that takes no more of it decides nothing."""
    if not _is_owner(job):
        return
    path = job.last_run_path
    try:
        with appearing(path) as fp:
            fp.write(f"{exact_json(document)}\n".encode(errors="backslashreplace"))
    except OSError as exc:
        around.warn(f"warning: {path} cannot be written: {exc.strerror or exc}")


def _is_owner(job: Job) -> bool:
    """False if the ledger is another job's, which has its own outcomes to tell."""
    from batchrun.ledger_view import LedgerView

    if not job.ledger_path.exists():
        return True
    try:
        with closing(LedgerView.read(job.ledger_path)) as ledger:
            return ledger.is_of(job.name, job.path)
    except StorageError:
        return True


def _finish(job: Job, document: dict[str, Any], around: Surroundings) -> str | None:
    """Call the job's command; why it failed, or None."""
    if job.on_finish is None:
        return None
    from batchrun.hook import call

    setting, stopper = job.on_finish, around.stopper
    before = stopper.calls if stopper is not None else 0
    why = call(
        setting.command,
        f"{exact_json(document)}\n",
        job.path.parent,
        setting.timeout_seconds,
        around.output,
        lambda: stopper is not None and stopper.calls > before,
    )
    return f"on_finish: {setting.command[0]} {why}" if why is not None else None


def _now() -> str:
    return utc(now_us()).isoformat("T", "seconds")
