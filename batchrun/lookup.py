"""What rows of a run were asked, and what they were answered: from its ledger, and its input while that is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from batchrun.errors import BatchrunError, JobError
from batchrun.job import Job
from batchrun.kept import read_kept
from batchrun.ledger_view import LedgerView, Run
from batchrun.plain import plain_rows
from batchrun.plan import Plan
from batchrun.records import Answer
from batchrun.stored import Unpacker, UnpackError
from batchrun.template import NotRenderedError


class Lookup:
    """The rows of one run.

    Attributes:
        why_no_prompts: why prompts cannot be told; None if they can.
    """

    def __init__(self, ledger: LedgerView, run: Run) -> None:
        self._ledger = ledger
        self._plan: Plan | None = None
        self.why_no_prompts: str | None = None
        try:
            self._plan = self._plan_of(run)
        except (BatchrunError, ValidationError) as exc:
            self.why_no_prompts = str(exc)

    def _plan_of(self, run: Run) -> Plan:
        known, placed = self._ledger.last_snapshot(run), self._ledger.placed_input(run)
        if known is None or placed is None:
            raise JobError("the run has not got as far as its input")
        ((job_path,),) = self._ledger.rows("SELECT job_path FROM owner")
        path = Path(os.path.normpath(Path(os.path.realpath(self._ledger.path)).parent / job_path))
        job = Job.of_record(known.job, path)
        plan = Plan.to_read(job.with_shape_of(known.job), known.endpoint)
        if not plan.is_placed_as(placed):
            raise JobError("the input has changed since")
        return plan

    def slots(self, row_index: int) -> list[tuple[str, int]]:
        """Models and samples that a row is asked for, as far as that can be told."""
        return [(slot.model, slot.sample) for slot in self._plan.slots.of(row_index)] if self._plan is not None else []

    def prompt(self, row_index: int, model: str) -> list[dict[str, Any]] | None:
        """The messages of a row (counted from 0) to a model; None if they cannot be told."""
        if self._plan is None or model not in self._plan.slots.models:
            return None
        template = self._plan.templates[self._plan.slots.models.index(model)]
        for batch in self._plan.source.batches(self._plan.columns, row_index, row_index + 1):
            try:
                return template.messages(plain_rows(batch.rows.select(self._plan.columns), batch.start)[0])
            except NotRenderedError:
                return None
        return None

    def place(self, attempt_id: int) -> int | None:
        """The row, counted from 0, that an attempt stands in now; None if the input has it no more."""
        rows = self._ledger.rows(
            "SELECT CASE WHEN moved.run IS NULL THEN row_index ELSE to_row END FROM attempt "
            "LEFT JOIN moved USING (run, row_index, model, sample, key) WHERE attempt_id = ?",
            (attempt_id,),
        )
        return rows[0][0] if rows else None

    def is_pruned(self, attempt_id: int) -> bool:
        """True if the answer of an attempt was dropped."""
        found = self._ledger.rows("SELECT 1 FROM answer WHERE attempt_id = ? AND digest IS NOT NULL", (attempt_id,))
        return bool(found)

    def answer(self, attempt_id: int) -> Answer | None:
        """What an attempt was answered; None without an answer, or where it was pruned or damaged."""
        rows = self._ledger.rows(
            "SELECT body, streamed FROM answer JOIN attempt USING (attempt_id) WHERE attempt_id = ? AND outcome = 'ok' "
            "AND digest IS NULL",
            (attempt_id,),
        )
        if not rows:
            return None
        body, streamed = rows[0]
        try:
            raw = Unpacker().unpack(body)
        except UnpackError:
            return None
        found = read_kept(raw, streamed=bool(streamed))
        return found if isinstance(found, Answer) else None


def prompt_text(messages: list[dict[str, Any]]) -> str:
    """Messages as a person reads them."""
    parts = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(
                str(part.get("text", f"[{part.get('type')}]")) if isinstance(part, dict) else str(part)
                for part in content
            )
        parts.append(f"{message.get('role')}: {content}")
    return "\n".join(parts)
