"""The values that flow between the rooms.

Those that every row makes are named tuples: a frozen dataclass takes five times as long to be made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple

from batchrun.money import UNKNOWN, Cost
from batchrun.stored import NOTHING, Stored
from batchrun.usage import Usage

CLOCK: ContextVar[Callable[[], float]] = ContextVar("CLOCK", default=time.time)
"""Tells the seconds since 1970, UTC; another one moves a run to another day."""


def now_us() -> int:
    """Microseconds since 1970, UTC."""
    return round(CLOCK.get()() * 1e6)


def utc(microseconds: int) -> datetime:
    """The moment so long after the beginning of 1970, UTC."""
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def seconds(microseconds: int | None) -> float | None:
    """Of what the ledger holds in microseconds."""
    return microseconds / 1e6 if microseconds is not None else None


class Slot(NamedTuple):
    """One answer to be had: input row (counted from 0) × model (its id) × sample (counted from 0)."""

    row_index: int
    model: str
    sample: int = 0


Group = tuple[Slot, str]
"""The attempts of a run with one slot and one key: those of the slot that its first attempt was made for."""


class RowSlots(NamedTuple):
    """Which slots each row of the input has."""

    models: tuple[str, ...]
    """As requests call them, in the job's order."""
    samples: int = 1

    @property
    def number(self) -> int:
        """Slots of a row."""
        return len(self.models) * self.samples

    def of(self, row_index: int) -> Iterator[Slot]:
        """The slots of a row, in the order of the output."""
        for model in self.models:
            for sample in range(self.samples):
                yield Slot(row_index, model, sample)


class Action(Enum):
    """What a failure asks for."""

    RETRY = "retry"
    PACE = "pace"
    """Retry; the provider asks for fewer requests, so it counts against the row's time, not against its attempts."""
    REJECT = "reject"
    """This row cannot be answered as it is asked."""
    STOP = "stop"
    """No row can be answered: the account is refused."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an exchange brought no answer."""

    kind: str
    """auth, billing, quota, forbidden, bad_request, not_found, redirect, rate_limit, overloaded, server, timeout,
    connect, disconnect, malformed, incomplete_stream, interrupted; of the engine: worker, cluster."""
    action: Action
    message: str
    code: str | None = None
    upstream_type: str | None = None
    retry_after: float | None = None
    request_id: str | None = None

    @property
    def is_providers_fault(self) -> bool:
        """True if the provider asks for fewer requests, or was not reached: any row would have met the same."""
        return self.action is Action.PACE or self.kind == "connect"

    @property
    def is_engines_fault(self) -> bool:
        """True if whoever was to send it was lost: it says nothing of the provider, nor of the row."""
        return self.kind in ("worker", "cluster")

    def __str__(self) -> str:
        named = f"{self.kind} ({self.code})" if self.code else self.kind
        asked = f" [request {self.request_id}]" if self.request_id else ""
        return f"{named}: {self.message}{asked}"


class Answer(NamedTuple):
    """A completion in normal form."""

    text: str | None
    finish_reason: str
    """stop, length, tool_calls, content_filter, unknown, or the provider's own word."""
    finish_reason_raw: str | None = None
    usage: Usage = Usage()
    usd: Decimal | None = None
    """Dollars that the provider reports, in the body or a header; None if it reports none."""
    usd_source: str | None = None
    """`reported` or `credits`."""
    credits_used: Decimal | None = None
    model: str | None = None
    answer_id: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[dict[str, object], ...] = ()
    flags: tuple[str, ...] = ()


class Request(NamedTuple):
    """A slot's request, ready for the wire."""

    slot: Slot
    key: str
    body: bytes
    tries: int = 0
    """Attempts that the slot has had already."""
    messages: int = 1
    """Messages of the conversation."""
    most_completion_tokens: int | None = None
    """The longest answer that the request allows; None if it sets no bound."""
    is_self_contained: bool = True
    """False if it names something outside, such as an image by its address: its bytes bound no tokens then."""
    media: int = 0
    """Images, files and sounds in them."""
    repair: int = 0
    """How often the slot was asked again because its answer did not fit, this time included."""
    repair_key: str | None = None
    """Of a request that asks again; `key` stays that of its slot."""
    home: int | None = None
    """Of a request that asks again: the row that was answered, where the slot's is another now; the ledger keeps the
    answers together."""

    @property
    def group(self) -> Slot:
        """Under which the ledger holds the slot's attempts, together with `key`."""
        return self.slot if self.home is None else self.slot._replace(row_index=self.home)


class Exchange(NamedTuple):
    """What became of one HTTP exchange.

    Attributes:
        outcome: `ok`; `failed` (the provider or the connection said so); `unknown` (no answer came, and the
            provider may have done the work).
        body: the raw answer as it arrived, decoded from any content encoding; as the ledger keeps it.
        latency_seconds: from the request to the end of the answer.
    """

    outcome: str
    status: int | None = None
    body: Stored = NOTHING
    streamed: bool = False
    answer: Answer | None = None
    failure: Failure | None = None
    usage: Usage = Usage()
    cost: Cost = UNKNOWN
    request_id: str | None = None
    latency_seconds: float = 0.0
    first_token_seconds: float | None = None
    flags: tuple[str, ...] = ()


class Reservation(NamedTuple):
    """Dollars set aside for an attempt before it is sent."""

    pico: int | None
    """The most it can cost, in pico-dollars; None if that is not known."""
    made_at: int
    """Microseconds since 1970, UTC; the attempt's `sent_at`."""


class Intent(NamedTuple):
    """An attempt before it is sent."""

    attempt_id: int
    request: Request
    sent_at: int
    """Microseconds since 1970, UTC."""
    client_request_id: str
    reserved_pico: int | None = None
    """The most it can cost, in pico-dollars; None if that is not known."""
    recorded: tuple[Any, ...] = ()
    """What the ledger holds of it, in its columns' order; its seal covers that, too."""


class Settlement(NamedTuple):
    """What became of an attempt, and whether that decides its slot.

    A failure with `is_final` makes its row a failed one; without, the row is to be asked again.
    """

    intent: Intent
    exchange: Exchange
    settled_at: int
    is_final: bool
    held_pico: int | None = None
    """What a cap counts the attempt as, where that is neither its cost nor its reservation."""
    settled_after: int | None = None
    """The newest attempt that there was then: what came first, this or another's intent."""
    repair_wanted: int | None = None
    """The slot is to be asked again, for the so many-th time, because the answer does not fit."""

    @property
    def decides(self) -> bool:
        """Whether nothing more is asked for its slot."""
        return self.is_final and self.repair_wanted is None


class Review(NamedTuple):
    """What an answer is worth to the job."""

    fits: bool = True
    """It has the form that is wanted, or none is."""
    again: Request | None = None
    """The slot is to be asked again with this."""


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be asked: it is failed, and costs nothing."""

    slot: Slot
    error: str
    key: str | None = None
    """Of its request, where it gives one: an answer that it had before stays."""


class Asked(NamedTuple):
    """What some consecutive rows of the input ask for."""

    rows: int
    keys: Sequence[tuple[Slot, str]] = ()
    """Of the slots that have a request; none where they are not needed."""
    faults: Sequence[RowFault] = ()


class StandingAttempt(NamedTuple):
    """A settled attempt, with the slot that it stands in now: flat, and as the ledger has it, for there are many."""

    row_index: int
    model: str
    sample: int
    attempt_id: int
    key: str
    client_request_id: str
    settled_at: int
    outcome: str
    final: int
    error: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    usd_pico: int | None
    """In pico-dollars; None if it is not known."""
    cost_source: str | None
    request_id: str | None
    latency_us: int | None
    first_token_us: int | None
    streamed: int
    flags: str | None
    """With commas between them."""
    is_reused: int
    """It was made for another slot, and is counted there."""
    body: bytes | None
    """The raw answer, for an attempt that is `ok`."""

    @property
    def slot(self) -> Slot:
        """The one that it stands in."""
        return Slot(self.row_index, self.model, self.sample)


@dataclass(frozen=True)
class Totals:
    """Sums over a run. Dollars are exact."""

    ok: int
    failed: int
    usd: Decimal
    usd_by_source: dict[str, Decimal]
    unknown_cost: int
    unknown_outcomes: int
    """Attempts whose answer never came and whose cost nobody has told since."""
    unknown_rows: int
    first_unknown_rows: list[int]
    """Their rows, counted from 0; the first few."""
    unknown_usd: Decimal | None
    """The most that those attempts can have cost; None if that is not known for all."""
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    attempts: int
    unplaced: int
    unplaced_usd: Decimal
    repairs: int
    """Attempts that asked again for an answer that fits."""
    repair_usd: Decimal
    reused: int
    """Slots that took the answer of another one."""
    saved_usd: Decimal | None
    """What those answers had cost; None if that is not known for all."""
    failures: list[tuple[str, int, str]]
    """Kind, number of failed rows, one example."""
    flags: dict[str, int]
    slowest_seconds: float | None
