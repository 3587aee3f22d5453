"""What a provider says of its own models: which there are, which are withdrawn, and what they cost."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import httpx

from batchrun.documents import parse_json, sound
from batchrun.fetch import Fetched, Fetcher, FetchError
from batchrun.providers import Endpoint

_SECONDS = 5.0
_MOST_BYTES = 32 * 1024 * 1024


def model_advice(endpoint: Endpoint, model: str) -> str | None:
    """What to use instead of a model that the provider does not know; None if its lists do not tell.

    AI/ML API lists withdrawn models with their successors (`GET /models/deprecations`); all providers list those that
    they have (`GET /models`).
    """
    advice = _advice(endpoint, model)
    # The lists were asked for with the key, and a server may echo it.
    return endpoint.scrubber.text(advice) if advice is not None else None


def _advice(endpoint: Endpoint, model: str) -> str | None:
    with _fetcher(endpoint, endpoint.headers) as fetcher:
        for entry in _entries(_fetch(fetcher, endpoint.url("models/deprecations"))):
            if model in _names(entry) and entry.get("status") != "deprecated":
                successor = entry.get("replaced_by")
                instead = f", use {successor!r}" if isinstance(successor, str) and successor else ""
                return f"model {model!r} is withdrawn{instead}"
        known = [name for entry in _entries(_fetch(fetcher, endpoint.url("models"))) for name in _names(entry)]
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
    headers = {"If-None-Match": etag} if etag and etag.isascii() and etag.isprintable() else {}
    with _fetcher(endpoint, headers) as fetcher:
        fetched = _answer(fetcher, url)
    if fetched is None:
        return None
    if fetched.status == httpx.codes.NOT_MODIFIED and etag is not None:
        return PriceList(True)
    is_list = fetched.status == httpx.codes.OK and _parsed(fetched.body) is not None
    body = endpoint.scrubber.raw(fetched.body)
    return PriceList(False, body, fetched.headers.get("etag")) if is_list else None


def model_entry(document: bytes, model: str) -> Mapping[str, Any] | None:
    """A model's entry in a list of models, by its id or an alias; None if it is not there."""
    entries = [entry for entry in _entries(_parsed(document)) if model in _names(entry)]
    # An id that is another model's alias as well is that of its own entry.
    return next((entry for entry in entries if entry.get("id") == model), entries[0] if entries else None)


def _fetcher(endpoint: Endpoint, headers: Mapping[str, str]) -> Fetcher:
    return Fetcher(endpoint.base_url, headers, seconds=_SECONDS, most_bytes=_MOST_BYTES)


def _fetch(fetcher: Fetcher, url: str) -> Any:
    fetched = _answer(fetcher, url)
    return _parsed(fetched.body) if fetched is not None and fetched.status == httpx.codes.OK else None


def _parsed(body: bytes) -> Any:
    try:
        return parse_json(body)
    except ValueError:
        return None


def _answer(fetcher: Fetcher, url: httpx.URL | str) -> Fetched | None:
    try:
        return fetcher.get(url)
    except FetchError:
        return None  # advice is worth no error of its own, and a price has other sources


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
