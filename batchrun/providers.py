"""The table of known providers, and the endpoint that a job's provider resolves to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from batchrun.errors import JobError, MissingHereError
from batchrun.scrub import Scrubber

ResponseFormat = Literal["json_schema", "bare", "json_object"]
"""How a provider takes the form of an answer: an object's schema alone, any schema, or only the wish for an object."""


@dataclass(frozen=True, slots=True)
class Provider:
    """What is known of a provider. `base_url` None must be given in the job."""

    base_url: str | None
    api_key_env: str | None = None
    system: str = "message"
    """Where the system prompt goes: a `message` of that role, or `top_level` (the field `system`)."""
    include_usage: bool = True
    """Ask streams for usage by `stream_options`."""
    cost_in_usage: bool = False
    """`usage.cost` is this provider's own charge (OpenRouter), not an upstream's."""
    is_free: bool = False
    """Runs on the user's own machines: nobody bills by token."""
    price_query: Mapping[str, str] | None = None
    """What `GET /models` must be asked to list prices; None for a provider that publishes none there."""
    has_logs: bool = False
    """`GET /v2/logs` lists what each request was billed, by our own request id (AI/ML API)."""
    response_format: ResponseFormat | None = "json_schema"
    """None: not at all, so that the prompt must say it."""


PROVIDERS: Mapping[str, Provider] = {
    # Its two generations of request schema differ in `stream_options` and `response_format`, so neither is sent unless
    # asked for.
    "aimlapi": Provider(
        "https://api.aimlapi.com/v1",
        "AIML_API_KEY",
        include_usage=False,
        price_query={"include": "pricing"},
        has_logs=True,
        response_format=None,
    ),
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "openrouter": Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", cost_in_usage=True, price_query={}),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY", response_format="json_object"),
    "groq": Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "together": Provider("https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY", include_usage=False),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "ollama": Provider("http://127.0.0.1:11434/v1", is_free=True),
    "vllm": Provider("http://127.0.0.1:8000/v1", is_free=True),
    "llama.cpp": Provider("http://127.0.0.1:8080/v1", is_free=True, response_format="bare"),
    # The model server that batchrun itself starts: its address is known once it runs.
    "local": Provider("http://127.0.0.1/v1", is_free=True, response_format="bare"),
}
CUSTOM = Provider(None, response_format=None)


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and how they must look. Its repr holds no secret."""

    name: str
    base_url: str
    identity: str
    """What stands for the address in a request's key: for `local` the weights, never the port."""
    system: str
    include_usage: bool
    cost_in_usage: bool
    is_free: bool
    price_query: Mapping[str, str] | None = None
    has_logs: bool = False
    response_format: ResponseFormat | None = None
    key_variable: str | None = None
    """The environment variable that the key was read from."""
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    secrets: tuple[str, ...] = field(repr=False, default=())
    """Values that must never be written anywhere."""

    @cached_property
    def scrubber(self) -> Scrubber:
        """Takes the secrets out of what a server says: it may echo them."""
        return Scrubber(self.secrets)

    def url(self, path: str) -> str:
        """An address below the base; a query of the base stays at its end."""
        parts = urlsplit(self.base_url)
        return parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()


_FORMATS: Mapping[str, ResponseFormat | None] = {
    "json_schema": "json_schema", "bare": "bare", "json_object": "json_object", "none": None,
}  # fmt: skip
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|credential|password", re.IGNORECASE)
_SHORTEST_SECRET = 8


def is_loopback(host: str) -> bool:
    """True for this machine's own addresses."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address; never one for this machine's own."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    return getproxies().get(parts.scheme)


def secret_in_plain_sight(name: str, value: str) -> bool:
    """True for a header that carries a secret written out instead of read from the environment."""
    return bool(_SECRET_HEADER.search(name)) and not _VARIABLE.search(value)


class _Environment:
    """Fills in `${VAR}`, and remembers the values, which must be written nowhere."""

    def __init__(self, environ: Mapping[str, str] | None) -> None:
        self._environ = environ
        self.values: list[str] = []

    def expand(self, text: str, where: str) -> str:
        """Raises a MissingHereError that names each variable that is not set."""
        if self._environ is None:
            return text
        environ = self._environ
        missing = sorted({name for name in _VARIABLE.findall(text) if name not in environ})
        if missing:
            raise MissingHereError(f"{where} names {', '.join(missing)}, which is not set in the environment")
        self.values += [environ[name].strip() for name in _VARIABLE.findall(text)]
        return _VARIABLE.sub(lambda match: environ[match[1]].strip(), text)

    def key(self, variable: str) -> str:
        """An API key; empty if it is not set."""
        value = self._environ.get(variable, "").strip() if self._environ is not None else ""
        self.values += [value] if value else []
        return value


def resolve(
    name: str,
    *,
    environ: Mapping[str, str] | None,
    base_url: str | None = None,
    api_key_env: str | None = None,
    headers: Mapping[str, str] | None = None,
    system: str | None = None,
    include_usage: bool | None = None,
    response_format: ResponseFormat | Literal["none"] | None = None,
    allow_insecure_http: bool = False,
) -> Endpoint:
    """The endpoint of a provider by name, with what the job sets over the table's values.

    Args:
        environ: where keys and `${VAR}` are read; None for an endpoint that nothing will be sent to.

    Raises:
        JobError: no address, or a key that would go where it should not.
        MissingHereError: no key, or a variable that is not set.
    """
    known = PROVIDERS.get(name, CUSTOM)
    written = base_url or known.base_url
    if written is None:
        raise JobError(f"provider {name!r} is not known: give it a base_url (known: {', '.join(PROVIDERS)})")
    environment = _Environment(environ)
    url = environment.expand(written, "provider.base_url")
    host = "" if environ is None else _check_address(url, written)
    filled = {key: environment.expand(text, f"provider.headers.{key}") for key, text in (headers or {}).items()}
    variable = api_key_env or known.api_key_env
    if variable is not None and environ is not None:
        key = environment.key(variable)
        # A known provider at an address of the job's own may be a gateway that wants no key.
        if not key and (api_key_env is not None or base_url is None):
            raise MissingHereError(f"no API key: set the environment variable {variable} (provider {name!r})")
        if key and api_key_env is None and not is_loopback(host) and host != urlsplit(known.base_url or "").hostname:
            raise JobError(
                f"{variable} is the key of {name}, and {host} is another host: to send it there, "
                f"write provider: {{api_key_env: {variable}}}"
            )
        if key:
            filled["Authorization"] = f"Bearer {key}"
    for header, value in filled.items():
        if not value.isascii() or not value.isprintable():
            raise JobError(f"the header {header} has characters that HTTP cannot carry: look at its variable")
    if environment.values and url.startswith("http:") and not is_loopback(host) and not allow_insecure_http:
        raise JobError(
            f"the key would go to {host} over plain HTTP: use https, or set "
            "provider: {allow_insecure_http: true} if that network is yours"
        )
    return Endpoint(
        name=name,
        base_url=url,
        identity=_identity(written, url),
        system=system or known.system,
        include_usage=known.include_usage if include_usage is None else include_usage,
        cost_in_usage=known.cost_in_usage,
        is_free=known.is_free,
        price_query=known.price_query,
        has_logs=known.has_logs,
        response_format=known.response_format if response_format is None else _FORMATS[response_format],
        key_variable=variable if "Authorization" in filled else None,
        headers=filled,
        secrets=tuple(value for value in environment.values if len(value) >= _SHORTEST_SECRET),
    )


def _check_address(url: str, written: str) -> str:
    """The host of an address, or a JobError; that shows it as it is written: a variable's value may be secret."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        why = f": {exc}" if url == written else ""
        raise JobError(f"provider.base_url {written!r} is no address{why}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise JobError(f"provider.base_url {written!r} is no address: write https://host/v1")
    if parts.username or parts.password:
        raise JobError("provider.base_url holds a user name or password: set api_key_env instead")
    if parts.fragment or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise JobError(f"provider.base_url {written!r} holds a blank or a #: write https://host/v1")
    try:
        host.encode("idna")
    except UnicodeError:
        raise JobError(f"provider.base_url {written!r}: that is no host") from None
    return host


def _identity(written: str, url: str) -> str:
    """What of an address can change an answer: scheme, host, port, path and query; never the value of a variable."""
    if _VARIABLE.search(written):
        return f"{written}#{blake2b(url.encode(), digest_size=8).hexdigest()}"
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}{parts.path.rstrip('/')}{query}"
