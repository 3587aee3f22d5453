"""httpx's requests and responses over aiohttp's connections.

httpx's own pool looks at every connection twice for each request: with some hundred of them that costs more than all
the rest. This keeps httpx's types and exceptions; HTTP/1.1, TLS, proxies and pooling are aiohttp's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import aiohttp
import httpx
from yarl import URL

from batchrun.fetch import tls_context
from batchrun.providers import proxy_for

_KEEPALIVE_SECONDS = 15.0
_HEADER_BYTES = 64 * 1024
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)


class Transport(httpx.AsyncBaseTransport):
    """Sends requests to one server, one connection for each that is in flight; follows no redirect.

    To be made inside of a running event loop. Content encodings are left as they came.

    Args:
        base_url: tells which proxy the environment names for it.
        connect_seconds: for the making of a connection, TLS included.

    Raises:
        MissingHereError: this machine's certificates cannot be read.
    """

    def __init__(self, base_url: str, *, concurrency: int, connect_seconds: float) -> None:
        proxy = proxy_for(base_url)
        self._proxy = URL(proxy) if proxy else None
        self._urls: tuple[httpx.URL, URL] | None = None
        self._session = aiohttp.ClientSession(
            connector=_Connector(
                limit=concurrency, keepalive_timeout=_KEEPALIVE_SECONDS, ssl=tls_context(base_url, proxy)
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
            response_class=_Response,
            auto_decompress=False,
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
            trust_env=False,  # it would send what a .netrc holds, and ask a proxy for this very machine
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request whose body is in memory; the answer's head has come, its body is yet to be read.

        Raises:
            httpx.ConnectError: the connection was never made, and nothing was sent.
            httpx.ReadError: it broke after that, or what came is no HTTP.
        """
        body = b"".join(cast("Iterable[bytes]", request.stream))
        try:
            response = await self._session.request(
                request.method,
                self._url(request.url),
                data=body,
                headers={name.decode("ascii"): value.decode("latin-1") for name, value in request.headers.raw},
                allow_redirects=False,
                proxy=self._proxy,
            )
        except _NEVER_SENT as exc:
            raise httpx.ConnectError(_told(exc)) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise httpx.ReadError(_told(exc)) from exc
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()

    def _url(self, url: httpx.URL) -> URL:
        # A job has one address.
        if self._urls is None or self._urls[0] is not url:
            self._urls = (url, URL(str(url), encoded=True))
        return self._urls[1]


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        content = self._response.content
        try:
            while piece := await content.readany():
                yield piece
        except (aiohttp.ClientError, OSError) as exc:
            raise httpx.ReadError(_told(exc)) from exc

    async def aclose(self) -> None:
        # What was read to its end is in the pool again; of anything else nobody knows what comes next.
        self._response.close()


class _Connector(aiohttp.TCPConnector):
    async def _get(self, key: Any, traces: Any) -> Any:
        """A free connection, but none on which something came that nobody had asked for: it is no answer to us."""
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is None or not connection.protocol.should_close:
                break
            connection.close()
        return connection


class _Response(aiohttp.ClientResponse):
    async def start(self, connection: Any) -> _Response:
        """Read the head; its reason phrase is anybody's bytes, and says nothing."""
        await super().start(connection)
        self.reason = None
        return self


def _told(exc: Exception) -> str:
    # What the proxy answered; the text of the exception would hold its address, with name and password.
    what = f"{exc.status} {exc.message}" if isinstance(exc, aiohttp.ClientHttpProxyError) else str(exc)
    return f"{type(exc).__name__}: {what}".rstrip(": ")
