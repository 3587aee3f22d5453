"""A commented job file to start from, written for a data file."""

from __future__ import annotations

import itertools
import json
import os
from keyword import iskeyword
from pathlib import Path

import pyarrow as pa

from batchrun.answers import result_schema
from batchrun.errors import JobError, StorageError
from batchrun.job import Job
from batchrun.source import Source
from batchrun.written import manifest_of

_TEMPLATE = """\
# yaml-language-server: $schema=job.schema.json
# Editors complete and check this file after: batchrun schema > job.schema.json
# Paths are relative to this file. Try it with: batchrun check {name}

{input}

# Jinja2 over the columns: {columns}
prompt:
  system: You answer briefly.
  user: |
{user}

# A small model on this very machine, which needs no key. For AI/ML API instead, with AIML_API_KEY set:
#   provider: aimlapi
#   model: anthropic/claude-sonnet-4
provider: local
model: smollm2-135m

# Sent as they stand.
parameters: {{max_tokens: 64, temperature: 0}}

# The most requests in flight.
concurrency: 4

output: {output}
"""


def write_starter(data: Path, path: Path) -> Path:
    """Write a job file for `data` at `path`; an existing file is never overwritten.

    Raises:
        JobError: the data cannot be read, or the file is there already.
    """
    relative = os.path.relpath(data, path.parent)
    source = Source(_probe(data, path))
    kept = source.columns
    if source.is_own_output:
        told = (manifest_of(data) or {}).get("columns", {})
        own = told.get("own") or result_schema(streamed=True).names
        kept = [name for name in source.columns if name not in own]
        if not kept:
            raise JobError(f"{data}: has no columns but batchrun's own results")
        # The result columns of that job would stand in the way of this one's.
        response = f"{told.get('prefix', '')}response"
        renamed: dict[str, str] = {}
        for name in dict.fromkeys((response, *told.get("answers", []))):
            if name in source.columns:
                renamed[name] = _free(f"earlier_{name}", {*kept, *renamed.values()})
        dropped = [name for name in source.columns if name not in (*kept, *renamed)]
        pairs = ", ".join([
            *(f"{_text(name)}: {{name: {_text(new)}}}" for name, new in renamed.items()),
            *(f"{_text(name)}: null" for name in dropped),
        ])  # fmt: skip
        reading = (
            "# Written by batchrun: its own result columns are dropped or renamed.\n"
            f"input:\n  path: {_text(relative)}\n  columns: {{{pairs}}}"
        )
        columns = [*kept, *renamed.values()]
    else:
        reading, columns = f"input: {_text(relative)}", kept
    text = _TEMPLATE.format(
        name=_shown(path.name),
        input=reading,
        columns=", ".join(map(_shown, columns)),
        user=_user_lines(source, kept),
        output=_text(f"outputs/{path.stem}.parquet"),
    )
    try:
        with path.open("x", encoding="utf-8") as fp:
            fp.write(text)
    except FileExistsError:
        raise JobError(f"{path} is there already: name another with --output") from None
    except OSError as exc:
        raise StorageError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    return path


def _free(name: str, taken: set[str]) -> str:
    """The name, or with a number what is not taken yet."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _probe(data: Path, path: Path) -> Job:
    try:
        str(data).encode()
    except UnicodeEncodeError:
        raise JobError(f"the name {str(data)!r} cannot be written into a job file: rename it") from None
    job = Job.model_validate({"input": str(data.absolute()), "provider": "local", "model": "m", "output": "o.parquet"})
    job._path = path.absolute()
    return job


def _user_lines(source: Source, columns: list[str]) -> str:
    """The column with the longest texts, or all of them if none is text."""
    lengths = {name: 0 for name in columns if _is_text(source.schema.field(name).type)}
    has_null: set[str] = set()
    for batch in source.batches():
        for name in columns:
            values = batch.rows.column(name)
            has_null |= {name} if values.null_count else set()
            if name in lengths:
                lengths[name] = sum(len(value or "") for value in values.to_pylist())
        break
    chosen = [max(lengths, key=lambda name: lengths[name])] if lengths else columns
    lines = []
    for name in chosen:
        shown = f"{_reference(name)} or ''" if name in has_null else _reference(name)
        label = name if name.isprintable() and "{" not in name else "Text"
        lines.append(f"    {label}: {{{{ {shown} }}}}")
    return "\n".join(lines)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


_JINJAS_OWN = {"none", "true", "false", "self", "loop", "caller", "varargs", "kwargs"}


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _reference(name: str) -> str:
    is_plain = name.isidentifier() and name.isascii() and not iskeyword(name)
    return name if is_plain and name.lower() not in _JINJAS_OWN else f"row[{name!r}]"


def _text(value: str) -> str:
    """A YAML scalar."""
    plain = value[:1] not in ("", "-") and all(character.isalnum() or character in "/._-" for character in value)
    if plain:
        return value
    # JSON is YAML, and has an escape for every line end that there is.
    return "'" + value.replace("'", "''") + "'" if value.isprintable() else json.dumps(value)
