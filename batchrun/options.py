"""What one call of a job wants."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from math import inf

from batchrun.errors import JobError
from batchrun.moments import duration_of


@dataclass(frozen=True)
class Overlap:
    """What to do while another process works on the job."""

    is_skipped: bool = False
    """End at once, and well."""
    wait_seconds: float = 0.0
    """Wait so long for it; 0: fail."""

    @classmethod
    def of(cls, text: str) -> Overlap:
        """From fail, skip, wait, or wait=SECONDS, where the seconds may be a duration such as 10m.

        Raises:
            JobError: it is none of these.
        """
        policy, sign, value = text.partition("=")
        if policy == "wait" and sign:
            lasting = duration_of(value)
            with suppress(ValueError):
                seconds = lasting.total_seconds() if lasting is not None else float(value)
                if seconds >= 0:
                    return cls(wait_seconds=seconds)
        elif text in ("fail", "skip", "wait"):
            return cls(text == "skip", inf if text == "wait" else 0.0)
        raise JobError(f"if-running {text!r}: should be fail, skip, wait, or wait=SECONDS, such as wait=10m")


@dataclass(frozen=True)
class Options:
    """What a call sets for its invocation.

    Raises:
        JobError: two of them exclude each other, or one has a value that it cannot have.
    """

    overlap: Overlap = Overlap()
    retry_failed: bool = False
    adopt_ledger: bool = False
    sample: int | None = None
    """Ask so many random rows only."""
    is_new: bool = False
    """Begin a new run; an unfinished one is abandoned."""
    max_age: timedelta | None = None
    """Likewise if the unfinished one began so long ago."""

    def __post_init__(self) -> None:
        for name in ("retry_failed", "adopt_ledger", "is_new"):
            if not isinstance(getattr(self, name), bool):
                raise JobError(f"{name}: should be True or False (is {getattr(self, name)!r})")
        if self.sample is not None and (not isinstance(self.sample, int) or self.sample < 1):
            raise JobError(f"sample: should be a number of rows, from 1 on (is {self.sample!r})")
        if self.max_age is not None and not isinstance(self.max_age, timedelta):
            raise JobError(f"max_age: should be a duration such as 24h, 90m or 7d (is {self.max_age!r})")
        if self.is_new and (self.retry_failed or self.max_age is not None):
            raise JobError(f"new begins a new run: leave out {'retry-failed' if self.retry_failed else 'max-age'}")
