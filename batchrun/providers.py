"""The table of known providers, and the endpoint that a job's provider resolves to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from batchrun.errors import JobError


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


PROVIDERS: Mapping[str, Provider] = {
    # Its two generations of request schema differ in `stream_options`, so it is not sent unless asked for.
    "aimlapi": Provider("https://api.aimlapi.com/v1", "AIML_API_KEY", include_usage=False),
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "openrouter": Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", cost_in_usage=True),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "groq": Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "together": Provider("https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY", include_usage=False),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "ollama": Provider("http://127.0.0.1:11434/v1", is_free=True),
    "vllm": Provider("http://127.0.0.1:8000/v1", is_free=True),
    "llama.cpp": Provider("http://127.0.0.1:8080/v1", is_free=True),
    # The model server that batchrun itself starts: its address is known once it runs.
    "local": Provider("http://127.0.0.1/v1", is_free=True),
}
CUSTOM = Provider(None)


@dataclass(frozen=True, slots=True)
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
    headers: Mapping[str, str] = field(repr=False, default_factory=dict)
    secrets: tuple[str, ...] = field(repr=False, default=())
    """Values that must never be written anywhere."""


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|credential|password", re.IGNORECASE)


def _expand(text: str, environ: Mapping[str, str] | None, where: str) -> str:
    """Fill in `${VAR}` from the environment; a JobError names each variable that is not set."""
    if environ is None:
        return text
    missing = sorted({name for name in _VARIABLE.findall(text) if name not in environ})
    if missing:
        raise JobError(f"{where} names {', '.join(missing)}, which is not set in the environment")
    return _VARIABLE.sub(lambda match: environ[match[1]], text)


def is_loopback(host: str) -> bool:
    """True for this machine's own addresses."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def secret_in_plain_sight(name: str, value: str) -> bool:
    """True for a header that carries a secret written out instead of read from the environment."""
    return bool(_SECRET_HEADER.search(name)) and not _VARIABLE.search(value)


def identity_of(base_url: str) -> str:
    """Scheme, host, port and path of an address: what of it can change an answer."""
    parts = urlsplit(base_url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}{parts.path.rstrip('/')}"


def resolve(
    name: str,
    *,
    environ: Mapping[str, str] | None,
    base_url: str | None = None,
    api_key_env: str | None = None,
    headers: Mapping[str, str] | None = None,
    system: str | None = None,
    include_usage: bool | None = None,
    allow_insecure_http: bool = False,
) -> Endpoint:
    """The endpoint of a provider by name, with what the job sets over the table's values.

    Args:
        environ: where keys and `${VAR}` are read; None for an endpoint that nothing will be sent to.

    Raises:
        JobError: no address, no key, or a key that would cross a network in the clear.
    """
    known = PROVIDERS.get(name, CUSTOM)
    url = base_url or known.base_url
    if url is None:
        raise JobError(
            f"provider {name!r} is not in the table of known providers: give it a base_url "
            f"(known: {', '.join(PROVIDERS)})"
        )
    url = _expand(url, environ, "provider.base_url").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JobError(f"provider.base_url {url!r} is no address: write https://host/v1")
    if parts.username or parts.password:
        raise JobError("provider.base_url holds a user name or password: set api_key_env instead")
    filled = {key: _expand(text, environ, f"provider.headers.{key}") for key, text in (headers or {}).items()}
    secrets = [filled[key] for key, text in (headers or {}).items() if _VARIABLE.search(text)]
    variable = api_key_env or known.api_key_env
    key = environ.get(variable, "").strip() if variable is not None and environ is not None else ""
    # A known provider at an address of the job's own may be a gateway that wants no key.
    is_wanted = environ is not None and variable is not None and (api_key_env is not None or base_url is None)
    if is_wanted and not key:
        raise JobError(f"no API key: set the environment variable {variable} (provider {name!r})")
    if key:
        if not key.isascii() or not key.isprintable():
            raise JobError(f"the API key in {variable} has characters that no HTTP header can carry")
        filled["Authorization"] = f"Bearer {key}"
        secrets.append(key)
    if secrets and parts.scheme == "http" and not is_loopback(parts.hostname) and not allow_insecure_http:
        raise JobError(
            f"the key would go to {parts.hostname} over plain HTTP: use https, or set "
            "provider: {allow_insecure_http: true} if that network is yours"
        )
    return Endpoint(
        name=name,
        base_url=url,
        identity=identity_of(url),
        system=system or known.system,
        include_usage=known.include_usage if include_usage is None else include_usage,
        cost_in_usage=known.cost_in_usage,
        is_free=known.is_free,
        headers=filled,
        secrets=tuple(secret for secret in secrets if len(secret) >= 4),
    )
