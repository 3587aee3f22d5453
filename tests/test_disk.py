"""Broken off at any step on the disk, a run goes on as if nothing had been: nothing lost, nothing paid for twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import forks

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell which file is synced")
KINDS = ("capped", "plain", "streamed")


def _call(name: str, folder: Path, **arguments: object) -> tuple[int, str]:
    code, _, stderr = forks().function(f"tests.crashes:{name}", folder=str(folder), **arguments)
    return code, stderr


@pytest.mark.parametrize(
    ("what", "part", "parts"),
    [("kill", 0, 15), ("fail", 0, 18), ("full", 3, 18)],
)
def test_broken_off_at_every_step(quick_path: Path, what: str, part: int, parts: int) -> None:
    code, stderr = _call("break_off", quick_path, kind="capped", what=what, part=part, parts=parts)
    assert code == 0, stderr


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_power_cut_after_a_step(quick_path: Path, kind: str) -> None:
    code, stderr = _call("cut_the_power", quick_path, kind=kind, parts=40)
    assert code == 0, stderr


def test_an_output_that_is_not_synced_before_its_rename_is_seen(quick_path: Path) -> None:
    code, stderr = _call(
        "cut_the_power", quick_path, kind="plain", parts=1, last=30, defect="renames_before_it_is_synced"
    )
    assert code == 1
    assert "half of an output stands in its place" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["kill", "tear", "fail", "full"])
def test_broken_off_at_every_step_in_every_way(quick_path: Path, kind: str, what: str) -> None:
    code, stderr = _call("break_off", quick_path, kind=kind, what=what)
    assert code == 0, stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", range(2))
def test_a_power_cut_after_every_step(quick_path: Path, kind: str, part: int) -> None:
    code, stderr = _call("cut_the_power", quick_path, kind=kind, part=part, parts=2)
    assert code == 0, stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle."""
    folder = tmp_path_factory.mktemp("killed")
    code, _, stderr = forks().function("tests.damages:make", folder=str(folder))
    assert code == 0, stderr
    return folder


DAMAGES = ["cut", "cut log", "cut folded log", "blank", "noise"]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_ledger_is_gone_on_with_or_refused_with_a_way_out(quick_path: Path, killed: Path, what: str) -> None:
    code, _, stderr = forks().function(
        "tests.damages:damage",
        made=str(killed),
        folder=str(quick_path),
        what=what,
        part=0,
        parts=6 if what in ("blank", "noise") else 30,
    )
    assert code == 0, stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGES)
def test_a_ledger_that_is_damaged_anywhere(quick_path: Path, killed: Path, what: str) -> None:
    code, _, stderr = forks().function(
        "tests.damages:damage", made=str(killed), folder=str(quick_path), what=what, part=0, parts=1
    )
    assert code == 0, stderr
