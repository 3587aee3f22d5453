"""The provider's log against ours: what unknown outcomes cost in truth, and where the two bills differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from batchrun import accounts
from batchrun.accounts import Compared
from batchrun.errors import ExitCode, JobError, ProviderError
from batchrun.job import Job
from batchrun.ledger import Ledger
from batchrun.money import DERIVED, exact_json, usd_text
from batchrun.provider_log import BilledLine, read_log, window
from batchrun.providers import resolve
from batchrun.records import now_us, utc

_SHOWN = 20
_OUR_ID = re.compile(r"(.+):(\d{1,18}):(\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class Difference:
    """An attempt that their log prices otherwise than our ledger does."""

    row: int
    """Counted from 1."""
    client_request_id: str
    ours: Decimal
    cost_source: str
    theirs: Decimal


@dataclass(frozen=True)
class Reconciliation:
    """What the provider's log has told."""

    lines: int
    billed: int = 0
    """Attempts of unknown cost that are on the bill."""
    billed_usd: Decimal = Decimal(0)
    not_billed: int = 0
    """Attempts of unknown cost that are not."""
    still_unknown: int = 0
    still_unknown_usd: Decimal | None = None
    """The most that those can have cost; None if that is not known."""
    too_old: int = 0
    """Attempts of unknown cost from before what the log reaches back to."""
    too_old_usd: Decimal | None = None
    derived: int = 0
    """Amounts derived from tokens that the provider's own have replaced."""
    differences: tuple[Difference, ...] = ()
    """The first few that differ."""
    differing: int = 0
    """Attempts whose reported cost is not what the log says."""
    missing: int = 0
    """Attempts that the provider reported as billed, and that its log does not have."""
    unrecorded: int = 0
    """Lines with an id of ours that the ledger does not know: sent just before a power cut."""
    unrecorded_usd: Decimal = Decimal(0)
    output: str | None = None
    """What became of the Parquet; None if it need not change."""

    @property
    def exit_code(self) -> ExitCode:
        """0 if the two bills are one."""
        is_settled = not (self.still_unknown or self.too_old or self.differing or self.missing or self.unrecorded)
        return ExitCode.OK if is_settled else ExitCode.ROWS_FAILED

    def to_json(self) -> str:
        """One JSON object."""
        document: dict[str, Any] = {
            "lines": self.lines, "billed": self.billed, "billed_usd": self.billed_usd, "not_billed": self.not_billed,
            "still_unknown": self.still_unknown, "still_unknown_usd_at_most": self.still_unknown_usd,
            "too_old": self.too_old, "too_old_usd_at_most": self.too_old_usd, "derived_replaced": self.derived,
            "differing": self.differing,
            "differences": [vars(difference) for difference in self.differences],
            "missing": self.missing,
            "unrecorded": self.unrecorded, "unrecorded_usd": self.unrecorded_usd, "output": self.output,
        }  # fmt: skip
        return exact_json(document)

    def report(self) -> list[str]:
        """A short text."""
        lines = [
            f"reconciled with {self.lines} lines of the provider's log: {self.billed} attempts of unknown cost are on "
            f"the bill (${usd_text(self.billed_usd)}), {self.not_billed} are not"
        ]
        if self.still_unknown:
            lines.append(
                f"still unknown: {self.still_unknown} attempts, {_at_most(self.still_unknown_usd)}; the log does not "
                "have them, or not yet: ask again later"
            )
        if self.too_old:
            lines.append(
                f"too old: {self.too_old} attempts, {_at_most(self.too_old_usd)}, are from before what the log reaches "
                "back to (92 days): look for them on the bill"
            )
        if self.derived:
            lines.append(f"{self.derived} amounts that were derived from tokens are replaced by the provider's own")
        lines += [
            f"differs: row {difference.row}: ours ${usd_text(difference.ours)} ({difference.cost_source}), theirs "
            f"${usd_text(difference.theirs)} ({difference.client_request_id})"
            for difference in self.differences
        ]
        if self.differing > _SHOWN:
            lines.append(f"… and {self.differing - _SHOWN} more that differ")
        if self.missing:
            lines.append(
                f"missing: {self.missing} attempts that the provider reported as billed are not in its log: is it that "
                "of another account or key?"
            )
        if self.unrecorded:
            lines.append(
                f"unrecorded: {self.unrecorded} requests of ours (${usd_text(self.unrecorded_usd)}) that the ledger "
                "does not know: they were sent just before a power cut"
            )
        if self.output:
            lines.append(self.output)
        return lines


def reconcile(
    job: Job,
    environ: Mapping[str, str],
    *,
    settle_after_seconds: float,
    rewrite: Callable[[Ledger], str],
    on_page: Callable[[int], None],
) -> Reconciliation:
    """Settle what the ledger does not know by what the provider's log says. The caller holds the ledger's lock.

    Args:
        settle_after_seconds: an attempt older than this that the log does not have was not billed.
        rewrite: writes the newest run's Parquet again, and tells what became of it.

    Raises:
        JobError: there is nothing to reconcile, or the provider has no log.
        ProviderError: the log could not be read to its end; nothing was changed.
    """
    endpoint = resolve(**job.provider.model_dump(), environ=environ)
    if not endpoint.has_logs:
        raise JobError(f"the provider {endpoint.name!r} has no log that batchrun can read: only the AI/ML API has one")
    if not job.ledger_path.exists():
        raise JobError(f"there is nothing to reconcile: no run of this job is in {job.ledger_path}")
    with closing(Ledger.open(job.ledger_path, job_name=job.name, job_path=job.path)) as ledger:
        since = accounts.unreconciled_since(ledger)
        if since is None:
            raise JobError(f"there is nothing to reconcile: nothing was sent yet ({ledger.path})")
        now = now_us()
        start, end = window(utc(since), utc(now))
        lines = ledger.take_billed(_ours(read_log(endpoint, start, end, on_page), ledger.run_ids()))
        patience = _Patience(now, settle_after_seconds, job.timeout_seconds)
        found = _settle(ledger, int(start.timestamp() * 1e6), patience, endpoint.identity)
        is_changed = found.billed or found.not_billed or found.derived
        return replace(found, lines=lines, output=rewrite(ledger) if is_changed else None)


def _ours(lines: Iterable[BilledLine], run_ids: set[str]) -> Iterator[tuple[int, str, str, Decimal]]:
    """Lines with an id that a run of this ledger made: the attempt that it names, both identities, dollars."""
    for line in lines:
        match = _OUR_ID.fullmatch(line.client_request_id)
        if match is None or match[1] not in run_ids:
            continue
        if line.usd is None:
            raise ProviderError(
                f"the line of {line.client_request_id} in the provider's log has no cost; nothing was changed"
            )
        yield int(match[3]), line.client_request_id, line.identity, line.usd


@dataclass(frozen=True)
class _Patience:
    """How long an attempt must be over before a log without it says that it was not billed."""

    now: int
    seconds: float
    timeout_seconds: float

    def is_over(self, attempt: Compared) -> bool:
        """True if it is."""
        wait = attempt.seconds + self.seconds if attempt.seconds is not None else self.seconds
        if attempt.seconds is None and self.seconds:
            # Nobody saw its end: it may have been at work for as long as it was allowed to.
            wait = max(wait, self.timeout_seconds)
        return attempt.sent_at + wait * 1e6 <= self.now


@dataclass
class _Tally:
    billed: int = 0
    billed_usd: Decimal = Decimal(0)
    not_billed: int = 0
    still_unknown: int = 0
    still_unknown_usd: Decimal | None = Decimal(0)
    derived: int = 0
    differing: int = 0
    unmended: list[Difference] = field(default_factory=list)
    mended: list[Difference] = field(default_factory=list)


def _settle(ledger: Ledger, since: int, patience: _Patience, endpoint: str) -> Reconciliation:
    tally = _Tally()
    known = accounts.in_log(ledger, since, patience.now - int(patience.seconds * 1e6))
    # A log that has nothing of a run that was answered is another account's: it says nothing by what it lacks.
    silent = {run for run, found in known.items() if found.answered and not found.lines}
    ledger.correct("reconcile", _corrections(accounts.compared(ledger, since, endpoint), patience, silent, tally))
    too_old, too_old_usd = accounts.unknown_before(ledger, since)
    unrecorded, unrecorded_usd = accounts.unrecorded(ledger)
    return Reconciliation(
        lines=0,
        billed=tally.billed,
        billed_usd=tally.billed_usd,
        not_billed=tally.not_billed,
        still_unknown=tally.still_unknown,
        still_unknown_usd=tally.still_unknown_usd,
        too_old=too_old,
        too_old_usd=too_old_usd,
        derived=tally.derived,
        differences=tuple([*tally.unmended, *tally.mended][:_SHOWN]),
        differing=tally.differing,
        missing=sum(found.missing for found in known.values()),
        unrecorded=unrecorded,
        unrecorded_usd=unrecorded_usd,
    )


def _corrections(
    attempts: Iterable[Compared], patience: _Patience, silent: Container[int], tally: _Tally
) -> Iterator[tuple[int, Decimal, str]]:
    """What the log tells of attempts whose cost we do not know, or know only by derivation."""
    for attempt in attempts:
        ours, theirs = attempt.ours, attempt.theirs
        # That a line was not there yet is no last word.
        is_open = ours is None or (attempt.origin == "reconcile" and attempt.cost_source == "not_billed")
        if is_open and theirs:
            tally.billed += 1
            tally.billed_usd += theirs
            yield attempt.attempt_id, theirs, "reported"
        elif (
            ours is None
            and theirs is None
            and (attempt.is_elsewhere or attempt.run in silent or not patience.is_over(attempt))
        ):
            tally.still_unknown += 1
            if tally.still_unknown_usd is not None:
                known = attempt.reserved
                tally.still_unknown_usd = tally.still_unknown_usd + known if known is not None else None
        elif ours is None:
            tally.not_billed += 1
            yield attempt.attempt_id, Decimal(0), "not_billed"
        elif theirs is not None and not is_open:
            is_derived = attempt.cost_source in DERIVED
            if theirs != ours:
                tally.differing += not is_derived
                shown = tally.mended if is_derived else tally.unmended
                if len(shown) < _SHOWN:
                    shown.append(_difference(attempt, ours, theirs))
            if is_derived:
                tally.derived += 1
                yield attempt.attempt_id, theirs, "reported"


def _at_most(usd: Decimal | None) -> str:
    return f"up to ${usd_text(usd)}" if usd is not None else "an amount not known"


def _difference(attempt: Compared, ours: Decimal, theirs: Decimal) -> Difference:
    return Difference(attempt.row_index + 1, attempt.client_request_id, ours, attempt.cost_source or "", theirs)
