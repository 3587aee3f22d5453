"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import KEY, FakeProvider, Workspace

PACKAGE = Path(__file__).parent.parent / "batchrun"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_examples(
    work: Workspace, provide: Callable[..., FakeProvider], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    if module in ("__init__", "api", "report"):
        (work.folder / "jobs").mkdir()
        work.write_rows(["a", "b"])
        work.write_job(provide().base_url, output="../outputs/eval.parquet")
        (work.folder / "in.csv").rename(work.folder / "jobs" / "in.csv")
        work.job.rename(work.folder / "jobs" / "eval.yaml")
        if module == "report":
            assert work.batchrun("jobs/eval.yaml").code == 0
    monkeypatch.chdir(work.folder)
    monkeypatch.setenv("AIML_API_KEY", KEY)
    name = "batchrun" if module == "__init__" else f"batchrun.{module}"
    tried = doctest.testmod(importlib.import_module(name))
    assert tried.attempted > 0
    assert tried.failed == 0
