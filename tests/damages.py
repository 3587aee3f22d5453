"""A ledger that is cut or overwritten, and what batchrun makes of it: a legal state, or a refusal with a way out."""

from __future__ import annotations

import io
import random
import shutil
import sqlite3
import sys
from contextlib import redirect_stderr
from pathlib import Path

from .crashes import small_world
from .simulated import VIOLATED, ViolationError, World, forked, invoke, play_to_the_end

PAGE = 4096
FRAME = PAGE + 24


def make(folder: str) -> None:
    """A run that was killed twice: what the first process did is in the ledger's file, the rest in its log."""
    world = _world(Path(folder))
    world.write()
    for turn in (120, 90):
        world.plan["crash_turn"] = turn
        if forked(lambda: invoke(world)) != -9:
            raise ViolationError("it was not killed")


def fold(made: Path, folder: Path) -> None:
    """The same after its log was folded in, and before the log was begun anew."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    wal = folder / "job.ledger.sqlite-wal"
    kept = wal.read_bytes()
    db = sqlite3.connect(folder / "job.ledger.sqlite")
    db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    db.close()
    wal.write_bytes(kept)


def _world(folder: Path) -> World:
    world = small_world(folder, "plain")
    world.concurrency = 4
    world.faults = {"ok": 6.0, "429": 1.0}
    world.latency = "none"
    chance = random.Random(0)
    world.prompts = [f"row {index} {chance.randbytes(1500).hex()}" for index in range(60)]
    return world


def damage(made: str, folder: str, what: str, part: int, parts: int) -> None:
    """Damage copies of what was made, each at another place; what then happens is legal.

    `what`: `cut`, `cut log` or `cut folded log` (each page and some bytes around), `blank` (a page of zeros), `noise`
    (some bytes).
    """
    source = Path(made)
    if what == "cut folded log":
        source = Path(folder) / "folded"
        fold(Path(made), source)
    is_log = what.endswith("log")
    name = "job.ledger.sqlite-wal" if is_log else "job.ledger.sqlite"
    size = (source / name).stat().st_size
    unit = FRAME if is_log else PAGE
    chance = random.Random(what)
    places = [place for start in range(0, size, unit) for place in (start, start + 1, start + 100, start + unit // 2)]
    places = [place for place in places if place < size]
    if what in ("blank", "noise"):
        places = list(range(0, size, PAGE))
    for place in places[part::parts]:
        copy = Path(folder) / f"{what} {place}"
        shutil.copytree(source, copy)
        path = copy / name
        raw = bytearray(path.read_bytes())
        if what.startswith("cut"):
            del raw[place:]
        elif what == "blank":
            raw[place : place + PAGE] = bytes(PAGE)
        else:
            for _ in range(20):
                raw[place + chance.randrange(PAGE)] = chance.randrange(256)
        path.write_bytes(raw)
        if not is_log:  # else the log would heal it
            copy.joinpath("job.ledger.sqlite-wal").unlink()
        try:
            _check(_world(copy))
        except BaseException:
            print(f"{what} at {place}:", file=sys.stderr)
            raise
        shutil.rmtree(copy)


def _check(world: World) -> None:
    """It is gone on with, and what the ledger says is true; or refused, with a command that leads out."""
    world.bill.unlink()  # what the damage took is billed, too, and nobody can know it
    world.write()
    said = _run(world)
    if said is None:
        return
    if "batchrun salvage JOB" not in said and "delete it" not in said:
        raise ViolationError(f"it is refused without a way out: {said}")
    if "batchrun salvage JOB" in said:
        saved = _salvaged(world)
        if saved is not None:
            said = _run(world)
            if said is None:
                return
            raise ViolationError(f"it was salvaged, and refused again: {said}")
    world.ledger.unlink()
    for ending in ("-wal", "-shm"):
        world.ledger.with_name(world.ledger.name + ending).unlink(missing_ok=True)
    play_to_the_end(world)


def _run(world: World) -> str | None:
    """None if a run went to its end; what was said if it was refused."""
    path = world.folder / "said"

    def call() -> int:
        said = io.StringIO()
        with redirect_stderr(said):
            code = invoke(world)
        path.write_text(said.getvalue(), encoding="utf-8")
        return code

    world.faults = {"ok": 1.0}
    code = forked(call)
    said = path.read_text(encoding="utf-8")
    if code in (0, 1):
        return None
    if code == VIOLATED and said.startswith("verify: "):
        return said + "batchrun salvage JOB"  # so says `batchrun verify`
    if code != 6:
        raise ViolationError(f"it ended with {code}: {said}")
    return said


def _salvaged(world: World) -> int | None:
    """How many attempts were saved; None if nothing could be."""
    path = world.folder / "said"

    def call() -> int:
        from batchrun.errors import StorageError
        from batchrun.loading import load_job
        from batchrun.salvage import salvage

        try:
            saved = salvage(load_job(world.folder / "job.yaml"))
        except StorageError as exc:
            if "nothing of" in str(exc) or "not a database" in str(exc):
                return 6
            raise
        path.write_text(str(saved.attempts), encoding="utf-8")
        return 0 if saved.is_all else 1

    code = forked(call)
    if code == 6:
        return None
    if code not in (0, 1):
        raise ViolationError(f"salvage ended with {code}")
    return int(path.read_text(encoding="utf-8"))
