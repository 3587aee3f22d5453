"""Jobs from Python: for orchestrators and notebooks. Nothing is printed, and no signal handler is touched.

    >>> import batchrun
    >>> result = batchrun.run("jobs/eval.yaml", overrides={"input.limit": 2})
    >>> result.exit_code, result.ok, result.summary["total_tokens"] > 0
    (0, 2, True)
    >>> result.to_pandas()["status"].tolist()
    ['ok', 'ok']

The promises are those of the command line. The work is done in a thread of its own, so that `run` can be called where
an event loop runs, such as in a notebook.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from batchrun.errors import StorageError
from batchrun.loading import load_job
from batchrun.options import Options, Overlap
from batchrun.outcome import Outcome, Surroundings, carry_out
from batchrun.records import CLOCK, Settlement, now_us, utc
from batchrun.remote import RemotePath, is_url
from batchrun.stopper import Stopper

if TYPE_CHECKING:  # heavy, and imported where they are used
    import pandas as pd


@dataclass(frozen=True)
class Said:
    """A line that the command line would have said."""

    text: str


@dataclass(frozen=True)
class Progressed:
    """How far a run has come; about once a second, and at its end."""

    rows: int
    """That the invocation is to settle in all, with those that were settled before it."""
    settled: int
    failed: int
    """Of those settled by this invocation."""
    usd_spent: Decimal
    """By the whole run, of what is known."""
    total_tokens: int
    """Likewise."""


Event = Said | Progressed


@dataclass(frozen=True)
class RunResult:
    """How a call of a job ended."""

    job: str
    run_id: str | None
    """None if another process was at work, and this call has left it to that."""
    exit_code: int
    """As the command line's: 0 every row has an answer, 1 some rows failed, 3 stopped by a limit, …"""
    reason: str | None
    """Why the run is not all done, such as `deadline` or `budget`; None if it is."""
    rows: int
    ok: int
    failed: int
    pending: int
    usd_spent: Decimal
    """By the whole run, of what is known; exact."""
    output: Path | str | None
    """The Parquet, or the folder of its parts; the URL of one in a store; None if none was written."""
    ledger: Path
    summary: Mapping[str, Any]
    """All that `--json` prints."""

    def to_pandas(self) -> pd.DataFrame:
        """The output; columns of whole numbers stay so where some are missing (`Int64`).

        Raises:
            StorageError: there is no output, or another run has written it since.
        """
        import pandas as pd

        from batchrun.written import Written

        if self.run_id is None:
            raise StorageError("the call was skipped: another process was at work")
        if self.output is None:
            raise StorageError(f"run {self.run_id} has written no output: `batchrun export` does it ({self.ledger})")
        written = Written.at(RemotePath.of(self.output) if isinstance(self.output, str) else self.output)
        if written is None or written.manifest.get("run_id") != self.run_id:
            now = f"is of run {written.manifest.get('run_id')} by now" if written is not None else "cannot be read"
            raise StorageError(f"{self.output} {now}: `batchrun export` writes that of run {self.run_id}")
        frames = []
        for path in written.files:
            with path.open("rb") as fp:
                frames.append(pd.read_parquet(fp, dtype_backend="numpy_nullable"))
        return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


class RunOptions(TypedDict, total=False):
    """How `run` and `arun` are called; each may be left out."""

    environ: Mapping[str, str]
    """Where keys and variables are read from; this process's environment without it. The workers of a cluster read the
    environment of their nodes: with another key in it, they are refused."""
    if_running: str
    """What to do while another process works on the job: `fail` (the usual: LedgerHeldError), `skip` (a result with the
    reason `skipped`), `wait` or `wait=SECONDS`."""
    new: bool
    """Begin a new run; an unfinished one is abandoned, and its money still counts."""
    max_age: timedelta
    """Likewise if the unfinished run began so long ago."""
    deadline: str | datetime | timedelta
    """Ask no more rows in time to be done by then; text as in the job file."""
    retry_failed: bool
    """Ask the failed rows again."""
    sample: int
    """Ask so many random rows only."""
    adopt_ledger: bool
    """Take over the ledger of a job file that has been moved or renamed."""
    clock: Callable[[], float]
    """Tells the seconds since 1970, UTC, by which attempts are dated and budgets reckoned; the machine's without it."""


def run(
    job: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], object] | None = None,
    **options: Unpack[RunOptions],
) -> RunResult:
    """Run a job, or go on with its unfinished run.

    Ctrl-C stops it as on the command line: what is in flight is awaited and kept, then KeyboardInterrupt is raised. So
    does whatever else a signal handler of the caller raises.

    Args:
        job: the job file.
        overrides: other values for some of its keys, such as `{"parameters.temperature": 0.2, "input.limit": 10}`;
            paths in them are relative to the job file, too. The ledger stays where it is.
        on_event: called with all that is said and how far it has come, from the thread that does the work. What it
            raises stops the run, as Ctrl-C does, and is raised here.
        options: see `RunOptions`.

    Raises:
        BatchrunError: whatever keeps the job from being run; its `exit_code` is what the command line would exit with.
        TypeError: there is no such option.

    The process's soft limit of open files is raised where the job's concurrency needs it.
    """
    call = _Call(job, overrides, on_event, options)
    done = threading.Event()
    raised: BaseException | None = None
    call.start(done.set)
    while not done.is_set():
        try:
            done.wait()
        except BaseException as exc:  # noqa: BLE001 - Ctrl-C, or what a signal handler of the caller raises
            raised = raised or exc
            call.stop()
    if raised is not None:
        raise raised
    return call.result()


async def arun(
    job: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], object] | None = None,
    **options: Unpack[RunOptions],
) -> RunResult:
    """`run` inside of a running event loop, which goes on meanwhile; `on_event` is called in it.

    When it is cancelled, no more rows are asked, what is in flight is awaited and kept, and then it ends as cancelled;
    a second time, what is in flight is dropped, and may be on the bill.

    >>> asyncio.run(arun("jobs/eval.yaml", overrides={"input.limit": 2}, new=True)).reason is None
    True
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def told(event: Event) -> None:
        if on_event is not None:
            loop.call_soon_threadsafe(call.guarded, on_event, event)

    call = _Call(job, overrides, told if on_event is not None else None, options)
    call.start(lambda: loop.call_soon_threadsafe(done.set))
    is_cancelled = False
    while not done.is_set():
        try:
            await done.wait()
        except asyncio.CancelledError:
            is_cancelled = True
            call.stop()
    if is_cancelled:
        raise asyncio.CancelledError
    return call.result()


class _Call:
    """One call, in a thread of its own."""

    def __init__(
        self,
        job: str | os.PathLike[str],
        overrides: Mapping[str, Any] | None,
        on_event: Callable[[Event], object] | None,
        options: RunOptions,
    ) -> None:
        for name in options:
            if name not in RunOptions.__annotations__:
                raise TypeError(f"there is no option {name!r}: there are {', '.join(RunOptions.__annotations__)}")
        self.stop = Stopper()
        self._on_event = on_event
        self._error: BaseException | None = None
        self._outcome: Outcome | None = None
        context = copy_context()
        if (clock := options.get("clock")) is not None:
            context.run(CLOCK.set, clock)
        chosen = Options(
            Overlap.of(options.get("if_running", "fail")),
            retry_failed=options.get("retry_failed", False),
            adopt_ledger=options.get("adopt_ledger", False),
            sample=options.get("sample"),
            is_new=options.get("new", False),
            max_age=options.get("max_age"),
        )
        settings = dict(overrides or {})
        if (deadline := options.get("deadline")) is not None:
            settings["deadline"] = context.run(_deadline, deadline)
        loaded = load_job(Path(job), settings)
        self._ledger = loaded.ledger_path
        around = Surroundings(
            say=lambda line: self._tell(Said(line)),
            warn=lambda line: self._tell(Said(line)),
            environ=options.get("environ", os.environ),
            watch=self._watch if on_event is not None else None,
            stopper=self.stop,
        )
        self._work: Callable[[], Outcome] = lambda: context.run(carry_out, loaded, chosen, around)

    def start(self, done: Callable[[], object]) -> None:
        """Begin; `done` is called at the end, in the thread that has done it."""

        def work() -> None:
            try:
                self._outcome = self._work()
            except BaseException as exc:  # noqa: BLE001 - it is for whoever waits for the result
                self._error = self._error or exc
            finally:
                done()

        threading.Thread(target=work, name="batchrun").start()

    def result(self) -> RunResult:
        """How it ended; an error of its own is raised."""
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        if self._outcome.error is not None:
            raise self._outcome.error
        document = self._outcome.document
        output = document["output"]
        return RunResult(
            job=document["job"],
            run_id=document["run_id"],
            exit_code=int(self._outcome.exit_code),
            reason=document["reason"],
            rows=document.get("rows", 0),
            ok=document.get("ok", 0),
            failed=document.get("failed", 0),
            pending=document.get("pending", 0),
            usd_spent=document.get("usd_spent", Decimal(0)),
            output=_place(output),
            ledger=self._ledger,
            summary=document,
        )

    def guarded(self, heard: Callable[[Event], object], event: Event) -> None:
        """Tell somebody, who stops the run by raising."""
        try:
            heard(event)
        except BaseException as exc:  # noqa: BLE001 - it is raised where the run was called
            if self._error is None:
                self._error = exc
                self.stop()

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            self.guarded(self._on_event, event)

    def _watch(self, *, total: int, rows: int, settled: int, usd: Decimal, tokens: int) -> _Watcher:
        return _Watcher(self._tell, total, settled, usd, tokens)


class _Watcher:
    """Counts settlements for events."""

    def __init__(self, tell: Callable[[Event], None], rows: int, settled: int, usd: Decimal, tokens: int) -> None:
        self._tell = tell
        self._rows, self._settled, self._failed = rows, settled, 0
        self._usd, self._tokens = usd, tokens

    def settle(self, settlement: Settlement) -> None:
        """Take one settled attempt."""
        self._usd += settlement.exchange.cost.usd or 0
        self._tokens += settlement.exchange.usage.total_tokens or 0
        if settlement.decides:
            self._settled += 1
            self._failed += settlement.exchange.outcome != "ok"

    def tick(self) -> None:
        """About once a second."""
        self._tell(Progressed(self._rows, self._settled, self._failed, self._usd, self._tokens))

    def close(self) -> None:
        """The sending is over."""
        self.tick()


def _place(output: str | None) -> Path | str | None:
    return Path(output) if output is not None and not is_url(output) else output


def _deadline(deadline: str | datetime | timedelta) -> str:
    """As text, which is what the job has."""
    if isinstance(deadline, timedelta):
        try:
            deadline = utc(now_us()) + deadline
        except OverflowError:
            deadline = datetime.max.replace(tzinfo=UTC)
    return deadline.isoformat() if isinstance(deadline, datetime) else deadline
