"""The tables of the ledger, as numbered migrations: each commits together with its version."""

from __future__ import annotations

import os
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
        -- null: in flight; with IN, SQLite would make a table of three at each change of a row
        outcome TEXT CHECK (outcome = 'ok' OR outcome = 'failed' OR outcome = 'unknown'),
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
    """
    ALTER TABLE attempt ADD COLUMN request_bytes INTEGER;
    ALTER TABLE attempt ADD COLUMN reserved_pico INTEGER;   -- the most it could cost when it was sent; null: unknown
    ALTER TABLE attempt ADD COLUMN held_pico INTEGER;       -- what a cap counts it as, where that is not its cost
    ALTER TABLE attempt ADD COLUMN settled_after INTEGER;   -- the newest attempt there was when it was settled
    ALTER TABLE attempt ADD COLUMN seal INTEGER;            -- a hash of the settled attempt, its answer included
    ALTER TABLE run ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE run ADD COLUMN settled INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE run ADD COLUMN seals INTEGER NOT NULL DEFAULT 0;    -- sum of its attempts' seals, modulo 2^62
    ALTER TABLE run ADD COLUMN is_written INTEGER NOT NULL DEFAULT 1;   -- 1: the output says what the ledger does
    UPDATE run SET attempts = (SELECT count(*) FROM attempt WHERE attempt.run = run.run),
        settled = (SELECT count(outcome) FROM attempt WHERE attempt.run = run.run);
    ALTER TABLE owner ADD COLUMN runs INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE owner ADD COLUMN amendments INTEGER NOT NULL DEFAULT 0;
    UPDATE owner SET runs = (SELECT count(*) FROM run);
    ALTER TABLE invocation ADD COLUMN seal INTEGER;         -- a hash of its job and endpoint
    CREATE TABLE amendment (                      -- one reading of the provider's log, or one repricing
        amendment INTEGER PRIMARY KEY,
        origin TEXT NOT NULL CHECK (origin IN ('reconcile', 'reprice')),
        amended_at INTEGER NOT NULL,
        after_attempt INTEGER NOT NULL,           -- the newest attempt there was
        prices TEXT,                              -- the prices used, by model, as JSON
        corrections INTEGER NOT NULL,
        seals INTEGER NOT NULL                    -- sum of its corrections' seals, modulo 2^62
    ) STRICT;
    CREATE TABLE correction (                     -- what was learnt of an attempt's cost after it was settled
        attempt_id INTEGER NOT NULL REFERENCES attempt,
        amendment INTEGER NOT NULL REFERENCES amendment,
        usd_pico INTEGER NOT NULL,
        cost_source TEXT NOT NULL,
        PRIMARY KEY (attempt_id, amendment)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE price_list (                     -- the provider's published list, as it came last
        url TEXT PRIMARY KEY,
        etag TEXT,
        fetched_at INTEGER NOT NULL,
        body BLOB NOT NULL                        -- zstd
    ) STRICT;
    CREATE VIEW charged AS                        -- attempts with what is known of their cost now
        SELECT attempt.attempt_id, run, invocation, row_index, model, sample, key, number, client_request_id, sent_at,
            settled_at, outcome, final, status, error_kind, error, prompt_tokens, completion_tokens, total_tokens,
            cached_tokens, cache_write_tokens, reasoning_tokens, request_id, latency_us, first_token_us, streamed,
            flags, request_bytes, reserved_pico, origin,
            coalesce(correction.usd_pico, attempt.usd_pico) AS usd_pico,
            coalesce(correction.cost_source, attempt.cost_source) AS cost_source,
            CASE origin
                WHEN 'reconcile' THEN correction.usd_pico
                WHEN 'reprice' THEN max(coalesce(held_pico, attempt.usd_pico, reserved_pico, 0), correction.usd_pico)
                ELSE coalesce(held_pico, attempt.usd_pico, reserved_pico)
            END AS held_pico
        FROM attempt
        LEFT JOIN correction ON correction.attempt_id = attempt.attempt_id AND correction.amendment =
            (SELECT max(amendment) FROM correction AS newer WHERE newer.attempt_id = attempt.attempt_id)
        LEFT JOIN amendment ON amendment.amendment = correction.amendment;
    """,
    """
    ALTER TABLE attempt ADD COLUMN repair INTEGER NOT NULL DEFAULT 0;   -- how often the slot was asked again, so far,
    ALTER TABLE attempt ADD COLUMN repair_key TEXT;                     -- because its answer did not fit; and that key
    CREATE TABLE repair_wanted (                  -- answered groups that are to be asked again
        run INTEGER NOT NULL REFERENCES run,
        row_index INTEGER NOT NULL, model TEXT NOT NULL, sample INTEGER NOT NULL, key TEXT NOT NULL,
        repair INTEGER NOT NULL,                  -- for the how many-th time
        PRIMARY KEY (run, row_index, model, sample, key)
    ) STRICT, WITHOUT ROWID;
    ALTER TABLE run ADD COLUMN labels TEXT;       -- how often each label was given, as JSON
    DROP VIEW charged;
    CREATE VIEW charged AS                        -- attempts with what is known of their cost now
        SELECT attempt.attempt_id, run, invocation, row_index, model, sample, key, number, client_request_id, sent_at,
            settled_at, outcome, final, status, error_kind, error, prompt_tokens, completion_tokens, total_tokens,
            cached_tokens, cache_write_tokens, reasoning_tokens, request_id, latency_us, first_token_us, streamed,
            flags, request_bytes, reserved_pico, repair,
            repair_key, origin,
            coalesce(correction.usd_pico, attempt.usd_pico) AS usd_pico,
            coalesce(correction.cost_source, attempt.cost_source) AS cost_source,
            CASE origin
                WHEN 'reconcile' THEN correction.usd_pico
                WHEN 'reprice' THEN max(coalesce(held_pico, attempt.usd_pico, reserved_pico, 0), correction.usd_pico)
                ELSE coalesce(held_pico, attempt.usd_pico, reserved_pico)
            END AS held_pico
        FROM attempt
        LEFT JOIN correction ON correction.attempt_id = attempt.attempt_id AND correction.amendment =
            (SELECT max(amendment) FROM correction AS newer WHERE newer.attempt_id = attempt.attempt_id)
        LEFT JOIN amendment ON amendment.amendment = correction.amendment;
    CREATE TABLE reused (                         -- slots that take the answer of another group for nothing
        run INTEGER NOT NULL REFERENCES run,
        row_index INTEGER NOT NULL, model TEXT NOT NULL, sample INTEGER NOT NULL, key TEXT NOT NULL,
        source_run INTEGER NOT NULL REFERENCES run,
        source_row INTEGER NOT NULL,              -- the group's; its model, sample and key are the same
        PRIMARY KEY (run, row_index, model, sample)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE run ADD COLUMN pruned_at INTEGER;   -- when bodies of its answers were dropped; null: they are there
    ALTER TABLE answer ADD COLUMN digest TEXT;      -- of a body that was dropped, for the attempt's seal
    """,
)


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring a ledger to the present version.

    Raises:
        StorageError: it is no ledger, or one of a newer batchrun.
    """
    _upgrade(db, _version(db, path))


def create(path: Path) -> sqlite3.Connection:
    """An empty ledger of the present version, in a new file that its owner alone can read.

    Raises:
        OSError: the file cannot be made. What stood there before is deleted.
    """
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    db = sqlite3.connect(path, isolation_level=None)
    try:
        _upgrade(db, 0)
    except BaseException:
        db.close()
        raise
    return db


def _upgrade(db: sqlite3.Connection, version: int) -> None:
    for number, script in enumerate(_MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")


def check_version(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a ledger that is not of the present version, without changing it.

    Raises:
        StorageError: it is no ledger, or of another version.
    """
    version = _version(db, path)
    if version < len(_MIGRATIONS):
        raise StorageError(f"{path} was written by an older batchrun: `batchrun export` brings it up to date")


def _version(db: sqlite3.Connection, path: Path) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        if db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise StorageError(f"{path} is another program's database: set `ledger:` to another path")
        raise StorageError(
            f"{path} is empty, and a ledger never is: it has been damaged. Bring it back from a backup; or, if its "
            "answers may be paid for again, delete it"
        )
    if version > len(_MIGRATIONS):
        raise StorageError(
            f"{path} was written by a newer batchrun (ledger version {version}, this one knows "
            f"{len(_MIGRATIONS)}): update batchrun"
        )
    return version
