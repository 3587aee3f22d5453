"""A command that is told how a run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_LAST_WORDS_SECONDS = 5.0
_LOOK_SECONDS = 0.2


def call(
    command: Sequence[str],
    document: str,
    folder: Path,
    seconds: float,
    stdout: IO[str] | None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str | None:
    """Run a command with a document on its standard input; why it failed, or None.

    Whatever becomes of it changes nothing for the caller: a signal ends the command only.

    Args:
        folder: where it starts.
        seconds: after which it is ended, with all that it has started.
        stdout: where its output goes, and its errors; None for nowhere.
        is_stopped: true once it is to be ended.
    """
    out = stdout if stdout is not None else subprocess.DEVNULL
    process: subprocess.Popen[bytes] | None = None
    try:
        process = subprocess.Popen(
            list(command), cwd=folder, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
        )
        why = _told(process, document.encode("utf-8", "backslashreplace"), seconds, is_stopped)
    except (KeyboardInterrupt, SystemExit):
        why = "was interrupted"
    except (OSError, ValueError) as exc:
        why = f"cannot be {'started' if process is None else 'told the outcome'}: {exc}"
    if process is not None and why is not None:
        _end(process)
    return why


def _told(
    process: subprocess.Popen[bytes], document: bytes, seconds: float, is_stopped: Callable[[], bool]
) -> str | None:
    deadline = time.monotonic() + seconds
    rest: bytes | None = document
    while True:
        left = deadline - time.monotonic()
        try:
            process.communicate(rest, timeout=max(0.0, min(left, _LOOK_SECONDS)))
        except subprocess.TimeoutExpired:
            rest = None  # it goes on with what it has been given
            if is_stopped():
                return "was interrupted"
            if left <= 0:
                return f"did not end within {seconds:g} s, and was ended"
        else:
            return f"ended with {process.returncode}" if process.returncode else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """First politely, unless there is a hurry; then with all that it has started."""
    _signal(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
        process.wait(_LAST_WORDS_SECONDS)
    _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    while process.returncode is None:
        with suppress(KeyboardInterrupt, SystemExit):
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
