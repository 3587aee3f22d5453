"""Imports point down: a module imports only from floors below its own."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "batchrun"

FLOORS = [
    {"errors", "usage", "sse", "columns", "uniqueness", "documents", "form", "inflate", "scrub", "stores", "stored"}
    | {"sandbox", "tables", "evidence", "hook", "spill", "palette"},
    {"remote"},
    {
        "money",
        "moments",
        "stopper",
        "providers",
        "jobfile",
        "folders",
        "process",
        "written",
        "lock",
        "migrations",
        "casts",
        "textfile",
        "jsonl",
        "scores",
        "intervals",
    }
    | {"tolerant", "plain"},
    {"overrides", "settings", "options", "report_places"},
    {"records", "job", "prices", "projection", "fetch", "bill", "confusion", "labels", "page_text"},
    {"failures", "loading", "ledger_view", "transport", "files", "shapes"},
    {"wire", "accounts", "schemas", "spend", "spend_details"},
    {"structure", "trend", "kept"},
    {
        "source",
        "template",
        "chat",
        "catalog",
        "retry",
        "health",
        "breaker",
        "pacing",
        "rates",
        "ledger",
        "sink",
        "answers",
        "progress",
        "summary",
        "local",
        "budget",
        "price_sources",
        "estimate",
        "provider_log",
        "evaluate",
        "comparison",
    },
    {"derive", "exports", "journal", "report", "pruning", "node"},
    {"cluster", "hands"},
    {"report_formats", "report_groups", "report_figures"},
    {"report_charts"},
    {"report_drawn"},
    {"report_page"},
    {"runner", "starter", "reviews", "salvage"},
    {"plan"},
    {"spending"},
    {"delivery"},
    {"lookup", "announce"},
    {"invocation"},
    {"outcome", "offline", "reconcile", "verify", "compare", "reporting", "show", "prune"},
    {"cli", "api"},
    {"__main__"},
]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "batchrun":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_every_module_stands_on_one_floor() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    placed = [name for floor in FLOORS for name in floor]
    assert sorted(placed) == sorted(modules)


def test_imports_point_down() -> None:
    level = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{path.stem} (floor {level[path.stem]}) imports {name} (floor {level[name]})"
        for path in sorted(PACKAGE.glob("*.py"))
        if path.stem in level
        for name in sorted(_imports(path))
        if level[name] >= level[path.stem]
    ]
    assert wrong == []


def test_only_one_room_knows_each_outside_thing() -> None:
    owners = {
        "httpx": {"chat", "catalog", "provider_log", "fetch", "transport"},
        "aiohttp": {"transport"}, "yarl": {"transport"},
        "uvloop": {"invocation"}, "aiolimiter": {"rates"},
        "tenacity": {"retry", "provider_log"},
        "click": {"cli"},
        "tqdm": {"progress"},
        "xllamacpp": {"local"}, "jinja2": {"template", "sandbox", "report_page"}, "ruamel": {"jobfile"},
        "filelock": {"lock"},
        "sqlite3": {"ledger", "ledger_view", "migrations", "uniqueness", "salvage", "spill"},
        "zstandard": {"stored"},
        "genai_prices": {"price_sources"},
        "sklearn": {"intervals"}, "scipy": {"intervals"}, "numpy": {"intervals"}, "regex": {"scores"},
        "altair": {"report_charts"}, "vl_convert": {"report_charts"},
        "ray": {"cluster"}, "fsspec": {"stores"},
        "json_repair": {"tolerant"}, "msgspec": {"form", "kept"}, "jsonschema_rs": {"schemas"},
    }  # fmt: skip
    users: dict[str, set[str]] = {name: set() for name in owners}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                if name.split(".")[0] in users:
                    users[name.split(".")[0]].add(path.stem)
    assert users == owners
