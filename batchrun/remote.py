"""Files in a store, such as `s3://bucket/reviews.csv`, as paths.

What reads and writes files takes a `Path` or a `RemotePath`, and knows no more of stores than that.
"""

from __future__ import annotations

import fnmatch
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from batchrun.stores import BUCKETS, WEB, NoStoreError, Status, Store, open_store

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_SECRET = re.compile(
    r"secret|token|passw|jwt|bearer|accesskey|(?:^|[_.-])(?:\w*key|sig|signature|credential|pwd|auth)(?:$|[_.-](?!kind))",
    re.IGNORECASE,
)
_PATTERN = re.compile(r"[*\[]")
_READ_BYTES = 4 * 1024 * 1024
"""Of a store at a time: each read is a request."""


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
    if not parts.netloc and parts.scheme in (*BUCKETS, *WEB):
        raise ValueError(f"{url!r} names no {'bucket' if parts.scheme in BUCKETS else 'host'}")


class RemotePath:
    """A file in a store; it has what this project uses of `pathlib.Path`, with the same meaning.

    All methods that ask the store raise an OSError if it does not answer as it should.
    """

    def __init__(self, store: Store, path: str) -> None:
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
        return cls(open_store(parts.scheme, parts.netloc, query), unquote(parts.path).rstrip("/"))

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
