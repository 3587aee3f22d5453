"""Charts as static SVG, by Altair and vl-convert: the only room that knows them.

Each is drawn twice, for a desk and for a phone, since text in a picture does not grow when the picture shrinks. No
script is in them. They have the colours of the light palette; a page maps those to its variables.

The two libraries take 1.5 s and 200 MB when this room is entered and the first chart drawn; each of the others 50 ms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import altair as alt
import vl_convert

from batchrun.palette import PALETTE
from batchrun.report_figures import Line, Metric, Stack, Step

WIDE, NARROW = 840, 340
"""Units of the two drawings; at about as many pixels their text is of `_TEXT` pixels."""
_TEXT, _ROOM = 12, 14
"""Size of text, and that for which room is made: the fonts of readers are up to a sixth wider than the one measured."""
_BAR = 56
"""The widest bar: one alone would fill the chart."""
_ROW, _SECOND = 40, 16
"""Height of a line with its label above it, and of what else is said of it."""
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_SERIES = [_LIGHT[f"series-{number}"] for number in range(1, 8)]
_ELEMENTS = frozenset(("svg", "g", "path", "rect", "line", "circle", "text", "tspan", "defs", "clipPath"))
_ATTRIBUTES = frozenset((
    "viewBox", "id", "clip-path", "d", "transform", "fill", "fill-opacity", "stroke", "stroke-width",
    "stroke-dasharray", "stroke-opacity", "stroke-linecap", "stroke-miterlimit", "opacity", "x", "y", "x1", "x2", "y1",
    "y2", "cx", "cy", "r", "rx", "ry", "width", "height", "text-anchor", "font-size", "font-weight",
))  # fmt: skip
_FRACTION = re.compile(r"(\.\d\d)\d+")


class Drawing(NamedTuple):
    """A chart as two SVG elements, to be put into HTML as they are: nothing in them can run or be fetched."""

    wide: str
    narrow: str


# In all of them, `key` differs from that of every other drawing on the page: ids are made of it.


def stacked(key: str, stack: Stack, *, is_usd: bool) -> Drawing:
    """Bars over time, stacked by series in the order of the palette."""
    values = [
        {"bucket": place, "series": series, "value": float(value)}
        for place, row in enumerate(stack.values)
        for series, value in enumerate(row)
        if value
    ]
    places, series = list(range(len(stack.buckets))), list(range(len(stack.series)))
    form = "$,.4~r" if is_usd else ".3~s"

    def make(width: int) -> alt.Chart:
        thick = _BAR if len(places) * _BAR * 1.4 < width - 60 else alt.Undefined
        names = alt.Axis(
            labelExpr=_names(stack.buckets), labelAngle=0, labelOverlap="parity", labelSeparation=8, grid=False
        )
        amounts = alt.Axis(labelExpr=f"format(datum.value, '{form}')", tickCount=5, domain=False, ticks=False)
        chart: alt.Chart = (
            _chart(values)
            .mark_bar(stroke=_LIGHT["surface"], strokeWidth=0.6, width=thick)
            .encode(
                x=alt.X("bucket:O", title=None, scale=_band(places), axis=names),
                y=alt.Y("value:Q", title=None, axis=amounts, stack="zero"),
                color=alt.Color("series:O", scale=alt.Scale(domain=series, range=_SERIES[: len(series)]), legend=None),
                order=alt.Order("series:O"),
            )
            .properties(height=260 if width == WIDE else 220)
        )
        return chart

    return _drawn(key, make)


def histogram(key: str, steps: Sequence[Step]) -> Drawing:
    """A bar for each step, from top to bottom."""
    values = [{"place": place, "rows": step.rows} for place, step in enumerate(steps)]

    def make(width: int) -> alt.LayerChart:
        names = alt.Axis(
            labelExpr=_names([step.label for step in steps]), labelLimit=width * 2 // 3, ticks=False, domain=False
        )
        base = _chart(values).encode(
            x=alt.X("rows:Q", title=None, axis=None, stack=None, scale=_room([step.rows for step in steps], width)),
            y=alt.Y("place:O", title=None, axis=names, scale=_band(list(range(len(steps))))),
        )
        bars = base.mark_bar(color=_SERIES[0], cornerRadiusEnd=2)
        numbers = base.mark_text(align="left", dx=5, color=_LIGHT["ink"]).encode(text=alt.Text("rows:Q", format=","))
        return _layered([bars, numbers]).properties(height=24 * len(steps))

    return _drawn(key, make)


def bars(key: str, lines: Sequence[Line]) -> Drawing:
    """A bar for each line's one value, which is a number of things."""
    y, low = _place(lines), _low(lines)

    def make(width: int) -> alt.LayerChart:
        base = _chart(_values(lines))
        most = [line.values[0] for line in lines]
        x = alt.X("v0:Q", title=None, axis=None, stack=None, scale=_room(most, width))
        marks = base.mark_bar(color=_SERIES[1], height=12, yOffset=low, cornerRadiusEnd=2).encode(x=x, y=y)
        numbers = base.mark_text(align="left", dx=5, dy=low, color=_LIGHT["ink"]).encode(
            x=x, y=y, text=alt.Text("v0:Q", format=",")
        )
        return _lines(base, [marks, numbers], lines)

    return _drawn(key, make)


POINTS = (("series-1", "circle", "●"), ("series-2", "diamond", "◆"), ("series-4", "triangle-up", "▲"))
"""The points of `ranges`: colour (of the palette), shape, and its sign in a text."""


def ranges(key: str, lines: Sequence[Line]) -> Drawing:
    """Three points a line, seconds. On a logarithmic axis where they are far apart."""
    y, low = _place(lines), _low(lines)
    # They are to a thousandth, and nothing has no logarithm.
    values = _values([line._replace(values=[max(value, 0.001) for value in line.values]) for line in lines])
    points = [value for line in lines for value in line.values]
    is_log = max(points) > 50 * max(min(points), 0.001)
    scale = alt.Scale(type="log", nice=True) if is_log else alt.Scale(zero=True, nice=True)

    def make(width: int) -> alt.LayerChart:
        axis = alt.Axis(format=",.3~r", labelExpr="datum.label + ' s'", tickCount=6 if width == WIDE else 4)
        base = _chart(values)
        layers = [
            base.mark_rule(yOffset=low, y2Offset=low, strokeWidth=2, color=_LIGHT["muted"], opacity=0.5).encode(
                x=alt.X("v0:Q", title=None, scale=scale, axis=axis), x2="v2:Q", y=y
            )
        ]
        for place, (colour, shape, _) in enumerate(POINTS):
            mark = base.mark_point(shape=shape, filled=True, size=90, yOffset=low, opacity=1, color=_LIGHT[colour])
            layers.append(mark.encode(x=alt.X(f"v{place}:Q", title=None, scale=scale, axis=axis), y=y))
        return _lines(base, layers, lines)

    return _drawn(key, make)


def shares(key: str, lines: Sequence[Line]) -> Drawing:
    """A bar for each line's one value, a share of a whole that a mark stands for. They end at twice the whole."""
    y, low = _place(lines), _low(lines)
    values = [{**value, "v0": min(value["v0"], 2.0), "whole": 1} for value in _values(lines)]
    scale = alt.Scale(domain=[0, max(1.05, *(value["v0"] for value in values))], nice=False)

    def make(width: int) -> alt.LayerChart:
        axis = alt.Axis(format=".0%", values=[0, 0.5, 1, 1.5, 2])
        base = _chart(values)
        colour = alt.condition("datum.v0 > 1", alt.value(_LIGHT["worse"]), alt.value(_SERIES[0]))
        marks = base.mark_bar(height=12, yOffset=low, cornerRadiusEnd=2).encode(
            x=alt.X("v0:Q", title=None, stack=None, scale=scale, axis=axis), y=y, color=colour
        )
        wholes = base.mark_tick(color=_LIGHT["ink"], thickness=2, size=22, yOffset=low).encode(
            x=alt.X("whole:Q", title=None, scale=scale, axis=axis), y=y
        )
        return _lines(base, [marks, wholes], lines)

    return _drawn(key, make)


def intervals(key: str, metric: Metric) -> Drawing:
    """A point between two ends for each line: value, low, high; from 0 to 1."""
    y, low = _place(metric.lines), _low(metric.lines)
    scale = alt.Scale(domain=[0, 1])
    axis = alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f")

    def make(width: int) -> alt.LayerChart:
        base = _chart(_values(metric.lines))
        spans = base.mark_rule(yOffset=low, y2Offset=low, strokeWidth=3, color=_SERIES[5]).encode(
            x=alt.X("v1:Q", title=None, scale=scale, axis=axis), x2="v2:Q", y=y
        )
        points = base.mark_point(filled=True, size=80, yOffset=low, opacity=1, color=_SERIES[0]).encode(
            x=alt.X("v0:Q", title=None, scale=scale, axis=axis), y=y
        )
        return _lines(base, [spans, points], metric.lines)

    return _drawn(key, make)


def _chart(values: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[*values]))


def _layered(layers: Sequence[alt.Chart]) -> alt.LayerChart:
    return alt.LayerChart(layer=[*layers])


def _values(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {"place": place, "label": line.label, "more": line.more}
        | {f"v{number}": value for number, value in enumerate(line.values)}
        for place, line in enumerate(lines)
    ]


def _names(texts: Sequence[str]) -> str:
    """An expression for the labels of places. Of our own words alone: names of others must not come into one."""
    return "[" + ", ".join(f"'{text}'" for text in texts) + "][datum.value]"


def _band(places: Sequence[int]) -> alt.Scale:
    # The domain is given: what has no value keeps its place.
    return alt.Scale(domain=[*places], paddingInner=0.2, paddingOuter=0.1)


def _place(lines: Sequence[Line]) -> alt.Y:
    return alt.Y("place:O", title=None, axis=None, scale=alt.Scale(domain=[*range(len(lines))], padding=0))


def _low(lines: Sequence[Line]) -> int:
    """How far below the middle of a line its marks are."""
    return 9 + _second(lines) // 2


def _second(lines: Sequence[Line]) -> int:
    return _SECOND if any(line.more for line in lines) else 0


def _room(values: Sequence[float], width: int) -> alt.Scale:
    """A scale with room for a number to the right of the longest bar."""
    return alt.Scale(domain=[0, max(values) * (1.1 if width == WIDE else 1.3)], nice=False)


def _lines(base: alt.Chart, layers: Sequence[alt.Chart], lines: Sequence[Line]) -> alt.LayerChart:
    """Layers, with the labels of the lines above their marks: beside them a phone has no room.

    The library is to cut no text: it cuts emoji into halves, and then fails.
    """
    second = _second(lines)
    texts = [("label", _LIGHT["ink"], -2 - second // 2)]
    if second:
        texts.append(("more", _LIGHT["muted"], -2 + second // 2))
    labels = [
        base.mark_text(align="left", baseline="bottom", dy=dy, limit=0, color=colour).encode(
            x=alt.value(0), y=_place(lines), text=f"{field}:N"
        )
        for field, colour, dy in texts
    ]
    return _layered([*layers, *labels]).properties(height=(_ROW + second) * len(lines))


def _drawn(key: str, make: Callable[[int], alt.Chart | alt.LayerChart]) -> Drawing:
    return Drawing(*(_svg(f"{key}-{width}", make(width), width) for width in (WIDE, NARROW)))


def _svg(key: str, chart: alt.Chart | alt.LayerChart, width: int) -> str:
    line, muted = _LIGHT["line"], _LIGHT["muted"]
    whole = chart.properties(
        width=width,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        background="transparent",
        # To the right, the last label of an axis may stand out.
        padding={"left": 4, "top": 4, "right": 14, "bottom": 4},
    ).configure(
        # The page says what a chart shows: a name for each mark would be read out mark by mark.
        aria=False,
        font="sans-serif",
        axis={
            "labelColor": muted, "labelFontSize": _ROOM, "labelPadding": 6,
            "gridColor": line, "domainColor": line, "tickColor": line,
        },
        text={"fontSize": _ROOM},
        view={"stroke": None},
    )  # fmt: skip
    # Nothing may be fetched, whatever the specification says.
    return _plain(key, vl_convert.vegalite_to_svg(whole.to_dict(), allowed_base_urls=[]))


def _plain(key: str, svg: str) -> str:
    """A drawing written anew from what is known to be harmless, with ids of its own."""
    root = ElementTree.fromstring(svg)
    old = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    # Numbered from 0: the library counts on from drawing to drawing, and the same chart is to be the same text.
    _clean(root, {name: f"{key}-{place}" for place, name in enumerate(old)})
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    # Its figure tells what it shows.
    root.attrib |= {"aria-hidden": "true", "focusable": "false"}
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, ids: Mapping[str, str]) -> None:
    # Without its namespace, as HTML wants it.
    element.tag = element.tag.rpartition("}")[2]
    kept = {name: value for name, value in element.attrib.items() if name in _ATTRIBUTES}
    for name, value in kept.items():
        if name == "id":
            kept[name] = ids[value]
        elif name == "font-size":
            kept[name] = value.replace(str(_ROOM), str(_TEXT))
        elif name in ("d", "transform"):
            kept[name] = _FRACTION.sub(r"\1", value)
        elif value.startswith("url("):
            kept[name] = f"url(#{ids.get(value[len('url(#') : -1], '')})"
    element.attrib.clear()
    element.attrib.update(kept)
    for child in list(element):
        if child.tag.rpartition("}")[2] in _ELEMENTS:
            _clean(child, ids)
        else:
            element.remove(child)
