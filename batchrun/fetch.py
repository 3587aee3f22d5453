"""Small documents of a provider by GET: whole, in bounded time and memory, or not at all. No redirect is followed."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

import httpx

from batchrun.errors import MissingHereError
from batchrun.inflate import Inflater, TooLongError, UnaskedError
from batchrun.providers import proxy_for


class FetchError(Exception):
    """No whole answer came."""


class Fetched(NamedTuple):
    """An answer. `headers` has lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Fetcher:
    """Asks one server.

    Args:
        base_url: tells which proxy the environment names for it.
        seconds: for each answer, from the first byte sent to the last one received.
        most_bytes: of each answer.

    Raises:
        MissingHereError: this machine's certificates cannot be read.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str], *, seconds: float, most_bytes: int) -> None:
        self._seconds = seconds
        self._most_bytes = most_bytes
        proxy = proxy_for(base_url)
        self._client = httpx.AsyncClient(
            timeout=None,
            headers={**headers, "Accept-Encoding": "gzip"},
            trust_env=False,
            proxy=proxy,
            verify=tls_context(base_url, proxy),
        )
        self._runner = asyncio.Runner()

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def get(self, url: httpx.URL | str) -> Fetched:
        """One answer.

        Raises:
            FetchError: it did not come, or not whole, in time or within the bound.
        """
        return self._runner.run(self._get(url))

    async def _get(self, url: httpx.URL | str) -> Fetched:
        try:
            async with asyncio.timeout(self._seconds), self._client.stream("GET", url) as response:
                inflater = Inflater(response.headers.get("content-encoding", ""), self._most_bytes)
                body = b"".join([inflater.feed(piece) async for piece in response.aiter_raw()])
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Fetched(response.status_code, headers, body)
        except TimeoutError:
            raise FetchError(f"no whole answer within {self._seconds:g} s") from None
        except TooLongError:
            raise FetchError(f"the answer is longer than {self._most_bytes} bytes") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnaskedError, ValueError) as exc:
            raise FetchError(f"{type(exc).__name__}: {exc}") from exc


def tls_context(*urls: str | None) -> ssl.SSLContext:
    """What this machine trusts, as `SSL_CERT_FILE` and `SSL_CERT_DIR` say; nobody, if none of the URLs asks for TLS.

    Raises:
        MissingHereError: it cannot be read.
    """
    if not any(url and url.lower().startswith("https:") for url in urls):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx.create_ssl_context()
    except (OSError, ssl.SSLError) as exc:
        raise MissingHereError(
            f"this machine's certificates cannot be read: {exc}: set SSL_CERT_FILE to a file that "
            "holds them, or unset it"
        ) from exc
