"""What this process may have and do: open files, the collector, its end."""

from __future__ import annotations

import gc
import threading

from batchrun.errors import JobError

_OTHER_FILES = 64
_OBJECTS_BEFORE_COLLECTION = 20_000
_STUCK = threading.Event()


def allow_connections(concurrency: int) -> None:
    """Each request in flight is an open file; the system's soft limit is often lower than its hard one.

    Raises:
        JobError: the hard limit is too low.
    """
    try:
        import resource
    except ImportError:  # a system without such limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = concurrency + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise JobError(
            f"concurrency {concurrency} needs {wanted} open files, and this system allows {hard}: "
            f"set concurrency to {max(1, hard - _OTHER_FILES)}, or raise ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def calm_collector() -> None:
    """What a request leaves behind dies by its counts: the search for cycles finds nothing, in a tenth of the time.

    So modules are taken out of it, and it comes round less often.
    """
    gc.freeze()
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)


def note_stuck(*, is_so: bool) -> None:
    """Something of a library hangs, and would keep this process from ending; or it does no more."""
    if is_so:
        _STUCK.set()
    else:
        _STUCK.clear()


def is_stuck() -> bool:
    """True if this process ends only if it does not wait for what is left in it."""
    return _STUCK.is_set()
