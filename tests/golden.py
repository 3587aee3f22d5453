"""Golden ledgers: what each version of the ledger left behind in the middle of a run.

`python -m tests.golden FOLDER` makes one with the code at hand: a job, its input, and the ledger of a run that was
stopped by a refused account, with answers, a failed row, unknown outcomes and answers that have lost their rows.
The address of the provider is a part of each request's key, so that it is the same for all.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
from pathlib import Path

from .conftest import FakeProvider, Workspace, fake_providers

PORT = 47811
ROWS = [
    '0 <<{"fail": [400]}>>', '1 <<{"fail": ["hangup"]}>>', '2 <<{"fail": ["half"]}>>',
    *(f"row {index}" for index in range(3, 30)),
]  # fmt: skip


def write(work: Workspace, provider: FakeProvider, rows: list[str]) -> None:
    """The job as it is in every golden folder."""
    work.write_rows(rows)
    work.write_job(provider.base_url, concurrency=2, retry={"max_attempts": 1})


def _make(folder: Path) -> None:
    folder.mkdir(parents=True)
    work = Workspace(folder)
    scratch = folder / "scratch"
    scratch.mkdir()
    with fake_providers(scratch) as provide:
        provider = provide(port=PORT, refuse_after=20, bill="mix")
        write(work, provider, ["gone", *ROWS])
        with work.start("job.yaml") as process:
            process.communicate()
        write(work, provider, ROWS)
        with work.start("job.yaml") as process:
            process.communicate()
    shutil.rmtree(scratch)
    db = sqlite3.connect(work.ledger)
    db.execute("UPDATE invocation SET host = 'golden'")
    db.commit()
    db.execute("VACUUM")
    db.close()
    for path in (work.output, work.ledger.with_name(f"{work.ledger.name}.lock")):
        path.unlink()


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
