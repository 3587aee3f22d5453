"""Files in a store, such as `s3://bucket/reviews.csv`, as paths: whatever pyarrow.fs opens, or else fsspec.

What reads and writes files takes a `Path` or a `RemotePath`, and knows no more of stores than that.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_SECRET = re.compile(
    r"secret|token|passw|jwt|bearer|accesskey|(?:^|[_.-])(?:\w*key|sig|signature|credential|pwd|auth)(?:$|[_.-](?!kind))",
    re.IGNORECASE,
)
_PATTERN = re.compile(r"[*\[]")
_READ_BYTES = 4 * 1024 * 1024
"""Of a store at a time: each read is a request."""
_WEB = ("http", "https")
_BUCKETS = ("s3", "gs", "gcs")
"""Stores without folders: an object's name holds slashes."""
_MARKS = (
    "etag", "last-modified", "last_modified", "lastmodified", "modify", "modified", "modificationtime", "updated",
    "created", "content-md5", "digest", "sha",
)  # fmt: skip
_GONE = (404, 410)
_RETRY_SECONDS = 30
_Found = TypeVar("_Found")


def is_url(path: str) -> bool:
    """True for what is no path of this machine."""
    return _URL.match(path) is not None


def check_url(url: str) -> None:
    """Refuse an address that no store has, or that shows a secret; nothing is asked for it.

    Raises:
        ValueError: what is wrong with it.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        raise ValueError(f"{url!r} is on this machine: write the path alone")
    user, at, _ = parts.netloc.rpartition("@")
    # Azure has the container there, and Google's store takes "anonymous" for nobody.
    if at and (":" in user or not (parts.scheme.startswith("abfs") or user == "anonymous")):
        raise ValueError(
            f"{parts.scheme}://…@{parts.netloc.rpartition('@')[2]} holds a user name or a key: "
            "give it to the store's own settings or environment variables, such as AWS_ACCESS_KEY_ID"
        )
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if _SECRET.search(name) or "@" in value:
            raise ValueError(f"{parts.scheme}://{parts.netloc}{parts.path}: {name} looks like a secret in an address")
    if parts.fragment or "\0" in url:
        raise ValueError(f"{parts.scheme}://{parts.netloc}{parts.path} holds a # or a NUL character")
    if not parts.netloc and parts.scheme in (*_BUCKETS, *_WEB):
        raise ValueError(f"{url!r} names no {'bucket' if parts.scheme in _BUCKETS else 'host'}")


class NoStoreError(OSError):
    """An address that nothing here opens, as it stands."""


@dataclass(frozen=True)
class Status:
    """What a store says of a file."""

    st_size: int
    st_mtime_ns: int | str
    """When it was changed; where the store has no time, whatever else it changes with the content."""


class RemotePath:
    """A file in a store; it has what this project uses of `pathlib.Path`, with the same meaning.

    All methods that ask the store raise an OSError if it does not answer as it should.
    """

    def __init__(self, store: _Store, path: str) -> None:
        self._store = store
        self._path = path

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """The path of an address.

        Raises:
            NoStoreError: nothing that is installed opens it.
            OSError: its store does not answer.
        """
        try:
            parts = urlsplit(url)
        except ValueError as exc:
            raise NoStoreError(f"{url} is no address: {exc}") from exc
        query = f"?{parts.query}" if parts.query else ""
        return cls(_store(parts.scheme, parts.netloc, query), unquote(parts.path).rstrip("/"))

    def __str__(self) -> str:
        return f"{self._place.replace('%', '%25').replace('?', '%3F').replace('#', '%23')}{self._store.query}"

    @property
    def _place(self) -> str:
        """The same for the same file, however its store is reached."""
        return f"{self._store.root}{self._path}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._place == other._place

    def __hash__(self) -> int:
        return hash(self._place)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._store, f"{self._path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self._path).name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self._path).stem

    @property
    def suffix(self) -> str:
        """The ending of the last part, with its dot."""
        return PurePosixPath(self._path).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(self._store, str(PurePosixPath(self._path).parent))

    def with_name(self, name: str) -> RemotePath:
        """Another file in the same folder."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is a file."""
        return bool(self._store.info(self._path).is_file)

    def is_dir(self) -> bool:
        """Whether there is a folder, or a file whose name goes on with a slash."""
        from pyarrow.fs import FileType

        return bool(self._store.info(self._path).type == FileType.Directory)

    def stat(self) -> Status:
        """Its size, and what changes with its content."""
        return self._store.status(self._path, str(self))

    @contextmanager
    def open(self, mode: str) -> Iterator[IO[bytes]]:
        """Open for reading ("rb") or writing ("wb"); what is written to a bucket appears when it is closed."""
        if mode == "rb":
            with self.open_input() as raw, io.BufferedReader(raw, _READ_BYTES) as fp:
                yield fp
            return
        with self._store.open_output(self._path) as fp:
            yield fp

    def open_input(self) -> Any:
        """A file to read from, as pyarrow takes it."""
        return self._store.open_input(self._path)

    def replace(self, target: RemotePath) -> None:
        """Put it in the place of another file of the same store."""
        self._store.move(self._path, target._path)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove it."""
        if not missing_ok or self.is_file():
            self._store.remove(self._path)

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Make the folder, where the store has folders."""
        assert parents
        assert exist_ok
        self._store.make_folder(self._path)

    def iterdir(self) -> Iterator[RemotePath]:
        """The files and folders in it, by name."""
        for path in self._store.listed(self._path, is_deep=False):
            yield RemotePath(self._store, path)

    @property
    def is_pattern(self) -> bool:
        """True if it names files by a pattern: `*`, `**`, `[…]`."""
        return _PATTERN.search(self._path) is not None

    def matches(self, pattern: RemotePath) -> bool:
        """Whether a pattern names it."""
        return self._store.root == pattern._store.root and _fits(self._path.split("/"), pattern._path.split("/"))

    def found(self) -> list[RemotePath]:
        """The files that a pattern names, by name."""
        fixed = self._path[: _PATTERN.search(self._path).start()] if self.is_pattern else self._path  # type: ignore[union-attr]
        is_deep = "/" in self._path[len(fixed) :] or "**" in self._path
        paths = (
            RemotePath(self._store, path) for path in self._store.listed(fixed.rpartition("/")[0], is_deep=is_deep)
        )
        return [path for path in paths if path.matches(self)]


def _fits(parts: list[str], wanted: list[str]) -> bool:
    """Whether a path's parts are those of a pattern; as on this machine, it finds no hidden ones."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        goes_deeper = bool(parts) and not parts[0].startswith(".") and _fits(parts[1:], wanted)
        return goes_deeper or _fits(parts, wanted[1:] if wanted[1:] else ["*"])
    if not parts or parts[0].startswith(".") > wanted[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


AnyPath = Path | RemotePath


@contextmanager
def for_arrow(path: AnyPath) -> Iterator[Any]:
    """What pyarrow's readers take for a file."""
    if isinstance(path, Path):
        yield path
        return
    with path.open_input() as source:
        yield source


class _Store:
    """A bucket, or a host: what the paths of one address have in common."""

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
        from pyarrow.fs import FileType

        info = _told(lambda: self._filesystem.get_file_info(self._inner(path)))
        if self._is_web and info.type == FileType.NotFound:
            self._refuse_refusal(path)
        return info

    @property
    def _is_web(self) -> bool:
        return self.root.partition(":")[0] in _WEB

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
        return self._guarded(_told(lambda: self._filesystem.open_input_file(self._inner(path))))

    def open_output(self, path: str) -> Any:
        return self._guarded(_told(lambda: self._filesystem.open_output_stream(self._inner(path), compression=None)))

    def _guarded(self, fp: Any) -> Any:
        return _Guarded(fp) if self._fsspec is not None else fp  # Arrow's own raise OSErrors

    def move(self, path: str, target: str) -> None:
        if self._fsspec is None:
            _told(lambda: self._filesystem.move(self._inner(path), self._inner(target)))
        elif _moves(self._fsspec):
            _told(lambda: self._fsspec.mv(self._inner(path), self._inner(target)))
        else:
            # Where fsspec moves by its own means, it takes * ? [ in a name for a pattern.
            _told(lambda: self._fsspec.cp_file(self._inner(path), self._inner(target)))
            _told(lambda: self._fsspec.rm_file(self._inner(path)))

    def remove(self, path: str) -> None:
        remove = self._filesystem.delete_file if self._fsspec is None else self._fsspec.rm_file
        _told(lambda: remove(self._inner(path)))

    def make_folder(self, path: str) -> None:
        if self.root.partition(":")[0] not in _BUCKETS:
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
def _store(scheme: str, netloc: str, query: str) -> _Store:
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
    return _Store(root, query, _without_backlog(filesystem), lambda path: f"{before}{path}" or "/")


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


def _of_fsspec(scheme: str, netloc: str, query: str) -> _Store:
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
    is_whole = scheme in _WEB

    def inner(path: str) -> str:
        url = f"{root}{quote(path) if is_whole else path}{query}"
        return str(kind._strip_protocol(url))

    return _Store(root, query, PyFileSystem(FSSpecHandler(filesystem)), inner)
