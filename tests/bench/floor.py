"""What a batch run costs at the least: the same work with nothing that makes it safe.

    python floor.py run INPUT.csv http://127.0.0.1:8000/v1 256 OUTPUT.parquet
    python floor.py aiohttp 20000 http://127.0.0.1:8000/v1 256
    python floor.py sockets 20000 http://127.0.0.1:8000/v1 256

`run` reads, fills in, sends over batchrun's transport, journals to SQLite, and writes Parquet; no intents, no keys, no
money, no pacing, no retries. The other two only send, and read what comes.
"""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import uvloop

SYSTEM = "You label film reviews."
AT_ONCE = 256
GROUP_ROWS = 65_536


def body_of(prompt: str, streamed: bool = False) -> bytes:
    document: dict[str, Any] = {
        "model": "stub-model",
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
        "max_tokens": 128,
        "temperature": 0,
    }
    if streamed:
        document |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(document).encode()


def rows_of(path: str) -> Iterator[dict[str, str]]:
    with open(path, newline="") as fp:
        yield from csv.DictReader(fp)


# --- the whole of it ----------------------------------------------------------------------------------------


async def run(path: str, base_url: str, concurrency: int, db: sqlite3.Connection) -> None:
    import httpx
    from tqdm import tqdm

    from batchrun.transport import Transport

    url = httpx.URL(f"{base_url}/chat/completions")
    transport = Transport(base_url, concurrency=concurrency, connect_seconds=10)
    headers = {"Host": url.netloc.decode(), "Content-Type": "application/json", "Authorization": "Bearer sk-stub"}
    rows = enumerate(rows_of(path))
    held: list[tuple[int, str, int, float]] = []
    bar = tqdm(disable=not sys.stderr.isatty())

    def flush() -> None:
        with db:
            db.executemany("INSERT INTO answer VALUES (?, ?, ?, ?)", held)
        held.clear()

    async def work() -> None:
        for number, row in rows:
            body = body_of(f"Review: {row['review']}\nIs it positive or negative?")
            request = httpx.Request(
                "POST", url, headers={**headers, "Content-Length": str(len(body))}, stream=httpx.ByteStream(body)
            )
            response = await transport.handle_async_request(request)
            assert isinstance(response.stream, httpx.AsyncByteStream)
            raw = b"".join([piece async for piece in response.stream])
            await response.aclose()
            assert response.status_code == 200
            answer = json.loads(raw)
            held.append((
                number, answer["choices"][0]["message"]["content"], answer["usage"]["total_tokens"],
                answer["meta"]["usage"]["usd_spent"],
            ))  # fmt: skip
            bar.update(1)
            if len(held) >= AT_ONCE:
                flush()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    flush()
    await transport.aclose()


def save(path: str, db: sqlite3.Connection, output: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of(path)
    answers = db.execute("SELECT response, total_tokens, usd_spent FROM answer ORDER BY number")
    writer = None
    while batch := answers.fetchmany(GROUP_ROWS):
        columns = list(zip(*(row.values() for row in itertools.islice(rows, len(batch))), strict=True))
        names = ["id", "review", "response", "total_tokens", "usd_spent"]
        table = pa.table(dict(zip(names, [*columns, *zip(*batch, strict=True)], strict=True)))
        writer = writer or pq.ParquetWriter(output, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


def run_and_save(path: str, base_url: str, concurrency: int, output: str) -> None:
    journal = f"{output}.sqlite"
    for name in (journal, f"{journal}-wal", f"{journal}-shm"):
        if os.path.exists(name):
            os.unlink(name)
    db = sqlite3.connect(journal)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("CREATE TABLE answer (number INTEGER PRIMARY KEY, response TEXT, total_tokens INTEGER, usd_spent REAL)")
    uvloop.run(run(path, base_url, concurrency, db))
    save(path, db, output)
    db.close()


# --- only the wire ------------------------------------------------------------------------------------------


async def with_aiohttp(number: int, base_url: str, concurrency: int, streamed: bool) -> None:
    """Requests by aiohttp as anybody would write them; of a stream, each event is read as JSON."""
    import aiohttp

    left = iter(range(number))
    body = body_of("x" * 480, streamed)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-stub"}

    async def work(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(f"{base_url}/chat/completions", data=body, headers=headers) as response:
                if streamed:
                    said = []
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            choices = json.loads(line[6:])["choices"]
                            said.append(choices[0]["delta"].get("content", "") if choices else "")
                    assert said
                else:
                    assert json.loads(await response.read())["choices"]

    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        await asyncio.gather(*(work(session) for _ in range(concurrency)))


class _Socket(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(self, left: Iterator[int], request: bytes, done: asyncio.Future[None]) -> None:
        self._left = left
        self._request = request
        self._done = done
        self._held = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        if next(self._left, None) is None:
            self._transport.close()
            self._done.set_result(None)
        else:
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, mark, body = self._held.partition(b"\r\n\r\n")
        if mark:
            start = head.index(b"Content-Length: ") + 16
            if len(body) >= int(head[start:].split(b"\r", 1)[0]):
                self._held = b""
                assert json.loads(body)["choices"]
                self._ask()


async def with_sockets(number: int, base_url: str, concurrency: int) -> None:
    loop = asyncio.get_running_loop()
    parts = urlsplit(base_url)
    body = body_of("x" * 480)
    request = (
        f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer sk-stub\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    left = iter(range(number))
    ends = [loop.create_future() for _ in range(concurrency)]
    for end in ends:
        await loop.create_connection(lambda end=end: _Socket(left, request, end), parts.hostname, parts.port)
    await asyncio.gather(*ends)


def main() -> None:
    kind, what, base_url, concurrency, *rest = sys.argv[1:]
    if kind == "run":
        run_and_save(what, base_url, int(concurrency), rest[0])
    elif kind == "sockets":
        uvloop.run(with_sockets(int(what), base_url, int(concurrency)))
    else:
        uvloop.run(with_aiohttp(int(what), base_url, int(concurrency), kind == "aiohttp-streamed"))


if __name__ == "__main__":
    main()
