"""Is a column unique? Found out on disk, so that a big input takes no memory."""

from __future__ import annotations

import sqlite3
from typing import Any


class UniqueValues:
    """Takes values one by one and tells the first that comes again.

    >>> unique = UniqueValues()
    >>> [unique.add(0, "1"), unique.add(1, 1), unique.add(2, "1")]
    [None, None, 0]
    """

    def __init__(self) -> None:
        # The empty name is a private database in a temporary file.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("CREATE TABLE seen (value TEXT PRIMARY KEY, row_index INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, row_index: int, value: Any) -> int | None:
        """The index of the row that has had this value before; None if it is new."""
        tagged = f"{type(value).__name__}:{value}"  # the text "1" and the number 1 differ
        if self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (tagged, row_index)).rowcount:
            return None
        earlier: int = self._db.execute("SELECT row_index FROM seen WHERE value = ?", (tagged,)).fetchone()[0]
        return earlier
