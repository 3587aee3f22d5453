"""The sender whose hands are elsewhere, with a cluster of this process: what is lost, and what of it is told."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from batchrun import hands, node
from batchrun.errors import ClusterError, JobError
from batchrun.hands import ClusterSender
from batchrun.job import Job
from batchrun.prices import Price, Pricing
from batchrun.providers import resolve
from batchrun.records import Action, Exchange, Failure, Intent, Request, Slot

PRICING = Pricing.fixed("job", Price(Decimal(1), Decimal(1)))
ENDPOINT = resolve("vllm", environ={})


def job(**engine: Any) -> Job:
    return Job.model_validate({
        "input": "in.csv", "prompt": "x", "provider": "vllm", "model": "m", "output": "o.parquet",
        "engine": {"name": "ray", "start_seconds": 2, **engine},
    })  # fmt: skip


def intent(number: int) -> Intent:
    return Intent(number, Request(Slot(number, "m"), f"k{number}", b"body %d" % number), 0, f"c{number}")


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *args: Any) -> Any:
        return asyncio.ensure_future(self._call(*args))


class _LostError(Exception):
    pass


class Actor:
    """A worker that answers at once: all by its next word, or, if it `brings`, some in return for what it is given."""

    def __init__(self, cluster: Cluster, orders: node.Orders) -> None:
        self.cluster, self.orders = cluster, orders
        self.dead = asyncio.get_running_loop().create_future()
        self.found: asyncio.Queue[tuple[int, Exchange]] = asyncio.Queue()
        self.prove, self.take = _Method(self._prove), _Method(self._take)
        self.finished = _Method(self._finished)

    async def _prove(self) -> Any:
        self.cluster.begun += 1
        fault = self.cluster.prove(self.cluster.begun)
        if isinstance(fault, Exception):
            raise fault
        proof = node.Proof("host", node.build(), node.digest(ENDPOINT, self.orders.salt))
        return tuple(fault or proof)

    async def _take(self, packed: bytes) -> bytes:
        brought = []
        for attempt_id, body, _ in pickle.loads(packed):
            self.cluster.asked.append(attempt_id)
            if self.cluster.kills(attempt_id):
                self.die()
            elif not self.dead.done() and not self.cluster.is_mute:
                failure = Failure("server", Action.RETRY, body.decode())
                found = (attempt_id, Exchange("failed", status=500, failure=failure))
                if attempt_id in self.cluster.brings:
                    brought.append(found)
                else:
                    self.found.put_nowait(found)
        return pickle.dumps(brought)

    async def _finished(self) -> bytes:
        getting = asyncio.ensure_future(self.found.get())
        await asyncio.wait({getting, self.dead}, return_when=asyncio.FIRST_COMPLETED)
        if self.dead.done():
            getting.cancel()
            raise _LostError("the process is gone")
        return pickle.dumps([getting.result()])

    def die(self) -> None:
        if not self.dead.done():
            self.dead.set_result(None)


class Cluster:
    def __init__(self, *, size: int = 2) -> None:
        self.size = size
        self.begun = 0
        self.asked: list[int] = []
        self.brings = range(0)
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.is_mute = self.has_left = False
        self.kill_seconds = 0.01
        self.prove: Callable[[int], Any] = lambda number: None
        self.kills: Callable[[int], bool] = lambda attempt_id: False

    async def reach(self) -> None: ...

    async def nodes(self) -> int:
        return self.size

    async def free(self) -> str:
        return "0 CPUs"

    async def begin(self, orders: node.Orders) -> Actor:
        self.actors.append(Actor(self, orders))
        return self.actors[-1]

    async def kill(self, actor: Actor) -> None:
        self.killed.append(actor)
        await asyncio.sleep(self.kill_seconds)
        actor.die()

    async def leave(self) -> None:
        self.has_left = True
        for actor in self.actors:
            actor.die()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "_PAUSE_SECONDS", 0.01)


def send(cluster: Cluster, work: Callable[[ClusterSender], Any], said: list[str] | None = None, **engine: Any) -> Any:
    async def main() -> Any:
        say = said.append if said is not None else lambda line: None
        async with ClusterSender(job(**engine), ENDPOINT, {"m": PRICING}, say, cluster) as sender:
            return await work(sender)

    try:
        return asyncio.run(asyncio.wait_for(main(), 30))
    finally:
        assert cluster.has_left


def all_of(sender: ClusterSender, numbers: range) -> Any:
    return asyncio.gather(*(sender.send(intent(number)) for number in numbers))


def test_each_request_is_given_once_and_to_all_workers() -> None:
    cluster = Cluster(size=3)
    found = send(cluster, lambda sender: all_of(sender, range(100)))
    assert sorted(cluster.asked) == list(range(100))
    assert [exchange.failure.message for exchange in found] == [f"body {number}" for number in range(100)]


def test_what_a_worker_brings_in_return_counts_as_well() -> None:
    cluster = Cluster(size=2)
    cluster.brings = range(0, 100, 3)
    found = send(cluster, lambda sender: all_of(sender, range(100)))
    assert sorted(cluster.asked) == list(range(100))
    assert [exchange.failure.message for exchange in found] == [f"body {number}" for number in range(100)]


def test_a_worker_hands_over_each_answer_once_by_whatever_way(provide: Callable[..., Any]) -> None:
    provider = provide()
    setting = {"name": "custom", "base_url": provider.base_url}
    body = b'{"model": "m", "messages": [{"role": "user", "content": "Hello"}]}'

    async def main() -> list[int]:
        orders = node.Orders(node.build(), setting, False, 30.0, 10**6, 1, b"salt")
        worker = node.Worker(*orders)
        assert node.Proof(*await worker.prove()).fault is None
        assert worker._chat is not None
        found: node.Found = []
        async with worker._chat:
            for number in range(6):
                found += pickle.loads(await worker.take(pickle.dumps([(number, body, f"c{number}")])))
                if number == 3:
                    found += pickle.loads(await worker.finished())
                await asyncio.to_thread(provider.wait_for, number + 1)
            while len(found) < 6:
                found += pickle.loads(await worker.finished())
            assert pickle.loads(await worker.take(pickle.dumps([]))) == []
        assert {exchange.outcome for _, exchange in found} == {"ok"}
        return sorted(number for number, _ in found)

    assert asyncio.run(asyncio.wait_for(main(), 60)) == list(range(6))


def test_what_a_lost_worker_was_given_is_unknown_and_what_it_was_not_is_asked_elsewhere() -> None:
    cluster, said = Cluster(size=2), []
    cluster.kills = lambda attempt_id: attempt_id == 7
    found = send(cluster, lambda sender: all_of(sender, range(20)), said)
    lost = [number for number, exchange in enumerate(found) if exchange.outcome == "unknown"]
    assert 7 in lost
    assert {found[number].failure.kind for number in lost} == {"worker"}
    assert all(found[number].cost.usd is None for number in lost)
    assert sorted(cluster.asked) == list(range(20))
    assert cluster.killed  # it may only have been out of reach
    assert any("was lost" in line for line in said)


def test_a_worker_that_cannot_begin_keeps_nobody_else_from_it() -> None:
    cluster, said = Cluster(size=3), []
    cluster.prove = lambda number: RuntimeError("no room here") if number == 1 else None
    found = send(cluster, lambda sender: all_of(sender, range(30)), said)
    assert {exchange.failure.kind for exchange in found} == {"server"}
    assert sorted(cluster.asked) == list(range(30))


def test_a_worker_elsewhere_that_asks_its_own_machine_is_told_of() -> None:
    said: list[str] = []
    send(Cluster(size=3), lambda sender: all_of(sender, range(3)), said)
    assert [line for line in said if "its own machine" in line] == [
        "the worker on host asks the server of its own machine (http://127.0.0.1:8000/v1)"
    ]


def test_many_lost_at_once_are_no_end_as_long_as_others_live() -> None:
    cluster = Cluster(size=12)

    async def work(sender: ClusterSender) -> Any:
        for actor in cluster.actors[:10]:
            actor.die()
        await asyncio.sleep(0.05)
        return await all_of(sender, range(50))

    assert {exchange.failure.kind for exchange in send(cluster, work)} == {"server"}


def test_workers_that_die_of_all_they_are_given_end_it() -> None:
    cluster = Cluster(size=1)
    cluster.kills = lambda attempt_id: True

    async def work(sender: ClusterSender) -> Any:
        found = []
        for number in range(20):
            found.append(await sender.send(intent(number)))
            if found[-1].failure.kind == "cluster":
                break
        return found

    found = send(cluster, work)
    assert [exchange.failure.kind for exchange in found] == ["worker"] * 5 + ["cluster"]
    assert (found[-1].outcome, found[-1].cost.usd, found[-1].failure.action) == ("failed", 0, Action.STOP)
    assert len(cluster.asked) == 5


def test_without_any_worker_for_a_while_the_cluster_is_gone() -> None:
    cluster = Cluster(size=2)

    async def work(sender: ClusterSender) -> Any:
        await all_of(sender, range(4))
        cluster.prove = lambda number: RuntimeError("no room")
        for actor in cluster.actors:
            actor.die()
        return await all_of(sender, range(10, 14))

    found = send(cluster, work, start_seconds=0.3)
    assert {(exchange.outcome, exchange.failure.kind) for exchange in found} == {("failed", "cluster")}
    assert "no room" in found[0].failure.message


def test_all_lost_at_once_and_begun_again_it_goes_on() -> None:
    cluster = Cluster(size=2)

    async def work(sender: ClusterSender) -> Any:
        await all_of(sender, range(4))
        for actor in cluster.actors:
            actor.die()
        await all_of(sender, range(4, 8))
        await asyncio.sleep(0.6)  # for longer than it would have waited for them
        return await all_of(sender, range(8, 12))

    assert {exchange.failure.kind for exchange in send(cluster, work, start_seconds=0.3)} == {"server"}


def test_idle_workers_that_are_lost_are_no_sign_of_bad_ones() -> None:
    cluster = Cluster(size=8)

    async def work(sender: ClusterSender) -> Any:
        for number in range(30):
            await sender.send(intent(number))
        for actor in cluster.actors:
            actor.die()
        await asyncio.sleep(0.1)
        return await all_of(sender, range(30, 40))

    assert {exchange.failure.kind for exchange in send(cluster, work)} == {"server"}


def test_a_place_where_workers_die_at_once_is_filled_ever_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "_PAUSE_SECONDS", 0.1)
    cluster = Cluster(size=2)
    good: list[Actor] = []

    def kills(attempt_id: int) -> bool:
        if not good:
            good.append(cluster.actors[0])
        for actor in cluster.actors:
            if actor is not good[0]:
                actor.die()
        return False

    cluster.kills = kills

    async def work(sender: ClusterSender) -> Any:
        for number in range(100):
            await sender.send(intent(number))

    send(cluster, work)
    assert len(cluster.actors) < 8


@pytest.mark.parametrize("is_dying", [False, True], ids=["answers", "dies"])
def test_what_a_worker_was_given_is_never_told_as_never_sent(is_dying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled at any moment, as by a second signal."""
    monkeypatch.setattr(node, "_SECONDS_EACH", 1.0)
    monkeypatch.setattr(node, "_MOST_SECONDS", 0.02)
    chance = random.Random(3)
    kinds: set[str] = set()
    for _ in range(60):
        cluster = Cluster(size=2)
        cluster.kill_seconds = 0.02
        cluster.kills = lambda attempt_id: is_dying and chance.random() < 0.1

        async def work(sender: ClusterSender, cluster: Cluster = cluster) -> Any:
            sending = {number: asyncio.ensure_future(sender.send(intent(number))) for number in range(16)}
            await asyncio.sleep(chance.uniform(0, 0.03))
            for task in sending.values():
                task.cancel()
            await asyncio.wait(sending.values())
            for number, task in sending.items():
                kind = "dropped" if task.cancelled() else task.result().failure.kind
                kinds.add(kind)
                assert kind != "interrupted" or number not in cluster.asked

        send(cluster, work)
    assert {"dropped", "server", "interrupted"} <= kinds


def test_a_worker_that_is_late_or_another_one_is_waited_for() -> None:
    cluster = Cluster(size=1)

    async def work(sender: ClusterSender) -> Any:
        cluster.prove = lambda number: RuntimeError("not yet") if number < 4 else None
        cluster.actors[0].die()
        return await all_of(sender, range(3))

    assert {exchange.failure.kind for exchange in send(cluster, work)} == {"server"}


def test_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "_SILENT_SECONDS", 1)
    cluster = Cluster(size=1)
    cluster.is_mute = True
    found = send(cluster, lambda sender: sender.send(intent(1)))
    assert (found.outcome, found.failure.kind) == ("unknown", "worker")
    assert "no sign of life" in found.failure.message


def test_what_no_worker_was_given_was_never_sent() -> None:
    cluster = Cluster(size=1)

    async def work(sender: ClusterSender) -> Any:
        cluster.prove = lambda number: RuntimeError("no room")
        cluster.actors[0].die()
        await asyncio.sleep(0.05)
        sending = asyncio.ensure_future(sender.send(intent(1)))
        await asyncio.sleep(0.05)
        sending.cancel()
        return await sending

    found = send(cluster, work)
    assert (found.outcome, found.cost.usd, cluster.asked) == ("failed", 0, [])


@pytest.mark.parametrize(
    ("prove", "kind", "said"),
    [
        (lambda number: node.Proof("h", "0.0.9 (x)", ""), JobError, "has batchrun 0.0.9"),
        (lambda number: node.Proof("h", node.build(), "another"), JobError, "would ask with another key"),
        (lambda number: node.Proof("h", node.build(), "", "no API key"), JobError, "on h: no API key"),
        (
            lambda number: RuntimeError("x\nModuleNotFoundError: No module named 'y'"),
            JobError,
            "on every node, or ship",
        ),
        (lambda number: RuntimeError("out of memory"), ClusterError, "out of memory"),
    ],
    ids=["other code", "other key", "no key", "not there", "no room"],
)
def test_a_worker_that_is_not_as_it_should_be_is_refused(prove: Any, kind: type[Exception], said: str) -> None:
    cluster = Cluster(size=2)
    cluster.prove = prove
    with pytest.raises(kind, match=said):
        send(cluster, lambda sender: sender.send(intent(1)))
    assert cluster.asked == []


def test_what_waits_for_more_goes_once_it_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is costly: many go together, and few do not wait for what will not come."""
    monkeypatch.setattr(node, "_MOST_SECONDS", 3600.0)

    async def goes(waiting: int, concurrency: int) -> bool:
        gathering = node.Gathering(concurrency)
        if waiting:
            gathering.note(waiting)
        try:
            await asyncio.wait_for(gathering.gathered(), 0.5)
        except TimeoutError:
            return False
        return True

    async def main() -> None:
        assert await goes(node._ENOUGH, 10**9)
        assert await goes(1, 1)
        assert not await goes(1, 10**9)
        assert not await goes(0, 1)

    asyncio.run(main())


def test_what_goes_another_way_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_MOST_SECONDS", 0.2)

    async def main() -> float:
        gathering = node.Gathering(10**9, patience=2)
        loop = asyncio.get_running_loop()
        gathering.note(1)
        gathered = asyncio.ensure_future(gathering.gathered())
        await asyncio.sleep(0.1)
        gathering.clear()
        await asyncio.sleep(0.5)
        assert not gathered.done()  # nothing waits
        began = loop.time()
        gathering.note(1)
        await gathered
        return loop.time() - began

    assert asyncio.run(asyncio.wait_for(main(), 30)) >= 0.19
