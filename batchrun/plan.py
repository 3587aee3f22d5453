"""A job with everything that turns its rows into requests; nothing is sent and nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchrun import local
from batchrun.answers import result_schema
from batchrun.derive import Derivation, structure_of
from batchrun.errors import JobError
from batchrun.job import Job
from batchrun.ledger import Ledger
from batchrun.ledger_view import LedgerView, Run, SlotState
from batchrun.plain import plain_column, plain_rows
from batchrun.providers import Endpoint, resolve
from batchrun.rates import prompt_tokens
from batchrun.records import Asked, Request, RowFault, RowSlots, Slot, utc
from batchrun.remote import AnyPath
from batchrun.reviews import Reviews
from batchrun.sink import Destination, check_schema
from batchrun.source import Batch, Source
from batchrun.template import NotRenderedError, Template
from batchrun.uniqueness import UniqueValues
from batchrun.written import part_name

_STATES_AT_ONCE = 10_000


class Plan:
    """What a job asks for, and where its answers will stand.

    Attributes:
        slots: those of each row; models as requests call them: a GGUF file by its name, not its path.
        weights: of the embedded server, if the job uses it and it is to be started.
        reviews: what the job thinks of answers.
        unbounded_row: the first row whose request sets no bound on its answer; known once all rows were read.
        outside_row: the first row whose request has the model read something that it does not hold.

    Raises:
        JobError: whatever keeps the job from being run.
    """

    def __init__(
        self,
        job: Job,
        endpoint: Endpoint,
        models: Sequence[str],
        weights: local.Weights | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self.job = job
        self.endpoint = endpoint
        self.slots = RowSlots(tuple(models), job.samples)
        self.weights = weights
        self.unbounded_row: int | None = None
        self.outside_row: int | None = None
        self.source = Source(job, known)
        asked_for = structure_of(job.asked_as)
        self.templates = [Template(job, self.source.columns, endpoint, model, asked_for) for model in models]
        self.result_schema = result_schema(
            streamed=job.stream, sampled=job.samples > 1, reuses=job.reuse, prefix=job.output.prefix
        )
        templates = dict(zip(models, self.templates, strict=True))
        self.reviews = Reviews(structure_of(job), templates, job.repair)
        derived = self.derivation().schema
        self._refuse_collisions(derived)
        self._judged = [job.evaluate.expected, *job.evaluate.by] if job.evaluate is not None else []
        self.schema = pa.schema([*self.source.schema, *self.result_schema, *derived])
        check_schema(self.schema)

    @classmethod
    def to_run(cls, job: Job, environ: Mapping[str, str], known: Mapping[str, Any] | None = None) -> Plan:
        """The plan of a job whose requests will be sent: its key and its model must be there.

        Args:
            known: the input that the answers were placed by last, if there are any.
        """
        endpoint = resolve(**job.provider.model_dump(), environ=environ)
        if endpoint.name != "local":
            return cls(job, endpoint, job.models, None, known)
        (model,) = job.models
        weights = local.find_weights(model, job.resolve(model))
        return cls(job, replace(endpoint, identity=weights.identity), [weights.name], weights, known)

    @classmethod
    def to_read(cls, job: Job, identity: str) -> Plan:
        """The plan of a job that sends nothing. `identity`: of the endpoint that its answers come from."""
        endpoint = replace(resolve(**job.provider.model_dump(), environ=None), identity=identity)
        is_file = endpoint.name == "local" and job.models != [local.DEFAULT_MODEL]
        return cls(job, endpoint, [Path(model).stem if is_file else model for model in job.models])

    def again(self) -> Plan:
        """The same job over its input as it is now."""
        return Plan(self.job, self.endpoint, self.slots.models, self.weights)

    @property
    def requested(self) -> dict[str, str]:
        """What the job calls each model."""
        return dict(zip(self.slots.models, self.job.models, strict=True))

    @property
    def shape(self) -> str:
        """A digest of what the requests are made by, apart from the rows."""
        shape: list[Any] = [self.job.request_shape(), self.endpoint.identity, self.endpoint.system, self.slots]
        if self.job.tokens_per_minute is not None:
            shape.append(self.job.tokens_per_minute)  # by which rows are refused
        return blake2b(repr(shape).encode(), digest_size=16).hexdigest()

    @property
    def columns(self) -> list[str]:
        """The columns that a prompt needs."""
        return self.templates[0].columns

    def derivation(self) -> Derivation:
        """What makes columns of the answers, for one writing of the output."""
        return Derivation(self.job, self.slots, self.source.schema)

    def is_placed_as(self, placed: Mapping[str, Any] | None) -> bool:
        """True if the files of the input are those that a run's answers were placed by. `placed`: the run's own."""
        return placed is not None and self.source.fingerprint() == placed["files"]

    def output_path(self, run: Run) -> AnyPath:
        """Where a run's output goes; `{date}` is the day on which the run began."""
        started = utc(run.started_at)
        path = self.job.place_of(self.job.output.path.format(run_id=run.run_id, date=started.strftime("%Y-%m-%d")))
        return self.refuse_own(path, "output")

    def destination(self, run: Run, *, adopts: bool) -> Destination:
        """Where a run's output goes, and how. `adopts`: this job was another one, whose output may stand there."""
        part_mb = self.job.output.part_mb
        return Destination(
            self.output_path(run),
            replaces=None if adopts else self.job.name,
            part_bytes=part_mb * 1_000_000 if part_mb is not None else None,
            label={"job": self.job.name, "run_id": run.run_id},
        )

    def refuse_own(self, path: AnyPath, where: str) -> AnyPath:
        """A path that is to be written to, if nothing of the job stands there. `where`: what names it.

        Raises:
            JobError: it is the input, the ledger or the job file.
        """
        taken: dict[AnyPath, str] = {
            **dict.fromkeys(self.source.paths, "the input"),
            _real(self.job.ledger_path): "the ledger",
            _real(self.job.path): "the job file",
        }
        real = _real(path)
        if any(file.parent == real for file in self.source.paths) and self.job.output.part_mb is not None:
            raise JobError(f"{where}: the folder {path} holds the input too: name another folder")
        is_read = self.source.would_read(path / part_name(0) if self.job.output.part_mb is not None else path)
        if (other := taken.get(real)) is not None or is_read:
            raise JobError(f"{where}: {path} is {other or 'part of the input'} too: name another file")
        return path

    def requests(self) -> Iterator[Request | RowFault]:
        """Every slot of the input, in order, one at a time.

        Raises:
            JobError: the column `input.id` holds a value twice.
        """
        for batch in self._checked_batches():
            yield from self._requests_of(batch, keyed=False)

    def asked(self, *, keyed: bool) -> Iterator[Asked]:
        """What the input asks for, batch by batch, in order.

        Args:
            keyed: False leaves the keys out: only whether there are requests is of interest.

        Raises:
            JobError: the column `input.id` holds a value twice.
        """
        for batch in self._checked_batches():
            if not keyed and self._is_alike(batch):
                yield Asked(batch.rows.num_rows)
            else:
                yield self._looked_at(batch, keyed=keyed)

    def _checked_batches(self) -> Iterator[Batch]:
        unique = UniqueValues()
        # All columns are read: one that cannot be must be found before anything is paid for.
        for batch in self.source.batches():
            if self.job.input.id is not None:
                self._refuse_twice(batch, self.job.input.id, unique)
            for name in self._judged:
                plain_column(batch.rows.column(name), name, batch.start)
            yield batch

    def _is_alike(self, batch: Batch) -> bool:
        """True if each of the rows gives a request as surely as the first."""
        if self.job.tokens_per_minute is not None or not self.templates[0].never_fails(batch.rows):
            return False
        return not self._looked_at(Batch(batch.start, batch.rows.slice(0, 1)), keyed=False).faults

    def _looked_at(self, batch: Batch, *, keyed: bool) -> Asked:
        """What rows ask for, one by one."""
        keys, faults = [], []
        for request in self._requests_of(batch, keyed=keyed):
            if isinstance(request, RowFault):
                faults.append(request)
            if keyed and request.key is not None:
                keys.append((request.slot, request.key))
        return Asked(batch.rows.num_rows, keys, faults)

    def _requests_of(self, batch: Batch, *, keyed: bool) -> Iterator[Request | RowFault]:
        for row_index, row in enumerate(_plain_rows(batch, self.columns), batch.start):
            for request in self._requests(row_index, row, keyed=keyed):
                if isinstance(request, Request):
                    self._note_bounds(request)
                yield request

    def _refuse_twice(self, batch: Batch, name: str, unique: UniqueValues) -> None:
        for row_index, row in enumerate(_plain_rows(batch, [name]), batch.start):
            earlier = unique.add(row_index, row[name])
            if earlier is not None:
                raise JobError(
                    f"input.id: the value {row[name]!r} of the column {name!r} stands twice: in the rows "
                    f"{earlier + 1} and {row_index + 1} of {self.source.file_names}"
                )

    def _note_bounds(self, request: Request) -> None:
        if request.most_completion_tokens is None and self.unbounded_row is None:
            self.unbounded_row = request.slot.row_index
        if not request.is_self_contained and self.outside_row is None:
            self.outside_row = request.slot.row_index

    def pending(
        self, ledger: LedgerView, run: Run, rows: int, *, retry_failed: bool, only: Container[int] | None = None
    ) -> Iterator[Request]:
        """The slots that the ledger lacks an answer to, in order; of the rows in `only`, if it is given."""
        for start, stop in ledger.unsettled(run, self.slots, rows, retry_failed=retry_failed):
            self.source.refuse_change()
            for batch in self.source.batches(self.columns, start, stop):
                if self.source.is_remote:  # nothing holds a file in a store as it was when it was opened
                    self.source.refuse_change()
                wanted = self._wanted(ledger, run, batch.start, batch.start + batch.rows.num_rows, retry_failed, only)
                if not wanted:
                    continue
                row_indices = {slot.row_index for slot in wanted}
                for row_index, row in enumerate(_plain_rows(batch, self.columns), batch.start):
                    for request in self._requests(row_index, row) if row_index in row_indices else ():
                        if isinstance(request, Request) and (slot := request.slot) in wanted:
                            state = wanted[slot]
                            yield request if state is None else self._gone_on(ledger, run, request, state)

    def _gone_on(self, ledger: LedgerView, run: Run, request: Request, state: SlotState) -> Request:
        """The next request of a slot that has been asked before, or could not be."""
        if not state.tries:
            return request
        request = request._replace(tries=state.tries)
        if state.repair is None:
            return request
        again = self.reviews.gone_on(ledger, run, request._replace(home=state.home))
        # An earlier answer may be lost; what was asked is not asked again under its number.
        return again._replace(repair=state.repair)

    def pending_rows(self, ledger: LedgerView, run: Run, rows: int, *, retry_failed: bool) -> Iterator[int]:
        """The rows that `pending` would ask, without reading them."""
        for first, last in ledger.unsettled(run, self.slots, rows, retry_failed=retry_failed):
            for start in range(first, last, _STATES_AT_ONCE):
                wanted = self._wanted(ledger, run, start, min(last, start + _STATES_AT_ONCE), retry_failed)
                yield from dict.fromkeys(slot.row_index for slot in wanted)

    def _wanted(
        self,
        ledger: LedgerView,
        run: Run,
        start: int,
        stop: int,
        retry_failed: bool,
        only: Container[int] | None = None,
    ) -> dict[Slot, SlotState | None]:
        """The slots of rows `start` ≤ index < `stop` that are to be asked, with what is known of each."""
        states = ledger.states(run, start, stop)
        wanted: dict[Slot, SlotState | None] = {}
        for row_index in range(start, stop):
            if only is None or row_index in only:
                for slot in self.slots.of(row_index):
                    state = states.get(slot)
                    if _is_wanted(state, retry_failed):
                        wanted[slot] = state
        return wanted

    def _requests(self, row_index: int, row: Mapping[str, Any], *, keyed: bool = True) -> Iterator[Request | RowFault]:
        """What each slot of a row asks for, in the order of `RowSlots.of`."""
        for template in self.templates:
            request = self._request(template, row_index, row, keyed=keyed)
            yield request
            for sample in range(1, self.slots.samples):
                slot = request.slot._replace(sample=sample)
                yield request._replace(slot=slot) if isinstance(request, Request) else replace(request, slot=slot)

    def _request(
        self, template: Template, row_index: int, row: Mapping[str, Any], *, keyed: bool
    ) -> Request | RowFault:
        try:
            request = template.request(row_index, row, keyed=keyed)
        except NotRenderedError as exc:
            return RowFault(Slot(row_index, template.model), str(exc))
        most = self.job.tokens_per_minute
        if most is not None and (tokens := prompt_tokens(request)) > most:
            error = f"the prompt has about {tokens} tokens, and tokens_per_minute lets {most} through"
            return RowFault(request.slot, error, request.key)
        return request

    def _refuse_collisions(self, derived: pa.Schema) -> None:
        if twice := [name for name in derived.names if name in self.result_schema.names]:
            raise JobError(
                f"the answers give columns named like results ({', '.join(twice)}): "
                "set output: {path: …, answer_prefix: answer_}"
            )
        doubled = [name for name in (*self.result_schema.names, *derived.names) if name in self.source.schema.names]
        if not doubled:
            return
        mend = "set output: {path: …, prefix: answer_}"
        if self.source.is_own_output:
            mend += f", or drop them by input: {{columns: {{{doubled[0]}: null, …}}}}"
        raise JobError(f"the input has columns named like results ({', '.join(doubled)}): {mend}")


def _real(path: AnyPath) -> AnyPath:
    """Where links lead; unlike `Path.resolve`, also for those that lead round in a circle."""
    return Path(os.path.realpath(path)) if isinstance(path, Path) else path


def _is_wanted(state: SlotState | None, retry_failed: bool) -> bool:
    if state is None:
        return True
    if state.repair is not None:
        return True
    if state.is_answered or state.is_reused:
        return False
    return not state.is_failed or bool(retry_failed and state.tries)


def _plain_rows(batch: Batch, columns: list[str]) -> list[dict[str, Any]]:
    """Rows as a template sees them."""
    return plain_rows(batch.rows.select(list(dict.fromkeys(columns))), batch.start)


def place(plan: Plan, ledger: Ledger, run: Run) -> int:
    """Make the ledger's answers stand in the rows that ask for them now; return the number of rows.

    The input is read once from end to end, unless nothing that matters has changed since the last time.

    Raises:
        JobError: the input is not as it should be.
    """
    found = {"files": plan.source.seen, "shape": plan.shape}
    placed = ledger.placed_input(run)
    # A run that has sent nothing is read anew: there is nothing to save, and the warnings must be seen again.
    if (
        placed is not None
        and not run.is_new
        and {name: placed.get(name) for name in found} == found
        and "bounds" in placed
    ):
        plan.unbounded_row, plan.outside_row = placed["bounds"]
        ledger.keep_input(run)
        return int(placed["rows"])

    def known() -> dict[str, Any]:
        bounds = [plan.unbounded_row, plan.outside_row]
        return {**found, "slots_per_row": plan.slots.number, "bounds": bounds, **plan.source.knowledge()}

    reuses = plan.job.reuse
    return ledger.place(run, plan.asked(keyed=ledger.has_answers() or reuses), known, reuses=reuses)
