"""The equation that every run must satisfy: our books against the fake provider's bill."""

from __future__ import annotations

import sqlite3
from decimal import Decimal

from .conftest import FakeProvider, Workspace, spent


def books(work: Workspace) -> dict[str, tuple[Decimal | None, str | None]]:
    """Dollars and their source of every attempt in the ledger, by our request id."""
    db = sqlite3.connect(f"file:{work.ledger}?mode=ro", uri=True)
    rows = db.execute("SELECT client_request_id, usd_pico, cost_source FROM charged").fetchall()
    db.close()
    return {name: (None if pico is None else Decimal(pico).scaleb(-12), source) for name, pico, source in rows}


def assert_reconciled(work: Workspace, provider: FakeProvider) -> None:
    """Rows + unplaced = ledger = manifest; and the bill less ours is the bill of what we report unknown.

    Where we estimated, the difference is that between our figure and the billed one.
    """
    ours = books(work)
    billed: dict[str, Decimal] = {}
    for request in provider.requests:
        billed[request["id"]] = billed.get(request["id"], Decimal(0)) + Decimal(request["usd"])
    assert set(billed) <= set(ours), "something was sent that the ledger does not know"
    total = sum((usd for usd, _ in ours.values() if usd is not None), Decimal(0))
    manifest = work.manifest()
    assert spent(work.rows()) + manifest["unplaced_usd"] == total == manifest["usd_spent"]
    unknown = sum((billed.get(name, Decimal(0)) for name, (usd, _) in ours.items() if usd is None), Decimal(0))
    apart = sum(
        (
            billed[name] - usd
            for name, (usd, source) in ours.items()
            if usd is not None and source in ("job", "library")
        ),
        Decimal(0),
    )
    assert provider.bill - total == unknown + apart
    assert manifest["unknown_attempts"] == sum(usd is None for usd, _ in ours.values())


def taken(work: Workspace) -> Decimal:
    """Dollars that are spent, reserved or unknown."""
    db = sqlite3.connect(f"file:{work.ledger}?mode=ro", uri=True)
    (pico,) = db.execute("SELECT sum(held_pico) FROM charged").fetchone()
    db.close()
    return Decimal(pico or 0).scaleb(-12)
