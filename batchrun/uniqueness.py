"""Is a column unique? Found out on disk, so that a big input takes no memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any


def first_duplicate(values: Iterable[tuple[int, Any]]) -> tuple[int, int, Any] | None:
    """The first (row index, earlier row index, value) whose value has been seen; None if all differ.

    >>> first_duplicate([(0, "a"), (1, 7), (2, "a")])
    (2, 0, 'a')
    """
    # The empty name is a private database in a temporary file.
    db = sqlite3.connect("", isolation_level=None)
    try:
        db.execute("CREATE TABLE seen (value TEXT PRIMARY KEY, row_index INTEGER) WITHOUT ROWID")
        db.execute("BEGIN")
        for row_index, value in _tagged(values):
            cursor = db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (value, row_index))
            if cursor.rowcount == 0:
                earlier = db.execute("SELECT row_index FROM seen WHERE value = ?", (value,)).fetchone()[0]
                return row_index, earlier, value.partition(":")[2]
    finally:
        db.close()
    return None


def _tagged(values: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, str]]:
    """The text "1" and the number 1 differ."""
    for row_index, value in values:
        yield row_index, f"{type(value).__name__}:{value}"
