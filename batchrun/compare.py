"""Two runs side by side, from their outputs or from the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from batchrun.comparison import Compared, Comparison
from batchrun.delivery import expected_batches, results_of
from batchrun.derive import columns_of
from batchrun.errors import JobError, StorageError
from batchrun.intervals import require
from batchrun.ledger_view import LedgerView
from batchrun.loading import load_job
from batchrun.money import exact_json
from batchrun.plain import plain_column
from batchrun.plan import Plan
from batchrun.remote import AnyPath, RemotePath, check_url, is_url
from batchrun.spill import Spill
from batchrun.stores import NoStoreError
from batchrun.written import Written


class _Row(NamedTuple):
    """What of a row is compared."""

    key: tuple[Any, ...]
    expected: Any
    answered: Any
    is_ok: bool
    usd: float | None
    latency: float | None


@dataclass(frozen=True)
class _Side:
    """One of the runs, open for reading."""

    title: str
    names: Mapping[str, Any]
    """`columns_of` the job."""
    models: list[str]
    batches: Iterator[pa.RecordBatch]

    def rows(self, names: Mapping[str, Any], *, by_model: bool) -> Iterator[_Row]:
        """Its rows, in order.

        Args:
            names: where expected value and id stand, in both runs alike.
            by_model: the model is part of what tells a row.
        """
        prefix = self.names["prefix"]
        wanted = [f"{prefix}{name}" for name in ("requested_model", "status", "usd_spent", "latency_seconds")]
        number = -1
        for batch in self.batches:
            needed = [*wanted, *self.names["answers"], *([names["id"]] if names["id"] is not None else [])]
            if left_out := [name for name in needed if name not in batch.schema.names]:
                raise JobError(f"{self.title}: has no column {left_out[0]!r}: compare an output that has all columns")
            columns = {name: batch.column(name).to_pylist() for name in wanted}
            samples = _column(batch, f"{prefix}sample")
            expected = _column(batch, names["expected"])
            ids = _column(batch, names["id"])
            answers = [_column(batch, name) for name in self.names["answers"]]
            for index, (model, status, usd, latency) in enumerate(zip(*columns.values(), strict=True)):
                # Rows of the input come one after the other, each with its models and samples.
                is_first = model == self.models[0] and not (samples[index] or 0)
                number += is_first
                place = ids[index] if names["id"] is not None else number
                key = (place, samples[index] or 0, *([model] if by_model else []))
                answered = [column[index] for column in answers] if status == "ok" else [None]
                said = answered[0] if len(answered) == 1 else dict(zip(self.names["answers"], answered, strict=True))
                yield _Row(key, expected[index], said, status == "ok", usd, latency)


def compare(first: str, second: str) -> Comparing:
    """Compare two runs.

    Args:
        first, second: a Parquet that batchrun wrote; a job file, for its newest run; or `JOB@RUN`, for one of its runs
            by id or the beginning of one.

    Raises:
        JobError: one of them is none of these, or they have no rows in common.
    """
    with _opened(first) as a, _opened(second) as b:
        names = {name: a.names[name] or b.names[name] for name in ("expected", "id")}
        metrics = a.names["metrics"] or b.names["metrics"] or ["exact_match"]
        require(metrics)
        by_model = len(a.models) > 1 and sorted(a.models) == sorted(b.models)
        if not by_model and max(len(a.models), len(b.models)) > 1:
            raise JobError("these runs have asked different lists of models: compare runs of one model each")
        held = Spill()
        for row in b.rows(names, by_model=by_model):
            if not held.put(row.key, row[1:]):
                raise JobError(f"{b.title}: {row.key[0]!r} stands twice in {names['id']!r}")
        comparison = Comparison(metrics)
        missing = compared = 0
        for row in a.rows(names, by_model=by_model):
            other = held.take(row.key)
            if other is None:
                missing += 1
                continue
            compared += 1
            expected, answered, is_ok, usd, latency = other
            place = row.key[0] if names["id"] is not None else row.key[0] + 1
            comparison.take(
                place, row.expected if row.expected is not None else expected, row.answered, answered,
                row.is_ok and is_ok, _exact(row.usd), _exact(usd), row.latency, latency,
            )  # fmt: skip
        if not compared:
            raise JobError(f"{a.title} and {b.title} have no rows in common")
        return Comparing(a.title, b.title, comparison.result(), missing, len(held), names["expected"] is not None)


@dataclass(frozen=True)
class Comparing:
    """Two runs, and what they differ in."""

    a: str
    b: str
    compared: Compared
    only_a: int
    only_b: int
    """Rows that one of them has alone."""
    has_expected: bool

    def lines(self) -> list[str]:
        """A short text."""
        lines = [f"A: {self.a}", f"B: {self.b}", *self.compared.lines()]
        if self.only_a or self.only_b:
            lines.append(f"not compared: {self.only_a} rows of A alone, {self.only_b} of B alone")
        if not self.has_expected:
            lines.append("no expected values: neither job has evaluate: {expected: …}")
        return lines

    def to_json(self) -> str:
        """One JSON object."""
        document = {"run_a": self.a, "run_b": self.b, **self.compared.document()}
        return exact_json({**document, "only_a": self.only_a, "only_b": self.only_b})


def _column(batch: pa.RecordBatch, name: str | None) -> list[Any]:
    index = batch.schema.get_field_index(name) if name is not None else -1
    return plain_column(batch.column(index), name or "", 0) if index >= 0 else [None] * batch.num_rows


def _exact(usd: float | None) -> Decimal | None:
    # The shortest text of the double is the exact amount.
    return Decimal(repr(usd)) if usd is not None else None


def _opened(name: str) -> AbstractContextManager[_Side]:
    path, _, run_id = name.partition("@")
    if is_url(name):
        try:
            check_url(name)
            place = RemotePath.of(name)
        except (ValueError, NoStoreError) as exc:
            raise JobError(str(exc)) from exc
        except OSError as exc:
            raise StorageError(f"{name}: {exc}") from exc
        return _of_output(place)
    is_output = name.endswith(".parquet") or Path(name).is_dir()
    return _of_output(Path(name)) if is_output else _of_ledger(Path(path), run_id)


@contextmanager
def _of_output(path: AnyPath) -> Iterator[_Side]:
    written = Written.at(path)
    if written is None or "columns" not in written.manifest:
        raise JobError(f"{path}: is no output that batchrun has written: name a Parquet, a job file or JOB@RUN")
    manifest = written.manifest
    models = manifest["model"] if isinstance(manifest["model"], list) else [manifest["model"]]
    try:
        yield _Side(f"run {manifest['run_id']} ({path})", manifest["columns"], models, written.batches(8192))
    except (OSError, pa.ArrowException) as exc:
        raise StorageError(f"{path} cannot be read: {exc}") from exc


@contextmanager
def _of_ledger(path: Path, run_id: str) -> Iterator[_Side]:
    job = load_job(path)
    if not job.ledger_path.exists():
        raise JobError(f"{path}: has no run yet: there is no {job.ledger_path}")
    ledger = LedgerView.read(job.ledger_path)
    try:
        run = ledger.run_named(run_id) if run_id else ledger.last_run()
        known = ledger.last_snapshot(run) if run is not None else None
        if run is None or known is None:
            runs = ", ".join(sorted(ledger.run_ids())[-5:])
            raise JobError(f"{path}: has no run {run_id!r}; its newest are {runs or 'none'}")
        ledger.refuse_pruned(run, "be compared any more but by the Parquet that it wrote")
        plan = Plan.to_read(job.with_shape_of(known.job), known.endpoint)
        placed = ledger.placed_input(run)
        if placed is None or not plan.is_placed_as(placed):
            raise JobError(
                f"{path}: the input has changed since run {run.run_id}, so its answers cannot be put beside their "
                "rows: compare the Parquet that it wrote"
            )
        derivation = plan.derivation()
        batches = expected_batches(plan, ledger, run, results_of(plan, run), derivation)
        yield _Side(f"run {run.run_id} ({path})", columns_of(plan.job), plan.job.models, batches)
    except pa.ArrowException as exc:
        raise StorageError(f"{path}: {exc}") from exc
    finally:
        ledger.close()
