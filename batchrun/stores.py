"""Where files are kept elsewhere: a bucket, or a host, as pyarrow.fs opens it, or else fsspec."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

WEB = ("http", "https")
BUCKETS = ("s3", "gs", "gcs")
"""Stores without folders: an object's name holds slashes."""
_MARKS = (
    "etag", "last-modified", "last_modified", "lastmodified", "modify", "modified", "modificationtime", "updated",
    "created", "content-md5", "digest", "sha",
)  # fmt: skip
_GONE = (404, 410)
_RETRY_SECONDS = 30
_Found = TypeVar("_Found")


class NoStoreError(OSError):
    """An address that nothing here opens, as it stands."""


@dataclass(frozen=True)
class Status:
    """What a store says of a file."""

    st_size: int
    st_mtime_ns: int | str
    """When it was changed; where the store has no time, whatever else it changes with the content."""


class Store:
    """A bucket, or a host: what the paths of one address have in common.

    All methods raise an OSError if it does not answer as it should.
    """

    def __init__(self, root: str, query: str, filesystem: FileSystem, inner: Callable[[str], str]) -> None:
        self.root = root
        self.query = query
        self._filesystem = filesystem
        self._inner = inner
        """What the filesystem calls a path."""
        handler = getattr(filesystem, "handler", None)
        self._fsspec: Any = handler.fs if handler is not None else None
        """What of fsspec is behind the filesystem; None where Arrow opens the store itself."""

    def info(self, path: str) -> FileInfo:
        """What it says of a path, also of one where nothing is."""
        from pyarrow.fs import FileType

        info = _told(lambda: self._filesystem.get_file_info(self._inner(path)))
        if self._is_web and info.type == FileType.NotFound:
            self._refuse_refusal(path)
        return info

    @property
    def _is_web(self) -> bool:
        return self.root.partition(":")[0] in WEB

    def _refuse_refusal(self, path: str) -> None:
        """Of a web server, fsspec takes whatever is no success for a file that is not there."""
        try:
            self._fsspec.info(self._inner(path))
        except FileNotFoundError as exc:
            status = getattr(exc.__cause__, "status", None)
            if exc.__cause__ is not None and status not in _GONE:
                why = f"it answers {status}" if status is not None else str(exc.__cause__)
                raise OSError(f"{self.root}: {why}") from exc

    def status(self, path: str, name: str) -> Status:
        """Size and change of a file. `name`: what an error calls it."""
        info = self.info(path)
        if not info.is_file:
            raise FileNotFoundError(f"there is no file {name}")
        changed = info.mtime_ns
        return Status(int(info.size or 0), changed if changed is not None else self._mark(path))

    def _mark(self, path: str) -> str:
        """What a store without times says that changes with a file's content."""
        told = _told(lambda: self._fsspec.info(self._inner(path))) if self._fsspec is not None else {}
        return " ".join(str(value) for name, value in sorted(told.items()) if name.lower() in _MARKS)

    def open_input(self, path: str) -> Any:
        """A file to read from."""
        return self._guarded(_told(lambda: self._filesystem.open_input_file(self._inner(path))))

    def open_output(self, path: str) -> Any:
        """A file to write to; in a bucket it appears when it is closed."""
        return self._guarded(_told(lambda: self._filesystem.open_output_stream(self._inner(path), compression=None)))

    def _guarded(self, fp: Any) -> Any:
        return _Guarded(fp) if self._fsspec is not None else fp  # Arrow's own raise OSErrors

    def move(self, path: str, target: str) -> None:
        """Put a file in the place of another."""
        if self._fsspec is None:
            _told(lambda: self._filesystem.move(self._inner(path), self._inner(target)))
        elif _moves(self._fsspec):
            _told(lambda: self._fsspec.mv(self._inner(path), self._inner(target)))
        else:
            # Where fsspec moves by its own means, it takes * ? [ in a name for a pattern.
            _told(lambda: self._fsspec.cp_file(self._inner(path), self._inner(target)))
            _told(lambda: self._fsspec.rm_file(self._inner(path)))

    def remove(self, path: str) -> None:
        """Remove a file."""
        remove = self._filesystem.delete_file if self._fsspec is None else self._fsspec.rm_file
        _told(lambda: remove(self._inner(path)))

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it, where the store has folders."""
        if self.root.partition(":")[0] not in BUCKETS:
            _told(lambda: self._filesystem.create_dir(self._inner(path), recursive=True))

    def listed(self, path: str, *, is_deep: bool) -> list[str]:
        """Paths of the files below a folder; nothing if there is no such folder."""
        from pyarrow.fs import FileSelector

        folder = self._inner(path or "/")
        selector = FileSelector(folder.rstrip("/") or folder, allow_not_found=True, recursive=is_deep)
        infos = _told(lambda: self._filesystem.get_file_info(selector))
        outer = len(self._inner("/").rstrip("/"))
        # Of a web server, they come as addresses, quoted.
        return sorted(
            unquote(info.path[outer:]) if self._is_web else info.path[outer:] for info in infos if info.is_file
        )


class _Guarded(io.RawIOBase):
    """A store's file whose errors are OSErrors, whatever the store's library raises."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readable(self) -> bool:
        """As the file says."""
        return bool(self._raw.readable())

    def writable(self) -> bool:
        """As the file says."""
        return bool(self._raw.writable())

    def seekable(self) -> bool:
        """As the file says."""
        return bool(self._raw.seekable())

    def tell(self) -> int:
        """The place in the file."""
        return int(self._raw.tell())

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        return int(_told(lambda: self._raw.seek(offset, whence)))

    def size(self) -> int:
        """Bytes of the file."""
        return int(_told(lambda: self._raw.size()))

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        return bytes(_told(lambda: self._raw.read(None if size < 0 else size)))

    def readinto(self, buffer: Any) -> int:
        """Put the next bytes into a buffer."""
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def write(self, data: Any) -> int:
        """Add bytes."""
        _told(lambda: self._raw.write(data))
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        """Nothing: what was written is there once it is closed."""

    def close(self) -> None:
        """Close it; what was written appears."""
        if not self.closed:
            super().close()
            _told(self._raw.close)


def _moves(filesystem: Any) -> bool:
    """Whether a filesystem of fsspec has a move of its own."""
    from fsspec.spec import AbstractFileSystem

    return type(filesystem).mv is not AbstractFileSystem.mv


def _told(call: Callable[[], _Found]) -> _Found:
    """The libraries behind a store raise what they like."""
    try:
        return call()
    except OSError:
        raise
    except Exception as exc:
        raise OSError(f"{type(exc).__name__}: {exc}") from exc


@lru_cache(maxsize=64)
def open_store(scheme: str, netloc: str, query: str) -> Store:
    """The store of addresses that begin so.

    Raises:
        NoStoreError: nothing that is installed opens it.
        OSError: it does not answer.
    """
    from pyarrow.fs import FileSystem

    root = f"{scheme}://{netloc}"
    try:
        filesystem, path = _told(lambda: FileSystem.from_uri(f"{quote(root, safe=':/@[]')}/{_bounded(scheme, query)}"))
    except OSError as exc:
        if "Unrecognized filesystem type" in str(exc):  # by pyarrow
            return _of_fsspec(scheme, netloc, query)
        if isinstance(exc.__cause__, ValueError | TypeError):
            raise NoStoreError(str(exc.__cause__)) from exc
        raise
    before = path.rstrip("/")
    return Store(root, query, _without_backlog(filesystem), lambda path: f"{before}{path}" or "/")


def _bounded(scheme: str, query: str) -> str:
    """A query under which a store that is away is given up in time: Google's library tries for 15 minutes."""
    if scheme not in ("gs", "gcs") or "retry_limit_seconds" in query:
        return query
    return f"{query or '?'}{'&' if query else ''}retry_limit_seconds={_RETRY_SECONDS}"


def _without_backlog(filesystem: FileSystem) -> FileSystem:
    """S3 as it is, but that a part which is sent is awaited: else all of a file can wait in memory to be sent."""
    from pyarrow import fs

    if filesystem.type_name != "s3":
        return filesystem
    _, (options,) = filesystem.__reduce__()
    endpoint = (
        options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    return fs.S3FileSystem(**{**options, "endpoint_override": endpoint, "background_writes": False})


def _of_fsspec(scheme: str, netloc: str, query: str) -> Store:
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    try:
        import fsspec
    except ImportError:
        raise NoStoreError(f"{scheme}:// is opened by fsspec: install batchrun[remote]") from None
    root = f"{scheme}://{netloc}"
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ValueError:
        raise NoStoreError(f"{scheme}:// is no kind of address that pyarrow or fsspec opens") from None
    except ImportError as exc:
        raise NoStoreError(f"{scheme}:// needs another package: {exc}") from exc
    # Listings that it keeps would be those of before.
    filesystem = _told(
        lambda: kind(
            **{**kind._get_kwargs_from_urls(f"{root}/"), "use_listings_cache": False, "skip_instance_cache": True}
        )
    )
    is_whole = scheme in WEB

    def inner(path: str) -> str:
        url = f"{root}{quote(path) if is_whole else path}{query}"
        return str(kind._strip_protocol(url))

    return Store(root, query, PyFileSystem(FSSpecHandler(filesystem)), inner)
