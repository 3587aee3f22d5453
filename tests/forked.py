"""Processes that need not import everything anew: forks of one that has.

A program that stands ready with all of batchrun imported (and nothing done) reads calls from its standard input, a
JSON object a line, and forks for each: the command line, or a function of the tests. A call that must be a process
from its very beginning, to show what it imports, starts Python itself (`Workspace.start`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# What a run imports, as far as it holds no thread and no open file; also what it imports late.
_IMPORTED = (
    "batchrun.chat", "batchrun.cli", "batchrun.invocation", "batchrun.loading", "batchrun.offline", "batchrun.outcome",
    "batchrun.reconcile", "batchrun.verify", "anyio._backends._asyncio", "anyio.to_thread", "certifi", "encodings.idna",
    "encodings.utf_8_sig", "httpcore", "uvloop", "tests.fake_provider",
)  # fmt: skip


class Fork:
    """A process that runs by itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        """Kill it, unless it has ended by itself; afterwards it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        while self.is_alive:
            time.sleep(0.002)

    @property
    def is_alive(self) -> bool:
        """False once it has ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        stat = Path(f"/proc/{self.pid}/stat")
        return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


class Forks:
    """Runs the command line in forks of a warm process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"], cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self._end)

    def call(self, args: tuple[str, ...], cwd: Path, env: dict[str, str], timeout: float) -> tuple[int, str, str]:
        """Run the command line: exit code, stdout and stderr; a call that does not end in time is killed."""
        return self._call({"args": args, "cwd": str(cwd), "env": env, "timeout": timeout})

    def function(self, target: str, timeout: float = 600, **arguments: Any) -> tuple[int, str, str]:
        """Run a function, named as `module:name`, with arguments that JSON can carry: 0, or 1 if it raised."""
        env = dict(os.environ)
        return self._call({"target": target, "arguments": arguments, "cwd": ".", "env": env, "timeout": timeout})

    def start(self, args: tuple[str, ...], cwd: Path, env: dict[str, str]) -> Fork:
        """Start the command line, to be killed."""
        return self._start({"args": args, "cwd": str(cwd), "env": env, "out": os.devnull, "err": os.devnull})

    def start_function(self, target: str, out: Path, err: Path, **arguments: Any) -> Fork:
        """Start a function, as for `function`, to be killed. `out`, `err`: where what it prints goes."""
        said = {"cwd": ".", "env": dict(os.environ), "out": str(out), "err": str(err)}
        return self._start({"target": target, "arguments": arguments, **said})

    def _start(self, call: dict[str, Any]) -> Fork:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call | {"is_free": True}) + "\n")
        self._process.stdin.flush()
        return Fork(int(self._process.stdout.readline()))

    def _call(self, call: dict[str, Any]) -> tuple[int, str, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            self._process.stdin.write(json.dumps(call | {"out": str(out), "err": str(err)}) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # else the first collection of each fork would copy what they share
    for line in sys.stdin:
        call = json.loads(line)
        if "is_free" in call:
            print(_detached(call), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become(call)
        signal.signal(signal.SIGALRM, lambda number, frame, pid=pid: os.kill(pid, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, call["timeout"])
        _, status = os.waitpid(pid, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _detached(call: dict[str, Any]) -> int:
    """A grandchild, so that nobody has to wait for it; its process id."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        child = os.fork()
        if child == 0:
            _become(call)
        os.write(theirs, str(child).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    number = int(os.read(ours, 32))
    os.close(ours)
    os.close(theirs)
    return number


def _become(call: dict[str, Any]) -> None:
    """The child: as if it had been started with these arguments."""
    import random

    import batchrun.cli

    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["env"])
    time.tzset()  # of the zone that this names
    new = os.O_WRONLY | os.O_CREAT
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, call["out"], new), (2, call["err"], new)):
        opened = os.open(name, mode, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding=encoding)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding=encoding)  # noqa: SIM115
    random.seed()
    code = 1
    try:
        if "target" in call:
            module, _, name = call["target"].partition(":")
            getattr(importlib.import_module(module), name)(**call["arguments"])
            code = 0
        else:
            sys.argv = ["batchrun", *call["args"]]
            batchrun.cli.main()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 0
    except BaseException:  # noqa: BLE001 - a fork must never go on in its parent's place
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
