"""How a run is stopped from elsewhere than by a signal."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from batchrun.errors import ExitCode


class Interruptible(Protocol):
    """What draws no more rows when it is interrupted, and drops what is in flight the second time."""

    def interrupt(self, exit_code: ExitCode) -> None:
        """Called in its event loop."""


class Beginning:
    """What is interrupted while it begins, before anything is sent, ends as cancelled."""

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Beginning:
        self._task = asyncio.current_task()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._task = None

    def interrupt(self, exit_code: ExitCode) -> None:
        """Break it off, unless it has begun meanwhile."""
        if self._task is not None:
            self._task.cancel()


class Stopper:
    """By which another thread stops an invocation as a signal would."""

    def __init__(self) -> None:
        # One that the thread which holds it may take again: a signal's handler may call in the middle of a call.
        self._lock = threading.RLock()
        self._interrupt: Callable[[], object] | None = None
        self.calls = 0

    def __call__(self) -> None:
        """The first time, no more rows are asked and what is in flight is awaited; the second, it is dropped."""
        with self._lock:
            self.calls += 1
            if self._interrupt is not None:
                self._interrupt()

    @contextmanager
    def stopping(self, runner: Interruptible) -> Iterator[None]:
        """What is called meanwhile, or was before, reaches a runner."""
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            loop.call_soon_threadsafe(runner.interrupt, ExitCode.INTERRUPTED)

        with self._lock:
            self._interrupt = interrupt
            for _ in range(self.calls):
                interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._interrupt = None
