"""Templates that escape, run for ever, fill the memory or make a prompt of what is no text: such rows fail, unsent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateSyntaxError

from batchrun.errors import JobError
from batchrun.loading import load_job
from batchrun.providers import resolve
from batchrun.sandbox import Sandbox
from batchrun.template import NotRenderedError, Template

from .conftest import FakeProvider, Workspace
from .test_bombs import MOST_MEMORY, run_bounded

Provide = Callable[..., FakeProvider]

ESCAPES = [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ prompt|attr('__class__') }}",
    "{{ '{0.__class__}'.format(prompt) }}", "{{ [prompt]|map(attribute='__class__')|list }}",
    "{{ cycler.__init__.__globals__ }}", "{{ namespace.__init__ }}", "{{ range.__self__ }}",
    "{{ prompt.format.__self__.__class__ }}", "{{ (prompt|string).encode.__func__ }}", "{{ joiner()._sep.__class__ }}",
]  # fmt: skip
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
]
BIG = [
    "{{ 'a' * 10**10 }}", "{{ 10**(10**10) }}", "{{ 1 // 3 ** 99999999 }}", "{{ ('9' * 4000)|int ** 9999999 }}",
    "{{ prompt|center(10**10) }}", "{{ prompt|indent(10**10) }}", "{{ '%9999999999d' % 1 }}",
    "{{ '%*d'|format(10**9, 1) }}", "{{ '{:>9999999999}'.format(1) }}", "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ 'a'.zfill(10**9) }}", "{{ 'a'|replace('a', 'b' * 10**9) }}", "{{ ('a' * 10**4)|replace('a', 'b' * 10**6) }}",
    "{{ 'x'.join(['y' * 10**6] * 100) }}", "{{ ['y' * 10**6] * 100 | join }}", "{{ [1]|slice(10**8)|list }}",
    "{{ [[1] * 10**5] * 10**5 }}", "{{ 2.5|round(99999999, 'ceil') }}", "{{ [1]|batch(10**9, 0)|list }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = '%s%s'|format(ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{{ ('a' * 20000).translate({97: 'b' * 10000}) }}", "{{ ('a' * 20000)|replace(old='a', new='b' * 10000) }}",
    "{{ [1]|tojson(indent=300000000) }}", "{{ ('\t' * 300).expandtabs(1000000) }}",
    "{{ ('%(a)9999d' * 20000) % {'a': 1} }}",
    "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "{% set a = 'x' * 10**6 %}{% for i in range(1000) %}{{ a }}{% endfor %}", "{{ ('a ' * 10**7)|wordwrap(1) }}",
]  # fmt: skip
NO_TEXT = [
    "{{ prompt.split()|map('upper') }}", "{{ prompt.upper }}", "{{ range }}", "{{ joiner() }}", "{{ cycler('a') }}",
    "{{ 'x' ~ prompt.upper }}", "{{ [prompt.upper] }}", "{{ namespace() }}", "{{ prompt.upper|string }}",
    "{{ [{'a': 1}]|map(attribute='nme')|list }}", "{{ nothing_inside[0].missing }}",
]  # fmt: skip
NULLS = [
    "{{ note }}", "{{ 'Note: ' ~ note }}", "{{ note|upper }}", "{{ note|trim }}", "{{ note|string }}", "{{ note|e }}",
    "{{ note|replace('a', 'b') }}", "{{ [prompt, note]|join(', ') }}", "{{ '%s: %s'|format(prompt, note) }}",
    "{{ '%s' % note }}", "{{ '{}'.format(note) }}", "{{ [prompt, note]|map('upper')|join }}", "{{ note|title }}",
    "{% for x in note %}{{ x }}{% endfor %}", "{{ prompt|replace('a', note) }}", "{{ '%(a)s' % {'a': note} }}",
    "{{ ['a', 'b']|join(note) }}",
]  # fmt: skip


@pytest.mark.parametrize("prompt", [*ESCAPES, *ENDLESS, *BIG, *NO_TEXT, *NULLS])
def test_such_a_template_sends_nothing(tmp_path: Path, prompt: str) -> None:
    template = _template(tmp_path, prompt)
    with pytest.raises(NotRenderedError):
        template.request(0, ROW)


def test_it_takes_bounded_memory_and_time(work: Workspace, provide: Provide) -> None:
    provider = provide()
    work.write_rows(["a b"])
    for prompt in (ENDLESS[0], ENDLESS[1], "{{ ['y' * 10**6] * 1000 | join }}"):
        work.write_job(provider.base_url, prompt=prompt)
        code, stderr, memory, seconds = run_bounded(work)
        assert code == 1, stderr
        assert memory < MOST_MEMORY
        assert seconds < 30
    assert provider.requests == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("{% include 'x' %}", "cannot include or extend"),
        ("{% extends 'x' %}", "cannot include or extend"),
        ("{% import 'x' as y %}", "cannot include or extend"),
        ("{% if prompt is notest %}{% endif %}", "there is no test 'notest'"),
        ("{{ prompt|nofilter }}", "there is no filter 'nofilter'"),
        ("{{ prompt|random }}", "there is no filter 'random'"),
    ],
)
def test_what_fails_every_row_fails_the_job(tmp_path: Path, prompt: str, said: str) -> None:
    with pytest.raises(JobError, match=said):
        _template(tmp_path, prompt)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("{{ note or 'none' }} {{ note|default('n', true) }}", "none n"),
        ("{{ {'a': note}|tojson }}", '{"a": null}'),
        ("{{ '* %s' % prompt }} {{ '**{0}** in {1}'.format(prompt, 12345) }}", "* a b **a b** in 12345"),
        ("{{ 'Zip 90210: %s %s%%'|format(prompt, 5) }}", "Zip 90210: a b 5%"),
        ("{{ note|int(7) }} {{ {'a': 1}.keys()|list }} {{ range(3) }}", "7 ['a'] range(0, 3)"),
        ("{{ 'x' if note }}{{ prompt|truncate(20000) }}", "a b"),
        ("{{ [1, 2]|tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ prompt.split()|map('upper')|join('-') }}", "A-B"),
        ("{{ ['a', 'b'] }} {{ {'a': 1} }}", "['a', 'b'] {'a': 1}"),
        ("{{ 'n: ' ~ 1 ~ ' ' ~ prompt }}", "n: 1 a b"),
        ("{% for i in range(3) %}{{ loop.index }}{% endfor %}", "123"),
        ("{{ 7000000|int + 5000000 }} {{ 2 ** 40 }} {{ '%05.1f' % 3.14159 }}", "12000000 1099511627776 003.1"),
        ("{{ [3000000, 1]|select('gt', 2000000)|list }}", "[3000000]"),
        ("{{ '{} {:>5}'.format(prompt, 12345678) }}", "a b 12345678"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(prompt) }}", "<a b>"),
        ("{{ range }}", "10-20"),
    ],
)
def test_what_templates_are_for_goes_on_working(tmp_path: Path, prompt: str, text: str) -> None:
    columns = {"range": "10-20"} if prompt == "{{ range }}" else {}
    template = _template(tmp_path, prompt, *columns)
    body = json.loads(template.request(0, ROW | columns).body)
    assert body["messages"][0]["content"] == text


@settings(max_examples=400)
@given(
    st.lists(
        st.sampled_from(
            [
                *("{{", "}}", "{%", "%}", "{#", "#}", " ", "prompt", "note", "if ", "for x in ", "endif", "endfor"),
                *("set x = ", "|", "join", "upper", "(", ")", "[", "]", "'", '"', ".", "__class__", "~", "*", "**"),
                *("9" * 8, "range", "\n", "x", "macro m() ", "endmacro", "=", ",", ":", "is ", "not ", "none", "-"),
                *("\\", "{", "}", "raw", "endraw", "é"),
            ]
        ),
        max_size=24,
    )
)  # fmt: skip
def test_any_template_gives_a_prompt_or_a_reason(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    try:
        template = _template(tmp_path_factory.getbasetemp(), "".join(parts))
        json.loads(template.request(0, ROW).body)
    except (JobError, NotRenderedError):
        pass


ROW = {"prompt": "a b", "note": None, "nothing_inside": [{}]}


def _template(folder: Path, prompt: str, *more: str) -> Template:
    path = folder / "sandbox.yaml"
    job = {"input": "in.jsonl", "prompt": prompt, "provider": "openai", "model": "m", "output": "o.parquet"}
    path.write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")
    endpoint = resolve("mine", environ=None, base_url="http://127.0.0.1:1/v1")
    return Template(load_job(path), [*ROW, *more], endpoint, "m")


VALUES = st.one_of(
    st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.decimals(), st.dates(), st.datetimes(),
    st.binary(), st.lists(st.integers() | st.none()), st.dictionaries(st.text(), st.text()),
)  # fmt: skip


@settings(deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["{{ a }}", "{{b}}", "{{- a -}}", " text\n", "}", "{", "é漢", "{# note #}", "\n"])),
    row=st.fixed_dictionaries({"a": VALUES, "b": VALUES}),
)
def test_names_and_text_are_filled_in_as_by_jinja(pieces: list[str], row: dict[str, object]) -> None:
    def rendered(render: Callable[[dict[str, object]], str]) -> tuple[str, str]:
        sandbox.begin()
        try:
            return "text", render(row)
        except Exception as exc:  # noqa: BLE001 - they must be alike in this too
            return type(exc).__name__, str(exc)

    sandbox = Sandbox(["a", "b"], str)
    text = "".join(pieces)
    try:
        tree, _ = sandbox._prepare(text)
    except TemplateSyntaxError:
        return
    quick, _ = sandbox.text_of(text)
    assert rendered(quick) == rendered(sandbox.from_string(tree).render)
