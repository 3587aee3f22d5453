"""A chat-completions server that costs next to nothing: what a benchmark of clients is run against.

    python stub.py '{"latency": 0.2, "p429": 0.05, "p500": 0.02, "chunks": 72, "certificate": "server.pem"}'

It prints its port, answers until its standard input ends, and tells what it has seen at `GET /stats`.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import sys
import threading
import time
from typing import Any

import uvloop

ANSWER_BYTES = 1024
_USAGE = {"prompt_tokens": 130, "completion_tokens": 110, "total_tokens": 240}
_META = {"usage": {"credits_used": 4350, "usd_spent": 0.002175}}
_RETRY_AFTER = 1


def _head(status: str, kind: str, extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: keep-alive\r\n{extra}".encode()


def _document(status: str, document: Any, extra: str = "") -> bytes:
    body = json.dumps(document).encode()
    return _head(status, "application/json", f"{extra}Content-Length: {len(body)}\r\n\r\n") + body


def _plain() -> bytes:
    answer: dict[str, Any] = {
        "id": "gen-1763000000-abcdefghijklmnop",
        "object": "chat.completion",
        "created": 1763000000,
        "model": "stub-model",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}],
        "usage": _USAGE,
        "meta": _META,
    }
    text = "The film is praised for its pace and its score, and so the label is positive. " * 20
    answer["choices"][0]["message"]["content"] = text[: ANSWER_BYTES - len(json.dumps(answer))]
    return _document("200 OK", answer)


def _events(chunks: int) -> list[bytes]:
    """The pieces of a streamed answer, each as it goes over the wire."""
    common = {"id": "gen-1763000000-abcdefghijklmnop", "object": "chat.completion.chunk", "model": "stub-model"}
    documents = [
        {**common, "choices": [{"index": 0, "delta": {"content": f" word{number}"}, "finish_reason": None}]}
        for number in range(chunks - 2)
    ]
    documents.append({**common, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    documents.append({**common, "choices": [], "usage": _USAGE, "meta": _META})
    events = [f"data: {json.dumps(document)}\n\n".encode() for document in documents]
    events[-1] += b"data: [DONE]\n\n"
    pieces = [f"{len(event):x}\r\n".encode() + event + b"\r\n" for event in events]
    pieces[-1] += b"0\r\n\r\n"
    return pieces


class Stub:
    """What the connections share."""

    def __init__(
        self,
        *,
        latency: float = 0.0,
        p429: float = 0.0,
        p500: float = 0.0,
        chunks: int = 0,
        chunk_seconds: float = 0.0,
        refused_word: str = "",
        seed: int = 1,
    ) -> None:
        self.latency = latency
        self.p429 = p429
        self.p500 = p500
        self.chunk_seconds = chunk_seconds
        self.random = random.Random(seed).random
        self.plain = _plain()
        self.stream_head = _head("200 OK", "text/event-stream", "Transfer-Encoding: chunked\r\n\r\n")
        self.events = _events(chunks) if chunks else []
        self.too_many = _document(
            "429 Too Many Requests", {"error": {"message": "slow down"}}, f"Retry-After: {_RETRY_AFTER}\r\n"
        )
        self.refused_word = refused_word.encode()
        self.refusal = _document("400 Bad Request", {"error": {"message": "this prompt is refused"}})
        self.broken = _document("500 Internal Server Error", {"error": {"message": "try again"}})
        self.requests = self.connections = self.in_flight = self.most_in_flight = self.refusals = 0
        self.first = self.last = 0.0
        self.call_later = asyncio.get_running_loop().call_later

    def stats(self) -> bytes:
        """What was seen: `requests` and `refusals` since the start, times and most in flight since the last asking."""
        seen = _document(
            "200 OK",
            {
                "requests": self.requests,
                "refusals": self.refusals,
                "connections": self.connections,
                "most_in_flight": self.most_in_flight,
                "first_to_last_seconds": self.last - self.first,
                "cpu_seconds": time.process_time(),
            },
        )
        self.most_in_flight = self.in_flight
        self.first = self.last = 0.0
        return seen


class _Connection(asyncio.Protocol):
    __slots__ = ("_held", "_need", "_stub", "_transport")

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._held = b""
        self._need = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._stub.connections += 1

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
        if len(data) < self._need:
            self._held = data
            return
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._held = data
            return
        if data.startswith(b"GET"):
            self._held = b""
            self._transport.write(self._stub.stats())
            return
        start = data.lower().find(b"content-length:", 0, end) + 15
        self._need = end + 4 + int(data[start : data.find(b"\r", start)])
        if len(data) < self._need:
            self._held = data
            return
        self._held = data[self._need :]
        self._need = 0
        stub = self._stub
        if stub.refused_word and stub.refused_word in data:
            stub.refusals += 1
            self._transport.write(stub.refusal)
            return
        stub.requests += 1
        stub.in_flight += 1
        if stub.in_flight > stub.most_in_flight:
            stub.most_in_flight = stub.in_flight
        stub.last = time.monotonic()
        stub.first = stub.first or stub.last
        if stub.p429 and stub.random() < stub.p429:
            # Whoever counts requests stands before the model, and refuses at once.
            stub.refusals += 1
            self._end(stub.too_many)
        elif stub.latency:
            stub.call_later(stub.latency, self._answer)
        else:
            self._answer()

    def _answer(self) -> None:
        stub = self._stub
        if stub.p500 and stub.random() < stub.p500:
            stub.refusals += 1
            self._end(stub.broken)
        elif not stub.events:
            self._end(stub.plain)
        elif stub.chunk_seconds:
            self._transport.write(stub.stream_head)
            self._piece(0)
        else:
            self._end(stub.stream_head + b"".join(stub.events))

    def _piece(self, number: int) -> None:
        stub = self._stub
        if number + 1 == len(stub.events):
            self._end(stub.events[number])
            return
        self._transport.write(stub.events[number])
        stub.call_later(stub.chunk_seconds, self._piece, number + 1)

    def _end(self, last: bytes) -> None:
        # Counted down first: the client must not be faster than the count.
        self._stub.in_flight -= 1
        self._transport.write(last)


async def _serve(options: dict[str, Any]) -> None:
    certificate, port = options.pop("certificate", None), options.pop("port", 0)
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    stub = Stub(**options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(stub), "127.0.0.1", port, ssl=context, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    await over.wait()


if __name__ == "__main__":
    uvloop.run(_serve(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
