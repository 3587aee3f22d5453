"""Drops the bodies of old answers from a ledger; every figure stays."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from datetime import datetime

from batchrun.errors import JobError
from batchrun.job import Job
from batchrun.money import exact_json
from batchrun.pruning import PrunableLedger


@dataclass(frozen=True)
class Pruned:
    """What was dropped."""

    runs: list[str]
    """Their ids."""
    answers: int
    kept: int
    """Answers of those runs that stay, because newer runs have taken them."""
    bytes_before: int
    """Of the ledger's files."""
    bytes_after: int

    def lines(self) -> list[str]:
        """A short text."""
        if not self.runs:
            return ["there is nothing of that age to drop: no run was pruned"]
        freed = (self.bytes_before - self.bytes_after) / 1e6
        lines = [
            f"pruned {len(self.runs)} runs, {self.runs[0]} to {self.runs[-1]}: {self.answers} answers, {freed:.1f} MB "
            f"freed, {self.bytes_after / 1e6:.1f} MB left; every figure stays"
        ]
        if self.kept:
            lines.append(f"kept {self.kept} answers of theirs that newer runs have reused")
        return lines

    def to_json(self) -> str:
        """One JSON object."""
        return exact_json({name: getattr(self, name) for name in self.__dataclass_fields__})


def prune(job: Job, before: datetime, *, adopt: bool = False) -> Pruned:
    """Drop the answers of the finished runs that ended before a moment. The caller holds the ledger's lock.

    Raises:
        JobError: the job has no ledger.
        StorageError: it cannot be read or written; what was not dropped yet stays.
    """
    if not job.ledger_path.exists():
        raise JobError(f"there is nothing to prune: no run of this job is in {job.ledger_path}")
    with closing(PrunableLedger.open(job.ledger_path, job_name=job.name, job_path=job.path, adopt=adopt)) as ledger:
        size = ledger.size()
        runs = ledger.prunable(round(before.timestamp() * 1e6))
        dropped, kept = ledger.prune(runs)
        ledger.compact()
        pruned = [run.run_id for run in runs if run.run in dropped]
        return Pruned(pruned, sum(dropped.values()), kept, size, ledger.size())
