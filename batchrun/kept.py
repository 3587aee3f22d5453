"""Answers that the ledger has kept → what they say; the usual ones by a short way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, MsgspecError, Struct, UnsetType
from msgspec.json import Decoder

from batchrun.documents import sound
from batchrun.records import Answer, Failure
from batchrun.wire import read_answer

_Nothing = Annotated[list[Any], Meta(max_length=0)] | Literal[""] | None


class _Message(Struct, gc=False):
    content: str
    reasoning_content: _Nothing = None
    reasoning: _Nothing = None
    reasoning_details: _Nothing = None
    refusal: _Nothing = None
    tool_calls: _Nothing = None
    function_call: _Nothing = None


class _Choice(Struct, gc=False):
    index: Literal[0]
    finish_reason: Literal["stop"]
    message: _Message
    error: _Nothing = None
    delta: UnsetType = UNSET


class _Usual(Struct, gc=False):
    """A document that brings a text and nothing else, as nearly all do; what it says besides is passed over."""

    id: str
    model: str
    choices: Annotated[list[_Choice], Meta(min_length=1, max_length=1)]
    error: _Nothing = None
    event: _Nothing = None
    x_groq: _Nothing = None


_usual = Decoder(_Usual).decode


def read_kept(raw: bytes, *, streamed: bool) -> Answer | Failure:
    """Read an answer that the ledger has kept, for what it says.

    Its usage and its cost, and the flags that hang on them, are what the ledger has, and not those of this answer.
    """
    return (None if streamed else _read_usual(raw)) or read_answer(raw, {}, streamed=streamed)


def _read_usual(raw: bytes) -> Answer | None:
    """What an answer says, but for its counts; None if it is none of the usual ones."""
    try:
        found = _usual(raw)
    except (MsgspecError, UnicodeError, RecursionError):
        return None
    text = found.choices[0].message.content
    if not (text.strip() and found.model and found.id):
        return None
    return Answer(sound(text), "stop", "stop", model=sound(found.model), answer_id=sound(found.id))
