"""The tables of the ledger, as numbered migrations: each commits together with its version."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from batchrun.errors import StorageError

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE owner (job_name TEXT NOT NULL, job_path TEXT NOT NULL) STRICT;
    CREATE TABLE run (
        run INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL UNIQUE,
        started_at INTEGER NOT NULL,              -- times are microseconds since 1970, UTC
        ended_at INTEGER,
        state TEXT NOT NULL CHECK (state IN ('open', 'finished', 'abandoned')),
        input TEXT                                -- the input that the groups are placed by, as JSON
    ) STRICT;
    CREATE TABLE invocation (
        invocation INTEGER PRIMARY KEY,
        run INTEGER NOT NULL REFERENCES run,
        started_at INTEGER NOT NULL,
        ended_at INTEGER,
        exit_code INTEGER,
        reason TEXT,
        version TEXT NOT NULL,
        pid INTEGER NOT NULL,
        host TEXT NOT NULL,
        job TEXT NOT NULL,                        -- the job file as JSON; it holds no secrets
        endpoint TEXT NOT NULL,                   -- what stands for the address in the keys
        prices TEXT,                              -- the prices used, as JSON
        input TEXT                                -- the input as this invocation found it, as JSON
    ) STRICT;
    CREATE TABLE attempt (
        attempt_id INTEGER PRIMARY KEY,
        run INTEGER NOT NULL REFERENCES run,
        invocation INTEGER NOT NULL REFERENCES invocation,
        row_index INTEGER NOT NULL,
        model TEXT NOT NULL,
        sample INTEGER NOT NULL,
        key TEXT NOT NULL,
        number INTEGER NOT NULL,
        client_request_id TEXT NOT NULL,
        sent_at INTEGER NOT NULL,
        settled_at INTEGER,
        outcome TEXT CHECK (outcome IN ('ok', 'failed', 'unknown')),   -- null: in flight
        final INTEGER NOT NULL DEFAULT 0,         -- 1: this attempt decides its slot
        status INTEGER,
        error_kind TEXT,
        error TEXT,
        prompt_tokens INTEGER,
        completion_tokens INTEGER,
        total_tokens INTEGER,
        cached_tokens INTEGER,
        cache_write_tokens INTEGER,
        reasoning_tokens INTEGER,
        usd_pico INTEGER,                         -- 1e-12 USD; null: unknown
        cost_source TEXT,
        request_id TEXT,
        latency_us INTEGER,
        first_token_us INTEGER,
        streamed INTEGER,
        flags TEXT
    ) STRICT;
    CREATE INDEX attempt_slot ON attempt (run, row_index);
    CREATE INDEX attempt_open ON attempt (attempt_id) WHERE outcome IS NULL;
    CREATE TABLE answer (
        attempt_id INTEGER PRIMARY KEY REFERENCES attempt,
        size INTEGER NOT NULL,                    -- of the body as it came
        body BLOB NOT NULL                        -- zstd
    ) STRICT;
    CREATE TABLE moved (
        run INTEGER NOT NULL REFERENCES run,
        row_index INTEGER NOT NULL, model TEXT NOT NULL, sample INTEGER NOT NULL, key TEXT NOT NULL,
        to_row INTEGER,                           -- null: no row asks for this key any more
        PRIMARY KEY (run, row_index, model, sample, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX moved_to ON moved (run, to_row);
    CREATE TABLE row_fault (
        run INTEGER NOT NULL REFERENCES run,
        row_index INTEGER NOT NULL, model TEXT NOT NULL, sample INTEGER NOT NULL,
        error TEXT NOT NULL,
        PRIMARY KEY (run, row_index, model, sample)
    ) STRICT, WITHOUT ROWID;
    """,
)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring a ledger to the present version.

    Raises:
        StorageError: it is no ledger, or one of a newer batchrun.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0 and db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        raise StorageError(f"{path} is another program's database: set `ledger:` to another path")
    if version > len(_MIGRATIONS):
        raise StorageError(
            f"{path} was written by a newer batchrun (ledger version {version}, this one knows "
            f"{len(_MIGRATIONS)}): update batchrun"
        )
    for number, script in enumerate(_MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
