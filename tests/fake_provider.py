"""A fake AI/ML API: its own process, real sockets, and a bill of its own as the witness.

It answers `POST …/chat/completions` in the shapes of AI/ML API, plain and streamed, and writes one JSON line to its
log for every request: what was asked, what it answered and what it charged. A prompt may carry a script between
`<<` and `>>`, JSON:

    fail       list: what the 1st, 2nd, … attempt of this very prompt gets instead of an answer: a status, or
               `hangup` (closes without a byte), `half` (half a body), `silent` (never answers), `drip` (keep-alives
               for ever), `flood` (an endless body)
    say        the answer's text
    finish     its finish reason
    wait       seconds before it comes
    retry_after, message   of the failures
    bytes      what the first attempt gets, head and all (latin-1), before the connection is closed
    file       the same, from a file
    replay     {status, headers, chunks}: bytes sent as they are (latin-1)
    usage      the usage object, null for none

Started as `python fake_provider.py LOG OPTIONS` with OPTIONS as JSON: `p400`, `p429`, `p500`, `p_hangup`, `p_half`,
`p_silent` (shares of requests), `seed`, `latency`, `retry_after`, `bill` (`meta`, `credits`, `header`, `none`, `mix`),
`charge` (a factor on its prices), `wordy` (answers of any length up to max_tokens), `refuse_after`, `withdrawn`
(models), `by_count` (of several answers the next for each request that is the same), `body`, `bytes`, `port`, `replay`,
`models`, `deprecations` (lists for the GETs of those names), `get` (see `answer_badly`), `stray` (an answer that nobody
asked for, sent after a failure on the same connection). It prints its port.

`GET /v2/logs` lists what was billed, newest first. Options: `log_lag` (seconds until the line of a lost answer is
there), `log_missing` (lines of lost answers are not), `log_429` (every so many calls are refused), `log_breaks_at`
(the offset from which on it answers 500), `log_adds` (dollars that it adds to each line), `log_extra` (further lines),
`log_says` (with a 403), `log_page` (what every page is). GETs are written to LOG.gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from hashlib import blake2b
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

MESSAGES = {
    400: "Body validation error!",
    401: "This request requires a valid API key.",
    402: "Insufficient Balance",
    403: "You've run out of credits. Please top up your balance.",
    404: "Not Found",
    429: "Too Many Requests",
    500: "Something wrong with the server. Please, try again later.",
    503: "Service unavailable",
}

SONNET = {
    "id": "anthropic/claude-sonnet-4",
    "aliases": ["claude-sonnet-4"],
    "info": {"contextLength": 200_000, "outputMax": 64_000},
    "pricing": {
        "kind": "fixed",
        "currency": "USD",
        "units": [
            {"name": "token", "measure": "input", "origin": "provided", "price": 3.9, "per": 1_000_000},
            {"name": "token", "measure": "input", "origin": "cached", "price": 0.39, "per": 1_000_000},
            {"name": "token", "measure": "input", "origin": "cache_write", "price": 4.875, "per": 1_000_000},
            {"name": "token", "measure": "output", "origin": "generated", "price": 0.0195, "per": 1000},
        ],
    },
}
"""An entry of the AI/ML API's list with what is charged here; the list that is given unless told otherwise."""


class Provider:
    def __init__(self, log: str, options: dict[str, Any]) -> None:
        self.log = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the process
        self.options = options
        self.random = random.Random(options.get("seed", 0))
        self.seen: dict[bytes, int] = {}
        self.count = 0
        self.in_flight = 0
        self.lines: list[dict[str, Any]] = []
        self.log_calls = 0
        self.gets = open(f"{log}.gets", "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.serve(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        self.count += request_line.startswith("POST")
        self.in_flight += 1
        try:
            return await self.answer(request_line, headers, json.loads(raw or b"{}"), writer)
        finally:
            self.in_flight -= 1

    async def answer(
        self, request_line: str, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        content = body["messages"][-1]["content"] if body.get("messages") else ""
        text = content if isinstance(content, str) else json.dumps(content)
        script: dict[str, Any] = {}
        for message in reversed(body.get("messages", [])):
            if "<<" in str(message["content"]):
                script = json.loads(message["content"][message["content"].index("<<") + 2 :].rpartition(">>")[0])
                break
        digest = digest_of(body)
        nth = self.seen[digest] = self.seen.get(digest, 0) + 1
        path = request_line.split(" ")[1]
        if request_line.startswith("GET"):
            self.gets.write(json.dumps({"path": path, "headers": headers}) + "\n")
            if "get" in self.options:
                return await self.answer_badly(self.options["get"], writer)
            if urlsplit(path).path == "/v2/logs":
                await self.logs(path, headers, writer)
                return True
            path = urlsplit(path).path
            is_list = not path.endswith("/deprecations")
            listed = self.options.get("models", [SONNET]) if is_list else self.options.get("deprecations")
            payload = json.dumps({"data": listed or []}).encode()
            status = 200 if listed is not None else 404
            etag = self.options.get("etag", f'W/"{blake2b(payload, digest_size=8).hexdigest()}"')
            if headers.get("if-none-match") == etag:
                status, payload = 304, b""
            await self.send(status, {"Content-Length": str(len(payload)), "ETag": etag}, payload, writer)
            return True
        record = {
            "path": path, "nth": nth, "id": headers.get("x-client-request-id"), "text": text,
            "in_flight": self.in_flight, "status": None, "usd": "0", "answered": False, "came": time.time(),
        }  # fmt: skip
        if self.options.get("keep_requests"):
            record |= {"body": body, "headers": headers}
        try:
            return await self.act(headers, body, text, script, nth, record, writer)
        finally:
            if not record.pop("is_logged", False):
                self.log.write(json.dumps(record) + "\n")

    async def answer_badly(self, how: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """What a GET gets: `bytes`, then `again` and again with a pause of `every` seconds, for ever."""
        writer.write(how.get("bytes", "").encode("latin-1"))
        while "again" in how:
            writer.write(how["again"].encode("latin-1"))
            await writer.drain()
            await asyncio.sleep(how.get("every", 0))
        await writer.drain()
        return False

    async def act(
        self, headers: dict[str, str], body: dict[str, Any], text: str, script: dict[str, Any], nth: int,
        record: dict[str, Any], writer: asyncio.StreamWriter,
    ) -> bool:  # fmt: skip
        options = self.options
        delay = 0 if Path(f"{self.log.name}.hurry").exists() else script.get("wait", options.get("latency", 0))
        if delay:
            await asyncio.sleep(delay)
        key = options.get("key")
        if key and headers.get("authorization") != f"Bearer {key}":
            return await self.fail(401, record, script, writer)
        if options.get("refuse_after") is not None and self.count > options["refuse_after"]:
            return await self.fail(403, record, script, writer)
        if body.get("model") in options.get("withdrawn", ()):
            return await self.fail(404, record, script, writer)
        replay = script.get("replay") or options.get("replay")
        if replay:
            return await self.replay(replay, record, writer)
        failures = script.get("fail", [])
        failure = failures[nth - 1] if nth <= len(failures) else None
        if failure is None:
            drawn = self.random.random()
            for kind in (429, 500, 400, "_hangup", "_half", "_silent"):
                if 0 <= drawn < options.get(f"p{kind}", 0):
                    failure = kind if isinstance(kind, int) else kind[1:]
                drawn -= options.get(f"p{kind}", 0)
        raw = script.get("bytes", options.get("bytes"))
        if "file" in script:
            raw = Path(script["file"]).read_bytes().decode("latin-1")
        if raw is not None and nth == 1:
            record["status"] = 0
            writer.write(raw.encode("latin-1"))
            await writer.drain()
            return False
        if isinstance(failure, int):
            return await self.fail(failure, record, script, writer)
        document, usd = self.completion(body, text, script)
        record["usd"], record["answered"] = str(usd), True
        self.note(record, body, usd, document["usage"], is_lost=failure is not None)
        extra: dict[str, str] = {"x-inference-id": f"inf-{self.count}"}
        how = options.get("bill", "meta")
        if how == "mix":
            how = ("meta", "credits", "header", "none")[digest_of(body)[0] % 4]
            if body.get("stream") and how == "header":
                how = "credits"
        credits_used = int(usd * 2_000_000)
        if how == "meta":
            document["meta"] = {"usage": {"credits_used": credits_used, "usd_spent": float(usd)}}
        elif how == "credits":
            document["meta"] = {"usage": {"credits_used": credits_used}}
        elif how == "header":
            extra |= {"x-aimlapi-credits-used": str(credits_used), "x-aimlapi-usd-spent": f"{usd:.9f}"}
        if failure == "hangup":
            return False
        if failure == "silent":
            self.log.write(json.dumps(record) + "\n")  # what follows may never end
            record["is_logged"] = True
            await asyncio.sleep(3600)
            return False
        record["status"] = 200
        if body.get("stream"):
            return await self.stream(document, failure, extra, writer)
        payload = json.dumps(document, ensure_ascii=False).encode()
        if failure == "drip":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"1\r\n\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
        if failure == "flood":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                await writer.drain()
        head = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(payload)), **extra}
        if failure == "half":
            payload = payload[: len(payload) // 2]
        await self.send(200, head, payload, writer)
        return failure != "half"

    def completion(self, body: dict[str, Any], text: str, script: dict[str, Any]) -> tuple[dict[str, Any], Decimal]:
        said = script.get("say", f"answer to: {text}")
        if isinstance(said, list):
            asked_before = sum(message["role"] == "assistant" for message in body["messages"])
            asked_before += (self.seen[digest_of(body)] - 1) * bool(self.options.get("by_count"))
            said = said[min(asked_before, len(said) - 1)]
        prompt, completion = len(json.dumps(body["messages"])) // 4 + 1, len(said) // 4 + 1
        if self.options.get("wordy"):
            completion = 1 + int.from_bytes(digest_of(body)[:4]) % int(body["max_tokens"])
        # AI/ML API rounds each component up to whole credits.
        charge = Fraction(str(self.options.get("charge", 1)))
        credits_used = ceil(prompt * Fraction(78, 10) * charge) + ceil(completion * 39 * charge)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": said, "refusal": None, "tool_calls": None},
            "finish_reason": script.get("finish", "stop"),
            "logprobs": None,
        }
        document = {
            "id": f"chatcmpl-{self.count}", "object": "chat.completion", "created": 1762343744,
            "model": f"{body.get('model')}-20250514", "choices": [choice],
            "usage": script.get("usage", usage),
        }  # fmt: skip
        return document, Decimal(credits_used) / 2_000_000

    async def stream(
        self, document: dict[str, Any], failure: Any, extra: dict[str, str], writer: asyncio.StreamWriter
    ) -> bool:
        """The stream of AI/ML API since February 13, 2026: usage in the last event but one, no [DONE]."""
        choice = document["choices"][0]
        text = choice["message"]["content"]
        base = {"id": "", "created": 1770995755, "model": document["model"], "object": "chat.completion.chunk"}
        pieces = [text[start : start + 7] for start in range(0, len(text), 7)] or [""]
        events = [{**base, "choices": [{"index": 0, "delta": {"content": piece}}], "usage": None} for piece in pieces]
        events[0]["id"] = document["id"]
        last = {"index": 0, "delta": {"content": ""}, "finish_reason": choice["finish_reason"]}
        events.append({**base, "choices": [last], "usage": document["usage"]})
        events.append({**base, "choices": [{"index": 0, "finish_reason": choice["finish_reason"]}], "usage": None})
        if "meta" in document:
            events[-1]["meta"] = document["meta"]
        if failure == "half":
            events = events[:2]
        head = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n{head}\r\n".encode()
        )
        for event in events:
            data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if failure == "drip":
            while True:
                writer.write(b"d\r\n: keep-alive\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def replay(self, replay: dict[str, Any], record: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Send given bytes in given pieces, framed by chunked encoding."""
        record["status"], record["answered"] = replay["status"], replay["status"] < 300
        record["usd"] = replay.get("usd") or "0"
        head = "".join(f"{name}: {value}\r\n" for name, value in replay.get("headers", {}).items())
        writer.write(f"HTTP/1.1 {replay['status']} X\r\nTransfer-Encoding: chunked\r\n{head}\r\n".encode())
        for chunk in replay["chunks"]:
            data = chunk.encode("latin-1")
            if data:
                writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def fail(
        self, status: int, record: dict[str, Any], script: dict[str, Any], writer: asyncio.StreamWriter
    ) -> bool:
        record["status"] = status
        self.note(record, {}, Decimal(0), None)
        message = script.get("message", MESSAGES.get(status, "error"))
        envelope = {
            "message": message, "path": "/v1/chat/completions", "requestId": f"req-{self.count}",
            "statusCode": str(status), "timestamp": "2026-11-21T07:13:27.813Z",
        }  # fmt: skip
        head = {"Content-Type": "application/json"}
        retry_after = script.get("retry_after", self.options.get("retry_after"))
        if status in (429, 503) and retry_after is not None:
            head["Retry-After"] = str(retry_after)
        payload = self.options.get("body", json.dumps(envelope)).encode()
        await self.send(status, {**head, "Content-Length": str(len(payload))}, payload, writer)
        if stray := self.options.get("stray"):
            await asyncio.sleep(0.05)
            await self.send(200, {"Content-Length": str(len(stray))}, stray.encode(), writer)
        return True

    def note(
        self, record: dict[str, Any], body: dict[str, Any], usd: Decimal, usage: dict[str, Any] | None, *,
        is_lost: bool = False,
    ) -> None:  # fmt: skip
        """A line of the log."""
        status = "failed" if usage is None and not usd else "succeeded"
        billed = usd + Decimal(str(self.options.get("log_adds", 0))) if usd else usd
        counts = usage or {}
        created = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        self.lines.append({
            "at": time.time(), "is_lost": is_lost, "created": created, "status": status,
            "origin": "api", "model": body.get("model"),
            "cost": {"usd": float(billed), "credits": int(billed * 2_000_000)},
            "tokens": {"input": counts.get("prompt_tokens"), "output": counts.get("completion_tokens"),
                       "total": counts.get("total_tokens")},
            "request_id": f"req-{self.count}", "inference_id": f"inf-{self.count}", "client_request_id": record["id"],
        })  # fmt: skip

    async def logs(self, path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        options = self.options
        query = {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}
        self.log_calls += 1
        limit, offset = int(query.get("limit", 50)), int(query.get("offset", 0))
        status = 200
        document: dict[str, Any] = {}
        if options.get("key") and headers.get("authorization") != f"Bearer {options['key']}":
            status = 401
        elif options.get("log_429") and self.log_calls % options["log_429"] == 0:
            status = 429
        elif options.get("log_breaks_at") is not None and offset >= options["log_breaks_at"]:
            status = 500
        elif not 1 <= limit <= 100:
            status = 400
        elif "log_says" in options:
            status, document = 403, {"message": options["log_says"]}
        elif "log_page" in options:
            document = options["log_page"]
        else:
            start, end = (datetime.fromisoformat(query[name]) for name in ("start", "end"))
            seen = [
                {name: value for name, value in line.items() if name not in ("at", "is_lost")}
                for line in self.lines
                if line["at"] + options.get("log_lag", 0) * line["is_lost"] <= time.time()
                and start <= datetime.fromisoformat(line["created"]) <= end
                and not (options.get("log_missing") and line["is_lost"])
            ][::-1] + options.get("log_extra", [])
            page = seen[offset : offset + limit]
            document = {
                "data": page,
                "pagination": {"limit": limit, "offset": offset, "total": len(seen),
                               "has_more": offset + len(page) < len(seen)},
            }  # fmt: skip
        payload = json.dumps(document).encode()
        head = {"Content-Type": "application/json", "Content-Length": str(len(payload))}
        await self.send(status, head | ({"Retry-After": "0.1"} if status == 429 else {}), payload, writer)

    async def send(self, status: int, headers: dict[str, str], payload: bytes, writer: asyncio.StreamWriter) -> None:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode("latin-1") + payload)
        await writer.drain()


def digest_of(body: dict[str, Any]) -> bytes:
    return blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=12).digest()


def serve(log: str, options: dict[str, Any]) -> None:
    """Serve until the process ends."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(Provider(log, options)))


async def _serve(provider: Provider) -> None:
    port = provider.options.get("port", 0)
    server = await asyncio.start_server(provider.connected, "127.0.0.1", port, limit=2**22, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
