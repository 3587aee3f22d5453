"""Requests sent by the workers of a cluster: one more sender, whose hands are on other machines.

It gives each request to a worker once, and takes what became of it. What a lost worker was asking has an unknown
outcome; what no worker was given was never sent. It knows of the cluster only what `Cluster` says.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import secrets
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from batchrun.chat import priced
from batchrun.errors import BatchrunError, ClusterError, JobError, oneline
from batchrun.job import Job
from batchrun.money import NOT_BILLED
from batchrun.node import Found, Gathering, Orders, Parcel, Proof, build, digest
from batchrun.prices import Pricing
from batchrun.providers import Endpoint, is_loopback
from batchrun.records import Action, Exchange, Failure, Intent

_MOST_PARCEL_BYTES = 8 * 1024 * 1024
_BARREN = 5
"""So often the last worker was lost before it had brought an answer: more of them would not fare better."""
_FEW = 16
_PAUSE_SECONDS, _LONGEST_PAUSE = 1.0, 60.0
"""Before another worker is begun in the place of one that could not; longer each time."""
_SILENT_SECONDS = 30
_KILL_SECONDS = 5.0
SHIP = "ship it by engine: {runtime_env: {py_modules: [batchrun-….whl]}}"


class Cluster(Protocol):
    """Where workers are begun. All of it may raise a ClusterError, or a JobError where the job is wrong."""

    async def reach(self) -> None:
        """Become a part of it, before anything else."""

    async def nodes(self) -> int:
        """How many have room for a worker."""

    async def free(self) -> str:
        """What of it is free, in words."""

    async def begin(self, orders: Orders) -> Any:
        """Start a worker: an actor of `node.Worker`, whose methods have a `remote` to be awaited."""

    async def kill(self, actor: Any) -> None:
        """End a worker."""

    async def leave(self) -> None:
        """Have no part in it any more; workers that are left end."""


@dataclass(eq=False, slots=True)
class _Asked:
    """A request, and who waits for what becomes of it."""

    intent: Intent
    future: asyncio.Future[Exchange]
    is_given: bool = False
    """A worker has it, or had it: it may have been sent."""
    exchange: Exchange | None = None
    """What became of it, also where nobody waits for it any more."""


@dataclass(eq=False)
class _Hand:
    """A worker, and what it was given."""

    actor: Any
    host: str
    gathering: Gathering
    queue: deque[_Asked] = field(default_factory=deque)
    """Not yet given to it."""
    asked: dict[int, _Asked] = field(default_factory=dict)
    """By the attempt's id: given to it, and nothing is known of it since."""
    has_found: bool = False

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self.queue) + len(self.asked)


class ClusterSender:
    """Sends requests from the workers of a cluster.

    Args:
        endpoint: the one that the workers should find, by the environment of their nodes, too.
        pricings: by model; used where the provider reports no cost.
        say: takes lines of talk.

    Raises:
        ClusterError: there is no cluster, or no worker begins.
        JobError: a worker is not as it should be: other code, another key.
    """

    def __init__(
        self,
        job: Job,
        endpoint: Endpoint,
        pricings: Mapping[str, Pricing],
        say: Callable[[str], None],
        cluster: Cluster,
    ) -> None:
        self._setting = job.engine
        self._pricings = pricings
        self._say = say
        self._cluster = cluster
        self._orders = Orders(
            build(),
            job.provider.model_dump(),
            job.stream,
            job.timeout_seconds,
            job.max_response_bytes,
            job.concurrency,
            secrets.token_bytes(16),
        )
        self._endpoint = digest(endpoint, self._orders.salt)
        self._own_server = endpoint.base_url if is_loopback(urlsplit(endpoint.base_url).hostname or "") else None
        """What every machine has for itself."""
        self._hosts = {socket.gethostname()}
        """Of this machine, and those where its own server has been told of."""
        self._hands: list[_Hand] = []
        self._unplaced: list[_Asked] = []
        """For the next worker that begins."""
        self._seats: list[asyncio.Task[None]] = []
        self._barren = 0
        self._patience: asyncio.TimerHandle | None = None
        """Until when there may be no worker at all."""
        self._fault = "all of its workers were lost"
        """Why no worker begins."""
        self._gone: Failure | None = None

    async def __aenter__(self) -> ClusterSender:
        try:
            await self._cluster.reach()
            wanted = self._setting.workers
            await self._begin_all(wanted if wanted is not None else await self._cluster.nodes())
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()

    async def send(self, intent: Intent) -> Exchange:
        """Have a worker send one request. Whatever goes wrong is a value in the exchange."""
        asked = _Asked(intent, asyncio.get_running_loop().create_future())
        self._place(asked)
        try:
            exchange = await asked.future
        except asyncio.CancelledError:
            if asked.exchange is not None:
                exchange = asked.exchange  # it came in this very turn
            elif asked.is_given:
                raise
            else:
                return Exchange("failed", failure=_NEVER_SENT, cost=NOT_BILLED)
        return priced(exchange, self._pricings[intent.request.slot.model], intent.sent_at)

    # --- workers --------------------------------------------------------------------------------------------

    async def _begin_all(self, wanted: int) -> None:
        """Begin the workers, and await the first word of each. Who is late joins later."""
        loop, seconds = asyncio.get_running_loop(), self._setting.start_seconds
        firsts = [loop.create_future() for _ in range(wanted)]
        self._seats = [asyncio.create_task(self._hold(first)) for first in firsts]
        for seat in self._seats:
            seat.add_done_callback(self._unseat)
        until, late = loop.time() + seconds, set(firsts)
        faults: list[BaseException] = []
        while late and (left := until - loop.time()) > 0:
            done, late = await asyncio.wait(late, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
            faults += [fault for first in done if (fault := first.exception()) is not None]
            for fault in faults:
                if isinstance(fault, JobError):
                    raise fault
        if not self._hands:
            raise faults[0] if faults else ClusterError(
                f"no worker has begun within {seconds:g} s (start_seconds): {await self._cluster.free()} are free in "
                f"the cluster, and a worker takes {self._setting.worker_cpus:g} (worker_cpus)"
            )  # fmt: skip
        for first in late:
            first.cancel()
        hosts = ", ".join(dict.fromkeys(hand.host for hand in self._hands))
        self._say(f"{len(self._hands)} of {wanted} workers have begun, on {hosts}")

    async def _hold(self, first: asyncio.Future[None]) -> None:
        """Keep one worker at work: begin another where it is lost.

        Args:
            first: is told whether the first one has begun.
        """
        pause = _PAUSE_SECONDS
        while self._gone is None:
            try:
                hand = await self._begin()
            except BatchrunError as fault:
                self._fault = str(fault)
                if not first.done():
                    first.set_exception(fault)
                elif self._hands:
                    self._say(f"one worker less: {fault}")
                if isinstance(fault, JobError):
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if not first.done():
                first.set_result(None)
            await self._serve(hand)
            if hand.has_found:
                pause = _PAUSE_SECONDS
            else:
                # The next one may be lost as soon, with all that it is given.
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _unseat(self, seat: asyncio.Task[None]) -> None:
        """Nobody holds this place any more."""
        bug = seat.exception() if not seat.cancelled() else None
        if bug is not None:
            self._fault = f"a bug in batchrun: {oneline(bug)}"
            self._say(self._fault)
        if self._gone is None and all(seat.done() for seat in self._seats) and not seat.cancelled():
            self._give_up()

    async def _begin(self) -> _Hand:
        """Start a worker and have it prove itself; from then on it is a hand."""
        actor = await self._cluster.begin(self._orders)
        try:
            proof = Proof(*await _awaited(actor.prove.remote()))
            self._check(proof)
        except BaseException as exc:
            await self._kill(actor)
            if isinstance(exc, BatchrunError) or not isinstance(exc, Exception):
                raise
            raise _unbegun(exc) from exc
        if self._own_server is not None and proof.host not in self._hosts:
            self._hosts.add(proof.host)
            self._say(f"the worker on {proof.host} asks the server of its own machine ({self._own_server})")
        hand = _Hand(actor, proof.host, Gathering(self._orders.concurrency))
        self._hands.append(hand)
        if self._patience is not None:
            self._patience.cancel()
        unplaced, self._unplaced = self._unplaced, []
        for asked in unplaced:
            self._place(asked)
        return hand

    def _check(self, proof: Proof) -> None:
        if proof.build != self._orders.build:
            raise JobError(
                f"the worker on {proof.host} has batchrun {proof.build}, and this is {self._orders.build}: install the "
                f"same on every node, or {SHIP}"
            )
        if proof.fault is not None:
            raise JobError(f"the worker on {proof.host}: {proof.fault} (its node's environment counts, not this one)")
        if proof.endpoint != self._endpoint:
            raise JobError(
                f"the worker on {proof.host} would ask with another key, or other headers, than this machine: make the "
                "environment of its node (where `ray start` was called) the same"
            )

    async def _serve(self, hand: _Hand) -> None:
        """Give a worker its requests and take what it has found, until it is lost."""
        tasks = [asyncio.create_task(self._give(hand)), asyncio.create_task(self._take(hand))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
        await self._lose(hand, next(exc for task in done if (exc := task.exception()) is not None))

    async def _give(self, hand: _Hand) -> None:
        while True:
            await hand.gathering.gathered()
            parcel: Parcel = []
            size = 0
            while hand.queue and size < _MOST_PARCEL_BYTES:
                asked = hand.queue.popleft()
                if asked.future.done():
                    continue  # nobody waits for it any more, and it was never sent
                intent = asked.intent
                asked.is_given = True
                hand.asked[intent.attempt_id] = asked
                parcel.append((intent.attempt_id, intent.request.body, intent.client_request_id))
                size += len(intent.request.body)
            if not hand.queue:
                hand.gathering.clear()
            if parcel:
                self._note(hand, await hand.actor.take.remote(pickle.dumps(parcel, pickle.HIGHEST_PROTOCOL)))

    async def _take(self, hand: _Hand) -> None:
        while True:
            self._note(hand, await _signed(asyncio.ensure_future(_awaited(hand.actor.finished.remote()))))

    def _note(self, hand: _Hand, packed: bytes) -> None:
        """What a worker has found."""
        found: Found = pickle.loads(packed)
        if found:
            hand.has_found, self._barren = True, 0
        for attempt_id, exchange in found:
            asked = hand.asked.pop(attempt_id, None)
            if asked is not None:
                _tell(asked, exchange)

    def _place(self, asked: _Asked) -> None:
        if self._gone is not None:
            _tell(asked, Exchange("failed", failure=self._gone, cost=NOT_BILLED))
        elif not self._hands:
            self._unplaced.append(asked)
        else:
            # Of two by chance the one with less, where to look at all would cost more than it brings.
            hands = self._hands if len(self._hands) <= _FEW else random.sample(self._hands, 2)
            hand = min(hands, key=lambda hand: hand.load)
            hand.queue.append(asked)
            hand.gathering.note(len(hand.queue))

    async def _lose(self, hand: _Hand, why: BaseException) -> None:
        """Settle what a worker had."""
        self._hands.remove(hand)
        for asked in hand.queue:
            self._place(asked)
        # It may only be out of reach: it must be at its end before another is asked the same.
        await self._kill(hand.actor)
        what = f"the worker on {hand.host} was lost ({oneline(why)})"
        self._say(f"{what}: the outcome of {len(hand.asked)} requests is unknown")
        failure = Failure("worker", Action.RETRY, what)
        for asked in hand.asked.values():
            _tell(asked, Exchange("unknown", failure=failure))
        if self._hands:
            return
        self._barren += bool(hand.asked) and not hand.has_found
        self._fault = what
        if self._barren >= _BARREN:
            self._give_up()
            return
        loop = asyncio.get_running_loop()
        if self._patience is not None:  # others were lost at the same time
            self._patience.cancel()
        self._patience = loop.call_later(self._setting.start_seconds, self._give_up)

    def _give_up(self) -> None:
        """There is no worker, and nothing more can be sent."""
        self._gone = Failure("cluster", Action.STOP, f"the cluster is gone, or has no room: {self._fault}")
        unplaced, self._unplaced = self._unplaced, []
        for asked in unplaced:
            self._place(asked)

    async def _kill(self, actor: Any) -> None:
        with suppress(BatchrunError, TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await self._cluster.kill(actor)

    async def _leave(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        for seat in self._seats:
            seat.cancel()
        await asyncio.gather(*self._seats, return_exceptions=True)
        await self._cluster.leave()


_NEVER_SENT = Failure("interrupted", Action.RETRY, "interrupted before any worker was given it")


class _SilentError(Exception):
    """A worker gives no sign of life; with the cluster gone, nobody may say so."""


async def _signed(reply: asyncio.Future[bytes]) -> bytes:
    """What a worker says, if it says anything. A second counts only while this process runs."""
    try:
        for _ in range(_SILENT_SECONDS):
            if (await asyncio.wait({reply}, timeout=1))[0]:
                return reply.result()
    finally:
        reply.cancel()
    raise _SilentError(f"it has given no sign of life for {_SILENT_SECONDS} s")


async def _awaited(reference: Any) -> Any:
    return await reference


def _tell(asked: _Asked, exchange: Exchange) -> None:
    asked.exchange = exchange
    if not asked.future.done():
        asked.future.set_result(exchange)


def _unbegun(exc: Exception) -> BatchrunError:
    """Why a worker could not begin: without batchrun on its node, or with another that takes other orders."""
    text = str(exc)
    if any(name in text for name in ("ModuleNotFoundError", "ImportError", "TypeError", "AttributeError")):
        return JobError(
            f"a worker cannot begin: {text.strip().splitlines()[-1][:300]}: install batchrun with all that it needs on "
            f"every node, or {SHIP}"
        )
    return ClusterError(f"a worker could not begin: {oneline(exc)}")
