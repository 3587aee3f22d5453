"""Charts as static SVG, drawn by Altair and vl-convert: the only room that knows them.

Each is drawn twice, for a desk and for a phone, since text in a picture does not grow when the picture shrinks. No script
is in them. They are coloured in the light palette, and a page maps those colours to variables (`PALETTE`). The first
chart of a process takes about 2 s and 150 MB, as the two are loaded then; each of the others some 50 ms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from batchrun.errors import MissingHereError
from batchrun.report_figures import Line, Metric, Stack, Step

if TYPE_CHECKING:
    import altair as alt

    Made = alt.Chart | alt.LayerChart

PALETTE = {
    "page": ("#f5f6f8", "#0e1217"),
    "surface": ("#ffffff", "#161b22"),
    "ink": ("#1b232d", "#e6eaf0"),
    "muted": ("#56606e", "#a5afbc"),
    "line": ("#dde1e7", "#2f3843"),
    "worse": ("#b3400a", "#ff9d6b"),
    "better": ("#00735c", "#4fd1ad"),
    "series-1": ("#0067a6", "#4ba3e3"),
    "series-2": ("#dd6b10", "#f2914a"),
    "series-3": ("#00896d", "#27c49d"),
    "series-4": ("#a8457f", "#dd86b9"),
    "series-5": ("#c9a300", "#e8cf4f"),
    "series-6": ("#6fb6e8", "#a9d7f7"),
    "series-7": ("#8b939d", "#7d8691"),
}
"""Colours by name: in light, in dark. Texts have a contrast of 4.5 at least. The series are Okabe and Ito's, darkened or
lightened to stand out from the surface: they differ in lightness too, for eyes that see few hues."""

WIDE, NARROW = 840, 340
"""Units of the two drawings; at about as many pixels their text is of `_TEXT` pixels."""
_TEXT, _ROOM = 12, 14
"""Size of text, and that for which room is made: the fonts of readers are up to a sixth wider than the one measured."""
_BAR = 56
"""The widest bar."""
_ROW, _SECOND = 40, 16
"""Height of a line with its label above it, and of what else is said of it."""
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_SERIES = [_LIGHT[f"series-{number}"] for number in range(1, 8)]
_ELEMENTS = frozenset(("svg", "g", "path", "rect", "line", "circle", "text", "tspan", "defs", "clipPath"))
_ATTRIBUTES = frozenset((
    "viewBox", "id", "clip-path", "d", "transform", "fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray",
    "stroke-opacity", "stroke-linecap", "stroke-miterlimit", "opacity", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r",
    "rx", "ry", "width", "height", "text-anchor", "font-size", "font-weight",
))  # fmt: skip
_FRACTION = re.compile(r"(\.\d\d)\d+")


class Drawing(NamedTuple):
    """A chart as two SVG elements, to be put into HTML as they are: nothing in them can run or be fetched."""

    wide: str
    narrow: str


def require() -> None:
    """Look for what the charts need, and load nothing; to be called before anything is read.

    Raises:
        MissingHereError: the extra `report` is not installed.
    """
    needed = {"altair": "altair", "vl_convert": "vl-convert-python"}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise MissingHereError(f"report --html: needs {', '.join(missing)}: pip install 'batchrun[report]'")


def stacked(key: str, stack: Stack, *, is_usd: bool) -> Drawing:
    """Bars over time, stacked by series in the order of the palette.

    Args:
        key: differs from that of every other drawing on the page.
    """

    def make(width: int) -> Made:
        import altair as alt

        values = [
            {"bucket": place, "series": series, "value": float(value)}
            for place, row in enumerate(stack.values)
            for series, value in enumerate(row)
            if value
        ]
        names = "[" + ", ".join(f"'{bucket}'" for bucket in stack.buckets) + "][datum.value]"
        places = list(range(len(stack.buckets)))
        axis = alt.Axis(labelExpr=names, labelAngle=0, labelOverlap="greedy", labelSeparation=8, grid=False)
        return (
            alt.Chart(alt.InlineData(values=values))
            .mark_bar(stroke=_LIGHT["surface"], strokeWidth=0.6, **_thick(len(places), width))
            .encode(
                x=alt.X("bucket:O", title=None, scale=_band(alt, places), axis=axis),
                y=alt.Y("value:Q", title=None, axis=_amounts(alt, is_usd), stack="zero"),
                color=_colours(alt, "series:O", len(stack.series)),
                order=alt.Order("series:O"),
            )
            .properties(height=260 if width == WIDE else 220)
        )

    return _drawn(key, make)


def histogram(key: str, steps: Sequence[Step]) -> Drawing:
    """A bar for each step, from top to bottom."""

    def make(width: int) -> Made:
        import altair as alt

        values = [{"place": place, "rows": step.rows, "text": f"{step.rows:,}"} for place, step in enumerate(steps)]
        names = "[" + ", ".join(f"'{step.label}'" for step in steps) + "][datum.value]"
        base = alt.Chart(alt.InlineData(values=values)).encode(
            x=alt.X(
                "rows:Q", title=None, axis=None, stack=None, scale=_room(alt, [step.rows for step in steps], width)
            ),
            y=alt.Y(
                "place:O",
                title=None,
                scale=_band(alt, list(range(len(steps)))),
                axis=alt.Axis(labelExpr=names, labelLimit=width * 2 // 3, ticks=False, domain=False),
            ),
        )
        bars = base.mark_bar(color=_SERIES[0], cornerRadiusEnd=2)
        texts = base.mark_text(align="left", dx=5, color=_LIGHT["ink"]).encode(text="text:N")
        return alt.layer(bars, texts).properties(height=24 * len(steps))

    return _drawn(key, make)


def bars(key: str, lines: Sequence[Line]) -> Drawing:
    """A bar for each line's one value, which is a number of things."""

    def make(width: int) -> Made:
        import altair as alt

        values = _values(lines)
        base, low = alt.Chart(alt.InlineData(values=values)), _low(lines)
        most = [line.values[0] or 0 for line in lines]
        x = alt.X("v0:Q", title=None, axis=None, stack=None, scale=_room(alt, most, width))
        marks = base.mark_bar(color=_SERIES[1], height=12, yOffset=low, cornerRadiusEnd=2).encode(
            x=x, y=_place(alt, lines)
        )
        numbers = (
            base.mark_text(align="left", dx=5, dy=low, color=_LIGHT["ink"])
            .encode(x=x, y=_place(alt, lines), text=alt.Text("v0:Q", format=","))
        )  # fmt: skip
        return _lines(alt, base, [marks, numbers], lines)

    return _drawn(key, make)


def ranges(key: str, lines: Sequence[Line]) -> Drawing:
    """Three points a line, seconds: circle, diamond, triangle. On a logarithmic axis where they are far apart."""
    points = [value for line in lines for value in line.values if value is not None]
    is_log = max(points) > 50 * max(min(points), 0.001)

    def make(width: int) -> Made:
        import altair as alt

        # A logarithm of nothing is nowhere; the values are to a thousandth.
        values = [
            {**value, **{name: max(value[name], 0.001) for name in ("v0", "v1", "v2")}} for value in _values(lines)
        ]
        base, low = alt.Chart(alt.InlineData(values=values)), _low(lines)
        scale = alt.Scale(type="log", nice=True) if is_log else alt.Scale(zero=True, nice=True)
        axis = alt.Axis(format=",.3~r", labelExpr="datum.label + ' s'", tickCount=6 if width == WIDE else 4)

        def x(name: str) -> Any:
            return alt.X(f"{name}:Q", title=None, scale=scale, axis=axis)

        y = _place(alt, lines)
        layers: list[Any] = [
            base.mark_rule(yOffset=low, y2Offset=low, strokeWidth=2, color=_LIGHT["muted"], opacity=0.5).encode(
                x=x("v0"), x2="v2:Q", y=y
            )
        ]
        for place, shape in enumerate(("circle", "diamond", "triangle-up")):
            points = base.mark_point(shape=shape, filled=True, size=90, yOffset=low, opacity=1, color=POINTS[place])
            layers.append(points.encode(x=x(f"v{place}"), y=y))
        return _lines(alt, base, layers, lines)

    return _drawn(key, make)


POINTS = (_SERIES[0], _SERIES[1], _SERIES[3])
"""The colours of the points of `ranges`."""


def shares(key: str, lines: Sequence[Line]) -> Drawing:
    """A bar for each line's one value, a share of a whole that a tick marks. Beyond twice the whole they end."""

    def make(width: int) -> Made:
        import altair as alt

        values = [
            {**value, "v0": min(value["v0"], 2.0), "whole": 1, "text": f"{min(value['v0'], 99.99):.0%}"}
            for value in _values(lines)
        ]
        base, low = alt.Chart(alt.InlineData(values=values)), _low(lines)
        most = max(1.0, *(value["v0"] for value in values))
        scale = alt.Scale(domain=[0, most * 1.15], nice=False)
        x = alt.X("v0:Q", title=None, stack=None, scale=scale, axis=alt.Axis(format=".0%", values=[0, 0.5, 1, 1.5, 2]))
        y = _place(alt, lines)
        colour = alt.condition("datum.v0 > 1", alt.value(_LIGHT["worse"]), alt.value(_SERIES[0]))
        layers = [
            base.mark_bar(height=12, yOffset=low, cornerRadiusEnd=2).encode(x=x, y=y, color=colour),
            base.mark_text(align="left", dx=5, dy=low, color=_LIGHT["ink"]).encode(x=x, y=y, text="text:N"),
            base.mark_tick(color=_LIGHT["ink"], thickness=2, size=22, yOffset=low).encode(
                x=alt.X("whole:Q", scale=scale), y=y
            ),
        ]
        return _lines(alt, base, layers, lines)

    return _drawn(key, make)


def intervals(key: str, metric: Metric) -> Drawing:
    """A point between two ends for each line: value, low, high; from 0 to 1."""

    def make(width: int) -> Made:
        import altair as alt

        base, low = alt.Chart(alt.InlineData(values=_values(metric.lines))), _low(metric.lines)
        scale = alt.Scale(domain=[0, 1])
        axis = alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f")
        y = _place(alt, metric.lines)
        layers = [
            base.mark_rule(yOffset=low, y2Offset=low, strokeWidth=3, color=_SERIES[5]).encode(
                x=alt.X("v1:Q", title=None, scale=scale, axis=axis), x2="v2:Q", y=y
            ),
            base.mark_point(filled=True, size=80, yOffset=low, opacity=1, color=_SERIES[0]).encode(
                x=alt.X("v0:Q", title=None, scale=scale, axis=axis), y=y
            ),
        ]
        return _lines(alt, base, layers, metric.lines)

    return _drawn(key, make)


def _values(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {
            "place": place,
            "label": line.label,
            "more": line.more,
            **{f"v{number}": value for number, value in enumerate(line.values)},
        }
        for place, line in enumerate(lines)
    ]


def _thick(bars: int, width: int) -> dict[str, Any]:
    # A bar alone would fill the chart.
    return {"width": _BAR} if bars * _BAR * 1.4 < width - 60 else {}


def _low(lines: Sequence[Line]) -> int:
    """How far below the middle of a line its marks are."""
    return 9 + (_SECOND // 2 if any(line.more for line in lines) else 0)


def _band(alt: Any, places: Sequence[int]) -> Any:
    # The domain is given: what has no value keeps its place.
    return alt.Scale(domain=places, paddingInner=0.2, paddingOuter=0.1)


def _place(alt: Any, lines: Sequence[Line]) -> Any:
    return alt.Y("place:O", title=None, axis=None, scale=alt.Scale(domain=list(range(len(lines))), padding=0))


def _room(alt: Any, values: Sequence[float], width: int) -> Any:
    """A scale with room for a number to the right of the longest bar."""
    return alt.Scale(domain=[0, max(values) * (1.1 if width == WIDE else 1.3)], nice=False)


def _amounts(alt: Any, is_usd: bool) -> Any:
    form = "$,.4~r" if is_usd else ".3~s"
    return alt.Axis(labelExpr=f"format(datum.value, '{form}')", tickCount=5, domain=False, ticks=False)


def _colours(alt: Any, field: str, number: int) -> Any:
    scale = alt.Scale(domain=list(range(number)), range=_SERIES[:number])
    return alt.Color(field, scale=scale, legend=None)


def _lines(alt: Any, base: Any, layers: Sequence[Any], lines: Sequence[Line]) -> Any:
    """Layers, with the labels of the lines above their marks: beside them a phone has no room.

    The library is to cut no text: it cuts emoji into halves, and then fails.
    """
    second = _SECOND if any(line.more for line in lines) else 0
    texts = [("label", _LIGHT["ink"], -2 - second // 2)]
    if second:
        texts.append(("more", _LIGHT["muted"], -2 + second // 2))
    labels = [
        base.mark_text(align="left", baseline="bottom", dy=dy, limit=0, color=colour).encode(
            x=alt.value(0), y=_place(alt, lines), text=f"{field}:N"
        )
        for field, colour, dy in texts
    ]
    return alt.layer(*layers, *labels).properties(height=(_ROW + second) * len(lines))


def _drawn(key: str, make: Callable[[int], Made]) -> Drawing:
    return Drawing(*(_svg(f"{key}-{width}", make(width), width) for width in (WIDE, NARROW)))


def _svg(key: str, chart: Made, width: int) -> str:
    import altair as alt
    import vl_convert

    axis = {
        "labelColor": _LIGHT["muted"], "labelFontSize": _ROOM, "gridColor": _LIGHT["line"],
        "domainColor": _LIGHT["line"], "tickColor": _LIGHT["line"], "labelPadding": 6,
    }  # fmt: skip
    whole = chart.properties(
        width=width,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        background="transparent",
        padding={"left": 4, "top": 4, "bottom": 4, "right": 14},
    ).configure(
        # The page says what a chart shows: a name for each mark would be read out mark by mark.
        aria=False,
        font="sans-serif",
        axis=axis,
        text={"fontSize": _ROOM},
        view={"stroke": None},
    )
    # Nothing may be fetched, whatever the specification says.
    return _plain(key, vl_convert.vegalite_to_svg(whole.to_dict(), allowed_base_urls=[]))


def _plain(key: str, svg: str) -> str:
    """A drawing written anew from what is known to be harmless, with ids of its own."""
    root = ElementTree.fromstring(svg)
    # The library counts on from drawing to drawing; the same chart is to be the same text.
    own = {
        f"#{old}": f"#{key}-{place}"
        for place, old in enumerate(one.attrib["id"] for one in root.iter() if "id" in one.attrib)
    }
    _clean(root, own)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    # Its figure tells what it shows.
    root.attrib |= {"aria-hidden": "true", "focusable": "false"}
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, own: Mapping[str, str]) -> None:
    # Without its namespace, as HTML wants it.
    element.tag = element.tag.rpartition("}")[2]
    kept = {name: value for name, value in element.attrib.items() if name in _ATTRIBUTES}
    for name, value in kept.items():
        if name == "id":
            kept[name] = own[f"#{value}"][1:]
        elif name == "font-size":
            kept[name] = value.replace(str(_ROOM), str(_TEXT))
        elif name in ("d", "transform"):
            kept[name] = _FRACTION.sub(r"\1", value)
        elif value.startswith("url("):
            kept[name] = f"url({own.get(value[4:-1], '')})"
    element.attrib.clear()
    element.attrib.update(kept)
    for child in list(element):
        if child.tag.rpartition("}")[2] in _ELEMENTS:
            _clean(child, own)
        else:
            element.remove(child)
