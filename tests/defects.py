"""Defects to be planted into the product, so that the tests that guard its promises can be seen to fail."""

from __future__ import annotations

from typing import Any


def plant(name: str) -> None:
    """Break the product in this process."""
    globals()[f"_{name}"]()


def _sends_before_the_commit() -> None:
    import asyncio

    from batchrun.journal import Journal
    from batchrun.ledger import Ledger

    async def intend(self: Any, intent: Any) -> None:
        self._intents.append((intent, asyncio.get_running_loop().create_future()))
        self._schedule()

    Journal.intend = intend  # type: ignore[method-assign]
    # The product's own check is to look away: here it is the witness that must see it.
    Ledger.newest_intended = property(lambda self: 2**62, lambda self, value: None)  # type: ignore[assignment]


def _reserves_nothing() -> None:
    from batchrun.budget import WorstCase

    WorstCase.pico = lambda self, request, now: 0  # type: ignore[method-assign]


def _asks_again_what_is_answered() -> None:
    from batchrun import plan

    plan._is_wanted = lambda state, retry_failed: True


def _forgets_what_is_unknown() -> None:
    from batchrun.ledger import Ledger

    def settle(self: Any) -> None:
        self._db.execute("DELETE FROM attempt WHERE outcome IS NULL")

    Ledger._settle_orphans = settle  # type: ignore[method-assign]


def _takes_no_answer_for_no_bill() -> None:
    from batchrun import chat

    chat.UNKNOWN = chat.NOT_BILLED
    chat._failed_cost = lambda reader: chat.NOT_BILLED


def _settles_twice() -> None:
    from batchrun.ledger import Ledger

    commit = Ledger.commit

    def twice(self: Any, run: Any, settlements: Any, intents: Any) -> None:
        commit(self, run, settlements, intents)
        commit(self, run, settlements, [])

    Ledger.commit = twice  # type: ignore[method-assign]


def _counts_nothing_against_the_cap() -> None:
    from batchrun.budget import Budget

    Budget._fits = lambda self, most, now: True  # type: ignore[method-assign]


def _spends_beyond_the_cap() -> None:
    """As before, and the product's own check is to look away."""
    from batchrun import invocation

    _counts_nothing_against_the_cap()
    invocation.check_cap = lambda *args: None  # type: ignore[assignment]


def _opens_the_gate() -> None:
    from batchrun.pacing import Pacing
    from batchrun.runner import Runner

    make = Runner.__init__

    async def enter(self: Any) -> None:
        self.in_flight += 1

    def wide(self: Any, *args: Any, **keys: Any) -> None:
        make(self, *args, **keys)
        self._concurrency *= 2

    Pacing.enter = enter  # type: ignore[method-assign]
    Runner.__init__ = wide  # type: ignore[method-assign]


def _adds_up_wrongly() -> None:
    from dataclasses import replace
    from decimal import Decimal

    from batchrun import invocation

    summarise = invocation.summarise

    def wrong(*args: Any) -> Any:
        summary = summarise(*args)
        return replace(summary, totals=replace(summary.totals, usd=summary.totals.usd + Decimal("1e-12")))

    invocation.summarise = wrong


def _leaves_a_row_out() -> None:
    from batchrun.plan import Plan

    pending = Plan.pending

    def fewer(self: Any, *args: Any, **keys: Any) -> Any:
        requests = pending(self, *args, **keys)
        next(requests, None)
        yield from requests

    Plan.pending = fewer  # type: ignore[method-assign]


def _renames_before_it_is_synced() -> None:
    import os
    import stat
    from types import SimpleNamespace

    from batchrun import folders

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.fsync(fd)

    folders.os = SimpleNamespace(**{**vars(os), "fsync": fsync})  # type: ignore[assignment]
