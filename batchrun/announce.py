"""What an invocation says before it sends: which run it goes on with, what has changed, what is paid for again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchrun.ledger import Ledger
from batchrun.ledger_view import Run
from batchrun.money import usd_text
from batchrun.overrides import changes
from batchrun.plan import Plan
from batchrun.tables import shown

_LONGEST_VALUE = 60
_MOST_CHANGES = 10
_OF_THE_CALL = ("overrides", "ledger", "deadline", "on_finish")


@dataclass(frozen=True)
class Before:
    """The newest run that was placed before the invocation began: the one that goes on, or one earlier."""

    run: Run
    job: Mapping[str, Any]
    """`Job.record` of then."""
    shape: str
    """`Plan.shape` by which its answers were placed."""

    @classmethod
    def of(cls, ledger: Ledger) -> Before | None:
        """That of a ledger; None if there never was one."""
        found = ledger.last_placed()
        placed = ledger.placed_input(found[0]) if found is not None else None
        if found is None or placed is None:
            return None
        run, snapshot = found
        return cls(run, snapshot.job, str(placed.get("shape")))


def announce(
    plan: Plan,
    ledger: Ledger,
    current: Run,
    rows: int,
    before: Before | None,
    say: Callable[[str], None],
    *,
    is_sample: bool,
) -> int:
    """Say what goes on, what of the job has changed, and what will be paid for again.

    Args:
        rows: of the input; they were placed.

    Returns:
        How many slots are settled already.
    """
    ok, failed = ledger.counts(current)
    answered = ok
    if not current.is_new:
        of = rows * plan.slots.number
        say(f"going on with run {current.run_id}: {ok} of {of} rows are answered, {failed} failed")
    elif plan.job.reuse:
        if ok:
            say(f"{ok} rows are answered by earlier runs, for nothing")
        if pruned := ledger.pruned_answers(current):
            say(f"{pruned} rows were answered by runs that have been pruned: they will be asked and paid for again")
    elif not is_sample and (earlier := ledger.earlier_answers(current)) is not None:
        cost = f"about ${usd_text(round(earlier.usd, 6))}" if earlier.usd is not None else "at a cost not known"
        say(
            f"{earlier.slots} rows that run {earlier.run_id} answered will be asked and paid for again, "
            f"{cost}; `reuse: true` in the job would take them for nothing"
        )
        answered = earlier.slots
    if before is not None:
        is_same = before.run.run == current.run
        changed = _changed(before, plan)
        if is_same and changed:
            say(f"the job has changed since: {_listed(changed)}")
        if before.shape != plan.shape and any(key.split(".")[0] != "input" for key, _, _ in changed):
            unplaced = ledger.unplaced_answers(current) if is_same else ledger.counts(before.run)[0] - answered
            if unplaced > 0:
                say(
                    f"{unplaced} answers {'' if is_same else f'of run {before.run.run_id} '}are to other requests than "
                    "the job makes now; their rows will be asked and paid for again"
                )
    return ok + failed


def _changed(before: Before, plan: Plan) -> list[tuple[str, Any, Any]]:
    """Keys of the job with their values of then and now; not those that only say how it was called."""
    return [one for one in changes(before.job, plan.job.snapshot()) if one[0].split(".")[0] not in _OF_THE_CALL]


def _listed(changed: Sequence[tuple[str, Any, Any]]) -> str:
    found = [f"{key} {_value(old)} → {_value(new)}" for key, old, new in changed]
    more = [f"and {len(found) - _MOST_CHANGES} more"] if len(found) > _MOST_CHANGES else []
    return "; ".join([*found[:_MOST_CHANGES], *more])


def _value(value: Any) -> str:
    return "(not set)" if value is None else shown(json.dumps(value, ensure_ascii=False), _LONGEST_VALUE)
