"""Run a prompt over every row of a table, and account for every cent.

>>> import batchrun
>>> batchrun.run("jobs/eval.yaml").exit_code
0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchrun.api import Event, Progressed, RunResult, Said, arun, run

__version__ = "0.1.0"
__all__ = ["Event", "Progressed", "RunResult", "Said", "__version__", "arun", "run"]


def __getattr__(name: str) -> Any:
    # Not before they are wanted: the command line starts without them.
    if name in __all__:
        from batchrun import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
