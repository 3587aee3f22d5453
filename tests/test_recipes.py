"""The recipes of the README are checked with what checks them, and run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchrun.errors import ExitCode
from batchrun.job import Job

from .conftest import FakeProvider, Workspace
from .test_readme import blocks, section

Provide = Callable[..., FakeProvider]
ROOT = "/srv/evals"
PROGRAM = f"{ROOT}/.venv/bin/batchrun"


def here(recipe: str, work: Workspace) -> str:
    """A recipe with this machine's paths."""
    program = Path(sys.executable).with_name("batchrun")
    return recipe.replace(PROGRAM, str(program)).replace(ROOT, str(work.folder))


def ready(work: Workspace, provider: FakeProvider) -> None:
    (work.folder / "jobs").mkdir()
    work.write_rows(["grüße", "日本", "🎉"])
    work.write_job(provider.base_url, prompt="„{{ prompt }}“", output="../outputs/nightly.parquet")
    for path, name in ((work.job, "nightly.yaml"), (work.folder / "in.csv", "in.csv")):
        path.rename(work.folder / "jobs" / name)
    key = work.environment()["AIML_API_KEY"]
    (work.folder / "key.env").write_text(f"AIML_API_KEY={key}\n", encoding="utf-8")


def outcome(work: Workspace) -> dict[str, object]:
    path = work.folder / "outputs" / "nightly.last-run.json"
    document: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return document


def test_the_cron_line_runs_as_cron_calls_it(work: Workspace, provide: Provide) -> None:
    ready(work, provide())
    (line,) = blocks("cron")[0].splitlines()
    *when, command = line.split(maxsplit=5)
    assert all(re.fullmatch(r"[\d*,/-]+", field) for field in when)
    assert "%" not in command, "cron makes a line break of it"
    # No terminal, no HOME, the locale C, a bare PATH, and files for nobody else.
    ran = subprocess.run(
        ["/bin/sh", "-c", f"umask 077; cd /; {here(command, work)}"],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "SHELL": "/bin/sh"},
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
    assert (outcome(work)["ok"], outcome(work)["exit_code"]) == (3, 0)
    assert [row["prompt"] for row in work.rows(work.folder / "outputs" / "nightly.parquet")] == ["grüße", "日本", "🎉"]
    for path in (work.folder / "outputs").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def units(work: Workspace) -> dict[str, str]:
    found = {}
    for block in blocks("ini"):
        path, _, text = block.partition("\n")
        found[Path(path.removeprefix("# ")).name] = here(text, work)
    return found


def test_the_units_are_verified_and_their_command_runs(work: Workspace, provide: Provide) -> None:
    ready(work, provide())
    found = units(work)
    assert set(found) == {"batchrun-nightly.service", "batchrun-nightly.timer"}
    settings = dict(re.findall(r"^(\w+)=(.*)$", found["batchrun-nightly.service"], re.MULTILINE))
    # Time for what is in flight, and then for the output.
    stop_seconds = Job.model_fields["stop_seconds"].default
    assert int(settings["TimeoutStopSec"]) >= stop_seconds + 60
    ran = subprocess.run(
        shlex.split(settings["ExecStart"]), cwd="/", env={"PATH": "/usr/bin:/bin"} | dict(
            line.split("=", 1) for line in (work.folder / "key.env").read_text(encoding="utf-8").splitlines()
        ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here: apt-get install systemd")
    folder = work.folder / "units"
    folder.mkdir()
    for name, text in found.items():
        (folder / name).write_text(text.replace("User=evals", "User=root"), encoding="utf-8")
    verified = subprocess.run(
        ["systemd-analyze", "verify", *(str(folder / name) for name in found)],
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (verified.returncode, verified.stderr) == (0, ""), verified.stderr


def test_exit_codes_are_sorted_by_what_to_do() -> None:
    lines = [line for line in section("On a schedule").splitlines() if re.match(r"- \d", line)]
    codes = [int(code) for line in lines for code in re.findall(r"(\d+)(?=[,:])", line)]
    assert sorted(codes) == sorted(ExitCode)
