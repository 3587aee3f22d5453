"""The job file as a frozen, validated `Job`.

Every relative path in it is relative to the job file, never to the working directory.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import string
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from batchrun.errors import JobError
from batchrun.jobfile import Document
from batchrun.providers import PROVIDERS, secret_in_plain_sight
from batchrun.scores import METRICS

_REFUSED_PARAMETERS = {
    "model": "the key `model` of the job",
    "messages": "the key `prompt`",
    "stream": "the key `stream` of the job",
    "stream_options": "`provider: {include_usage: …}`",
    "n": "the key `samples` of the job",
}
_MOST_BYTES = 2_000_000
_MOST_FAULTS = 20
_LONGEST_FAULT = 1000
_NOT_YET = "not yet supported"
_SHAPING = ("prompt", "model", "samples", "parameters", "provider", "reuse")
_WRITING = ("input", "stream", "output", "labels", "schema", "evaluate")
_DERIVING = ("labels", "schema", "repair", "evaluate")


class _Setting(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation if info.field_name else None
        kinds = get_args(kind) or (kind,)
        if isinstance(value, bool) and bool not in kinds and any(item in (int, float, Decimal) for item in kinds):
            raise ValueError(f"should be a number (is {str(value).lower()})")
        return value


class ColumnSetting(_Setting):
    """What becomes of one input column."""

    name: str | None = Field(None, min_length=1, description="Its new name.")
    type: str | None = Field(None, description="Its new type: string, int64, float64, bool, date, timestamp.")


class InputSetting(_Setting):
    """Where the rows come from."""

    path: str = Field(min_length=1, description="A path or glob of .csv, .tsv, .parquet or .jsonl files, also .gz.")
    id: str | None = Field(None, description="A column whose values are unique; it names rows in messages.")
    columns: list[str] | dict[str, str | ColumnSetting | None] | None = Field(
        None,
        description="A list selects columns; a map casts them (`stars: int64`), renames them "
        "(`stars: {name: rating}`) or drops them (`stars: null`) and leaves the others.",
    )
    limit: int | None = Field(None, ge=0, le=10**15, description="Read this many rows at most.")
    format: Literal["csv", "tsv", "parquet", "jsonl"] | None = Field(
        None, description="What the files are, where their names do not say it."
    )
    encoding: str = Field("utf-8", description="The encoding of CSV, TSV and JSONL files.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("path")
    @classmethod
    def _on_this_machine(cls, value: str) -> str:
        return _local_path(value)

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError:
            raise ValueError(f"{value!r} is no encoding that Python knows") from None
        return value


class PromptSetting(_Setting):
    """How a row becomes messages. Every text is a Jinja2 template over the row's columns."""

    system: str | None = Field(None, description="Template of the system prompt.")
    user: str | None = Field(None, description="Template of the user message.")
    messages: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="The whole conversation: {role, content} each."
    )
    messages_column: str | None = Field(
        None, description="A column that holds the conversation: a list of structs, or JSON text."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"user": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_form(self) -> PromptSetting:
        forms = [name for name in ("user", "messages", "messages_column") if getattr(self, name) is not None]
        if len(forms) != 1:
            found = " and ".join(forms) if forms else "none of them"
            raise ValueError(f"needs exactly one of user, messages and messages_column; it has {found}")
        if self.system is not None and self.user is None:
            raise ValueError("system stands beside user only; put it into messages")
        for message in self.messages or ():
            if not isinstance(message.get("role"), str) or not ("content" in message or "tool_calls" in message):
                raise ValueError("each of messages needs a role (text) and a content")
        return self


class ProviderSetting(_Setting):
    """Who answers."""

    name: str = Field(min_length=1, description=f"One of {', '.join(PROVIDERS)}; or any name, with a base_url.")
    base_url: str | None = Field(None, description="Address up to and including the version, such as https://host/v1.")
    api_key_env: str | None = Field(None, min_length=1, description="The environment variable that holds the key.")
    headers: dict[str, str] = Field(
        default_factory=dict, description="Further headers; ${VAR} is read from the environment."
    )
    system: Literal["message", "top_level"] | None = Field(
        None, description="Send the system prompt as a message of that role, or as the field `system`."
    )
    include_usage: bool | None = Field(None, description="Send stream_options.include_usage with streams.")
    response_format: Literal["json_schema", "bare", "json_object", "none"] | None = Field(
        None,
        description="How it takes the form of an answer (labels, schema): json_schema; bare (llama.cpp: of what is no "
        "object, too); json_object; none, so that the prompt says it.",
    )
    allow_insecure_http: bool = Field(False, description="Allow a key over plain HTTP to another machine.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> ProviderSetting:
        if self.name not in PROVIDERS and self.base_url is None:
            near = difflib.get_close_matches(self.name, PROVIDERS, 1)
            raise ValueError(
                f"{self.name!r} is not a known provider"
                + (f": did you mean {near[0]!r}?" if near else f" ({', '.join(PROVIDERS)})")
                + " Another one needs a base_url"
            )
        if self.name == "local" and self.base_url is not None:
            raise ValueError("local is the server that batchrun starts itself: it takes no base_url")
        for header, text in self.headers.items():
            if secret_in_plain_sight(header, text):
                raise ValueError(
                    f"the header {header!r} looks like a secret and is written out: "
                    "put it into an environment variable and write ${VARIABLE}"
                )
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", header) or re.search(r"[\r\n\0]", text):
                raise ValueError(f"{header!r} is no header that HTTP can carry")
        return self


class RetrySetting(_Setting):
    """Bounds of retrying, for each row."""

    max_attempts: int = Field(
        6, ge=1, le=1_000_000, description="Attempts a row may take; waits on rate limits are not counted."
    )
    max_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        900.0, description="Seconds from a row's first attempt after which it is not tried again."
    )


class PricesSetting(_Setting):
    """Dollars per million tokens, for a provider that reports no cost."""

    input_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
    output_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
    cache_read_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)] | None = None
    cache_write_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)] | None = None


class BudgetSetting(_Setting):
    """The most that may be spent: what was spent and what may still be on the bill, together."""

    usd: Annotated[Decimal, Field(ge=0, le=9_000_000, allow_inf_nan=False)] = Field(description="The cap, in dollars.")
    per: Literal["run", "day", "month"] = Field(
        "run", description="What the cap is for: a run with all its invocations, or a UTC day or month of all runs."
    )
    factor: Annotated[Decimal, Field(ge=1, le=1000, allow_inf_nan=False)] | None = Field(
        None,
        description="What the worst case of a request is multiplied by, for a provider that charges more than its "
        "prices say. Default: 1; 1.5 for prices of the bundled library until a cost was reported.",
    )


class EvaluateSetting(_Setting):
    """How the answers are compared with what was expected."""

    expected: str = Field(min_length=1, description="The column with the expected values.")
    answer: str | None = Field(
        None,
        min_length=1,
        description="What is compared: a property of the schema, `label` or `response`. Default: `label` with labels, "
        "`response` without.",
    )
    metrics: list[Literal[METRICS]] = Field(  # type: ignore[valid-type]
        default_factory=list,
        description=f"Some of {', '.join(METRICS)}. Default: accuracy and f1 with labels, exact_match without.",
    )
    by: list[str] = Field(default_factory=list, description="Columns by whose values the rows are looked at apart.")

    @field_validator("metrics", "by")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        for name in value:
            if value.count(name) > 1:
                raise ValueError(f"{name!r} stands in the list twice")
        return value


class OutputSetting(_Setting):
    """Where the answers go."""

    path: str = Field(min_length=1, description="A .parquet path; {run_id} and {date} (UTC) are filled in.")
    prefix: str = Field("", description="Put before the names of the result columns.")
    answer_prefix: str | None = Field(
        None, description="Put before the names of the columns made of the answers, such as label. Default: prefix."
    )
    partial: bool = Field(
        True, description="Write the file after an unfinished run too; false keeps the last whole one."
    )

    @property
    def prefix_of_answers(self) -> str:
        """What stands before the names of the columns made of the answers."""
        return self.prefix if self.answer_prefix is None else self.answer_prefix

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("path")
    @classmethod
    def _parquet(cls, value: str) -> str:
        _local_path(value)
        if not value.endswith(".parquet"):
            raise ValueError(f"{value!r} does not end in .parquet")
        try:
            fields = [field for field in string.Formatter().parse(value) if field[1] is not None]
        except ValueError as exc:
            raise ValueError(f"{value!r} has a single brace: {exc}") from None
        for _, name, form, conversion in fields:
            if name not in ("run_id", "date") or form or conversion:
                written = f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
                raise ValueError(f"{written} is no placeholder: there are {{run_id}} and {{date}}")
        return value


class Job(_Setting):
    """A job file."""

    name: str = Field("", description="Names the ledger, runs and reports. Default: the file's stem.")
    input: InputSetting
    prompt: PromptSetting | None = Field(None, description="Default: the column `prompt`, else the column `messages`.")
    provider: ProviderSetting
    model: str | list[str] = Field(
        description="The model's id; for `local` also the path of a GGUF file. A list: every row is asked of each."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Sent as they stand: max_tokens, temperature, top_p, stop, …"
    )
    stream: bool = Field(False, description="Ask for server-sent events.")
    samples: int = Field(1, ge=1, le=1000, description="Answers to each row, from each model.")
    concurrency: int = Field(32, ge=1, le=10_000, description="The most requests in flight.")
    requests_per_minute: int | None = Field(None, ge=1, le=10**9, description="The most requests in any minute.")
    tokens_per_minute: int | None = Field(
        None, ge=1, le=10**12, description="The most tokens in any minute, read and written."
    )
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        600.0, description="The whole of one attempt."
    )
    stop_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        60.0, description="How long to await what is in flight when the run is stopped."
    )
    max_response_bytes: int = Field(32 * 1024 * 1024, ge=1024, le=2**31, description="The most bytes of one answer.")
    retry: RetrySetting = RetrySetting()
    budget: BudgetSetting | None = None
    prices: PricesSetting | None = None
    reuse: bool = Field(
        False, description="Take answers that earlier runs of the job have paid for, and ask equal requests once."
    )
    labels: list[str] | None = Field(None, min_length=1, description="What an answer may be: one of these.")
    schema_: dict[str, Any] | str | None = Field(
        None, alias="schema", description="What an answer must fit: a JSON Schema, or the path of a file with one."
    )
    repair: int = Field(
        0, ge=0, le=10, description="How often an answer that does not fit is asked for again, with what was wrong."
    )
    evaluate: EvaluateSetting | None = None
    canary: int | None = Field(
        None, ge=1, le=100_000, description="Ask so many rows first, and go on only if max_error_rate allows it."
    )
    max_error_rate: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = Field(
        None, description="Stop once more than this share of the rows settled last failed or did not parse."
    )
    output: OutputSetting
    ledger: str | None = Field(None, description="Path of the SQLite file. Default: beside the output.")

    _path: Path = PrivateAttr(default=Path("job.yaml"))
    _asked_as: Job | None = PrivateAttr(default=None)

    @field_validator("labels", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        for label in value if isinstance(value, list) else ():
            if not isinstance(label, str):
                raise ValueError(f"{_shown(label)} is no text: write it in quotes")  # noqa: TRY004 - pydantic collects
        return value

    @model_validator(mode="after")
    def _one_structure(self) -> Job:
        if self.labels is not None and self.schema_ is not None:
            raise ValueError("labels and schema exclude each other: a schema can have an enum")
        if self.repair and self.labels is None and self.schema_ is None:
            raise ValueError("repair is for answers that do not fit: it needs labels or a schema")
        if self.canary is not None and self.max_error_rate is None:
            raise ValueError("canary needs max_error_rate, which says how many may fail")
        return self

    @field_validator("model", mode="before")
    @classmethod
    def _named_models(cls, value: Any) -> Any:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"should be the id of a model, or a list of them (is {_shown(value)})")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands in the list twice")
        return value

    @model_validator(mode="after")
    def _one_local_model(self) -> Job:
        if self.provider.name == "local" and len(self.models) > 1:
            raise ValueError("the provider local serves one model at a time: name one, and give each a job of its own")
        return self

    @field_validator("ledger")
    @classmethod
    def _local_ledger(cls, value: str | None) -> str | None:
        return None if value is None else _local_path(value)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value and not re.fullmatch(r"[\w][\w.\- ]{0,99}", value):
            raise ValueError(f"{value!r} cannot name a file: use letters, digits, '.', '-' and '_'")
        return value

    @field_validator("schema_")
    @classmethod
    def _plain_schema(cls, value: Any) -> Any:
        return _plain_numbers(value)

    @field_validator("parameters")
    @classmethod
    def _parameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, instead in _REFUSED_PARAMETERS.items():
            if name in value:
                raise ValueError(f"{name!r} is not a parameter: use {instead}")
        plain = _plain_numbers(value)
        assert isinstance(plain, dict)
        return plain

    @property
    def path(self) -> Path:
        """The job file, absolute."""
        return self._path

    @property
    def models(self) -> list[str]:
        """All that are asked."""
        return self.model if isinstance(self.model, list) else [self.model]

    def resolve(self, path: str) -> Path:
        """A path of the job file as it stands there: relative ones start at the job file's folder."""
        try:
            expanded = Path(path).expanduser()
        except RuntimeError:
            raise JobError(f"{path}: there is no such user") from None
        return Path(os.path.normpath(self._path.parent / expanded))

    @property
    def ledger_path(self) -> Path:
        """The ledger: as written, or beside the output in its longest leading folder without a placeholder."""
        if self.ledger is not None:
            return self.resolve(self.ledger)
        folder = Path(self.output.path).parent
        while "{" in str(folder):
            folder = folder.parent
        return self.resolve(str(folder)) / f"{self.name}.ledger.sqlite"

    @property
    def asked_as(self) -> Job:
        """The job whose labels or schema the requests were made with: itself, or an earlier version of it."""
        return self._asked_as or self

    def request_shape(self) -> dict[str, Any]:
        """What of the job changes the requests or the rows: with an unchanged input, the same shape asks the same."""
        shape = self.model_dump(mode="json", include={*_SHAPING, "input"}, by_alias=True)
        return shape | self.asked_as.model_dump(mode="json", include={"labels", "schema_"}, by_alias=True)

    def output_settings(self) -> dict[str, Any]:
        """What of the job changes the output, and no request that was made; plain JSON values."""
        now = self.snapshot()
        return {name: now.get(name) for name in _WRITING}

    def snapshot(self) -> dict[str, Any]:
        """The job as plain JSON values; it holds no secret, since secrets are read from the environment."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    @classmethod
    def of_snapshot(cls, snapshot: Mapping[str, Any], path: Path) -> Job:
        """The job that a snapshot was made of. `path`: of its file, whether that is still there or not."""
        job = cls.model_validate(snapshot)
        job._path = path
        return job

    def with_shape_of(self, snapshot: Mapping[str, Any]) -> Job:
        """This job with what shapes the request taken from an earlier snapshot of it."""
        now = self.snapshot()
        merged = {name: value for name, value in now.items() if name not in _SHAPING}
        merged |= {name: value for name, value in snapshot.items() if name in _SHAPING}
        job = Job.model_validate(merged)
        job._path = self._path
        job._asked_as = Job.model_validate(
            {name: value for name, value in merged.items() if name not in _DERIVING}
            | {name: value for name, value in snapshot.items() if name in ("labels", "schema")}
        )
        return job


def _local_path(path: str) -> str:
    """A path as it is, if this machine can have it."""
    if "\0" in path:
        raise ValueError("holds a NUL character")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ValueError(f"{path!r} is not on this machine: remote paths are {_NOT_YET}")
    return path


def _plain_numbers(value: Any) -> Any:
    """Decimals of the YAML as JSON numbers: parameters are no money."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    return value


def load_job(path: Path) -> Job:
    """Read and check a job file.

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
    try:
        job = Job.model_validate(document.value)
    except ValidationError as exc:
        faults += list(dict.fromkeys(_fault(document, error) for error in exc.errors(include_url=False)))
    if faults or job is None:
        shown = [f"  {fault[:_LONGEST_FAULT]}" for fault in sorted(faults, key=_line_of)[:_MOST_FAULTS]]
        more = [f"  … and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise JobError("\n".join([f"{path}: the job is wrong:", *shown, *more]))
    # The folder itself, not a link to it: `..` must lead to the same ledger from everywhere.
    absolute = path.parent.resolve() / path.name
    found: dict[str, Any] = {} if job.name else {"name": absolute.stem}
    job._path = absolute
    if isinstance(job.schema_, str):
        found["schema_"] = _read_schema(job, job.schema_)
    job = job.model_copy(update=found)
    job._path = absolute
    return job


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
    schema = _plain_numbers(document.value)
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
}


def _fault(document: Document, error: Any) -> str:
    path = error["loc"]
    line = document.line(path)
    where = f"line {line}: " if line is not None and path else ""
    name = ".".join(str(part)[:100] for part in path) or "the job"
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            model = _MODELS.get(tuple(str(part) for part in path[:-1]))
            fields = model.model_fields.items() if model else ()
            names = [field.alias or key for key, field in fields if field.description != _NOT_YET]
            near = difflib.get_close_matches(str(path[-1]), names, 1)
            mend = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(names)}"
            return f"{where}{name}: there is no such key: {mend}"
        case "missing":
            return f"{where}{name}: is missing"
        case "value_error":
            return f"{where}{name}: {error['ctx']['error']}"
        case _ if path[:2] == ("input", "columns"):
            return f"{where}input.columns: should be a list of names, or a map of names to types (is {_shown(value)})"
        case "model_type" | "model_attributes_type":
            forms = "a mapping" if name in ("retry", "prices", "budget", "evaluate") else "text or a mapping"
            return f"{where}{name}: should be {forms} (is {_shown(value)})"
        case _:
            said = error["msg"].replace("Input should be", "should be").replace("String should", "should")
            return f"{where}{name}: {said} (is {_shown(value)})"


def _line_of(fault: str) -> int:
    match = re.match(r"line (\d+):", fault)
    return int(match[1]) if match else 0


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, for editors."""
    schema = Job.model_json_schema(by_alias=True)
    for name in ("input", "prompt", "provider", "output"):
        reference = schema["properties"][name]
        description = reference.pop("description", None)
        forms = reference.pop("anyOf", None) or [dict(reference)]
        reference.clear()
        reference["anyOf"] = [{"type": "string"}, *(form for form in forms if form.get("type") != "null")]
        if description:
            reference["description"] = description
    later = [name for name, field in schema["properties"].items() if field.get("description") == _NOT_YET]
    for name in later:
        del schema["properties"][name]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "batchrun job"
    return schema
