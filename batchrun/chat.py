"""Request → exchange over HTTP: the only room that sends prompts.

It builds an `httpx.Request` and hands it straight to a transport, past the layers of `httpx.AsyncClient` that cost
most and do nothing here (cookies, redirects, auth). Redirects are therefore never followed, with the key or without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Required, Self, TypedDict, Unpack

import httpx

from batchrun import __version__
from batchrun.failures import read_failure, request_id_of
from batchrun.inflate import ACCEPTED, Inflater, TooLongError, UnaskedError
from batchrun.money import LOCAL, NOT_BILLED, UNKNOWN, Cost
from batchrun.prices import Pricing, is_plausible
from batchrun.providers import Endpoint
from batchrun.records import Action, Answer, Exchange, Failure, Intent
from batchrun.stored import Packer
from batchrun.transport import Transport
from batchrun.wire import AnswerReader

_CONNECT_SECONDS = 10.0
_STOPPED_SECONDS = 1.0
"""A timer that is so late tells that the process, or the machine, was stopped."""
_GRACE_SECONDS = 5.0
_MOST_ERROR_BYTES = 1024 * 1024


class Chat:
    """Asks one endpoint.

    Args:
        timeout_seconds: the whole of one attempt, keep-alives notwithstanding.
        transport: for tests; default is aiohttp's connections.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        concurrency: int,
        timeout_seconds: float,
        max_response_bytes: int,
        streamed: bool,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._url = httpx.URL(endpoint.url("chat/completions"))
        self._headers = httpx.Headers(
            {
                "Accept": "text/event-stream" if streamed else "application/json",
                "Accept-Encoding": ACCEPTED,
                "Content-Type": "application/json",
                "Host": self._url.netloc.decode("ascii"),
                "User-Agent": f"batchrun/{__version__}",
                **endpoint.headers,
            }
        )
        self._scrubber = endpoint.scrubber
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_response_bytes
        self._streamed = streamed
        self._packer = Packer()
        # Shorter than the whole: a connection that was never made must be known as such.
        connect_seconds = min(_CONNECT_SECONDS, 0.9 * timeout_seconds)
        self._transport = transport or Transport(
            endpoint.base_url, concurrency=concurrency, connect_seconds=connect_seconds
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.aclose()

    async def ask(self, body: bytes, client_request_id: str) -> Exchange:
        """Send one request. What goes wrong on the way is a value in the exchange, never an exception.

        Its cost is what the provider has reported; see `priced`.
        """
        # Given a stream, httpx leaves the headers as they are; the transport adds the length.
        request = httpx.Request("POST", self._url, headers=self._headers, stream=httpx.ByteStream(body))
        request.headers["X-Client-Request-Id"] = client_request_id
        loop = asyncio.get_running_loop()
        reception = _Reception(loop.time())
        limit = asyncio.timeout(None)
        timer = loop.call_later(self._timeout_seconds, self._expire, limit, reception.started)
        try:
            async with limit:
                response = await self._transport.handle_async_request(request)
                reception.status = response.status_code
                reception.headers = self._headers_of(response)
                assert isinstance(response.stream, httpx.AsyncByteStream)
                try:
                    await self._receive(response.stream, reception)
                finally:
                    await response.stream.aclose()
        except TimeoutError:
            reception.broke = Failure(
                "timeout",
                Action.RETRY,
                f"no whole answer within timeout_seconds ({self._timeout_seconds:g} s)",
            )
        except (httpx.HTTPError, ValueError) as exc:
            reception.broke = self._broken(exc)
        finally:
            timer.cancel()
        return self._exchange(reception)

    def _expire(self, limit: asyncio.Timeout, started: float) -> None:
        """The time is over; but a process that was stopped meanwhile first reads what has come."""
        now = asyncio.get_running_loop().time()
        was_stopped = now - started - self._timeout_seconds >= _STOPPED_SECONDS
        limit.reschedule(now + (min(self._timeout_seconds, _GRACE_SECONDS) if was_stopped else 0.0))

    def _headers_of(self, response: httpx.Response) -> dict[str, str]:
        """By their names in lower case; httpx would look at all of them again for each."""
        headers: dict[str, str] = {}
        for raw_name, raw_value in response.headers.raw:
            name, value = raw_name.decode("latin-1").lower(), self._scrubber.text(raw_value.decode("latin-1"))
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return headers

    async def _receive(self, stream: httpx.AsyncByteStream, reception: _Reception) -> None:
        assert reception.status is not None
        is_success = 200 <= reception.status < 300
        most = self._max_bytes if is_success else min(self._max_bytes, _MOST_ERROR_BYTES)
        if is_success:
            reception.reader = self._reader(reception)
        try:
            inflater = Inflater(reception.headers.get("content-encoding", ""), most)
        except UnaskedError as exc:
            reception.broke = Failure("malformed", Action.RETRY, str(exc))
            return
        async for packed in stream:
            try:
                piece = inflater.feed(packed)
            except TooLongError:
                reception.broke = Failure(
                    "malformed", Action.REJECT, f"the answer is longer than max_response_bytes ({most})"
                ) if is_success else None  # fmt: skip
                return
            reception.pieces.append(piece)
            reader = reception.reader
            if reader is not None and self._streamed:
                reader.feed(piece)
                if reception.first_token is None and reader.has_content:
                    reception.first_token = asyncio.get_running_loop().time()
                if reader.is_done:
                    return  # some servers keep the connection open after [DONE]

    def _exchange(self, reception: _Reception) -> Exchange:
        received = b"".join(reception.pieces)
        raw = self._scrubber.raw(received)
        body = self._packer.pack(raw)
        now = asyncio.get_running_loop().time()
        first = reception.first_token

        def exchange(outcome: str, **found: Any) -> Exchange:
            return Exchange(
                outcome,
                status=reception.status,
                streamed=self._streamed,
                latency_seconds=now - reception.started,
                first_token_seconds=first - reception.started if first is not None else None,
                **found,
            )

        request_id = request_id_of(reception.headers)
        if reception.status is None:
            failure = reception.broke
            assert failure is not None
            if failure.kind == "connect":
                return exchange("failed", failure=failure, cost=NOT_BILLED)
            return exchange("unknown", failure=failure)
        reader = reception.reader
        if reader is None:
            # An HTTP error answer is not billed, even if the connection broke while it came.
            failure = self._scrubbed(read_failure(reception.status, reception.headers, raw))
            return exchange(
                "failed", body=body, failure=failure, cost=NOT_BILLED, request_id=request_id or failure.request_id
            )
        if raw != received:
            # The server has echoed a secret: what is kept is what is read.
            reader = self._reader(reception)
        if not self._streamed or raw != received:
            reader.feed(raw)
        result = reader.close(reception.broke)
        if isinstance(result, Answer):
            cost = Cost(result.usd, result.usd_source) if result.usd is not None else UNKNOWN
            if self._scrubber.is_in(_texts_of(result)):
                return exchange("failed", failure=_TOLD_SECRET, usage=result.usage, cost=cost, request_id=request_id)
            return exchange(
                "ok",
                body=body,
                answer=result,
                usage=result.usage,
                cost=cost,
                flags=result.flags,
                request_id=request_id or result.answer_id,
            )
        never_came = result is reception.broke or result.kind == "incomplete_stream"
        return exchange(
            "unknown" if never_came else "failed",
            body=body,
            failure=self._scrubbed(result),
            usage=reader.usage,
            cost=_failed_cost(reader),
            request_id=request_id or result.request_id,
        )

    def _reader(self, reception: _Reception) -> AnswerReader:
        return AnswerReader(reception.headers, streamed=self._streamed, cost_in_usage=self._endpoint.cost_in_usage)

    def _broken(self, exc: Exception) -> Failure:
        """A connection that failed. Only one that was never made is known to have cost nothing."""
        message = self._scrubber.text(str(exc))
        was_never_made = isinstance(exc, httpx.ConnectError)
        return Failure("connect" if was_never_made else "disconnect", Action.RETRY, message)

    def _scrubbed(self, failure: Failure) -> Failure:
        """What is decoded can hold what the bytes do not show."""
        texts = (failure.code, failure.upstream_type, failure.request_id)
        code, upstream_type, request_id = (text and self._scrubber.text(text) for text in texts)
        message = self._scrubber.text(failure.message)
        return replace(failure, message=message, code=code, upstream_type=upstream_type, request_id=request_id)


def _failed_cost(reader: AnswerReader) -> Cost:
    """A 2xx that brought no answer: what the provider reports; nothing, if it brought only an error."""
    usd, source = reader.reported_cost()
    if usd is not None:
        return Cost(usd, source)
    return NOT_BILLED if reader.is_bare_error else UNKNOWN


_TOLD_SECRET = Failure("malformed", Action.REJECT, "the answer spells out a secret of this job, and was not kept")


def priced(exchange: Exchange, pricing: Pricing, sent_at: int) -> Exchange:
    """An exchange with the price of what its provider has reported no cost of.

    Args:
        sent_at: microseconds since 1970, UTC.
    """
    if exchange.answer is None and exchange.failure != _TOLD_SECRET:
        was_received = exchange.status is not None and 200 <= exchange.status < 300
        is_local = pricing.source == "local" and was_received and exchange.cost.source in (None, NOT_BILLED.source)
        return exchange._replace(cost=LOCAL) if is_local else exchange
    if exchange.cost.usd is None and pricing.source == "local":
        return exchange._replace(cost=LOCAL)
    estimate = pricing.usd(exchange.usage, sent_at)
    if exchange.cost.usd is None:
        return exchange if estimate is None else exchange._replace(cost=Cost(estimate, pricing.source))
    if estimate and exchange.answer is not None and not is_plausible(estimate, exchange.cost.usd):
        # The reported cost is far from what its tokens should cost.
        return exchange._replace(flags=(*exchange.flags, "suspicious_cost"))
    return exchange


class ChatSender(Chat):
    """Sends requests to one endpoint, from this process.

    Args:
        pricings: by model; used where the provider reports no cost.
    """

    def __init__(self, endpoint: Endpoint, *, pricings: Mapping[str, Pricing], **how: Unpack[_How]) -> None:
        super().__init__(endpoint, **how)
        self._pricings = pricings

    async def send(self, intent: Intent) -> Exchange:
        """Send one request; what became of it, and what it cost."""
        exchange = await self.ask(intent.request.body, intent.client_request_id)
        return priced(exchange, self._pricings[intent.request.slot.model], intent.sent_at)


class _How(TypedDict, total=False):
    concurrency: Required[int]
    timeout_seconds: Required[float]
    max_response_bytes: Required[int]
    streamed: Required[bool]
    transport: httpx.AsyncBaseTransport | None


def _texts_of(answer: Answer) -> Iterator[str | None]:
    yield from (answer.text, answer.reasoning, answer.model, answer.answer_id, answer.finish_reason_raw)
    for call in answer.tool_calls:
        function = call["function"]
        yield call["id"] if isinstance(call["id"], str) else None
        if isinstance(function, dict):
            yield from function.values()


class _Reception:
    """What has come of an answer so far."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}
        self.pieces: list[bytes] = []
        self.reader: AnswerReader | None = None
        self.first_token: float | None = None
        self.broke: Failure | None = None
