"""What runs on the nodes of a cluster: takes requests, sends them on its own connections, and hands back what came.

It knows no ledger, no prices and no retries: those are the head's. It keeps nothing.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from batchrun import __version__
from batchrun.chat import Chat
from batchrun.errors import BatchrunError
from batchrun.process import allow_connections
from batchrun.providers import Endpoint, resolve
from batchrun.records import Action, Exchange, Failure

SIGN_SECONDS = 2.0
_MOST_FOUND_BYTES = 8 * 1024 * 1024
_SECONDS_EACH, _MOST_SECONDS = 0.0001, 0.15
_ENOUGH = 800

Parcel = list[tuple[int, bytes, str]]
"""Requests: the attempt's id, the body, our request id."""
Found = list[tuple[int, Exchange]]
"""What became of attempts."""


class Gathering:
    """When that goes to the other side which waits for it: together, for a message costs as much as ten rows.

    Args:
        concurrency: the most requests in flight, of all workers: the head has the messages of all.
        patience: that of the head is 1; a greater one waits for its messages, and for so many times as many.
    """

    def __init__(self, concurrency: int, patience: int = 1) -> None:
        # Of few requests, no more will come soon.
        self._seconds = min(concurrency * _SECONDS_EACH, _MOST_SECONDS)
        self._patience = patience
        self._most = patience * _ENOUGH
        self._until = 0.0
        self._some = asyncio.Event()
        self._enough = asyncio.Event()

    def note(self, waiting: int) -> None:
        """So many wait now."""
        if not self._some.is_set():
            # By the clock: what goes to several workers goes at the same moments.
            self._until = (asyncio.get_running_loop().time() // self._seconds + self._patience) * self._seconds
            self._some.set()
        if waiting >= self._most:
            self._enough.set()

    async def gathered(self) -> None:
        """Return once enough wait, or some for a while."""
        while True:
            await self._some.wait()
            until = self._until
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._enough.wait()
            # What waited may have gone meanwhile, and other come.
            if self._some.is_set() and (self._enough.is_set() or self._until == until):
                return

    def clear(self) -> None:
        """None wait any more."""
        self._some.clear()
        self._enough.clear()


class Orders(NamedTuple):
    """How a worker asks. It holds no secret: those are in the environment of its node."""

    build: str
    """The head's: with another one, nothing else of this need mean the same."""
    provider: dict[str, Any]
    """The job's setting."""
    streamed: bool
    timeout_seconds: float
    max_response_bytes: int
    concurrency: int
    """The most requests that it may be given at a time."""
    salt: bytes
    """For the digest in its proof; the head's, made anew for each run."""


class Proof(NamedTuple):
    """By what the head sees that a worker is what it should be."""

    host: str
    build: str
    endpoint: str
    """A digest of the address and all headers, the key included."""
    fault: str | None = None
    """Why it cannot work."""


@cache
def build() -> str:
    """What tells this code from any other: its version, and a digest of its files."""
    found = blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{__version__} ({found.hexdigest()})"


def digest(endpoint: Endpoint, salt: bytes) -> str:
    """Equal for two endpoints with the same address and headers; without the salt it tells nothing of them."""
    told = repr((endpoint.base_url, sorted(endpoint.headers.items()), endpoint.cost_in_usage))
    return blake2b(told.encode(), key=salt, digest_size=16).hexdigest()


class Worker:
    """An actor. Its methods are called by one head, side by side."""

    def __init__(self, *orders: Any) -> None:
        self._orders = orders
        self._chat: Chat | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._found: Found = []
        self._gathering: Gathering | None = None

    async def prove(self) -> tuple[Any, ...]:
        """Make ready, and show it: a `Proof`."""
        host = socket.gethostname()
        if self._orders[0] != build():
            return tuple(Proof(host, build(), ""))
        orders = Orders(*self._orders)
        try:
            endpoint = resolve(**orders.provider, environ=os.environ)
            allow_connections(orders.concurrency)
            # The next requests bring back what is done until then; who waits for it comes in between.
            self._gathering = Gathering(orders.concurrency, patience=2)
            self._chat = Chat(
                endpoint,
                concurrency=orders.concurrency,
                timeout_seconds=orders.timeout_seconds,
                max_response_bytes=orders.max_response_bytes,
                streamed=orders.streamed,
            )
        except BatchrunError as exc:
            return tuple(Proof(host, build(), "", str(exc)))
        return tuple(Proof(host, build(), digest(endpoint, orders.salt)))

    async def take(self, packed: bytes) -> bytes:
        """Send the requests of a pickled `Parcel`; a pickled `Found` of what is done by now."""
        parcel: Parcel = pickle.loads(packed)
        for attempt_id, body, client_request_id in parcel:
            task = asyncio.create_task(self._ask(attempt_id, body, client_request_id))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return self._handed_over()

    async def finished(self) -> bytes:
        """Wait until some requests are done: a pickled `Found`; an empty one is a sign of life."""
        assert self._gathering is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(SIGN_SECONDS):
                await self._gathering.gathered()
        return self._handed_over()

    def _handed_over(self) -> bytes:
        assert self._gathering is not None
        size = count = 0
        while count < len(self._found) and size < _MOST_FOUND_BYTES:
            size += self._found[count][1].body.size
            count += 1
        packed = pickle.dumps(self._found[:count], pickle.HIGHEST_PROTOCOL)
        del self._found[:count]
        if not self._found:
            self._gathering.clear()
        return packed

    async def _ask(self, attempt_id: int, body: bytes, client_request_id: str) -> None:
        assert self._chat is not None
        assert self._gathering is not None
        try:
            exchange = await self._chat.ask(body, client_request_id)
        except Exception as exc:  # noqa: BLE001 - whoever waits for it must hear of it; its words may hold anything
            why = f"{type(exc).__name__} while it was asked, on {socket.gethostname()}"
            exchange = Exchange("unknown", failure=Failure("interrupted", Action.RETRY, why))
        self._found.append((attempt_id, exchange))
        self._gathering.note(len(self._found))
