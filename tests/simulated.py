"""Whole invocations against a scripted provider on a virtual clock, with faults, signals and crashes; all from a seed.

Each invocation is the real one, from the job file to the Parquet, in a fork of its own: a crash is a SIGKILL, and what
it leaves is what is on the disk. The provider stands in for the transport, below batchrun's own reading of the wire; it
keeps its bill in a file as the witness, and looks into the ledger before it answers.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from .virtual import VirtualLoop

BEGAN = int(datetime(2026, 3, 30, 22, tzinfo=UTC).timestamp())
INPUT_USD, OUTPUT_USD = Decimal("2e-6"), Decimal("8e-6")
MOST_TOKENS = 40
WORST = Decimal("0.003")
"""More than the most that any request here can cost."""
PICO = Decimal("1e-12")
FAULTS = (
    "429", "429_told", "500", "503_told", "400", "401", "connect", "hang", "hangup", "cut", "late", "error_200",
    "error_200_billed", "no_usage", "odd_usage", "html", "empty",
)  # fmt: skip
UNBILLED = ("429", "429_told", "500", "503_told", "400", "401", "connect", "error_200", "html")
STOPPED = (3, 4, 130, 143)
VIOLATED = 99


@dataclass
class World:
    """What one seed has drawn. `cap` in dollars."""

    seed: int
    folder: Path
    concurrency: int
    streamed: bool
    faults: dict[str, float]
    latency: str
    timeout: float
    attempts: int
    patience: float
    stop_seconds: float
    cap: Decimal | None
    per: str
    prompts: list[str]
    invocation: int = 0
    retry_failed: bool = False
    is_watched: bool = True
    """The provider looks into the ledger at each request."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Events of the present invocation: `crash_turn`, `signals` and `jumps` by their time."""

    @property
    def ledger(self) -> Path:
        return self.folder / "job.ledger.sqlite"

    @property
    def bill(self) -> Path:
        return self.folder / "bill"

    @classmethod
    def drawn(cls, seed: int, folder: Path) -> World:
        chance = random.Random(seed)
        rows = chance.randrange(10, 51)
        faults = {"ok": 10.0} | {
            name: 0.3 if name == "401" else chance.choice([0.3, 1.0, 4.0]) for name in chance.sample(FAULTS, 5)
        }
        return cls(
            seed=seed,
            folder=folder,
            concurrency=chance.randrange(1, 9),
            streamed=chance.random() < 0.4,
            faults=faults,
            latency=chance.choice(["none", "even", "exponential", "heavy", "two"]),
            timeout=chance.choice([2.0, 20.0, 60.0]),
            attempts=chance.randrange(1, 6),
            patience=chance.choice([20.0, 120.0, 900.0]),
            stop_seconds=chance.choice([0.1, 5.0, 60.0]),
            cap=WORST * chance.randrange(1, rows) / 2 if chance.random() < 0.5 else None,
            per=chance.choice(["run", "run", "day", "month"]),
            prompts=[f"row {index} of {seed}" + " more" * chance.randrange(8) for index in range(rows)],
        )

    def write(self) -> None:
        """The job and its input."""
        job: dict[str, Any] = {
            "input": "in.csv",
            "prompt": "{{ prompt }}",
            "provider": {"name": "aimlapi", "base_url": "http://127.0.0.1:9/v1"},
            "model": "m",
            "parameters": {"max_tokens": MOST_TOKENS},
            "prices": {"input_mtok": 2, "output_mtok": 8},
            "stream": self.streamed,
            "concurrency": self.concurrency,
            "timeout_seconds": self.timeout,
            "stop_seconds": self.stop_seconds,
            "retry": {"max_attempts": self.attempts, "max_seconds": self.patience},
            "output": "out.parquet",
        }
        if self.cap is not None:
            job["budget"] = {"usd": float(self.cap), "per": self.per}
        (self.folder / "job.yaml").write_text(json.dumps(job), encoding="utf-8")
        with (self.folder / "in.csv").open("w", newline="", encoding="utf-8") as fp:
            csv.writer(fp).writerows([["prompt"], *([prompt] for prompt in self.prompts)])

    def next_invocation(self, chance: random.Random, *, is_quiet: bool) -> World:
        """The next invocation, with what will happen in it."""
        plan: dict[str, Any] = {"signals": [], "jumps": []}
        if not is_quiet:
            event = chance.random()
            if event < 0.3:
                plan["crash_turn"] = int(10 ** chance.uniform(0, 3))
            elif event < 0.45:
                plan["signals"] = sorted(chance.uniform(0, 15) for _ in range(chance.choice([1, 1, 2])))
            if chance.random() < 0.2:
                plan["jumps"] = [
                    (chance.uniform(0, 10), chance.choice([-86400, -3600, -5, 5, 3600, 86400, 40 * 86400]))
                ]
        return replace(self, invocation=self.invocation + 1, plan=plan)


class ViolationError(Exception):
    """A promise was broken."""


class Provider(httpx.AsyncBaseTransport):
    """Answers by chance, keeps its bill on disk, and checks every request against the ledger."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.chance = random.Random(f"{world.seed} {world.invocation}")
        self.db: sqlite3.Connection | None = None
        self.bill = os.open(world.bill, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.in_flight = 0
        self.violations: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = request.headers["x-client-request-id"]
        if self.world.is_watched:
            self.db = self.db or sqlite3.connect(f"file:{self.world.ledger}?mode=ro", uri=True)
            self.violations += violations_of_sending(self.db, self.world, name)
        self.in_flight += 1
        if self.in_flight > self.world.concurrency:
            self.violations.append(f"{self.in_flight} requests are in flight")
        try:
            return await self.act(request, name)
        finally:
            self.in_flight -= 1

    async def act(self, request: httpx.Request, name: str) -> httpx.Response:
        chance, world = self.chance, self.world
        fate = chance.choices(list(world.faults), list(world.faults.values()))[0]
        prompt = json.loads(await request.aread())["messages"][-1]["content"]
        tokens = len(prompt) // 4 + 1, chance.randrange(1, MOST_TOKENS + 1)
        usd = INPUT_USD * tokens[0] + OUTPUT_USD * tokens[1]
        is_done = fate not in UNBILLED and not (fate in ("hang", "hangup") and chance.random() < 0.3)
        await asyncio.sleep(self.delay())
        os.write(self.bill, f"{name}\t{usd if is_done else 0}\n".encode())
        match fate:
            case "429" | "500" | "400" | "401":
                return httpx.Response(int(fate), json={"message": f"no {fate}"})
            case "429_told" | "503_told":
                wait = chance.choice(["0", "0.5", "7", "100000"])
                return httpx.Response(int(fate[:3]), headers={"retry-after": wait}, json={"message": "wait"})
            case "connect":
                raise httpx.ConnectError("refused", request=request)
            case "hang":
                await asyncio.sleep(10**9)
            case "hangup":
                raise httpx.RemoteProtocolError("gone", request=request)
            case "late":
                await asyncio.sleep(world.timeout * chance.choice([0.9, 1.0, 1.1]))
            case "html":
                return httpx.Response(200, headers={"content-type": "text/html"}, content=b"<html>hello</html>")
            case "error_200":
                return httpx.Response(200, json={"error": {"message": "upstream", "code": chance.choice([429, 500])}})
            case "error_200_billed":
                meta = {"usage": {"usd_spent": float(usd), "credits_used": int(usd * 2_000_000)}}
                return httpx.Response(200, json={"error": {"message": "upstream", "code": 500}, "meta": meta})
        head, document = self.document(fate, name, prompt, tokens, usd)
        content = self.events(document) if world.streamed else json.dumps(document).encode()
        if fate == "cut":
            content = content[: chance.randrange(len(content) * 2 // 3)]
        stream = _Pieces(content, self.chance, self.delay(), is_cut=fate == "cut")
        return httpx.Response(200, headers={"content-type": "application/json", **head}, stream=stream)

    def delay(self) -> float:
        chance = self.chance
        match self.world.latency:
            case "none":
                return 0.0
            case "even":
                return 0.7
            case "exponential":
                return chance.expovariate(1)
            case "heavy":
                return min(300.0, 0.1 * chance.paretovariate(0.7))
        return chance.choice([0.05, 15.0])

    def document(
        self, fate: str, name: str, prompt: str, tokens: tuple[int, int], usd: Decimal
    ) -> tuple[dict[str, str], dict[str, Any]]:
        usage: Any = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
        credits_used = int(usd * 2_000_000)
        head: dict[str, str] = {}
        document: dict[str, Any] = {}
        how = self.chance.choice(["meta", "credits", "header", "none"])
        if fate == "odd_usage":
            how = "meta"
            odd = {"prompt_tokens": "7", "completion_tokens": -3, "total_tokens": 1.5}
            usage = self.chance.choice([odd, [], 7, {"prompt_tokens": 0, "completion_tokens": 0}])
        elif fate == "no_usage":
            usage, how = None, self.chance.choice(["meta", "none"])
        if how == "header":
            head = {"x-aimlapi-usd-spent": f"{usd:.9f}", "x-aimlapi-credits-used": str(credits_used)}
        elif how == "credits":
            document["meta"] = {"usage": {"credits_used": credits_used}}
        elif how == "meta":
            document["meta"] = {"usage": {"credits_used": credits_used, "usd_spent": float(usd)}}
        text = "" if fate == "empty" else f"{name} answers {prompt}"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return head, document | {"id": name, "model": "m", "choices": [choice], "usage": usage}

    def events(self, document: dict[str, Any]) -> bytes:
        text = document["choices"][0]["message"]["content"]
        middle = self.chance.randrange(len(text) + 1)
        events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in (text[:middle], text[middle:])]
        last: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        events.append(last | {name: document[name] for name in ("usage", "meta", "model") if name in document})
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, content: bytes, chance: random.Random, seconds: float, *, is_cut: bool) -> None:
        self.pieces = [content[start : start + 200] for start in range(0, len(content), 200)]
        self.seconds = seconds / (len(self.pieces) or 1)
        self.is_cut = is_cut

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            await asyncio.sleep(self.seconds)
            yield piece
        if self.is_cut:
            raise httpx.ReadError("reset")


# --- one invocation -----------------------------------------------------------------------------------------


def invoke(world: World, defect: str | None = None) -> int:
    """Run one invocation in this process, which nothing else may use after; its exit code, or VIOLATED."""
    from batchrun import chat, delivery, invocation, records, spending
    from batchrun.errors import BatchrunError
    from batchrun.loading import load_job
    from batchrun.options import Options

    from . import defects

    loop = VirtualLoop()
    random.seed(f"{world.seed} {world.invocation} jitter")
    jumped = 0

    def wall() -> int:
        return (BEGAN + world.invocation * 1800 + jumped) * 10**9 + int(loop.now * 1e9)

    def jump(seconds: int) -> None:
        nonlocal jumped
        jumped += seconds

    def crash(turn: int) -> None:
        if turn == world.plan.get("crash_turn"):
            os.kill(os.getpid(), signal.SIGKILL)

    def interrupt() -> None:
        if signal.SIGTERM in loop.signal_handlers:
            loop.signal_handlers[signal.SIGTERM]()

    loop.on_turn = crash
    for at in world.plan["signals"]:
        loop.call_later(at, interrupt)
    for at, seconds in world.plan["jumps"]:
        loop.call_later(at, jump, seconds)
    provider = Provider(world)
    records.time = SimpleNamespace(time_ns=wall)  # type: ignore[attr-defined]
    chat.Transport = lambda *args, **keys: provider  # type: ignore[assignment,misc]
    spending.price_list = lambda endpoint, etag: None  # type: ignore[attr-defined]
    invocation._new_loop = lambda: loop  # type: ignore[assignment]
    delivery.EarlyOutput.start = lambda self: None  # type: ignore[method-assign]  # a thread's moment is left to chance
    if defect is not None:
        defects.plant(defect)
    job = load_job(world.folder / "job.yaml")
    options = Options(retry_failed=world.retry_failed)
    said: list[str] = []
    try:
        summary = invocation.run(job, options, {"AIML_API_KEY": "sk-simulated"}, say=said.append, watch=None)
        if provider.db is not None:
            provider.db.close()
        violations = provider.violations + list(violations_of_the_output(world, job, summary))
    except BatchrunError as exc:
        print(exc, file=sys.stderr)
        return int(exc.exit_code)
    for violation in violations:
        print(violation, file=sys.stderr)
    if summary.exit_code == 70:
        print("\n".join(said), file=sys.stderr)
    return VIOLATED if violations else int(summary.exit_code)


def violations_of_sending(db: sqlite3.Connection, world: World, name: str) -> Iterator[str]:
    """What must hold in the ledger, as another process sees it, at the moment a request arrives."""
    found = db.execute(
        "SELECT run, sent_at, key FROM attempt WHERE client_request_id = ? AND outcome IS NULL", (name,)
    ).fetchone()
    if found is None:
        yield f"{name} was sent before its intent was committed"
        return
    run, sent_at, key = found
    (answered,) = db.execute(
        "SELECT count(*) FROM attempt WHERE run = ? AND key = ? AND outcome = 'ok'", (run, key)
    ).fetchone()
    if answered:
        yield f"{name} asks what has been answered"
    if world.cap is not None:
        taken = sum(
            pico
            for a_run, at, pico in db.execute("SELECT run, sent_at, coalesce(usd_pico, reserved_pico) FROM attempt")
            if _period(world, a_run, at) == _period(world, run, sent_at)
        )
        if taken * PICO > world.cap:
            yield f"{name} was sent with ${taken * PICO} of ${world.cap} taken"


def violations_of_the_output(world: World, job: Any, summary: Any) -> Iterator[str]:
    """The Parquet has every row, its own answer, and the ledger's dollars."""
    import pyarrow.parquet as pq

    from batchrun.verify import verify

    verdict = verify(job)
    yield from (f"verify: {what}" for what in verdict.wrong)
    if summary.output is None:
        if summary.exit_code != 6 and not (summary.exit_code in (130, 143) and len(world.plan["signals"]) > 1):
            yield f"there is no output, and the exit code is {summary.exit_code}"
        return
    # No timestamps, for which pyarrow would import pandas, each time anew.
    columns = ["prompt", "status", "response", "client_request_id", "usd_spent"]
    rows = pq.ParquetFile(summary.output).read(columns).to_pylist()
    if [row["prompt"] for row in rows] != world.prompts:
        yield "the output has other rows than the input"
    for row in rows:
        if row["status"] == "ok" and row["response"] not in ("", f"{row['client_request_id']} answers {row['prompt']}"):
            yield f"the row {row['prompt']!r} has the answer {row['response']!r}"
        if row["status"] == "pending" and summary.exit_code in (0, 1):
            yield f"the row {row['prompt']!r} is pending, and the exit code is {summary.exit_code}"
    usd = sum((Decimal(repr(row["usd_spent"])) for row in rows if row["usd_spent"] is not None), Decimal(0))
    if usd + summary.totals.unplaced_usd != summary.totals.usd:
        yield f"the rows add up to ${usd}, the ledger to ${summary.totals.usd}"


# --- between invocations ------------------------------------------------------------------------------------


def _period(world: World, run: int, sent_at: int) -> object:
    if world.per == "run":
        return run
    day = datetime.fromtimestamp(sent_at / 1e6, UTC)
    return (day.year, day.month) if world.per == "month" else day.date()


def violations_on_disk(world: World) -> Iterator[str]:
    """What must hold in the ledger between invocations, also after a crash, against the provider's bill."""
    billed: dict[str, Decimal] = {}
    if world.bill.exists():
        for line in world.bill.read_text(encoding="utf-8").splitlines():
            name, _, usd = line.partition("\t")
            if name in billed:
                yield f"{name} was sent twice"
            billed[name] = Decimal(usd)
    if not world.ledger.exists():
        if billed:
            yield "there is no ledger, and something was sent"
        return
    db = sqlite3.connect(world.ledger)
    try:
        ledger = {
            name: (run, sent_at, outcome, usd, reserved)
            for name, run, sent_at, outcome, usd, reserved in db.execute(
                "SELECT client_request_id, run, sent_at, outcome, usd_pico, reserved_pico FROM attempt"
            )
        }
        twice = db.execute(
            "SELECT key FROM attempt WHERE outcome = 'ok' GROUP BY run, key HAVING count(*) > 1"
        ).fetchall()
    except sqlite3.OperationalError:  # killed before there were tables
        ledger, twice = {}, []
    finally:
        db.close()
    if twice:
        yield f"{len(twice)} rows were answered twice"
    if strange := set(billed) - set(ledger):
        yield f"the ledger does not know {sorted(strange)}"
    if (left := sum(outcome is None for _, _, outcome, _, _ in ledger.values())) > world.concurrency:
        yield f"{left} attempts were left in flight"
    periods: dict[object, Decimal] = {}
    for name, usd in billed.items():
        if name not in ledger:
            continue
        run, sent_at, outcome, pico, reserved = ledger[name]
        periods[_period(world, run, sent_at)] = periods.get(_period(world, run, sent_at), Decimal(0)) + usd
        if pico is not None and pico * PICO != usd:
            yield f"{name} ({outcome}) was billed ${usd}, and the ledger has ${pico * PICO}"
        if pico is None and usd > (reserved or 0) * PICO:
            yield f"{name} ({outcome}) was billed ${usd}, and only ${(reserved or 0) * PICO} was reserved"
    for name, (_, _, outcome, pico, _) in ledger.items():
        if name not in billed and pico:
            yield f"{name} ({outcome}) was not billed, and the ledger has ${pico * PICO}"
    if world.cap is not None and any(usd > world.cap for usd in periods.values()):
        yield f"the bill is {periods}, and the cap ${world.cap}"


def _play(seed: int, folder: Path, defect: str | None) -> None:
    """One job from its first invocation to its end."""
    chance = random.Random(f"{seed} between")
    world = World.drawn(seed, folder)
    has_jumped = False
    for number in range(80):
        if number == 12:
            world.faults = {"ok": 1.0}  # all was mended
            world.latency = "exponential"
            world.timeout = 60.0
        world = world.next_invocation(chance, is_quiet=number >= 20)
        world.write()
        code = forked(lambda world=world: invoke(world, defect))
        if code not in (0, 1, *STOPPED, -signal.SIGKILL):
            raise ViolationError(f"invocation {world.invocation} ended with {code}")
        for violation in violations_on_disk(world):
            raise ViolationError(violation)
        world.faults.pop("401", None)  # the account was mended
        world.retry_failed = False
        if code in (0, 1):
            if code == 0 or chance.random() < 0.5:
                return
            world.retry_failed = True
        has_jumped = has_jumped or bool(world.plan["jumps"])
        if code == 3:
            if not has_jumped:  # else what lies in the future counts, too
                _check_used_up(world)
            assert world.cap is not None
            world.cap += WORST * len(world.prompts)
        if chance.random() < 0.1:
            world.prompts.insert(chance.randrange(len(world.prompts) + 1), f"new row {number} of {seed}")
        if chance.random() < 0.1:
            world.prompts.pop(chance.randrange(len(world.prompts)))
    raise ViolationError("the job never ended")


def _check_used_up(world: World) -> None:
    db = sqlite3.connect(world.ledger)
    attempts = db.execute("SELECT run, sent_at, held_pico FROM charged ORDER BY attempt_id").fetchall()
    db.close()
    if world.cap is None:
        raise ViolationError("a cap stopped a run that has none")
    # A period in which nothing was sent has all its room, and too little for one row.
    taken = {_period(world, run, at): 0 for run, at, _ in attempts[-1:]}
    for run, at, pico in attempts:
        if _period(world, run, at) in taken:
            taken[_period(world, run, at)] += pico
    if attempts and world.cap - max(taken.values()) * PICO > WORST:
        raise ViolationError(f"the cap of ${world.cap} stopped the run with {taken} taken")


def play_to_the_end(world: World) -> None:
    """Invoke once more, with nothing to go wrong: every row is settled, and all that must hold holds."""
    world = replace(world, faults={"ok": 1.0})
    world = world.next_invocation(random.Random(0), is_quiet=True)
    code = forked(lambda: invoke(world))
    if code not in (0, 1):
        raise ViolationError(f"the invocation after it ended with {code}")
    for violation in violations_on_disk(world):
        raise ViolationError(violation)


def forked(call: Callable[[], int]) -> int:
    """Run a call in a process of its own; its exit code, negative for a signal."""
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = VIOLATED
        try:
            signal.alarm(60)
            code = call()
        except BaseException:  # noqa: BLE001 - a fork must never go on in its parent's place
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def simulate(first: int, stop: int, folder: str, defect: str | None = None) -> None:
    """Play the seeds first ≤ seed < stop; raise at the first promise that is broken."""
    for seed in range(first, stop):
        place = Path(folder) / str(seed)
        place.mkdir()
        try:
            _play(seed, place, defect)
        except BaseException:
            print(f"seed {seed}: replay it with BATCHRUN_SEED={seed} pytest -n0 -k replayed", file=sys.stderr)
            raise
        shutil.rmtree(place)
