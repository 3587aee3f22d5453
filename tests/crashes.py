"""A small run that is broken off at each step that it takes on the disk, and gone on with."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import shutil
import sqlite3
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

from . import defects, simulated
from .disk import STEPS, Disk, install, lay_out
from .simulated import ViolationError, World, forked, invoke, play_to_the_end, violations_on_disk


def small_world(folder: Path, kind: str) -> World:
    """A job of a few rows. `kind`: `capped` waits for the disk at each commit, `plain` does not."""
    return World(
        seed=1,
        folder=folder,
        concurrency=3,
        streamed=kind == "streamed",
        faults={"ok": 6.0, "429": 1.0, "hangup": 1.0},
        latency="two",
        timeout=60.0,
        attempts=5,
        patience=900.0,
        stop_seconds=60.0,
        cap=Decimal(1) if kind == "capped" else None,
        per="run",
        prompts=[f"row {index} of a small job" for index in range(6)],
        is_watched=False,
    ).next_invocation(random.Random(0), is_quiet=True)


def _on(world: World, disk: Disk, save: Path | None = None, defect: str | None = None) -> int:
    def call() -> int:
        if defect is not None:
            defects.plant(defect)
        install(disk)
        if save is not None:
            write = os.write

            def billed(fd: int, data: bytes) -> int:
                disk.step("bill", str(world.bill), data, asyncio.get_running_loop().time())
                return write(fd, data)

            simulated.os.write = billed  # type: ignore[assignment]
        code = invoke(world)
        if save is not None:
            disk.save(save)
        return code

    return forked(call)


def record(folder: Path, kind: str, defect: str | None = None) -> list[tuple[Any, ...]]:
    """All steps of a whole run, with the lines of the provider's bill between them."""
    place = folder / "whole"
    place.mkdir()
    world = small_world(place, kind)
    world.write()
    code = _on(world, Disk(place), folder / "steps", defect)
    if code not in (0, 1):
        raise ViolationError(f"the whole run ended with {code}")
    steps: list[tuple[Any, ...]] = pickle.loads((folder / "steps").read_bytes())
    return steps


def break_off(folder: str, kind: str, what: str, part: int = 0, parts: int = 1) -> None:
    """Break off at every step (of the steps numbered `part` modulo `parts`), and go on to the end."""
    steps = sum(step[0] in STEPS for step in record(Path(folder), kind))
    for at in range(1 + part, steps + 1, parts):
        place = Path(folder) / f"{at}"
        place.mkdir()
        world = small_world(place, kind)
        world.write()
        with _naming(f"{what} at step {at} of {steps} ({kind})"):
            code = _on(world, Disk(place, at, what))
            if code not in ((-9, 0, 1) if what in ("kill", "tear") else (0, 1, 6)):
                raise ViolationError(f"it ended with {code}")
            for violation in violations_on_disk(world):
                raise ViolationError(violation)
            _check_output_is_whole(place)
            play_to_the_end(world)
            if what == "full":
                _check_nothing_lost(world)
        shutil.rmtree(place)


def cut_the_power(
    folder: str, kind: str, part: int = 0, parts: int = 1, last: int | None = None, defect: str | None = None
) -> None:
    """Cut the power after each step, with nothing, some or all of what was not synced on the disk; and go on.

    `last`: only after so many of the last steps.
    """
    steps = record(Path(folder), kind, defect)
    chance = random.Random(4711)
    for at in range(1 + part if last is None else len(steps) - last, len(steps) + 1, parts):
        for keep in ("none", "some", "all"):
            place = Path(folder) / f"{at}-{keep}"
            place.mkdir()
            world = small_world(place, kind)
            world.write()
            done = steps[:at]
            lay_out([step for step in done if step[0] != "bill"], place, chance, keep)
            world.bill.write_bytes(b"".join(step[2] for step in done if step[0] == "bill"))
            with _naming(f"the power cut after step {at} of {len(steps)} ({kind}), {keep} of the rest on the disk"):
                _check_output_is_whole(place)
                if kind != "capped":
                    _forgive_the_last_second(world, [step for step in done if step[0] == "bill"])
                for violation in violations_on_disk(world):
                    raise ViolationError(violation)
                play_to_the_end(world)
            shutil.rmtree(place)


def _forgive_the_last_second(world: World, billed: list[tuple[Any, ...]]) -> None:
    """Without a cap a power cut can leave up to a second of sends unrecorded, as the README says, but no more."""
    known: set[str] = set()
    if world.ledger.exists():
        db = sqlite3.connect(world.ledger)
        known = {name for (name,) in db.execute("SELECT client_request_id FROM attempt")}
        db.close()
    lines = [(data, seconds) for _, _, data, seconds in billed]
    forgotten = [seconds for data, seconds in lines if data.decode().partition("\t")[0] not in known]
    if forgotten and lines[-1][1] - min(forgotten) > 1.1:
        raise ViolationError(f"{lines[-1][1] - min(forgotten)} seconds of sends are forgotten")
    world.bill.write_bytes(b"".join(data for data, _ in lines if data.decode().partition("\t")[0] in known))


class _naming:  # noqa: N801
    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, exc: Any, trace: Any) -> None:
        if exc is not None:
            print(f"{self.where}:", file=sys.stderr)


def _check_output_is_whole(folder: Path) -> None:
    path = folder / "out.parquet"
    if path.exists() and forked(lambda: _is_parquet(path)):
        raise ViolationError("half of an output stands in its place")


def _is_parquet(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(path).read(["prompt"])
    except Exception:  # noqa: BLE001 - whatever is wrong with it
        return 1
    return 0


def _check_nothing_lost(world: World) -> None:
    """Nothing that was answered was asked again: only what the provider itself lost is unknown."""
    db = sqlite3.connect(world.ledger)
    kinds = dict(db.execute("SELECT error_kind, count(*) FROM attempt WHERE outcome = 'unknown' GROUP BY 1"))
    db.close()
    if set(kinds) - {"disconnect"}:
        raise ViolationError(f"answers were lost: {kinds}")
