"""What goes between a run's workers and its ledger: every intent and every outcome, in commits of many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from batchrun.errors import StorageError
from batchrun.ledger import Ledger
from batchrun.ledger_view import Run
from batchrun.money import NOT_BILLED
from batchrun.records import Action, Exchange, Failure, Intent, Settlement, now_us

_NEVER_SENT = Exchange(
    "failed", failure=Failure("interrupted", Action.RETRY, "interrupted before it was sent"), cost=NOT_BILLED
)


class Journal:
    """Group commit: what arrives and what goes next in one turn of the event loop is one transaction."""

    def __init__(self, ledger: Ledger, run: Run, on_error: Callable[[Exception], None], gap: float) -> None:
        self._gap = gap
        self._last = -gap
        self._ledger = ledger
        self._run = run
        self._on_error = on_error
        self._settlements: list[Settlement] = []
        self._intents: list[tuple[Intent, asyncio.Future[None]]] = []
        self._is_scheduled = False

    def settle(self, settlement: Settlement) -> None:
        """Record an answer with the next commit."""
        self._settlements.append(settlement)
        self._schedule()

    async def intend(self, intent: Intent) -> None:
        """Return once the intent is committed, so that it can be sent."""
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (intent, committed)
        self._intents.append(entry)
        self._schedule()
        try:
            await committed
        except asyncio.CancelledError:
            if entry in self._intents:
                self._intents.remove(entry)
            else:
                after = self._ledger.newest_attempt
                self.settle(Settlement(intent, _NEVER_SENT, now_us(), is_final=False, settled_after=after))
            raise

    def flush(self) -> None:
        """Commit now. After a failure the answers are kept, to be tried again by the next flush."""
        self._is_scheduled = False
        settlements, intents = self._settlements, self._intents
        self._intents = []
        try:
            if settlements or intents:
                self._ledger.commit(self._run, settlements, [intent for intent, _ in intents])
        except Exception as exc:
            if isinstance(exc, StorageError):
                self._ledger.make_room()
            for _, committed in intents:
                if not committed.done():
                    committed.set_exception(exc)
            raise
        self._settlements = []
        for _, committed in intents:
            if not committed.done():
                committed.set_result(None)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            loop = asyncio.get_running_loop()
            if (wait := self._last + self._gap - loop.time()) > 0:
                loop.call_later(wait, self._flush_in_turn)
            else:
                loop.call_soon(self._flush_in_turn)

    def _flush_in_turn(self) -> None:
        self._last = asyncio.get_running_loop().time()
        try:
            self.flush()
        except Exception as exc:  # noqa: BLE001 - nobody may be waiting for this turn; it must not pass in silence
            # The answers are kept, and tried once more at the end.
            self._on_error(exc)
