"""An answer → the one label that it names, or why it names none."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from batchrun.documents import sound
from batchrun.errors import JobError, listed
from batchrun.tolerant import BrokenError, NoJSONError, decode, documents_in, shown, undecorated, without_reasoning

_LONGEST = 200_000
"""Characters of an answer that a label is looked for in."""


class NoLabelError(ValueError):
    """An answer that names no label, or more than one."""


class _Word(NamedTuple):
    folded: str
    written: str
    start: int
    end: int


class Labels:
    """The labels of a job, and how to find one in an answer.

    Raises:
        JobError: none; one that is no text or blank; two that differ in case or spaces alone.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        if not labels:
            raise JobError("labels: name at least one")
        self._by_key: dict[str, str] = {}
        for label in labels:
            if not isinstance(label, str):
                raise JobError(f"labels: {shown(label)} is no text; write it in quotes")
            if not _folded(label):
                raise JobError("labels: one is blank")
            if (twin := self._by_key.get(_folded(label))) is not None:
                raise JobError(f"labels: {shown(twin)} and {shown(label)} are the same but for case and spaces")
            self._by_key[_folded(label)] = sound(label)
        self.names = tuple(self._by_key.values())
        # With its decoration no label is longer than this.
        self._longest = 1000 + max(map(len, self.names))
        bare = Counter(_folded(list(undecorated(label))[-1]) for label in self.names)
        self._shared = {key for key, number in bare.items() if number > 1}
        self._by_words: dict[tuple[str, ...], str | None] = {}
        self._lengths: dict[str, list[int]] = {}
        for label in self._by_key.values():
            words = tuple(word.folded for word in _words(label))
            # Two labels of the same words ("n/a", "n / a") are told apart only where one is the whole answer.
            self._by_words[words] = label if words not in self._by_words else None
            self._lengths[words[0]] = sorted({*self._lengths.get(words[0], ()), len(words)}, reverse=True)
        # Of a label that is part of others: the words that these have besides.
        self._extensions: dict[str, list[set[str]]] = {}
        for words in self._by_words:
            for start, word in enumerate(words):
                for length in self._lengths.get(word, ()):
                    inner = self._by_words.get(words[start : start + length])
                    if inner is not None and length < len(words):
                        rest = {*words[:start], *words[start + length :]}
                        self._extensions.setdefault(inner, []).append(rest)

    def alike(self, text: str) -> str | None:
        """The label that a text is, but for case, spaces and what stands around it."""
        if len(text) > self._longest:
            return None
        *plain, unquoted, bare = map(_folded, undecorated(text))
        # Where labels differ in marks alone, marks are not taken off.
        for key in plain if bare in self._shared else (*plain, unquoted, bare):
            if (label := self._by_key.get(key)) is not None:
                return label
        return None

    def whole(self, text: str) -> str | None:
        """The label that a text is although it was cut off: no other begins with what is there."""
        label = self.alike(text)
        others = [key for key, name in self._by_key.items() if name != label]
        return label if label is not None and not any(key.startswith(_folded(label)) for key in others) else None

    def find(self, text: str) -> str:
        """The label that an answer names, as the job writes it.

        What decides, the first that applies:

        1. The whole answer is one label, in any case and with quotes, punctuation, Markdown or a fence around it.
        2. The answer holds a JSON object: its `label`, else its `answer` or the like, else the only label among its
           values. Then nothing else counts. Of an object that is cut or broken only what is named so counts.
        3. The last explicit answer: what follows `Label:`, `Answer:` or the like, or a line that is nothing but a
           label (if no other line is nothing but another one).
        4. The whole words of the text: they name exactly one label. At one place the longest counts, so "not positive"
           is not "positive" where both are labels, and "not really positive" is neither; a letter ("A") must be in its
           own case and not run on into a sentence.

        Language is not understood, so what stands beside a negation in one sentence is not clear ("hardly positive",
        "not positive" where that is no label), nor is a label that runs on into a sentence and is a common word ("no
        doubt"). Reasoning in <think> does not count.

        Raises:
            NoLabelError: none is named, or several are.
        """
        if len(text) > _LONGEST:
            raise NoLabelError(f"too long: {len(text)} characters")
        text = unicodedata.normalize("NFC", sound(_unquoted(without_reasoning(text))))
        if not text.strip():
            raise NoLabelError("the answer is empty")
        if (label := self.alike(text)) is not None:
            return label
        try:
            objects = list(_objects_in(text))
        except BrokenError as exc:
            return self._of_broken(text, exc)
        if objects:
            return self._only([self._of_object(found) for found in objects], text)
        explicit = self._explicit(text)
        return self._named(text if explicit is None else explicit)

    def _of_object(self, found: dict[str, Any]) -> str:
        named = {_folded(name): value for name, value in found.items()}
        if "label" in named:
            return self._of_value(named["label"])
        answers = [value for name, value in named.items() if name in _KEYS]
        if answers:
            return self._only([self._of_value(value) for value in answers], found)
        texts = [_text(value) for value in found.values()]
        return self._only([label for text in texts if (label := self.alike(text)) is not None], found)

    def _of_broken(self, text: str, fault: BrokenError) -> str:
        """Of JSON that cannot be read: the text that is named as an answer, if it is not cut itself."""
        labels = [self._named(match.group(1)) for match in _NAMED.finditer(text)]
        if not labels:
            raise NoLabelError(str(fault))
        return self._only(labels, text)

    def _of_value(self, value: Any) -> str:
        return self._named(_text(value))

    def _only(self, labels: Sequence[str], answer: Any) -> str:
        distinct = list(dict.fromkeys(labels))
        if not distinct:
            raise NoLabelError(f"names none of the labels: {shown(answer)}")
        if len(distinct) > 1:
            raise NoLabelError(f"names several labels: {listed([shown(label) for label in distinct[:4]])}")
        return distinct[0]

    def _explicit(self, text: str) -> str | None:
        """The text of the last explicit answer."""
        crossed = {
            text.rindex("\n", start, end) + 1 for _, _, start, end in self._mentions(text) if "\n" in text[start:end]
        }
        alone = [
            (line.start(), label)
            for line in _LINE.finditer(text)
            # "not\npositive" is one label, and its second line is none.
            if line.start() not in crossed and (label := self.alike(line.group()))
        ]
        keyed = None
        for match in _KEYED.finditer(text):
            keyed = match
        if alone and (keyed is None or alone[-1][0] > keyed.start(1)):
            return self._only([label for _, label in alone], text)
        return keyed.group(1) if keyed is not None else None

    def _named(self, text: str) -> str:
        if (label := self.alike(text)) is not None:
            return label
        clear: dict[str, bool] = {}
        for sentence in _SENTENCE_END.split(text):
            mentions = list(self._mentions(sentence))
            spans = [(start, end) for _, _, start, end in mentions]
            is_negated = any(
                _NEGATION.fullmatch(word.folded) and not any(start <= word.start < end for start, end in spans)
                for word in _words(sentence)
            )
            for label, is_clear, _, _ in mentions:
                clear[label] = clear.get(label, False) or (is_clear and not is_negated)
        label = self._only(list(clear), text.strip())
        words = {word.folded for word in _words(text)} if label in self._extensions else set()
        # "not really positive" has all the words of "not positive", apart.
        if not clear[label] or any(rest <= words for rest in self._extensions.get(label, ())):
            raise NoLabelError(f"does not clearly name {shown(label)}: {shown(text.strip())}")
        return label

    def _mentions(self, text: str) -> Iterator[tuple[str, bool, int, int]]:
        """Labels among the words of a text: each with whether it is surely meant, where it starts and ends."""
        words = list(_words(text))
        covered = 0
        for start, word in enumerate(words):
            for length in self._lengths.get(word.folded, ()):
                end = start + length
                label = self._by_words.get(tuple(other.folded for other in words[start:end]))
                if label is None or end <= covered or end > len(words):
                    continue
                if word.folded in _COMMON and length == 1:
                    # "no doubt" and "on the whole" may or may not mean the labels no and on.
                    yield label, _RUNS_ON.match(text, word.end) is None, word.start, word.end
                elif len(label) > 1 or not label.isalpha():
                    yield label, True, word.start, words[end - 1].end
                elif word.written == label:
                    # "A matter of taste" and "Vitamin A is" may or may not mean the label A.
                    yield label, _RUNS_ON.match(text, word.end) is None, word.start, word.end
                covered = max(covered, end)
                break


def _objects_in(text: str) -> Iterator[dict[str, Any]]:
    try:
        documents = documents_in(text) if "{" in text else []
    except BrokenError:
        raise
    except NoJSONError:
        return
    for document in documents:
        for item in document if isinstance(document, list) else [document]:
            if isinstance(item, dict):
                yield item


def _unquoted(text: str) -> str:
    """The text that an answer is, if it is a JSON string, or a list of one."""
    if text.lstrip()[:1] not in {'"', "["}:
        return text
    try:
        value = decode(text)
    except ValueError:
        return text
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else text


def _text(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _folded(text: str) -> str:
    """Equal for texts that differ in case, spaces or the composition of their characters alone.

    >>> _folded("  Very\\n GOOD ")
    'very good'
    """
    if not text.isascii():
        plain = unicodedata.normalize("NFC", text).replace("\ufe0f", "")
        text = unicodedata.normalize("NFC", plain.casefold())
    return " ".join(text.lower().split())


def _words(text: str) -> Iterator[_Word]:
    for match in _WORD.finditer(text):
        yield _Word(_folded(match.group()), match.group(), match.start(), match.end())


_KEYS = (
    "label", "answer", "classification", "category", "class", "verdict", "conclusion", "prediction", "decision",
    "result", "output", "sentiment", "value",
)  # fmt: skip
_KEYED = re.compile(
    rf"(?<![^\W_])(?:{'|'.join(_KEYS)})[\"'’”*_`\s)]*[:=：](?:[\"']|\*+)?\s*([^\n]*)", re.IGNORECASE
)  # fmt: skip
# Of JSON: the value is closed.
_NAMED = re.compile(rf"(?:{'|'.join(_KEYS)})[\"'”]\s*:\s*[\"'“]([^\"'”]*)[\"'”]", re.IGNORECASE)
_LINE = re.compile(r"[^\n]*\S[^\n]*")
_SENTENCE_END = re.compile(r"[.!?;]+(?=\s|$)|[。！？]|\n\s*(?=\n|[-*•>#])")
_NEGATION = re.compile(
    r"not|no|nor|non|never|neither|none|nothing|nobody|without|cannot|hardly|barely|scarcely|rarely|unlikely|instead"
    r"|than|except|opposite|anything|.*n['’]t|nicht|kein(?:e[mnrs]?)?|nie|niemals|weder|ohne|kaum|pas|jamais|ni|sans"
    r"|ne|sin|nunca|tampoco|senza|não|nem|sem|niet|geen|не|нет|ни|без"
)
_COMMON = frozenset((
    "all", "an", "and", "any", "as", "at", "be", "both", "by", "do", "for", "if", "in", "is", "it", "like", "no",
    "none", "not", "of", "off", "on", "one", "or", "other", "out", "over", "so", "some", "that", "the", "this", "to",
    "under", "up", "well",
))  # fmt: skip
_RUNS_ON = re.compile(r"\s+[^\W\d_]")
# Marks that belong to the letter before them, which \w leaves out: combining ones, vowels of Indic scripts, joiners.
_MARKS = (
    r"\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670"
    r"\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e\u200c\u200d"
)
_LETTER = rf"(?:[^\W_]|[{_MARKS}])"
_WORD = re.compile(
    # A number with what makes it another one: -1, <1, 1.5, 1/2, 1-2, 1 %.
    r"(?:[-+]|[<>≤≥~≈±]=?\s?)?\d+(?:[.,:/–-]\d+)*(?:\s?%)?(?![^\W_])"
    # A word with what makes it another one: non-positive, don't, C++.
    rf"|{_LETTER}+(?:[-_'’]{_LETTER}+)*[+#]*"
    # Any other sign, such as an emoji, with its skin and what is joined to it.
    r"|\S[\ufe0f\U0001F3FB-\U0001F3FF]*(?:\u200d\S[\ufe0f\U0001F3FB-\U0001F3FF]*)*"
)
