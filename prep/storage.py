"""Where files lie: on this machine, in S3 (`s3://bucket/key`), in Google's storage (`gs://`), on the Hugging Face hub.

A place is a local path or an address; both are plain text, so they pass between processes, and each process opens file
systems for itself. Credentials and the endpoint come from the environment, as pyarrow reads them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL (an http:// one works), GOOGLE_APPLICATION_CREDENTIALS,
HF_TOKEN.

What is written is complete or absent. A remote file is written here first and sent when it is complete: a stream to S3
that is given up publishes what it got until then.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from fnmatch import fnmatch, fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.fs

from shards.errors import UserError, unknown_name
from shards.files import lock_folder, publish, sync_directory

SCHEMES = ("s3", "gs", "hf")
STREAM_BUFFER = 8 << 20  # bytes of one request when a remote file is read from front to end
_RETRY_SECONDS = 30  # of Google's client, which else tries for a quarter of an hour
_TEMPORARY = ".tmp"
SYNCS = 8  # files that are synced at once
_SHOWN = 240  # characters of what a client says


class Stat(NamedTuple):
    """A file: its path or address, its bytes, and when it was changed (nanoseconds; 0 where that is not known)."""

    path: str
    size: int
    modified: int


def is_remote(path: str) -> bool:
    """Whether this is an address and not a local path.

    Raises:
        UserError: an address of an unknown kind.
    """
    scheme, mark, _ = path.partition("://")
    if not mark or not scheme.isalnum():
        return False
    if scheme not in SCHEMES:
        raise UserError(f"{path}: {unknown_name('kind of address', scheme, SCHEMES)}")
    return True


def open_input(path: str) -> pa.NativeFile:
    """Open a file for reading at any place in it.

    Raises:
        UserError: it is not there or cannot be read.
    """
    if not is_remote(path):
        return _open_local(path)
    with _explained(path):
        return _remote(path)[0].open_input_file(_remote(path)[1])


def open_stream(path: str) -> BinaryIO:
    """Open a file for reading from front to end; a remote one is fetched in large pieces. Nothing is decompressed.

    Raises:
        UserError: it is not there or cannot be read.
    """
    file: Any = open_input(path)  # a NativeFile has what a BufferedReader asks of it
    return io.BufferedReader(file, STREAM_BUFFER) if is_remote(path) else file


def raise_if_unreachable(path: str, error: Exception) -> None:
    """Tell a file that is damaged from storage that fails while it is read.

    Raises:
        UserError: it is the storage.
    """
    if is_remote(path) and any(mark in str(error) for mark in _STORAGE_ERRORS):
        raise UserError(f"{path}: {_advice(path, str(error))}") from None


def stat(path: str) -> Stat | None:
    """Size and time of a file; None: there is none of this name (but perhaps a folder)."""
    if not is_remote(path):
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stat(path, found.st_size, found.st_mtime_ns) if os.path.isfile(path) else None
    system, inner = _remote(path)
    with _explained(path):
        info = system.get_file_info(inner)
    return Stat(path, info.size, _time(info)) if info.is_file else None


def remote_files(address: str) -> list[Stat]:
    """All files below a remote folder, sorted; empty if there is none."""
    system, inner = _remote(address)
    scheme = address.partition("://")[0]
    with _explained(address):
        found = system.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True, recursive=True))
    return sorted(Stat(f"{scheme}://{info.path}", info.size, _time(info)) for info in found if info.is_file)


class Folder:
    """A folder for output and what is read back from it, local or remote; picklable.

    Args:
        uri: a local path, or an address such as `s3://bucket/prefix`.

    Attributes:
        uri: as text.
        local: the path, None for a remote folder.

    Raises:
        UserError: an address of an unknown kind; from the methods, storage that cannot be reached or refuses.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self.local = None if is_remote(self.uri) else Path(uri)
        if self.local is None:
            self.uri = self.uri.rstrip("/")

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __str__(self) -> str:
        return self.uri

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def path(self, name: str) -> str:
        """Path or address of a file in it, whether it is there or not."""
        return f"{self.uri}/{name}" if self.local is None else str(self.local / name)

    def child(self, name: str) -> Folder:
        """A folder in it."""
        return Folder(self.path(name))

    def read(self, name: str) -> bytes | None:
        """Content of a file; None: no such file."""
        if self.local is not None:
            try:
                return (self.local / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if stat(self.path(name)) is None:
            return None
        with self.open(name) as file:
            content: bytes = file.read()
        return content

    def write(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """Write a small file; readers see the old content or the new, never a part."""
        with self.create(name, durable=durable) as file:
            file.write(content)

    @contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[pa.NativeFile]:
        """A file to be written in a `with` block: published at its end, absent (or as it was) after an exception.

        Args:
            name: of the file.
            durable: whether it is to survive a power cut from the end of the block on. It takes some milliseconds on
                a local disk; many files are better synced together (see `sync`).
        """
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            temporary = (
                self.local / f"{name}.{os.getpid()}{_TEMPORARY}"
            )  # a task may be tried while its twin still runs
            try:
                with pa.OSFile(str(temporary), "wb") as file:
                    yield file
                if durable:
                    publish(temporary, self.local / name)
                else:
                    os.replace(temporary, self.local / name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            return
        self._require_writable()
        with tempfile.TemporaryDirectory(prefix="minigpt-") as directory:
            complete = str(Path(directory) / "file")
            with pa.OSFile(complete, "wb") as file:
                yield file
            system, inner = _remote(self.path(name))
            with _explained(self.path(name)):  # one call: no signal falls between opening and closing the stream
                pyarrow.fs.copy_files(
                    complete,
                    inner,
                    source_filesystem=pyarrow.fs.LocalFileSystem(),
                    destination_filesystem=system,
                    use_threads=False,
                )

    def sync(self, names: Iterable[str]) -> None:
        """Make files, by their names below the folder, survive a power cut, and the folders that hold them."""
        if self.local is not None:
            paths = [self.local / name for name in names]
            with ThreadPoolExecutor(SYNCS) as pool:  # a disk takes many at once
                list(pool.map(_sync, [*paths, *{path.parent for path in paths}]))

    def open(self, name: str) -> pa.NativeFile:
        """Open a file of it for reading at any place.

        Raises:
            UserError: it is not there or cannot be read.
        """
        return open_input(self.path(name))

    def names(self, pattern: str = "*") -> list[str]:
        """Names of the files directly in it, sorted; hidden and unfinished ones left out. None there: an empty list."""
        if self.local is not None:
            try:
                found = [entry.name for entry in os.scandir(self.local) if entry.is_file()]
            except FileNotFoundError:
                return []
        else:
            system, inner = _remote(self.uri)
            with _explained(self.uri):
                infos = system.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True))
            found = [info.base_name for info in infos if info.is_file]
        return sorted(
            name
            for name in found
            if fnmatchcase(name, pattern) and not name.startswith(".") and not name.endswith(_TEMPORARY)
        )

    def remove(self, name: str, *, durable: bool = False) -> None:
        """Remove a file, if it is there; whether it must not come back after a power cut."""
        if self.local is not None:
            if (self.local / name).exists():
                (self.local / name).unlink()
                if durable:
                    sync_directory(self.local)
            return
        self._require_writable()
        system, inner = _remote(self.path(name))
        with _explained(self.path(name)):
            if system.get_file_info(inner).is_file:
                system.delete_file(inner)

    def remove_unfinished(self) -> None:
        """Remove what was being written here by processes that were killed; nobody may be writing here."""
        for path in self.local.glob(f"*{_TEMPORARY}") if self.local is not None else ():
            path.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return stat(self.path(name)) is not None

    def holds(self, path: str) -> str | None:
        """Name of a file below the folder by its path or address; None: it lies elsewhere."""
        if self.local is None or is_remote(path):
            name = path.removeprefix(f"{self.uri}/")
            return name if name != path else None
        inner, outer = os.path.realpath(path), os.path.realpath(self.local)
        return os.path.relpath(inner, outer) if inner.startswith(outer + os.sep) else None

    def lock(self) -> AbstractContextManager[object]:
        """Hold the folder for one writer; a remote folder cannot be held.

        Raises:
            UserError: another process holds it.
        """
        if self.local is None:
            return nullcontext()
        self.local.mkdir(parents=True, exist_ok=True)
        return lock_folder(self.local)

    def _require_writable(self) -> None:
        if self.uri.startswith("hf://"):
            raise UserError(f"{self.uri}: the hub is only read here; write to a local folder, s3:// or gs://")


def matches(path: str, pattern: str) -> bool:
    """Whether a remote path matches a pattern as the shell reads it: `*` stays in a folder, `**` crosses them.

    >>> matches("s3://b/x/y/a.txt", "s3://b/*/a.txt"), matches("s3://b/x/y/a.txt", "s3://b/**/a.txt")
    (False, True)
    """
    return _match_parts(path.split("/"), pattern.split("/"))


def _match_parts(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_match_parts(parts[skip:], patterns[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _match_parts(parts[1:], patterns[1:])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_local(path: str) -> pa.NativeFile:
    try:
        return pa.OSFile(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _remote(address: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of an address, and the path in it."""
    scheme, _, inner = address.partition("://")
    inner = inner.strip("/")
    bucket = inner.partition("/")[0]
    if not bucket:
        raise UserError(f"{address}: an address names a bucket and a path, such as {scheme}://bucket/folder")
    with _explained(address):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _file_system(scheme, bucket if scheme == "s3" else "", endpoint), inner


@lru_cache(maxsize=64)
def _file_system(scheme: str, bucket: str, endpoint: str | None) -> pyarrow.fs.FileSystem:
    """One for each process; that of S3 knows its bucket's region. `endpoint` is there for the cache's key."""
    if scheme == "s3":
        return pyarrow.fs.FileSystem.from_uri(f"s3://{bucket}")[0]
    if scheme == "gs":
        return pyarrow.fs.GcsFileSystem(retry_time_limit=timedelta(seconds=_RETRY_SECONDS))
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise UserError("hf://: reading from the hub needs huggingface_hub: pip install huggingface_hub") from None
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(HfFileSystem()))


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what storage answers into a message that says what to do."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{address}: no such file or folder") from None
    except Exception as error:  # the hub's client raises errors of several libraries
        if not isinstance(error, OSError | pa.ArrowException) and not address.startswith("hf://"):
            raise
        raise UserError(f"{address}: {_advice(address, f'{type(error).__name__}: {error}')}") from None


_STORAGE_ERRORS = ("AWS Error", "google::cloud::Status", "HTTP", "onnect")
_ADVICE = (
    (("NO_SUCH_BUCKET", "bucket not found", "bucket does not exist"), "there is no such bucket; check its name"),
    (
        ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "MISSING_AUTHENTICATION", "*HTTP*403*"),
        "access is refused; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) to keys that may use it",
    ),
    (
        ("NETWORK_CONNECTION", "*resolve host*", "*connect*", "*timed out*", "*unreachable*", "*retry policy*"),
        "storage cannot be reached; check the network and, for storage that is not Amazon's, AWS_ENDPOINT_URL",
    ),
)
_ADVICE_HUB = "the hub cannot be read; check the name, the network, and HF_TOKEN for what is not public"
_ADVICE_GOOGLE = "cannot be used; check the name, the network, and credentials (GOOGLE_APPLICATION_CREDENTIALS)"


def _advice(address: str, message: str) -> str:
    first = message.splitlines()[0]
    first = first if len(first) <= _SHOWN else first[:_SHOWN] + " …"
    if address.startswith("hf://"):
        return f"{_ADVICE_HUB} ({first})"
    if address.startswith("gs://"):
        return f"{_ADVICE_GOOGLE} ({first})"
    for marks, advice in _ADVICE:
        if any(fnmatch(message.lower(), f"*{mark.lower()}*") for mark in marks):
            return f"{advice} ({first})"
    return first


def _time(info: pyarrow.fs.FileInfo) -> int:
    return int(info.mtime_ns or 0)
