"""A job file → a `Job`, or all of its faults at once, each with its line; and the JSON Schema of job files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from batchrun.errors import JobError
from batchrun.job import Job, leading_folder, ledger_beside
from batchrun.jobfile import Document
from batchrun.overrides import applied
from batchrun.remote import is_url
from batchrun.settings import (
    BudgetSetting,
    EngineSetting,
    EvaluateSetting,
    FinishSetting,
    InputSetting,
    OutputSetting,
    PricesSetting,
    PromptSetting,
    ProviderSetting,
    RetrySetting,
    plain_numbers,
    shown_value,
)

_MOST_BYTES = 2_000_000
_MOST_FAULTS = 20
_LONGEST_FAULT = 1000


def load_job(path: Path, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read and check a job file.

    Args:
        overrides: other values for some of its keys, such as `{"parameters.temperature": 0.2}`; paths in them are
            relative to the job file, too. The ledger stays where the file has it.

    Raises:
        JobError: every fault of the file at once, each with its line.
    """
    if path.suffix.lower() in (".csv", ".tsv", ".parquet", ".jsonl", ".gz") and path.exists():
        raise JobError(f"{path} is data, not a job: `batchrun init {path}` writes a job for it")
    try:
        str(path).encode()
        if path.exists() and not path.is_file():
            raise JobError(f"{path}: a job is a file")
        if path.stat().st_size > _MOST_BYTES:
            raise JobError(f"{path}: longer than {_MOST_BYTES} bytes: put data into the input")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such job file") from None
    except (OSError, UnicodeError) as exc:
        raise JobError(f"{str(path)!r}: cannot be read: {exc}") from exc
    try:
        document = Document(text)
    except JobError as exc:
        raise JobError(f"{path}: {exc}") from exc
    if not isinstance(document.value, dict):
        raise JobError(f"{path}: a job is a mapping of keys, such as `input: data.csv`")
    faults = list(document.faults)  # each begins with its line, if it has one
    job: Job | None = None
    overrides = overrides or {}
    try:
        job = Job.model_validate(applied(document.value, overrides))
    except ValidationError as exc:
        faults += list(dict.fromkeys(_fault(document, overrides, error) for error in exc.errors(include_url=False)))
    if faults or job is None:
        shown = [f"  {fault[:_LONGEST_FAULT]}" for fault in sorted(faults, key=_line_of)[:_MOST_FAULTS]]
        more = [f"  … and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise JobError("\n".join([f"{path}: the job is wrong:", *shown, *more]))
    # The folder itself, not a link to it: `..` must lead to the same ledger from everywhere.
    written = _written_output(document)
    job = job.in_file(path.parent.resolve() / path.name, written, overrides)
    if job.ledger is None and is_url(written or job.output.path):
        raise JobError(
            f"{path}: output: {written or job.output.path} is not on this machine, and the ledger has to be: set "
            f"ledger: {job.name}.ledger.sqlite"
        )
    changed: dict[str, Any] = {}
    if isinstance(job.schema_, str):
        changed["schema_"] = _read_schema(job, job.schema_)
    if any(str(key).split(".")[0] == "output" for key in overrides):
        if written is None:
            raise JobError(f"{path}: output: the job file needs one of its own, which says where the ledger is")
        changed["ledger"] = job.ledger or ledger_beside(written, job.name)
    job = job.in_file(job.path, written, overrides, **changed)
    if document.value.get("ledger") is None:
        _refuse_in_dataset(job, written or job.output.path)
    return job


def _written_output(document: Document) -> str | None:
    output = document.value.get("output")
    written = output.get("path") if isinstance(output, dict) else output
    return written if isinstance(written, str) else None


def _refuse_in_dataset(job: Job, output: str) -> None:
    """An earlier version had the ledger in the dataset; it is never begun anew elsewhere."""
    folder, is_dataset = leading_folder(output)
    old = job.resolve(str(folder)) / f"{job.name}.ledger.sqlite"
    if is_dataset and old != job.ledger_path and old.exists() and not job.ledger_path.exists():
        raise JobError(
            f"the ledger {old} is among the data, which readers of the dataset stumble over: move it (with its -wal, "
            f"if there is one) to {job.ledger_path}, or set ledger: {folder / old.name}"
        )


def _read_schema(job: Job, name: str) -> dict[str, Any]:
    path = job.resolve(name)
    try:
        document = Document(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeError) as exc:
        raise JobError(f"schema: {path}: cannot be read: {exc}") from exc
    except JobError as exc:
        raise JobError(f"schema: {path}: {exc}") from exc
    if document.faults or not isinstance(document.value, dict):
        raise JobError(
            f"schema: {path}: is no JSON Schema: it should be an object {'; '.join(document.faults)}".rstrip()
        )
    schema = plain_numbers(document.value)
    assert isinstance(schema, dict)
    return schema


_MODELS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Job,
    ("input",): InputSetting,
    ("prompt",): PromptSetting,
    ("provider",): ProviderSetting,
    ("retry",): RetrySetting,
    ("prices",): PricesSetting,
    ("budget",): BudgetSetting,
    ("output",): OutputSetting,
    ("evaluate",): EvaluateSetting,
    ("engine",): EngineSetting,
    ("on_finish",): FinishSetting,
}


def _fault(document: Document, overrides: Mapping[str, Any], error: Any) -> str:
    path = error["loc"]
    line = document.line(path)
    where = f"line {line}: " if line is not None and path else ""
    named = [str(part) for part in path]
    if any(named[: len(parts)] == parts for key in overrides if (parts := str(key).split("."))):
        where = "set by this call: "
    name = ".".join(str(part)[:100] for part in path) or "the job"
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            model = _MODELS.get(tuple(str(part) for part in path[:-1]))
            names = [field.alias or key for key, field in (model.model_fields.items() if model else ())]
            near = difflib.get_close_matches(str(path[-1]), names, 1)
            mend = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(names)}"
            return f"{where}{name}: there is no such key: {mend}"
        case "missing":
            return f"{where}{name}: is missing"
        case "value_error":
            return f"{where}{name}: {error['ctx']['error']}"
        case _ if path[:2] == ("input", "columns"):
            return (
                f"{where}input.columns: should be a list of names, or a map of names to types (is {shown_value(value)})"
            )
        case "model_type" | "model_attributes_type":
            forms = (
                "a mapping" if name in ("retry", "prices", "budget", "evaluate", "on_finish") else "text or a mapping"
            )
            return f"{where}{name}: should be {forms} (is {shown_value(value)})"
        case _:
            said = error["msg"].replace("Input should be", "should be").replace("String should", "should")
            return f"{where}{name}: {said} (is {shown_value(value)})"


def _line_of(fault: str) -> int:
    match = re.match(r"line (\d+):", fault)
    return int(match[1]) if match else 0


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, for editors."""
    schema = Job.model_json_schema(by_alias=True)
    for name in ("input", "prompt", "provider", "engine", "output"):
        reference = schema["properties"][name]
        description = reference.pop("description", None)
        reference.pop("default", None)
        forms = reference.pop("anyOf", None) or [dict(reference)]
        reference.clear()
        reference["anyOf"] = [{"type": "string"}, *(form for form in forms if form.get("type") != "null")]
        if description:
            reference["description"] = description
    schema["properties"]["on_finish"]["anyOf"].insert(0, {"type": "array", "items": {"type": "string"}, "minItems": 1})
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "batchrun job"
    return schema
