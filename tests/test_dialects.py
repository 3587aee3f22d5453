"""Every conformance case through the command line: a server replays the bytes, the Parquet row tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from .conftest import Workspace, fake_providers
from .test_wire import CASES


def replay(case: dict[str, Any]) -> dict[str, Any]:
    chunks = case["chunks"] if case["kind"] == "sse" else [case["body"].encode().decode("latin-1")]
    headers = dict(case["headers"])
    return {"status": case["status"], "headers": headers, "chunks": chunks, "usd": case["expect"].get("usd")}


def stops_the_run(case: dict[str, Any]) -> bool:
    expect = case["expect"]
    return bool(expect.get("fatal_run")) or expect.get("error") in ("rate_limit", "overloaded")


@dataclass
class Replayed:
    """What the command line made of one case."""

    row: dict[str, Any]
    code: int
    stderr: str
    billed: Decimal


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], Replayed]]:
    """Cases that leave the run going share one; the others have one each."""
    folder = tmp_path_factory.mktemp("replayed")
    together: dict[str, Replayed] = {}
    with fake_providers(folder) as provide:

        def run(cases: list[dict[str, Any]]) -> dict[str, Replayed]:
            work = Workspace(folder / cases[0]["id"])
            work.folder.mkdir()
            provider = provide()
            work.write_rows([f"{case['id']} <<{json.dumps({'replay': replay(case)})}>>" for case in cases])
            retry = {"max_attempts": 1, "max_seconds": 0}
            work.write_job(provider.base_url, stream=cases[0]["kind"] == "sse", retry=retry)
            result = work.run("--json")
            billed = {request["text"]: Decimal(request["usd"]) for request in provider.requests}
            return {
                case["id"]: Replayed(row, result.code, result.stderr, billed[row["prompt"]])
                for case, row in zip(cases, work.rows(), strict=True)
            }

        for streamed in (False, True):
            together |= run([case for case in CASES if not stops_the_run(case) and (case["kind"] == "sse") is streamed])
        yield lambda case: together[case["id"]] if case["id"] in together else run([case])[case["id"]]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_conformance_through_the_command_line(
    replayed: Callable[[dict[str, Any]], Replayed], case: dict[str, Any]
) -> None:
    found = replayed(case)
    row = found.row
    expect = case["expect"]
    if "error" in expect:
        assert row["error"].startswith(expect["error"]), row["error"]
        assert row["status"] == ("pending" if stops_the_run(case) else "failed")
        assert found.code == (4 if stops_the_run(case) else 1)
        assert row["response"] is None
        if "request_id" in expect:
            assert row["request_id"] == expect["request_id"]
        assert str(expect.get("code", "")) in row["error"]
        return
    assert (row["status"], row["error"]) == ("ok", None), found.stderr
    names = {
        "text": "response", "finish": "finish_reason", "finish_raw": "finish_reason_raw", "inp": "prompt_tokens",
        "out": "completion_tokens", "total": "total_tokens", "cached": "cached_tokens",
        "reasoning_tokens": "reasoning_tokens", "model": "model", "inference_id": "request_id",
    }  # fmt: skip
    for name, column in names.items():
        if name in expect:
            assert row[column] == expect[name], column
    if "reasoning" in expect:
        assert (row["reasoning"] or "") == expect["reasoning"]
    if "tool_calls" in expect:
        calls = json.loads(row["tool_calls"])
        assert len(calls) == expect["tool_calls"]
        assert calls[0]["function"]["arguments"] == expect.get("tool_args", "{}")
    if "usd" in expect:
        usd = None if row["usd_spent"] is None else Decimal(repr(row["usd_spent"]))
        assert usd == (None if expect["usd"] is None else Decimal(expect["usd"]))
        assert found.billed == (usd or 0)
        assert row["unknown_attempts"] == (usd is None)
    if "cost_source" in expect:
        assert row["cost_source"] == ("credits" if expect["cost_source"].endswith("2e6") else "reported")
