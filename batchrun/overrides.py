"""Settings that a call puts in the place of the job file's: `--set parameters.temperature=0.2`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batchrun.errors import JobError
from batchrun.jobfile import Document

_FIXED = ("name", "ledger")
# What a text stands for where the job file may have a text or a mapping.
_SHORT = {"input": "path", "output": "path", "provider": "name", "prompt": "user", "engine": "name"}


def read(assignments: Sequence[str]) -> dict[str, Any]:
    """Overrides from `KEY=VALUE`, where the value is YAML; a message never repeats it, for it may be a secret.

    Raises:
        JobError: one is no assignment, or its value is no YAML.

    >>> read(["parameters.temperature=0.5", "model=[a, b]", "budget="])
    {'parameters.temperature': Decimal('0.5'), 'model': ['a', 'b'], 'budget': None}
    """
    found: dict[str, Any] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        key = key.strip()
        if not sign or not key:
            raise JobError(f"--set {key}: should be KEY=VALUE, such as parameters.temperature=0.2")
        if key in found:
            raise JobError(f"--set {key}: is set twice")
        try:
            document = Document(value)
        except JobError as exc:
            raise JobError(f"--set {key}: {exc}") from exc
        if document.faults:
            raise JobError(f"--set {key}: {'; '.join(document.faults)}")
        found[key] = document.value
    return found


def applied(job: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A job file's mapping with other values at some keys; a dot leads into a mapping.

    Raises:
        JobError: a key names the ledger, or leads into what is no mapping.

    >>> applied({"input": "a.csv", "parameters": {"n": 1}}, {"input.limit": 5, "parameters.max_tokens": 9})
    {'input': {'path': 'a.csv', 'limit': 5}, 'parameters': {'n': 1, 'max_tokens': 9}}
    """
    changed = dict(job)
    keys = [str(key) for key in overrides]
    for key, value in overrides.items():
        first, *others = str(key).split(".")
        if first in _FIXED:
            raise JobError(f"{key}: says where the ledger is, and no call may move that: change the job file")
        if not all((first, *others)):
            raise JobError(f"{key!r} is no key of a job: write it as parameters.temperature")
        for other in keys:
            if other.startswith(f"{key}."):
                raise JobError(f"{key} and {other} are both set: set one of them")
        _put(changed, [first, *others], _sound(value, str(key)), str(key))
    return changed


def _sound(value: Any, key: str) -> Any:
    """A value as YAML could have it."""
    match value:
        case os.PathLike():
            value = os.fspath(value)
        case Mapping():
            return {_sound(name, key): _sound(item, key) for name, item in value.items()}
        case list() | tuple():
            return [_sound(item, key) for item in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise JobError(f"{key}: {value[:60]!r} holds what no UTF-8 can carry") from None
    return value


def _put(job: dict[str, Any], path: Sequence[str], value: Any, key: str) -> None:
    *parents, last = path
    for depth, name in enumerate(parents):
        below = job.get(name)
        if isinstance(below, str) and depth == 0 and name in _SHORT:
            below = {_SHORT[name]: below}
        if below is not None and not isinstance(below, Mapping):
            raise JobError(f"{key}: {name} of the job is no mapping: set {name} itself")
        job[name] = dict(below or {})
        job = job[name]
    job[last] = value


def at(snapshot: Mapping[str, Any], key: str) -> Any:
    """The value at a key; None if there is none.

    >>> at({"budget": {"usd": 1}}, "budget.usd"), at({}, "budget.usd")
    (1, None)
    """
    found: Any = snapshot
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys at which two snapshots of a job differ, with both values; None where one has none.

    >>> list(changes({"model": "a", "budget": {"usd": 1}}, {"model": "b", "budget": {"usd": 1}, "stream": True}))
    [('model', 'a', 'b'), ('stream', None, True)]
    """
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key, *values in changes(old, new):
                yield f"{name}.{key}", values[0], values[1]
        elif old != new:
            yield name, old, new
