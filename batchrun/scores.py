"""One row: what its answer is worth against the expected value, and which answer its samples voted for."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from decimal import Decimal
from typing import Any
from unicodedata import normalize

from batchrun.documents import parse_json

METRICS = ("accuracy", "f1", "exact_match", "contains", "regex", "json_match", "numeric_close")

_RELATIVE, _ABSOLUTE = 1e-6, 1e-9
_LONGEST_PATTERN, _LONGEST_TEXT = 1_000, 100_000
"""Characters. Beyond them a search may run for seconds before it looks at the clock."""
_SEARCH_SECONDS = 0.1
_MOST_HOPELESS = 10
"""Patterns that ran out of time: one of them is not tried again, and after so many none is."""

# A number that belongs to a word (GPT-4, H2O) is none. The point is decimal, the comma parts thousands.
_NUMBER = re.compile(
    r"""
    (?: (?<![^\W_]) (?P<sign>[-+\u2212]) [$€£¥]? | (?<![^\W_]) (?<![^\W_][-\u2212]) (?<!\d[.,]) )
    (?P<digits> (?: \d{1,3} (?: [,'’_\u00a0\u2009\u202f] \d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )? | (?<!\.)\.\d+ )
    (?P<exponent> [eE] [-+\u2212]? \d+ )?
    (?P<percent> \s? (?: % | percent\b ) )?
    """,
    re.VERBOSE,
)
_SEPARATORS = re.compile("[,'’_\u00a0\u2009\u202f]")


def scored(metrics: Sequence[str]) -> list[str]:
    """The metrics that have a value per row: f1 has none."""
    return [metric for metric in metrics if metric != "f1"]


def score_names(metrics: Sequence[str]) -> list[str]:
    """The columns of `metrics`: float64, 1 for right, 0 for wrong, null where there is nothing to compare with.

    >>> score_names(["accuracy", "f1"])
    ['score_accuracy']
    """
    return [f"score_{metric}" for metric in scored(metrics)]


def decisive(metrics: Sequence[str]) -> str:
    """The metric that says whether a row is right: the first with a value per row, accuracy for f1 alone."""
    return next(iter(scored(metrics)), "accuracy")


def is_stated(value: Any) -> bool:
    """False for what says nothing: null, NaN (a null of pandas) and blank text (the empty cell of a CSV)."""
    # Only NaN differs from itself.
    return value is not None and value == value and not (isinstance(value, str) and not value.strip())


def as_text(value: Any) -> str:
    """A value as the text that a model would write for it.

    >>> as_text(" yes "), as_text(True), as_text(5.0), as_text({"b": 1, "a": None})
    ('yes', 'true', '5', '{"a": null, "b": 1}')
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        # A column of whole numbers with a null in it is often one of floats.
        return str(int(value))
    if isinstance(value, bool | dict | list | tuple):
        try:
            return json.dumps(value, ensure_ascii=False, sort_keys=True, default=_plain)
        except RecursionError:
            return "(nested too deeply)"
    return str(value)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Decimal) else str(value)


class Scorer:
    """Scores rows by some metrics that have a value per row.

    It remembers patterns that ran out of time, so one object serves a whole run.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = metrics
        self._hopeless: set[str] = set()
        known: dict[str, Callable[[Any, Any], bool | None]] = {
            "accuracy": _accuracy,
            "exact_match": _exact_match,
            "contains": _contains,
            "regex": self._regex,
            "json_match": _json_match,
            "numeric_close": _numeric_close,
        }
        self._rules = [known[metric] for metric in metrics]

    def score(self, expected: Any, answered: Any) -> list[float | None]:
        """A value per metric: 1 for right, 0 for wrong or no answer, None if `expected` is none or of no use."""
        if not is_stated(expected):
            return [None] * len(self._rules)
        said = answered if is_stated(answered) else None
        return [None if (right := rule(expected, said)) is None else float(right) for rule in self._rules]

    def _regex(self, expected: Any, answered: Any) -> bool | None:
        """Whether the pattern is found; None for what is no pattern, and for a search that takes too long."""
        # Not re: its searches cannot be bounded, and a pattern may take longer than the sun lasts.
        import regex

        pattern = expected if isinstance(expected, str) else as_text(expected)
        text = "" if answered is None else as_text(answered)
        if len(pattern) > _LONGEST_PATTERN or len(text) > _LONGEST_TEXT:
            return None
        if pattern in self._hopeless or len(self._hopeless) >= _MOST_HOPELESS:
            return None
        try:
            # Also without an answer, so that what is no pattern is so in every row.
            found = regex.search(pattern, text, timeout=_SEARCH_SECONDS)
        except TimeoutError:
            self._hopeless.add(pattern)
            return None
        except (regex.error, RecursionError, OverflowError, ValueError):
            return None
        return answered is not None and found is not None


def _accuracy(expected: Any, answered: Any) -> bool:
    # Letter for letter: scikit-learn on the output's columns must say the same.
    return answered is not None and as_text(expected) == as_text(answered)


def _exact_match(expected: Any, answered: Any) -> bool:
    return answered is not None and normalize("NFC", as_text(expected)) == normalize("NFC", as_text(answered))


def _contains(expected: Any, answered: Any) -> bool:
    return answered is not None and _folded(as_text(expected)) in _folded(as_text(answered))


def _folded(text: str) -> str:
    # Unicode's caseless match: folding can take a composed letter apart.
    return normalize("NFC", normalize("NFD", text).casefold())


def _json_match(expected: Any, answered: Any) -> bool | None:
    try:
        wanted = identity(_document(expected))
    except ValueError:
        return None
    try:
        return answered is not None and identity(_document(answered)) == wanted
    except ValueError:
        return False


def _document(value: Any) -> Any:
    """The value itself, or what its JSON says; a plain word stands for itself.

    Raises:
        ValueError: text that begins as an object or a list, and is none.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        if value.strip().startswith(("{", "[")):
            raise
        return value


def _numeric_close(expected: Any, answered: Any) -> bool | None:
    wanted = _number(expected)
    if wanted is None:
        return None
    found = _number(answered)
    if found is None:
        return False
    (want, is_want_percent), (have, is_have_percent) = wanted, found
    if _is_close(want, have):
        return True
    # 45 % is 0.45; but a column "percent" holds 45. With the sign on one side alone, both readings are right.
    if is_want_percent == is_have_percent:
        return False
    return _is_close(want / 100, have) if is_want_percent else _is_close(want, have / 100)


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _number(value: Any) -> tuple[float, bool] | None:
    """A number, or the first in a text, and whether it has a percent sign; None if there is none.

    >>> _number("about −1,234.5 kg"), _number("GPT-4 says 12 %")
    ((-1234.5, False), (12.0, True))
    """
    is_percent = False
    try:
        if isinstance(value, str):
            match = _NUMBER.search(value)
            if match is None:
                return None
            number = float(_SEPARATORS.sub("", match["digits"]) + (match["exponent"] or "").replace("\u2212", "-"))
            number = -number if match["sign"] in ("-", "\u2212") else number
            is_percent = match["percent"] is not None
        elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            number = float(value)
        else:
            return None
    except OverflowError:
        return None
    return (number, is_percent) if math.isfinite(number) else None


def identity(value: Any) -> Hashable:
    """What equal answers have in common: numbers by value, objects without the order of their keys, text stripped.

    >>> identity({"a": 1, "b": [True]}) == identity({"b": [True], "a": Decimal("1.0")})
    True
    >>> identity(True) == identity(1)
    False
    """
    try:
        return _identity(value.strip() if isinstance(value, str) else value)
    except RecursionError:
        # Nested too deeply to tell: like nothing else.
        return object()


def _identity(value: Any) -> Hashable:
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int | float | Decimal):
        # By the shortest text: 0.1 of a float column and 0.1 of JSON are one number.
        return "number", Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if isinstance(value, dict):
        return "object", frozenset((name, _identity(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return "list", tuple(map(_identity, value))
    return value if value is None or isinstance(value, str) else str(value)


def vote(answers: Sequence[Any]) -> tuple[Any, float | None]:
    """The answer that most samples gave, and the share of the votes that it has.

    Who gave no answer does not vote. Of answers with as many votes, the one given first wins. (None, None) if nobody
    voted.

    >>> vote(["no", "yes", None, "yes"])
    ('yes', 0.6666666666666666)
    """
    first: dict[Hashable, Any] = {}
    votes: Counter[Hashable] = Counter()
    for answer in answers:
        if is_stated(answer):
            name = identity(answer)
            first.setdefault(name, answer)
            votes[name] += 1
    if not votes:
        return None, None
    # Of equals, max takes the first, and a Counter keeps the order of arrival.
    winner = max(votes, key=votes.__getitem__)
    return first[winner], votes[winner] / votes.total()
