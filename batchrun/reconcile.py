"""The provider's log against ours: what unknown outcomes cost in truth, and where the two bills differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from batchrun import accounts
from batchrun.accounts import Compared
from batchrun.errors import ExitCode, JobError
from batchrun.job import Job
from batchrun.ledger import Ledger
from batchrun.money import ESTIMATED, usd_text
from batchrun.provider_log import BilledLine, read_log, window
from batchrun.providers import resolve
from batchrun.records import now_us
from batchrun.summary import exact_json

_SHOWN = 20
_OUR_ID = re.compile(r"(.+):(\d+):(\d+)")


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
    estimates: int = 0
    """Estimated amounts that the provider's own have replaced."""
    differences: tuple[Difference, ...] = ()
    """The first few that differ."""
    differing: int = 0
    """Attempts whose reported cost is not what the log says."""
    unrecorded: int = 0
    """Lines with an id of ours that the ledger does not know: sent just before a power cut."""
    unrecorded_usd: Decimal = Decimal(0)
    output: str | None = None
    """The Parquet that was written anew."""

    @property
    def exit_code(self) -> ExitCode:
        """0 if the two bills are one."""
        is_settled = not (self.still_unknown or self.differing or self.unrecorded)
        return ExitCode.OK if is_settled else ExitCode.ROWS_FAILED

    def to_json(self) -> str:
        """One JSON object."""
        document: dict[str, Any] = {
            "lines": self.lines, "billed": self.billed, "billed_usd": self.billed_usd, "not_billed": self.not_billed,
            "still_unknown": self.still_unknown, "still_unknown_usd_at_most": self.still_unknown_usd,
            "estimates_replaced": self.estimates, "differing": self.differing,
            "differences": [vars(difference) for difference in self.differences],
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
            most = self.still_unknown_usd
            amount = f"up to ${usd_text(most)}" if most is not None else "an amount not known"
            lines.append(f"still unknown: {self.still_unknown} attempts, {amount}; they are too new: ask again later")
        if self.estimates:
            lines.append(f"{self.estimates} estimated amounts are replaced by the provider's own")
        lines += [
            f"differs: row {difference.row}: ours ${usd_text(difference.ours)} ({difference.cost_source}), theirs "
            f"${usd_text(difference.theirs)} ({difference.client_request_id})"
            for difference in self.differences
        ]
        if self.differing > _SHOWN:
            lines.append(f"… and {self.differing - _SHOWN} more that differ")
        if self.unrecorded:
            lines.append(
                f"unrecorded: {self.unrecorded} requests of ours (${usd_text(self.unrecorded_usd)}) that the ledger "
                "does not know: they were sent just before a power cut"
            )
        if self.output:
            lines.append(f"output: {self.output}")
        return lines


def reconcile(
    job: Job,
    environ: Mapping[str, str],
    *,
    settle_after_seconds: float,
    rewrite: Callable[[Ledger], str | None],
    on_page: Callable[[int], None],
) -> Reconciliation:
    """Settle what the ledger does not know by what the provider's log says. The caller holds the ledger's lock.

    Args:
        settle_after_seconds: an attempt older than this that the log does not have was not billed.
        rewrite: writes the newest run's Parquet again, if it stands where it should.

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
        start, end = window(_moment(since), _moment(now))
        lines = ledger.take_billed(_ours(read_log(endpoint, start, end, on_page), ledger.run_ids()))
        found = _settle(ledger, int(start.timestamp() * 1e6), now - int(settle_after_seconds * 1e6))
        is_changed = found.billed or found.not_billed or found.estimates
        return replace(found, lines=lines, output=rewrite(ledger) if is_changed else None)


def _ours(lines: Iterable[BilledLine], run_ids: set[str]) -> Iterator[tuple[int, str, str, Decimal]]:
    """Lines with an id that a run of this ledger made: the attempt that it names, both identities, dollars."""
    for line in lines:
        match = _OUR_ID.fullmatch(line.client_request_id)
        if match is not None and match[1] in run_ids:
            yield int(match[3]), line.client_request_id, line.identity, line.usd


def _settle(ledger: Ledger, since: int, settled_before: int) -> Reconciliation:
    found = Reconciliation(0)
    corrections: list[tuple[int, Decimal, str]] = []
    differences: list[Difference] = []
    counts: dict[str, Any] = dict.fromkeys(("billed", "not_billed", "still_unknown", "estimates", "differing"), 0)
    billed_usd = Decimal(0)
    most: Decimal | None = Decimal(0)
    for attempt in accounts.compared(ledger, since):
        theirs = attempt.theirs
        if attempt.ours is None:
            if theirs is None and attempt.over_at > settled_before:
                counts["still_unknown"] += 1
                most = most + attempt.reserved if most is not None and attempt.reserved is not None else None
            elif theirs:
                counts["billed"] += 1
                billed_usd += theirs
                corrections.append((attempt.attempt_id, theirs, "reported"))
            else:
                counts["not_billed"] += 1
                corrections.append((attempt.attempt_id, Decimal(0), "not_billed"))
            continue
        if theirs is None:
            continue
        is_estimate = attempt.cost_source in ESTIMATED
        if is_estimate:
            counts["estimates"] += 1
            corrections.append((attempt.attempt_id, theirs, "reported"))
        if theirs != attempt.ours:
            counts["differing"] += not is_estimate
            differences.append(_difference(attempt, attempt.ours, theirs))
    if older := accounts.unknown_before(ledger, since):
        counts["still_unknown"] += older
        most = None
    # Those that nothing mends come first.
    differences.sort(key=lambda difference: difference.cost_source in ESTIMATED)
    unrecorded, unrecorded_usd = accounts.unrecorded(ledger)
    ledger.correct("reconcile", corrections)
    return replace(
        found,
        **counts,
        billed_usd=billed_usd,
        still_unknown_usd=most,
        differences=tuple(differences[:_SHOWN]),
        unrecorded=unrecorded,
        unrecorded_usd=unrecorded_usd,
    )


def _difference(attempt: Compared, ours: Decimal, theirs: Decimal) -> Difference:
    return Difference(attempt.row_index + 1, attempt.client_request_id, ours, attempt.cost_source or "", theirs)


def _moment(us: int) -> datetime:
    return datetime.fromtimestamp(us / 1e6, UTC)
