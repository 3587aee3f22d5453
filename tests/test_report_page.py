"""The page of a report: exact, bounded, harmless whatever it shows; drawn in a real browser."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import combinations
from operator import mul
from pathlib import Path
from typing import Any

import pytest

from batchrun import report_charts, report_page
from batchrun.errors import MissingHereError
from batchrun.money import usd_text
from batchrun.page_text import _MONTHS
from batchrun.palette import PALETTE
from batchrun.report import Report
from batchrun.report_figures import MOST_BUCKETS, OTHER, causes, evaluations, over_time, steps
from batchrun.report_page import page
from batchrun.spend_details import CostlyRow, Costs, Details, Failures, RowSpend, Seconds

from .pages import MADE_AT, NOTHING, evaluation, many, part, report, run

MOST_BYTES = 1_500_000
HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
    "</svg></style></title></pre><svg onload=window.hacked=1><a href='javascript:window.hacked=1'>x</a>"
    "\"'><iframe srcdoc='<script>parent.hacked=1</script>'>{{7*7}}${7*7}&lt;b&gt;\x00\x07\x1b[31m\ud800\u202e]]>"
)


def hostile() -> tuple[Report, Details]:
    """Whatever a user or a model can name is hostile."""
    runs = [
        run(
            job=HOSTILE, run_id=HOSTILE, provider=HOSTILE, model=HOSTILE + "m" * 5_000, state=HOSTILE, reason=HOSTILE,
            budget_usd=Decimal("0.5"), budget_per=HOSTILE, budget_used=Decimal("0.7"), change=0.5,
            evaluation=evaluation(0.5, (HOSTILE, HOSTILE + "2")) | {
                "right_by": HOSTILE, "metrics": {HOSTILE: {"value": 0.5, "low": 0.1, "high": 0.9}},
            },
        ),
    ]  # fmt: skip
    top = [
        CostlyRow(
            HOSTILE, RowSpend(HOSTILE, 1, HOSTILE, 2, 3, 4, Decimal("0.1"), 5), HOSTILE, HOSTILE + "a" * 1_000_000
        ),
        CostlyRow("job", RowSpend("run", 2, "model", 0, 1, 4, Decimal("0.01"), 5), None, ""),
    ]
    details = Details(
        [Failures(HOSTILE, HOSTILE, 7)],
        [Seconds(HOSTILE, HOSTILE, 3, 0.5, 0.8, 120.0, None, None, None)],
        [Costs(HOSTILE, Decimal(0), 3), Costs(HOSTILE, Decimal("0.01"), 5)],
        top,
    )
    return report(runs, notes=(HOSTILE * 100,)), details


def foreign() -> tuple[Report, Details]:
    """Names from right to left, in wide characters, and very long."""
    names = ("تسميات ليلية", "ラベル付けの夜間ジョブ", "noch-ein-sehr-langer-name-" * 20, "emoji 👩🏽‍🚀 und Ünïcödé")
    runs = [
        run(
            job=name,
            model=name,
            run_id=f"r{place}",
            budget_usd=Decimal(2),
            budget_used=Decimal("1.9"),
            budget_per="run",
        )
        for place, name in enumerate(names)
    ]
    details = Details(
        [Failures("r0", name, 3 + place) for place, name in enumerate(names)],
        # The last is of a run that is not in the report.
        [Seconds(f"r{place}", name, 9, 0.5, 0.8, 1.2, 0.1, 0.2, 0.3) for place, name in enumerate((*names, "none"))],
        [],
        [CostlyRow(names[0], RowSpend("r0", 1, names[0], 0, 1, 4, Decimal("0.1"), 5), names[0] * 300, "نعم")],
    )
    return report(runs), details


def unknown() -> tuple[Report, Details]:
    """Nobody knows what anything cost, nor when."""
    nothing = {
        "usd_spent": Decimal(0),
        "usd_reported": Decimal(0),
        "usd_estimated": Decimal(0),
        "usd_wasted": Decimal(0),
    }
    one = run(
        **nothing, unknown_attempts=3, usd_unknown_at_most=None, usd_per_1000_rows=None, usd_per_ok_row=None, ok=0,
        failed=0, pending=5, rows=5, rows_per_second=float("nan"), ended_at=None, run_id="a copy",
        started_at=datetime.fromtimestamp(0, UTC),
    )  # fmt: skip
    return report([one], []), NOTHING


def only_failures() -> tuple[Report, Details]:
    one = run(ok=0, failed=10, rows=10, usd_spent=Decimal(0), usd_per_1000_rows=Decimal(0), usd_per_ok_row=None)
    return report([one]), Details(
        [Failures(one["run_id"], "timeout", 30)], [], [Costs(one["run_id"], Decimal(0), 9)], []
    )


def of_parquet() -> tuple[Report, Details]:
    """Known by its output alone: there are no parts, and no seconds."""
    return report(
        [run(seconds=0.0, ended_at=None, ledger=None, output="out.parquet", rows_per_second=float("nan"))], []
    ), NOTHING


REPORTS = {
    "empty": lambda: (report([]), NOTHING),
    "one run": lambda: many(1),
    "of Parquet alone": of_parquet,
    "only failures": only_failures,
    "free": lambda: (report([run(usd_spent=Decimal(0), usd_per_1000_rows=Decimal(0), budget_usd=Decimal(0),
                                 budget_used=Decimal(0), budget_per="run")]), NOTHING),
    "unknown": unknown,
    "foreign": foreign,
    "hostile": hostile,
    "some": lambda: many(30, text=60),
    "thousand": lambda: many(1000),
}  # fmt: skip


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Every page is built once; each test looks at some of them."""
    return _Pages()


class _Pages(dict[str, str]):
    def __missing__(self, name: str) -> str:
        self[name] = page(*REPORTS[name](), made_at=MADE_AT)
        return self[name]


# What it says


def test_dollars_are_those_of_the_frames_to_the_last_digit(pages: dict[str, str]) -> None:
    some, details = many(30, text=60)
    html = pages["some"]
    for name in ("usd_spent", "usd_reported", "usd_estimated", "usd_wasted"):
        assert f"${usd_text(some.totals[name])}<" in html or f"${usd_text(some.totals[name])} " in html, name
        for amount in some.runs[name]:
            assert re.search(re.escape(f"${usd_text(amount)}") + r"[< ]", html), (name, amount)
    for row in details.top:
        assert f"<h3>${usd_text(row.spend.usd_spent)}</h3>" in html
    for amount in some.runs["usd_per_1000_rows"]:
        assert f'<data value="${usd_text(amount)}"' in html


def test_spend_over_time_adds_up_to_the_runs() -> None:
    for number in (1, 30, 1000):
        some, _ = many(number)
        dollars, tokens = over_time(some)
        assert dollars is not None and tokens is not None
        assert dollars.total == some.totals["usd_spent"] and dollars.not_drawn == 0
        assert tokens.total == some.totals["prompt_tokens"] + some.totals["completion_tokens"]
        assert len(dollars.buckets) == len(set(dollars.buckets)) <= MOST_BUCKETS


def test_attempts_under_way_are_in_no_sum() -> None:
    one = run()
    dollars, _ = over_time(report([one], [part(one), part(one, outcome="in flight", usd_spent=Decimal(9))]))
    assert dollars is not None and dollars.total == one["usd_spent"]


@pytest.mark.parametrize(
    ("days", "unit", "buckets"),
    [
        (["2026-06-01"], "day", ["1 Jun"]),
        (["2026-06-30", "2026-07-02"], "day", ["30 Jun", "1 Jul", "2 Jul"]),
        (["2026-05-31", "2026-07-10"], "week", ["25 May", "1 Jun", "8 Jun", "15 Jun", "22 Jun", "29 Jun", "6 Jul"]),
        (["2025-11-01", "2026-10-01"], "month", [*_MONTHS[10:], *_MONTHS[:10]]),
        (["2001-01-01", "2026-01-01"], "year", [str(year) for year in range(2001, 2027)]),
        (["0001-01-01", "9999-12-31"], "year", [str(year) for year in range(9964, 10_000)]),
    ],
)
def test_time_is_cut_into_as_many_pieces_as_fit(days: list[str], unit: str, buckets: list[str]) -> None:
    one = run(usd_spent=Decimal(2 * len(days)))
    dollars, _ = over_time(
        report([one], [part(one, day=date.fromisoformat(day), usd_spent=Decimal(2)) for day in days])
    )
    assert dollars is not None
    assert (dollars.unit, [bucket.split(" 20")[0] for bucket in dollars.buckets]) == (unit, buckets)
    assert dollars.total + dollars.not_drawn == one["usd_spent"]


def test_models_beyond_the_palette_are_taken_together() -> None:
    one = run()
    parts = [part(one, model=f"m{number}", usd_spent=Decimal(number)) for number in range(40)]
    dollars, _ = over_time(report([one], parts))
    assert dollars is not None
    assert dollars.series == ["m39", "m38", "m37", "m36", "m35", "m34", OTHER]
    assert dollars.values == [[*map(Decimal, (39, 38, 37, 36, 35, 34)), Decimal(sum(range(34)))]]


def test_causes_beyond_the_chart_are_taken_together() -> None:
    lines = causes(Details([Failures("r", f"kind-{number}", number) for number in range(1, 31)], [], [], []))
    assert [line.values[0] for line in lines] == [*range(30, 21, -1), sum(range(1, 22))]


def test_steps_of_cost_have_no_gaps() -> None:
    costs = [Costs("r", Decimal(0), 4), Costs("r", Decimal("0.001"), 2), Costs("q", Decimal("0.01"), 1)]
    assert [tuple(step) for step in steps(Details([], [], costs, []))] == [
        ("below $0.0000001", 4), ("$0.001–0.002", 2), ("$0.002–0.005", 0), ("$0.005–0.01", 0), ("$0.01–0.02", 1),
    ]  # fmt: skip


def test_votes_are_evaluated_beside_the_answers() -> None:
    both = evaluation(0.7) | {"votes": evaluation(0.8)}
    assert [one.measures["accuracy"][0] for one in evaluations(report([run(evaluation=both)]))] == [0.7, 0.8]


def test_an_evaluation_of_another_form_is_left_out() -> None:
    assert evaluations(report([run(evaluation={"metrics": {"accuracy": 0.5}}), run(run_id="2")])) == []


def test_a_page_says_what_it_leaves_out(pages: dict[str, str]) -> None:
    assert "The newest 100 runs; 900 older runs are in the totals only." in pages["thousand"]
    assert f"{len(HOSTILE) + 1_000_000 - 4_000:,} more characters are left out here." in pages["hostile"]
    assert "There is no run on record." in pages["empty"]
    assert "1970-01-01" not in pages["unknown"]


def test_the_same_report_gives_the_same_page(pages: dict[str, str]) -> None:
    assert page(*many(1), made_at=MADE_AT) == pages["one run"]


def test_a_thousand_runs_fit_in_a_file_that_can_be_sent(pages: dict[str, str]) -> None:
    assert pages["one run"]  # the libraries are loaded
    began = time.process_time()
    html = page(*many(1000), made_at=MADE_AT)
    assert time.process_time() - began < 15
    assert len(html.encode()) < MOST_BYTES


def test_the_largest_page_is_bounded() -> None:
    """Everything that can be long is, in characters that take the most bytes."""
    long, worst = "&" * 2_000, "'" * 1_000_000
    runs, parts = [], []
    for number in range(300):
        big = evaluation(0.5, tuple(f"{long}{label}" for label in range(50)))
        big["metrics"] = {f"{metric}{long}": {"value": 0.5, "low": 0.1, "high": 0.9} for metric in range(20)}
        one = run(
            job=f"{number}{long}", run_id=f"{number}{long}", model=f"{number}{long}", state=long, reason=long,
            evaluation=big, budget_usd=Decimal(9), budget_per="month", budget_used=Decimal("0.123456789012"),
        )  # fmt: skip
        runs.append(one)
        parts += [part(one, day=date.fromordinal(735_000 + number * 10 + day)) for day in range(10)]
    ids = [one["run_id"] for one in runs]
    details = Details(
        [Failures(run_id, f"{run_id}", 1) for run_id in ids],
        [Seconds(run_id, long, 1, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3) for run_id in ids],
        [Costs(ids[0], Decimal(5).scaleb(-power), 1) for power in range(8)],
        [CostlyRow(long, RowSpend(run_id, 1, long, 1, 1, 1, Decimal(1), 1), worst, worst) for run_id in ids],
    )
    html = page(report(runs, parts, (long,) * 100), details, made_at=MADE_AT)
    assert len(html.encode()) < MOST_BYTES


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "find_spec", lambda name: None)
    with pytest.raises(MissingHereError, match=r"altair, vl-convert-python: pip install 'batchrun\[report\]'"):
        page(*many(1), made_at=MADE_AT)


# What it is made of


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_is_whole_and_has_nothing_to_run_or_to_fetch(pages: dict[str, str], name: str) -> None:
    html = pages[name]
    html.encode()  # no lone surrogates
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", html)
    tags = Counter(re.findall(r"<([a-zA-Z!][a-zA-Z0-9]*)", html))
    ours = (
        "!DOCTYPE html head meta link title style body header main section footer h1 h2 h3 h4 p small b bdi data span "
    )
    ours += "div figure figcaption ul ol li dl dt dd details summary pre table caption thead tbody tr th td "
    ours += "svg g path rect line circle text tspan defs clipPath"
    assert set(tags) <= set(ours.split())
    assert tags["html"] == tags["style"] == tags["title"] == 1
    assert not re.search(r"<[^>]*\s(on\w+|src|xlink:href|srcdoc)\s*=", html.replace("&#34;", ""))
    assert re.findall(r"<[^>]*\shref\s*=\s*\"([^\"]*)\"", html) == ["data:,"]
    ids = re.findall(r"\sid=\"([^\"]*)\"", html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_a_drawing_keeps_only_what_it_knows() -> None:
    """Were the library to let markup through, it would not reach the page."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9"'
        ' onload="a()">'
        '<script>a()</script><a xlink:href="javascript:a()"><text>b</text></a><image href="http://c"/><foreignObject/>'
        '<style>d</style><g id="e" style="f" clip-path="url(#e)"><text x="1">&lt;g&gt;</text></g></svg>'
    )
    assert report_charts._plain("k", svg) == (
        '<svg viewBox="0 0 9 9" aria-hidden="true" focusable="false">'
        '<g id="k-0" clip-path="url(#k-0)"><text x="1">&lt;g&gt;</text></g></svg>'
    )


def test_colours_can_be_read_in_both_schemes() -> None:
    for scheme in (0, 1):
        for ground in ("page", "surface"):
            for ink in ("ink", "muted", "worse", "better"):
                assert _contrast(PALETTE[ink][scheme], PALETTE[ground][scheme]) >= 4.5, (ink, ground, scheme)
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)  # each stands for one variable


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _linear(colour: str) -> list[float]:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# What the three kinds of colour blindness make of linear red, green and blue (Machado, Oliveira and Fernandes, 2009).
_EYES = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


@pytest.mark.parametrize("eyes", _EYES)
@pytest.mark.parametrize("scheme", [0, 1])
def test_series_can_be_told_apart_also_by_the_colour_blind(scheme: int, eyes: str) -> None:
    seen = [_lab(_EYES[eyes], PALETTE[f"series-{number}"][scheme]) for number in range(1, 8)]
    assert min(math.dist(one, other) for one, other in combinations(seen, 2)) > 18


def _lab(eyes: tuple[tuple[float, ...], ...], colour: str) -> tuple[float, float, float]:
    """In CIELAB, where a distance of 2 can just be seen."""
    red, green, blue = (min(1.0, max(0.0, sum(map(mul, row, _linear(colour))))) for row in eyes)
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    fx, fy, fz = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


# What a browser makes of it

_CONTRASTS = """() => {
  const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  const seen = {};
  const rgba = (colour) => {
    if (!(colour in seen)) {
      pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
      seen[colour] = [...pen.getImageData(0, 0, 1, 1).data];
    }
    return seen[colour];
  };
  const light = ([...c]) => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let looked = 0;
  while (walker.nextNode()) {
    const text = walker.currentNode, element = text.parentElement;
    if (!text.data.trim() || element.closest('.key, style') || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    let ground = element;
    while (ground && rgba(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
    const colour = element.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const pair = [light(rgba(colour)), light(rgba(getComputedStyle(ground).backgroundColor))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) poor.push([text.data.trim().slice(0, 40), colour, contrast]);
    looked += 1;
  }
  return {looked, poor};
}"""

_CHARTS = """() => [...document.querySelectorAll('.chart')].map((chart) => {
  const shown = [...chart.querySelectorAll('svg')].filter(svg => svg.checkVisibility());
  const box = shown[0].getBoundingClientRect(), scale = box.width / shown[0].viewBox.baseVal.width;
  const texts = [...shown[0].querySelectorAll('text')].filter(text => text.textContent);
  const marks = [...shown[0].querySelectorAll('path')].filter((path) => {
    const {width, height} = path.getBoundingClientRect(), {fill, stroke} = getComputedStyle(path);
    const painted = [fill, stroke].some(paint => !['none', 'transparent', 'rgba(0, 0, 0, 0)'].includes(paint));
    return painted && width > 0.5 && height > 0.5 && width < box.width * 0.99;
  });
  return {
    key: chart.closest('figure').id, drawings: shown.length, width: box.width, height: box.height, marks: marks.length,
    smallest: Math.min(...texts.map(text => parseFloat(getComputedStyle(text).fontSize) * scale)),
    cut: texts.filter((text) => {
      const {left, right, top, bottom} = text.getBoundingClientRect();
      return left < box.left - 1 || right > box.right + 1 || top < box.top - 1 || bottom > box.bottom + 1;
    }).map(text => text.textContent),
    label: chart.getAttribute('aria-label'), role: chart.getAttribute('role'),
  };
})"""


@dataclass
class Seen:
    """A page in the browser."""

    tab: Any
    errors: list[str]
    requests: list[str]

    def charts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.tab.evaluate(_CHARTS)
        return found

    def is_scrolling_sideways(self) -> bool:
        return bool(self.tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: it is in the group dev"
    )
    with playwright.sync_playwright() as driver:
        # As root, and in containers, Chromium has no sandbox of its own.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def look(browser: Any, html: str, folder: Path, *, width: int = 1280, scheme: str = "light") -> Iterator[Seen]:
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    seen = Seen(tab, [], [])
    tab.on("console", lambda message: seen.errors.append(message.text))
    tab.on("pageerror", lambda error: seen.errors.append(str(error)))
    tab.on("request", lambda request: seen.requests.append(request.url))
    tab.goto(file.as_uri())
    try:
        yield seen
        assert seen.errors == []
        assert [url for url in seen.requests if not url.startswith("data:")] == [file.as_uri()]
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_both_schemes(
    browser: Any, pages: dict[str, str], tmp_path: Path, scheme: str
) -> None:
    with look(browser, pages["some"], tmp_path, scheme=scheme) as seen:
        seen.tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        contrasts = seen.tab.evaluate(_CONTRASTS)
        assert contrasts["looked"] > 500 and contrasts["poor"] == []
        ground = seen.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(245, 246, 248)", "dark": "rgb(14, 18, 23)"}[scheme]


@pytest.mark.parametrize("name", REPORTS)
def test_every_chart_is_drawn_and_fits(browser: Any, pages: dict[str, str], tmp_path: Path, name: str) -> None:
    """On a desk, a tablet and a phone, and on a narrow one."""
    with look(browser, pages[name], tmp_path) as seen:
        for width, smallest in ((1280, 9), (820, 9), (390, 9), (320, 8)):
            seen.tab.set_viewport_size({"width": width, "height": 900})
            assert not seen.is_scrolling_sideways(), width
            charts = seen.charts()
            for chart in charts:
                assert chart["drawings"] == 1 and chart["marks"] > 0, (width, chart)
                assert chart["width"] > 250 and chart["height"] > 20, (width, chart)
                assert chart["smallest"] >= smallest, (width, chart)
                assert chart["cut"] == [], (width, chart)
                assert chart["role"] == "img" and chart["label"].startswith("Chart: "), chart
        keys = [chart["key"] for chart in charts]
        if name in ("some", "thousand"):
            charted = ["spend", "tokens", "costs", "failures", "latency", "first", "budgets", "metric-0", "metric-1"]
            assert keys == charted
        if name == "empty":
            assert keys == []


@pytest.mark.parametrize("has_policy", [True, False])
def test_hostile_names_and_answers_run_nothing(
    browser: Any, pages: dict[str, str], tmp_path: Path, has_policy: bool
) -> None:
    """Neither with the page's policy nor by the escaping alone."""
    html = pages["hostile"]
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", html)
    assert policy is not None
    if not has_policy:
        html = html.replace(policy[0], "")
    with look(browser, html, tmp_path) as seen:
        seen.tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        seen.tab.wait_for_function("document.readyState === 'complete'")
        assert seen.tab.evaluate("'hacked' in window") is False
        assert seen.tab.evaluate("document.querySelectorAll('script, img, iframe, a, object, embed, form').length") == 0
        answer = seen.tab.evaluate("document.querySelectorAll('.top pre')[1].textContent")
        assert answer == re.sub(r"[\x00\x07\x1b\ud800\u202e]", "\ufffd", HOSTILE) + "a" * (4_000 - len(HOSTILE))
        # The job's name has come into the drawings, as text.
        assert "</script>" in seen.tab.evaluate("document.querySelector('#latency svg').textContent")


def test_print_is_light_and_cuts_nothing(browser: Any, pages: dict[str, str], tmp_path: Path) -> None:
    with look(browser, pages["some"], tmp_path, width=700, scheme="dark") as seen:
        seen.tab.emulate_media(media="print", color_scheme="dark")
        assert (
            seen.tab.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
            == "rgb(255, 255, 255)"
        )
        assert all(chart["cut"] == [] for chart in seen.charts())
        assert seen.tab.evaluate("[...document.querySelectorAll('figure')].every("
                                 "one => getComputedStyle(one).breakInside === 'avoid')")  # fmt: skip
        assert seen.tab.pdf(format="A4")[:5] == b"%PDF-"


def test_a_table_is_one_also_where_it_is_shown_as_cards(browser: Any, pages: dict[str, str], tmp_path: Path) -> None:
    with look(browser, pages["one run"], tmp_path, width=390) as seen:
        assert seen.tab.get_by_role("row").count() >= 2
        assert seen.tab.locator(".runs").get_by_role("rowheader", name="nightly-labels").is_visible()
        assert seen.tab.locator("th:not([scope])").count() == 0
