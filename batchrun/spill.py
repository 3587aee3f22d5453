"""A table of rows by key, in a private file: a join of two big files takes no memory."""

from __future__ import annotations

import pickle
import sqlite3
from typing import Any


class Spill:
    """Rows by key, each to be taken out once.

    >>> spill = Spill()
    >>> spill.put(("a", 0), [1, "x"]), spill.put(("a", 0), [2, "y"])
    (True, False)
    >>> spill.take(("a", 0)), spill.take(("a", 0)), len(spill)
    ([1, 'x'], None, 0)
    """

    def __init__(self) -> None:
        # The empty name is a private database in a temporary file.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("CREATE TABLE held (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        self._db.execute("BEGIN")
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def put(self, key: Any, value: Any) -> bool:
        """Hold a value under a key; False if there is one already. Both of what Arrow gives: text, numbers, dates, …"""
        done = self._db.execute("INSERT OR IGNORE INTO held VALUES (?, ?)", (_bytes_of(key), pickle.dumps(value)))
        self._number += done.rowcount
        return bool(done.rowcount)

    def take(self, key: Any) -> Any:
        """What is held under a key; None if nothing is, or it was taken."""
        found = self._db.execute("DELETE FROM held WHERE key = ? RETURNING value", (_bytes_of(key),)).fetchone()
        self._number -= found is not None
        return pickle.loads(found[0]) if found is not None else None


def _bytes_of(key: Any) -> bytes:
    # Not pickle's, which differ for equal values.
    return repr(key).encode("utf-8", "surrogatepass")
