"""Broken off at any step on the disk, a run goes on as if nothing had been: nothing lost, nothing paid for twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .conftest import forks

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell which file is synced")
PARTS = 4


def _call(name: str, folder: Path, **arguments: object) -> None:
    code, _, stderr = forks().function(f"tests.crashes:{name}", folder=str(folder), **arguments)
    assert code == 0, stderr


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("what", ["kill", "fail", "full"])
def test_broken_off_at_every_step(tmp_path: Path, what: str, part: int) -> None:
    _call("break_off", tmp_path, kind="capped", what=what, part=part, parts=PARTS)
