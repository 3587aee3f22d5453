"""No promise breaks in any simulated run; and the simulation sees it when one is made to break."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import forks

BATCH = 25


def _simulate(folder: Path, first: int, stop: int, defect: str | None = None) -> tuple[int, str]:
    code, _, stderr = forks().function(
        "tests.simulated:simulate", first=first, stop=stop, folder=str(folder), defect=defect
    )
    return code, stderr


@pytest.mark.parametrize("first", range(0, 50, BATCH))
def test_no_promise_breaks_in_any_simulated_run(quick_path: Path, first: int) -> None:
    code, stderr = _simulate(quick_path, first, first + BATCH)
    assert code == 0, stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", range(50, 5050, 5 * BATCH))
def test_no_promise_breaks_in_5000_simulated_runs(quick_path: Path, first: int) -> None:
    code, stderr = _simulate(quick_path, first, first + 5 * BATCH)
    assert code == 0, stderr


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        # What the witness sees:
        ("sends_before_the_commit", "was sent before its intent was committed"),
        ("reserves_nothing", "was reserved"),
        ("spends_beyond_the_cap", " taken"),
        ("opens_the_gate", "requests are in flight"),
        ("takes_no_answer_for_no_bill", "and the ledger has $0"),
        ("forgets_what_is_unknown", "attempts, and "),
        # What batchrun itself sees, and ends 70:
        ("asks_again_what_is_answered", "'no answer is paid for twice': a row that has its answer was about"),
        ("settles_twice", "'nothing is sent before its intent is on record': an answer belongs to no attempt"),
        ("counts_nothing_against_the_cap", "'the cap holds': "),
        ("adds_up_wrongly", "'money is exact': the rows add up to"),
        ("leaves_a_row_out", "'every row ends in one state': "),
    ],
)
def test_a_planted_defect_is_seen(quick_path: Path, defect: str, said: str) -> None:
    code, stderr = _simulate(quick_path, 0, 500, defect)
    assert code == 1
    assert said in stderr
    assert "replay it with BATCHRUN_SEED=" in stderr


@pytest.mark.skipif("BATCHRUN_SEED" not in os.environ, reason="set BATCHRUN_SEED to replay one seed")
def test_one_seed_is_replayed(quick_path: Path) -> None:
    seed = int(os.environ["BATCHRUN_SEED"])
    code, stderr = _simulate(quick_path, seed, seed + 1)
    assert code == 0, stderr
