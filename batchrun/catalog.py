"""What a provider says of its own models: which there are, which are withdrawn, and what they cost."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import httpx

from batchrun.documents import parse_json, sound
from batchrun.providers import Endpoint, proxy_for

_SECONDS = 5.0
_MOST_BYTES = 32 * 1024 * 1024


def model_advice(endpoint: Endpoint, model: str) -> str | None:
    """What to use instead of a model that the provider does not know; None if its lists do not tell.

    AI/ML API lists withdrawn models with their successors (`GET /models/deprecations`); all providers list those that
    they have (`GET /models`).
    """
    with _client(endpoint) as client:
        for entry in _entries(_fetch(client, endpoint.url("models/deprecations"))):
            if model in _names(entry) and entry.get("status") != "deprecated":
                successor = entry.get("replaced_by")
                instead = f", use {successor!r}" if isinstance(successor, str) and successor else ""
                return f"model {model!r} is withdrawn{instead}"
        known = [name for entry in _entries(_fetch(client, endpoint.url("models"))) for name in _names(entry)]
    if not known or model in known:
        return None
    # The same model under its vendor's prefix comes before one that is merely spelled alike.
    same = [name for name in known if name.rpartition("/")[2] == model.rpartition("/")[2]]
    near = list(dict.fromkeys(same + difflib.get_close_matches(model, known, 3)))[:3]
    nearest = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
    return f"the provider has no model {model!r}{nearest}"


class PriceList(NamedTuple):
    """What asking for a list has brought."""

    is_unchanged: bool
    """It is the one whose ETag was sent."""
    body: bytes = b""
    etag: str | None = None


def price_list(endpoint: Endpoint, etag: str | None) -> PriceList | None:
    """The provider's list of models with their prices; None if it cannot be had.

    It is public, and asked for without the key.
    """
    if endpoint.price_query is None:
        return None
    try:
        url = httpx.URL(endpoint.url("models")).copy_merge_params(dict(endpoint.price_query))
    except httpx.InvalidURL:  # a variable that is not set here
        return None
    with _client(endpoint, {"If-None-Match": etag} if etag and etag.isascii() and etag.isprintable() else {}) as client:
        status, body, new_etag = _read(client, str(url))
    if status == httpx.codes.NOT_MODIFIED and etag is not None:
        return PriceList(True)
    return PriceList(False, body, new_etag) if status == httpx.codes.OK and _parsed(body) is not None else None


def model_entry(document: bytes, model: str) -> Mapping[str, Any] | None:
    """A model's entry in a list of models, by its id or an alias; None if it is not there."""
    entries = [entry for entry in _entries(_parsed(document)) if model in _names(entry)]
    # An id that is another model's alias as well is that of its own entry.
    return next((entry for entry in entries if entry.get("id") == model), entries[0] if entries else None)


def _client(endpoint: Endpoint, headers: Mapping[str, str] | None = None) -> httpx.Client:
    sent = dict(endpoint.headers) if headers is None else dict(headers)
    return httpx.Client(timeout=_SECONDS, headers=sent, trust_env=False, proxy=proxy_for(endpoint.base_url))


def _fetch(client: httpx.Client, url: str) -> Any:
    status, body, _ = _read(client, url)
    return _parsed(body) if status == httpx.codes.OK else None


def _parsed(body: bytes) -> Any:
    try:
        return parse_json(body)
    except ValueError:
        return None


def _read(client: httpx.Client, url: str) -> tuple[int, bytes, str | None]:
    """Status, body and ETag; status 0 if no whole answer came."""
    end = time.monotonic() + _SECONDS
    body = bytearray()
    try:
        with client.stream("GET", url) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MOST_BYTES or time.monotonic() > end:
                    return 0, b"", None
            return response.status_code, bytes(body), response.headers.get("etag")
    except (httpx.HTTPError, httpx.InvalidURL):
        return 0, b"", None  # advice is worth no error of its own, and a price has other sources


def _entries(document: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(document, Mapping):
        document = document.get("data", document.get("models"))
    for entry in document if isinstance(document, list) else ():
        if isinstance(entry, Mapping):
            yield entry


def _names(entry: Mapping[str, Any]) -> list[str]:
    aliases = entry.get("aliases")
    names = [entry.get("id"), *(aliases if isinstance(aliases, list) else ())]
    return [sound(name) for name in names if isinstance(name, str)]
