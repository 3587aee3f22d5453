"""What the README says is what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchrun.cli import cli
from batchrun.errors import ExitCode
from batchrun.job import Job
from batchrun.loading import load_job

from .conftest import FakeProvider, Workspace

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def section(title: str) -> str:
    return README.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_job_of_the_readme_is_a_job(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(blocks("yaml")[0], encoding="utf-8")
    assert load_job(path).model == "anthropic/claude-sonnet-4"
    path.write_text("input: a.csv\nmodel: m\noutput: o.parquet\n" + blocks("yaml")[1], encoding="utf-8")
    assert load_job(path).provider.name == "mine"
    path.write_text(blocks("yaml")[2], encoding="utf-8")
    assert load_job(path).evaluate is not None
    path.write_text(blocks("yaml")[3], encoding="utf-8")
    assert load_job(path).budget is not None


def test_every_key_of_a_job_is_in_the_readme() -> None:
    documented = {line.split("`")[1] for line in section("A job").splitlines() if line.startswith("| `")}
    supported = {field.alias or name for name, field in Job.model_fields.items()}
    assert documented == supported


def test_every_command_is_in_the_readme() -> None:
    commands = section("Commands")
    for name in cli.commands:
        assert f"batchrun {name} " in commands or name == "run", name
    for command in cli.commands.values():
        for option in command.params:
            if option.param_type_name == "option":
                assert option.opts[0] in commands, (command.name, option.opts)


def test_the_exit_codes_are_those_of_the_program() -> None:
    listed = [int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", section("Exit codes"), re.MULTILINE)
              for code in cell.split(",")]  # fmt: skip
    assert sorted(listed) == sorted(ExitCode)


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_of_the_readme_runs(work: Workspace, provide: Callable[..., FakeProvider], code: str) -> None:
    (work.folder / "in.csv").write_text("review_id,prompt,expected\nr1,a,b\n")
    work.write_job(provide().base_url, output="outputs/eval.parquet")
    assert work.run().code == 0
    (work.folder / "jobs").mkdir()
    (work.folder / "in.csv").rename(work.folder / "jobs" / "in.csv")
    work.job.rename(work.folder / "jobs" / "eval.yaml")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=work.folder, env=work.environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
