"""The command line: `batchrun jobs/eval.yaml` and its sisters. stdout carries data, stderr carries talk."""

from __future__ import annotations

import difflib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from batchrun import __version__
from batchrun.errors import BatchrunError, ExitCode, JobError, StorageError, exit_code_of
from batchrun.money import exact_json
from batchrun.process import is_stuck
from batchrun.remote import check_url, is_url
from batchrun.tables import harmless

if TYPE_CHECKING:
    from batchrun.job import Job
    from batchrun.progress import Watcher

# Whatever takes long to import is imported by the command that needs it: `--help` and a refused job are instant.

_EPILOG = """\b
Exit codes:
  0    every row has an answer
  1    finished; some rows failed or did not parse, or the input changed while the run
       was going on
  2    the job, its input or the command line is wrong; nothing was sent
  3    stopped by the job's budget, deadline or max_error_rate; what was done is kept
  4    the provider refused the account, or the first 20 rows in the same words, or cannot
       be reached; what was done is kept
  5    another process holds this job's ledger
  6    the ledger or the output could not be written
  70   one of batchrun's own promises was broken: a bug
  130, 143   interrupted; run again to go on
"""


class _Commands(click.Group):
    """A group whose default command is `run`, so that `batchrun jobs/eval.yaml` works."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            self._refuse_misspelt(args[0])
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def _refuse_misspelt(self, word: str) -> None:
        """A word that is nearly a command, and no file, is not taken for a job."""
        near = difflib.get_close_matches(word, self.commands, 1)
        if near and not Path(word).exists():
            raise click.UsageError(f"there is no command {word!r}: did you mean {near[0]!r}?")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # An option of `run` may stand before the job file.
        if args and args[0].startswith("-") and args[0] not in ("--help", "-h", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


class _PathHere(click.Path):
    """A path of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an address before it becomes a path that nobody meant."""
        if isinstance(value, str) and is_url(value):
            try:
                check_url(value)
            except ValueError as exc:  # it may hold a secret, which is not shown
                self.fail(str(exc), param, ctx)
            self.fail(f"{value} is not on this machine, and has to be", param, ctx)
        return super().convert(value, param, ctx)


_ADOPT = click.option(
    "--adopt-ledger", is_flag=True, help="Take over the ledger of a job file that has been moved or renamed."
)
_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on stdout.")
_JOB = click.argument("job", type=_PathHere(path_type=Path), metavar="JOB")
_SETTINGS = (
    click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE",
        help="Another value for a key of the job, such as parameters.temperature=0.2; paths as in the job file.",
    ),
    click.option("--model", metavar="ID", help="Another model."),
    click.option("--limit", type=click.IntRange(0), metavar="N", help="The first N rows of the input only."),
    click.option("--input", "input_path", metavar="PATH", help="Another input; relative to where you are."),
    click.option("--output", "output_path", metavar="PATH", help="Another output, likewise; the ledger stays."),
)  # fmt: skip


def _overridable(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SETTINGS):
        command = option(command)
    return command


def _overrides(
    assignments: Sequence[str],
    model: str | None,
    limit: int | None,
    input_path: str | None,
    output_path: str | None,
    deadline: str | None = None,
    engine: str | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    from batchrun.overrides import read

    found = read(assignments)
    named = {
        "model": model,
        "input.limit": limit,
        "input.path": _from_here(input_path),
        "output.path": _from_here(output_path, is_template=True),
        "deadline": deadline,
        # The settings of a cluster mean nothing to this process, and go with it.
        "engine" if engine == "local" else "engine.name": engine,
        "engine.address": address,
    }
    for key, value in named.items():
        if value is not None:
            if key in found:
                raise JobError(f"{key} is set twice")
            found[key] = value
    return found


def _from_here(path: str | None, *, is_template: bool = False) -> str | None:
    """A path of the command line, absolute: those of a job are relative to its file."""
    if path is None or is_url(path):
        return path
    try:
        here = str(Path.cwd())
    except OSError as exc:
        raise JobError(f"{path}: the folder that you are in is gone") from exc
    if is_template:
        here = here.replace("{", "{{").replace("}", "}}")
    return str(Path(here, path))


@click.group(
    cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)  # fmt: skip
@click.version_option(__version__, prog_name="batchrun")
def cli() -> None:
    """Run a prompt over every row of a table, and account for every cent.

    `batchrun JOB` runs a job file, or goes on with its unfinished run: no answer is paid for twice.
    """


@cli.command()
@_JOB
@click.option("--retry-failed", is_flag=True, help="Ask the failed rows again.")
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    help="Ask N random rows only, and project what the whole run will take; the next call goes on with it.",
)
@click.option(
    "--if-running",
    default="fail",
    show_default=True,
    metavar="fail|skip|wait[=SECONDS]",
    help="While another process runs the job: exit 5, exit 0 with a line, or wait for it.",
)
@click.option(
    "--new", is_flag=True, help="Begin a new run; an unfinished one is abandoned, and its money still counts."
)
@click.option("--max-age", metavar="AGE", help="Likewise if the unfinished run began longer ago: 24h, 90m, 7d.")
@click.option(
    "--deadline",
    metavar="WHEN",
    help="Ask no more rows in time to be done by then, and exit 3: 2h, 90m, 06:00, 2026-11-01T06:00.",
)
@click.option("--engine", metavar="local|ray", help="Send from this process, or from the workers of a Ray cluster.")
@click.option("--address", metavar="HOST:PORT", help="Of the cluster; default: RAY_ADDRESS, or one for this run alone.")
@_overridable
@_AS_JSON
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary on stderr; errors only.")
@_ADOPT
def run(
    job: Path,
    retry_failed: bool,
    sample: int | None,
    if_running: str,
    new: bool,
    max_age: str | None,
    as_json: bool,
    quiet: bool,
    adopt_ledger: bool,
    **settings: Any,
) -> None:
    """Run a job, or go on with its unfinished run (the default command)."""
    from batchrun.loading import load_job
    from batchrun.moments import age_of
    from batchrun.options import Options, Overlap
    from batchrun.outcome import Surroundings, carry_out, failed

    loaded: Job | None = None
    try:
        options = Options(
            Overlap.of(if_running),
            retry_failed=retry_failed,
            adopt_ledger=adopt_ledger,
            sample=sample,
            is_new=new,
            max_age=age_of(max_age, "--max-age") if max_age is not None else None,
        )
        loaded = load_job(job, _overrides(**settings))
        around = Surroundings(
            say=_silent if quiet else _say,
            warn=_say,
            environ=os.environ,
            watch=None if quiet else _progress,
            output=sys.stderr,
            begin=_begin,
        )
        # Libraries print what they like: stdout is for data.
        with redirect_stdout(sys.stderr):
            outcome = carry_out(loaded, options, around)
    except BaseException as exc:
        if as_json:
            _print(exact_json(failed(exc, loaded)))
        raise
    if outcome.error is not None:
        if as_json:
            _print(exact_json(outcome.document))
        raise outcome.error
    if outcome.summary is None:
        if as_json:
            _print(exact_json(outcome.document))
    else:
        _show(outcome.summary, as_json, quiet, outcome.document)
    sys.exit(outcome.exit_code)


def _begin() -> None:
    from batchrun.process import calm_collector

    calm_collector()


def _progress(**figures: Any) -> Watcher:
    from batchrun.progress import Progress

    return Progress(sys.stderr, **figures)


@cli.command()
@_JOB
@click.option(
    "--rows", default=3, show_default=True, type=click.IntRange(0, 1_000_000), help="How many rendered prompts to show."
)
@click.option("--offline", is_flag=True, help="Do not ask for the provider's price list.")
@_overridable
@_AS_JSON
def check(job: Path, rows: int, offline: bool, as_json: bool, **settings: Any) -> None:
    """Validate a job, show its first prompts, count its rows and estimate its cost; sends no prompt."""
    from batchrun.loading import load_job
    from batchrun.offline import check

    preview = check(load_job(job, _overrides(**settings)), os.environ, samples=rows, is_offline=offline)
    for warning in preview.warnings:
        _say(f"warning: {warning}")
    _print(preview.to_json() if as_json else _text(preview.lines()))
    if preview.rows and preview.fault_count == preview.rows:
        sys.exit(ExitCode.ROWS_FAILED)


@cli.command()
@click.argument("run_a")
@click.argument("run_b")
@_AS_JSON
def compare(run_a: str, run_b: str, as_json: bool) -> None:
    """Compare two runs: what differs, whether by more than chance, and what each took.

    RUN_A and RUN_B are outputs (.parquet), job files (their newest run), or JOB@RUN with the id of a run.
    """
    from batchrun.compare import compare

    found = compare(run_a, run_b)
    _print(found.to_json() if as_json else _text(found.lines()))


@cli.command()
@_JOB
@click.option("--reprice", is_flag=True, help="Derive the amounts that nobody reported anew, from the prices of now.")
@click.option("--offline", is_flag=True, help="With --reprice: take the provider's price list as it came last.")
@click.option(
    "--to",
    type=_PathHere(path_type=Path),
    metavar="FILE",
    help="Write another file instead: .csv, .jsonl or .parquet.",
)
@click.option("--columns", metavar="A,B,…", help="Write these columns only, in this order.")
@_AS_JSON
@click.option("--quiet", "-q", is_flag=True, help="No summary on stderr; errors only.")
@_ADOPT
def export(
    job: Path,
    reprice: bool,
    offline: bool,
    to: Path | None,
    columns: str | None,
    as_json: bool,
    quiet: bool,
    adopt_ledger: bool,
) -> None:
    """Write the Parquet of the newest run again, or another file, from the ledger, for nothing."""
    from batchrun.loading import load_job
    from batchrun.lock import held

    if columns is not None and to is None:
        raise click.UsageError("--columns is for another file: add --to FILE")
    loaded = load_job(job)
    with held(loaded.ledger_path):
        from batchrun.offline import export

        summary, repriced = export(
            loaded, os.environ, adopt=adopt_ledger, reprices=reprice, is_offline=offline, to=to,
            columns=[name.strip() for name in columns.split(",")] if columns is not None else None,
            say=_silent if quiet else _say,
        )  # fmt: skip
    if repriced is not None and not quiet:
        _say(repriced.line())
    _show(summary, as_json, quiet)


@cli.command()
@_JOB
@click.option(
    "--settle-after",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, 1_000_000),
    metavar="MINUTES",
    help="An attempt older than this that the provider's log does not have was not billed.",
)
@_AS_JSON
def reconcile(job: Path, settle_after: float, as_json: bool) -> None:
    """Settle unknown outcomes by the provider's own log, and compare the two bills (AI/ML API)."""
    from batchrun.loading import load_job
    from batchrun.lock import held

    if not isfinite(settle_after):
        raise click.BadParameter(f"{settle_after} is no number of minutes", param_hint="--settle-after")
    loaded = load_job(job)
    with held(loaded.ledger_path):
        from batchrun.offline import refresh
        from batchrun.reconcile import reconcile

        found = reconcile(
            loaded,
            os.environ,
            settle_after_seconds=settle_after * 60,
            rewrite=lambda ledger: refresh(loaded, ledger),
            on_page=lambda lines: _say(f"{lines} lines read") if lines and lines % 10_000 == 0 else None,
        )
    for line in found.report():
        _say(line)
    if as_json:
        _print(found.to_json())
    sys.exit(found.exit_code)


@cli.command()
@_JOB
@_AS_JSON
def verify(job: Path, as_json: bool) -> None:
    """Prove offline that ledger and Parquet agree to the last digit; exit 1 with a list of what does not."""
    from batchrun.loading import load_job
    from batchrun.lock import held

    loaded = load_job(job)
    with held(loaded.ledger_path):
        from batchrun.verify import verify

        verdict = verify(loaded)
    _print(verdict.to_json() if as_json else _text(verdict.lines()))
    sys.exit(ExitCode.ROWS_FAILED if verdict.wrong else ExitCode.OK)


@cli.command()
@_JOB
@_ADOPT
def salvage(job: Path, adopt_ledger: bool) -> None:
    """Put a whole ledger in the place of a damaged one, with all of it that can be read; exit 1 if some is lost."""
    from batchrun.loading import load_job
    from batchrun.lock import held

    loaded = load_job(job)
    with held(loaded.ledger_path):
        from batchrun.salvage import salvage

        saved = salvage(loaded, adopt=adopt_ledger)
    for line in saved.lines():
        _say(line)
    sys.exit(ExitCode.OK if saved.is_all else ExitCode.ROWS_FAILED)


@cli.command()
@click.argument("data", type=_PathHere(path_type=Path), metavar="DATA")
@click.option("--output", "-o", type=_PathHere(path_type=Path), help="The job file to write. Default: beside DATA.")
def init(data: Path, output: Path | None) -> None:
    """Write a commented job file for a data file (.csv, .tsv, .parquet, .jsonl)."""
    from batchrun.starter import write_starter

    default = data.parent / f"{data.name.split('.')[0] or 'job'}.yaml"
    _print(str(write_starter(data, output or default)))


@cli.command()
@click.argument("paths", nargs=-1, type=_PathHere(path_type=Path), metavar="[PATH…]")
@click.option(
    "--by",
    metavar="KEY",
    help="Sums by job, model, provider, day, month, or a column of the outputs, such as label.",
)
@click.option("--since", metavar="WHEN", help="Runs that began since then: 7d, 24h, 4w, or a date such as 2026-11-01.")
@click.option("--run", "runs", multiple=True, metavar="ID", help="This run only, by its id or how that begins.")
@click.option("--top", type=click.IntRange(1, 1000), metavar="N", help="The N costliest rows too.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "parquet", "markdown"]),
    default="table",
    show_default=True,
    help="CSV and Parquet hold the runs or, with --by, its groups.",
)
@click.option("--output", type=_PathHere(path_type=Path), metavar="FILE", help="Write there, not to stdout.")
@click.option(
    "--html",
    type=_PathHere(path_type=Path),
    metavar="FILE",
    help="Write a page with charts, which needs no network and runs no script.",
)
@click.option("--no-content", is_flag=True, help="With --html: leave prompts and answers out.")
def report(
    paths: tuple[Path, ...],
    by: str | None,
    since: str | None,
    runs: tuple[str, ...],
    top: int | None,
    form: str,
    output: Path | None,
    html: Path | None,
    no_content: bool,
) -> None:
    """What every run cost. PATH: a ledger, an output, or a folder of them (outputs, if there is none)."""
    from batchrun.reporting import make, make_page, write

    if html is not None and (by is not None or output is not None or form != "table"):
        raise click.UsageError("--html is a report of its own: leave out --by, --format and --output")
    if no_content and html is None:
        raise click.UsageError("--no-content is for a page: add --html FILE")
    if top is not None and form in ("csv", "parquet"):
        raise click.UsageError(f"--top has no place in --format {form}: use json, table or markdown")
    if html is not None:
        page = make_page(paths, since=since, runs=runs, top=top, content=not no_content)
        for note in page.notes:
            _say(note)
        write(html, page.data)
        _say(f"page: {html}")
        return
    made = make(paths, by=by, since=since, runs=runs, top=top, form=form, width=_width() if output is None else None)
    for note in made.notes:
        _say(note)
    if output is not None:
        write(output, made.data)
    elif form == "parquet":
        raise click.UsageError("--format parquet is no text: add --output FILE")
    else:
        _print(made.data.decode())


def _width() -> int | None:
    """Of the terminal; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@cli.command()
@_JOB
@click.option("--run", "run_id", metavar="ID", help="A run by its id or how that begins; the newest without.")
@click.option("--row", type=click.IntRange(1), metavar="N", help="A row of the input, counted from 1.")
@_AS_JSON
def show(job: Path, run_id: str | None, row: int | None, as_json: bool) -> None:
    """Everything that is known of a run, or of one of its rows: prompts, attempts, costs, answers."""
    from batchrun.loading import load_job
    from batchrun.show import show_row, show_run

    loaded = load_job(job)
    found = show_run(loaded, run_id) if row is None else show_row(loaded, run_id, row)
    _print(found.to_json() if as_json else _text(found.lines()))


@cli.command()
@_JOB
@click.option("--older-than", required=True, metavar="AGE", help="Runs that ended before then: 30d, 4w, or a date.")
@_AS_JSON
@_ADOPT
def prune(job: Path, older_than: str, as_json: bool, adopt_ledger: bool) -> None:
    """Drop the raw answers of old finished runs from the ledger; every figure stays."""
    from datetime import UTC, datetime

    from batchrun.loading import load_job
    from batchrun.lock import held
    from batchrun.moments import moment_of

    before = moment_of(older_than, datetime.now(UTC), "--older-than")
    loaded = load_job(job)
    with held(loaded.ledger_path):
        from batchrun.prune import prune

        found = prune(loaded, before, adopt=adopt_ledger)
    for line in found.lines():
        _say(line)
    if as_json:
        _print(found.to_json())


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a job file; editors complete and check from it."""
    import json

    from batchrun.loading import json_schema

    _print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def main() -> None:
    """Entry point: runs a command and turns errors into messages and exit codes."""
    signal.signal(signal.SIGTERM, _terminated)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        _leave(ExitCode.WRONG_JOB)
    except click.ClickException as exc:
        exc.show()
        context = exc.ctx if isinstance(exc, click.UsageError) else None
        if "--json" in sys.argv and context is not None and context.info_name == "run":
            from batchrun.outcome import failed

            _print(exact_json(failed(JobError(exc.format_message()))))
        _leave(ExitCode.WRONG_JOB)
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; run again to go on")
        _leave(ExitCode.INTERRUPTED)
    except SystemExit as exc:
        _leave(exc.code if isinstance(exc.code, int) else ExitCode.OK)
    except BatchrunError as exc:
        _say(str(exc))
        _leave(exc.exit_code)
    except OSError as exc:
        _say(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
        _leave(exit_code_of(exc))
    except Exception:  # noqa: BLE001 - whatever is left is a bug, and must not look like failed rows
        import traceback

        traceback.print_exc()
        _say(f"this is a bug in batchrun {__version__}: please report it with the lines above, and keep the ledger")
        _leave(ExitCode.BUG)
    _leave(code if isinstance(code, int) else ExitCode.OK)


def _open_closed_streams() -> None:
    """cron and daemons may close them; the next file to be opened must not take their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


def _leave(code: int) -> NoReturn:
    """Exit with a code that a full disk or a closed pipe does not replace by Python's own."""
    if not _is_flushed(sys.stdout) and code == ExitCode.OK:
        code = ExitCode.STORAGE
    _is_flushed(sys.stderr)
    if is_stuck():
        os._exit(code)
    sys.exit(code)


def _is_flushed(stream: TextIO) -> bool:
    try:
        stream.flush()
    except OSError:
        _mute(stream)
        return False
    return True


def _mute(stream: TextIO) -> None:
    """What could not be written would be tried again at the very end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _terminated(number: int, frame: Any) -> None:
    """SIGTERM outside of the sending: leave through the `finally`s."""
    sys.exit(ExitCode.TERMINATED)


def _text(lines: Iterable[str]) -> str:
    return "\n".join(map(harmless, lines))


def _print(data: str) -> None:
    try:
        # Not click's echo, which takes escape sequences out of data.
        sys.stdout.write(f"{data}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        _mute(sys.stdout)  # whoever read it has seen enough
    except OSError as exc:
        raise StorageError(f"stdout cannot be written: {exc.strerror or exc}") from exc


def _say(line: str) -> None:
    # Talk that nobody can hear decides nothing.
    with suppress(OSError):
        click.echo(f"batchrun: {harmless(line)}", err=True)


def _silent(line: str) -> None:
    """--quiet."""


def _show(summary: Any, as_json: bool, quiet: bool, document: dict[str, Any] | None = None) -> None:
    if not quiet:
        for line in summary.lines():
            _say(line)
    if as_json:
        _print(exact_json(document) if document is not None else summary.to_json())
