"""What a person sees while a run goes on: a bar on a terminal, a plain line every 30 s elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import IO, Any, Protocol

from batchrun.money import usd_text
from batchrun.records import Settlement

_LINE_SECONDS = 30.0
_ENOUGH = 20
"""Rows from which on a rate says something."""
_USUAL_WIDTH, _USUAL_HEIGHT = 100, 24


class Watcher(Protocol):
    """Whoever is told how the sending goes on."""

    def settle(self, settlement: Settlement) -> None:
        """Take one settled attempt."""

    def tick(self) -> None:
        """Called about once a second."""

    def close(self) -> None:
        """The sending is over."""


class Watch(Protocol):
    """What makes a watcher, once it is known what there is to do."""

    def __call__(self, *, total: int, rows: int, settled: int, usd: Decimal, tokens: int) -> Watcher:
        """The arguments are those of `Progress`."""


class Progress:
    """Counts settlements and shows them.

    Args:
        total: rows that are to be settled.
        rows: of the whole input, which the projected total is for.
        settled: rows that were settled before.
        usd, tokens: what the run had spent before.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        total: int,
        rows: int,
        settled: int,
        usd: Decimal,
        tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._total = total
        self._rows = rows
        self._settled = settled
        self._begun = self._line_at = clock()
        self._before = settled
        self._failed = self._retries = 0
        self._tokens = tokens
        self._usd = self._usd_before = usd
        self._is_estimated = False
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=settled,
                file=stream,
                unit="row",
                smoothing=0.1,
                mininterval=0.25,
                dynamic_ncols=_width(stream) > 0,
                # Some terminals, such as a container's, say that they are 0 wide and 0 high.
                ncols=None if _width(stream) else _USUAL_WIDTH,
                nrows=None if _width(stream) else _USUAL_HEIGHT,
            )

    def settle(self, settlement: Settlement) -> None:
        """Take one settled attempt."""
        self._tokens += settlement.exchange.usage.total_tokens or 0
        self._usd += settlement.exchange.cost.usd or 0
        self._is_estimated |= settlement.exchange.cost.source == "library"
        if not settlement.decides:
            self._retries += 1
            return
        self._settled += 1
        self._failed += settlement.exchange.outcome != "ok"
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts(), refresh=False)
            self._bar.update(1)

    def tick(self) -> None:
        """Call about once a second."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts(), refresh=True)
        elif self._clock() - self._line_at >= _LINE_SECONDS:
            self._line_at = self._clock()
            with suppress(OSError):
                self._stream.write(f"{self._line()}\n")
                self._stream.flush()

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._bar is not None:
            self._bar.close()

    def _facts(self) -> str:
        # Dollars first: a narrow terminal cuts the end off, and half an amount reads as a whole one.
        estimated = " estimated" if self._is_estimated else ""
        usd = f"${usd_text(round(self._usd, 6))}{self._projected()}{estimated}"
        return f"{usd}, {self._failed} failed, {self._retries} retries, {self._tokens} tokens"

    def _projected(self) -> str:
        """What the whole run will cost, at the rate of what this invocation has settled."""
        here = self._settled - self._before
        spent = self._usd - self._usd_before
        if here < _ENOUGH or not spent or self._settled >= self._rows:
            return ""
        return f" of about ${usd_text(round(self._usd + spent / here * (self._rows - self._settled), 4))}"

    def _line(self) -> str:
        rate = (self._settled - self._before) / max(1e-9, self._clock() - self._begun)
        left = f", {(self._total - self._settled) / rate:.0f} s left" if rate > 0 else ""
        return f"batchrun: {self._settled}/{self._total} rows, {rate:.1f} rows/s, {self._facts()}{left}"


def _width(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 0
