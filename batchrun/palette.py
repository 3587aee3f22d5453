"""The colours of pages and charts, in light and in dark."""

from __future__ import annotations

PALETTE = {
    "page": ("#f5f6f8", "#0e1217"),
    "surface": ("#ffffff", "#161b22"),
    "ink": ("#1b232d", "#e6eaf0"),
    "muted": ("#56606e", "#a5afbc"),
    "line": ("#dde1e7", "#2f3843"),
    "worse": ("#b3400a", "#ff9d6b"),
    "better": ("#00735c", "#4fd1ad"),
    "series-1": ("#00549b", "#45a0e1"),
    "series-2": ("#c65501", "#e68842"),
    "series-3": ("#2f8b65", "#12d7a0"),
    "series-4": ("#983a74", "#d48fba"),
    "series-5": ("#cca606", "#edd554"),
    "series-6": ("#6fb6e8", "#a8d9fb"),
    "series-7": ("#8e98a3", "#817b79"),
}
"""Colours by name: in light, in dark. Texts have a contrast of 4.5 at least. The series are akin
to Okabe and Ito's: any two are far apart, also for eyes that lack a kind of cones."""
