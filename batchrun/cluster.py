"""This process's part in a Ray cluster: reach it, begin workers in it, leave it.

Ray itself repeats nothing. Whatever of it may hang is done in threads that nobody has to wait for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from batchrun.errors import BatchrunError, ClusterError, JobError, MissingHereError, oneline
from batchrun.job import Job
from batchrun.node import Orders, Worker
from batchrun.process import note_stuck
from batchrun.remote import is_url

_ASK_SECONDS = 10.0
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
    # Requests go in the call itself: through Ray's store of objects they cost this process twice as much.
    "RAY_max_direct_call_object_size": "1000000",
}
_Made = TypeVar("_Made")


class RayCluster:
    """See `hands.Cluster`.

    It lives in a thread of its own: the processes of a cluster that a thread has started end with it.
    """

    def __init__(self, job: Job) -> None:
        self._setting = job.engine
        self._runtime_env = _runtime_env(job)
        self._begun: Future[None] = Future()
        self._is_over = threading.Event()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="cluster", daemon=True)

    async def reach(self) -> None:
        """Reach the cluster, or start one of this machine alone."""
        self._begun.set_running_or_notify_cancel()
        self._thread.start()
        try:
            async with asyncio.timeout(self._setting.start_seconds):
                await asyncio.shield(asyncio.wrap_future(self._begun))
        except TimeoutError as exc:
            raise ClusterError(
                f"the Ray cluster was not reached within {self._setting.start_seconds:g} s (start_seconds)"
            ) from exc
        _renew_handlers()

    async def leave(self) -> None:
        """Leave the cluster; one that was started for the run ends."""
        self._is_over.set()
        if not self._thread.is_alive():
            return
        # Until it has ended: whatever breaks this wait off finds a process that does not wait for it either.
        note_stuck(is_so=True)
        note_stuck(is_so=not await _in_thread(lambda: self._has_ended.wait(_ASK_SECONDS)))
        _renew_handlers()

    async def nodes(self) -> int:
        """Nodes with room for a worker; one at least."""

        def count() -> int:
            import ray

            needed = self._setting.worker_cpus
            return sum(node["Alive"] and node["Resources"].get("CPU", 0) >= needed for node in ray.nodes())

        return max(1, await _answered(count))

    async def free(self) -> str:
        """What of the cluster is free, in words."""

        def told() -> str:
            import ray

            return f"{ray.available_resources().get('CPU', 0):g} CPUs"

        try:
            return await _answered(told)
        except ClusterError:
            return "nobody knows how many CPUs"

    async def begin(self, orders: Orders) -> Any:
        """Start a worker."""

        def start() -> Any:
            import ray

            options = {
                "num_cpus": self._setting.worker_cpus, "scheduling_strategy": "SPREAD",
                "max_restarts": 0, "max_task_retries": 0,
            }  # fmt: skip
            return ray.remote(Worker).options(**options).remote(*orders)

        return await _answered(start)

    async def kill(self, actor: Any) -> None:
        """End a worker."""

        def end() -> None:
            import ray

            ray.kill(actor, no_restart=True)

        await _answered(end)

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
            is_wrong = isinstance(exc, ValueError | TypeError) or "Version mismatch" in str(exc)
            kind: type[BatchrunError] = JobError if is_wrong else ClusterError
            raise kind(f"the Ray cluster {where} cannot be joined: {oneline(exc)}") from exc


def _runtime_env(job: Job) -> dict[str, Any] | None:
    """What Ray is to bring to the nodes; paths in it are relative to the job file, as all of a job's are."""
    setting = job.engine.runtime_env
    if setting is None:
        return None

    def here(path: Any) -> Any:
        return str(job.resolve(path)) if isinstance(path, str) and not is_url(path) else path

    resolved: dict[str, Any] = {name: here(setting[name]) for name in ("working_dir", "pip", "uv") if name in setting}
    if isinstance(modules := setting.get("py_modules"), list):
        resolved["py_modules"] = [here(module) for module in modules]
    return setting | resolved


def _knock(address: str) -> None:
    """Whether anybody is at an address: Ray would try for ever."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise JobError(f"engine.address {address!r}: should be HOST:PORT, such as 10.0.0.5:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ASK_SECONDS).close()
    except (OSError, ValueError, OverflowError) as exc:
        raise ClusterError(f"there is no Ray cluster at {address} that can be reached: {exc}") from exc


def _renew_handlers() -> None:
    """Ray may have put a handler of its own in the place of this process's, where Python does not see it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


async def _answered(call: Callable[[], _Made]) -> _Made:
    """What Ray says, if it says it soon.

    Raises:
        ClusterError: it does not.
    """
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            return await _in_thread(call)
    except TimeoutError as exc:
        raise ClusterError(f"Ray has not answered for {_ASK_SECONDS:g} s") from exc
    except Exception as exc:
        raise ClusterError(oneline(exc)) from exc


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
