"""Looks at answers: whether they have the form that is wanted, and what is asked again where they have not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from batchrun.kept import read_kept
from batchrun.ledger_view import LedgerView, Run, StoredAnswer
from batchrun.records import Answer, Group, Request, Review, Slot
from batchrun.structure import Structure
from batchrun.template import Template

_ROWS_AT_ONCE = 1000


class RepairChanges(NamedTuple):
    """What is to be asked again by the job of now, and was not by that of before; or the other way round."""

    needless: list[Group]
    wanted: list[tuple[Group, int]]
    """With the how many-th repair it is."""
    unreused: list[Slot]
    """They have taken an answer that does not fit: they are to be asked themselves."""


class Reviews:
    """What a job thinks of answers.

    Args:
        structure: what is wanted of them; None for nothing.
        templates: by model.
        repair: how often a slot may be asked again.
    """

    def __init__(self, structure: Structure | None, templates: Mapping[str, Template], repair: int) -> None:
        self._structure = structure
        self._templates = templates
        self._repair = repair

    def review(self, request: Request, answer: Answer) -> Review:
        """Whether an answer has the form that is wanted, and what to ask if it has not."""
        error = self._misfit(answer)
        if error is None:
            return Review()
        if request.repair >= self._repair:
            return Review(fits=False)
        return Review(False, self._templates[request.slot.model].repaired(request, answer.text, error))

    def gone_on(self, ledger: LedgerView, run: Run, request: Request) -> Request:
        """The next repair of a slot. `request`: as it was asked first."""
        template = self._templates[request.slot.model]
        for attempt in ledger.standing(run, request.slot.row_index, request.slot.row_index + 1):
            if attempt.slot == request.slot and attempt.body is not None:
                answer = _read(attempt.body, streamed=bool(attempt.streamed))
                error = self._misfit(answer) or "it is not what was asked for"
                request = template.repaired(request, answer.text, error)
        return request

    def changes(self, ledger: LedgerView, run: Run, rows: int, *, all_rows: bool) -> RepairChanges:
        """How the repairs that a run wants differ from those that the job wants now.

        Args:
            rows: of the input.
            all_rows: every answer is looked at, not only those that are to be repaired.
        """
        wanted = ledger.repairs_wanted(run)
        changes = RepairChanges([], [], [])
        for slot, repair in wanted.items():
            (stored,) = (one for one in ledger.answers(run, slot.row_index, slot.row_index + 1) if one.slot == slot)
            if repair.repair > self._repair or self._fits(stored):
                changes.needless.append(repair.group)
        if self._structure is None or not all_rows:
            return changes
        for stored in self._left_to_repair(ledger, run, rows):
            if stored.is_reused:
                changes.unreused.append(stored.slot)
            elif stored.slot not in wanted:
                changes.wanted.append((stored.group, stored.answers))
        return changes

    def _left_to_repair(self, ledger: LedgerView, run: Run, rows: int) -> Iterator[StoredAnswer]:
        for start in range(0, rows, _ROWS_AT_ONCE):
            for stored in ledger.answers(run, start, start + _ROWS_AT_ONCE):
                if stored.answers <= self._repair and not self._fits(stored):
                    yield stored

    def latest(self, ledger: LedgerView, run: Run, number: int) -> list[bool]:
        """Whether the newest rows that are settled are well answered, oldest first; so many of them."""
        newest = ledger.latest_decided(run, number)
        return [body is not None and self._misfit(_read(body, streamed=streamed)) is None for body, streamed in newest]

    def _fits(self, stored: StoredAnswer) -> bool:
        return self._misfit(_read(stored.body, streamed=stored.streamed)) is None

    def _misfit(self, answer: Answer) -> str | None:
        """Why an answer does not have the form that is wanted; None if it has."""
        if self._structure is None:
            return None
        return self._structure.parse(answer.text, is_cut="truncated" in answer.flags).error


def _read(body: bytes, *, streamed: bool) -> Answer:
    answer = read_kept(body, streamed=streamed)
    return answer if isinstance(answer, Answer) else Answer(None, "unknown")
