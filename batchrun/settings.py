"""The settings of a job file, each as a frozen, validated model."""

from __future__ import annotations

import difflib
import json
import re
import string
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from batchrun.providers import PROVIDERS, secret_in_plain_sight
from batchrun.remote import check_url, is_url
from batchrun.scores import METRICS


class Setting(BaseModel):
    """What all settings share."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation if info.field_name else None
        kinds = get_args(kind) or (kind,)
        if isinstance(value, bool) and bool not in kinds and any(item in (int, float, Decimal) for item in kinds):
            raise ValueError(f"should be a number (is {str(value).lower()})")
        return value


class ColumnSetting(Setting):
    """What becomes of one input column."""

    name: str | None = Field(None, min_length=1, description="Its new name.")
    type: str | None = Field(None, description="Its new type: string, int64, float64, bool, date, timestamp.")


class InputSetting(Setting):
    """Where the rows come from."""

    path: str = Field(
        min_length=1,
        description="A path, a glob or a URL (s3://bucket/*.csv) of .csv, .tsv, .parquet or .jsonl files, also .gz.",
    )
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
    def _somewhere(cls, value: str) -> str:
        return any_path(value)

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError:
            raise ValueError(f"{value!r} is no encoding that Python knows") from None
        return value


class PromptSetting(Setting):
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


class ProviderSetting(Setting):
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


class RetrySetting(Setting):
    """Bounds of retrying, for each row."""

    max_attempts: int = Field(
        6, ge=1, le=1_000_000, description="Attempts a row may take; waits on rate limits are not counted."
    )
    max_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        900.0, description="Seconds from a row's first attempt after which it is not tried again."
    )


class PricesSetting(Setting):
    """Dollars per million tokens, for a provider that reports no cost."""

    input_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
    output_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
    cache_read_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)] | None = None
    cache_write_mtok: Annotated[Decimal, Field(ge=0, le=1_000_000, allow_inf_nan=False)] | None = None


class BudgetSetting(Setting):
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


class EvaluateSetting(Setting):
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


class OutputSetting(Setting):
    """Where the answers go."""

    part_mb: int | None = Field(
        None,
        ge=1,
        le=5_000,  # S3 puts no more into its place at once
        description="Write a folder of part-….parquet files of so many megabytes at most, and _manifest.json last.",
    )
    path: str = Field(
        min_length=1,
        description="A .parquet path or URL (s3://bucket/eval.parquet), or a folder with part_mb; {run_id} and {date} "
        "(UTC) are filled in.",
    )
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
    def _file_or_folder(cls, value: str, info: ValidationInfo) -> str:
        any_path(value)
        is_file = (urlsplit(value).path if is_url(value) else value).endswith(".parquet")
        if "part_mb" in info.data and is_file != (info.data["part_mb"] is None):
            raise ValueError(
                f"part_mb writes a folder of parts: {value!r} should not end in .parquet"
                if is_file
                else f"{value!r} does not end in .parquet; a folder of parts needs part_mb"
            )
        try:
            fields = [field for field in string.Formatter().parse(value) if field[1] is not None]
        except ValueError as exc:
            raise ValueError(f"{value!r} has a single brace: {exc}") from None
        for _, name, form, conversion in fields:
            if name not in ("run_id", "date") or form or conversion:
                written = f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
                raise ValueError(f"{written} is no placeholder: there are {{run_id}} and {{date}}")
        return value


class EngineSetting(Setting):
    """What sends the requests."""

    name: Literal["local", "ray"] = Field(
        "local", description="local: this process; ray: workers on the nodes of a Ray cluster."
    )
    address: str | None = Field(
        None,
        min_length=1,
        description="Of the cluster, HOST:PORT. Default: RAY_ADDRESS; without it, one of this machine for the run.",
    )
    workers: int | None = Field(None, ge=1, le=10_000, description="How many. Default: one a node.")
    worker_cpus: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        1.0, description="CPUs that a worker takes up of its node: a part of one, or a whole number."
    )
    start_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = Field(
        120.0, description="How long to wait for workers to begin."
    )
    runtime_env: dict[str, Any] | None = Field(
        None, description="Ray's: what workers need besides, such as {py_modules: [batchrun-….whl]}. No secrets."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _of_ray(self) -> EngineSetting:
        others = [name for name, field in EngineSetting.model_fields.items() if getattr(self, name) != field.default]
        if self.name == "local" and others:
            raise ValueError(f"{', '.join(others)}: is for the engine ray: add name: ray")
        return self

    @field_validator("worker_cpus")
    @classmethod
    def _countable(cls, value: float) -> float:
        if (value > 1 and value != int(value)) or 0 < value < 0.0001:
            raise ValueError("should be a part of 1 (0.0001 at least), or a whole number")
        return value

    @field_validator("runtime_env")
    @classmethod
    def _open(cls, value: Any) -> Any:
        if re.search(r"://[^/@\s]+@", json.dumps(value, default=str)):
            raise ValueError("holds a user name or password in an address, and Ray writes these into its logs")
        variables = value.get("env_vars") if isinstance(value, dict) else None
        for name in variables if isinstance(variables, dict) else ():
            if secret_in_plain_sight(str(name), ""):
                raise ValueError(
                    f"env_vars.{name} looks like a secret, and Ray writes these into its logs: set it in the "
                    "environment of the nodes"
                )
        return plain_numbers(value)


class FinishSetting(Setting):
    """A command that is told how each invocation ended."""

    command: list[str] = Field(
        min_length=1,
        description="Program and arguments; the summary comes on its standard input, as JSON. It starts in the job "
        "file's folder.",
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = Field(
        60.0, description="After so many seconds it is ended."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"command": value} if isinstance(value, list) else value

    @field_validator("command")
    @classmethod
    def _runnable(cls, value: list[str]) -> list[str]:
        if not value[0] or any("\0" in word for word in value):
            raise ValueError("should be a program and its arguments, such as [./notify.sh, --quiet]")
        return value


def local_path(path: str) -> str:
    """A path as it is, if this machine can have it."""
    if "\0" in path:
        raise ValueError("holds a NUL character")
    if is_url(path):
        check_url(path)
        raise ValueError(f"{path!r} is not on this machine, and has to be")
    return path


def any_path(path: str) -> str:
    """A path as it is, if this machine or a store can have it."""
    if not is_url(path):
        return local_path(path)
    check_url(path)
    return path


def plain_numbers(value: Any) -> Any:
    """Decimals of the YAML as JSON numbers: parameters are no money."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_numbers(item) for item in value]
    return value


def shown_value(value: object) -> str:
    """A value as a message repeats it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
