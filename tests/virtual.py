"""An event loop on a virtual clock: nothing sleeps, and what one seed does it does again."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

_TURN_SECONDS = 1e-7


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing else is to be done.

    Attributes:
        now: seconds since it was made.
        turns: how often it has looked for something to do.
        on_turn: called in each turn.
        signal_handlers: those that were added, by signal, to be called at will.
    """

    def __init__(self) -> None:
        super().__init__(_NoWaiting(self))
        self.now = 0.0
        self.turns = 0
        self.on_turn: Callable[[int], None] = lambda turn: None
        self.signal_handlers: dict[int, Callable[[], Any]] = {}

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """No thread, whose moment would be left to chance."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001 - it is the caller's
            future.set_exception(exc)
        return future

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:
        self.signal_handlers[sig] = lambda: callback(*args)

    def remove_signal_handler(self, sig: int) -> bool:
        return self.signal_handlers.pop(sig, None) is not None


class _NoWaiting(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        loop.turns += 1
        loop.on_turn(loop.turns)
        found: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        loop.now += _TURN_SECONDS  # whoever waits for a moment may look a little too early, and again, and again
        if not found and timeout:
            loop.now += timeout
        elif not found and timeout is None:
            raise AssertionError("nothing is left to be done, and the runner waits")
        return found
