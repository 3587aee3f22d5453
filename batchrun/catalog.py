"""What a provider says of its own models: which are withdrawn, and which there are."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Mapping
from typing import Any

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
    proxy = proxy_for(endpoint.base_url)
    with httpx.Client(timeout=_SECONDS, headers=dict(endpoint.headers), trust_env=False, proxy=proxy) as client:
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


def _fetch(client: httpx.Client, url: str) -> Any:
    end = time.monotonic() + _SECONDS
    body = bytearray()
    try:
        with client.stream("GET", url) as response:
            if response.status_code != 200:
                return None
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MOST_BYTES or time.monotonic() > end:
                    return None
        return parse_json(bytes(body))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None  # advice is worth no error of its own


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
