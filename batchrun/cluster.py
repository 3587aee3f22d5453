"""Requests sent by the workers of a Ray cluster: one more sender, whose hands are on other machines.

The head keeps input, ledger, budget, pacing and sink. It hands each request to a worker once, and takes what became of
it; Ray itself repeats nothing. What a lost worker was asking has an unknown outcome.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from batchrun.chat import priced
from batchrun.errors import BatchrunError, ClusterError, JobError, MissingHereError
from batchrun.job import Job
from batchrun.money import NOT_BILLED
from batchrun.node import GATHERED_SECONDS, Found, Orders, Parcel, Proof, Worker, build, digest
from batchrun.prices import Pricing
from batchrun.process import note_stuck
from batchrun.providers import Endpoint
from batchrun.records import Action, Exchange, Failure, Intent
from batchrun.remote import is_url
from batchrun.settings import EngineSetting

_MOST_PARCEL_BYTES = 8 * 1024 * 1024
_LOSSES = 5
"""So many workers lost, and no answer between: more of them would not fare better."""
_PAUSE_SECONDS = 1.0
"""Before another worker is begun in the place of one that could not."""
_SILENT_SECONDS = 30
_CLOSE_SECONDS = 10.0
_STORE_BYTES = 100 * 1024 * 1024
"""Ray's store of objects where a cluster is started for the run: hardly anything goes through it."""
_ENVIRONMENT = {
    # Ray tells its makers of each cluster, and runs workers by `uv run` where the head was: neither is wanted.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Its handlers would take the place of this process's own.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # Ray ends this process when it has missed the cluster for a minute. It is ours to end, with the truth on disk.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "1000000",
}
_SHIP = "ship it by engine: {runtime_env: {py_modules: [batchrun-….whl]}}"
_Made = TypeVar("_Made")


class _Asked(NamedTuple):
    """A request, and who waits for what becomes of it."""

    intent: Intent
    future: asyncio.Future[Exchange]


@dataclass(eq=False)
class _Hand:
    """A worker, and what it was given."""

    actor: Any
    host: str
    queue: list[_Asked] = field(default_factory=list)
    """Not yet given to it."""
    asked: dict[int, _Asked] = field(default_factory=dict)
    """By the attempt's id: given to it, and nothing is known of it since."""
    woken: asyncio.Event = field(default_factory=asyncio.Event)

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
        self, job: Job, endpoint: Endpoint, pricings: Mapping[str, Pricing], say: Callable[[str], None]
    ) -> None:
        self._setting = job.engine
        self._pricings = pricings
        self._say = say
        self._orders = Orders(
            job.provider.model_dump(),
            job.stream,
            job.timeout_seconds,
            job.max_response_bytes,
            job.concurrency,
            secrets.token_bytes(16),
        )
        self._expected = Proof("", build(), digest(endpoint, self._orders.salt))
        self._connection = _Connection(self._setting, _runtime_env(job))
        self._hands: list[_Hand] = []
        self._unplaced: list[_Asked] = []
        """For the next worker that begins."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._actors: list[Any] = []
        self._losses = 0
        self._gone: Failure | None = None

    async def __aenter__(self) -> ClusterSender:
        try:
            await self._connection.begun()
            workers = self._setting.workers
            wanted = workers if workers is not None else await _in_thread(self._connection.nodes)
            await self._begin_all(wanted)
        except BaseException:
            await self._close()
            raise
        hosts = ", ".join(dict.fromkeys(hand.host for hand in self._hands))
        self._say(f"{len(self._hands)} of {wanted} workers have begun, on {hosts}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def send(self, intent: Intent) -> Exchange:
        """Have a worker send one request. Whatever goes wrong is a value in the exchange."""
        asked = _Asked(intent, asyncio.get_running_loop().create_future())
        self._place(asked)
        return priced(await asked.future, self._pricings[intent.request.slot.model], intent.sent_at)

    # --- workers --------------------------------------------------------------------------------------------

    async def _begin_all(self, wanted: int) -> None:
        """Start the workers. Whoever is late joins later."""
        seconds, cpus = self._setting.start_seconds, self._setting.worker_cpus
        beginning = {asyncio.create_task(self._begin()) for _ in range(wanted)}
        for task in beginning:
            self._keep(task)
        done, _ = await asyncio.wait(beginning, timeout=seconds)
        faults = [fault for task in done if (fault := task.exception()) is not None]
        for fault in faults:
            if isinstance(fault, JobError) or not self._hands:
                raise fault
        if not self._hands:
            raise ClusterError(
                f"no worker has begun within {seconds:g} s (start_seconds): {await _in_thread(self._connection.free)} "
                f"are free in the cluster, and a worker takes {cpus:g} (worker_cpus)"
            )
        for fault in faults:
            self._say(f"one worker less: {fault}")

    async def _begin(self) -> None:
        """Start a worker and have it prove itself; from then on it is a hand."""
        actor = await _in_thread(lambda: self._connection.actor(self._orders))
        self._actors.append(actor)
        try:
            proof: Proof = await actor.prove.remote()
        except Exception as exc:
            raise _unbegun(exc) from exc
        self._check(proof)
        hand = _Hand(actor, proof.host)
        self._hands.append(hand)
        self._keep(asyncio.create_task(self._serve(hand)))
        unplaced, self._unplaced = self._unplaced, []
        for asked in unplaced:
            self._place(asked)

    def _check(self, proof: Proof) -> None:
        if proof.build != self._expected.build:
            raise JobError(
                f"the worker on {proof.host} has batchrun {proof.build}, and this is {self._expected.build}: install "
                f"the same on every node, or {_SHIP}"
            )
        if proof.fault is not None:
            raise JobError(f"the worker on {proof.host}: {proof.fault} (its node's environment counts, not this one)")
        if proof.endpoint != self._expected.endpoint:
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
        why = next((exc for task in done if (exc := task.exception()) is not None), None)
        await self._lose(hand, why)

    async def _give(self, hand: _Hand) -> None:
        while True:
            await hand.woken.wait()
            await asyncio.sleep(GATHERED_SECONDS)
            hand.woken.clear()
            while hand.queue:
                parcel: Parcel = []
                size = 0
                while hand.queue and size < _MOST_PARCEL_BYTES:
                    asked = hand.queue.pop(0)
                    if asked.future.done():
                        continue  # nobody waits for it any more, and it was never sent
                    intent = asked.intent
                    hand.asked[intent.attempt_id] = asked
                    parcel.append((intent.attempt_id, intent.request.body, intent.client_request_id))
                    size += len(intent.request.body)
                if parcel:
                    await hand.actor.take.remote(pickle.dumps(parcel, pickle.HIGHEST_PROTOCOL))

    async def _take(self, hand: _Hand) -> None:
        while True:
            found: Found = pickle.loads(await _signed(asyncio.ensure_future(_awaited(hand.actor.finished.remote()))))
            self._losses = 0 if found else self._losses
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
            hand = min(self._hands, key=lambda hand: hand.load)
            hand.queue.append(asked)
            hand.woken.set()

    async def _lose(self, hand: _Hand, why: BaseException | None) -> None:
        """Settle what a worker had, and begin another."""
        self._hands.remove(hand)
        self._losses += 1
        what = f"the worker on {hand.host} was lost ({_first_line(why)})"
        failure = Failure("worker", Action.RETRY, what)
        for asked in hand.asked.values():
            _tell(asked, Exchange("unknown", failure=failure))
        self._say(f"{what}: {len(hand.asked)} requests have an unknown outcome and are asked again")
        for asked in hand.queue:
            self._place(asked)
        # It may only have been out of reach: it must not go on.
        await self._kill(hand.actor)
        if self._losses >= _LOSSES:
            self._give_up(f"{self._losses} workers were lost and no answer came between; the last: {_first_line(why)}")
            return
        self._keep(asyncio.create_task(self._replace()))

    async def _replace(self) -> None:
        try:
            async with asyncio.timeout(self._setting.start_seconds):
                while not await self._has_begun():  # noqa: ASYNC110 - nobody tells when there is room again
                    await asyncio.sleep(_PAUSE_SECONDS)
        except TimeoutError as exc:
            raise ClusterError(f"no other worker has begun within {self._setting.start_seconds:g} s") from exc

    async def _has_begun(self) -> bool:
        """Start a worker; False if it was lost before it could begin."""
        try:
            await self._begin()
        except ClusterError:
            self._losses += 1
            if self._losses >= _LOSSES:
                raise
            return False
        return True

    def _give_up(self, why: str) -> None:
        """Nothing more can be sent; what is under way may be on the bill."""
        self._gone = Failure("cluster", Action.STOP, why)
        for hand in self._hands:
            for asked in hand.asked.values():
                _tell(asked, Exchange("unknown", failure=self._gone))
            self._unplaced += hand.queue
            hand.asked, hand.queue = {}, []
        unplaced, self._unplaced = self._unplaced, []
        for asked in unplaced:
            self._place(asked)

    # --- the end --------------------------------------------------------------------------------------------

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        fault = task.exception() if not task.cancelled() else None
        if fault is not None and not (self._hands and isinstance(fault, BatchrunError)):
            # A worker less is no matter as long as there is another.
            told = str(fault) if isinstance(fault, BatchrunError) else _first_line(fault)
            self._give_up(f"the cluster is gone, or has no room: {told}")

    async def _kill(self, actor: Any) -> None:
        with suppress(Exception):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await _in_thread(lambda: self._connection.kill(actor))

    async def _close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._gone is None:
            await asyncio.gather(*(self._kill(actor) for actor in self._actors))
        await self._connection.close()


class _Connection:
    """This process's part in a cluster, in a thread of its own: what a thread has started ends with it."""

    def __init__(self, setting: EngineSetting, runtime_env: dict[str, Any] | None) -> None:
        self._setting = setting
        self._runtime_env = runtime_env
        self._begun: Future[None] = Future()
        self._is_over = threading.Event()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="cluster", daemon=True)

    async def begun(self) -> None:
        """Reach the cluster, or start one of this machine alone."""
        self._thread.start()
        try:
            async with asyncio.timeout(self._setting.start_seconds):
                await asyncio.shield(asyncio.wrap_future(self._begun))
        except TimeoutError as exc:
            raise ClusterError(
                f"the Ray cluster was not reached within {self._setting.start_seconds:g} s (start_seconds)"
            ) from exc
        # Ray has put handlers of its own in the place of this process's, where Python does not see it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    async def close(self) -> None:
        """Leave the cluster; one that was started for the run ends."""
        self._is_over.set()
        if self._thread.is_alive() and not await _in_thread(lambda: self._has_ended.wait(_CLOSE_SECONDS)):
            note_stuck()

    def nodes(self) -> int:
        """Nodes with room for a worker."""
        import ray

        needed = self._setting.worker_cpus
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= needed]
        return max(1, len(nodes))

    def free(self) -> str:
        """What of the cluster is free, in words."""
        import ray

        return f"{ray.available_resources().get('CPU', 0):g} CPUs"

    def actor(self, orders: Orders) -> Any:
        """Start a worker."""
        import ray

        options = {
            "num_cpus": self._setting.worker_cpus, "scheduling_strategy": "SPREAD",
            "max_restarts": 0, "max_task_retries": 0,
        }  # fmt: skip
        return ray.remote(Worker).options(**options).remote(orders)

    def kill(self, actor: Any) -> None:
        """End a worker."""
        import ray

        ray.kill(actor, no_restart=True)

    def _live(self) -> None:
        try:
            try:
                self._reach()
            except BaseException as exc:  # noqa: BLE001 - it is for whoever waits for the cluster
                self._begun.set_exception(exc)
                return
            self._begun.set_result(None)
            self._is_over.wait()
            import ray

            with suppress(Exception):
                ray.shutdown()
        finally:
            self._has_ended.set()

    def _reach(self) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise MissingHereError("engine ray needs Ray: install batchrun[ray]") from None
        if ray.is_initialized():
            raise JobError("this process is in a Ray cluster already: leave it by ray.shutdown() first")
        address = self._setting.address or os.environ.get("RAY_ADDRESS") or "local"
        if address.startswith("ray://"):
            raise JobError(
                f"engine.address {address!r}: Ray's client is no part of the cluster: call batchrun on a node of it, "
                "with address: HOST:PORT"
            )
        if address not in ("local", "auto"):
            _knock(address)
        how: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
        # What it says of this thread, and of being out of reach, is said by batchrun.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        try:
            ray.init(
                address=address,
                runtime_env=self._runtime_env,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                **(how if address == "local" else {}),
            )
        except Exception as exc:
            where = "on this machine" if address == "local" else f"at {address}"
            raise ClusterError(f"there is no Ray cluster {where} that can be reached: {_first_line(exc)}") from exc


class _SilentError(Exception):
    """A worker gives no sign of life; with the cluster gone, Ray itself may not say so."""


async def _signed(reply: asyncio.Future[bytes]) -> bytes:
    """What a worker says, if it says anything. A second counts only while this process runs."""
    try:
        for _ in range(_SILENT_SECONDS):
            if (await asyncio.wait({reply}, timeout=1))[0]:
                return reply.result()
    finally:
        reply.cancel()
    raise _SilentError(f"it has given no sign of life for {_SILENT_SECONDS} s")


async def _awaited(reference: Any) -> bytes:
    return bytes(await reference)


def _tell(asked: _Asked, exchange: Exchange) -> None:
    if not asked.future.done():
        asked.future.set_result(exchange)


def _runtime_env(job: Job) -> dict[str, Any] | None:
    """What Ray is to bring to the nodes; paths in it are relative to the job file, as all of a job's are."""
    setting = job.engine.runtime_env
    if setting is None:
        return None

    def here(path: Any) -> Any:
        return str(job.resolve(path)) if isinstance(path, str) and not is_url(path) else path

    resolved: dict[str, Any] = {
        name: here(setting[name]) for name in ("working_dir", "pip", "uv", "conda") if name in setting
    }
    if isinstance(modules := setting.get("py_modules"), list):
        resolved["py_modules"] = [here(module) for module in modules]
    return setting | resolved


def _knock(address: str) -> None:
    """Whether anybody is at an address: Ray would try for ever."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise JobError(f"engine.address {address!r}: should be HOST:PORT, such as 10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CLOSE_SECONDS).close()
    except OSError as exc:
        raise ClusterError(f"there is no Ray cluster at {address} that can be reached: {exc}") from exc


def _unbegun(exc: Exception) -> BatchrunError:
    text = str(exc)
    if "ModuleNotFoundError" in text or "ImportError" in text:
        return JobError(
            f"a worker cannot begin: {_last_line(text)}: install batchrun with all that it needs on every node, "
            f"or {_SHIP}"
        )
    return ClusterError(f"a worker could not begin: {_first_line(exc)}")


def _first_line(exc: BaseException | None) -> str:
    text = next(iter(str(exc).strip().splitlines()), "") if exc is not None else ""
    return f"{type(exc).__name__}: {text}"[:300] if exc is not None else "it has ended"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300]


async def _in_thread(call: Callable[[], _Made]) -> _Made:
    """Make a call that may hang without an end: in a thread that nobody has to wait for."""
    future: Future[_Made] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result = call()
        except BaseException as exc:  # noqa: BLE001 - it is for whoever waits
            future.set_exception(exc)
        else:
            future.set_result(result)

    threading.Thread(target=work, name="cluster call", daemon=True).start()
    return await asyncio.wrap_future(future)
