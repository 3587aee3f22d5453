"""The job file as a frozen, validated `Job`.

Every relative path in it is relative to the job file, never to the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, field_validator, model_validator

from batchrun.errors import JobError, StorageError
from batchrun.moments import deadline_of
from batchrun.overrides import at
from batchrun.remote import AnyPath, RemotePath, is_url
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
    Setting,
    local_path,
    plain_numbers,
    shown_value,
)
from batchrun.stores import NoStoreError

_REFUSED_PARAMETERS = {
    "model": "the key `model` of the job",
    "messages": "the key `prompt`",
    "stream": "the key `stream` of the job",
    "stream_options": "`provider: {include_usage: …}`",
    "n": "the key `samples` of the job",
}
_SHAPING = ("prompt", "model", "samples", "parameters", "provider", "reuse")
_WRITING = ("input", "stream", "output", "labels", "schema", "evaluate")
_DERIVING = ("labels", "schema", "repair", "evaluate")


class Job(Setting):
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
    deadline: str | None = Field(
        None,
        description="Ask no more rows in time to be done by then: 2h, 90m, 06:00 (this machine's local time, unless it "
        "has an offset) or 2026-11-01T06:00.",
    )
    engine: EngineSetting = EngineSetting()
    on_finish: FinishSetting | None = None
    output: OutputSetting
    ledger: str | None = Field(None, description="Path of the SQLite file. Default: beside the output.")

    _path: Path = PrivateAttr(default=Path("job.yaml"))
    _asked_as: Job | None = PrivateAttr(default=None)
    _overrides: tuple[str, ...] = PrivateAttr(default=())
    _written_output: str | None = PrivateAttr(default=None)

    @field_validator("labels", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        for label in value if isinstance(value, list) else ():
            if not isinstance(label, str):
                raise ValueError(f"{shown_value(label)} is no text: write it in quotes")  # noqa: TRY004 - pydantic collects
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
            raise ValueError(f"should be the id of a model, or a list of them (is {shown_value(value)})")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands in the list twice")
        return value

    @model_validator(mode="after")
    def _one_local_model(self) -> Job:
        if self.provider.name == "local" and len(self.models) > 1:
            raise ValueError("the provider local serves one model at a time: name one, and give each a job of its own")
        if self.provider.name == "local" and self.engine.name != "local":
            raise ValueError(
                "provider: local is a server on this machine, which other machines do not reach: set engine: local (or "
                "--engine local), or name another provider"
            )
        return self

    @field_validator("deadline")
    @classmethod
    def _known_deadline(cls, value: str | None) -> str | None:
        if value is not None:
            deadline_of(value, datetime.now(UTC))
        return value

    @field_validator("ledger")
    @classmethod
    def _local_ledger(cls, value: str | None) -> str | None:
        return None if value is None else local_path(value)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value and not re.fullmatch(r"[\w][\w.\- ]{0,99}", value):
            raise ValueError(f"{value!r} cannot name a file: use letters, digits, '.', '-' and '_'")
        return value

    @field_validator("schema_")
    @classmethod
    def _plain_schema(cls, value: Any) -> Any:
        return plain_numbers(value)

    @field_validator("parameters")
    @classmethod
    def _parameters(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, instead in _REFUSED_PARAMETERS.items():
            if name in value:
                raise ValueError(f"{name!r} is not a parameter: use {instead}")
        plain = plain_numbers(value)
        assert isinstance(plain, dict)
        return plain

    def in_file(self, path: Path, written_output: str | None, overrides: Iterable[str], **changed: Any) -> Job:
        """The job as that of a file, with some fields changed.

        Args:
            path: of the file, absolute.
            written_output: the path of the output as the file has it.
            overrides: keys that the call has set.
        """
        job = self.model_copy(update={"name": self.name or path.stem} | changed)
        job._path, job._written_output, job._overrides = path, written_output, tuple(overrides)
        return job

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

    def place_of(self, path: str) -> AnyPath:
        """Where an input or an output of the job file is: on this machine, or in a store.

        Raises:
            JobError: it is in a store that nothing here opens.
            StorageError: its store does not answer.
        """
        if not is_url(path):
            return self.resolve(path)
        try:
            return RemotePath.of(path)
        except NoStoreError as exc:
            raise JobError(f"{path}: {exc}") from exc
        except OSError as exc:
            raise StorageError(f"{path}: {exc}") from exc

    @property
    def ledger_path(self) -> Path:
        """The ledger: as written, or beside the output."""
        return self.resolve(self.ledger if self.ledger is not None else ledger_beside(self.output.path, self.name))

    @property
    def last_run_path(self) -> Path:
        """Where the outcome of the newest invocation is told to machines: beside the output that the job file names."""
        output = self._written_output or self.output.path
        # What is in a store has no neighbour on this machine but the ledger.
        beside = self.ledger_path if is_url(output) else self.resolve(ledger_beside(output, self.name))
        return beside.with_name(f"{self.name}.last-run.json")

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

    @property
    def has_other_input(self) -> bool:
        """True if the call has set what is read."""
        return any(key.split(".")[0] == "input" for key in self._overrides)

    def record(self) -> dict[str, Any]:
        """What the ledger keeps of it: the snapshot, and under `overrides` what the call has set in it."""
        snapshot = self.snapshot()
        return snapshot | (
            {"overrides": {key: at(snapshot, key) for key in self._overrides}} if self._overrides else {}
        )

    @classmethod
    def of_record(cls, record: Mapping[str, Any], path: Path) -> Job:
        """The job that a record was made of. `path`: of its file, whether that is still there or not."""
        job = cls.model_validate({name: value for name, value in record.items() if name != "overrides"})
        job._path = path
        return job

    def with_shape_of(self, record: Mapping[str, Any]) -> Job:
        """This job with what shapes the request taken from an earlier record of it, and what its call had set."""
        now = self.snapshot()
        taken = {*_SHAPING, *(str(key).split(".")[0] for key in record.get("overrides", ()))}
        if "output" in taken:
            taken.add("ledger")  # which stayed where it was
        merged = {name: value for name, value in now.items() if name not in taken}
        merged |= {name: value for name, value in record.items() if name in taken}
        job = Job.model_validate(merged)
        job._path = self._path
        job._asked_as = Job.model_validate(
            {name: value for name, value in merged.items() if name not in _DERIVING}
            | {name: value for name, value in record.items() if name in ("labels", "schema")}
        )
        return job


def ledger_beside(output: str, name: str) -> str:
    """Where the ledger is if the job does not say it: in the longest leading folder of the output's without a
    placeholder; not in a dataset that its hive folders make (`runs/day={date}/…`), which holds nothing else.
    """
    folder, is_dataset = leading_folder(output)
    if is_dataset and folder.name not in ("", "..", "~"):
        folder = folder.parent
    return str(folder / f"{name}.ledger.sqlite")


def leading_folder(output: str) -> tuple[Path, bool]:
    """The longest leading folder without a placeholder, and whether hive folders begin there."""
    # A folder of parts is one itself.
    folder = below = Path(output).parent if output.endswith(".parquet") else Path(output)
    if folder == Path(output) and "{" not in folder.name:
        folder = below = folder.parent
    while "{" in str(folder):
        folder, below = folder.parent, folder
    return folder, below != folder and "=" in below.name
